// NF4 linear layers on a CPU with AVX-512-BF16: y = x W^T + bias, W kept in four bits. Plain C ABI, no torch.
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
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define ISA __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,avx2")))

namespace {

constexpr int64_t kPanel = 16;          // outputs of a panel: the fp32 lanes of a register
constexpr int64_t kStep = 8;            // inputs of one 64-byte vector of codes
constexpr int64_t kFew = 16;            // rows up to which weights go from the lookup straight into the products
constexpr int64_t kTile = 12;           // else rows at a time: 12 rows x 2 panels are 24 of the 32 registers
constexpr int64_t kRows = 640;          // most rows for which weights are unpacked once: their sums stay in the cache
constexpr int64_t kUnpacked = 32768;    // bytes of bf16 weights unpacked at a time, which stay in the cache
constexpr int64_t kAlone = 1 << 20;     // products below which a second thread is not worth waking
constexpr int64_t kAhead = 1024;        // bytes that reading runs ahead of the lookup
constexpr int64_t kPadding = 64;        // bytes behind the last panel: loads begin up to three bytes into a vector
constexpr int kBadArgument = -1, kNoMemory = -2;

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
// x is (pairs, R). Several sums per row where there are few rows, because a product takes some cycles.
template <int R>
ISA void panel_of_few(const uint32_t* x, const uint8_t* src, int64_t groups, int64_t group, float* sums, __m512 code) {
  constexpr int kSets = R <= 4 ? 4 : R <= 8 ? 2 : 1;
  __m512 acc[kSets][R];
  for (auto& set : acc)
    for (auto& one : set) one = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    const Scales scales = load_scales(src);
    src += 64;
    for (int64_t step = 0; step < group; step += kStep, src += 64, x += 4 * R) {
      _mm_prefetch((const char*)src + kAhead, _MM_HINT_T0);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        const __m512bh w = weights(src, q, code, scales);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
          acc[q % kSets][r] = _mm512_dpbf16_ps(acc[q % kSets][r], (__m512bh)_mm512_set1_epi32(x[q * R + r]), w);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    __m512 sum = acc[0][r];
    for (int set = 1; set < kSets; ++set) sum = _mm512_add_ps(sum, acc[set][r]);
    _mm512_storeu_ps(sums + r * 32, sum);
  }
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

// Where tile t of `tiles` begins: rows are spread evenly, so that no tile is much smaller than another.
inline int64_t tiles_of(int64_t rows) { return (rows + kTile - 1) / kTile; }
inline int64_t tile_start(int64_t rows, int64_t tiles, int64_t t) { return rows * t / tiles; }

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

struct Linear {
  const uint8_t* packed;
  const uint16_t* bias;
  const float* code;
  int64_t n, k, group;
  int64_t doubles() const { return panels_of(n) / 2; }  // two panels, 32 outputs, are a unit of work
  const uint8_t* panel(int64_t number) const { return packed + number * panel_bytes(k, group); }
  bool worth_a_thread(int64_t rows) const { return n * k * (rows + 8) > kAlone; }
};

struct Rows {
  const uint16_t* x;
  int64_t x_stride;
  uint16_t* y;
  int64_t y_stride, count;
};

void finish_double(const Linear& l, int64_t number, const Rows& rows, const float* sums) {
  const int64_t output = number * 32;
  finish(sums, rows.count, l.bias ? l.bias + output : nullptr, l.n - output, rows.y + output, rows.y_stride);
}

// Decoding: every thread arranges x for itself, which costs less than waiting for another.
ISA bool few_rows(const Linear& l, const Rows& rows) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> done{true};
#pragma omp parallel if (l.worth_a_thread(rows.count))
  {
    uint32_t* x = static_cast<uint32_t*>(x_scratch.of(rows.count * l.k * 2));
    float sums[kFew * 32];
    if (x) {
      const __m512 code = _mm512_loadu_ps(l.code);
      arrange(rows.x, rows.x_stride, rows.count, l.k / 2, x);
      for (int64_t number; (number = next.fetch_add(1)) < l.doubles();) {
        for (int half = 0; half < 2; ++half)
          kPanelsOfFew[rows.count](x, l.panel(2 * number + half), l.k / l.group, l.group, sums + 16 * half, code);
        finish_double(l, number, rows, sums);
      }
    } else {
      done = false;
    }
  }
  return done;
}

// Unpack a part of two panels: w[pair * 64 + 2 * output] for the pairs of inputs of groups g..g+count-1.
ISA void unpack_double(const Linear& l, int64_t number, int64_t g, int64_t count, uint16_t* w) {
  const __m512 code = _mm512_loadu_ps(l.code);
  const int64_t skip = g * group_bytes(l.group);
  unpack(l.panel(2 * number) + skip, count, l.group, w, code);
  unpack(l.panel(2 * number + 1) + skip, count, l.group, w + 32, code);
}

// The same for all inputs, the first `outputs` outputs, as (outputs, k).
bool write_double(const Linear& l, int64_t number, int64_t outputs, uint16_t* dst) {
  uint16_t* w = static_cast<uint16_t*>(w_scratch.of(kUnpacked));
  const int64_t groups = l.k / l.group, part = kUnpacked / (64 * l.group);
  for (int64_t g = 0; w && g < groups; g += part) {
    const int64_t now = std::min(part, groups - g), pairs = now * l.group / 2;
    unpack_double(l, number, g, now, w);
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t p = 0; p < pairs; ++p) std::memcpy(dst + o * l.k + g * l.group + 2 * p, w + p * 64 + 2 * o, 4);
  }
  return w;
}

