// The launches of mmdcn/csrc/cuda/deform_aggregate/kernels.cu, on the host.
#pragma once

#include "../../mmdcn/csrc/cuda/deform_aggregate/backward.h"
#include "../../mmdcn/csrc/cuda/deform_aggregate/forward.h"
#include "host_context.h"

namespace mmdcn::cuda {

template <typename Ctx, int V, typename scalar_t, typename acc_t>
struct HostAggregate {
  static void forward(const AggregateProblem& problem, const scalar_t* input, const acc_t* offset,
                      const acc_t* mask, scalar_t* output) {
    const int64_t elements = problem.shape.batch * problem.shape.pixels() * problem.shape.channels;
    poison(output, elements);
    run_blocks<Ctx, AggregateForwardStorage<acc_t>>(
        kFewBlocks, [&](const Ctx& ctx, AggregateForwardStorage<acc_t>& storage) {
          aggregate_forward_block<V>(ctx, problem, input, offset, mask, output, storage);
        });
    expect_stored(output, elements);
  }

  static void backward(const AggregateProblem& problem, const scalar_t* grad_output,
                       const scalar_t* input, const acc_t* offset, const acc_t* mask,
                       acc_t* grad_input, acc_t* grad_offset, acc_t* grad_mask) {
    const int64_t samples = all_points(problem.shape) * problem.shape.taps();
    if (grad_offset) poison(grad_offset, 2 * samples);
    if (grad_mask) poison(grad_mask, samples);
    run_blocks<Ctx, AggregateBackwardStorage<acc_t>>(
        kFewBlocks, [&](const Ctx& ctx, AggregateBackwardStorage<acc_t>& storage) {
          aggregate_backward_block<V>(ctx, problem, grad_output, input, offset, mask, grad_input,
                                      grad_offset, grad_mask, storage);
        });
    if (grad_offset) expect_stored(grad_offset, 2 * samples);
    if (grad_mask) expect_stored(grad_mask, samples);
  }
};

}  // namespace mmdcn::cuda
