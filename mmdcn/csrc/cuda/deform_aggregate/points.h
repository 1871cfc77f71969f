// The points that a block of threads works on in deformable aggregation, and their samples.
//
// A point is one output pixel of one group. A block works on kPoints of them at the same time, with
// a team of lanes for each, which share its channels. The samples of up to kTaps taps of each are
// located in shared memory, once for all channels; kernels of more taps take several rounds.
#pragma once

#include "../sample.h"
#include "kernels.h"

namespace mmdcn::cuda {

constexpr int kPoints = 64;

// An output pixel, numbered over the whole batch, and a group.
struct AggregatePoint {
  int64_t pixel, group;
  int64_t start;  // of the image's channels of the group, in elements of the input
  bool exists;
};

template <typename acc_t, int kTaps>
struct AggregateStorage {
  AggregatePoint point[kPoints];
  Sample<acc_t, 2> sample[kPoints][kTaps];
};

// How the threads of a block are shared out to its points.
template <typename Ctx>
struct Teams {
  static constexpr int kLanes = Ctx::kLanes < 4 ? Ctx::kLanes : 4;
  static constexpr int kPerThread = kPoints * kLanes / Ctx::kThreads;  // points of a thread
  static_assert(kPerThread * Ctx::kThreads == kPoints * kLanes, "uneven");

  MMDCN_BLOCK static int lane(const Ctx& ctx) { return ctx.thread() % kLanes; }
  // The number of a thread's point number i, in the block.
  MMDCN_BLOCK static int point(const Ctx& ctx, int i) {
    return (ctx.thread() + i * Ctx::kThreads) / kLanes;
  }
};

MMDCN_BLOCK int64_t all_points(const DeformAggregateShape& shape) {
  return shape.batch * shape.pixels() * shape.groups;
}

MMDCN_BLOCK int64_t rounds(const DeformAggregateShape& shape, int taps) {
  return divide_up(shape.taps(), taps);
}

// Finds points [first, first + kPoints).
template <typename Ctx, typename acc_t, int kTaps>
MMDCN_BLOCK void find_points(const Ctx& ctx, const DeformAggregateShape& shape, int64_t first,
                             AggregateStorage<acc_t, kTaps>& storage) {
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

// Locates a sample: tap number `tap` of a point. `fraction` is what is left of its coordinates.
template <typename acc_t>
MMDCN_BLOCK void locate(const AggregateProblem& problem, const AggregatePoint& point, int64_t tap,
                        const acc_t* offset, const acc_t* mask, Sample<acc_t, 2>& sample,
                        acc_t (&fraction)[2]) {
  const DeformAggregateShape& shape = problem.shape;
  const acc_t scale = static_cast<acc_t>(shape.offset_scale);
  const int64_t full = shape.full_tap(tap);
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
  sample.reach_nothing();
  if (sample.locate(p, {shape.y.size, shape.x.size}, point.start, shape.channels, fraction)) {
    sample.modulation = mask[point.pixel * problem.mask.pixel_stride +
                             point.group * problem.mask.group_stride + tap];
  }
}

}  // namespace mmdcn::cuda
