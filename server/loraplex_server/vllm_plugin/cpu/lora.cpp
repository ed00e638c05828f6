// Low-rank updates of many adapters on a CPU: y[row] += B (A x[row]) with the adapter of each row's slot.
//
// A table knows, per module and slot, where the adapter's A and B lie in memory; nothing is copied. `lp_rows` groups
// the rows of a step by slot once, `lp_add` then serves one module: all its packed slices, all groups, two phases
// ("shrink" t = A x, rounded once to the type of the weights; "expand" y += B t, accumulated in fp32, rounded once).
//
// Every function but lp_isa, lp_pack_b and lp_packed_b_bytes takes a table made by lp_table_new. Errors are the
// negative numbers of `Error`; nothing is thrown, and on an error y is unchanged. A table belongs to one thread at a
// time. There is no state but the tables. Memory behind bound pointers must stay as it is until unbound.

#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

enum Error : int {
    OK = 0,
    BAD_ARGUMENT = -1,  // a null pointer, a negative size
    NO_MODULE = -2,     // a module outside the table, or without geometry
    NO_SLOT = -3,       // a slot outside the table
    UNBOUND = -4,       // a row wants a slot in which there is no adapter
    WRONG_ROWS = -5,    // not the rows that lp_rows announced
    WRONG_TYPE = -6,    // not the type of the table's weights
    NO_SLICE = -7,      // a slice that the module has not, or bound twice
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

enum Kind : int { TOKENS = 0, SAMPLES = 1, KINDS = 2 };

// Packed B is cut into tiles of this many columns, the last one narrower; in a tile, rows of words lie one behind
// the other, so a product reads B in the order in which it lies in memory.
constexpr int64_t TILE = 64;
constexpr int64_t PREFETCH_BYTES = 1024;

// Costs of a call, by measurement on one machine (Zen 4); they decide how it is shared among threads, no more.
constexpr double READ_NS = 0.08;    // a byte of weights from memory, one thread
constexpr double ROW_NS = 0.006;    // the same byte multiplied with one row
constexpr double UNIT_NS = 4000;    // what a thread takes at a time
constexpr double WAKE_NS = 12000;   // work that makes waking a thread worth while
constexpr int64_t UNIT_ROWS = 64;   // rows a thread takes at a time, at most
constexpr int64_t UNIT_RANKS = 8;   // ranks it takes at least, so that words of t have one writer
constexpr int64_t YIELD_TURNS = 4096;

enum Type : int { BF16 = 0, FP32 = 1 };

INLINE int64_t size_of(int type) { return type == BF16 ? 2 : 4; }
INLINE int64_t words_of(int64_t rank, int type) { return type == BF16 ? (rank + 1) / 2 : rank; }

INLINE float bf16_to_float(uint16_t value) {
    const uint32_t bits = uint32_t(value) << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

INLINE uint16_t float_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return uint16_t((bits >> 16) | 0x40u);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Strides are in bytes. `rows` holds row numbers of x and y; t is indexed by place in `rows`.
struct Shrink {
    const char* x;
    int64_t x_stride;
    const int32_t* rows;
    const char* a;
    int64_t in_features;
    char* t;
    int64_t t_stride;
    int64_t row_from, row_to, rank_from, rank_to;
};

struct Expand {
    char* y;
    int64_t y_stride;
    const int32_t* rows;
    const char* b;
    const char* t;
    int64_t t_stride;
    int64_t words;  // of a row of t
    int64_t row_from, row_to, column_from, column_to;
};

struct Kernels {
    void (*shrink[2])(const Shrink&);
    void (*expand[2])(const Expand&);
};

#define ISA_NAMESPACE generic
#define ISA_BYTES 16
#include "lora_kernels.inc"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define ISA_NAMESPACE avx2
#define ISA_BYTES 32
#include "lora_kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#endif
#define ISA_NAMESPACE avx512
#define ISA_BYTES 64
#include "lora_kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#endif
#define ISA_NAMESPACE avx512bf16
#define ISA_BYTES 64
#define ISA_DPBF16
#include "lora_kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

struct Isa {
    const char* name;
    const Kernels* kernels;
    bool here;
};

// The best instruction set of this machine, or the one named by LORAPLEX_CPU_ISA where the machine has it.
Isa choose_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool pairs = avx512 && __builtin_cpu_supports("avx512bf16");
    const Isa all[] = {
        {"avx512bf16", &avx512bf16::KERNELS, pairs},
        {"avx512", &avx512::KERNELS, avx512},
        {"avx2", &avx2::KERNELS, avx2},
        {"generic", &generic::KERNELS, true},
    };
#else
    const Isa all[] = {{"generic", &generic::KERNELS, true}};
#endif
    const char* wanted = getenv("LORAPLEX_CPU_ISA");
    if (wanted && *wanted)
        for (const Isa& one : all)
            if (one.here && strcmp(one.name, wanted) == 0) return one;
    for (const Isa& one : all)
        if (one.here) return one;
    return all[0];
}

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
};

