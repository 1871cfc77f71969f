// One sample of channels-last features, located once for all channels that share it, and what the
// forward and backward passes of every operator do with it.
#pragma once

#include "../integers.h"
#include "../sampling.h"
#include "vector.h"

namespace mmdcn::cuda {

template <typename acc_t, int R>
struct Sample {
  static constexpr int kCorners = 1 << R;

  int64_t corner[kCorners];  // elements of the input before its channels; -1 where it is no pixel
  acc_t weight[kCorners];    // of the corner, without modulation
  acc_t modulation;          // 0 where the sample reaches nothing

  // Locates the sample at point p of an image, whose channels begin at element number `start` of
  // the input, with neighbours `stride` elements apart. `fraction` becomes what is left of p
  // between pixels. Returns false where the sample reaches nothing.
  MMDCN_BLOCK bool locate(const acc_t (&p)[R], const int64_t (&size)[R], int64_t start,
                          int64_t stride, acc_t (&fraction)[R]) {
    Corners<acc_t, R> corners;
    const bool inside = corners.locate(p, size, fraction);
    MMDCN_UNROLL
    for (int q = 0; q < kCorners; ++q) {
      const bool there = inside && corners.position[q] >= 0;
      corner[q] = there ? start + corners.position[q] * stride : -1;
      weight[q] = there ? corners.weight[q] : acc_t(0);
    }
    return inside;
  }

  MMDCN_BLOCK void reach_nothing() {
    MMDCN_UNROLL
    for (int q = 0; q < kCorners; ++q) {
      corner[q] = -1;
      weight[q] = 0;
    }
    modulation = 0;
  }

  // The features at the corners, of V channels from number `channel` on; zeros at those that are no
  // pixels. All are loaded before any is used, so that one wait serves them all.
  template <typename Ctx, typename scalar_t, int V>
  MMDCN_BLOCK void load(const Ctx& ctx, const scalar_t* input, int64_t channel,
                        Vector<scalar_t, V> (&features)[kCorners]) const {
    MMDCN_UNROLL
    for (int q = 0; q < kCorners; ++q) {
      features[q] = {};
      if (corner[q] >= 0) ctx.load(input + corner[q] + channel, features[q]);
    }
  }

  // sum += the sample's value, of as many channels.
  template <typename Ctx, typename scalar_t, int V>
  MMDCN_BLOCK void add_to(const Ctx& ctx, const scalar_t* input, int64_t channel,
                          acc_t (&sum)[V]) const {
    Vector<scalar_t, V> features[kCorners];
    load(ctx, input, channel, features);
    acc_t value[V] = {};
    MMDCN_UNROLL
    for (int q = 0; q < kCorners; ++q) {
      MMDCN_UNROLL
      for (int j = 0; j < V; ++j) {
        value[j] += weight[q] * static_cast<acc_t>(features[q].value[j]);
      }
    }
    MMDCN_UNROLL
    for (int j = 0; j < V; ++j) sum[j] += modulation * value[j];
  }

  // The way back, from the gradient of the sample's value: adds to the gradient of the input (see
  // FloatingSum), if it is wanted, and to the dot products of each corner's features with the
  // gradient, which those of the coordinates and of the modulation follow from.
  template <typename Ctx, typename scalar_t, typename Sum, int V>
  MMDCN_BLOCK void scatter(const Ctx& ctx, const scalar_t* input, int64_t channel,
                           const acc_t (&gradient)[V], const Sum& grad_input, bool dots_wanted,
                           acc_t (&dot)[kCorners]) const {
    if (dots_wanted) {
      Vector<scalar_t, V> features[kCorners];
      load(ctx, input, channel, features);
      MMDCN_UNROLL
      for (int q = 0; q < kCorners; ++q) {
        MMDCN_UNROLL
        for (int j = 0; j < V; ++j) {
          dot[q] += gradient[j] * static_cast<acc_t>(features[q].value[j]);
        }
      }
    }
    if (!grad_input.wanted()) return;
    MMDCN_UNROLL
    for (int q = 0; q < kCorners; ++q) {
      if (corner[q] < 0) continue;
      acc_t share[V];
      MMDCN_UNROLL
      for (int j = 0; j < V; ++j) share[j] = modulation * weight[q] * gradient[j];
      grad_input.add(ctx, corner[q] + channel, share);
    }
  }

  // The derivatives of the value, with respect to the modulation and the coordinates, before these
  // are modulated, from the dot products over all channels.
  MMDCN_BLOCK void derivatives(const acc_t (&fraction)[R], const acc_t (&dot)[kCorners],
                               acc_t& by_modulation, acc_t (&by_coordinate)[R]) const {
    by_modulation = 0;
    MMDCN_UNROLL
    for (int d = 0; d < R; ++d) by_coordinate[d] = 0;
    MMDCN_UNROLL
    for (int q = 0; q < kCorners; ++q) {
      if (corner[q] < 0) continue;
      by_modulation += weight[q] * dot[q];
      MMDCN_UNROLL
      for (int d = 0; d < R; ++d) by_coordinate[d] += slope_of_corner(fraction, d, q) * dot[q];
    }
  }
};

// Where a thread adds to the gradient of the input, in floating point: to neighbouring elements, of
// which the first lies at a multiple of their number. Not wanted where it is null.
template <typename acc_t>
class FloatingSum {
  acc_t* sum_;

 public:
  MMDCN_BLOCK explicit FloatingSum(acc_t* sum) : sum_(sum) {}
  // As a sum in fixed point is made.
  template <typename Problem, typename GradInput>
  MMDCN_BLOCK FloatingSum(const Problem&, const GradInput& grad_input)
      : sum_(static_cast<acc_t*>(grad_input.sum)) {}

  MMDCN_BLOCK bool wanted() const { return sum_; }

  template <typename Ctx, int N>
  MMDCN_BLOCK void add(const Ctx& ctx, int64_t index, const acc_t (&values)[N]) const {
    ctx.atomic_add(sum_ + index, values);
  }
};

// How many lanes work on the channels of one sample, if these are so many vectors: the most that
// each have one. It is a power of two, and this its exponent, as shifts cost a fraction of what
// divisions do.
template <typename Ctx>
MMDCN_BLOCK int log2_lanes_for(int64_t vectors) {
  int log2_lanes = 0;
  while ((2 << log2_lanes) <= Ctx::kLanes && (2 << log2_lanes) <= vectors) ++log2_lanes;
  return log2_lanes;
}

}  // namespace mmdcn::cuda
