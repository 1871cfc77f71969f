// The current tile in the backward pass of one block of channels: its samples, the gradients of its
// outputs, and the gradients of its columns.
#pragma once

#include <algorithm>

#include "../arena.h"
#include "../matmul.h"
#include "../transpose.h"
#include "backward_weights.h"
#include "rows.h"
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

  int64_t channels() const { return block.end - block.begin; }
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

template <typename T, typename A = accumulator_t<T>>
struct TileAtWork {
  const BlockCall<T>& call;
  const int64_t grad_stride, column_stride;
  BackwardTile* const tile;
  BackwardSamples<A>* const samples;  // of the current tap and offset group
  A* const gradients;                 // pixels × Co/groups
  A* const grad_columns;              // pixels × channels of the block
  A* const staged;                    // memory for staged offsets and modulations
  SamplingRows<A> sampling = {};      // the offsets and modulations of the tile

  TileAtWork(const BlockCall<T>& call_, int64_t channels, Arena& arena)
      : call(call_),
        grad_stride(row_stride<A>(padded<A>(call.shape.group_out_channels()))),
        column_stride(row_stride<A>(channels)),
        tile(arena.take<BackwardTile>(1)),
        samples(arena.take<BackwardSamples<A>>(1)),
        gradients(arena.take<A>(kBackwardTile * grad_stride)),
        grad_columns(arena.take<A>(kBackwardTile * column_stride)),
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

  // Reads the gradients of the tile's outputs.
  void load_gradients() const {
    const ImageLayout layout = call.tensors.output_layout;
    const int64_t out = call.shape.group_out_channels(), stride = grad_stride;
    const T* image = call.tensors.grad_output + call.block.group * out * layout.channel_stride;
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
      fill_zero(gradients + i * stride + out, padded<A>(out) - out);
    }
  }

  // grad_columns = gradients · Wᵀ for one tap.
  void multiply_gradients(int64_t tap) const {
    const int64_t out = call.shape.group_out_channels();
    const A* weight = call.tensors.weight + tap * packed_size_of_tap<T>(call.shape, call.block);
    multiply<Order::kRows, Into::kSet>(tile->count, call.channels(), out, gradients, grad_stride,
                                       packed(weight, out), grad_columns, column_stride);
  }

  // grad_weight += columnsᵀ · gradients for one tap.
  template <Order order>
  void add_weight_gradient(int64_t tap, const A* columns, int64_t stride) const {
    const int64_t out = call.shape.group_out_channels();
    multiply<order, Into::kAdd>(
        call.channels(), out, tile->count, columns, stride, row_major<A>(gradients, grad_stride),
        call.tensors.grad_weight + tap * padded<A>(out), call.shape.taps() * padded<A>(out));
  }

 private:
  // The most offset groups that the channels of a block belong to.
  static int64_t most_groups(const DeformConv2dShape& shape, int64_t channels) {
    return std::min(shape.deform_groups, channels / shape.deform_group_channels() + 2);
  }
};

}  // namespace
}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
