// The products of the backward pass in pairs of bfloat16: packed weights, the sums of their
// gradient, and the gradients and columns of a tile.
#pragma once

#include <algorithm>

#include "../pairs.h"
#include "backward_tile.h"
#include "weight_rows.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

// Whether the products of this shape can be done in pairs of bfloat16. Pairs that fill up a group's
// last step must not be another group's.
inline bool multiplied_in_pairs(const DeformConv2dShape& shape) {
  const int64_t in = shape.group_channels(), out = shape.group_out_channels();
  return kHasPairs && (shape.groups == 1 || (in == 2 * pairs(in) && out == 2 * pairs(out)));
}

// ---------------------------------------------------------------------------------- weights

// The sizes of a block's packed weights and sums.
struct PairedBlock {
  int64_t taps, groups, channels, out;  // channels and outputs of a group
  int64_t group_size;                   // elements of a group's packed weights for one tap
  int64_t sum_row, sums_of_group;       // elements of a row of sums, and of a group's for one tap

  PairedBlock(const DeformConv2dShape& shape, const ChannelBlock& block)
      : taps(shape.taps()),
        groups(block.groups(shape.group_channels())),
        channels(block.channels() / groups),
        out(shape.group_out_channels()),
        group_size(packed_size<float>(2 * pairs(out), channels)),
        sum_row(padded<float>(channels)),
        sums_of_group((out + kTileRows - 1) / kTileRows * kTileRows * sum_row) {}
};

inline int64_t paired_block_size(const DeformConv2dShape& shape, const ChannelBlock& block) {
  const PairedBlock sizes(shape, block);
  return sizes.taps * sizes.groups * sizes.group_size / 2;  // in floats
}

inline int64_t paired_sums_size(const DeformConv2dShape& shape, const ChannelBlock& block) {
  const PairedBlock sizes(shape, block);
  return sizes.taps * sizes.groups * sizes.sums_of_group;
}

// Packs the weights of one group of a block: for each tap, a matrix of Co/groups × channels in
// panels, with pairs of output channels.
template <typename T>
inline void pack_paired_group(const PairedBlock& sizes, const T* source, const WeightLayout& layout,
                              BFloat16* packed) {
  constexpr int64_t lanes = kLanes<float>, width = kPanelWidth<float>;
  const int64_t depth = 2 * pairs(sizes.out);
  for (int64_t o = 0; o < depth; o += lanes) {
    const int64_t count = std::clamp<int64_t>(sizes.out - o, 0, lanes);
    for_weight_chunks(
        sizes.channels, sizes.taps, [&](int64_t c, int64_t some, int64_t t, int64_t taps) {
          float rows[kWeightChunk * kWeightChunk * lanes];
          if (count < lanes) fill_zero(rows, some * taps * lanes);
          load_weight_rows(source + o * layout.out_stride, layout, count, c, some, t, taps, rows);
          const int64_t panel = c / width * width;
          BFloat16* target = packed + panel * depth + o * width + 2 * (c - panel);
          for (int64_t tap = 0; tap < taps; ++tap) {
            float square[kWeightChunk * lanes];  // output channels × channels
            if (some < kWeightChunk) fill_zero(square, kWeightChunk * lanes);
            transpose<float>(rows + tap * lanes, taps * lanes, some, lanes, square, kWeightChunk);
            BFloat16* pairs_of_tap = target + (t + tap) * sizes.groups * sizes.group_size;
            for (int64_t k = 0; k < std::min(lanes, depth - o); k += 2) {
              const float* row = square + k * kWeightChunk;
              store_pairs(pairs_of_tap + k * width,
                          paired(load_register(row), load_register(row + kWeightChunk)));
            }
          }
        });
  }
}

template <typename T>
void pack_paired_weight(const DeformConv2dShape& shape, const T* weight, const WeightLayout& layout,
                        const ChannelBlock& block, float* packed) {
  const PairedBlock sizes(shape, block);
  const T* source = weight + block.group * sizes.out * layout.out_stride +
                    (block.begin - block.group * shape.group_channels()) * layout.channel_stride;
  for (int64_t g = 0; g < sizes.groups; ++g) {
    pack_paired_group(sizes, source + g * sizes.out * layout.out_stride, layout,
                      reinterpret_cast<BFloat16*>(packed) + g * sizes.group_size);
  }
}

