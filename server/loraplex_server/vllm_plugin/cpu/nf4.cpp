// NF4 linear layers on a CPU with AVX-512-BF16: y = x W^T + bias, W kept in four bits. Plain C ABI, no torch.
//
// Here: which thread computes what from where in memory. nf4_panels.h has the layout of weights, and the numbers.
#include "nf4_panels.h"

#include <atomic>
#include <cstdlib>

namespace {

constexpr int64_t kRows = 640;          // most rows for which weights are unpacked once: their sums stay in the cache
constexpr int64_t kUnpacked = 32768;    // bytes of bf16 weights unpacked at a time, which stay in the cache
constexpr int64_t kAlone = 1 << 20;     // products below which a second thread is not worth waking
constexpr int64_t kPadding = 64;        // bytes behind the last panel: loads begin up to three bytes into a vector
constexpr int kBadArgument = -1, kNoMemory = -2;

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
