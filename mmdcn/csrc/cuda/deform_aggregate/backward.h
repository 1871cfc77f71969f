// Backward pass of deformable aggregation, to the input, the offsets and the modulations.
#pragma once

#include "points.h"

namespace mmdcn::cuda {

constexpr int kBackwardTaps = 5;  // that are located together

template <typename acc_t>
struct AggregateBackwardStorage {
  AggregateStorage<acc_t, kBackwardTaps> points;
  acc_t fraction[kPoints][kBackwardTaps][2];
  acc_t dot[kPoints][kBackwardTaps][4];
};

// Works on the channels of the located samples of all points.
template <int V, typename Ctx, typename scalar_t, typename acc_t>
MMDCN_BLOCK void scatter_samples(const Ctx& ctx, const DeformAggregateShape& shape, int taps,
                                 const scalar_t* grad_output, const scalar_t* input,
                                 const FloatingSum<acc_t>& grad_input, bool dots_wanted,
                                 AggregateBackwardStorage<acc_t>& storage) {
  using Team = Teams<Ctx>;
  const int64_t channels = shape.group_channels();
  const int lane = Team::lane(ctx);
  MMDCN_UNROLL
  for (int i = 0; i < Team::kPerThread; ++i) {
    const int place = Team::point(ctx, i);
    const AggregatePoint& point = storage.points.point[place];
    const scalar_t* grad = grad_output + point.pixel * shape.channels + point.group * channels;
    // All lanes of a team go through this loop together, as they add up their shares.
    for (int k = 0; k < taps; ++k) {
      acc_t dot[4] = {};
      for (int64_t c = lane * V; point.exists && c < channels; c += Team::kLanes * V) {
        acc_t gradient[V];
        load_as(ctx, grad + c, gradient);
        storage.points.sample[place][k].scatter(ctx, input, c, gradient, grad_input, dots_wanted,
                                                dot);
      }
      if (!dots_wanted) continue;
      ctx.sum_lanes(dot, Team::kLanes);
      MMDCN_UNROLL
      for (int q = 0; q < 4; ++q) {
        if (lane == 0) storage.dot[place][k][q] = dot[q];
      }
    }
  }
}

// Each block computes all gradients of its points' samples, in a fixed order.
template <int V, typename Ctx, typename scalar_t, typename acc_t>
MMDCN_BLOCK void aggregate_backward_block(const Ctx& ctx, const AggregateProblem& problem,
                                          const scalar_t* grad_output, const scalar_t* input,
                                          const acc_t* offset, const acc_t* mask, acc_t* grad_input,
                                          acc_t* grad_offset, acc_t* grad_mask,
                                          AggregateBackwardStorage<acc_t>& storage) {
  const DeformAggregateShape& shape = problem.shape;
  const acc_t scale = static_cast<acc_t>(shape.offset_scale);
  const bool dots_wanted = grad_offset || grad_mask;
  const int64_t points = all_points(shape), all_rounds = rounds(shape, kBackwardTaps);
  for (int64_t first = ctx.block() * kPoints; first < points; first += ctx.blocks() * kPoints) {
    ctx.sync();  // The previous points have been worked through.
    find_points(ctx, shape, first, storage.points);
    for (int64_t round = 0; round < all_rounds; ++round) {
      const int64_t first_tap = round * kBackwardTaps;
      const int taps = static_cast<int>(smaller(kBackwardTaps, shape.taps() - first_tap));
      ctx.sync();  // The points are there; the samples of the previous round have been read.
      for (int i = ctx.thread(); i < kPoints * taps; i += Ctx::kThreads) {
        const int place = i / taps, k = i - place * taps;
        const AggregatePoint& point = storage.points.point[place];
        if (!point.exists) continue;
        locate(problem, point, first_tap + k, offset, mask, storage.points.sample[place][k],
               storage.fraction[place][k]);
      }
      ctx.sync();
      scatter_samples<V>(ctx, shape, taps, grad_output, input, FloatingSum<acc_t>(grad_input),
                         dots_wanted, storage);
      if (!dots_wanted) continue;
      ctx.sync();

      for (int i = ctx.thread(); i < kPoints * taps; i += Ctx::kThreads) {
        const int place = i / taps, k = i - place * taps;
        const AggregatePoint& point = storage.points.point[place];
        if (!point.exists) continue;
        const Sample<acc_t, 2>& sample = storage.points.sample[place][k];
        acc_t by_modulation, by_coordinate[2];
        sample.derivatives(storage.fraction[place][k], storage.dot[place][k], by_modulation,
                           by_coordinate);
        const int64_t tap =
            (point.pixel * shape.groups + point.group) * shape.taps() + first_tap + k;
        if (grad_mask) ctx.store(&grad_mask[tap], by_modulation);
        if (!grad_offset) continue;
        ctx.store(&grad_offset[2 * tap], scale * sample.modulation * by_coordinate[1]);
        ctx.store(&grad_offset[2 * tap + 1], scale * sample.modulation * by_coordinate[0]);
      }
    }
  }
}

}  // namespace mmdcn::cuda
