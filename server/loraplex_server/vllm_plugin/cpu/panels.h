// Products of a few rows or many with weights in panels, for CPUs with AVX-512-BF16: what bf16.cpp and nf4.cpp share.
//
// W (n, k) is cut into panels of 16 outputs, padded to an even number of panels: two of them, a double, are a unit of
// work, and one lies behind the other in memory, so that a thread reads in order. Weights enter products as pairs of
// inputs side by side, w[pair * 32 + 2 * output + i], which is what vdpbf16ps multiplies: 16 outputs x a pair of inputs.
//
// Numbers. Products and sums are fp32; each row and output has one sum, over pairs of inputs in order, whichever way
// below is taken. So a row's result is the same to the bit whatever rows are beside it, and on any number of threads.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "beside.h"

#define ISA __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,avx2")))

namespace {

constexpr int64_t kPanel = 16;          // outputs of a panel: the fp32 lanes of a register
constexpr int64_t kDouble = 2 * kPanel;
static_assert(kDouble == kBesideColumns);
constexpr int64_t kFew = 16;            // rows up to which a weight is used up while it is in a register
constexpr int64_t kTile = 12;           // rows at a time for two panels: 24 sums in the 32 registers
constexpr int64_t kPart = 512;          // pairs of inputs whose weights stay in the cache while many rows use them
constexpr int64_t kRows = 640;          // most rows at once: their sums stay in the cache
constexpr int64_t kAlone = 1 << 20;     // products below which a second thread is not worth waking
constexpr int64_t kBesideRows = 32;     // rows after which what goes along has its turn: a line of each is in the cache
constexpr int64_t kPadding = 64;        // bytes behind the last panel: NF4 loads begin up to three bytes into a vector
constexpr int kBadArgument = -1, kNoMemory = -2;

inline int64_t doubles_of(int64_t n) { return (n + kDouble - 1) / kDouble; }

// Where tile t of `tiles` begins: rows are spread evenly, so that no tile is much smaller than another.
inline int64_t tiles_of(int64_t rows) { return (rows + kTile - 1) / kTile; }
inline int64_t tile_start(int64_t rows, int64_t tiles, int64_t t) { return rows * t / tiles; }

// A buffer that only grows, one per thread and purpose.
struct Scratch {
  void* at = nullptr;
  int64_t size = 0;
  ~Scratch() { std::free(at); }
  void* of(int64_t bytes) {
    if (bytes > size) {
      std::free(at);
      size = (bytes + 4095) / 4096 * 4096;
      at = std::aligned_alloc(4096, size);
      if (!at) size = 0;
    }
    return at;
  }
};
thread_local Scratch x_scratch, w_scratch, sum_scratch;

struct Rows {
  const uint16_t* x;
  int64_t x_stride;
  uint16_t* y;
  int64_t y_stride, count;
  int64_t first;         // of these among all rows of the call
  const Beside* beside;  // may be null

  void before() const {
    if (beside) beside->before(beside->data);
  }
  void behind(int64_t from, int64_t to, int64_t column_from, int64_t column_to) const {
    if (beside) beside->behind(beside->data, first + from, first + to, column_from, column_to);
  }
};

// sums (rows, 32) += x (pairs, rows) times two panels w0 and w1; `ahead` bytes are read before they are needed.
template <int R>
ISA void tile(const uint32_t* x, const uint16_t* w0, const uint16_t* w1, int64_t pairs, int64_t ahead, float* sums,
              bool first) {
  __m512 a[R], b[R];
  for (int r = 0; r < R; ++r) {
    a[r] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * kDouble);
    b[r] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * kDouble + kPanel);
  }
  for (int64_t p = 0; p < pairs; ++p, x += R, w0 += 32, w1 += 32) {
    _mm_prefetch((const char*)w0 + ahead, _MM_HINT_T0);
    _mm_prefetch((const char*)w1 + ahead, _MM_HINT_T0);
    const __m512bh v0 = (__m512bh)_mm512_loadu_si512(w0), v1 = (__m512bh)_mm512_loadu_si512(w1);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512bh one = (__m512bh)_mm512_set1_epi32(x[r]);
      a[r] = _mm512_dpbf16_ps(a[r], one, v0);
      b[r] = _mm512_dpbf16_ps(b[r], one, v1);
    }
  }
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_ps(sums + r * kDouble, a[r]);
    _mm512_storeu_ps(sums + r * kDouble + kPanel, b[r]);
  }
}

using Tile = void (*)(const uint32_t*, const uint16_t*, const uint16_t*, int64_t, int64_t, float*, bool);
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

