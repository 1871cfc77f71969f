// Arithmetic on sizes and indices that blocks do.
#pragma once

#include "context.h"

namespace mmdcn::cuda {

// a / b of non-negative numbers: 64-bit division is several times slower, and rarely needed.
MMDCN_BLOCK int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

MMDCN_BLOCK int64_t divide_up(int64_t a, int64_t b) { return divide(a + b - 1, b); }

MMDCN_BLOCK int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace mmdcn::cuda
