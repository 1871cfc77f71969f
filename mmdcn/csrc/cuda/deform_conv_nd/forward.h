// Forward pass of deformable convolution over R dimensions: weight times sampled columns.
#pragma once

#include "../tile.h"
#include "samples.h"

namespace mmdcn::cuda {

template <typename acc_t, int R>
struct ConvNdForwardStorage {
  NdPixel pixels[kTile];
  NdSample<acc_t, R> samples[kTile];
  Tile<acc_t, kDepth> weight;   // [channel][output channel]
  Tile<acc_t, kDepth> columns;  // [channel][pixel]
};

// Each block computes tiles of kTile output channels of one group by kTile pixels.
template <typename Ctx, int R, typename scalar_t, typename acc_t>
MMDCN_BLOCK void conv_nd_forward_block(const Ctx& ctx, const ConvNdProblem<R>& problem,
                                       const scalar_t* input, const acc_t* offset,
                                       const acc_t* mask, const scalar_t* weight,
                                       const scalar_t* bias, scalar_t* output,
                                       ConvNdForwardStorage<acc_t, R>& storage) {
  const DeformConvNdShape<R>& shape = problem.shape;
  const int64_t outs = shape.group_out_channels(), channels = shape.group_channels();
  const int64_t out_tiles = divide_up(outs, kTile);
  const int64_t tiles = divide_up(all_pixels(problem), kTile) * shape.groups * out_tiles;
  for (int64_t tile = ctx.block(); tile < tiles; tile += ctx.blocks()) {
    const int64_t pixel_tile_and_group = divide(tile, out_tiles);
    const int64_t pixel_tile = divide(pixel_tile_and_group, shape.groups);
    const int64_t group = pixel_tile_and_group - pixel_tile * shape.groups;
    const int64_t first_out = group * outs + (tile - pixel_tile_and_group * out_tiles) * kTile;
    const int64_t end_out = smaller(first_out + kTile, (group + 1) * outs);

    ctx.sync();  // The previous tile has been stored.
    find_pixels(ctx, problem, pixel_tile * kTile, storage.pixels);
    Product<Ctx, acc_t> product;
    product.clear();
    for (int64_t tap = 0; tap < shape.taps(); ++tap) {
      for (int64_t segment = group * channels; segment < (group + 1) * channels;
           segment += problem.segment) {
        const int64_t deform_group = divide(segment, shape.deform_group_channels());
        ctx.sync();  // The pixels are there; the previous samples have been read.
        find_samples(ctx, problem, storage.pixels, deform_group * shape.taps() + tap, offset, mask,
                     storage.samples);
        ctx.sync();
        for (int64_t first = segment; first < segment + problem.segment; first += kDepth) {
          const int depth = static_cast<int>(smaller(kDepth, segment + problem.segment - first));
          for (int i = ctx.thread(); i < depth * kTile; i += Ctx::kThreads) {
            const int line = i / kTile, place = i % kTile;
            const NdPixel& pixel = storage.pixels[place];
            storage.columns.line[line][place] =
                pixel.exists()
                    ? storage.samples[place].of(channel_of(problem, input, pixel, first + line))
                    : acc_t(0);
            const int64_t out = first_out + place;
            storage.weight.line[line][place] =
                out < end_out
                    ? static_cast<acc_t>(weight[weight_index(problem, out, first + line, tap)])
                    : acc_t(0);
          }
          ctx.sync();
          product.add(ctx, storage.weight, storage.columns, depth);
          ctx.sync();
        }
      }
    }
    product.for_each(ctx, [&](int out, int place, acc_t value) {
      const NdPixel& pixel = storage.pixels[place];
      const int64_t channel = first_out + out;
      if (!pixel.exists() || channel >= end_out) return;
      if (bias) value += static_cast<acc_t>(bias[channel]);
      ctx.store(&output[output_index(problem, pixel, channel)], static_cast<scalar_t>(value));
    });
  }
}

}  // namespace mmdcn::cuda
