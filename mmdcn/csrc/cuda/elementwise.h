// Programs that work on tensors element by element.
#pragma once

#include "../integers.h"
#include "context.h"
#include "vector.h"

namespace mmdcn::cuda {

template <typename Ctx, typename acc_t>
MMDCN_BLOCK void accumulate_block(const Ctx& ctx, int64_t elements, const acc_t* values,
                                  acc_t* sum) {
  const int64_t threads = ctx.blocks() * Ctx::kThreads;
  for (int64_t i = ctx.block() * Ctx::kThreads + ctx.thread(); i < elements; i += threads) {
    sum[i] += values[i];
  }
}

// Adds a bias for each channel to V neighbouring elements at once. They are of the same channel,
// or, where `inner`, the number of neighbours of one channel, is one, of neighbouring channels.
template <int V, typename acc_t, typename Ctx, typename scalar_t>
MMDCN_BLOCK void add_bias_block(const Ctx& ctx, int64_t elements, int64_t channels, int64_t inner,
                                const scalar_t* bias, scalar_t* output) {
  const int64_t threads = ctx.blocks() * Ctx::kThreads;
  const int64_t first = ctx.block() * Ctx::kThreads + ctx.thread();
  for (int64_t i = first * V; i < elements; i += threads * V) {
    const int64_t line = divide(i, inner);
    const int64_t channel = line - divide(line, channels) * channels;
    auto& sums = *reinterpret_cast<Vector<scalar_t, V>*>(output + i);
    Vector<scalar_t, V> vector = sums;
    MMDCN_UNROLL
    for (int j = 0; j < V; ++j) {
      const scalar_t addend = bias[inner == 1 ? channel + j : channel];
      vector.value[j] =
          static_cast<scalar_t>(static_cast<acc_t>(vector.value[j]) + static_cast<acc_t>(addend));
    }
    sums = vector;
  }
}

// Whether V elements at once are what add_bias_block takes.
constexpr bool adds_bias_to_vectors(int vector, int64_t channels, int64_t inner) {
  return inner % vector == 0 || (inner == 1 && channels % vector == 0);
}

}  // namespace mmdcn::cuda