int64_t rounded_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// The pieces of a call, with room for t. Rows are checked here, once per call.
int collect(Table& table, Module& module, int kind, int64_t n_rows) {
    const Rows& rows = table.rows[kind];
    table.pieces.clear();
    const bool resized = kind == SAMPLES && n_rows != rows.n && rows.uniform;
    if (resized)
        for (int64_t i = int64_t(table.counting.size()); i < n_rows; i++) table.counting.push_back(int32_t(i));
    int64_t bytes = 0;
    for (const Group& group : rows.groups) {
        if (!table.bound[size_t(group.slot)]) return UNBOUND;
        for (size_t s = 0; s < module.slices.size(); s++) {
            const Weights& weights = module.weights[size_t(group.slot) * module.slices.size() + s];
            if (!weights.rank) continue;
            if (!resized && (n_rows < rows.n || (kind == SAMPLES && n_rows > rows.n))) return WRONG_ROWS;
            const int64_t count = resized ? n_rows : group.count;
            const int32_t* first = resized ? table.counting.data() : rows.order.data() + group.first;
            const int64_t stride = words_of(weights.rank, table.type) * 4;
            table.pieces.push_back({&weights, &module.slices[s], first, count, nullptr, stride});
            bytes += rounded_up(count * stride, 64);
        }
    }
    if (int64_t(table.t.size()) < bytes) table.t.resize(size_t(bytes));
    char* at = table.t.data();
    for (Piece& piece : table.pieces) {
        piece.t = at;
        at += rounded_up(piece.n_rows * piece.t_stride, 64);
    }
    return OK;
}

struct Call {
    char* y;
    int64_t y_stride;
    const char* x;
    int64_t x_stride;
    int64_t in_features;
};

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// What one byte of weights costs: it is read from memory once, and multiplied with every row of its group.
double cost_ns(int64_t bytes, int64_t n_rows) { return double(bytes) * (READ_NS + ROW_NS * double(n_rows)); }

// How many pieces of `step` to cut `n` into so that each costs about UNIT_NS.
int64_t chunk(int64_t n, int64_t step, double cost) {
    const int64_t parts = larger(1, int64_t(cost / UNIT_NS + 0.5));
    return rounded_up(larger(1, (n + parts - 1) / parts), step);
}

// Cut the pieces of a call into units that threads claim one by one; returns the cost of all.
double plan(Table& table, const Module& module) {
    double total = 0;
    table.units.clear();
    for (const Piece& piece : table.pieces) {
        const int64_t rank = piece.weights->rank, bytes = rank * module.in_features * size_of(table.type);
        const double cost = cost_ns(bytes, smaller(piece.n_rows, UNIT_ROWS));
        const int64_t ranks = chunk(rank, UNIT_RANKS, cost);
        for (int64_t row = 0; row < piece.n_rows; row += UNIT_ROWS)
            for (int64_t r = 0; r < rank; r += ranks)
                table.units.push_back({&piece, row, smaller(row + UNIT_ROWS, piece.n_rows), r, smaller(r + ranks, rank)});
        total += cost_ns(bytes, piece.n_rows);
    }
    table.n_shrink = int64_t(table.units.size());
    for (const Piece& piece : table.pieces) {
        const int64_t out = piece.slice->out_features, bytes = words_of(piece.weights->rank, table.type) * out * 4;
        const double cost = cost_ns(bytes, smaller(piece.n_rows, UNIT_ROWS));
        const int64_t columns = chunk(out, TILE, cost);
        for (int64_t row = 0; row < piece.n_rows; row += UNIT_ROWS)
            for (int64_t c = 0; c < out; c += columns)
                table.units.push_back({&piece, row, smaller(row + UNIT_ROWS, piece.n_rows), c, smaller(c + columns, out)});
        total += cost_ns(bytes, piece.n_rows);
    }
    return total;
}

