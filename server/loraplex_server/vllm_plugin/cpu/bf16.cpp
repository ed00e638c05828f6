// bf16 linear layers on a CPU with AVX-512-BF16: y = x W^T + bias, W in panels. Plain C ABI, no torch.
#include "panels.h"

namespace {

constexpr int64_t kAhead = 2048;        // bytes that reading runs ahead of the products

// As `tile`, for one panel and from zero: up to 16 rows, whose sums then leave registers free.
template <int R>
ISA void panel(const uint32_t* x, const uint16_t* w, int64_t pairs, float* sums) {
  __m512 acc[R];
  for (auto& one : acc) one = _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p, x += R, w += 32) {
    _mm_prefetch((const char*)w + kAhead, _MM_HINT_T0);
    const __m512bh v = (__m512bh)_mm512_loadu_si512(w);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) acc[r] = _mm512_dpbf16_ps(acc[r], (__m512bh)_mm512_set1_epi32(x[r]), v);
  }
  for (int r = 0; r < R; ++r) _mm512_storeu_ps(sums + r * kDouble, acc[r]);
}

using Panel = void (*)(const uint32_t*, const uint16_t*, int64_t, float*);
constexpr Panel kPanelsAbove[kFew - kTile] = {panel<13>, panel<14>, panel<15>, panel<16>};

struct Bf16 {
  int64_t n, k;
  const uint16_t* bias;
  const uint16_t* packed;

  void few(const uint32_t* x, int64_t rows, int64_t number, float* sums) const {
    const uint16_t *first = packed + number * kDouble * k, *second = first + kPanel * k;
    if (rows <= kTile) {
      kTiles[rows](x, first, second, k / 2, kAhead, sums, true);
    } else {
      kPanelsAbove[rows - kTile - 1](x, first, k / 2, sums);
      kPanelsAbove[rows - kTile - 1](x, second, k / 2, sums + kPanel);
    }
  }

  struct Pair {
    const uint16_t *first, *second;
  };
  Pair part(int64_t number, int64_t pair, int64_t, uint16_t*) const {
    const uint16_t* first = packed + number * kDouble * k + pair * 32;
    return {first, first + kPanel * k};
  }
};

inline bool fits(int64_t n, int64_t k) { return n > 0 && k > 0 && k % 2 == 0; }

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// 1 where the processor has what the kernels need.
int lp_bf16_supported(void) { return processor_has_what_is_needed(); }

// The values of a packed weight (n, k); -1 for sizes that cannot be.
int64_t lp_bf16_values(int64_t n, int64_t k) { return fits(n, k) ? doubles_of(n) * kDouble * k : kBadArgument; }

// Put a weight (n, k), row behind row, into panels; outputs that are not there are 0.
int lp_bf16_pack(uint16_t* dst, const uint16_t* src, int64_t n, int64_t k) {
  if (!dst || !src || !fits(n, k)) return kBadArgument;
#pragma omp parallel for schedule(static)
  for (int64_t panel = 0; panel < 2 * doubles_of(n); ++panel) {
    const int64_t here = std::clamp<int64_t>(n - panel * kPanel, 0, kPanel);
    uint32_t* to = reinterpret_cast<uint32_t*>(dst + panel * kPanel * k);
    if (here < kPanel) std::memset(to, 0, kPanel * k * 2);
    for (int64_t o = 0; o < here; ++o)
      for (int64_t p = 0; p < k / 2; ++p) std::memcpy(to + p * kPanel + o, src + (panel * kPanel + o) * k + 2 * p, 4);
  }
  return 0;
}

// y (rows, n) = x (rows, k) times the packed weight (n, k) transposed, plus bias (n) where there is one; all bf16 with
// unit stride along a row. `beside` may be null.
int lp_bf16_linear(uint16_t* y, int64_t y_stride, const uint16_t* x, int64_t x_stride, const uint16_t* packed,
                   const uint16_t* bias, int64_t rows, int64_t n, int64_t k, const Beside* beside) {
  if ((rows && (!y || !x)) || !packed || rows < 0 || !fits(n, k)) return kBadArgument;
  return multiply<Product<Bf16>>(Bf16{n, k, bias, packed}, y, y_stride, x, x_stride, rows, beside);
}

}
#pragma GCC visibility pop
