// Arithmetic on sizes and positions, which are never negative.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace mmdcn {

MMDCN_HOST_DEVICE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// a / b. A 64-bit division is several times slower than a 32-bit one on a GPU, and rarely needed.
MMDCN_HOST_DEVICE int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

MMDCN_HOST_DEVICE int64_t divide_up(int64_t a, int64_t b) { return divide(a + b - 1, b); }

}  // namespace mmdcn
