// Forward pass of deformable aggregation.
#pragma once

#include "points.h"

namespace mmdcn::cuda {

constexpr int kForwardTaps = 9;  // that are located together

template <typename acc_t>
using AggregateForwardStorage = AggregateStorage<acc_t, kForwardTaps>;

// Each block computes points of the output, V channels of each lane at once.
template <int V, typename Ctx, typename scalar_t, typename acc_t>
MMDCN_BLOCK void aggregate_forward_block(const Ctx& ctx, const AggregateProblem& problem,
                                         const scalar_t* input, const acc_t* offset,
                                         const acc_t* mask, scalar_t* output,
                                         AggregateForwardStorage<acc_t>& storage) {
  using Team = Teams<Ctx>;
  const DeformAggregateShape& shape = problem.shape;
  const int64_t points = all_points(shape), channels = shape.group_channels();
  const int64_t all_rounds = rounds(shape, kForwardTaps);
  for (int64_t first = ctx.block() * kPoints; first < points; first += ctx.blocks() * kPoints) {
    ctx.sync();  // The previous points have been worked through.
    find_points(ctx, shape, first, storage);
    for (int64_t tile = 0; tile < channels; tile += Team::kLanes * V) {
      const int64_t c = tile + Team::lane(ctx) * V;
      acc_t sum[Team::kPerThread][V] = {};
      for (int64_t round = 0; round < all_rounds; ++round) {
        const int64_t first_tap = round * kForwardTaps;
        const int taps = static_cast<int>(smaller(kForwardTaps, shape.taps() - first_tap));
        if (tile == 0 || all_rounds > 1) {
          ctx.sync();  // The points are there; the samples of the previous round have been read.
          for (int i = ctx.thread(); i < kPoints * taps; i += Ctx::kThreads) {
            const int place = i / taps, k = i - place * taps;
            acc_t fraction[2];
            const AggregatePoint& point = storage.point[place];
            if (!point.exists) continue;
            locate(problem, point, first_tap + k, offset, mask, storage.sample[place][k], fraction);
          }
          ctx.sync();
        }
        MMDCN_UNROLL
        for (int i = 0; i < Team::kPerThread; ++i) {
          const int place = Team::point(ctx, i);
          if (!storage.point[place].exists || c >= channels) continue;
          for (int k = 0; k < taps; ++k) storage.sample[place][k].add_to(ctx, input, c, sum[i]);
        }
      }
      MMDCN_UNROLL
      for (int i = 0; i < Team::kPerThread; ++i) {
        const AggregatePoint& point = storage.point[Team::point(ctx, i)];
        if (!point.exists || c >= channels) continue;
        Vector<scalar_t, V> values;
        MMDCN_UNROLL
        for (int j = 0; j < V; ++j) values.value[j] = static_cast<scalar_t>(sum[i][j]);
        ctx.store(output + point.pixel * shape.channels + point.group * channels + c, values);
      }
    }
  }
}

}  // namespace mmdcn::cuda
