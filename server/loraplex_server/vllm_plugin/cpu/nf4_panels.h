// What happens in registers: the layout of packed NF4 weights, looking them up, and products with them.
//
// Layout. W (n, k) is cut into panels of 16 outputs, a panel into groups of `group` inputs with one scale per output:
//     16 fp32 scales (64 bytes), then group / 8 vectors of 64 bytes,
// a vector being 8 inputs x 16 outputs: in its 32-bit lane l, bits 4s..4s+3 (s = 2q + h) hold the code of output
// 8h + l/2 and input 2q + l%2. Shifted right by 4s the lanes are what vpermps looks up (it reads four bits), and two
// such halves, scaled and rounded to bf16 side by side, are what vdpbf16ps multiplies: 16 outputs x a pair of inputs.
// Outputs are padded to 32 with scale 0. One panel lies behind the other: a thread reads memory in order.
//
// Numbers. A weight is bf16(code * scale), to the bit what bitsandbytes' dequantisation gives; products and sums are
// fp32 (vdpbf16ps), the bias is added in fp32, the result rounded once.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#define ISA __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,avx2")))

namespace {

constexpr int64_t kPanel = 16;          // outputs of a panel: the fp32 lanes of a register
constexpr int64_t kStep = 8;            // inputs of one 64-byte vector of codes
constexpr int64_t kFew = 16;            // rows up to which weights go from the lookup straight into the products
constexpr int64_t kTile = 12;           // else rows at a time: 12 rows x 2 panels are 24 of the 32 registers
constexpr int64_t kAhead = 1024;        // bytes that reading runs ahead of the lookup

inline int64_t group_bytes(int64_t group) { return 64 + group * kPanel / 2; }
inline int64_t panels_of(int64_t n) { return (n + 2 * kPanel - 1) / (2 * kPanel) * 2; }
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

// Unpack `groups` groups of a panel into bf16 pairs: dst[pair * 64 + 2 * output].
ISA inline void unpack(const uint8_t* src, int64_t groups, int64_t group, uint16_t* dst, __m512 code) {
  for (int64_t g = 0; g < groups; ++g) {
    const Scales scales = load_scales(src);
    src += 64;
    for (int64_t step = 0; step < group; step += kStep, src += 64) {
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q, dst += 64) _mm512_storeu_si512(dst, (__m512i)weights(src, q, code, scales));
    }
  }
}

// Few rows: sums (rows, 16) of one panel, weights going from the lookup into the products without memory between.
// x is (pairs, R). One sum per row and output, over pairs in order, as in `tile`: so a row's result is the same to the
// bit however many rows there are beside it. What one chain of sums costs a single row has not been measured.
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
  for (int r = 0; r < R; ++r) _mm512_storeu_ps(sums + r * 32, acc[r]);
}

// sums (rows, 32) += x (pairs, rows) times w (pairs, 32); fp32 sums, bf16 pairs.
template <int R>
ISA void tile(const uint32_t* x, const uint16_t* w, int64_t pairs, float* sums, bool first) {
  __m512 a[R], b[R];
  for (int r = 0; r < R; ++r) {
    a[r] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * 32);
    b[r] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * 32 + 16);
  }
  for (int64_t p = 0; p < pairs; ++p, x += R, w += 64) {
    const __m512bh w0 = (__m512bh)_mm512_loadu_si512(w), w1 = (__m512bh)_mm512_loadu_si512(w + 32);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512bh one = (__m512bh)_mm512_set1_epi32(x[r]);
      a[r] = _mm512_dpbf16_ps(a[r], one, w0);
      b[r] = _mm512_dpbf16_ps(b[r], one, w1);
    }
  }
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_ps(sums + r * 32, a[r]);
    _mm512_storeu_ps(sums + r * 32 + 16, b[r]);
  }
}

using PanelOfFew = void (*)(const uint32_t*, const uint8_t*, int64_t, int64_t, float*, __m512);
constexpr PanelOfFew kPanelsOfFew[kFew + 1] = {nullptr, panel_of_few<1>, panel_of_few<2>, panel_of_few<3>, panel_of_few<4>, panel_of_few<5>, panel_of_few<6>, panel_of_few<7>, panel_of_few<8>, panel_of_few<9>, panel_of_few<10>, panel_of_few<11>, panel_of_few<12>, panel_of_few<13>, panel_of_few<14>, panel_of_few<15>, panel_of_few<16>};

using Tile = void (*)(const uint32_t*, const uint16_t*, int64_t, float*, bool);
constexpr Tile kTiles[kTile + 1] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>,  tile<5>, tile<6>,
                                    tile<7>, tile<8>, tile<9>, tile<10>, tile<11>, tile<12>};

// Transpose 16 x 16 numbers of 32 bits in registers.
ISA inline void transpose(__m512i* v) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(v[i], v[i + 1]), b = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]), d = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
    t[i] = _mm512_unpacklo_epi64(a, c), t[i + 1] = _mm512_unpackhi_epi64(a, c);
    t[i + 2] = _mm512_unpacklo_epi64(b, d), t[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  for (int i = 0; i < 4; ++i) {  // t[4j + i] holds, of rows 4j to 4j + 3, the columns i, 4 + i, 8 + i, 12 + i
    const __m512i a = _mm512_shuffle_i32x4(t[i], t[4 + i], 0x88), b = _mm512_shuffle_i32x4(t[i], t[4 + i], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0xdd);
    v[i] = _mm512_shuffle_i32x4(a, c, 0x88), v[8 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
    v[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88), v[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

// Up to 16 rows of x, (rows, k) bf16, as (k / 2, rows) pairs.
ISA void arrange(const uint16_t* x, int64_t stride, int64_t rows, int64_t pairs, uint32_t* dst) {
  const __mmask16 mask = (1u << rows) - 1;
  for (int64_t p = 0; p < pairs; p += 16) {
    const int64_t now = std::min<int64_t>(16, pairs - p);
    __m512i v[16];
    for (int64_t r = 0; r < 16; ++r)
      v[r] = _mm512_maskz_loadu_epi32(r < rows ? (1u << now) - 1 : 0, x + (r < rows ? r : 0) * stride + 2 * p);
    transpose(v);
    for (int64_t i = 0; i < now; ++i, dst += rows) _mm512_mask_storeu_epi32(dst, mask, v[i]);
  }
}

ISA void finish(const float* sums, int64_t rows, const uint16_t* bias, int64_t outputs, uint16_t* y, int64_t stride) {
  const __mmask32 mask = outputs >= 32 ? ~0u : (1u << outputs) - 1;
  __m512 b0 = _mm512_setzero_ps(), b1 = b0;
  if (bias) {
    const __m512i both = _mm512_maskz_loadu_epi16(mask, bias);
    b0 = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), 16));
    b1 = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16));
  }
  for (int64_t r = 0; r < rows; ++r, sums += 32, y += stride) {
    const __m512 s0 = _mm512_add_ps(_mm512_loadu_ps(sums), b0), s1 = _mm512_add_ps(_mm512_loadu_ps(sums + 16), b1);
    _mm512_mask_storeu_epi16(y, mask, (__m512i)_mm512_cvtne2ps_pbh(s1, s0));
  }
}

}  // namespace
