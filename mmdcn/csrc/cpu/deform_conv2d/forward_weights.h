// The weights of the forward pass, packed into the panels that samples are multiplied with.
#pragma once

#include <algorithm>
#include <cstddef>

#include "../matmul.h"
#include "../pairs.h"
#include "../rows.h"
#include "weight_rows.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

// Whether samples are rounded to bfloat16 and multiplied in pairs of channels.
template <Sampling sampling, typename T>
inline bool in_pairs(const DeformConv2dShape& shape) {
  return kHasPairs && std::is_same_v<T, BFloat16> && sampling == Sampling::kRows &&
         (shape.groups == 1 || shape.group_channels() == 2 * pairs(shape.group_channels()));
}

// The number of blocks of output channels that threads compute each by itself. Threads that share
// the pixels pack some weights each, which the other cores then fetch from its caches. On
// processors whose cores do not share all caches, that takes about 58 / P of the time for P pixels.
// With a block of output channels for each thread no weights move, but each thread samples all of
// the input, which takes as long as multiplying by some 7 output channels.
template <Sampling sampling, typename T, typename A = accumulator_t<T>>
int64_t out_blocks(const DeformConv2dShape& shape, int64_t threads) {
  const bool even = shape.groups == 1 && shape.out_channels % (threads * kPanelWidth<A>) == 0;
  if (!even || sampling == Sampling::kPlanes) return 1;
  const int64_t pixels = shape.batch * shape.pixels();
  return 7 * (threads - 1) * pixels < 58 * shape.out_channels ? threads : 1;
}

// Bytes of the packed weights of one group and tap.
template <Sampling sampling, typename T, typename A = accumulator_t<T>>
inline int64_t tap_bytes(const DeformConv2dShape& shape) {
  const int64_t in = shape.group_channels(), out = shape.group_out_channels();
  if (in_pairs<sampling, T>(shape)) {
    return packed_size<A>(2 * pairs(in), out) * static_cast<int64_t>(sizeof(BFloat16));
  }
  return packed_size<A>(in, out) * static_cast<int64_t>(sizeof(A));
}

template <Sampling sampling, typename T>
int64_t packed_bytes(const DeformConv2dShape& shape) {
  return shape.groups * shape.taps() * tap_bytes<sampling, T>(shape);
}

// Weights of so many bytes or more leave a core's own caches before they are read again.
constexpr int64_t kFarBytes = 1 << 20;

// A slice of the weight is a register's width of output channels, half of a panel.
template <typename A>
inline int64_t group_slices(const DeformConv2dShape& shape) {
  return packed_size<A>(1, shape.group_out_channels()) / kLanes<A>;
}

template <typename T>
int64_t pack_slices(const DeformConv2dShape& shape) {
  return shape.groups * group_slices<accumulator_t<T>>(shape);
}

template <typename A>
struct WeightSlice {
  int64_t group, first, count;  // the output channels, numbered within the group
  int64_t panel, half;          // the first output channel of the panel, and the slice's in it

  WeightSlice(const DeformConv2dShape& shape, int64_t number) {
    constexpr int64_t lanes = kLanes<A>;
    const int64_t slice = number % group_slices<A>(shape);
    group = number / group_slices<A>(shape);
    first = slice * lanes;
    count = std::clamp<int64_t>(shape.group_out_channels() - first, 0, lanes);
    panel = slice / 2 * kPanelWidth<A>;
    half = slice % 2 * lanes;
  }
};

// Packs a slice of a weight whose channels are contiguous, which are read in sequence.
template <typename T, typename A>
inline void pack_channels(const DeformConv2dShape& shape, const T* source,
                          const WeightLayout& layout, const WeightSlice<A>& slice, int64_t per_tap,
                          std::byte* packed) {
  constexpr int64_t lanes = kLanes<A>, width = kPanelWidth<A>;
  const int64_t in = shape.group_channels();
  for (int64_t tap = 0; tap < shape.taps(); ++tap) {
    A* values = reinterpret_cast<A*>(packed + tap * per_tap) + slice.panel * in + slice.half;
    for (int64_t k = 0; k < in && slice.count < lanes; ++k) fill_zero(values + k * width, lanes);
    transpose<A>(source + tap * layout.tap_stride, layout.out_stride, slice.count, in, values,
                 width);
  }
}

