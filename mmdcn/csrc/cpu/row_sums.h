// Sums over the samples of an output pixel, for operators that do without a matrix product:
//
//   Y[c] = start[c] + Σ_k weight_k[c] Σ_q G(q, p_k) m_k X(q)[c]
//
// where weight_k[c] is that of a depthwise convolution, or 1.
#pragma once

#include "row_corners.h"

namespace mmdcn {
namespace {

// The samples of one output pixel, tap by tap. For corner number q of tap number k, the address is
// corner[q · quantity + k · corner_tap], and the weight is weight[q · quantity + k · weight_tap].
template <typename A>
struct PixelSamples {
  const uintptr_t* corner;
  const A* weight;
  int64_t quantity, corner_tap, weight_tap;
  int64_t count;  // of taps
};

// The weights of a depthwise convolution: those of tap number k are at data + k · stride.
template <typename A>
struct TapWeights {
  const A* data;
  int64_t stride;
};
// The weights of an operator that has none.
struct NoTapWeights {};

// The sums of `kRegisters` registers of channels from number `channel` on.
template <int kRegisters, typename S, typename A, typename Weights, typename T>
inline void sum_registers(const PixelSamples<A>& samples, const Weights& weights, int64_t channel,
                          const A* start, T* target) {
  constexpr bool weighted = !std::is_same_v<Weights, NoTapWeights>;
  constexpr int64_t lanes = kLanes<A>;
  register_t<A> sum[kRegisters] = {};
  if (start) {
#pragma GCC unroll 8
    for (int j = 0; j < kRegisters; ++j) sum[j] = load_register(start + channel + j * lanes);
  }
  for (int64_t k = 0; k < samples.count; ++k) {
    const S* row[4];
    A weight[4];
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const uintptr_t address = samples.corner[q * samples.quantity + k * samples.corner_tap];
      row[q] = reinterpret_cast<const S*>(address) + channel;
      weight[q] = samples.weight[q * samples.quantity + k * samples.weight_tap];
    }
#pragma GCC unroll 8
    for (int j = 0; j < kRegisters; ++j) {
      register_t<A> blended = weight[0] * load_register(row[0] + j * lanes);
#pragma GCC unroll 4
      for (int q = 1; q < 4; ++q) blended += weight[q] * load_register(row[q] + j * lanes);
      if constexpr (weighted) {
        sum[j] += blended * load_register(weights.data + k * weights.stride + channel + j * lanes);
      } else {
        sum[j] += blended;
      }
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kRegisters; ++j) store_register(target + channel + j * lanes, sum[j]);
}

// The sum of one channel.
template <typename S, typename A, typename Weights>
inline A sum_channel(const PixelSamples<A>& samples, const Weights& weights, int64_t channel,
                     A sum) {
  for (int64_t k = 0; k < samples.count; ++k) {
    A blended = 0;
    for (int q = 0; q < 4; ++q) {
      const uintptr_t address = samples.corner[q * samples.quantity + k * samples.corner_tap];
      blended += samples.weight[q * samples.quantity + k * samples.weight_tap] *
                 load(reinterpret_cast<const S*>(address) + channel);
    }
    if constexpr (std::is_same_v<Weights, NoTapWeights>) {
      sum += blended;
    } else {
      sum += blended * weights.data[k * weights.stride + channel];
    }
  }
  return sum;
}

// target[c] = Y[c] for `channels` channels, whose corners are read as S. `start` may be null, for
// zeros.
template <typename S, typename A, typename Weights, typename T>
inline void sum_samples(const PixelSamples<A>& samples, const Weights& weights, int64_t channels,
                        const A* start, T* target) {
  constexpr int64_t lanes = kLanes<A>;
  int64_t c = 0;
  for (; c + 8 * lanes <= channels; c += 8 * lanes) {
    sum_registers<8, S>(samples, weights, c, start, target);
  }
  for (; c + 4 * lanes <= channels; c += 4 * lanes) {
    sum_registers<4, S>(samples, weights, c, start, target);
  }
  for (; c + 2 * lanes <= channels; c += 2 * lanes) {
    sum_registers<2, S>(samples, weights, c, start, target);
  }
  for (; c + lanes <= channels; c += lanes) {
    sum_registers<1, S>(samples, weights, c, start, target);
  }
  for (; c < channels; ++c) {
    store(target + c, sum_channel<S>(samples, weights, c, start ? start[c] : A(0)));
  }
}

}  // namespace
}  // namespace mmdcn
