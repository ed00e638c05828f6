// What happens in registers: the layout of packed NF4 weights, and looking them up.
//
// Layout. A panel (panels.h) is cut into groups of `group` inputs with one scale per output:
//     16 fp32 scales (64 bytes), then group / 8 vectors of 64 bytes,
// a vector being 8 inputs x 16 outputs: in its 32-bit lane l, bits 4s..4s+3 (s = 2q + h) hold the code of output
// 8h + l/2 and input 2q + l%2. Shifted right by 4s the lanes are what vpermps looks up (it reads four bits), and two
// such halves, scaled and rounded to bf16 side by side, are a pair of a panel.
// Outputs are padded to 32 with scale 0.
//
// Numbers. A weight is bf16(code * scale), to the bit what bitsandbytes' dequantisation gives.
#pragma once

#include "panels.h"

namespace {

constexpr int64_t kStep = 8;            // inputs of one 64-byte vector of codes
constexpr int64_t kAhead = 1024;        // bytes that reading runs ahead of the lookup

inline int64_t group_bytes(int64_t group) { return 64 + group * kPanel / 2; }
inline int64_t panel_bytes(int64_t k, int64_t group) { return k / group * group_bytes(group); }

struct Nf4Weights {
  int64_t n, k;
  const uint16_t* bias;  // may be null
  const uint8_t* packed;
  const float* code;     // the table of 16
  int64_t group;

  const uint8_t* panel(int64_t number) const { return packed + number * panel_bytes(k, group); }
};

// How a group's 16 scales spread over the lanes of the two halves of a pair.
struct Scales {
  __m512 low, high;
};

ISA inline Scales load_scales(const uint8_t* src) {
  const __m512i low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  const __m512 scale = _mm512_loadu_ps(src);
  return {_mm512_permutexvar_ps(low, scale),
          _mm512_permutexvar_ps(_mm512_add_epi32(low, _mm512_set1_epi32(8)), scale)};
}

// 16 outputs x the inputs 2q and 2q + 1 of a vector, in bf16. Loading from q bytes on shifts every lane by 8q bits.
ISA inline __m512bh weights(const uint8_t* vector, int q, __m512 code, const Scales& scales) {
  const __m512i codes = _mm512_loadu_si512(vector + q);
  const __m512 low = _mm512_mul_ps(_mm512_permutexvar_ps(codes, code), scales.low);
  const __m512 high = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), code), scales.high);
  return _mm512_cvtne2ps_pbh(high, low);
}

// Unpack `groups` groups of a panel into pairs.
ISA inline void unpack(const uint8_t* src, int64_t groups, int64_t group, uint16_t* dst, __m512 code) {
  for (int64_t g = 0; g < groups; ++g) {
    const Scales scales = load_scales(src);
    src += 64;
    for (int64_t step = 0; step < group; step += kStep, src += 64) {
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q, dst += 32) _mm512_storeu_si512(dst, (__m512i)weights(src, q, code, scales));
    }
  }
}

// Few rows: sums (rows, 16 P) of P panels that lie `stride` bytes apart, weights going from the lookup into the products
// without memory between. Two panels at once are for so few rows that one sum would wait for the last.
template <int R, int P>
ISA void panels_of_few(const uint32_t* x, const uint8_t* src, int64_t stride, int64_t groups, int64_t group, float* sums,
                       __m512 code) {
  __m512 acc[P][R];
  for (auto& panel : acc)
    for (auto& one : panel) one = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    Scales scales[P];
    for (int p = 0; p < P; ++p) scales[p] = load_scales(src + p * stride);
    src += 64;
    for (int64_t step = 0; step < group; step += kStep, src += 64, x += 4 * R) {
      for (int p = 0; p < P; ++p) _mm_prefetch((const char*)src + p * stride + kAhead, _MM_HINT_T0);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q)
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) {
          const __m512bh w = weights(src + p * stride, q, code, scales[p]);
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r)
            acc[p][r] = _mm512_dpbf16_ps(acc[p][r], (__m512bh)_mm512_set1_epi32(x[q * R + r]), w);
        }
    }
  }
  for (int p = 0; p < P; ++p)
    for (int r = 0; r < R; ++r) _mm512_storeu_ps(sums + r * kDouble + p * kPanel, acc[p][r]);
}

using PanelsOfFew = void (*)(const uint32_t*, const uint8_t*, int64_t, int64_t, int64_t, float*, __m512);
constexpr int64_t kTwo = 4;  // rows up to which two panels go at once
constexpr PanelsOfFew kTwoOfFew[kTwo + 1] = {nullptr, panels_of_few<1, 2>, panels_of_few<2, 2>, panels_of_few<3, 2>,
                                             panels_of_few<4, 2>};
constexpr PanelsOfFew kOneOfFew[kFew + 1] = {
    nullptr,              panels_of_few<1, 1>,  panels_of_few<2, 1>,  panels_of_few<3, 1>,  panels_of_few<4, 1>,
    panels_of_few<5, 1>,  panels_of_few<6, 1>,  panels_of_few<7, 1>,  panels_of_few<8, 1>,  panels_of_few<9, 1>,
    panels_of_few<10, 1>, panels_of_few<11, 1>, panels_of_few<12, 1>, panels_of_few<13, 1>, panels_of_few<14, 1>,
    panels_of_few<15, 1>, panels_of_few<16, 1>};

}  // namespace
