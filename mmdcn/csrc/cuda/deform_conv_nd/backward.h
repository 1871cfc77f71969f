// Backward passes of deformable convolution over R dimensions.
#pragma once

#include "../tile.h"
#include "samples.h"

namespace mmdcn::cuda {

constexpr int kNdPixels = 16;    // that a block works on together in the backward pass to the data
constexpr int kNdChannels = 16;  // and channels of each of these

template <typename acc_t, int R>
struct ConvNdBackwardStorage {
  NdPixel pixels[kNdPixels];
  Corners<acc_t, R> corners[kNdPixels];
  acc_t modulation[kNdPixels];
  bool inside[kNdPixels];
  acc_t grad_output[kDepth][kNdPixels];
  acc_t weight[kDepth][kNdChannels];
  acc_t partial[kNdPixels][kNdChannels][R + 1];  // of the coordinates, then of the modulation
};

// Each block computes all gradients of samples of kNdPixels pixels for one tap and offset group.
template <typename Ctx, int R, typename scalar_t, typename acc_t>
MMDCN_BLOCK void conv_nd_backward_data_block(const Ctx& ctx, const ConvNdProblem<R>& problem,
                                             const scalar_t* grad_output, const scalar_t* input,
                                             const acc_t* offset, const acc_t* mask,
                                             const scalar_t* weight, acc_t* grad_input,
                                             acc_t* grad_offset, acc_t* grad_mask,
                                             ConvNdBackwardStorage<acc_t, R>& storage) {
  constexpr int kItems = kNdPixels * kNdChannels;
  constexpr int kPerThread = kItems / Ctx::kThreads;
  static_assert(kPerThread * Ctx::kThreads == kItems, "uneven");
  const DeformConvNdShape<R>& shape = problem.shape;
  const int64_t outs = shape.group_out_channels(), samples = shape.samples();
  const int64_t units = divide_up(all_pixels(problem), kNdPixels) * samples;
  for (int64_t unit = ctx.block(); unit < units; unit += ctx.blocks()) {
    const int64_t pixel_tile = divide(unit, samples), sample = unit - pixel_tile * samples;
    const int64_t deform_group = divide(sample, shape.taps());
    const int64_t tap = sample - deform_group * shape.taps();
    const int64_t first_channel = deform_group * shape.deform_group_channels();

    ctx.sync();  // The previous unit has been stored.
    find_pixels(ctx, problem, pixel_tile * kNdPixels, storage.pixels);
    ctx.sync();
    for (int i = ctx.thread(); i < kNdPixels; i += Ctx::kThreads) {
      const NdPixel& pixel = storage.pixels[i];
      storage.inside[i] = locate(problem, pixel, sample, offset, storage.corners[i]);
      storage.modulation[i] =
          storage.inside[i] && mask ? mask[sample_index(problem, pixel, sample)] : acc_t(1);
    }

    acc_t gradient[kPerThread][R + 1] = {};
    for (int64_t segment = first_channel; segment < first_channel + shape.deform_group_channels();
         segment += problem.segment) {
      const int64_t first_out = divide(segment, shape.group_channels()) * outs;
      for (int64_t first = segment; first < segment + problem.segment; first += kNdChannels) {
        const int64_t end = smaller(first + kNdChannels, segment + problem.segment);
        // The gradient of each sample: weight times output gradient.
        acc_t column[kPerThread] = {};
        for (int64_t out = 0; out < outs; out += kDepth) {
          const int depth = static_cast<int>(smaller(kDepth, outs - out));
          ctx.sync();  // The samples are there; the previous output channels have been read.
          for (int i = ctx.thread(); i < depth * kNdPixels; i += Ctx::kThreads) {
            const int line = i / kNdPixels, place = i % kNdPixels;
            const NdPixel& pixel = storage.pixels[place];
            const int64_t channel = first_out + out + line;
            storage.grad_output[line][place] =
                pixel.exists()
                    ? static_cast<acc_t>(grad_output[output_index(problem, pixel, channel)])
                    : acc_t(0);
          }
          for (int i = ctx.thread(); i < depth * kNdChannels; i += Ctx::kThreads) {
            const int line = i / kNdChannels, c = i % kNdChannels;
            storage.weight[line][c] =
                first + c < end
                    ? static_cast<acc_t>(
                          weight[weight_index(problem, first_out + out + line, first + c, tap)])
                    : acc_t(0);
          }
          ctx.sync();
          MMDCN_UNROLL
          for (int i = 0; i < kPerThread; ++i) {
            const int item = ctx.thread() + i * Ctx::kThreads;
            for (int line = 0; line < depth; ++line) {
              column[i] += storage.weight[line][item / kNdPixels] *
                           storage.grad_output[line][item % kNdPixels];
            }
          }
        }
        MMDCN_UNROLL
        for (int i = 0; i < kPerThread; ++i) {
          const int item = ctx.thread() + i * Ctx::kThreads;
          const int place = item % kNdPixels;
          const int64_t channel = first + item / kNdPixels;
          if (channel >= end || !storage.inside[place]) continue;
          const scalar_t* source = channel_of(problem, input, storage.pixels[place], channel);
          const Corners<acc_t, R>& corners = storage.corners[place];
          MMDCN_UNROLL
          for (int q = 0; q < corners.kCount; ++q) {
            const int64_t position = corners.position[q];
            if (position < 0) continue;
            if (grad_offset || grad_mask) {
              const acc_t product = column[i] * static_cast<acc_t>(source[position]);
              MMDCN_UNROLL
              for (int d = 0; d < R; ++d) {
                gradient[i][d] += corners.weight_gradient[d][q] * product;
              }
              gradient[i][R] += corners.weight[q] * product;
            }
            if (grad_input) {
              ctx.atomic_add(&grad_input[source - input + position],
                             storage.modulation[place] * corners.weight[q] * column[i]);
            }
          }
        }
      }
    }
    if (!grad_offset && !grad_mask) continue;

    MMDCN_UNROLL
    for (int i = 0; i < kPerThread; ++i) {
      const int item = ctx.thread() + i * Ctx::kThreads;
      MMDCN_UNROLL
      for (int d = 0; d <= R; ++d) {
        storage.partial[item % kNdPixels][item / kNdPixels][d] = gradient[i][d];
      }
    }
    ctx.sync();
    for (int i = ctx.thread(); i < kNdPixels * (R + 1); i += Ctx::kThreads) {
      const int place = i / (R + 1), d = i % (R + 1);
      const NdPixel& pixel = storage.pixels[place];
      if (!pixel.exists()) continue;
      acc_t sum = 0;
      for (int c = 0; c < kNdChannels; ++c) sum += storage.partial[place][c][d];
      const int64_t at = sample_index(problem, pixel, sample);
      if (d == R) {
        if (grad_mask) ctx.store(&grad_mask[at], sum);
      } else if (grad_offset) {
        const int64_t first = at - pixel.position;  // of the sample's image
        const acc_t modulation = storage.inside[place] ? storage.modulation[place] : acc_t(0);
        ctx.store(&grad_offset[first * R + d * shape.pixels() + pixel.position], modulation * sum);
      }
    }
  }
}

template <typename acc_t, int R>
struct ConvNdWeightStorage {
  NdPixel pixels[kDepth];
  NdSample<acc_t, R> samples[kDepth];
  Tile<acc_t, kDepth> grad_output;  // [pixel][output channel]
  Tile<acc_t, kDepth> columns;      // [pixel][channel]
};

// Each block computes tiles of kTile output channels by kTile channels of a segment, for one tap,
// and sums over all pixels in their order.
template <typename Ctx, int R, typename scalar_t, typename acc_t>
MMDCN_BLOCK void conv_nd_backward_weight_block(const Ctx& ctx, const ConvNdProblem<R>& problem,
                                               const scalar_t* grad_output, const scalar_t* input,
                                               const acc_t* offset, const acc_t* mask,
                                               scalar_t* grad_weight,
                                               ConvNdWeightStorage<acc_t, R>& storage) {
  const DeformConvNdShape<R>& shape = problem.shape;
  const int64_t outs = shape.group_out_channels(), out_tiles = divide_up(outs, kTile);
  const int64_t channel_tiles = divide_up(problem.segment, kTile);
  const int64_t segments = divide(shape.channels, problem.segment);
  const int64_t tiles = shape.taps() * segments * channel_tiles * out_tiles;
  for (int64_t tile = ctx.block(); tile < tiles; tile += ctx.blocks()) {
    const int64_t rest = divide(tile, out_tiles);
    const int64_t out_tile = tile - rest * out_tiles;
    const int64_t rest_of_channels = divide(rest, channel_tiles);
    const int64_t channel_tile = rest - rest_of_channels * channel_tiles;
    const int64_t tap = divide(rest_of_channels, segments);
    const int64_t segment = (rest_of_channels - tap * segments) * problem.segment;
    const int64_t first = segment + channel_tile * kTile;
    const int64_t end = smaller(first + kTile, segment + problem.segment);
    const int64_t group_out = divide(segment, shape.group_channels()) * outs;
    const int64_t first_out = group_out + out_tile * kTile;
    const int64_t end_out = smaller(first_out + kTile, group_out + outs);
    const int64_t sample = divide(segment, shape.deform_group_channels()) * shape.taps() + tap;

    Product<Ctx, acc_t> product;
    product.clear();
    for (int64_t pixel = 0; pixel < all_pixels(problem); pixel += kDepth) {
      const int depth = static_cast<int>(smaller(kDepth, all_pixels(problem) - pixel));
      ctx.sync();  // The previous pixels have been worked through.
      find_pixels(ctx, problem, pixel, storage.pixels);
      ctx.sync();
      find_samples(ctx, problem, storage.pixels, sample, offset, mask, storage.samples);
      ctx.sync();
      for (int i = ctx.thread(); i < depth * kTile; i += Ctx::kThreads) {
        const int line = i % depth, place = i / depth;
        const NdPixel& where = storage.pixels[line];
        const int64_t channel = first + place, out = first_out + place;
        storage.columns.line[line][place] =
            channel < end ? storage.samples[line].of(channel_of(problem, input, where, channel))
                          : acc_t(0);
        storage.grad_output.line[line][place] =
            out < end_out ? static_cast<acc_t>(grad_output[output_index(problem, where, out)])
                          : acc_t(0);
      }
      ctx.sync();
      product.add(ctx, storage.grad_output, storage.columns, depth);
    }
    product.for_each(ctx, [&](int out, int c, acc_t value) {
      if (first_out + out >= end_out || first + c >= end) return;
      ctx.store(&grad_weight[weight_index(problem, first_out + out, first + c, tap)],
                static_cast<scalar_t>(value));
    });
  }
}

}  // namespace mmdcn::cuda
