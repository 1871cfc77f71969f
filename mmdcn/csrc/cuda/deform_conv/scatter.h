// The backward pass through the samples: from the gradient of the columns to those of the input, of
// the offset and of the mask.
#pragma once

#include "fixed_point.h"
#include "samples.h"

namespace mmdcn::cuda {

constexpr int kScatterSamples = 2 * kPixels;  // that a block locates together

template <typename acc_t, int R>
struct ScatterStorage {
  ColumnSample<acc_t, R> sample[kScatterSamples];
  acc_t fraction[kScatterSamples][R];
  int64_t grad_mask_index[kScatterSamples], grad_offset_index[kScatterSamples];
  acc_t dot[kScatterSamples][1 << R];  // of each corner's features with the column's gradient
};

// Adds to the gradient of the input, `grad_input`, a FloatingSum or a FixedSum, in no fixed order.
// Writes each element of the other two once, unless they are null, summed in a fixed order.
template <int V, typename Ctx, int R, typename scalar_t, typename acc_t, typename Sum>
MMDCN_BLOCK void scatter_block(const Ctx& ctx, const ConvProblem<R>& problem,
                               const PixelRange& range, const scalar_t* grad_columns,
                               const scalar_t* input, const acc_t* offset, const acc_t* mask,
                               const Sum& grad_input, acc_t* grad_offset, acc_t* grad_mask,
                               ScatterStorage<acc_t, R>& storage) {
  constexpr int kCorners = 1 << R, kSamples = kScatterSamples;
  const int64_t samples = samples_of(problem, range);
  const bool dots_wanted = grad_offset || grad_mask;
  const int64_t channels = problem.deform_group_channels;
  const int log2_lanes = log2_lanes_for<Ctx>(divide(channels, V));
  const int lanes = 1 << log2_lanes;
  for (int64_t first = ctx.block() * kSamples; first < samples; first += ctx.blocks() * kSamples) {
    ctx.sync();  // The previous samples have been written.
    for (int i = ctx.thread(); i < kSamples; i += Ctx::kThreads) {
      ColumnSample<acc_t, R>& sample = storage.sample[i];
      sample.exists = false;
      if (first + i >= samples) continue;
      const SampleIndex<R> index(problem, range, first + i);
      storage.grad_mask_index[i] = index.grad_mask_index(problem);
      storage.grad_offset_index[i] = index.grad_offset_index(problem);
      locate(problem, index, offset, mask, sample, storage.fraction[i]);
    }
    ctx.sync();

    // All lanes of a sample go through this loop together, as they add up their shares.
    for (int i = ctx.thread() >> log2_lanes; i < kSamples; i += Ctx::kThreads >> log2_lanes) {
      const int lane = ctx.thread() & (lanes - 1);
      const ColumnSample<acc_t, R>& sample = storage.sample[i];
      acc_t dot[kCorners] = {};
      for (int64_t c = lane * V; sample.exists && c < channels; c += lanes * V) {
        acc_t gradient[V];
        load_as(ctx, grad_columns + sample.column_of(problem, c), gradient);
        sample.scatter(ctx, input, c, gradient, grad_input, dots_wanted, dot);
      }
      if (!dots_wanted) continue;
      ctx.sum_lanes(dot, lanes);
      MMDCN_UNROLL
      for (int q = 0; q < kCorners; ++q) {
        if (lane == 0) storage.dot[i][q] = dot[q];
      }
    }
    if (!dots_wanted) continue;
    ctx.sync();

    for (int i = ctx.thread(); i < kSamples; i += Ctx::kThreads) {
      const ColumnSample<acc_t, R>& sample = storage.sample[i];
      if (!sample.exists) continue;
      acc_t by_modulation, by_coordinate[R];
      sample.derivatives(storage.fraction[i], storage.dot[i], by_modulation, by_coordinate);
      if (grad_mask) ctx.store(grad_mask + storage.grad_mask_index[i], by_modulation);
      if (!grad_offset) continue;
      MMDCN_UNROLL
      for (int d = 0; d < R; ++d) {
        ctx.store(grad_offset + storage.grad_offset_index[i] + d * problem.pixels,
                  sample.modulation * by_coordinate[d]);
      }
    }
  }
}

}  // namespace mmdcn::cuda