void shrink_unit(const Table& table, const Call& call, const Unit& unit) {
    const Piece& piece = *unit.piece;
    const int64_t rank = piece.weights->rank;
    if (table.type == BF16 && rank % 2 && unit.to == rank)  // the second half of the last word
        for (int64_t i = unit.row_from; i < unit.row_to; i++) memset(piece.t + i * piece.t_stride + rank * 2, 0, 2);
    table.isa.kernels->shrink[table.type]({call.x, call.x_stride, piece.rows, piece.weights->a, call.in_features,
                                           piece.t, piece.t_stride, unit.row_from, unit.row_to, unit.from, unit.to});
}

void expand_unit(const Table& table, const Call& call, const Unit& unit) {
    const Piece& piece = *unit.piece;
    table.isa.kernels->expand[table.type](
        {call.y + piece.slice->column * size_of(table.type), call.y_stride, piece.rows, piece.weights->b, piece.t,
         piece.t_stride, words_of(piece.weights->rank, table.type), unit.row_from, unit.row_to, unit.from, unit.to});
}

void pause(int64_t turn) {
    if (turn % YIELD_TURNS == YIELD_TURNS - 1) sched_yield();
#if defined(__x86_64__)
    else __builtin_ia32_pause();
#endif
}

// One thread's part of a call: units until there are none, with all of the first phase done before the second.
void work(Table& table, const Call& call) {
    const int64_t n = int64_t(table.units.size()), n_shrink = table.n_shrink;
    Counters& counters = *table.counters;
    for (int64_t i; (i = counters.shrink.fetch_add(1, std::memory_order_relaxed)) < n_shrink;) {
        shrink_unit(table, call, table.units[size_t(i)]);
        counters.shrunk.fetch_add(1, std::memory_order_release);
    }
    for (int64_t turn = 0; counters.shrunk.load(std::memory_order_acquire) < n_shrink; turn++) pause(turn);
    for (int64_t i; (i = n_shrink + counters.expand.fetch_add(1, std::memory_order_relaxed)) < n;)
        expand_unit(table, call, table.units[size_t(i)]);
}

