// Weights in rows of output channels, read from torch's order, for packing.
#pragma once

#include "../simd.h"
#include "../transpose.h"
#include "kernel.h"

namespace mmdcn {
namespace {

// Weights are packed in chunks of so many channels and taps.
constexpr int64_t kWeightChunk = 16;

// Calls `function(c, channels, t, taps)` for each chunk of a weight's channels and taps.
template <typename F>
inline void for_weight_chunks(int64_t channels, int64_t taps, const F& function) {
  for (int64_t c = 0; c < channels; c += kWeightChunk) {
    const int64_t some = channels - c < kWeightChunk ? channels - c : kWeightChunk;
    for (int64_t t = 0; t < taps; t += kWeightChunk) {
      function(c, some, t, taps - t < kWeightChunk ? taps - t : kWeightChunk);
    }
  }
}

// Loads the weights of `channels` input channels and `taps` taps, from (c, t) on, for `count`
// output channels, at most a register: rows[(k · taps + tap) · lanes + o], of which those for o >=
// count are left as they are. In the weight, either the taps of a channel or the channels of a tap
// are contiguous.
template <typename T, typename A>
inline void load_weight_rows(const T* weight, const WeightLayout& layout, int64_t count, int64_t c,
                             int64_t channels, int64_t t, int64_t taps, A* rows) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t out_stride = layout.out_stride;
  const T* source = weight + c * layout.channel_stride + t * layout.tap_stride;
  if (layout.tap_stride != 1) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      transpose<A>(source + tap * layout.tap_stride, out_stride, count, channels,
                   rows + tap * lanes, taps * lanes);
    }
  } else if (layout.channel_stride == taps) {
    transpose<A>(source, out_stride, count, channels * taps, rows, lanes);
  } else {
    for (int64_t k = 0; k < channels; ++k) {
      transpose<A>(source + k * layout.channel_stride, out_stride, count, taps,
                   rows + k * taps * lanes, lanes);
    }
  }
}

}  // namespace
}  // namespace mmdcn
