// The current tile in the backward pass of one block of channels: its samples, the gradients of its
// outputs, and the gradients of its columns.
#pragma once

#include <algorithm>

#include "../arena.h"
#include "../matmul.h"
#include "../rows.h"
#include "../transpose.h"
#include "backward_weights.h"
#include "samples.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

using BackwardTile = Tile<kBackwardTile>;
template <typename A>
using BackwardSamples = Samples<A, kBackwardTile>;

// The arguments of one call of the kernel, which computes the gradients of one block of channels.
template <typename T>
struct BlockCall {
  const DeformConv2dShape& shape;
  const BackwardTensors<T>& tensors;
  const ChannelBlock& block;
  BlockWindows<T>& windows;

  int64_t channels() const { return block.channels(); }
  bool wants_sampling() const {
    return tensors.grad_offset.data != nullptr || tensors.grad_mask.data != nullptr;
  }
  // The block's first channel, for images whose channels lie in planes.
  const T* planes() const {
    return tensors.input + block.begin * tensors.input_layout.channel_stride;
  }
  T* grad_planes() const {
    return tensors.grad_input + block.begin * tensors.input_layout.channel_stride;
  }
};

// The current tile and its samples.
template <typename T, typename A = accumulator_t<T>>
struct SampledTile {
  const BlockCall<T>& call;
  BackwardTile* const tile;
  BackwardSamples<A>* const samples;  // of the current tap and offset group
  A* const staged;                    // memory for staged offsets and modulations
  SamplingRows<A> sampling = {};      // the offsets and modulations of the tile

  SampledTile(const BlockCall<T>& call_, int64_t channels, Arena& arena)
      : call(call_),
        tile(arena.take<BackwardTile>(1)),
        samples(arena.take<BackwardSamples<A>>(1)),
        staged(arena.take<A>(staged_size<kBackwardTile>(call.shape, call.tensors.offset,
                                                        call.tensors.mask,
                                                        most_groups(call.shape, channels)))) {}

  // Sets `sampling`.
  void find_sampling() {
    const int64_t channels = call.shape.deform_group_channels();
    const int64_t first = call.block.begin / channels, last = (call.block.end - 1) / channels;
    sampling = sampling_rows(call.shape, *tile, call.tensors.offset, call.tensors.mask, first,
                             last - first + 1, staged);
  }

  int64_t groups() const { return call.block.groups(call.shape.group_channels()); }
  // The channels of each group that belong to the block.
  int64_t group_channels() const { return call.channels() / groups(); }

  // The groups that a block of so many channels has, and the elements of a row of columns: products
  // write a whole register beyond the last group's.
  static int64_t groups_of(const DeformConv2dShape& shape, int64_t channels) {
    return ChannelBlock{0, 0, channels}.groups(shape.group_channels());
  }
  static int64_t widest_columns(const DeformConv2dShape& shape, int64_t channels) {
    const int64_t groups = groups_of(shape, channels);
    return channels / groups * (groups - 1) + padded<A>(channels / groups);
  }

 private:
  // The most offset groups that the channels of a block belong to.
  static int64_t most_groups(const DeformConv2dShape& shape, int64_t channels) {
    return std::min(shape.deform_groups, channels / shape.deform_group_channels() + 2);
  }
};

// The products of the current tile, which multiply elements of type L: the accumulators' here, and
// BFloat16 in backward_pairs.h.
template <typename T, typename L>
struct TileAtWork : SampledTile<T> {
  using A = L;
  using SampledTile<T>::call, SampledTile<T>::tile;
  using SampledTile<T>::groups, SampledTile<T>::group_channels;
  const int64_t grad_stride, column_stride;
  A* const gradients;     // pixels × output channels of the block
  A* const grad_columns;  // pixels × channels of the block; none where depthwise

  TileAtWork(const BlockCall<T>& call_, int64_t channels, Arena& arena)
      : SampledTile<T>(call_, channels, arena),
        grad_stride(row_stride<A>(widest_gradients(call_.shape, channels))),
        column_stride(row_stride<A>(this->widest_columns(call_.shape, channels))),
        gradients(arena.take<A>(kBackwardTile * grad_stride)),
        grad_columns(arena.take<A>(is_depthwise(call.shape) ? 0 : kBackwardTile * column_stride)) {}

  // Reads the gradients of the tile's outputs. What fills up rows is zero.
  void load_gradients() const {
    const ImageLayout layout = call.tensors.output_layout;
    const int64_t out = call.shape.group_out_channels() * groups(), stride = grad_stride;
    const T* image = call.tensors.grad_output +
                     call.block.group * call.shape.group_out_channels() * layout.channel_stride;
    for (int64_t r = 0; r < tile->runs; ++r) {
      const auto& run = tile->run[r];
      const T* source = image + run.pixel * layout.pixel_stride;
      A* target = gradients + run.first * stride;
      if (!layout.channels_last()) {
        transpose<A>(source, layout.channel_stride, out, run.count, target, stride);
        continue;
      }
      for (int64_t i = 0; i < run.count; ++i) {
        copy_row<A>(source + i * layout.pixel_stride, out, target + i * stride);
      }
    }
    for (int64_t i = 0; i < tile->count; ++i) {
      fill_zero(gradients + i * stride + out, widest_gradients(call.shape, call.channels()) - out);
    }
  }

  // grad_columns = gradients · Wᵀ for one tap. The columns of a group are padded to whole
  // registers, which the next group's then overwrite.
  void multiply_gradients(int64_t tap) const {
    const int64_t out = call.shape.group_out_channels(), channels = group_channels();
    const A* weight = call.tensors.weight + tap * packed_size_of_tap<T>(call.shape, call.block);
    for (int64_t g = 0; g < groups(); ++g) {
      multiply<Order::kRows, Into::kSet>(
          tile->count, channels, out, gradients + g * out, grad_stride,
          packed(weight + g * packed_size_of_group<T>(call.shape, call.block), out),
          grad_columns + g * channels, column_stride);
    }
  }

  // grad_weight += columnsᵀ · gradients for one tap.
  template <Order order>
  void add_weight_gradient(int64_t tap, const A* columns, int64_t stride) const {
    const int64_t out = call.shape.group_out_channels(), channels = group_channels();
    const int64_t row = call.shape.taps() * padded<A>(out);
    for (int64_t g = 0; g < groups(); ++g) {
      const int64_t first = g * channels;
      multiply<order, Into::kAdd>(
          channels, out, tile->count, columns + first * (order == Order::kRows ? stride : 1),
          stride, row_major<A>(gradients + g * out, grad_stride),
          call.tensors.grad_weight + first * row + tap * padded<A>(out), row);
    }
  }

 private:
  // Elements of a row of gradients, for a block of so many channels. Products read a whole register
  // beyond the last group's.
  static int64_t widest_gradients(const DeformConv2dShape& shape, int64_t channels) {
    const int64_t groups = SampledTile<T>::groups_of(shape, channels);
    const int64_t out = shape.group_out_channels();
    return (groups - 1) * out + (is_depthwise(shape) ? 1 : padded<A>(out));
  }
};

}  // namespace
}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