// Two panels for many rows: weights are unpacked in parts that stay in the cache, each used for all rows.
void run_double(const Linear& l, int64_t number, const uint32_t* x, int64_t rows, uint16_t* w, float* sums) {
  const int64_t groups = l.k / l.group, pairs = l.group / 2, tiles = tiles_of(rows), part = kUnpacked / (64 * l.group);
  for (int64_t g = 0; g < groups; g += part) {
    const int64_t now = std::min(part, groups - g);
    unpack_double(l, number, g, now, w);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t from = tile_start(rows, tiles, t), high = tile_start(rows, tiles, t + 1) - from;
      kTiles[high](x + from * (l.k / 2) + g * pairs * high, w, now * pairs, sums + from * 32, g == 0);
    }
  }
}

bool many_rows(const Linear& l, const Rows& rows) {
  const int64_t tiles = tiles_of(rows.count), pairs = l.k / 2;
  uint32_t* x = static_cast<uint32_t*>(x_scratch.of(rows.count * l.k * 2));
  if (!x) return false;
  std::atomic<int64_t> next{0};
  std::atomic<bool> done{true};
#pragma omp parallel if (l.worth_a_thread(rows.count))
  {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t from = tile_start(rows.count, tiles, t), high = tile_start(rows.count, tiles, t + 1) - from;
      arrange(rows.x + from * rows.x_stride, rows.x_stride, high, pairs, x + from * pairs);
    }
    uint16_t* w = static_cast<uint16_t*>(w_scratch.of(kUnpacked));
    float* sums = static_cast<float*>(sum_scratch.of(rows.count * 32 * 4));
    if (w && sums) {
      for (int64_t number; (number = next.fetch_add(1)) < l.doubles();) {
        run_double(l, number, x, rows.count, w, sums);
        finish_double(l, number, rows, sums);
      }
    } else {
      done = false;
    }
  }
  return done;
}

inline bool fits(int64_t n, int64_t k, int64_t group) {
  return n > 0 && k > 0 && group > 0 && group % kStep == 0 && group <= 64 && k % group == 0;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// 1 where the processor has what the kernels need.

int lp_nf4_supported(void) {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

// The size of a packed weight; -1 for sizes that cannot be.
int64_t lp_nf4_bytes(int64_t n, int64_t k, int64_t group) {
  if (!fits(n, k, group)) return kBadArgument;
  return panels_of(n) * panel_bytes(k, group) + kPadding;
}

// Write a quantised weight (n, k) as outputs first..first+n-1 of dst, which was all zero. src holds two codes a byte,
// the first in the high half, row behind row; absmax one scale for every `block` of these codes.
int lp_nf4_pack(uint8_t* dst, int64_t first, const uint8_t* src, const float* absmax, int64_t n, int64_t k,
                int64_t block, int64_t group) {
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
        to += 64 + 8 * (o % 8);
        const int shift = o < 8 ? 0 : 4;
        for (int64_t i = 0; i < group / 2; ++i) {  // input pair i: vector i / 4, q = i % 4
          const uint8_t both = src[element / 2 + i];
          uint8_t* at = to + i / 4 * 64 + i % 4;
          at[0] |= (both >> 4) << shift;
          at[4] |= (both & 15) << shift;
        }
      }
    }
  }
  return 0;
}

// Write outputs first..first+count-1 of a packed weight as bf16, row behind row; first is a multiple of 32.
int lp_nf4_unpack(uint16_t* dst, const uint8_t* packed, const float* code, int64_t first, int64_t count, int64_t n,
                  int64_t k, int64_t group) {
  if (!dst || !packed || !code || !fits(n, k, group) || first < 0 || first % 32 || count < 1 || first + count > n)
    return kBadArgument;
  const Linear linear{packed, nullptr, code, n, k, group};
  std::atomic<bool> done{true};
#pragma omp parallel for schedule(static)
  for (int64_t number = first / 32; number <= (first + count - 1) / 32; ++number) {
    const int64_t outputs = std::min<int64_t>(32, first + count - number * 32);
    if (!write_double(linear, number, outputs, dst + (number * 32 - first) * k)) done = false;
  }
  return done ? 0 : kNoMemory;
}

// y (rows, n) = x (rows, k) times the packed weight (n, k) transposed, plus bias (n) where there is one; all bf16 with
// unit stride along a row. `code` is the table of 16.
int lp_nf4_linear(uint16_t* y, int64_t y_stride, const uint16_t* x, int64_t x_stride, const uint8_t* packed,
                  const uint16_t* bias, const float* code, int64_t rows, int64_t n, int64_t k, int64_t group) {
  if ((rows && (!y || !x)) || !packed || !code || rows < 0 || !fits(n, k, group)) return kBadArgument;
  const Linear linear{packed, bias, code, n, k, group};
  for (int64_t part = 0, parts = (rows + kRows - 1) / kRows; part < parts; ++part) {
    const int64_t from = rows * part / parts, count = rows * (part + 1) / parts - from;
    const Rows some{x + from * x_stride, x_stride, y + from * y_stride, y_stride, count};
    const bool done = some.count <= kFew ? few_rows(linear, some) : many_rows(linear, some);
    if (!done) return kNoMemory;
  }
  return 0;
}

}
#pragma GCC visibility pop
