// The table: which adapter lies where, and which rows want it. Nothing here multiplies.

#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "beside.h"
#include "lora_isa.h"

namespace {

enum Error : int {
    OK = 0,
    BAD_ARGUMENT = -1,  // a null pointer, a negative size
    NO_MODULE = -2,     // a module outside the table, or without geometry
    NO_SLOT = -3,       // a slot outside the table
    UNBOUND = -4,       // a row wants a slot in which there is no adapter
    WRONG_ROWS = -5,    // not the rows that lp_rows announced
    WRONG_TYPE = -6,    // not the type of the table's weights
    NO_SLICE = -7,      // a slice that the module has not
    WRONG_RANK = -8,    // outside 0..RANK_MAX
    NARROW = -9,        // rows of x or y shorter than the module's
    NO_MEMORY = -10,
    OUT_OF_TABLE = -11,  // an id outside the embedding
};

constexpr int MODULES_MAX = 1 << 16;
constexpr int SLOTS_MAX = 1 << 16;
constexpr int SLICES_MAX = 64;
constexpr int64_t FEATURES_MAX = int64_t(1) << 24;  // also the vocabulary of an embedding
constexpr int64_t ROWS_MAX = int64_t(1) << 24;
constexpr int RANK_MAX = 4096;

// REST: tokens but for those served elsewhere. LEFT, for lp_add alone: tokens that lp_add_beside left.
enum Kind : int { TOKENS = 0, SAMPLES = 1, REST = 2, KINDS = 3, LEFT = 3 };

// Where one slice of one adapter lies; rank 0: the adapter does not touch it.
struct Weights {
    const char* a = nullptr;
    const char* b = nullptr;
    int64_t rank = 0;
};

struct Slice {
    int64_t column = 0;
    int64_t out_features = 0;
};

struct Module {
    int64_t in_features = 0;
    int64_t width = 0;  // columns of y that the slices need
    std::vector<Slice> slices;
    std::vector<Weights> weights;  // [slot][slice]
};

struct Group {
    int32_t slot;
    int64_t first, count;  // its rows in Rows::order
};

struct Rows {
    int64_t n = 0;
    bool uniform = false;         // one group, which holds every row
    std::vector<int32_t> order;   // rows with a slot, grouped
    std::vector<Group> groups;
    std::vector<int64_t> counts;  // per slot, scratch
};

// One group and slice to be served in a call.
struct Piece {
    const Weights* weights;
    const Slice* slice;
    const int32_t* rows;
    int64_t n_rows;
    char* t;
    int64_t t_stride;
};

// Some rows of a piece, and of its ranks (first phase) or columns (second).
struct Unit {
    const Piece* piece;
    int64_t row_from, row_to, from, to;
};

// What the threads of a call share, each on a cache line of its own.
struct Counters {
    alignas(64) std::atomic<int64_t> shrink{0};  // units of the first phase that are taken
    alignas(64) std::atomic<int64_t> shrunk{0};  // ... that are done
    alignas(64) std::atomic<int64_t> expand{0};  // units of the second phase that are taken
};

struct Call {
    char* y;
    int64_t y_stride;
    const char* x;
    int64_t x_stride;
    int64_t in_features;
};

struct Table {
    Table(int modules, int slots, int type)
        : type(type), isa(choose_isa()), n_slots(slots), modules(size_t(modules)), bound(size_t(slots)) {}
    int type;
    Isa isa;
    int n_slots;
    std::vector<Module> modules;
    std::vector<char> bound;  // per slot
    Rows rows[KINDS];
    std::vector<int32_t> counting;  // 0, 1, 2 ...: the rows of a uniform batch of another size
    std::vector<Piece> pieces;
    std::vector<Unit> units;
    int64_t n_shrink = 0;  // the first units are of the first phase
    std::unique_ptr<Counters> counters{new Counters};
    std::vector<char> t;
    Call call = {};  // the one that goes along with a linear layer
    Beside beside = {};
};

// A module that has been described; null where there is none of that number.
Module* module_of(Table& table, int module) {
    if (module < 0 || size_t(module) >= table.modules.size()) return nullptr;
    Module& one = table.modules[size_t(module)];
    return one.slices.empty() ? nullptr : &one;
}

int set_rows(Table& table, Rows& rows, const int32_t* slot_of_row, int64_t n_rows) {
    rows.n = 0;
    rows.uniform = false;
    rows.groups.clear();
    rows.order.clear();
    rows.counts.assign(size_t(table.n_slots), 0);
    int64_t wanted = 0;
    for (int64_t i = 0; i < n_rows; i++) {
        const int32_t slot = slot_of_row[i];
        if (slot < 0) continue;
        if (slot >= table.n_slots) return NO_SLOT;
        if (!table.bound[size_t(slot)]) return UNBOUND;
        rows.counts[size_t(slot)]++;
        wanted++;
    }
    rows.order.resize(size_t(wanted));
    int64_t first = 0;
    for (int32_t slot = 0; slot < table.n_slots; slot++) {
        const int64_t count = rows.counts[size_t(slot)];
        if (count) rows.groups.push_back({slot, first, count});
        rows.counts[size_t(slot)] = first;
        first += count;
    }
    for (int64_t i = 0; i < n_rows; i++)
        if (slot_of_row[i] >= 0) rows.order[size_t(rows.counts[size_t(slot_of_row[i])]++)] = int32_t(i);
    rows.n = n_rows;
    rows.uniform = rows.groups.size() == 1 && wanted == n_rows;
    return OK;
}

int check_bind(const Table& table, int n, const int32_t* module, const int32_t* slice, const int32_t* rank,
               const void* const* a, const void* const* b) {
    for (int i = 0; i < n; i++) {
        if (module[i] < 0 || size_t(module[i]) >= table.modules.size()) return NO_MODULE;
        const Module& one = table.modules[size_t(module[i])];
        if (one.slices.empty()) return NO_MODULE;
        if (slice[i] < 0 || size_t(slice[i]) >= one.slices.size()) return NO_SLICE;
        if (rank[i] < 0 || rank[i] > RANK_MAX) return WRONG_RANK;
        if (rank[i] && (!a[i] || !b[i])) return BAD_ARGUMENT;
    }
    return OK;
}

void clear_slot(Table& table, int slot) {
    table.bound[size_t(slot)] = 0;
    for (Module& module : table.modules)
        for (size_t s = 0; s < module.slices.size(); s++)
            module.weights[size_t(slot) * module.slices.size() + s] = Weights();
}

}  // namespace
