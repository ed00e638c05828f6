// What goes along with a linear layer of many rows, on its threads and in their caches: bf16.cpp and nf4.cpp compute the
// layer, lora.cpp adds to it. They are built apart, so this is plain C.
#pragma once

#include <cstdint>

// The layer's outputs come so many at a time.
constexpr int64_t kBesideColumns = 32;

struct Beside {
  // Called by every thread of the layer, whichever they are, or by one for all, before any output is written. Returns
  // once what all of them did is done.
  void (*before)(void* data);
  // Called by one of them when it has written these rows and columns of the result.
  void (*behind)(void* data, int64_t row_from, int64_t row_to, int64_t column_from, int64_t column_to);
  void* data;
};
