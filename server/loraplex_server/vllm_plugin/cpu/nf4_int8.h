// NF4 weights times rows that are rounded to eight bits, in the integer products of AVX-512-VNNI: an option, which
// trades a little accuracy for twice the products an instruction.
//
// Layout. Panels, groups and scales as in nf4_panels.h; within a vector of 8 inputs x 16 outputs byte b of lane o holds
// the codes of output o and the inputs b (low half) and 4 + b (high half), so that what vpshufb looks up for a half
// is what vpdpbusd multiplies: four inputs of 16 outputs.
//
// Numbers. A row's group of inputs is rounded to -127 .. 127 times its own scale, max |x| / 127; a weight to
// round(127 code) times scale / 127. The sum over a group is exact, in integers; groups are added up in fp32, in order.
// So a row's result is the same to the bit whatever rows are beside it. Groups whose inputs are all below kTiny count
// as zero; one that holds an infinity or a NaN makes its row NaN.
#pragma once

#include "nf4_panels.h"

#define ISA_INT8 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,fma,avx2")))

namespace {

constexpr float kTiny = 1e-36f;         // 127 divided by it is finite
constexpr int64_t kGroupsAtOnce = 8;    // that a thread rounds before it takes the next

// The table of 16 as bytes, 128 above what they stand for: vpdpbusd takes weights without sign.
ISA_INT8 inline __m512i table_of_bytes(const float* code) {
  const __m512i steps = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(code), _mm512_set1_ps(127.0f)));
  return _mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(_mm512_add_epi32(steps, _mm512_set1_epi32(128))));
}

// A tile of R rows, group behind group: R scales, R times -128 times the sum of a row's numbers (what the weights' 128
// adds), and group / 4 times R words of four inputs.
inline int64_t tile_words(int64_t group) { return 2 + group / 4; }  // per row and group

// Round one group of one row, and put it in its place as row r of R.
ISA_INT8 inline void round_group(const uint16_t* x, int64_t group, int64_t r, int64_t R, uint32_t* dst) {
  const __mmask32 masks[2] = {(__mmask32)((1ull << std::min<int64_t>(group, 32)) - 1),
                              (__mmask32)((1ull << std::max<int64_t>(group - 32, 0)) - 1)};
  __m512i halves[2], largest = _mm512_setzero_si512();
  for (int h = 0; h < 2; ++h) {
    halves[h] = _mm512_maskz_loadu_epi16(masks[h], masks[h] ? x + 32 * h : x);
    largest = _mm512_max_epu16(largest, _mm512_and_si512(halves[h], _mm512_set1_epi16(0x7fff)));
  }
  const __m512i even = _mm512_slli_epi32(largest, 16), odd = _mm512_and_si512(largest, _mm512_set1_epi32(0xffff0000));
  const uint32_t bits = _mm512_reduce_max_epu32(_mm512_max_epu32(even, odd));  // so that NaN is above all
  float most;
  std::memcpy(&most, &bits, 4);
  const bool finite = bits < 0x7f800000u, zero = most < kTiny;
  const __m512 per_step = _mm512_set1_ps(!finite || zero ? 0.0f : 127.0f / most);
  alignas(64) uint32_t words[16];
  __m512i sum = _mm512_setzero_si512();
  for (int h = 0; h < 2; ++h) {
    for (int part = 0; part < 2; ++part) {
      const __m256i some = part ? _mm512_extracti64x4_epi64(halves[h], 1) : _mm512_castsi512_si256(halves[h]);
      const __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(some), 16));
      const __m512i steps = _mm512_cvtps_epi32(_mm512_mul_ps(value, per_step));
      sum = _mm512_add_epi32(sum, finite ? steps : _mm512_setzero_si512());
      _mm_store_si128((__m128i*)words + 2 * h + part, _mm512_cvtsepi32_epi8(steps));
    }
  }
  const float scale = !finite ? __builtin_nanf("") : zero ? 0.0f : most / (127.0f * 127.0f);
  const int32_t start = -128 * _mm512_reduce_add_epi32(sum);
  std::memcpy(dst + r, &scale, 4);
  std::memcpy(dst + R + r, &start, 4);
  for (int64_t i = 0; i < group / 4; ++i) dst[(2 + i) * R + r] = words[i];
}

