// What the passes of deformable convolution on tensor cores share: which problems they take, and
// sampling by vectors of channels.
//
// Input, output and their gradients have channels last, except that the output of the forward pass
// may have either layout.
#pragma once

#include "deform_conv2d_columns.h"
#include "tensor_core_tile.h"

namespace mmdcn::cuda {

// Successive channels that belong to one group of the convolution and to one offset group.
MMDCN_BLOCK int run_channels(const DeformConv2dProblem& problem) {
  return static_cast<int>(smaller(problem.group_channels, problem.deform_group_channels));
}

// How far corner q of a sample lies behind the low y, low x one, in elements of the input.
MMDCN_BLOCK int corner_distance(const DeformConv2dProblem& problem, int q) {
  const int row = static_cast<int>(problem.input.position * problem.shape.width);
  return (q >> 1) * row + (q & 1) * static_cast<int>(problem.input.position);
}

// Finds a sampling point; taps and channels of these problems are numbers of 32 bits.
MMDCN_BLOCK void locate(SamplingPoint<float>& point, const DeformConv2dProblem& problem,
                        const float* offset, const float* mask, const Pixel& pixel, int64_t group,
                        int tap) {
  const int width = static_cast<int>(problem.shape.kernel_width), tap_y = tap / width;
  point.locate(problem, offset, mask, pixel, group, tap, tap_y, tap - tap_y * width);
}

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
                       const Pixel& pixel, int64_t group, int tap, int row, int column) {
    CornerWeights weights = {};
    int64_t first = 0;
    SamplingPoint<float> point;
    point.inside = false;
    if (pixel.exists()) locate(point, problem, offset, mask, pixel, group, tap);
    if (point.inside) {
      MMDCN_UNROLL
      for (int q = 0; q < 4; ++q) {
        const int64_t position = point.corners.position[q];
        if (position < 0) continue;
        weights.of[q] = point.modulation * point.corners.weight[q];
        first = pixel.batch * problem.input.batch + position - corner_distance(problem, q);
      }
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
    *reinterpret_cast<Vector<T, kWide<T>>*>(target) = packed;
  }
};

// Work items of a block, shared out over its threads and over the parts of a multiplication, so
// that a part's items wait for memory while it is multiplied.
template <typename Ctx, int kItems>
struct PartItems {
  static constexpr int kPerThread = kItems / Ctx::kThreads;
  static constexpr int kPerPart = (kPerThread + kParts - 1) / kParts;
  static_assert(kPerThread * Ctx::kThreads == kItems, "uneven");

  MMDCN_BLOCK static int count(int part) {
    return part * kPerPart + kPerPart <= kPerThread ? kPerPart : kPerThread - part * kPerPart;
  }
  MMDCN_BLOCK static int item(const Ctx& ctx, int part, int i) {
    return ctx.thread() + (part * kPerPart + i) * Ctx::kThreads;
  }
};

}  // namespace mmdcn::cuda
