// Kernels and launches of deformable convolution: the block programs, bound to the GPU.
#include <algorithm>

#include "../operator.cuh"
#include "backward_data.h"
#include "backward_weight.h"
#include "fixed_point.h"
#include "forward.h"
#include "tensor_core.h"

namespace mmdcn::cuda {
namespace {

template <typename scalar_t, typename acc_t>
MMDCN_KERNEL forward_kernel(const DeformConv2dProblem problem, const scalar_t* input,
                            const acc_t* offset, const acc_t* mask, const scalar_t* weight,
                            const scalar_t* bias, scalar_t* output) {
  __shared__ ForwardStorage<acc_t> storage;
  deform_conv2d_forward_block(DeviceContext{}, problem, input, offset, mask, weight, bias, output,
                              storage);
}

template <typename scalar_t, typename acc_t, typename Sum>
MMDCN_KERNEL backward_data_kernel(const DeformConv2dProblem problem, const scalar_t* grad_output,
                                  const scalar_t* input, const acc_t* offset, const acc_t* mask,
                                  const scalar_t* weight, const GradInput grad_input,
                                  acc_t* grad_offset, acc_t* grad_mask) {
  __shared__ BackwardDataStorage<acc_t> storage;
  deform_conv2d_backward_data_block(DeviceContext{}, problem, grad_output, input, offset, mask,
                                    weight, Sum(problem, grad_input), grad_offset, grad_mask,
                                    storage);
}

template <typename scalar_t, typename acc_t>
MMDCN_KERNEL magnitudes_kernel(const DeformConv2dProblem problem, const scalar_t* grad_output,
                               const scalar_t* weight, const acc_t* mask, int32_t* magnitudes) {
  __shared__ MagnitudeStorage storage;
  deform_conv2d_magnitudes_block(DeviceContext{}, problem, grad_output, weight, mask, magnitudes,
                                 storage);
}

template <typename acc_t>
MMDCN_KERNEL from_fixed_kernel(const DeformConv2dProblem problem, const int32_t* magnitudes,
                               const int64_t* fixed, acc_t* sum) {
  deform_conv2d_from_fixed_block(DeviceContext{}, problem, magnitudes, fixed, sum);
}

template <typename scalar_t, typename acc_t>
MMDCN_KERNEL backward_weight_kernel(const DeformConv2dProblem problem, const scalar_t* grad_output,
                                    const scalar_t* input, const acc_t* offset, const acc_t* mask,
                                    int64_t splits, bool accumulate, acc_t* workspace) {
  __shared__ BackwardWeightStorage<acc_t> storage;
  deform_conv2d_backward_weight_block(DeviceContext{}, problem, grad_output, input, offset, mask,
                                      splits, accumulate, workspace, storage);
}

template <typename scalar_t, typename acc_t>
MMDCN_KERNEL sum_splits_kernel(const DeformConv2dProblem problem, int64_t splits,
                               const acc_t* workspace, scalar_t* grad_weight) {
  deform_conv2d_sum_splits_block(DeviceContext{}, problem, splits, workspace, grad_weight);
}

}  // namespace

int64_t deform_conv2d_workspace_bytes() { return 32 << 20; }

void deform_conv2d_forward(Kernels kernels, Precision precision, const DeformConv2dProblem& problem,
                           const void* input, const void* offset, const void* mask,
                           const void* weight, const void* bias, void* output,
                           const Stream& stream) {
  if (kernels == Kernels::kTensorCore) {
    return tensor_forward(precision, problem, input, static_cast<const float*>(offset),
                          static_cast<const float*>(mask), weight, bias, output, stream);
  }
  const int64_t blocks = tiles(problem.all_pixels, kTile) * problem.shape.groups *
                         tiles(problem.group_out_channels, kTile);
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    launch(forward_kernel<scalar_t, acc_t>, blocks, 0, stream, problem,
           static_cast<const scalar_t*>(input), static_cast<const acc_t*>(offset),
           static_cast<const acc_t*>(mask), static_cast<const scalar_t*>(weight),
           static_cast<const scalar_t*>(bias), static_cast<scalar_t*>(output));
  });
}

void deform_conv2d_magnitudes(Precision precision, const DeformConv2dProblem& problem,
                              const void* grad_output, const void* weight, const void* mask,
                              int32_t* magnitudes, const Stream& stream) {
  // All of a large GPU, a few blocks on each multiprocessor.
  constexpr int64_t kMostBlocks = 528;
  const int64_t elements = std::max(problem.all_pixels * problem.shape.out_channels,
                                    problem.shape.out_channels * problem.columns);
  const int64_t blocks = std::min(kMostBlocks, tiles(elements, DeviceContext::kThreads));
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    launch(magnitudes_kernel<scalar_t, acc_t>, blocks, 0, stream, problem,
           static_cast<const scalar_t*>(grad_output), static_cast<const scalar_t*>(weight),
           static_cast<const acc_t*>(mask), magnitudes);
  });
}

