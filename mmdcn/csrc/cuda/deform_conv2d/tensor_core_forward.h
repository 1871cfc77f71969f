// Forward pass of deformable convolution on tensor cores: an implicit matrix product, columns times
// weight, in which the next columns are sampled while the ones before are multiplied.
#pragma once

#include "tensor_core_columns.h"

namespace mmdcn::cuda {

// Taps whose sampling points are kept in shared memory at a time.
constexpr int kTableTaps = 9;
// Output channels that leave through shared memory at a time.
constexpr int kSlice = 64;

template <typename T, int kPixels, int kOut>
struct TensorForwardStorage {
  struct Operands {
    Operand<T, kPixels, Lines::kAlongSum> columns[2];
    Operand<T, kOut, Lines::kAlongSum> weight[2];
  };
  // The padding keeps rows aligned for vectors and spreads them over the memory banks.
  struct alignas(16) Output {
    T row[kPixels][kSlice + 8];
  };

  union {
    Operands operands;
    Output output;
  };
  PointTable<kTableTaps, kPixels> points;
  Pixel pixels[kPixels];
};

// The order in which the columns of one group are sampled and summed. Innermost are the taps: their
// samples of the same channels lie close together, and most come from the cache.
template <typename T>
class ColumnSteps {
  int run_ = 0, first_tap_ = 0, channel_ = 0, tap_ = 0;

 public:
  // Whether the sampling points of this step are not those of the step before.
  MMDCN_BLOCK bool begins() const { return channel_ == 0 && tap_ == first_tap_; }
  MMDCN_BLOCK int first_tap() const { return first_tap_; }
  MMDCN_BLOCK int tap() const { return tap_; }
  MMDCN_BLOCK int channel() const { return run_ + channel_; }  // the first, in the group
  MMDCN_BLOCK int column(const DeformConv2dProblem& problem) const {
    return tap_ * static_cast<int>(problem.group_channels) + channel();
  }

