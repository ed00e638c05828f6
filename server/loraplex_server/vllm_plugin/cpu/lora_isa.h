// What every part of the kernels shares: types, the arithmetic for each instruction set, and the choice among them.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

// Packed B is cut into tiles of this many columns, the last one narrower; in a tile, rows of words lie one behind
// the other, so a product reads B in the order in which it lies in memory.
constexpr int64_t TILE = 64;

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

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t rounded_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

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
    int64_t out_features;
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
inline Isa choose_isa() {
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

}  // namespace
