// Backward pass of deformable convolution to input, offset and mask on tensor cores: the gradient
// of a tile of columns, output gradient times weight, goes back through the sampling at once.
#pragma once

#include "fixed_point.h"
#include "tensor_core_columns.h"

namespace mmdcn::cuda {

// What a block of the pass computes at a time: pixels and channels of one tap.
constexpr int kDataPixels = 64;
constexpr int kDataChannels = 128;
// Threads that share a pixel's channels.
constexpr int kDataShares = 8;

template <typename T>
struct TensorBackwardDataStorage {
  static constexpr int kStages = 3;

  struct Operands {
    Operand<T, kDataPixels, Lines::kAlongSum> grad_output[kStages];
    Operand<T, kDataChannels, Lines::kAcrossSum> weight[kStages];
  };
  // The padding spreads what a warp's product writes over the memory banks.
  struct alignas(16) Columns {
    float row[kDataPixels][kDataChannels + 8];
  };
  struct Point {
    CornerWeights weight;            // not modulated; 0 for corners that do not exist
    CornerWeights slope_y, slope_x;  // their derivatives with respect to y and x
    int64_t position[4];             // element of the input, or -1
    float modulation;
  };

  union {
    Operands operands;
    Columns grad_columns;
    CornerWeights partial[kDataShares][kDataPixels];
  };
  Point points[kDataPixels];
  Pixel pixels[kDataPixels];
};

// Each block computes all gradients of some sampling points: those of kDataPixels pixels, one tap
// and one offset group. So every element of grad_offset and grad_mask comes from one block, in a
// fixed order. Everything but the addition to the input's gradient follows from four numbers for
// each point: the sum, over the channels, of the column's gradient times the input at each corner.
// `grad_input` is a FloatingSum or a FixedSum.
template <typename Ctx, typename T, typename Sum>
MMDCN_BLOCK void tensor_backward_data_block(const Ctx& ctx, const DeformConv2dProblem& problem,
                                            const T* grad_output, const T* input,
                                            const float* offset, const float* mask, const T* weight,
                                            const Sum& grad_input, float* grad_offset,
                                            float* grad_mask,
                                            TensorBackwardDataStorage<T>& storage) {
  using Storage = TensorBackwardDataStorage<T>;
  constexpr int kStages = Storage::kStages;
  constexpr int kShares = kDataShares * kDataPixels / Ctx::kThreads;  // of each thread
  constexpr int kQuads = kDataChannels / 4 / kDataShares;             // of each share
  const bool through_points = grad_offset || grad_mask;
  const int group_outs = static_cast<int>(problem.group_out_channels);
  const int group_channels = static_cast<int>(problem.group_channels);
  const int steps = (group_outs + kStep<T> - 1) / kStep<T>;

  const int64_t points_of_pixel = problem.taps * problem.shape.deform_groups;
  const int64_t units = divide_up(problem.all_pixels, kDataPixels) * points_of_pixel;
  for (int64_t unit = ctx.block(); unit < units; unit += ctx.blocks()) {
    // Blocks that run side by side read the same output gradients.
    const int64_t pixel_tile = divide(unit, points_of_pixel);
    const auto point = static_cast<int>(unit - pixel_tile * points_of_pixel);
    const int offset_group = point / static_cast<int>(problem.taps);
    const int tap = point - offset_group * static_cast<int>(problem.taps);
    const int64_t first_pixel = pixel_tile * kDataPixels;
    const int pixels = static_cast<int>(smaller(kDataPixels, problem.all_pixels - first_pixel));

    ctx.sync();  // The previous unit has left the storage.
    find_pixels(ctx, problem, first_pixel, problem.all_pixels, storage.pixels);
    ctx.sync();
    MMDCN_NO_UNROLL
    for (int i = ctx.thread(); i < kDataPixels; i += Ctx::kThreads) {
      const Pixel& pixel = storage.pixels[i];
      const TensorPoint at(problem, offset, mask, pixel, offset_group, tap);
      typename Storage::Point& kept = storage.points[i];
      kept.modulation = at.inside() ? at.modulation() : 0;
      MMDCN_UNROLL
      for (int q = 0; q < 4; ++q) {
        kept.weight.of[q] = at.exists(q) ? at.corners().weight[q] : 0;
        kept.slope_y.of[q] = at.exists(q) ? at.corners().weight_gradient[0][q] : 0;
        kept.slope_x.of[q] = at.exists(q) ? at.corners().weight_gradient[1][q] : 0;
        kept.position[q] = at.exists(q) ? at.element(problem, pixel, q) : -1;
      }
    }

    CornerWeights dots[kShares] = {};
    const auto end_channel = static_cast<int>((offset_group + 1) * problem.deform_group_channels);
    // Tiles of channels that lie in one group of the convolution.
    for (int first = end_channel - static_cast<int>(problem.deform_group_channels), end;
         first < end_channel; first = end) {
      const int group = first / group_channels;
      end = static_cast<int>(
          smaller(smaller(first + kDataChannels, end_channel), (group + 1) * group_channels));
      const int first_out = group * group_outs;
      const T* const tile_gradient =
          grad_output + first_pixel * problem.shape.out_channels + first_out;
      const T* const tile_weight = weight + first_out * problem.columns +
                                   static_cast<int64_t>(tap) * group_channels +
                                   (first - group * group_channels);
      const auto copy = [&](int step, int stage) {
        constexpr int kVectors = kStep<T> / kWide<T>;
        MMDCN_UNROLL
        for (int i = 0; i < kPerThread<Ctx, kDataPixels * kVectors>; ++i) {
          const int item = ctx.thread() + i * Ctx::kThreads;
          const int pixel = item / kVectors, v = item % kVectors;
          const int out = step * kStep<T> + v * kWide<T>;
          const bool exists = pixel < pixels && out < group_outs;
          ctx.copy_async(storage.operands.grad_output[stage].vector(pixel, v),
                         tile_gradient + (exists ? pixel * problem.shape.out_channels + out : 0),
                         exists);
        }
        constexpr int kLine = kDataChannels / kWide<T>;
        MMDCN_UNROLL
        for (int i = 0; i < kPerThread<Ctx, kStep<T> * kLine>; ++i) {
          const int item = ctx.thread() + i * Ctx::kThreads;
          const int line = item / kLine, v = item % kLine;
          const int out = step * kStep<T> + line;
          const bool exists = out < group_outs && first + v * kWide<T> < end;
          ctx.copy_async(storage.operands.weight[stage].vector(line, v),
                         tile_weight + (exists ? out * problem.columns + v * kWide<T> : 0), exists);
        }
      };

      // grad_columns = grad_output * weight.
      typename Ctx::template TensorProduct<kDataPixels, kDataChannels> product;
      product.clear();
      ctx.sync();  // The gradients of the previous columns have been used.
      // A round multiplies one step and asks for the one that is kStages - 1 further; the first
      // rounds have nothing to multiply yet.
      const auto next = [](int stage) { return stage + 1 == kStages ? 0 : stage + 1; };
      int stage = 0, coming = 0;
      MMDCN_NO_UNROLL
      for (int step = 1 - kStages; step < steps; ++step) {
        if (step >= 0) {
          ctx.template wait<kStages - 2>();
          // This step's operands are there, and nobody reads those of the step before.
          ctx.sync();
        }
        if (step + kStages - 1 < steps) copy(step + kStages - 1, coming);
        ctx.commit();
        coming = next(coming);
        if (step < 0) continue;
        MMDCN_UNROLL
        for (int part = 0; part < kParts; ++part) {
          product.add(ctx, storage.operands.grad_output[stage], storage.operands.weight[stage],
                      part);
        }
        stage = next(stage);
      }
      ctx.sync();  // The operands have been read.
      product.for_each(ctx, [&](int pixel, int channel, const float (&pair)[2]) {
        Vector<float, 2> packed;
        ctx.template pack<float>(pair, packed);
        ctx.store_shared(&storage.grad_columns.row[pixel][channel], packed);
      });
      ctx.sync();

      // Back through the sampling. A pixel's channels are shared by threads that follow each other,
      // each with every kDataShares-th four of them.
      MMDCN_UNROLL
      for (int i = 0; i < kShares; ++i) {
        const int item = ctx.thread() + i * Ctx::kThreads;
        const int pixel = item / kDataShares, share = item % kDataShares;
        const typename Storage::Point& at = storage.points[pixel];
        if (at.position[0] < 0 && at.position[1] < 0 && at.position[2] < 0 && at.position[3] < 0) {
          continue;
        }
        MMDCN_NO_UNROLL
        for (int quad = 0; quad < kQuads; ++quad) {
          const int channel = (quad * kDataShares + share) * 4;
          if (first + channel >= end) continue;
          Vector<float, 4> vector;
          float grad_column[4];
          ctx.load_shared(&storage.grad_columns.row[pixel][channel], vector);
          ctx.template unpack<float>(vector, grad_column);
          MMDCN_UNROLL
          for (int q = 0; q < 4; ++q) {
            if (at.position[q] < 0) continue;
            const int64_t position = at.position[q] + first + channel;
            if (through_points) {
              Vector<T, 4> loaded;
              float x[4];
              ctx.load(input + position, loaded);
              ctx.template unpack<T>(loaded, x);
              for (int c = 0; c < 4; ++c) dots[i].of[q] += grad_column[c] * x[c];
            }
            if (grad_input.wanted()) {
              const float factor = at.weight.of[q] * at.modulation;
              float gradient[4];
              for (int c = 0; c < 4; ++c) gradient[c] = factor * grad_column[c];
              grad_input.add(ctx, position, gradient);
            }
          }
        }
      }
    }

    if (!through_points) continue;
    ctx.sync();  // The gradients of the columns have been used.
    for (int i = 0; i < kShares; ++i) {
      const int item = ctx.thread() + i * Ctx::kThreads;
      storage.partial[item % kDataShares][item / kDataShares] = dots[i];
    }
    ctx.sync();
    for (int i = ctx.thread(); i < pixels; i += Ctx::kThreads) {
      const typename Storage::Point& at = storage.points[i];
      float y = 0, x = 0, sample = 0;
      for (int q = 0; q < 4; ++q) {
        float dot = 0;
        for (int share = 0; share < kDataShares; ++share) dot += storage.partial[share][i].of[q];
        y += at.slope_y.of[q] * dot;
        x += at.slope_x.of[q] * dot;
        sample += at.weight.of[q] * dot;
      }
      const int64_t to = offset_index(problem, storage.pixels[i], offset_group, tap);
      if (grad_offset) {
        ctx.store(&grad_offset[to], at.modulation * y);
        ctx.store(&grad_offset[to + problem.pixels], at.modulation * x);
      }
      if (grad_mask) {
        ctx.store(&grad_mask[mask_index(problem, storage.pixels[i], offset_group, tap)], sample);
      }
    }
  }
}

}  // namespace mmdcn::cuda
