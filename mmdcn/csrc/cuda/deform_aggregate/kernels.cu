// Kernels and launches of deformable aggregation: the block programs, bound to the GPU.
#include "../operator.cuh"
#include "backward.h"
#include "forward.h"
#include "kernels.h"

namespace mmdcn::cuda {
namespace {

template <int V, typename scalar_t, typename acc_t>
MMDCN_KERNEL_OF(3)
forward_kernel(const AggregateProblem problem, const scalar_t* input, const acc_t* offset,
               const acc_t* mask, scalar_t* output) {
  __shared__ AggregateForwardStorage<acc_t> storage;
  aggregate_forward_block<V>(DeviceContext{}, problem, input, offset, mask, output, storage);
}

template <int V, typename scalar_t, typename acc_t>
MMDCN_KERNEL backward_kernel(const AggregateProblem problem, const scalar_t* grad_output,
                             const scalar_t* input, const acc_t* offset, const acc_t* mask,
                             acc_t* grad_input, acc_t* grad_offset, acc_t* grad_mask) {
  __shared__ AggregateBackwardStorage<acc_t> storage;
  aggregate_backward_block<V>(DeviceContext{}, problem, grad_output, input, offset, mask,
                              grad_input, grad_offset, grad_mask, storage);
}

int64_t blocks_for(const DeformAggregateShape& shape) {
  return tiles(shape.batch * shape.pixels() * shape.groups, kPoints);
}

}  // namespace

void aggregate_forward(Precision precision, const AggregateProblem& problem, const void* input,
                       const void* offset, const void* mask, void* output, const Stream& stream) {
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    constexpr int kVector = aggregate_vector(sizeof(scalar_t));
    const auto run = [&](auto kernel) {
      launch(kernel, blocks_for(problem.shape), stream, problem,
             static_cast<const scalar_t*>(input), static_cast<const acc_t*>(offset),
             static_cast<const acc_t*>(mask), static_cast<scalar_t*>(output));
    };
    problem.shape.group_channels() % kVector == 0 ? run(forward_kernel<kVector, scalar_t, acc_t>)
                                                  : run(forward_kernel<1, scalar_t, acc_t>);
  });
}

void aggregate_backward(Precision precision, const AggregateProblem& problem,
                        const void* grad_output, const void* input, const void* offset,
                        const void* mask, void* grad_input, void* grad_offset, void* grad_mask,
                        const Stream& stream) {
  const bool adds_vectors = !grad_input || adds_vectors_at_once(stream.device);
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    constexpr int kVector = aggregate_vector(sizeof(scalar_t));
    const auto run = [&](auto kernel) {
      launch(kernel, blocks_for(problem.shape), stream, problem,
             static_cast<const scalar_t*>(grad_output), static_cast<const scalar_t*>(input),
             static_cast<const acc_t*>(offset), static_cast<const acc_t*>(mask),
             static_cast<acc_t*>(grad_input), static_cast<acc_t*>(grad_offset),
             static_cast<acc_t*>(grad_mask));
    };
    const bool whole = adds_vectors && problem.shape.group_channels() % kVector == 0;
    whole ? run(backward_kernel<kVector, scalar_t, acc_t>)
          : run(backward_kernel<1, scalar_t, acc_t>);
  });
}

}  // namespace mmdcn::cuda
