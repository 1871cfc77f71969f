// The backward pass through the samples: from the gradient of the columns to those of the input, of
// the offset and of the mask.
#pragma once

#include "fixed_point.h"
#include "samples.h"

namespace mmdcn::cuda {

// Samples that a block locates together: as many as every GPU has shared memory for.
template <int R>
constexpr int kScatterSamples = (R == 2 ? 4 : 2) * kPixels;

template <typename acc_t, int R>
struct ScatterStorage {
  Sample<acc_t, R> sample[kScatterSamples<R>];
  acc_t fraction[kScatterSamples<R>][R];
  acc_t dot[kScatterSamples<R>][1 << R];  // of each corner's features with the column's gradient
};

// Works on the channels of one sample, V of each lane at once: adds to the input's gradient, and to
// this lane's share of the dots, if they are wanted.
template <int V, typename Ctx, int R, typename scalar_t, typename acc_t, typename Sum>
MMDCN_BLOCK void scatter_sample(const Ctx& ctx, const ConvProblem<R>& problem,
                                const Sample<acc_t, R>& sample, int lane, int lanes,
                                const scalar_t* grad_columns, const scalar_t* input,
                                const Sum& grad_input, bool dots_wanted, acc_t (&dot)[1 << R]) {
  for (int64_t c = lane * V; c < problem.deform_group_channels; c += lanes * V) {
    Vector<scalar_t, V> features[sample.kCorners];
    MMDCN_UNROLL
    for (int q = 0; q < sample.kCorners; ++q) {
      features[q] = {};
      if (dots_wanted && sample.corner[q] >= 0) {
        ctx.load(input + sample.corner[q] + c, features[q]);
      }
    }
    acc_t gradient[V];
    load_as(ctx, grad_columns + sample.column_of(problem, c), gradient);
    MMDCN_UNROLL
    for (int q = 0; q < sample.kCorners; ++q) {
      MMDCN_UNROLL
      for (int j = 0; j < V; ++j) dot[q] += gradient[j] * static_cast<acc_t>(features[q].value[j]);
    }
    if (!grad_input.wanted()) continue;
    MMDCN_UNROLL
    for (int q = 0; q < sample.kCorners; ++q) {
      if (sample.corner[q] < 0) continue;
      acc_t share[V];
      MMDCN_UNROLL
      for (int j = 0; j < V; ++j) share[j] = sample.modulation * sample.weight[q] * gradient[j];
      grad_input.add(ctx, sample.corner[q] + c, share);
    }
  }
}

// Adds to the gradient of the input, `grad_input`, a FloatingSum or a FixedSum, in no fixed order.
// Writes each element of the other two once, unless they are null, summed in a fixed order.
template <int V, typename Ctx, int R, typename scalar_t, typename acc_t, typename Sum>
MMDCN_BLOCK void scatter_block(const Ctx& ctx, const ConvProblem<R>& problem,
                               const PixelRange& range, const scalar_t* grad_columns,
                               const scalar_t* input, const acc_t* offset, const acc_t* mask,
                               const Sum& grad_input, acc_t* grad_offset, acc_t* grad_mask,
                               ScatterStorage<acc_t, R>& storage) {
  constexpr int kCorners = 1 << R, kSamples = kScatterSamples<R>;
  const int64_t samples = samples_of(problem, range);
  const bool dots_wanted = grad_offset || grad_mask;
  const int lanes = lanes_for<Ctx>(divide(problem.deform_group_channels, V));
  for (int64_t first = ctx.block() * kSamples; first < samples; first += ctx.blocks() * kSamples) {
    ctx.sync();  // The previous samples have been written.
    for (int i = ctx.thread(); i < kSamples; i += Ctx::kThreads) {
      Sample<acc_t, R>& sample = storage.sample[i];
      sample.exists = false;
      if (first + i >= samples) continue;
      locate(problem, SampleIndex<R>(problem, range, first + i), offset, mask, sample,
             storage.fraction[i]);
    }
    ctx.sync();

    // All lanes of a sample go through this loop together, as they add up their shares.
    for (int i = ctx.thread() / lanes; i < kSamples; i += Ctx::kThreads / lanes) {
      const int lane = ctx.thread() % lanes;
      acc_t dot[kCorners] = {};
      if (storage.sample[i].exists) {
        scatter_sample<V>(ctx, problem, storage.sample[i], lane, lanes, grad_columns, input,
                          grad_input, dots_wanted, dot);
      }
      if (!dots_wanted) continue;
      MMDCN_UNROLL
      for (int q = 0; q < kCorners; ++q) {
        dot[q] = ctx.sum_lanes(dot[q], lanes);
        if (lane == 0) storage.dot[i][q] = dot[q];
      }
    }
    if (!dots_wanted) continue;
    ctx.sync();

    for (int i = ctx.thread(); i < kSamples; i += Ctx::kThreads) {
      const Sample<acc_t, R>& sample = storage.sample[i];
      if (!sample.exists) continue;
      const SampleIndex<R> index(problem, range, first + i);
      acc_t along[R] = {}, value = 0;
      MMDCN_UNROLL
      for (int q = 0; q < kCorners; ++q) {
        if (sample.corner[q] < 0) continue;
        value += sample.weight[q] * storage.dot[i][q];
        MMDCN_UNROLL
        for (int d = 0; d < R; ++d) {
          along[d] += slope_of_corner(storage.fraction[i], d, q) * storage.dot[i][q];
        }
      }
      if (grad_mask) ctx.store(grad_mask + index.mask_index(problem), value);
      if (!grad_offset) continue;
      MMDCN_UNROLL
      for (int d = 0; d < R; ++d) {
        ctx.store(grad_offset + index.offset_index(problem) + d * problem.pixels,
                  sample.modulation * along[d]);
      }
    }
  }
}

}  // namespace mmdcn::cuda
