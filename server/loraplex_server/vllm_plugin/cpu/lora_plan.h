// One call: what is to be done for a module and the rows of the step, cut into units, and the threads that do them.

#pragma once

#include <sched.h>

#include <algorithm>

#include "lora_table.h"

// torch's OpenMP runtime, called by the C interface that GNU's, LLVM's and Intel's all have: so any compiler will do, and
// none brings in a runtime of its own.
extern "C" int omp_get_max_threads(void) noexcept;
extern "C" void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags);

namespace {

// Costs of a call, by measurement on one machine (Zen 4); they decide how it is shared among threads, no more.
constexpr double READ_NS = 0.08;    // a byte of weights from memory, one thread
constexpr double ROW_NS = 0.006;    // the same byte multiplied with one row
constexpr double UNIT_NS = 4000;    // what a thread takes at a time
constexpr double WAKE_NS = 3000;     // what sharing a call with other threads costs while they are awake
constexpr int64_t UNIT_ROWS = 64;   // rows a thread takes at a time, at most
constexpr int64_t STREAM_ROWS = 16; // of y, where there are more than UNIT_ROWS: a thread goes along so many, which is
constexpr int64_t CACHED_BYTES = 256 << 10;  // how memory is read fastest, as far as B stays in its cache meanwhile
constexpr int64_t UNIT_RANKS = 8;   // ranks it takes at least, so that words of t have one writer
constexpr int64_t BESIDE_ROWS = 64;  // of a group, from which it goes along with the linear layer: B is then read half a
                                     // tile at a time, which few rows would wait for
constexpr int64_t YIELD_TURNS = 256;  // waits of some 20 ns

// Which groups of rows a call is for.
enum class Which { ALL, BESIDE, LEFT };

bool goes_beside(const Rows& rows, const Group& group) { return rows.groups.size() == 1 || group.count >= BESIDE_ROWS; }

// The pieces of a call, with room for t. Rows are checked here, once per call.
int collect(Table& table, Module& module, int kind, int64_t n_rows, Which which = Which::ALL) {
    const Rows& rows = table.rows[kind];
    table.pieces.clear();
    const bool resized = kind == SAMPLES && n_rows != rows.n && rows.uniform;
    if (resized)
        for (int64_t i = int64_t(table.counting.size()); i < n_rows; i++) table.counting.push_back(int32_t(i));
    int64_t bytes = 0;
    for (const Group& group : rows.groups) {
        if (!table.bound[size_t(group.slot)]) return UNBOUND;
        if (which != Which::ALL && goes_beside(rows, group) != (which == Which::BESIDE)) continue;
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

// What one byte of weights costs: it is read from memory once, and multiplied with every row of its group.
double cost_ns(int64_t bytes, int64_t n_rows) { return double(bytes) * (READ_NS + ROW_NS * double(n_rows)); }

// How many pieces of `step` to cut `n` into so that each costs about UNIT_NS.
int64_t chunk(int64_t n, int64_t step, double cost) {
    const int64_t parts = larger(1, int64_t(cost / UNIT_NS + 0.5));
    return rounded_up(larger(1, (n + parts - 1) / parts), step);
}

// Cut the first phase of a call into units that threads claim one by one; returns the cost of all.
double plan_shrink(Table& table, const Module& module) {
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
    return total;
}

// The same of the second phase.
double plan_expand(Table& table) {
    double total = 0;
    for (const Piece& piece : table.pieces) {
        const int64_t out = piece.slice->out_features, bytes = words_of(piece.weights->rank, table.type) * out * 4;
        const bool few = piece.n_rows <= UNIT_ROWS;
        const int64_t height = few ? UNIT_ROWS : STREAM_ROWS;
        const int64_t columns = few ? chunk(out, TILE, cost_ns(bytes, piece.n_rows))
                                    : rounded_up((out * CACHED_BYTES + bytes - 1) / bytes, TILE);
        for (int64_t row = 0; row < piece.n_rows; row += height)
            for (int64_t c = 0; c < out; c += columns)
                table.units.push_back({&piece, row, smaller(row + height, piece.n_rows), c, smaller(c + columns, out)});
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
         piece.t_stride, words_of(piece.weights->rank, table.type), piece.slice->out_features, unit.row_from, unit.row_to, unit.from, unit.to});
}

// Wait for another thread's unit, which takes a few microseconds; longer only where that thread has lost its core, and
// then ours may be the one it needs.
void await(int64_t turn) {
    if (turn % YIELD_TURNS == YIELD_TURNS - 1) {
        sched_yield();
        return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// One thread's part of the first phase: units until there are none, and all of them done.
void shrink_all(Table& table, const Call& call) {
    const int64_t n_shrink = table.n_shrink;
    Counters& counters = *table.counters;
    for (int64_t i; (i = counters.shrink.fetch_add(1, std::memory_order_relaxed)) < n_shrink;) {
        shrink_unit(table, call, table.units[size_t(i)]);
        counters.shrunk.fetch_add(1, std::memory_order_release);
    }
    for (int64_t turn = 0; counters.shrunk.load(std::memory_order_acquire) < n_shrink; turn++) await(turn);
}

// One thread's part of a call.
void work(Table& table, const Call& call) {
    shrink_all(table, call);
    const int64_t n = int64_t(table.units.size()), n_shrink = table.n_shrink;
    for (int64_t i; (i = n_shrink + table.counters->expand.fetch_add(1, std::memory_order_relaxed)) < n;)
        expand_unit(table, call, table.units[size_t(i)]);
}

struct Shared {
    Table& table;
    const Call& call;
};

void work_shared(void* shared) { work(static_cast<Shared*>(shared)->table, static_cast<Shared*>(shared)->call); }

void reset(Table& table) {
    Counters& counters = *table.counters;
    counters.shrink = counters.shrunk = counters.expand = 0;
}

// Sharing a call with other threads costs about WAKE_NS. It gets all of them or none: GNU's runtime ends the threads that
// a smaller team leaves over, and starts new ones for the next.
void run(Table& table, const Call& call, double cost) {
    const int64_t threads = cost < 2 * WAKE_NS ? 1 : omp_get_max_threads();
    reset(table);
    if (threads == 1) return work(table, call);
    Shared shared = {table, call};
    GOMP_parallel(work_shared, &shared, unsigned(threads), 0);
}

// Going along with a linear layer: its threads do the first phase before they begin, and the second for columns of y that
// one of them has just written, which are in its cache then.
bool any_beside(const Table& table) {
    const Rows& rows = table.rows[TOKENS];
    return table.type == BF16 &&
           std::any_of(rows.groups.begin(), rows.groups.end(), [&](const Group& one) { return goes_beside(rows, one); });
}

bool fits_beside(const Table& table, const Module& module) {
    for (const Slice& slice : module.slices)
        if (slice.column % kBesideColumns) return false;
    return any_beside(table);
}

void before(void* table) { shrink_all(*static_cast<Table*>(table), static_cast<Table*>(table)->call); }

// The first place of a piece whose row is not before `row`.
int64_t place_of(const Piece& piece, int64_t row) {
    const int32_t *rows = piece.rows, *end = rows + piece.n_rows;  // ascending
    if (end[-1] - rows[0] + 1 == piece.n_rows) return smaller(larger(row - rows[0], 0), piece.n_rows);
    return std::lower_bound(rows, end, row) - rows;
}

void behind(void* data, int64_t row_from, int64_t row_to, int64_t column_from, int64_t column_to) {
    const Table& table = *static_cast<Table*>(data);
    for (const Piece& piece : table.pieces) {
        const int64_t column = piece.slice->column;
        const int64_t from = larger(column_from, column), to = smaller(column_to, column + piece.slice->out_features);
        if (from >= to) continue;
        const int64_t first = place_of(piece, row_from), last = place_of(piece, row_to);
        if (first < last) expand_unit(table, table.call, {&piece, first, last, from - column, to - column});
    }
}

}  // namespace
