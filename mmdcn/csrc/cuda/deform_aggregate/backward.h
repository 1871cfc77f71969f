// Backward pass of deformable aggregation, to the input, the offsets and the modulations.
#pragma once

#include "points.h"

namespace mmdcn::cuda {

// Gradients of one sample, summed over some channels.
template <typename acc_t>
struct SampleGradient {
  acc_t y, x, mask;
};

template <typename acc_t>
struct AggregateBackwardStorage {
  AggregateStorage<acc_t> points;
  SampleGradient<acc_t> partial[kPoints][kBlockChannels];
};

// Each block computes all gradients of its points' samples, in a fixed order.
template <typename Ctx, typename scalar_t, typename acc_t>
MMDCN_BLOCK void aggregate_backward_block(const Ctx& ctx, const AggregateProblem& problem,
                                          const scalar_t* grad_output, const scalar_t* input,
                                          const acc_t* offset, const acc_t* mask, acc_t* grad_input,
                                          acc_t* grad_offset, acc_t* grad_mask,
                                          AggregateBackwardStorage<acc_t>& storage) {
  using Items = AggregateItems<Ctx>;
  const DeformAggregateShape& shape = problem.shape;
  const acc_t scale = static_cast<acc_t>(shape.offset_scale);
  const bool through_samples = grad_offset || grad_mask;
  const int64_t points = all_points(shape);
  for (int64_t first = ctx.block() * kPoints; first < points; first += ctx.blocks() * kPoints) {
    ctx.sync();  // All threads are done with the previous points.
    find_points(ctx, shape, first, storage.points);
    for (int64_t round = 0; round < rounds(shape); ++round) {
      ctx.sync();  // The points are set, and all threads have read the previous round's samples.
      locate_samples(ctx, problem, offset, mask, round, storage.points);
      ctx.sync();
      for (int k = 0; k < taps_of(shape, round); ++k) {
        SampleGradient<acc_t> gradient[Items::kPerThread];
        MMDCN_UNROLL
        for (int i = 0; i < Items::kPerThread; ++i) gradient[i] = {0, 0, 0};
        for (int64_t channel = 0; channel < shape.group_channels(); channel += kBlockChannels) {
          Items::for_each(ctx, shape, storage.points, channel, [&](int i, int place, int64_t c) {
            const AggregatePoint& point = storage.points.point[place];
            const AggregateSample<acc_t>& sample = storage.points.sample[place][k];
            const acc_t grad =
                static_cast<acc_t>(grad_output[point.pixel * shape.channels +
                                               point.group * shape.group_channels() + c]);
            MMDCN_UNROLL
            for (int q = 0; q < sample.corners.kCount; ++q) {
              const int64_t position = sample.corners.position[q];
              if (position < 0) continue;
              const int64_t at = point.start + c + position * shape.channels;
              if (through_samples) {
                const acc_t product = grad * static_cast<acc_t>(input[at]);
                gradient[i].y += sample.corners.weight_gradient[0][q] * product;
                gradient[i].x += sample.corners.weight_gradient[1][q] * product;
                gradient[i].mask += sample.corners.weight[q] * product;
              }
              if (grad_input) {
                ctx.atomic_add(&grad_input[at],
                               sample.modulation * sample.corners.weight[q] * grad);
              }
            }
          });
        }
        if (!through_samples) continue;

        ctx.sync();  // All threads have read the sums of the previous tap.
        MMDCN_UNROLL
        for (int i = 0; i < Items::kPerThread; ++i) {
          const int item = ctx.thread() + i * Ctx::kThreads;
          storage.partial[item / kBlockChannels][item % kBlockChannels] = gradient[i];
        }
        ctx.sync();
        for (int place = ctx.thread(); place < kPoints; place += Ctx::kThreads) {
          const AggregatePoint& point = storage.points.point[place];
          if (!point.exists) continue;
          SampleGradient<acc_t> sum = {0, 0, 0};
          for (const SampleGradient<acc_t>& part : storage.partial[place]) {
            sum = {sum.y + part.y, sum.x + part.x, sum.mask + part.mask};
          }
          const acc_t modulation = scale * storage.points.sample[place][k].modulation;
          const int64_t tap =
              (point.pixel * shape.groups + point.group) * shape.taps() + round * kTaps + k;
          if (grad_offset) {
            ctx.store(&grad_offset[2 * tap], modulation * sum.x);
            ctx.store(&grad_offset[2 * tap + 1], modulation * sum.y);
          }
          if (grad_mask) ctx.store(&grad_mask[tap], sum.mask);
        }
      }
    }
  }
}

}  // namespace mmdcn::cuda