// Stores a block's sums, which are complete.
template <typename T>
void unpack_paired_sums(const DeformConv2dShape& shape, const float* sums,
                        const ChannelBlock& block, bool /* add */, T* grad_weight,
                        const WeightLayout& layout) {
  const PairedBlock sizes(shape, block);
  T* target = grad_weight + block.group * sizes.out * layout.out_stride +
              (block.begin - block.group * shape.group_channels()) * layout.channel_stride;
  for (int64_t tap = 0; tap < sizes.taps; ++tap) {
    for (int64_t o = 0; o < sizes.groups * sizes.out; ++o) {
      const int64_t g = o / sizes.out;
      const float* source = sums + (tap * sizes.groups + g) * sizes.sums_of_group +
                            (o - g * sizes.out) * sizes.sum_row;
      T* row = target + o * layout.out_stride + tap * layout.tap_stride;
      if (layout.channel_stride == 1) {
        copy_row<float>(source, sizes.channels, row);
        continue;
      }
      constexpr int64_t some = kLanes<float>;
      for (int64_t c = 0; c < sizes.channels; c += some) {
        T values[some];  // rows of sums are padded to whole registers
        store_register(values, load_register(source + c));
        for (int64_t k = 0; k < std::min(some, sizes.channels - c); ++k) {
          row[(c + k) * layout.channel_stride] = values[k];
        }
      }
    }
  }
}

// ------------------------------------------------------------------------------------- tile

// The gradients of a tile's outputs lie in both orders, as the depth of one product is the output
// channels, and that of the other the pixels. Both matrices are zero where they fill up pairs.
template <typename T>
struct TileAtWork<T, BFloat16> : SampledTile<T> {
  using SampledTile<T>::call, SampledTile<T>::tile;
  using SampledTile<T>::groups, SampledTile<T>::group_channels;
  const int64_t wide;                        // rounded up output channels of the block
  const int64_t grad_stride, column_stride;  // of rows
  const int64_t plane_stride;                // of planes
  BFloat16* const gradients;                 // pixels × output channels of the block
  BFloat16* const grad_planes;               // output channels of the block × pixels
  float* const grad_columns;                 // pixels × channels of the block
  BFloat16* const column_pairs;              // pairs of pixels × channels of the block

  TileAtWork(const BlockCall<T>& call_, int64_t channels, Arena& arena)
      : SampledTile<T>(call_, channels, arena),
        wide(rounded(this->groups_of(call_.shape, channels) * group_width())),
        grad_stride(row_stride<BFloat16>(wide)),
        column_stride(row_stride<BFloat16>(this->widest_columns(call_.shape, channels))),
        plane_stride(row_stride<BFloat16>(kBackwardTile)),
        gradients(arena.take<BFloat16>(kBackwardTile * grad_stride)),
        grad_planes(arena.take<BFloat16>(wide * plane_stride)),
        grad_columns(arena.take<float>(kBackwardTile * column_stride)),
        column_pairs(arena.take<BFloat16>(kBackwardTile * column_stride)) {}