  MMDCN_BLOCK void advance(const DeformConv2dProblem& problem) {
    const int taps = static_cast<int>(problem.taps), channels = run_channels(problem);
    ++tap_;
    if (tap_ < taps && tap_ < first_tap_ + kTableTaps) return;
    tap_ = first_tap_;
    channel_ += kStep<T>;
    if (channel_ < channels) return;
    channel_ = 0;
    first_tap_ += kTableTaps;
    if (first_tap_ >= taps) {
      first_tap_ = 0;
      run_ += channels;
    }
    tap_ = first_tap_;
  }
};

// Each block computes tiles of kPixels pixels by kOut output channels of one group.
template <typename Ctx, typename T, int kPixels, int kOut>
MMDCN_BLOCK void tensor_forward_block(const Ctx& ctx, const DeformConv2dProblem& problem,
                                      const T* input, const float* offset, const float* mask,
                                      const T* weight, const T* bias, T* output,
                                      TensorForwardStorage<T, kPixels, kOut>& storage) {
  constexpr int kVectors = kStep<T> / kWide<T>;  // in a line of columns or weights
  using Items = PartItems<Ctx, kPixels * kVectors>;
  const int64_t channel_tiles = divide_up(problem.group_out_channels, kOut);
  const int64_t tiles =
      divide_up(problem.all_pixels, kPixels) * problem.shape.groups * channel_tiles;
  const int columns = static_cast<int>(problem.columns), steps = columns / kStep<T>;
  for (int64_t tile = ctx.block(); tile < tiles; tile += ctx.blocks()) {
    // Blocks that run side by side sample at the same pixels.
    const int64_t pixel_tile_and_group = divide(tile, channel_tiles);
    const int64_t pixel_tile = divide(pixel_tile_and_group, problem.shape.groups);
    const auto group = static_cast<int>(pixel_tile_and_group - pixel_tile * problem.shape.groups);
    const auto first_in_group =
        static_cast<int>(tile - pixel_tile_and_group * channel_tiles) * kOut;
    const int group_channel = group * static_cast<int>(problem.group_channels);
    const int group_outs = static_cast<int>(problem.group_out_channels);
    const int first_out = group * group_outs + first_in_group;
    const int outs = static_cast<int>(smaller(kOut, group_outs - first_in_group));
    const T* const tile_weight = weight + first_out * problem.columns;

    ctx.sync();  // The previous tile has left the storage.
    find_pixels(ctx, problem, pixel_tile * kPixels, problem.all_pixels, storage.pixels);

    typename Ctx::template TensorProduct<kPixels, kOut> product;
    product.clear();
    ColumnSteps<T> coming;
    int buffer = 1;
    // A round multiplies one step while the next one is copied and sampled; the first round has
    // nothing to multiply yet.
    MMDCN_NO_UNROLL
    for (int step = -1; step < steps; ++step) {
      ctx.template wait<0>();
      // Weights and columns of this step are there, and nobody reads those of the step before.
      ctx.sync();
      const bool more = step + 1 < steps;
      if (more) {
        const int column = coming.column(problem);
        MMDCN_UNROLL
        for (int i = 0; i < kPerThread<Ctx, kOut * kVectors>; ++i) {
          const int item = ctx.thread() + i * Ctx::kThreads;
          const int out = item / kVectors, v = item % kVectors;
          const bool exists = out < outs;
          ctx.copy_async(storage.operands.weight[buffer ^ 1].vector(out, v),
                         tile_weight + ((exists ? out : 0) * columns + column + v * kWide<T>),
                         exists);
        }
        ctx.commit();
      }
      if (more && coming.begins()) {
        const int taps = static_cast<int>(smaller(kTableTaps, problem.taps - coming.first_tap()));
        const int offset_group =
            (group_channel + coming.channel()) / static_cast<int>(problem.deform_group_channels);
        MMDCN_NO_UNROLL
        for (int i = ctx.thread(); i < taps * kPixels; i += Ctx::kThreads) {
          const int tap = i / kPixels, pixel = i % kPixels;
          storage.points.set(problem, offset, mask, storage.pixels[pixel], offset_group,
                             coming.first_tap() + tap, tap, pixel);
        }
        ctx.sync();
      }
      const int row = coming.tap() - coming.first_tap();
      // Not unrolled, for the sake of registers.
      MMDCN_NO_UNROLL
      for (int part = 0; part < kParts; ++part) {
        Sample<T> samples[Items::kPerPart];
        if (more) {
          MMDCN_UNROLL
          for (int i = 0; i < Items::kPerPart; ++i) {
            if (!Items::exists(part, i)) continue;
            const int item = Items::item(ctx, part, i);
            const int pixel = item / kVectors, v = item % kVectors;
            samples[i].load(ctx, problem, storage.points.weight[row][pixel],
                            input + group_channel + coming.channel() + v * kWide<T>,
                            storage.points.low[row][pixel]);
          }
        }
        if (step >= 0) {
          product.add(ctx, storage.operands.columns[buffer], storage.operands.weight[buffer], part);
        }
        if (more) {
          MMDCN_UNROLL
          for (int i = 0; i < Items::kPerPart; ++i) {
            if (!Items::exists(part, i)) continue;
            const int item = Items::item(ctx, part, i);
            const int pixel = item / kVectors, v = item % kVectors;
            samples[i].blend(ctx, storage.points.weight[row][pixel],
                             storage.operands.columns[buffer ^ 1].vector(pixel, v));
          }
        }
      }
      coming.advance(problem);
      buffer ^= 1;
    }

    MMDCN_NO_UNROLL
    for (int slice = 0; slice < kOut; slice += kSlice) {
      ctx.sync();  // The operands, or the slice before, have been read.
      product.for_each(ctx, [&](int pixel, int out, const float (&pair)[2]) {
        if (out < slice || out >= slice + kSlice) return;
        float value[2] = {pair[0], pair[1]};
        if (bias && out < outs) {
          for (int i = 0; i < 2; ++i) value[i] += static_cast<float>(bias[first_out + out + i]);
        }
        Vector<T, 2> packed;
        ctx.template pack<T>(value, packed);
        ctx.store_shared(&storage.output.row[pixel][out - slice], packed);
      });
      ctx.sync();
      if (problem.output.channel == 1) {
        constexpr int kSliceVectors = kSlice / kWide<T>;
        MMDCN_NO_UNROLL
        for (int i = ctx.thread(); i < kPixels * kSliceVectors; i += Ctx::kThreads) {
          const Pixel& where = storage.pixels[i / kSliceVectors];
          const int out = i % kSliceVectors * kWide<T>;
          if (!where.exists() || slice + out >= outs) continue;
          Vector<T, kWide<T>> vector;
          ctx.load_shared(&storage.output.row[i / kSliceVectors][out], vector);
          ctx.store(&output[problem.output.index(where.batch, first_out + slice + out,
                                                 where.position(problem))],
                    vector);
        }
      } else {
        MMDCN_NO_UNROLL
        for (int i = ctx.thread(); i < kPixels * kSlice; i += Ctx::kThreads) {
          const Pixel& where = storage.pixels[i % kPixels];
          const int out = i / kPixels;
          if (!where.exists() || slice + out >= outs) continue;
          ctx.store(&output[problem.output.index(where.batch, first_out + slice + out,
                                                 where.position(problem))],
                    storage.output.row[i % kPixels][out]);
        }
      }
    }
  }
}

}  // namespace mmdcn::cuda
