// The columns of a deformable convolution: its samples, as the matrix that the weight multiplies.
#pragma once

#include "samples.h"

namespace mmdcn::cuda {

constexpr int kLeastGatherSamples = kPixels, kMostGatherSamples = 8 * kPixels;

// How many samples a block is to locate together, if each has so many vectors of channels: so many
// that a thread of 256 works on about 16 vectors, as blocks that take longer leave much of a GPU
// without work at the end, and shorter ones spend more of their time on locating.
MMDCN_HOST_DEVICE int gather_samples(int64_t vectors) {
  constexpr int kVectors = 16 * 256;
  int samples = kMostGatherSamples;
  while (samples > kLeastGatherSamples && samples * vectors > kVectors) samples /= 2;
  return samples;
}

// columns = the samples of some pixels, modulated, each element written once. V channels are loaded
// at once, from each corner. `shared` is memory of the block for `count` samples, which a block
// locates together: a multiple of kPixels.
template <int V, typename Ctx, int R, typename scalar_t, typename acc_t, typename column_t>
MMDCN_BLOCK void gather_block(const Ctx& ctx, const ConvProblem<R>& problem,
                              const PixelRange& range, const scalar_t* input, const acc_t* offset,
                              const acc_t* mask, column_t* columns, ColumnSample<acc_t, R>* shared,
                              int count) {
  const int64_t samples = samples_of(problem, range);
  const int64_t channels = problem.deform_group_channels;
  const int log2_lanes = log2_lanes_for<Ctx>(divide(channels, V));
  const int lanes = 1 << log2_lanes;
  for (int64_t first = ctx.block() * count; first < samples; first += ctx.blocks() * count) {
    ctx.sync();  // The previous samples have been read.
    for (int i = ctx.thread(); i < count; i += Ctx::kThreads) {
      ColumnSample<acc_t, R>& sample = shared[i];
      sample.exists = false;
      acc_t fraction[R];
      if (first + i >= samples) continue;
      locate(problem, SampleIndex<R>(problem, range, first + i), offset, mask, sample, fraction);
    }
    ctx.sync();

    for (int i = ctx.thread() >> log2_lanes; i < count; i += Ctx::kThreads >> log2_lanes) {
      const ColumnSample<acc_t, R>& sample = shared[i];
      if (!sample.exists) continue;
      for (int c = (ctx.thread() & (lanes - 1)) * V; c < channels; c += lanes * V) {
        acc_t sum[V] = {};
        sample.add_to(ctx, input, c, sum);
        Vector<column_t, V> column;
        MMDCN_UNROLL
        for (int j = 0; j < V; ++j) column.value[j] = static_cast<column_t>(sum[j]);
        ctx.store(columns + sample.column_of(problem, c), column);
      }
    }
  }
}

}  // namespace mmdcn::cuda
