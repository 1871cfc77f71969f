// The weights of deform_conv_nd as panels of matrices, for the products of either pass.
#pragma once

#include "../../integers.h"
#include "../matmul.h"
#include "kernel.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

// Packs a matrix of depth × columns, whose elements are element(k, j), into panels.
template <typename A, typename F>
inline void pack(int64_t depth, int64_t columns, const F& element, A* packed) {
  for (int64_t first = 0; first < columns; first += kPanelWidth<A>) {
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t j = first; j < first + kPanelWidth<A>; ++j) {
        *packed++ = j < columns ? element(k, j) : A(0);
      }
    }
  }
}

template <int R, typename A>
int64_t tap_packed_size(const DeformConvNdShape<R>& shape) {
  return mmdcn::packed_size<A>(shape.group_channels(), shape.group_out_channels());
}

template <int R, typename A>
int64_t packed_size(const DeformConvNdShape<R>& shape) {
  return shape.groups * shape.taps() * tap_packed_size<R, A>(shape);
}

template <int R, typename T, typename A = accumulator_t<T>>
void pack_weight(const DeformConvNdShape<R>& shape, const T* weight, int64_t begin, int64_t end,
                 A* packed) {
  const int64_t channels = shape.group_channels(), outs = shape.group_out_channels();
  const int64_t taps = shape.taps(), size = tap_packed_size<R, A>(shape);
  for (int64_t number = begin; number < end; ++number) {
    const int64_t group = number / taps, tap = number - group * taps;
    pack<A>(
        channels, outs,
        [&](int64_t c, int64_t o) {
          return A(load(weight + ((group * outs + o) * channels + c) * taps + tap));
        },
        packed + number * size);
  }
}

// Splits a range at the borders of groups of `channels` channels, and calls
// function(group, begin, end) for each group's share in order.
template <typename F>
inline void for_groups(const ChannelRange& range, int64_t channels, const F& function) {
  for (int64_t begin = range.begin; begin < range.end;) {
    const int64_t group = begin / channels;
    const int64_t end = smaller(range.end, (group + 1) * channels);
    function(group, begin, end);
    begin = end;
  }
}

template <int R, typename A>
int64_t range_packed_size(const DeformConvNdShape<R>& shape, const ChannelRange& range) {
  int64_t size = 0;
  for_groups(range, shape.group_channels(), [&](int64_t, int64_t begin, int64_t end) {
    size += shape.taps() * mmdcn::packed_size<A>(shape.group_out_channels(), end - begin);
  });
  return size;
}

// The packed weights are in order of the taps, and those of a tap in order of the groups.
template <int R, typename T, typename A = accumulator_t<T>>
void pack_range(const DeformConvNdShape<R>& shape, const T* weight, const ChannelRange& range,
                A* packed) {
  const int64_t channels = shape.group_channels(), outs = shape.group_out_channels();
  const int64_t taps = shape.taps();
  for (int64_t tap = 0; tap < taps; ++tap) {
    for_groups(range, channels, [&](int64_t group, int64_t begin, int64_t end) {
      const T* first = weight + (group * outs * channels + begin - group * channels) * taps + tap;
      pack<A>(
          outs, end - begin,
          [&](int64_t o, int64_t c) { return A(load(first + (o * channels + c) * taps)); }, packed);
      packed += mmdcn::packed_size<A>(outs, end - begin);
    });
  }
}

}  // namespace
}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
