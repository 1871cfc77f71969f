// The samples of deform_conv_nd in the forward pass, blended from their corners into columns.
#pragma once

#include "volume_samples.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

// Elements from the first corner of a sample to the next one along each dimension.
struct CornerSteps {
  int64_t pixel, line, plane;

  // To corner number q.
  int64_t corner(int q) const { return (q >> 2) * plane + (q >> 1 & 1) * line + (q & 1) * pixel; }
};

// The samples of one tap and one offset group.
//
// Two pointers, and not one to a structure with both arrays: GCC 12 then reaches the one array from
// an address in the other, takes that for an access to address 0, and drops the whole function.
template <typename A>
struct VolumeBlends {
  const uintptr_t* first;  // the address of each sample's first corner
  // Of the corners times the modulation, kMostPixels elements from corner to corner; these are
  // numbered as in sampling.h.
  const A* weight;
  CornerSteps to;
};

// Stores the channels of `kRegisters` registers, from number `channel` on, of sample number i.
template <int kRegisters, typename A>
__attribute__((always_inline)) inline void blend_registers(const VolumeBlends<A>& blends, int64_t i,
                                                           int64_t channel, A* column) {
  const A* first = reinterpret_cast<const A*>(blends.first[i]) + channel;
  register_t<A> sum[kRegisters];
#pragma GCC unroll 8
  for (int q = 0; q < 8; ++q) {
    const A* corner = first + blends.to.corner(q);
    const A weight = blends.weight[q * kMostPixels + i];
#pragma GCC unroll 4
    for (int j = 0; j < kRegisters; ++j) {
      const register_t<A> value = load_register(corner + j * kLanes<A>);
      sum[j] = q == 0 ? weight * value : sum[j] + weight * value;
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kRegisters; ++j) store_register(column + channel + j * kLanes<A>, sum[j]);
}

// The same for one channel.
template <typename A>
inline A blended(const VolumeBlends<A>& blends, int64_t i, int64_t channel) {
  const A* first = reinterpret_cast<const A*>(blends.first[i]) + channel;
  A sum = 0;
  for (int q = 0; q < 8; ++q) {
    sum += blends.weight[q * kMostPixels + i] * first[blends.to.corner(q)];
  }
  return sum;
}

// Stores the channels of the samples, which are those of `kRegisters` registers. Not inlined, so
// that the compiler has all registers for the addresses.
template <int kRegisters, typename A>
__attribute__((noinline)) void blend_samples(const VolumeBlends<A>& samples, int64_t pixels,
                                             A* column, int64_t row) {
  // A copy, as the compiler would otherwise read the pointers again after each store.
  const VolumeBlends<A> blends = samples;
  for (int64_t i = 0; i < pixels; ++i, column += row) {
    blend_registers<kRegisters>(blends, i, 0, column);
  }
}

// The same for any number of channels.
template <typename A>
__attribute__((noinline)) void blend_any(const VolumeBlends<A>& samples, int64_t pixels,
                                         int64_t channels, A* column, int64_t row) {
  const VolumeBlends<A> blends = samples;
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t i = 0; i < pixels; ++i, column += row) {
    int64_t c = 0;
    for (; c + 4 * lanes <= channels; c += 4 * lanes) blend_registers<4>(blends, i, c, column);
    for (; c + lanes <= channels; c += lanes) blend_registers<1>(blends, i, c, column);
    for (; c < channels; ++c) column[c] = blended(blends, i, c);
  }
}

// Stores all channels of the samples to columns, whose rows are `row` elements apart.
template <typename A>
inline void blend(const VolumeBlends<A>& blends, int64_t pixels, int64_t channels, A* column,
                  int64_t row) {
  constexpr int64_t lanes = kLanes<A>;
  if (channels == lanes) return blend_samples<1>(blends, pixels, column, row);
  if (channels == 2 * lanes) return blend_samples<2>(blends, pixels, column, row);
  if (channels == 4 * lanes) return blend_samples<4>(blends, pixels, column, row);
  blend_any(blends, pixels, channels, column, row);
}

}  // namespace
}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