  void load_gradients() const {
    const ImageLayout layout = call.tensors.output_layout;
    const int64_t pixels = tile->count, out = call.shape.group_out_channels() * groups();
    const T* image = call.tensors.grad_output +
                     call.block.group * call.shape.group_out_channels() * layout.channel_stride;
    if (layout.channels_last()) {
      for_runs([&](int64_t first, int64_t count, int64_t pixel) {
        for (int64_t i = 0; i < count; ++i) {
          BFloat16* row = gradients + (first + i) * grad_stride;
          std::copy_n(image + (pixel + i) * layout.pixel_stride, out, row);
          fill_zero(row + out, wide - out);
        }
      });
      for (int64_t i = pixels; i < rounded(pixels); ++i)
        fill_zero(gradients + i * grad_stride, wide);
      return transpose_pairs(gradients, grad_stride, rounded(pixels), wide, grad_planes,
                             plane_stride);
    }
    for (int64_t o = 0; o < wide; ++o) {
      BFloat16* plane = grad_planes + o * plane_stride;
      if (o >= out) {
        fill_zero(plane, rounded(pixels));
        continue;
      }
      for_runs([&](int64_t first, int64_t count, int64_t pixel) {
        std::copy_n(image + o * layout.channel_stride + pixel, count, plane + first);
      });
      fill_zero(plane + pixels, rounded(pixels) - pixels);
    }
    transpose_pairs(grad_planes, plane_stride, wide, rounded(pixels), gradients, grad_stride);
  }

  // grad_columns = gradients · Wᵀ for one tap.
  void multiply_gradients(int64_t tap) const {
    const PairedBlock sizes(call.shape, call.block);
    const int64_t steps = pairs(sizes.out);
    const BFloat16* weight = reinterpret_cast<const BFloat16*>(call.tensors.weight) +
                             tap * sizes.groups * sizes.group_size;
    for (int64_t g = 0; g < sizes.groups; ++g) {
      const Panels<BFloat16> panels = {weight + g * sizes.group_size,
                                       2 * steps * kPanelWidth<float>, kPanelWidth<float>};
      multiply<Order::kRows, Into::kSet>(tile->count, sizes.channels, steps,
                                         gradients + g * group_width(), grad_stride, panels,
                                         grad_columns + g * sizes.channels, column_stride);
    }
  }

  // The transpose of grad_weight += gradientsᵀ · columns for one tap.
  template <Order>
  void add_weight_gradient(int64_t tap, const BFloat16* columns, int64_t stride) const {
    const PairedBlock sizes(call.shape, call.block);
    const int64_t steps = pairs(tile->count);
    pair_columns(columns, stride, steps);
    float* sums = call.tensors.grad_weight + tap * sizes.groups * sizes.sums_of_group;
    for (int64_t g = 0; g < sizes.groups; ++g) {
      const Panels<BFloat16> panels = {column_pairs + 2 * g * sizes.channels,
                                       2 * kPanelWidth<float>, pair_row()};
      multiply<Order::kRows, Into::kAdd>(
          sizes.out, sizes.channels, steps, grad_planes + g * group_width() * plane_stride,
          plane_stride, panels, sums + g * sizes.sums_of_group, sizes.sum_row);
    }
  }

 private:
  // Rounded up to whole squares of transpose_pairs().
  static int64_t rounded(int64_t count) {
    constexpr int64_t square = 2 * kLanes<float>;
    return (count + square - 1) / square * square;
  }
  // Output channels of a group, with those that fill up the last step.
  int64_t group_width() const { return 2 * pairs(call.shape.group_out_channels()); }
  // Pairs in a row of column_pairs.
  int64_t pair_row() const { return padded<float>(call.channels()); }

  template <typename F>
  void for_runs(const F& function) const {
    for (int64_t r = 0; r < tile->runs; ++r) {
      function(tile->run[r].first, tile->run[r].count, tile->run[r].pixel);
    }
  }

  // Sets column_pairs, with zeros for the pixels that fill up `steps` pairs.
  void pair_columns(const BFloat16* columns, int64_t stride, int64_t steps) const {
    const int64_t channels = call.channels(), pixels = tile->count;
    for (int64_t k = 0; k < steps; ++k) {
      BFloat16* target = column_pairs + 2 * k * pair_row();
      const BFloat16* even = columns + 2 * k * stride;
      for (int64_t c = 0; c < channels; c += kLanes<float>) {
        register_t<float> values[2] = {};
        if (2 * k < pixels) values[0] = load_register(even + c);
        if (2 * k + 1 < pixels) values[1] = load_register(even + stride + c);
        store_pairs(target + 2 * c, paired(values[0], values[1]));
      }
    }
  }
};

}  // namespace
}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
