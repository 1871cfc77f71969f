// Programs that work on tensors element by element.
#pragma once

#include "../integers.h"
#include "context.h"

namespace mmdcn::cuda {

template <typename Ctx, typename acc_t>
MMDCN_BLOCK void accumulate_block(const Ctx& ctx, int64_t elements, const acc_t* values,
                                  acc_t* sum) {
  const int64_t threads = ctx.blocks() * Ctx::kThreads;
  for (int64_t i = ctx.block() * Ctx::kThreads + ctx.thread(); i < elements; i += threads) {
    sum[i] += values[i];
  }
}

template <typename acc_t, typename Ctx, typename scalar_t>
MMDCN_BLOCK void add_bias_block(const Ctx& ctx, int64_t elements, int64_t channels, int64_t inner,
                                const scalar_t* bias, scalar_t* output) {
  const int64_t threads = ctx.blocks() * Ctx::kThreads;
  for (int64_t i = ctx.block() * Ctx::kThreads + ctx.thread(); i < elements; i += threads) {
    const int64_t line = divide(i, inner);
    const int64_t channel = line - divide(line, channels) * channels;
    output[i] =
        static_cast<scalar_t>(static_cast<acc_t>(output[i]) + static_cast<acc_t>(bias[channel]));
  }
}

}  // namespace mmdcn::cuda