void deform_conv2d_backward_data(Kernels kernels, Precision precision,
                                 const DeformConv2dProblem& problem, const void* grad_output,
                                 const void* input, const void* offset, const void* mask,
                                 const void* weight, const GradInput& grad_input, void* grad_offset,
                                 void* grad_mask, const Stream& stream) {
  if (kernels == Kernels::kTensorCore) {
    return tensor_backward_data(precision, problem, grad_output, input,
                                static_cast<const float*>(offset), static_cast<const float*>(mask),
                                weight, grad_input, static_cast<float*>(grad_offset),
                                static_cast<float*>(grad_mask), stream);
  }
  // One block, or nearly so, for each tile of pixels, tap and tile of channels.
  const int64_t blocks =
      tiles(problem.all_pixels, kTile) * problem.taps * tiles(problem.shape.channels, kTile);
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    const auto kernel = grad_input.fixed
                            ? backward_data_kernel<scalar_t, acc_t, FixedSum<acc_t>>
                            : backward_data_kernel<scalar_t, acc_t, FloatingSum<acc_t>>;
    launch(kernel, blocks, 0, stream, problem, static_cast<const scalar_t*>(grad_output),
           static_cast<const scalar_t*>(input), static_cast<const acc_t*>(offset),
           static_cast<const acc_t*>(mask), static_cast<const scalar_t*>(weight), grad_input,
           static_cast<acc_t*>(grad_offset), static_cast<acc_t*>(grad_mask));
  });
}

void deform_conv2d_from_fixed(Precision precision, const DeformConv2dProblem& problem,
                              const GradInput& grad_input, void* sum, const Stream& stream) {
  const int64_t blocks = tiles(problem.shape.batch * problem.input.batch, DeviceContext::kThreads);
  dispatch(precision, [&](auto, auto acc) {
    using acc_t = typename decltype(acc)::type;
    launch(from_fixed_kernel<acc_t>, blocks, 0, stream, problem, grad_input.magnitudes,
           static_cast<const int64_t*>(grad_input.fixed), static_cast<acc_t*>(sum));
  });
}

int64_t deform_conv2d_weight_splits(Kernels kernels, Precision precision,
                                    const DeformConv2dProblem& problem) {
  if (kernels == Kernels::kTensorCore) return tensor_weight_splits(precision, problem);
  // Enough blocks for the largest GPUs of today (132 multiprocessors, several blocks on each); the
  // same on all of them, so that results do not depend on the machine.
  constexpr int64_t kBlocks = 512;
  const int64_t blocks = problem.shape.groups * tiles(problem.columns, kTile) *
                         tiles(problem.group_out_channels, kTile);
  return std::max<int64_t>(1, std::min(kBlocks / blocks, tiles(problem.all_pixels, kDepth)));
}

void deform_conv2d_backward_weight(Kernels kernels, Precision precision,
                                   const DeformConv2dProblem& problem, const void* grad_output,
                                   const void* input, const void* offset, const void* mask,
                                   int64_t splits, bool accumulate, void* workspace,
                                   const Stream& stream) {
  if (kernels == Kernels::kTensorCore) {
    return tensor_backward_weight(precision, problem, grad_output, input,
                                  static_cast<const float*>(offset),
                                  static_cast<const float*>(mask), splits, accumulate,
                                  static_cast<float*>(workspace), stream);
  }
  const int64_t blocks = splits * problem.shape.groups * tiles(problem.columns, kTile) *
                         tiles(problem.group_out_channels, kTile);
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    launch(backward_weight_kernel<scalar_t, acc_t>, blocks, 0, stream, problem,
           static_cast<const scalar_t*>(grad_output), static_cast<const scalar_t*>(input),
           static_cast<const acc_t*>(offset), static_cast<const acc_t*>(mask), splits, accumulate,
           static_cast<acc_t*>(workspace));
  });
}

void deform_conv2d_sum_splits(Precision precision, const DeformConv2dProblem& problem,
                              int64_t splits, const void* workspace, void* grad_weight,
                              const Stream& stream) {
  const int64_t elements = problem.shape.out_channels * problem.columns;
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    launch(sum_splits_kernel<scalar_t, acc_t>, tiles(elements, DeviceContext::kThreads), 0, stream,
           problem, splits, static_cast<const acc_t*>(workspace),
           static_cast<scalar_t*>(grad_weight));
  });
}

}  // namespace mmdcn::cuda
