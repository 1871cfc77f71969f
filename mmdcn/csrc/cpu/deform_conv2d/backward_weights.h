// The weights of the backward pass, packed into panels, and the sums of their gradient.
#pragma once

#include <algorithm>

#include "../matmul.h"
#include "../rows.h"
#include "depthwise_weights.h"
#include "weight_rows.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

// Elements of the packed weights of one group and tap.
template <typename T, typename A = accumulator_t<T>>
inline int64_t packed_size_of_group(const DeformConv2dShape& shape, const ChannelBlock& block) {
  return packed_size<A>(shape.group_out_channels(),
                        block.channels() / block.groups(shape.group_channels()));
}

template <typename T, typename A = accumulator_t<T>>
inline int64_t packed_size_of_tap(const DeformConv2dShape& shape, const ChannelBlock& block) {
  if (is_depthwise(shape)) return block.channels();
  return block.groups(shape.group_channels()) * packed_size_of_group<T>(shape, block);
}

template <typename T, typename A = accumulator_t<T>>
int64_t packed_block_size(const DeformConv2dShape& shape, const ChannelBlock& block) {
  return shape.taps() * packed_size_of_tap<T>(shape, block);
}

// Packs the weights of `channels` channels of one group: for each tap, tap_size elements apart, a
// matrix of Co/groups × channels.
template <typename T, typename A>
inline void pack_group(const DeformConv2dShape& shape, const T* source, const WeightLayout& layout,
                       int64_t channels, int64_t tap_size, A* packed) {
  constexpr int64_t lanes = kLanes<A>, width = kPanelWidth<A>;
  const int64_t taps = shape.taps(), out = shape.group_out_channels();
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

// Packs a block's weights.
template <typename T, typename A = accumulator_t<T>>
void pack_weight(const DeformConv2dShape& shape, const T* weight, const WeightLayout& layout,
                 const ChannelBlock& block, A* packed) {
  const int64_t taps = shape.taps(), in = shape.group_channels(), out = shape.group_out_channels();
  const int64_t tap_size = packed_size_of_tap<T>(shape, block);
  if (is_depthwise(shape)) {
    return pack_depthwise(weight + block.begin * layout.out_stride, layout, taps, block.channels(),
                          packed);
  }
  const int64_t groups = block.groups(in), channels = block.channels() / groups;
  if (channels % kPanelWidth<A> != 0) fill_zero(packed, taps * tap_size);
  const T* source = weight + block.group * out * layout.out_stride +
                    (block.begin - block.group * in) * layout.channel_stride;
  for (int64_t g = 0; g < groups; ++g) {
    pack_group(shape, source + g * out * layout.out_stride, layout, channels, tap_size,
               packed + g * packed_size_of_group<T>(shape, block));
  }
}

template <typename T, typename A = accumulator_t<T>>
int64_t sums_size(const DeformConv2dShape& shape, const ChannelBlock& block) {
  if (is_depthwise(shape)) return shape.taps() * block.channels();
  return block.channels() * shape.taps() * padded<A>(shape.group_out_channels());
}

// Stores, or adds, the sums of `channels` channels of one group.
template <bool add, typename T, typename A>
inline void unpack_group(const DeformConv2dShape& shape, const A* sums, int64_t channels, T* target,
                         const WeightLayout& layout) {
  const int64_t out = shape.group_out_channels(), taps = shape.taps(), row = padded<A>(out);
  if (layout.tap_stride == 1) {
    return transpose<A, add>(sums, row, channels * taps, out, target, layout.out_stride);
  }
  for (int64_t tap = 0; tap < taps; ++tap) {
    transpose<A, add>(sums + tap * row, taps * row, channels, out, target + tap * layout.tap_stride,
                      layout.out_stride);
  }
}

template <bool add, typename T, typename A>
void unpack_sums_with(const DeformConv2dShape& shape, const A* sums, const ChannelBlock& block,
                      T* grad_weight, const WeightLayout& layout) {
  const int64_t in = shape.group_channels(), out = shape.group_out_channels();
  if (is_depthwise(shape)) {
    return unpack_depthwise<add>(sums, shape.taps(), block.channels(),
                                 grad_weight + block.begin * layout.out_stride, layout);
  }
  const int64_t groups = block.groups(in), channels = block.channels() / groups;
  T* target = grad_weight + block.group * out * layout.out_stride +
              (block.begin - block.group * in) * layout.channel_stride;
  for (int64_t g = 0; g < groups; ++g) {
    unpack_group<add>(shape, sums + g * channels * shape.taps() * padded<A>(out), channels,
                      target + g * out * layout.out_stride, layout);
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