// sums (R, 16 P) of P panels `stride` bytes apart. Two panels at once, and sums of either half of a vector by
// themselves, are for so few rows that one sum would wait for the last.
template <int R, int P>
ISA_INT8 void panels_of_bytes(const uint32_t* x, const uint8_t* src, int64_t stride, int64_t groups, int64_t group,
                              float* sums, __m512i table) {
  constexpr int H = P == 2 ? 2 : 1;
  const __m512i low = _mm512_set1_epi8(15);
  for (int64_t g = 0; g < groups; ++g) {
    __m512 scales[P];
    for (int p = 0; p < P; ++p) scales[p] = _mm512_loadu_ps(src + p * stride);
    src += 64;
    const uint32_t *x_scales = x, *starts = x + R;
    x += 2 * R;
    __m512i acc[P][H][R];
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        acc[p][0][r] = _mm512_set1_epi32(starts[r]);
        if (H == 2) acc[p][H - 1][r] = _mm512_setzero_si512();
      }
    for (int64_t step = 0; step < group; step += kStep, src += 64, x += 2 * R) {
      for (int p = 0; p < P; ++p) {
        _mm_prefetch((const char*)src + p * stride + kAhead, _MM_HINT_T0);
        const __m512i codes = _mm512_loadu_si512(src + p * stride);
        const __m512i first = _mm512_shuffle_epi8(table, _mm512_and_si512(codes, low));
        const __m512i second = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi32(codes, 4), low));
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) acc[p][0][r] = _mm512_dpbusd_epi32(acc[p][0][r], first, _mm512_set1_epi32(x[r]));
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
          acc[p][H - 1][r] = _mm512_dpbusd_epi32(acc[p][H - 1][r], second, _mm512_set1_epi32(x[R + r]));
      }
    }
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        float* to = sums + r * kDouble + p * kPanel;
        const __m512i all = H == 2 ? _mm512_add_epi32(acc[p][0][r], acc[p][H - 1][r]) : acc[p][0][r];
        const __m512 scale = _mm512_mul_ps(scales[p], _mm512_castsi512_ps(_mm512_set1_epi32(x_scales[r])));
        const __m512 before = g ? _mm512_loadu_ps(to) : _mm512_setzero_ps();
        _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(all), scale, before));
      }
  }
}

using PanelsOfBytes = void (*)(const uint32_t*, const uint8_t*, int64_t, int64_t, int64_t, float*, __m512i);
constexpr PanelsOfBytes kTwoOfBytes[kTwo + 1] = {nullptr, panels_of_bytes<1, 2>, panels_of_bytes<2, 2>,
                                                 panels_of_bytes<3, 2>, panels_of_bytes<4, 2>};
constexpr PanelsOfBytes kOneOfBytes[kFew + 1] = {
    nullptr,                panels_of_bytes<1, 1>,  panels_of_bytes<2, 1>,  panels_of_bytes<3, 1>,
    panels_of_bytes<4, 1>,  panels_of_bytes<5, 1>,  panels_of_bytes<6, 1>,  panels_of_bytes<7, 1>,
    panels_of_bytes<8, 1>,  panels_of_bytes<9, 1>,  panels_of_bytes<10, 1>, panels_of_bytes<11, 1>,
    panels_of_bytes<12, 1>, panels_of_bytes<13, 1>, panels_of_bytes<14, 1>, panels_of_bytes<15, 1>,
    panels_of_bytes<16, 1>};

// y = x W^T + bias for up to kRows rows.
struct ProductOfBytes {
  const Nf4Weights& w;
  const Rows& rows;

  bool run() const {
    const int64_t tiles = (rows.count + kFew - 1) / kFew, groups = w.k / w.group, words = groups * tile_words(w.group);
    const int64_t shares = (groups + kGroupsAtOnce - 1) / kGroupsAtOnce;
    uint32_t* x = static_cast<uint32_t*>(x_scratch.of(rows.count * words * 4));
    if (!x) return false;
    std::atomic<int64_t> next{0};
    std::atomic<bool> done{true};
#pragma omp parallel if (w.n * w.k * (rows.count + 8) > kAlone)
    {
#pragma omp for schedule(static)
      for (int64_t unit = 0; unit < tiles * shares; ++unit)
        round_tile(unit / shares, tiles, unit % shares * kGroupsAtOnce, x);
      float* sums = static_cast<float*>(sum_scratch.of(rows.count * kDouble * 4));
      rows.before();
      if (sums) {
        for (int64_t number; (number = next.fetch_add(1)) < doubles_of(w.n);) run_double(number, tiles, x, sums);
      } else {
        done = false;
      }
    }
    return done;
  }

 private:
  ISA_INT8 void round_tile(int64_t tile, int64_t tiles, int64_t first, uint32_t* x) const {
    const int64_t from = tile_start(rows.count, tiles, tile), high = tile_start(rows.count, tiles, tile + 1) - from;
    const int64_t groups = w.k / w.group, words = tile_words(w.group);
    for (int64_t g = first; g < std::min(first + kGroupsAtOnce, groups); ++g)
      for (int64_t r = 0; r < high; ++r)
        round_group(rows.x + (from + r) * rows.x_stride + g * w.group, w.group, r, high,
                    x + (from * groups + g * high) * words);
  }

  ISA_INT8 void run_double(int64_t number, int64_t tiles, const uint32_t* x, float* sums) const {
    const __m512i table = table_of_bytes(w.code);
    const int64_t stride = panel_bytes(w.k, w.group), groups = w.k / w.group, words = groups * tile_words(w.group);
    const uint8_t* panel = w.panel(2 * number);
    if (rows.count <= kTwo) {
      kTwoOfBytes[rows.count](x, panel, stride, groups, w.group, sums, table);
    } else {
      for (int half = 0; half < 2; ++half)
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t from = tile_start(rows.count, tiles, t), high = tile_start(rows.count, tiles, t + 1) - from;
          kOneOfBytes[high](x + from * words, panel + half * stride, stride, groups, w.group,
                            sums + from * kDouble + half * kPanel, table);
        }
    }
    finish_double(sums, rows, w.bias, w.n, number);
  }
};

}  // namespace
