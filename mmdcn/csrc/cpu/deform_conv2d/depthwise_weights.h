// The weights of depthwise convolutions: a row of channels for each tap.
#pragma once

#include "../transpose.h"
#include "kernel.h"

namespace mmdcn {
namespace {

// packed[tap · channels + c] = the weight of channel number c, of `channels` from `weight` on.
template <typename T, typename A>
inline void pack_depthwise(const T* weight, const WeightLayout& layout, int64_t taps,
                           int64_t channels, A* packed) {
  if (layout.tap_stride == 1) {
    return transpose<A>(weight, layout.out_stride, channels, taps, packed, channels);
  }
  for (int64_t tap = 0; tap < taps; ++tap) {
    for (int64_t c = 0; c < channels; ++c) {
      packed[tap * channels + c] = load(weight + c * layout.out_stride + tap * layout.tap_stride);
    }
  }
}

// The gradient of the weight from sums in the same order, which are stored, or added.
template <bool add, typename T, typename A>
inline void unpack_depthwise(const A* sums, int64_t taps, int64_t channels, T* grad_weight,
                             const WeightLayout& layout) {
  if (layout.tap_stride == 1) {
    return transpose<A, add>(sums, channels, taps, channels, grad_weight, layout.out_stride);
  }
  for (int64_t tap = 0; tap < taps; ++tap) {
    for (int64_t c = 0; c < channels; ++c) {
      T* target = grad_weight + c * layout.out_stride + tap * layout.tap_stride;
      const A sum = sums[tap * channels + c];
      store(target, add ? A(load(target) + sum) : sum);
    }
  }
}

}  // namespace
}  // namespace mmdcn
