// What the passes of deformable convolution on tensor cores share: which problems they take, and
// sampling by vectors of channels.
//
// Input, output and their gradients have channels last, except that the output of the forward pass
// may have either layout.
#pragma once

#include "columns.h"
#include "tensor_core_tile.h"

namespace mmdcn::cuda {

// Successive channels that belong to one group of the convolution and to one offset group.
MMDCN_BLOCK int run_channels(const DeformConv2dProblem& problem) {
  return static_cast<int>(smaller(problem.group_channels, problem.deform_group_channels));
}

// find_pixel() in 32 bits.
MMDCN_BLOCK Pixel find_pixel(const DeformConv2dProblem& problem, int number) {
  const auto width = static_cast<int>(problem.shape.out_width);
  const auto height = static_cast<int>(problem.shape.out_height);
  const int row = number / width, batch = row / height;
  return {batch, row - batch * height, number - row * width};
}

// How far corner q of a sample lies behind the low y, low x one, in elements of the input.
MMDCN_BLOCK int corner_distance(const DeformConv2dProblem& problem, int q) {
  const int row = static_cast<int>(problem.input.position * problem.shape.width);
  return (q >> 1) * row + (q & 1) * static_cast<int>(problem.input.position);
}

// A sampling point of these problems, whose pixels, taps and channels are numbers of 32 bits.
class TensorPoint {
  SamplingPoint<float, int> point_;

 public:
  MMDCN_BLOCK TensorPoint(const DeformConv2dProblem& problem, const float* offset,
                          const float* mask, const Pixel& pixel, int group, int tap) {
    const int width = static_cast<int>(problem.shape.kernel_width), tap_y = tap / width;
    point_.inside = false;
    if (pixel.exists()) {
      point_.locate(problem, offset, mask, pixel, group, tap, tap_y, tap - tap_y * width);
    }
  }

  MMDCN_BLOCK bool inside() const { return point_.inside; }
  MMDCN_BLOCK float modulation() const { return point_.modulation; }
  MMDCN_BLOCK const Corners<float, 2, int>& corners() const { return point_.corners; }
  MMDCN_BLOCK bool exists(int q) const { return point_.inside && point_.corners.position[q] >= 0; }

  // Where channel 0 of corner q is in the input.
  MMDCN_BLOCK int64_t element(const DeformConv2dProblem& problem, const Pixel& pixel, int q) const {
    return pixel.batch * problem.input.batch + point_.corners.position[q] * problem.input.position;
  }
};

// What the four corners of a sample count for, modulated; 0 for those that do not exist.
struct alignas(16) CornerWeights {
  float of[4];
};

// Sampling points of `kTaps` taps of `kPixels` output pixels, ready for blending.
template <int kTaps, int kPixels>
struct PointTable {
  CornerWeights weight[kTaps][kPixels];
  int64_t low[kTaps][kPixels];  // element of the input: first channel of the low y, low x corner

  // Fills in what one pixel samples for one tap in one offset group.
  MMDCN_BLOCK void set(const DeformConv2dProblem& problem, const float* offset, const float* mask,
                       const Pixel& pixel, int group, int tap, int row, int column) {
    const TensorPoint point(problem, offset, mask, pixel, group, tap);
    CornerWeights weights = {};
    int64_t first = 0;
    MMDCN_UNROLL
    for (int q = 0; q < 4; ++q) {
      if (!point.exists(q)) continue;
      weights.of[q] = point.modulation() * point.corners().weight[q];
      first = point.element(problem, pixel, q) - corner_distance(problem, q);
    }
    weight[row][column] = weights;
    low[row][column] = first;
  }
};

// One sampled vector of channels, in two halves: its corners are asked for early and blended late.
template <typename T>
class Sample {
  Vector<T, kWide<T>> corner_[4];

 public:
  // `low` is where the vector's channels of the low corner are, or would be.
  template <typename Ctx>
  MMDCN_BLOCK void load(const Ctx& ctx, const DeformConv2dProblem& problem,
                        const CornerWeights& weight, const T* input, int64_t low) {
    MMDCN_UNROLL
    for (int q = 0; q < 4; ++q) {
      corner_[q] = {};
      if (weight.of[q] != 0) ctx.load(input + low + corner_distance(problem, q), corner_[q]);
    }
  }

  template <typename Ctx>
  MMDCN_BLOCK void blend(const Ctx& ctx, const CornerWeights& weight, T* target) const {
    float sum[kWide<T>] = {};
    MMDCN_UNROLL
    for (int q = 0; q < 4; ++q) {
      float x[kWide<T>];
      ctx.template unpack<T>(corner_[q], x);
      MMDCN_UNROLL
      for (int i = 0; i < kWide<T>; ++i) sum[i] += weight.of[q] * x[i];
    }
    Vector<T, kWide<T>> packed;
    ctx.template pack<T>(sum, packed);
    ctx.store_shared(target, packed);
  }
};

// Work items of each thread, of which a block has kItems.
template <typename Ctx, int kItems>
constexpr int kPerThread = kItems / Ctx::kThreads;

// Work items of a block, shared out over its threads and over the parts of a multiplication, so
// that a part's items wait for memory while it is multiplied.
template <typename Ctx, int kItems>
struct PartItems {
  static constexpr int kAll = kPerThread<Ctx, kItems>;
  static constexpr int kPerPart = (kAll + kParts - 1) / kParts;
  static_assert(kAll * Ctx::kThreads == kItems, "uneven");

  // Whether a part has an i-th item, i < kPerPart: the last one may have fewer than the others.
  MMDCN_BLOCK static bool exists(int part, int i) { return part * kPerPart + i < kAll; }
  MMDCN_BLOCK static int item(const Ctx& ctx, int part, int i) {
    return ctx.thread() + (part * kPerPart + i) * Ctx::kThreads;
  }
};

}  // namespace mmdcn::cuda
