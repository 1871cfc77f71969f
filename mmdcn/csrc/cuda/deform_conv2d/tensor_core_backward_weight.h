// Backward pass of deformable convolution to the weight on tensor cores: output gradient times
// columns, sampled again while the ones before are multiplied, summed over the pixels. The sum is
// split over blocks; deform_conv2d_sum_splits() adds the parts.
#pragma once

#include "backward_weight.h"
#include "tensor_core_columns.h"

namespace mmdcn::cuda {

// What a block computes: output channels by input channels of one tap.
constexpr int kWeightOut = 128;
constexpr int kWeightChannels = 128;
// Pixels whose sampling points are kept in shared memory at a time.
constexpr int kTablePixels = 256;

template <typename T>
struct TensorBackwardWeightStorage {
  Operand<T, kWeightOut, Lines::kAcrossSum> grad_output[2];
  Operand<T, kWeightChannels, Lines::kAcrossSum> columns[2];
  PointTable<1, kTablePixels> points;
};

// Tiles of input channels: of each run of channels, as many as it takes.
MMDCN_BLOCK int64_t weight_channel_tiles(const DeformConv2dProblem& problem) {
  const int64_t channels = run_channels(problem);
  return divide(problem.shape.channels, channels) * divide_up(channels, kWeightChannels);
}

// Each block computes tiles of kWeightOut output channels by kWeightChannels channels of one tap,
// for one part of the pixels, into workspace[split][output channel][column], or adds them to it.
template <typename Ctx, typename T>
MMDCN_BLOCK void tensor_backward_weight_block(const Ctx& ctx, const DeformConv2dProblem& problem,
                                              const T* grad_output, const T* input,
                                              const float* offset, const float* mask,
                                              int64_t splits, bool accumulate, float* workspace,
                                              TensorBackwardWeightStorage<T>& storage) {
  constexpr int kVectors = kWeightChannels / kWide<T>;  // in a line of columns
  constexpr int kOutVectors = kWeightOut / kWide<T>;    // in a line of output gradients
  using Items = PartItems<Ctx, kStep<T> * kVectors>;
  const int channels = run_channels(problem);
  const int run_tiles = (channels + kWeightChannels - 1) / kWeightChannels;
  const int group_outs = static_cast<int>(problem.group_out_channels);
  const int out_tiles = (group_outs + kWeightOut - 1) / kWeightOut;
  const int64_t length = pixels_per_split(problem, splits);
  const int64_t tiles = splits * weight_channel_tiles(problem) * problem.taps * out_tiles;
  for (int64_t tile = ctx.block(); tile < tiles; tile += ctx.blocks()) {
    // Blocks that run side by side sample at the same pixels.
    int64_t rest = divide(tile, out_tiles);
    const int first_in_group = static_cast<int>(tile - rest * out_tiles) * kWeightOut;
    const int64_t channel_tile_and_split = divide(rest, problem.taps);
    const auto tap = static_cast<int>(rest - channel_tile_and_split * problem.taps);
    const int64_t run_and_split = divide(channel_tile_and_split, run_tiles);
    const int first_in_run =
        static_cast<int>(channel_tile_and_split - run_and_split * run_tiles) * kWeightChannels;
    const int runs = static_cast<int>(problem.shape.channels) / channels;
    const auto split = static_cast<int>(divide(run_and_split, runs));
    const int first_channel =
        static_cast<int>(run_and_split - split * runs) * channels + first_in_run;
    const int tile_channels = static_cast<int>(smaller(kWeightChannels, channels - first_in_run));
    const int group = first_channel / static_cast<int>(problem.group_channels);
    const int offset_group = first_channel / static_cast<int>(problem.deform_group_channels);
    const int first_out = group * group_outs + first_in_group;
    const int outs = static_cast<int>(smaller(kWeightOut, group_outs - first_in_group));
    const auto first_pixel = static_cast<int>(smaller(split * length, problem.all_pixels));
    const auto pixels = static_cast<int>(smaller(length, problem.all_pixels - first_pixel));
    const T* const tile_gradient =
        grad_output + first_pixel * problem.shape.out_channels + first_out;

    typename Ctx::template TensorProduct<kWeightOut, kWeightChannels> product;
    product.clear();
    int buffer = 1;
    // A round multiplies one step while the next one, which begins with pixel `coming`, is copied
    // and sampled; the first round has nothing to multiply yet.
    MMDCN_NO_UNROLL
    for (int coming = 0; coming < pixels + kStep<T>; coming += kStep<T>) {
      ctx.template wait<0>();
      // Both operands of this step are there, and nobody reads those of the step, or the tile,
      // before.
      ctx.sync();
      const bool more = coming < pixels;
      if (more) {
        // Not unrolled, for the sake of registers.
        MMDCN_NO_UNROLL
        for (int i = 0; i < kPerThread<Ctx, kStep<T> * kOutVectors>; ++i) {
          const int item = ctx.thread() + i * Ctx::kThreads;
          const int line = item / kOutVectors, v = item % kOutVectors;
          const int pixel = coming + line;
          const bool exists = pixel < pixels && v * kWide<T> < outs;
          ctx.copy_async(
              storage.grad_output[buffer ^ 1].vector(line, v),
              tile_gradient + (exists ? pixel * problem.shape.out_channels + v * kWide<T> : 0),
              exists);
        }
        ctx.commit();
      }
      if (more && coming % kTablePixels == 0) {
        MMDCN_NO_UNROLL
        for (int i = ctx.thread(); i < kTablePixels; i += Ctx::kThreads) {
          const Pixel pixel =
              coming + i < pixels ? find_pixel(problem, first_pixel + coming + i) : Pixel{-1, 0, 0};
          storage.points.set(problem, offset, mask, pixel, offset_group, tap, 0, i);
        }
        ctx.sync();
      }
      // Not unrolled, for the sake of registers.
      MMDCN_NO_UNROLL
      for (int part = 0; part < kParts; ++part) {
        Sample<T> samples[Items::kPerPart];
        if (more) {
          MMDCN_UNROLL
          for (int i = 0; i < Items::kPerPart; ++i) {
            if (!Items::exists(part, i)) continue;
            const int item = Items::item(ctx, part, i);
            const int v = item % kVectors, at = coming % kTablePixels + item / kVectors;
            // Channels beyond the tile's end are those of another run, or none.
            const bool exists = v * kWide<T> < tile_channels;
            samples[i].load(ctx, problem, exists ? storage.points.weight[0][at] : CornerWeights{},
                            input, storage.points.low[0][at] + first_channel + v * kWide<T>);
          }
        }
        if (coming > 0) {
          product.add(ctx, storage.grad_output[buffer], storage.columns[buffer], part);
        }
        if (more) {
          MMDCN_UNROLL
          for (int i = 0; i < Items::kPerPart; ++i) {
            if (!Items::exists(part, i)) continue;
            const int item = Items::item(ctx, part, i);
            const int line = item / kVectors;
            samples[i].blend(ctx, storage.points.weight[0][coming % kTablePixels + line],
                             storage.columns[buffer ^ 1].vector(line, item % kVectors));
          }
        }
      }
      buffer ^= 1;
    }

    const int64_t row = split * problem.shape.out_channels + first_out;
    const int64_t column = static_cast<int64_t>(tap) * problem.group_channels + first_channel -
                           group * problem.group_channels;
    product.for_each(ctx, [&](int out, int channel, const float (&pair)[2]) {
      if (out >= outs || channel >= tile_channels) return;
      float* const to = workspace + (row + out) * problem.columns + column + channel;
      if (accumulate) {
        for (int i = 0; i < 2; ++i) to[i] += pair[i];
        return;
      }
      Vector<float, 2> packed;
      ctx.template pack<float>(pair, packed);
      ctx.store(to, packed);
    });
  }
}

}  // namespace mmdcn::cuda