// Sums (rows, 32) plus bias, rounded, into the first `outputs` columns of y.
ISA inline void finish(const float* sums, int64_t rows, const uint16_t* bias, int64_t outputs, uint16_t* y, int64_t stride) {
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

// The same for a double of any number of rows, with what goes along: a few rows at a time, which are in the cache then.
ISA inline void finish_double(const float* sums, const Rows& rows, const uint16_t* bias, int64_t n, int64_t number) {
  const int64_t output = number * kDouble, end = std::min(output + kDouble, n);
  for (int64_t from = 0; from < rows.count; from += kBesideRows) {
    const int64_t to = std::min(from + kBesideRows, rows.count);
    finish(sums + from * kDouble, to - from, bias ? bias + output : nullptr, n - output,
           rows.y + from * rows.y_stride + output, rows.y_stride);
    rows.behind(from, to, output, end);
  }
}

// What a kind of weights has to offer:
//   int64_t n, k;  const uint16_t* bias;   // bias may be null
//   void few(const uint32_t* x, int64_t rows, int64_t number, float* sums) const;
//       sums (rows, 32) = x (k / 2, rows), at most kFew rows, times double `number`
//   struct Pair { const uint16_t *first, *second; };  Pair part(int64_t number, int64_t pair, int64_t pairs, uint16_t* w)
//       pairs `pair` to `pair + pairs` of both panels, which may be written to w (2 * kPart * 32 values)
template <class W>
struct Product {
  const W& w;
  const Rows& rows;

  bool run() const { return rows.count <= kFew ? few() : many(); }

 private:
  bool worth_a_thread() const { return w.n * w.k * (rows.count + 8) > kAlone; }

  // Decoding: every thread arranges x for itself, which costs less than waiting for another.
  bool few() const {
    std::atomic<int64_t> next{0};
    std::atomic<bool> done{true};
#pragma omp parallel if (worth_a_thread())
    {
      uint32_t* x = static_cast<uint32_t*>(x_scratch.of(rows.count * w.k * 2));
      float sums[kFew * kDouble];
      rows.before();
      if (x) {
        arrange(rows.x, rows.x_stride, rows.count, w.k / 2, x);
        for (int64_t number; (number = next.fetch_add(1)) < doubles_of(w.n);) {
          w.few(x, rows.count, number, sums);
          finish_double(sums, rows, w.bias, w.n, number);
        }
      } else {
        done = false;
      }
    }
    return done;
  }

  // Two panels for many rows: weights are taken in parts that stay in the cache, each used for all rows.
  void run_double(int64_t number, const uint32_t* x, uint16_t* scratch, float* sums) const {
    const int64_t pairs = w.k / 2, tiles = tiles_of(rows.count);
    for (int64_t p = 0; p < pairs; p += kPart) {
      const int64_t now = std::min(kPart, pairs - p);
      const auto part = w.part(number, p, now, scratch);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t from = tile_start(rows.count, tiles, t), high = tile_start(rows.count, tiles, t + 1) - from;
        kTiles[high](x + from * pairs + p * high, part.first, part.second, now, 0, sums + from * kDouble, p == 0);
      }
    }
  }

  bool many() const {
    const int64_t tiles = tiles_of(rows.count), pairs = w.k / 2;
    uint32_t* x = static_cast<uint32_t*>(x_scratch.of(rows.count * w.k * 2));
    if (!x) return false;
    std::atomic<int64_t> next{0};
    std::atomic<bool> done{true};
#pragma omp parallel if (worth_a_thread())
    {
#pragma omp for schedule(static)
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t from = tile_start(rows.count, tiles, t), high = tile_start(rows.count, tiles, t + 1) - from;
        arrange(rows.x + from * rows.x_stride, rows.x_stride, high, pairs, x + from * pairs);
      }
      uint16_t* scratch = static_cast<uint16_t*>(w_scratch.of(kPart * kDouble * 4));
      float* sums = static_cast<float*>(sum_scratch.of(rows.count * kDouble * 4));
      rows.before();
      if (scratch && sums) {
        for (int64_t number; (number = next.fetch_add(1)) < doubles_of(w.n);) {
          run_double(number, x, scratch, sums);
          finish_double(sums, rows, w.bias, w.n, number);
        }
      } else {
        done = false;
      }
    }
    return done;
  }
};

// y (rows, n) = x (rows, k) times the weights' transpose, plus bias; unit stride along a row. 0, or an error.
// P{w, rows}.run() does it for up to kRows rows, with what goes along; false: no memory.
template <class P, class W>
int multiply(const W& w, uint16_t* y, int64_t y_stride, const uint16_t* x, int64_t x_stride, int64_t rows,
             const Beside* beside) {
  for (int64_t part = 0, parts = (rows + kRows - 1) / kRows; part < parts; ++part) {
    const int64_t from = rows * part / parts, count = rows * (part + 1) / parts - from;
    const Rows some{x + from * x_stride, x_stride, y + from * y_stride, y_stride, count, from, beside};
    if (!P{w, some}.run()) return kNoMemory;
  }
  return 0;
}

inline int processor_has_what_is_needed() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

}  // namespace
