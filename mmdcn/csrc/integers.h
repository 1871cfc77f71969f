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

// A divisor of many numbers, which takes a multiplication for each where they are below 2^31
// (Granlund and Montgomery 1994, "Division by invariant integers using multiplication").
class Divisor {
  int64_t divisor_;
  uint32_t factor_;
  int shift_ = 0;

 public:
  explicit Divisor(int64_t divisor = 1) : divisor_(divisor < 1 ? 1 : divisor) {
    while (shift_ < 31 && (INT64_C(1) << shift_) < divisor_) ++shift_;
    const int64_t over = (INT64_C(1) << shift_) - divisor_;
    // Beyond 2^31 the quotients of small numbers are 0, which a factor of 0 gives.
    factor_ = over < 0 ? 0 : static_cast<uint32_t>((over << 32) / divisor_ + 1);
  }

  // n / divisor.
  MMDCN_HOST_DEVICE int64_t divide(int64_t n) const {
    return (n >> 31) == 0 ? divide_small(n) : n / divisor_;
  }

  // The same of a number that is known to be below 2^31.
  MMDCN_HOST_DEVICE int64_t divide_small(int64_t n) const {
    const uint32_t small = static_cast<uint32_t>(n);
#ifdef __CUDA_ARCH__
    const uint32_t high = __umulhi(small, factor_);
#else
    const uint32_t high = static_cast<uint32_t>((uint64_t{small} * factor_) >> 32);
#endif
    return (high + small) >> shift_;
  }
};

MMDCN_HOST_DEVICE int64_t divide_up(int64_t a, int64_t b) { return divide(a + b - 1, b); }

}  // namespace mmdcn
