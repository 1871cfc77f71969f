// The weights of the backward pass, packed into panels, and the sums of their gradient.
#pragma once

#include <algorithm>

#include "../matmul.h"
#include "rows.h"
#include "weight_rows.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

template <typename T, typename A = accumulator_t<T>>
int64_t packed_size_of_tap(const DeformConv2dShape& shape, const ChannelBlock& block) {
  return packed_size<A>(shape.group_out_channels(), block.end - block.begin);
}

template <typename T, typename A = accumulator_t<T>>
int64_t packed_block_size(const DeformConv2dShape& shape, const ChannelBlock& block) {
  return shape.taps() * packed_size_of_tap<T>(shape, block);
}

// Packs a block's weights: for each tap, a matrix of Co/groups × the block's channels.
template <typename T, typename A = accumulator_t<T>>
void pack_weight(const DeformConv2dShape& shape, const T* weight, const WeightLayout& layout,
                 const ChannelBlock& block, A* packed) {
  constexpr int64_t lanes = kLanes<A>, width = kPanelWidth<A>;
  const int64_t taps = shape.taps(), in = shape.group_channels(), out = shape.group_out_channels();
  const int64_t channels = block.end - block.begin;
  const int64_t tap_size = packed_size_of_tap<T>(shape, block);
  const T* source = weight + block.group * out * layout.out_stride +
                    (block.begin - block.group * in) * layout.channel_stride;
  if (channels % width != 0) fill_zero(packed, taps * tap_size);
  for (int64_t o = 0; o < out; o += lanes) {
    const int64_t count = std::min(lanes, out - o);
    for_weight_chunks(channels, taps, [&](int64_t c, int64_t some, int64_t t, int64_t some_taps) {
      A rows[kWeightChunk * kWeightChunk * lanes];
      load_weight_rows(source + o * layout.out_stride, layout, count, c, some, t, some_taps, rows);
      for (int64_t tap = 0; tap < some_taps; ++tap) {
        A* target = packed + (t + tap) * tap_size + o * width;
        for (int64_t k = 0; k < some; k += width) {
          const int64_t panel = (c + k) / width * width;
          transpose<A>(rows + (k * some_taps + tap) * lanes, some_taps * lanes,
                       std::min(width, some - k), count, target + panel * out + c + k - panel,
                       width);
        }
      }
    });
  }
}

// The sums of the gradient are (channels of the block, taps, padded Co/groups).
template <typename T, typename A = accumulator_t<T>>
int64_t sums_size(const DeformConv2dShape& shape, const ChannelBlock& block) {
  return (block.end - block.begin) * shape.taps() * padded<A>(shape.group_out_channels());
}

template <bool add, typename T, typename A>
void unpack_sums_with(const DeformConv2dShape& shape, const A* sums, const ChannelBlock& block,
                      T* grad_weight, const WeightLayout& layout) {
  const int64_t out = shape.group_out_channels(), taps = shape.taps(), row = padded<A>(out);
  const int64_t channels = block.end - block.begin;
  T* target = grad_weight + block.group * out * layout.out_stride +
              (block.begin - block.group * shape.group_channels()) * layout.channel_stride;
  if (layout.tap_stride == 1) {
    return transpose<A, add>(sums, row, channels * taps, out, target, layout.out_stride);
  }
  for (int64_t tap = 0; tap < taps; ++tap) {
    transpose<A, add>(sums + tap * row, taps * row, channels, out, target + tap * layout.tap_stride,
                      layout.out_stride);
  }
}

template <typename T, typename A = accumulator_t<T>>
void unpack_sums(const DeformConv2dShape& shape, const A* sums, const ChannelBlock& block, bool add,
                 T* grad_weight, const WeightLayout& layout) {
  add ? unpack_sums_with<true>(shape, sums, block, grad_weight, layout)
      : unpack_sums_with<false>(shape, sums, block, grad_weight, layout);
}

}  // namespace
}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
