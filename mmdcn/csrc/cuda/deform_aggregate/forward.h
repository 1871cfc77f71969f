// Forward pass of deformable aggregation.
#pragma once

#include "points.h"

namespace mmdcn::cuda {

template <typename Ctx, typename scalar_t, typename acc_t>
MMDCN_BLOCK void aggregate_forward_block(const Ctx& ctx, const AggregateProblem& problem,
                                         const scalar_t* input, const acc_t* offset,
                                         const acc_t* mask, scalar_t* output,
                                         AggregateStorage<acc_t>& storage) {
  using Items = AggregateItems<Ctx>;
  const DeformAggregateShape& shape = problem.shape;
  const int64_t points = all_points(shape), all_rounds = rounds(shape);
  for (int64_t first = ctx.block() * kPoints; first < points; first += ctx.blocks() * kPoints) {
    ctx.sync();  // All threads are done with the previous points.
    find_points(ctx, shape, first, storage);
    ctx.sync();
    for (int64_t channel = 0; channel < shape.group_channels(); channel += kBlockChannels) {
      acc_t sum[Items::kPerThread] = {};
      for (int64_t round = 0; round < all_rounds; ++round) {
        if (channel == 0 || all_rounds > 1) {
          ctx.sync();  // All threads have read the samples of the previous round.
          locate_samples(ctx, problem, offset, mask, round, storage);
          ctx.sync();
        }
        const int taps = taps_of(shape, round);
        Items::for_each(ctx, shape, storage, channel, [&](int i, int place, int64_t c) {
          const scalar_t* source = input + storage.point[place].start + c;
          for (int k = 0; k < taps; ++k) {
            const AggregateSample<acc_t>& sample = storage.sample[place][k];
            acc_t value = 0;
            MMDCN_UNROLL
            for (int q = 0; q < sample.corners.kCount; ++q) {
              const int64_t position = sample.corners.position[q];
              if (position < 0) continue;
              value +=
                  sample.corners.weight[q] * static_cast<acc_t>(source[position * shape.channels]);
            }
            sum[i] += sample.modulation * value;
          }
        });
      }
      Items::for_each(ctx, shape, storage, channel, [&](int i, int place, int64_t c) {
        const AggregatePoint& point = storage.point[place];
        ctx.store(&output[point.pixel * shape.channels + point.group * shape.group_channels() + c],
                  static_cast<scalar_t>(sum[i]));
      });
    }
  }
}

}  // namespace mmdcn::cuda
