// NF4 linear layers on a CPU with AVX-512-BF16: y = x W^T + bias, W kept in four bits. Plain C ABI, no torch.
// `int8` chooses between the two layouts of a packed weight: for products in bf16, or in eight bits (nf4_int8.h).
#include "nf4_int8.h"

namespace {

struct Nf4 : Nf4Weights {
  ISA void few(const uint32_t* x, int64_t rows, int64_t number, float* sums) const {
    const __m512 table = _mm512_loadu_ps(code);
    const int64_t stride = panel_bytes(k, group), groups = k / group;
    if (rows <= kTwo) return kTwoOfFew[rows](x, panel(2 * number), stride, groups, group, sums, table);
    for (int half = 0; half < 2; ++half)
      kOneOfFew[rows](x, panel(2 * number + half), stride, groups, group, sums + kPanel * half, table);
  }

  struct Pair {
    const uint16_t *first, *second;
  };
  ISA Pair part(int64_t number, int64_t pair, int64_t pairs, uint16_t* w) const {
    const __m512 table = _mm512_loadu_ps(code);
    const int64_t skip = 2 * pair / group * group_bytes(group), groups = 2 * pairs / group;  // a part is whole groups
    uint16_t* second = w + pairs * 32;
    unpack(panel(2 * number) + skip, groups, group, w, table);
    unpack(panel(2 * number + 1) + skip, groups, group, second, table);
    return {w, second};
  }

  // All inputs of the first `outputs` outputs of a double, as (outputs, k).
  bool write(int64_t number, int64_t outputs, uint16_t* dst) const {
    uint16_t* w = static_cast<uint16_t*>(w_scratch.of(kPart * kDouble * 4));
    for (int64_t p = 0; w && p < k / 2; p += kPart) {
      const int64_t now = std::min(kPart, k / 2 - p);
      const Pair both = part(number, p, now, w);
      for (int64_t o = 0; o < outputs; ++o) {
        const uint16_t* from = (o < kPanel ? both.first : both.second) + 2 * (o % kPanel);
        for (int64_t i = 0; i < now; ++i) std::memcpy(dst + o * k + 2 * (p + i), from + 32 * i, 4);
      }
    }
    return w;
  }
};

// Where the code of output o of a panel and input i of a group lies behind the group's scales.
struct Place {
  int64_t byte;
  int shift;
};
inline Place place(int64_t o, int64_t i, bool int8) {
  const int64_t vector = i / kStep * 64, at = i % kStep;
  if (int8) return {vector + 4 * o + at % 4, at < 4 ? 0 : 4};
  return {vector + 8 * (o % 8) + 4 * (at % 2) + at / 2, o < 8 ? 0 : 4};
}

inline bool fits(int64_t n, int64_t k, int64_t group) {
  return n > 0 && k > 0 && group > 0 && group % kStep == 0 && group <= 64 && k % group == 0;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// 1 where the processor has what the kernels need.
int lp_nf4_supported(int int8) {
  return processor_has_what_is_needed() && (!int8 || __builtin_cpu_supports("avx512vnni"));
}

// The size of a packed weight; -1 for sizes that cannot be.
int64_t lp_nf4_bytes(int64_t n, int64_t k, int64_t group) {
  if (!fits(n, k, group)) return kBadArgument;
  return 2 * doubles_of(n) * panel_bytes(k, group) + kPadding;
}

// Write a quantised weight (n, k) as outputs first..first+n-1 of dst, which was all zero. src holds two codes a byte,
// the first in the high half, row behind row; absmax one scale for every `block` of these codes.
int lp_nf4_pack(uint8_t* dst, int64_t first, const uint8_t* src, const float* absmax, int64_t n, int64_t k,
                int64_t block, int64_t group, int int8) {
  if (!dst || !src || !absmax || first < 0 || !fits(n, k, group) || block < 1 || block % group) return kBadArgument;
#pragma omp parallel for schedule(static)
  for (int64_t panel = first / kPanel; panel <= (first + n - 1) / kPanel; ++panel) {
    for (int64_t o = 0; o < kPanel; ++o) {
      const int64_t row = panel * kPanel + o - first;
      if (row < 0 || row >= n) continue;
      for (int64_t g = 0; g < k / group; ++g) {
        uint8_t* to = dst + panel * panel_bytes(k, group) + g * group_bytes(group);
        const int64_t element = row * k + g * group;
        reinterpret_cast<float*>(to)[o] = absmax[element / block];
        for (int64_t i = 0; i < group; ++i) {
          const uint8_t both = src[(element + i) / 2];
          const Place at = place(o, i, int8);
          to[64 + at.byte] |= (i % 2 ? both & 15 : both >> 4) << at.shift;
        }
      }
    }
  }
  return 0;
}

// Write outputs first..first+count-1 of a weight packed for bf16 as bf16, row behind row; first is a multiple of 32.
int lp_nf4_unpack(uint16_t* dst, const uint8_t* packed, const float* code, int64_t first, int64_t count, int64_t n,
                  int64_t k, int64_t group) {
  if (!dst || !packed || !code || !fits(n, k, group) || first < 0 || first % 32 || count < 1 || first + count > n)
    return kBadArgument;
  const Nf4 weights{{n, k, nullptr, packed, code, group}};
  std::atomic<bool> done{true};
#pragma omp parallel for schedule(static)
  for (int64_t number = first / 32; number <= (first + count - 1) / 32; ++number) {
    const int64_t outputs = std::min<int64_t>(32, first + count - number * 32);
    if (!weights.write(number, outputs, dst + (number * 32 - first) * k)) done = false;
  }
  return done ? 0 : kNoMemory;
}

// y (rows, n) = x (rows, k) times the packed weight (n, k) transposed, plus bias (n) where there is one; all bf16 with
// unit stride along a row. `code` is the table of 16; `beside` may be null.
int lp_nf4_linear(uint16_t* y, int64_t y_stride, const uint16_t* x, int64_t x_stride, const uint8_t* packed,
                  const uint16_t* bias, const float* code, int64_t rows, int64_t n, int64_t k, int64_t group,
                  int int8, const Beside* beside) {
  if ((rows && (!y || !x)) || !packed || !code || rows < 0 || !fits(n, k, group)) return kBadArgument;
  const Nf4 weights{{n, k, bias, packed, code, group}};
  return int8 ? multiply<ProductOfBytes>(weights, y, y_stride, x, x_stride, rows, beside)
              : multiply<Product<Nf4>>(weights, y, y_stride, x, x_stride, rows, beside);
}

}
#pragma GCC visibility pop
