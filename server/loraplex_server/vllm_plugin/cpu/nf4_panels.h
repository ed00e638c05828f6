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

// Few rows: sums (rows, 16) of one panel, weights going from the lookup into the products without memory between.
// What one chain of sums costs a single row has not been measured.
template <int R>
ISA void panel_of_few(const uint32_t* x, const uint8_t* src, int64_t groups, int64_t group, float* sums, __m512 code) {
  __m512 acc[R];
  for (auto& one : acc) one = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    const Scales scales = load_scales(src);
    src += 64;
    for (int64_t step = 0; step < group; step += kStep, src += 64, x += 4 * R) {
      _mm_prefetch((const char*)src + kAhead, _MM_HINT_T0);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        const __m512bh w = weights(src, q, code, scales);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) acc[r] = _mm512_dpbf16_ps(acc[r], (__m512bh)_mm512_set1_epi32(x[q * R + r]), w);
      }
    }
  }
  for (int r = 0; r < R; ++r) _mm512_storeu_ps(sums + r * kDouble, acc[r]);
}

using PanelOfFew = void (*)(const uint32_t*, const uint8_t*, int64_t, int64_t, float*, __m512);
constexpr PanelOfFew kPanelsOfFew[kFew + 1] = {nullptr, panel_of_few<1>, panel_of_few<2>, panel_of_few<3>, panel_of_few<4>, panel_of_few<5>, panel_of_few<6>, panel_of_few<7>, panel_of_few<8>, panel_of_few<9>, panel_of_few<10>, panel_of_few<11>, panel_of_few<12>, panel_of_few<13>, panel_of_few<14>, panel_of_few<15>, panel_of_few<16>};

}  // namespace
