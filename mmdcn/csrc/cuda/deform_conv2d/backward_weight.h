// Backward pass of deformable convolution to the weight: output gradient times columns, sampled
// again, summed over the pixels. The sum is split over blocks, and the parts added by a second
// kernel, so that the result does not depend on the order in which blocks run.
#pragma once

#include "columns.h"

namespace mmdcn::cuda {

template <typename acc_t>
struct BackwardWeightStorage {
  Pixel pixels[kDepth];
  Tile<acc_t, kDepth> grad_output;  // [pixel][output channel]
  Tile<acc_t, kDepth> columns;      // [pixel][column]
};

// Pixels in each part of the sum: whole depths of a tile.
MMDCN_BLOCK int64_t pixels_per_split(const DeformConv2dProblem& problem, int64_t splits) {
  return divide_up(divide_up(problem.all_pixels, kDepth), splits) * kDepth;
}

// Each block computes tiles of kTile output channels by kTile columns of one group, for one part of
// the pixels, into workspace[split][output channel][column], or adds them to what is there.
template <typename Ctx, typename scalar_t, typename acc_t>
MMDCN_BLOCK void deform_conv2d_backward_weight_block(
    const Ctx& ctx, const DeformConv2dProblem& problem, const scalar_t* grad_output,
    const scalar_t* input, const acc_t* offset, const acc_t* mask, int64_t splits, bool accumulate,
    acc_t* workspace, BackwardWeightStorage<acc_t>& storage) {
  constexpr int kStride = Tile<acc_t, kDepth>::kStride;
  const int64_t channel_tiles = divide_up(problem.group_out_channels, kTile);
  const int64_t column_tiles = divide_up(problem.columns, kTile);
  const int64_t length = pixels_per_split(problem, splits);
  const int64_t tiles = splits * problem.shape.groups * column_tiles * channel_tiles;
  for (int64_t tile = ctx.block(); tile < tiles; tile += ctx.blocks()) {
    int64_t rest = divide(tile, channel_tiles);
    const int64_t first_out = (tile - rest * channel_tiles) * kTile;
    const int64_t rest_of_columns = divide(rest, column_tiles);
    const int64_t first_column = (rest - rest_of_columns * column_tiles) * kTile;
    const int64_t split = divide(rest_of_columns, problem.shape.groups);
    const int64_t group = rest_of_columns - split * problem.shape.groups;
    const int64_t group_out = group * problem.group_out_channels;
    const int64_t end_pixel = smaller((split + 1) * length, problem.all_pixels);

    ColumnGather<Ctx, scalar_t, acc_t, kTile, kDepth> columns;
    Product<Ctx, acc_t> product;
    product.clear();
    for (int64_t first = split * length; first < end_pixel; first += kDepth) {
      const int depth = static_cast<int>(smaller(kDepth, end_pixel - first));
      find_pixels(ctx, problem, first, end_pixel, storage.pixels);
      columns.new_pixels();
      ctx.sync();
      columns.template gather<1, kStride>(ctx, problem, input, offset, mask, storage.pixels, group,
                                          first_column, storage.columns.line[0]);
      load_grad_output<kTile, 1, kStride>(
          ctx, problem, grad_output, storage.pixels, group_out + first_out,
          group_out + problem.group_out_channels, storage.grad_output.line[0]);
      ctx.sync();
      product.add(ctx, storage.grad_output, storage.columns, depth);
      // The barrier that follows the next search for pixels keeps the tiles until here.
    }

    product.for_each(ctx, [&](int out, int column, acc_t value) {
      if (first_out + out >= problem.group_out_channels ||
          first_column + column >= problem.columns) {
        return;
      }
      const int64_t row = split * problem.shape.out_channels + group_out + first_out + out;
      acc_t* const to = &workspace[row * problem.columns + first_column + column];
      if (accumulate) {
        *to += value;
      } else {
        ctx.store(to, value);
      }
    });
  }
}

// grad_weight, with channels before taps, = sum of the parts, in the order of the splits.
template <typename Ctx, typename scalar_t, typename acc_t>
MMDCN_BLOCK void deform_conv2d_sum_splits_block(const Ctx& ctx, const DeformConv2dProblem& problem,
                                                int64_t splits, const acc_t* workspace,
                                                scalar_t* grad_weight) {
  const int64_t elements = problem.shape.out_channels * problem.columns;
  const int64_t threads = ctx.blocks() * Ctx::kThreads;
  for (int64_t i = ctx.block() * Ctx::kThreads + ctx.thread(); i < elements; i += threads) {
    acc_t sum = 0;
    for (int64_t split = 0; split < splits; ++split) sum += workspace[split * elements + i];
    const int64_t out = divide(i, problem.columns);
    const int64_t column = i - out * problem.columns;
    const int64_t tap = divide(column, problem.group_channels);
    const int64_t channel = column - tap * problem.group_channels;
    const int64_t row = out * problem.group_channels + channel;
    ctx.store(&grad_weight[row * problem.taps + tap], static_cast<scalar_t>(sum));
  }
}

}  // namespace mmdcn::cuda
