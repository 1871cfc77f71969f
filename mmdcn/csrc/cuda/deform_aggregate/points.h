// The points that a block of threads works on, and their samples, for both passes of deformable
// aggregation on CUDA. A point is one group of one output pixel.
//
// A block works on kPoints points at the same time. The corners of up to kTaps samples of each are
// located in shared memory, once for all channels of the group; then all threads work on channels.
// Kernels of more taps take several rounds.
#pragma once

#include "../../integers.h"
#include "../../sampling.h"
#include "../context.h"
#include "kernels.h"

namespace mmdcn::cuda {

constexpr int kPoints = 16;         // that a block works on at the same time
constexpr int kBlockChannels = 16;  // of each point, likewise
constexpr int kTaps = 10;           // of one round

// One group of one output pixel; pixels are numbered over the whole batch.
struct AggregatePoint {
  int64_t pixel, group;
  int64_t start;  // index in the input of the group's first channel of the image's first pixel
  bool exists;
};

// One sample. The positions of its corners are pixels of the image; all are -1 where the sample
// contributes nothing.
template <typename acc_t>
struct AggregateSample {
  acc_t modulation;
  Corners<acc_t, 2> corners;
};

template <typename acc_t>
struct AggregateStorage {
  AggregatePoint point[kPoints];
  AggregateSample<acc_t> sample[kPoints][kTaps];
};

MMDCN_BLOCK int64_t all_points(const DeformAggregateShape& shape) {
  return shape.batch * shape.pixels() * shape.groups;
}

MMDCN_BLOCK int64_t rounds(const DeformAggregateShape& shape) {
  return divide_up(shape.taps(), kTaps);
}

// Taps of a round.
MMDCN_BLOCK int taps_of(const DeformAggregateShape& shape, int64_t round) {
  return static_cast<int>(smaller(kTaps, shape.taps() - round * kTaps));
}

// Finds points [first, first + kPoints).
template <typename Ctx, typename acc_t>
MMDCN_BLOCK void find_points(const Ctx& ctx, const DeformAggregateShape& shape, int64_t first,
                             AggregateStorage<acc_t>& storage) {
  for (int i = ctx.thread(); i < kPoints; i += Ctx::kThreads) {
    AggregatePoint point = {0, 0, 0, first + i < all_points(shape)};
    if (point.exists) {
      point.pixel = divide(first + i, shape.groups);
      point.group = first + i - point.pixel * shape.groups;
      const int64_t image = divide(point.pixel, shape.pixels());
      point.start = image * shape.y.size * shape.x.size * shape.channels +
                    point.group * shape.group_channels();
    }
    storage.point[i] = point;
  }
}

// Locates the samples of one round of taps, for the points that find_points() has set.
template <typename Ctx, typename acc_t>
MMDCN_BLOCK void locate_samples(const Ctx& ctx, const AggregateProblem& problem,
                                const acc_t* offset, const acc_t* mask, int64_t round,
                                AggregateStorage<acc_t>& storage) {
  const DeformAggregateShape& shape = problem.shape;
  const int taps = taps_of(shape, round);
  const acc_t scale = static_cast<acc_t>(shape.offset_scale);
  for (int i = ctx.thread(); i < kPoints * taps; i += Ctx::kThreads) {
    const int place = i / taps, k = i - place * taps;
    const AggregatePoint& point = storage.point[place];
    if (!point.exists) continue;
    const int64_t tap = round * kTaps + k, full = shape.full_tap(tap);
    const int64_t tap_x = divide(full, shape.y.kernel), tap_y = full - tap_x * shape.y.kernel;
    const int64_t row = divide(point.pixel, shape.x.out_size);
    const int64_t out_x = point.pixel - row * shape.x.out_size;
    const int64_t out_y = row - divide(row, shape.y.out_size) * shape.y.out_size;
    const acc_t* delta = offset + point.pixel * problem.offset.pixel_stride +
                         point.group * problem.offset.group_stride + 2 * tap;
    const acc_t p[2] = {static_cast<acc_t>(shape.y.origin(out_y)) +
                            scale * (static_cast<acc_t>(shape.y.relative(tap_y)) + delta[1]),
                        static_cast<acc_t>(shape.x.origin(out_x)) +
                            scale * (static_cast<acc_t>(shape.x.relative(tap_x)) + delta[0])};
    AggregateSample<acc_t> sample;
    const bool inside = sample.corners.locate(p, {shape.y.size, shape.x.size});
    MMDCN_UNROLL
    for (int q = 0; q < sample.corners.kCount; ++q) {
      if (!inside) sample.corners.position[q] = -1;
    }
    sample.modulation = inside ? mask[point.pixel * problem.mask.pixel_stride +
                                      point.group * problem.mask.group_stride + tap]
                               : acc_t(0);
    storage.sample[place][k] = sample;
  }
}

// Calls visit(i, point, channel) for each work item of this thread, one channel of one point that
// exists; i < kPerThread. Consecutive threads have consecutive channels.
template <typename Ctx>
struct AggregateItems {
  static constexpr int kItems = kPoints * kBlockChannels;
  static constexpr int kPerThread = kItems / Ctx::kThreads;
  static_assert(kPerThread * Ctx::kThreads == kItems, "uneven");

  template <typename acc_t, typename Visit>
  MMDCN_BLOCK static void for_each(const Ctx& ctx, const DeformAggregateShape& shape,
                                   const AggregateStorage<acc_t>& storage, int64_t first_channel,
                                   const Visit& visit) {
    MMDCN_UNROLL
    for (int i = 0; i < kPerThread; ++i) {
      const int item = ctx.thread() + i * Ctx::kThreads;
      const int place = item / kBlockChannels;
      const int64_t channel = first_channel + item % kBlockChannels;
      if (storage.point[place].exists && channel < shape.group_channels()) {
        visit(i, place, channel);
      }
    }
  }
};

}  // namespace mmdcn::cuda
