// Forward pass of deformable convolution: an implicit matrix product, weight times columns.
#pragma once

#include "columns.h"

namespace mmdcn::cuda {

template <typename acc_t>
struct ForwardStorage {
  Pixel pixels[kTile];
  Tile<acc_t, kDepth> weight;   // [column][output channel]
  Tile<acc_t, kDepth> columns;  // [column][pixel]
};

// Each block computes tiles of kTile output channels of one group by kTile pixels.
template <typename Ctx, typename scalar_t, typename acc_t>
MMDCN_BLOCK void deform_conv2d_forward_block(const Ctx& ctx, const DeformConv2dProblem& problem,
                                             const scalar_t* input, const acc_t* offset,
                                             const acc_t* mask, const scalar_t* weight,
                                             const scalar_t* bias, scalar_t* output,
                                             ForwardStorage<acc_t>& storage) {
  const int64_t channel_tiles = divide_up(problem.group_out_channels, kTile);
  const int64_t tiles = divide_up(problem.all_pixels, kTile) * problem.shape.groups * channel_tiles;
  for (int64_t tile = ctx.block(); tile < tiles; tile += ctx.blocks()) {
    // Blocks that run side by side sample at the same pixels.
    const int64_t pixel_tile_and_group = divide(tile, channel_tiles);
    const int64_t pixel_tile = divide(pixel_tile_and_group, problem.shape.groups);
    const int64_t group = pixel_tile_and_group - pixel_tile * problem.shape.groups;
    const int64_t first_out = (tile - pixel_tile_and_group * channel_tiles) * kTile;
    const int64_t end_out = smaller(first_out + kTile, problem.group_out_channels);
    const int64_t group_out = group * problem.group_out_channels;

    ctx.sync();  // The previous tile has been stored.
    find_pixels(ctx, problem, pixel_tile * kTile, problem.all_pixels, storage.pixels);
    ctx.sync();

    ColumnGather<Ctx, scalar_t, acc_t, kDepth, kTile> columns;
    columns.new_pixels();
    Product<Ctx, acc_t> product;
    product.clear();
    for (int64_t first = 0; first < problem.columns; first += kDepth) {
      const int depth = static_cast<int>(smaller(kDepth, problem.columns - first));
      columns.template gather<Tile<acc_t, kDepth>::kStride, 1>(
          ctx, problem, input, offset, mask, storage.pixels, group, first, storage.columns.line[0]);
      for (int i = ctx.thread(); i < kDepth * kTile; i += Ctx::kThreads) {
        const int column = i % kDepth, out = i / kDepth;
        const bool exists = column < depth && first_out + out < end_out;
        const int64_t row = group_out + first_out + out;
        storage.weight.line[column][out] =
            exists ? static_cast<acc_t>(weight[row * problem.columns + first + column]) : acc_t(0);
      }
      ctx.sync();
      product.add(ctx, storage.weight, storage.columns, depth);
      ctx.sync();
    }

    product.for_each(ctx, [&](int out, int pixel, acc_t value) {
      const Pixel& where = storage.pixels[pixel];
      if (!where.exists() || first_out + out >= end_out) return;
      const int64_t channel = group_out + first_out + out;
      if (bias) value += static_cast<acc_t>(bias[channel]);
      ctx.store(&output[problem.output.index(where.batch, channel, where.position(problem))],
                static_cast<scalar_t>(value));
    });
  }
}

}  // namespace mmdcn::cuda
