// The gradient of the input is a sum of additions that blocks make in no fixed order. In floating
// point that order shows in the last bits. In fixed point it does not: integers add up to the same
// in any order. The unit is a power of two, as small as the largest sum that there could be allows:
//
//   |sum| <= samples * output channels * max |grad_output| * max |weight| * max |mask| < 2^62 units
//
// as the weights of one sample's corners are at most 1. A column's gradient that half precision
// cannot hold is no number, though; whoever meets one says so, and then all sums are NaN. For
// layers of detectors a unit is some 2^-36 of a typical sum: less than float rounds to, and more
// than double does.
#pragma once

#include <cmath>
#include <limits>

#include "../sample.h"
#include "kernels.h"

namespace mmdcn::cuda {

// Magnitudes are powers of two that values are less than, as biased exponents, of which 0 is that
// of 0, and one above all others that of values that are not finite.
constexpr int kMagnitudeBias = 2048;
constexpr int kNotFinite = 1 << 20;

template <typename acc_t>
MMDCN_BLOCK int magnitude(acc_t value) {
  if (value == 0) return 0;
  if (!(value - value == 0)) return kNotFinite;
  return std::ilogb(value) + 1 + kMagnitudeBias;
}

// The least b for which n <= 2^b.
MMDCN_BLOCK int bits(int64_t n) {
  int b = 0;
  while (b < 62 && (INT64_C(1) << b) < n) ++b;
  return b;
}

// The unit of the sums, given the magnitudes of grad_output, weight and mask.
template <typename acc_t>
struct FixedPoint {
  bool finite;  // otherwise sums could be anything, and are all taken to be NaN
  int exponent;

  template <int R>
  MMDCN_BLOCK FixedPoint(const ConvProblem<R>& problem, const int32_t* magnitudes) {
    const bool zero = magnitudes[0] == 0 || magnitudes[1] == 0 || magnitudes[2] == 0;
    const int product = magnitudes[0] + magnitudes[1] + magnitudes[2] - 3 * kMagnitudeBias;
    const int largest =
        product + bits(problem.group_out_channels) + bits(problem.pixels * problem.taps);
    const bool any_not_finite =
        magnitudes[0] == kNotFinite || magnitudes[1] == kNotFinite || magnitudes[2] == kNotFinite;
    constexpr int kLargest = std::numeric_limits<acc_t>::max_exponent - 1;
    constexpr int kSmallest = std::numeric_limits<acc_t>::min_exponent - 1;
    finite = !any_not_finite && (zero || largest <= kLargest);
    exponent = zero || !finite || largest - 62 < kSmallest ? kSmallest : largest - 62;
  }
};

// Where a thread adds to the gradient of the input, as FloatingSum does, in fixed point.
template <typename acc_t>
class FixedSum {
  int64_t* sum_;
  int32_t* not_finite_;
  acc_t scale_;  // units in 1; 0 if all sums are to be NaN

 public:
  template <int R>
  MMDCN_BLOCK FixedSum(const ConvProblem<R>& problem, const GradInput& grad_input)
      : sum_(grad_input.fixed), not_finite_(grad_input.magnitudes + kNotFiniteSeen) {
    const FixedPoint<acc_t> unit(problem, grad_input.magnitudes);
    scale_ = unit.finite ? std::ldexp(acc_t(1), -unit.exponent) : acc_t(0);
  }

  MMDCN_BLOCK bool wanted() const { return true; }

  template <typename Ctx, int N>
  MMDCN_BLOCK void add(const Ctx& ctx, int64_t index, const acc_t (&values)[N]) const {
    // What is to be NaN may be more than an integer holds.
    if (scale_ == 0) return;
    MMDCN_UNROLL
    for (int i = 0; i < N; ++i) {
      if (values[i] - values[i] == 0) {
        const int64_t units = static_cast<int64_t>(std::llrint(values[i] * scale_));
        ctx.atomic_add(sum_ + index + i, units);
      } else {
        ctx.atomic_max(not_finite_, 1);
      }
    }
  }
};

struct MagnitudeStorage {
  int32_t largest[3];
};

// magnitudes[] = the largest of each tensor, and of what is there already. No mask counts as ones.
template <typename Ctx, int R, typename scalar_t, typename acc_t>
MMDCN_BLOCK void magnitudes_block(const Ctx& ctx, const ConvProblem<R>& problem,
                                  const scalar_t* grad_output, const scalar_t* weight,
                                  const acc_t* mask, int32_t* magnitudes,
                                  MagnitudeStorage& storage) {
  const int64_t thread = ctx.block() * Ctx::kThreads + ctx.thread();
  const int64_t threads = ctx.blocks() * Ctx::kThreads;
  const auto largest = [&](const auto* values, int64_t elements) {
    int found = 0;
    for (int64_t i = thread; i < elements; i += threads) {
      const int one = magnitude(static_cast<acc_t>(values[i]));
      found = one > found ? one : found;
    }
    return found;
  };
  const auto largest_of_mask = [&] {
    int found = mask ? 0 : magnitude(acc_t(1));
    for (int64_t image = 0; mask && image < problem.shape.batch; ++image) {
      const int one = largest(mask + image * problem.mask_image, problem.samples * problem.pixels);
      found = one > found ? one : found;
    }
    return found;
  };
  const int64_t all_pixels = problem.shape.batch * problem.pixels;
  for (int i = ctx.thread(); i < 3; i += Ctx::kThreads) storage.largest[i] = 0;
  ctx.sync();
  ctx.atomic_max(&storage.largest[0],
                 largest(grad_output, all_pixels * problem.shape.out_channels));
  ctx.atomic_max(&storage.largest[1],
                 largest(weight, problem.shape.out_channels * problem.columns));
  ctx.atomic_max(&storage.largest[2], largest_of_mask());
  ctx.sync();
  for (int i = ctx.thread(); i < 3; i += Ctx::kThreads) {
    ctx.atomic_max(&magnitudes[i], storage.largest[i]);
  }
}

// sum = what the fixed-point sums stand for.
template <typename Ctx, int R, typename acc_t>
MMDCN_BLOCK void from_fixed_block(const Ctx& ctx, const ConvProblem<R>& problem,
                                  const GradInput& grad_input, acc_t* sum) {
  const FixedPoint<acc_t> unit(problem, grad_input.magnitudes);
  const bool finite = unit.finite && grad_input.magnitudes[kNotFiniteSeen] == 0;
  const acc_t value = finite ? std::ldexp(acc_t(1), unit.exponent) : static_cast<acc_t>(NAN);
  const int64_t elements = problem.shape.batch * problem.positions * problem.shape.channels;
  const int64_t threads = ctx.blocks() * Ctx::kThreads;
  for (int64_t i = ctx.block() * Ctx::kThreads + ctx.thread(); i < elements; i += threads) {
    ctx.store(&sum[i], static_cast<acc_t>(grad_input.fixed[i]) * value);
  }
}

}  // namespace mmdcn::cuda