// Stores rows of weights, `stride` apart, of some channels of one tap. `past_caches` is for packed
// weights that do not stay in the caches: their lines need not be fetched before they are written.
template <typename A>
inline void store_weight_rows(const A* rows, int64_t stride, int64_t channels, bool past_caches,
                              A* target) {
  for (int64_t k = 0; k < channels; ++k) {
    const register_t<A> values = load_register(rows + k * stride);
    if (past_caches) {
      stream_register(target + k * kPanelWidth<A>, values);
    } else {
      store_register(target + k * kPanelWidth<A>, values);
    }
  }
}

// Stores the same in pairs of channels, of which those from `channels` on are zeros.
template <typename A>
inline void store_weight_pairs(const A* rows, int64_t stride, int64_t channels, int64_t padded,
                               BFloat16* target) {
  const auto row = [&](int64_t k) {
    return k < channels ? load_register(rows + k * stride) : register_t<A>{};
  };
  for (int64_t k = 0; k < padded; k += 2) {
    if constexpr (kHasPairs && std::is_same_v<A, float>) {
      store_pairs(target + k * kPanelWidth<A>, paired(row(k), row(k + 1)));
    }
  }
}

// Packs a slice by chunks of channels and taps.
template <typename T, typename A>
inline void pack_chunks(const DeformConv2dShape& shape, const T* source, const WeightLayout& layout,
                        const WeightSlice<A>& slice, bool paired, bool past_caches, int64_t per_tap,
                        std::byte* packed) {
  constexpr int64_t lanes = kLanes<A>, width = kPanelWidth<A>;
  const int64_t in = shape.group_channels();
  for_weight_chunks(in, shape.taps(), [&](int64_t c, int64_t channels, int64_t t, int64_t taps) {
    A rows[kWeightChunk * kWeightChunk * lanes];
    if (slice.count < lanes) fill_zero(rows, channels * taps * lanes);
    load_weight_rows(source, layout, slice.count, c, channels, t, taps, rows);
    for (int64_t tap = 0; tap < taps; ++tap) {
      std::byte* target = packed + (t + tap) * per_tap;
      const A* first = rows + tap * lanes;
      if (paired) {
        const int64_t index = 2 * (slice.panel * pairs(in) + c / 2 * width + slice.half);
        const int64_t padded = c + channels == in ? 2 * pairs(in) - c : channels;
        store_weight_pairs(first, taps * lanes, channels, padded,
                           reinterpret_cast<BFloat16*>(target) + index);
      } else {
        const int64_t index = slice.panel * in + c * width + slice.half;
        store_weight_rows(first, taps * lanes, channels, past_caches,
                          reinterpret_cast<A*>(target) + index);
      }
    }
  });
}

// Packs slices [begin, end).
template <Sampling sampling, typename T, typename A = accumulator_t<T>>
void pack_weight(const DeformConv2dShape& shape, const T* weight, const WeightLayout& layout,
                 int64_t begin, int64_t end, std::byte* packed) {
  const int64_t per_tap = tap_bytes<sampling, T>(shape);
  const bool paired = in_pairs<sampling, T>(shape);
  const bool past_caches = packed_bytes<sampling, T>(shape) >= kFarBytes;
  for (int64_t number = begin; number < end; ++number) {
    const WeightSlice<A> slice(shape, number);
    const T* source =
        weight + (slice.group * shape.group_out_channels() + slice.first) * layout.out_stride;
    std::byte* target = packed + slice.group * shape.taps() * per_tap;
    if (!paired && layout.tap_stride != 1) {
      pack_channels(shape, source, layout, slice, per_tap, target);
    } else {
      pack_chunks(shape, source, layout, slice, paired, past_caches, per_tap, target);
    }
  }
  if (past_caches) finish_streams();
}

}  // namespace
}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
