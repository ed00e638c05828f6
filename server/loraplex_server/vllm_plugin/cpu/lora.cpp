// Low-rank updates of many adapters on a CPU: y[row] += B (A x[row]) with the adapter of each row's slot.
//
// A table knows, per module and slot, where the adapter's A and B lie in memory; nothing is copied. `lp_rows` groups
// the rows of a step by slot once, `lp_add` then serves one module: all its packed slices, all groups, two phases
// ("shrink" t = A x, rounded once to the type of the weights; "expand" y += B t, accumulated in fp32, rounded once).
//
// Every function but lp_isa, lp_pack_b and lp_packed_b_bytes takes a table made by lp_table_new. Errors are the
// negative numbers of `Error`; nothing is thrown, and on an error y is unchanged. A table belongs to one thread at a
// time. There is no state but the tables. Memory behind bound pointers must stay as it is until unbound.

#include <new>

#include "lora_plan.h"

namespace {

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

// Announce the slot of each row of the coming calls, negative for the base model; kind 0 tokens, 1 samples,
// 2 tokens but for those that the caller serves itself (lp_add_embedding takes all of kind 0).
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
    if (!table || kind < 0 || kind > LEFT || n_rows < 0 || n_rows > ROWS_MAX) return BAD_ARGUMENT;
    const Which which = kind == LEFT ? Which::LEFT : Which::ALL;
    if (kind == LEFT) kind = TOKENS;
    return guarded([&]() -> int {
        Table& own = *static_cast<Table*>(table);
        Module* const described = module_of(own, module);
        if (!described) return NO_MODULE;
        Module& one = *described;
        if (own.rows[kind].groups.empty()) return OK;
        if (type != own.type) return WRONG_TYPE;
        const int error = collect(own, one, kind, n_rows, which);
        if (error) return error;
        if (own.pieces.empty() || !n_rows) return OK;
        if (!y || !x) return BAD_ARGUMENT;
        if (n_rows > 1 && (y_stride < one.width || x_stride < one.in_features)) return NARROW;
        const int64_t size = size_of(type);
        const double cost = plan_shrink(own, one) + plan_expand(own);
        run(own, {static_cast<char*>(y), y_stride * size, static_cast<const char*>(x), x_stride * size, one.in_features},
            cost);
        return OK;
    });
}

// 1 where some of the tokens announced would go along with a linear layer (lp_add_beside), 0 where none would.
int lp_any_beside(void* table) { return table && any_beside(*static_cast<Table*>(table)); }

// As lp_add for tokens, beside the linear layer of the same x and y: `*beside` is what that layer is to be given, valid
// until the next call for the table; null for nothing. `*left` is 1 where there is more to be added afterwards: by lp_add
// for kind LEFT, or, with nothing to go along, TOKENS. It all gives the same to the bit.
int lp_add_beside(void* table, int module, void* y, int64_t y_stride, const void* x, int64_t x_stride, int64_t n_rows,
                  int type, const Beside** beside, int* left) {
    if (!table || !beside || !left || n_rows < 0 || n_rows > ROWS_MAX) return BAD_ARGUMENT;
    *beside = nullptr;
    *left = 0;
    return guarded([&]() -> int {
        Table& own = *static_cast<Table*>(table);
        Module* const described = module_of(own, module);
        if (!described) return NO_MODULE;
        Module& one = *described;
        if (own.rows[TOKENS].groups.empty()) return OK;
        if (type != own.type) return WRONG_TYPE;
        const Rows& rows = own.rows[TOKENS];
        const bool fits = fits_beside(own, one);
        *left = !fits || !std::all_of(rows.groups.begin(), rows.groups.end(),
                                      [&](const Group& group) { return goes_beside(rows, group); });
        if (!fits) return OK;
        const int error = collect(own, one, TOKENS, n_rows, Which::BESIDE);
        if (error) return error;
        if (!y || !x) return BAD_ARGUMENT;
        if (y_stride < one.width || x_stride < one.in_features) return NARROW;
        const int64_t size = size_of(type);
        plan_shrink(own, one);
        reset(own);
        own.call = {static_cast<char*>(y), y_stride * size, static_cast<const char*>(x), x_stride * size, one.in_features};
        own.beside = {before, behind, table};
        *beside = &own.beside;
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
        Module* const described = module_of(own, module);
        if (!described) return NO_MODULE;
        Module& one = *described;
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
