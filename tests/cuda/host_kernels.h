// The launches of mmdcn/csrc/cuda/deform_conv2d.cu, on the host.
#pragma once

#include "../../mmdcn/csrc/cuda/deform_conv2d_backward_data.h"
#include "../../mmdcn/csrc/cuda/deform_conv2d_backward_weight.h"
#include "../../mmdcn/csrc/cuda/deform_conv2d_forward.h"
#include "host_context.h"

namespace mmdcn::cuda {

// Fewer blocks than tiles, so that blocks stride over several.
constexpr int64_t kHostBlocks = 3;

struct NoStorage {};

template <typename Ctx, typename scalar_t, typename acc_t>
struct HostKernels {
  static void forward(const DeformConv2dProblem& problem, const scalar_t* input,
                      const acc_t* offset, const acc_t* mask, const scalar_t* weight,
                      const scalar_t* bias, scalar_t* output) {
    const int64_t elements = problem.all_pixels * problem.shape.out_channels;
    poison(output, elements);
    run_blocks<Ctx, ForwardStorage<acc_t>>(kHostBlocks, [&](const Ctx& ctx,
                                                            ForwardStorage<acc_t>& storage) {
      deform_conv2d_forward_block(ctx, problem, input, offset, mask, weight, bias, output, storage);
    });
    expect_stored(output, elements);
  }

  static void backward_data(const DeformConv2dProblem& problem, const scalar_t* grad_output,
                            const scalar_t* input, const acc_t* offset, const acc_t* mask,
                            const scalar_t* weight, acc_t* grad_input, acc_t* grad_offset,
                            acc_t* grad_mask) {
    const int64_t points = problem.all_pixels * problem.shape.deform_groups * problem.taps;
    if (grad_offset) poison(grad_offset, 2 * points);
    if (grad_mask) poison(grad_mask, points);
    run_blocks<Ctx, BackwardDataStorage<acc_t>>(
        kHostBlocks, [&](const Ctx& ctx, BackwardDataStorage<acc_t>& storage) {
          deform_conv2d_backward_data_block(ctx, problem, grad_output, input, offset, mask, weight,
                                            grad_input, grad_offset, grad_mask, storage);
        });
    if (grad_offset) expect_stored(grad_offset, 2 * points);
    if (grad_mask) expect_stored(grad_mask, points);
  }

  static void backward_weight(const DeformConv2dProblem& problem, const scalar_t* grad_output,
                              const scalar_t* input, const acc_t* offset, const acc_t* mask,
                              int64_t splits, acc_t* workspace, scalar_t* grad_weight) {
    const int64_t elements = problem.shape.out_channels * problem.columns;
    poison(workspace, splits * elements);
    run_blocks<Ctx, BackwardWeightStorage<acc_t>>(
        kHostBlocks, [&](const Ctx& ctx, BackwardWeightStorage<acc_t>& storage) {
          deform_conv2d_backward_weight_block(ctx, problem, grad_output, input, offset, mask,
                                              splits, workspace, storage);
        });
    expect_stored(workspace, splits * elements);
    poison(grad_weight, elements);
    run_blocks<Ctx, NoStorage>(kHostBlocks, [&](const Ctx& ctx, NoStorage&) {
      deform_conv2d_sum_splits_block(ctx, problem, splits, workspace, grad_weight);
    });
    expect_stored(grad_weight, elements);
  }
};

}  // namespace mmdcn::cuda
