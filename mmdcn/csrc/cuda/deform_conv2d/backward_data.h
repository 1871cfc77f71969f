// Backward pass of deformable convolution to input, offset and mask: the gradient of a tile of
// columns, transposed weight times output gradient, goes back through the sampling at once.
#pragma once

#include "fixed_point.h"

namespace mmdcn::cuda {

// Gradients of one sampling point, summed over the channels that share it.
template <typename acc_t>
struct PointGradient {
  acc_t y, x, mask;
};

template <typename acc_t>
struct BackwardDataStorage {
  struct Operands {
    Tile<acc_t, kDepth> weight;       // [output channel][input channel]
    Tile<acc_t, kDepth> grad_output;  // [output channel][pixel]
  };

  Pixel pixels[kTile];
  union {
    Operands operands;
    Tile<acc_t, kTile> grad_columns;  // [input channel][pixel]
    PointGradient<acc_t> partial[kItems];
  };
};

// Each block computes all gradients of some sampling points: those of kTile pixels, one tap, and
// one offset group, or several small ones that fill a tile of channels together. So every element
// of grad_offset and grad_mask comes from one block, in a fixed order. `grad_input` is a
// FloatingSum or a FixedSum.
template <typename Ctx, typename scalar_t, typename acc_t, typename Sum>
MMDCN_BLOCK void deform_conv2d_backward_data_block(
    const Ctx& ctx, const DeformConv2dProblem& problem, const scalar_t* grad_output,
    const scalar_t* input, const acc_t* offset, const acc_t* mask, const scalar_t* weight,
    const Sum& grad_input, acc_t* grad_offset, acc_t* grad_mask,
    BackwardDataStorage<acc_t>& storage) {
  using Items = PixelItems<Ctx, kTile>;
  const int64_t channels = problem.group_channels;
  const int64_t point_channels = problem.deform_group_channels;
  // With one offset group in a block, the parts of a pixel share its channels and add up at the
  // end; with several, each part has whole offset groups to itself.
  const bool shared_point = point_channels >= kTile;
  const int64_t range =
      shared_point ? point_channels : divide(kTile, point_channels) * point_channels;
  const int64_t ranges = divide_up(problem.shape.channels, range);
  const bool through_points = grad_offset || grad_mask;

  const auto write = [&](const Pixel& pixel, int64_t tap, int64_t group,
                         const PointGradient<acc_t>& gradient) {
    const int64_t at = offset_index(problem, pixel, group, tap);
    if (grad_offset) {
      ctx.store(&grad_offset[at], gradient.y);
      ctx.store(&grad_offset[at + problem.pixels], gradient.x);
    }
    if (grad_mask) {
      ctx.store(&grad_mask[mask_index(problem, pixel, group, tap)], gradient.mask);
    }
  };

  const int64_t units = divide_up(problem.all_pixels, kTile) * problem.taps * ranges;
  for (int64_t unit = ctx.block(); unit < units; unit += ctx.blocks()) {
    const int64_t pixel_tile_and_tap = divide(unit, ranges);
    const int64_t pixel_tile = divide(pixel_tile_and_tap, problem.taps);
    const int64_t tap = pixel_tile_and_tap - pixel_tile * problem.taps;
    const int64_t first_channel = (unit - pixel_tile_and_tap * ranges) * range;
    const int64_t end_channel = smaller(first_channel + range, problem.shape.channels);

    ctx.sync();  // The previous unit has left the storage.
    find_pixels(ctx, problem, pixel_tile * kTile, problem.all_pixels, storage.pixels);
    ctx.sync();

    SamplingPoint<acc_t> points[Items::kPerThread];
    PointGradient<acc_t> gradients[Items::kPerThread];
    for (int i = 0; i < Items::kPerThread; ++i) {
      points[i].reset();
      gradients[i] = {0, 0, 0};
    }

    // Tiles of channels that lie in one group of the convolution.
    for (int64_t first = first_channel, end; first < end_channel; first = end) {
      const int64_t group = divide(first, channels);
      end = smaller(smaller(first + kTile, end_channel), (group + 1) * channels);

      // grad_columns = transposed weight * grad_output.
      Product<Ctx, acc_t> product;
      product.clear();
      for (int64_t first_out = 0; first_out < problem.group_out_channels; first_out += kDepth) {
        const int depth = static_cast<int>(smaller(kDepth, problem.group_out_channels - first_out));
        const int64_t group_out = group * problem.group_out_channels + first_out;
        for (int i = ctx.thread(); i < kDepth * kTile; i += Ctx::kThreads) {
          const int out = i / kTile, channel = i % kTile;
          const bool exists = out < depth && first + channel < end;
          const int64_t column = tap * channels + (first - group * channels) + channel;
          storage.operands.weight.line[out][channel] =
              exists ? static_cast<acc_t>(weight[(group_out + out) * problem.columns + column])
                     : acc_t(0);
        }
        load_grad_output<kDepth, Tile<acc_t, kDepth>::kStride, 1>(
            ctx, problem, grad_output, storage.pixels, group_out, group_out + depth,
            storage.operands.grad_output.line[0]);
        ctx.sync();
        product.add(ctx, storage.operands.weight, storage.operands.grad_output, depth);
        ctx.sync();
      }
      product.for_each(ctx, [&](int channel, int pixel, acc_t value) {
        storage.grad_columns.line[channel][pixel] = value;
      });
      ctx.sync();

      // Back through the sampling.
      MMDCN_UNROLL
      for (int i = 0; i < Items::kPerThread; ++i) {
        const Items item = Items::item(ctx, i, problem.input);
        const Pixel& pixel = storage.pixels[item.pixel];
        if (!pixel.exists()) continue;
        SamplingPoint<acc_t>& point = points[i];
        PointGradient<acc_t>& gradient = gradients[i];

        int64_t offset_group = divide(first, point_channels);
        if (!shared_point) {
          // The first offset group from here on that belongs to this part.
          offset_group +=
              (item.part - offset_group % Items::kParts + Items::kParts) % Items::kParts;
        }
        for (; offset_group * point_channels < end;
             offset_group += shared_point ? 1 : Items::kParts) {
          const int64_t group_end = (offset_group + 1) * point_channels;
          const int64_t last = smaller(end, group_end);
          int64_t channel = offset_group * point_channels;
          if (channel < first) channel = first;
          if (shared_point) channel += item.part;
          for (; channel < last; channel += shared_point ? Items::kParts : 1) {
            point.move_to(problem, offset, mask, pixel, tap, channel);
            if (!point.inside) continue;
            const acc_t grad_column = storage.grad_columns.line[channel - first][item.pixel];
            const acc_t grad_sample = grad_column * point.modulation;
            const int64_t start = problem.input.index(pixel.batch, channel, 0);
            acc_t sample = 0, slope_y = 0, slope_x = 0;
            MMDCN_UNROLL
            for (int q = 0; q < point.corners.kCount; ++q) {
              const int64_t position = point.corners.position[q];
              if (position < 0) continue;
              if (through_points) {
                const acc_t x_of_q = static_cast<acc_t>(input[start + position]);
                sample += point.corners.weight[q] * x_of_q;
                slope_y += point.corners.weight_gradient[0][q] * x_of_q;
                slope_x += point.corners.weight_gradient[1][q] * x_of_q;
              }
              if (grad_input.wanted()) {
                grad_input.add(ctx, start + position, point.corners.weight[q] * grad_sample);
              }
            }
            gradient.y += grad_sample * slope_y;
            gradient.x += grad_sample * slope_x;
            gradient.mask += grad_column * sample;
          }
          // An offset group may go on in the next group of the convolution.
          if (!shared_point && end >= group_end) {
            write(pixel, tap, offset_group, gradient);
            gradient = {0, 0, 0};
          }
        }
      }
      ctx.sync();
    }

    if (shared_point && through_points) {
      MMDCN_UNROLL
      for (int i = 0; i < Items::kPerThread; ++i) {
        const Items item = Items::item(ctx, i, problem.input);
        storage.partial[item.part * kTile + item.pixel] = gradients[i];
      }
      ctx.sync();
      for (int i = ctx.thread(); i < kTile; i += Ctx::kThreads) {
        if (!storage.pixels[i].exists()) continue;
        PointGradient<acc_t> sum = storage.partial[i];
        for (int part = 1; part < Items::kParts; ++part) {
          const PointGradient<acc_t>& other = storage.partial[part * kTile + i];
          sum = {sum.y + other.y, sum.x + other.x, sum.mask + other.mask};
        }
        write(storage.pixels[i], tap, divide(first_channel, point_channels), sum);
      }
    }
  }
}

}  // namespace mmdcn::cuda