// Waking a sleeping thread takes about WAKE_NS, so a call gets as many threads as it can keep busy for longer.
void run(Table& table, const Call& call, double cost) {
    const int threads = int(larger(1, smaller(omp_get_max_threads(), int64_t(cost / WAKE_NS))));
    Counters& counters = *table.counters;
    counters.shrink = counters.shrunk = counters.expand = 0;
    if (threads == 1) return work(table, call);
#pragma omp parallel num_threads(threads)
    {
        work(table, call);
    }
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

void pack_word(char* to, const void* src, int64_t row, int64_t word, int64_t rank, float scale, int type) {
    if (type == FP32) {
        const float value = static_cast<const float*>(src)[row + word] * scale;
        memcpy(to, &value, 4);
        return;
    }
    const uint16_t* from = static_cast<const uint16_t*>(src) + row + word * 2;
    uint16_t pair[2] = {from[0], 0};
    if (word * 2 + 1 < rank) pair[1] = from[1];
    if (scale != 1.0f)
        for (uint16_t& one : pair) one = float_to_bf16(bf16_to_float(one) * scale);
    memcpy(to, pair, 4);
}

template <class Body>
int guarded(Body body) {
    try {
        return body();
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    } catch (...) {
        return BAD_ARGUMENT;
    }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// The instruction set in use, one of "avx512bf16", "avx512", "avx2", "generic".
const char* lp_isa(void) { return choose_isa().name; }

// A table for `n_modules` modules and `n_slots` slots of weights of `type` (0 bf16, 1 fp32); null on an error.
void* lp_table_new(int n_modules, int n_slots, int type) {
    if (n_modules < 1 || n_modules > MODULES_MAX || n_slots < 1 || n_slots > SLOTS_MAX) return nullptr;
    if (type != BF16 && type != FP32) return nullptr;
    try {
        return new Table(n_modules, n_slots, type);
    } catch (...) {
        return nullptr;
    }
}

void lp_table_free(void* table) { delete static_cast<Table*>(table); }

// The geometry of one module: slice s adds to columns column[s] .. column[s] + out_features[s] of y. Slices must
// not overlap. Unbinds nothing, so describe modules before any slot is bound.
int lp_module(void* table, int module, int n_slices, int64_t in_features, const int64_t* column,
              const int64_t* out_features) {
    if (!table || !column || !out_features) return BAD_ARGUMENT;
    return guarded([&]() -> int {
        Table& own = *static_cast<Table*>(table);
        if (module < 0 || size_t(module) >= own.modules.size()) return NO_MODULE;
        if (n_slices < 1 || n_slices > SLICES_MAX) return NO_SLICE;
        if (in_features < 1 || in_features > FEATURES_MAX) return BAD_ARGUMENT;
        for (char bound : own.bound)
            if (bound) return BAD_ARGUMENT;
        Module made;
        made.in_features = in_features;
        for (int s = 0; s < n_slices; s++) {
            if (column[s] < made.width || out_features[s] < 1) return BAD_ARGUMENT;  // in order, so never overlapping
            if (column[s] > FEATURES_MAX || out_features[s] > FEATURES_MAX) return BAD_ARGUMENT;
            made.slices.push_back({column[s], out_features[s]});
            made.width = column[s] + out_features[s];
        }
        made.weights.resize(size_t(own.n_slots) * size_t(n_slices));
        own.modules[size_t(module)] = std::move(made);
        return OK;
    });
}

// Put an adapter into a slot, in place of what was there: n entries of (module, slice, rank, A, packed B); slices
// that are not named are untouched by it. A is (rank, in_features), B as lp_pack_b writes it.
int lp_bind(void* table, int slot, int n, const int32_t* module, const int32_t* slice, const int32_t* rank,
            const void* const* a, const void* const* b) {
    if (!table || n < 0 || (n && (!module || !slice || !rank || !a || !b))) return BAD_ARGUMENT;
    Table& own = *static_cast<Table*>(table);
    if (slot < 0 || slot >= own.n_slots) return NO_SLOT;
    const int error = check_bind(own, n, module, slice, rank, a, b);
    if (error) return error;
    clear_slot(own, slot);
    for (int i = 0; i < n; i++) {
        Module& one = own.modules[size_t(module[i])];
        one.weights[size_t(slot) * one.slices.size() + size_t(slice[i])] = {
            static_cast<const char*>(a[i]), static_cast<const char*>(b[i]), rank[i]};
    }
    own.bound[size_t(slot)] = 1;
    return OK;
}

// Empty a slot; a batch that still names it is refused by lp_add.
int lp_unbind(void* table, int slot) {
    if (!table) return BAD_ARGUMENT;
    Table& own = *static_cast<Table*>(table);
    if (slot < 0 || slot >= own.n_slots) return NO_SLOT;
    clear_slot(own, slot);
    return OK;
}

// Announce the slot of each row of the coming calls, negative for the base model; kind 0 tokens, 1 samples.
int lp_rows(void* table, int kind, const int32_t* slot_of_row, int64_t n_rows) {
    if (!table || kind < 0 || kind >= KINDS || n_rows < 0 || n_rows > ROWS_MAX) return BAD_ARGUMENT;
    if (n_rows && !slot_of_row) return BAD_ARGUMENT;
    return guarded([&]() -> int {
        Table& own = *static_cast<Table*>(table);
        Rows& rows = own.rows[kind];
        const int error = set_rows(own, rows, slot_of_row, n_rows);
        if (error) {
            rows.groups.clear();
            rows.n = 0;
        }
        return error;
    });
}

// y[row] += B (A x[row]) for one module. y (n_rows, width) and x (n_rows, in_features) have unit stride in a row;
// strides are in values. Of tokens there may be more rows than announced (padding: left alone), not fewer. Of samples
// there may be any number where all announced rows want one adapter: then every row gets it (vLLM asks for the logits
// of a whole prompt so); else exactly as many as announced.
int lp_add(void* table, int module, int kind, void* y, int64_t y_stride, const void* x, int64_t x_stride,
           int64_t n_rows, int type) {
    if (!table || kind < 0 || kind >= KINDS || n_rows < 0 || n_rows > ROWS_MAX) return BAD_ARGUMENT;
    return guarded([&]() -> int {
        Table& own = *static_cast<Table*>(table);
        if (module < 0 || size_t(module) >= own.modules.size()) return NO_MODULE;
        Module& one = own.modules[size_t(module)];
        if (one.slices.empty()) return NO_MODULE;
        if (own.rows[kind].groups.empty()) return OK;
        if (type != own.type) return WRONG_TYPE;
        const int error = collect(own, one, kind, n_rows);
        if (error) return error;
        if (own.pieces.empty() || !n_rows) return OK;
        if (!y || !x) return BAD_ARGUMENT;
        if (n_rows > 1 && (y_stride < one.width || x_stride < one.in_features)) return NARROW;
        const int64_t size = size_of(type);
        const double cost = plan(own, one);
        run(own, {static_cast<char*>(y), y_stride * size, static_cast<const char*>(x), x_stride * size, one.in_features},
            cost);
        return OK;
    });
}

// y[row] += B A[ids[row]] for an embedding: here A is (vocabulary, rank), the module's in_features its vocabulary.
// Ids of rows of the base model are not looked at.
int lp_add_embedding(void* table, int module, void* y, int64_t y_stride, const int64_t* ids, int64_t n_rows,
                     int type) {
    if (!table || n_rows < 0 || n_rows > ROWS_MAX) return BAD_ARGUMENT;
    return guarded([&]() -> int {
        Table& own = *static_cast<Table*>(table);
        if (module < 0 || size_t(module) >= own.modules.size()) return NO_MODULE;
        Module& one = own.modules[size_t(module)];
        if (one.slices.empty()) return NO_MODULE;
        if (own.rows[TOKENS].groups.empty()) return OK;
        if (type != own.type) return WRONG_TYPE;
        const int error = collect(own, one, TOKENS, n_rows);
        if (error) return error;
        if (own.pieces.empty() || !n_rows) return OK;
        if (!y || !ids) return BAD_ARGUMENT;
        if (n_rows > 1 && y_stride < one.width) return NARROW;
        const int64_t size = size_of(type);
        for (const Piece& piece : own.pieces)
            for (int64_t i = 0; i < piece.n_rows; i++) {
                const int64_t id = ids[piece.rows[i]];
                if (id < 0 || id >= one.in_features) return OUT_OF_TABLE;
            }
        const Call call = {static_cast<char*>(y), y_stride * size, nullptr, 0, one.in_features};
        for (const Piece& piece : own.pieces) {
            const int64_t bytes = piece.weights->rank * size;
            memset(piece.t, 0, size_t(piece.n_rows * piece.t_stride));
            for (int64_t i = 0; i < piece.n_rows; i++)
                memcpy(piece.t + i * piece.t_stride, piece.weights->a + ids[piece.rows[i]] * bytes, size_t(bytes));
            expand_unit(own, call, {&piece, 0, piece.n_rows, 0, piece.slice->out_features});
        }
        return OK;
    });
}

// Bytes of B (out, rank) when packed; negative on an error.
int64_t lp_packed_b_bytes(int64_t out, int64_t rank, int type) {
    if (out < 1 || out > FEATURES_MAX || rank < 1 || rank > RANK_MAX) return BAD_ARGUMENT;
    if (type != BF16 && type != FP32) return WRONG_TYPE;
    return words_of(rank, type) * out * 4;
}

// Scale B (out, rank), rows `src_stride` values apart, and write it as words along the rank, tile by tile of TILE
// outputs: bf16 as (tile, ceil(rank / 2), width, 2), fp32 as (tile, rank, width).
int lp_pack_b(void* dst, const void* src, int64_t out, int64_t rank, int64_t src_stride, float scale, int type) {
    const int64_t bytes = lp_packed_b_bytes(out, rank, type);
    if (bytes < 0) return int(bytes);
    if (!dst || !src || src_stride < rank) return BAD_ARGUMENT;
    const int64_t words = words_of(rank, type);
    char* to = static_cast<char*>(dst);
    for (int64_t from = 0; from < out; from += TILE) {
        const int64_t width = smaller(TILE, out - from);
        for (int64_t word = 0; word < words; word++)
            for (int64_t o = from; o < from + width; o++, to += 4) pack_word(to, src, o * src_stride, word, rank, scale, type);
    }
    return OK;
}

}  // extern "C"
#pragma GCC visibility pop
