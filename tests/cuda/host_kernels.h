// The launches of mmdcn/csrc/cuda/deform_conv2d/*.cu, on the host.
#pragma once

#include "../../mmdcn/csrc/cuda/deform_conv2d/backward_data.h"
#include "../../mmdcn/csrc/cuda/deform_conv2d/backward_weight.h"
#include "../../mmdcn/csrc/cuda/deform_conv2d/fixed_point.h"
#include "../../mmdcn/csrc/cuda/deform_conv2d/forward.h"
#include "../../mmdcn/csrc/cuda/deform_conv2d/tensor_core_backward_data.h"
#include "../../mmdcn/csrc/cuda/deform_conv2d/tensor_core_backward_weight.h"
#include "../../mmdcn/csrc/cuda/deform_conv2d/tensor_core_forward.h"
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

  static void magnitudes(const DeformConv2dProblem& problem, const scalar_t* grad_output,
                         const scalar_t* weight, const acc_t* mask, int32_t* largest) {
    run_blocks<Ctx, MagnitudeStorage>(kHostBlocks, [&](const Ctx& ctx, MagnitudeStorage& storage) {
      deform_conv2d_magnitudes_block(ctx, problem, grad_output, weight, mask, largest, storage);
    });
  }

  static void from_fixed(const DeformConv2dProblem& problem, const GradInput& grad_input,
                         acc_t* sum) {
    const int64_t elements = problem.shape.batch * problem.input.batch;
    poison(sum, elements);
    run_blocks<Ctx, NoStorage>(kHostBlocks, [&](const Ctx& ctx, NoStorage&) {
      deform_conv2d_from_fixed_block(ctx, problem, grad_input.magnitudes, grad_input.fixed, sum);
    });
    expect_stored(sum, elements);
  }

  static void backward_data(const DeformConv2dProblem& problem, const scalar_t* grad_output,
                            const scalar_t* input, const acc_t* offset, const acc_t* mask,
                            const scalar_t* weight, const GradInput& grad_input, acc_t* grad_offset,
                            acc_t* grad_mask) {
    with_results_of_points(problem, grad_input, grad_offset, grad_mask, [&](const auto& sum) {
      run_blocks<Ctx, BackwardDataStorage<acc_t>>(
          kHostBlocks, [&](const Ctx& ctx, BackwardDataStorage<acc_t>& storage) {
            deform_conv2d_backward_data_block(ctx, problem, grad_output, input, offset, mask,
                                              weight, sum, grad_offset, grad_mask, storage);
          });
    });
  }

  static void backward_weight(const DeformConv2dProblem& problem, const scalar_t* grad_output,
                              const scalar_t* input, const acc_t* offset, const acc_t* mask,
                              int64_t splits, bool accumulate, acc_t* workspace) {
    const int64_t elements = splits * problem.shape.out_channels * problem.columns;
    if (!accumulate) poison(workspace, elements);
    run_blocks<Ctx, BackwardWeightStorage<acc_t>>(
        kHostBlocks, [&](const Ctx& ctx, BackwardWeightStorage<acc_t>& storage) {
          deform_conv2d_backward_weight_block(ctx, problem, grad_output, input, offset, mask,
                                              splits, accumulate, workspace, storage);
        });
    if (!accumulate) expect_stored(workspace, elements);
  }

  static void sum_splits(const DeformConv2dProblem& problem, int64_t splits, const acc_t* workspace,
                         scalar_t* grad_weight) {
    const int64_t elements = problem.shape.out_channels * problem.columns;
    poison(grad_weight, elements);
    run_blocks<Ctx, NoStorage>(kHostBlocks, [&](const Ctx& ctx, NoStorage&) {
      deform_conv2d_sum_splits_block(ctx, problem, splits, workspace, grad_weight);
    });
    expect_stored(grad_weight, elements);
  }

  // ---- on tensor cores

  template <int kPixels, int kOut>
  static void tensor_forward(const DeformConv2dProblem& problem, const scalar_t* input,
                             const acc_t* offset, const acc_t* mask, const scalar_t* weight,
                             const scalar_t* bias, scalar_t* output) {
    using Storage = TensorForwardStorage<scalar_t, kPixels, kOut>;
    const int64_t elements = problem.all_pixels * problem.shape.out_channels;
    poison(output, elements);
    run_blocks<Ctx, Storage>(kHostBlocks, [&](const Ctx& ctx, Storage& storage) {
      tensor_forward_block(ctx, problem, input, offset, mask, weight, bias, output, storage);
    });
    expect_stored(output, elements);
  }

  static void tensor_backward_data(const DeformConv2dProblem& problem, const scalar_t* grad_output,
                                   const scalar_t* input, const acc_t* offset, const acc_t* mask,
                                   const scalar_t* weight, const GradInput& grad_input,
                                   acc_t* grad_offset, acc_t* grad_mask) {
    with_results_of_points(problem, grad_input, grad_offset, grad_mask, [&](const auto& sum) {
      using Storage = TensorBackwardDataStorage<scalar_t>;
      run_blocks<Ctx, Storage>(kHostBlocks, [&](const Ctx& ctx, Storage& storage) {
        tensor_backward_data_block(ctx, problem, grad_output, input, offset, mask, weight, sum,
                                   grad_offset, grad_mask, storage);
      });
    });
  }

  static void tensor_backward_weight(const DeformConv2dProblem& problem,
                                     const scalar_t* grad_output, const scalar_t* input,
                                     const acc_t* offset, const acc_t* mask, int64_t splits,
                                     bool accumulate, acc_t* workspace) {
    using Storage = TensorBackwardWeightStorage<scalar_t>;
    const int64_t elements = splits * problem.shape.out_channels * problem.columns;
    if (!accumulate) poison(workspace, elements);
    run_blocks<Ctx, Storage>(kHostBlocks, [&](const Ctx& ctx, Storage& storage) {
      tensor_backward_weight_block(ctx, problem, grad_output, input, offset, mask, splits,
                                   accumulate, workspace, storage);
    });
    if (!accumulate) expect_stored(workspace, elements);
  }

 private:
  // Calls run(where the input's gradient is added up).
  template <typename Run>
  static void with_results_of_points(const DeformConv2dProblem& problem,
                                     const GradInput& grad_input, acc_t* grad_offset,
                                     acc_t* grad_mask, const Run& run) {
    const int64_t points = problem.all_pixels * problem.shape.deform_groups * problem.taps;
    if (grad_offset) poison(grad_offset, 2 * points);
    if (grad_mask) poison(grad_mask, points);
    if (grad_input.fixed) {
      run(FixedSum<acc_t>(problem, grad_input));
    } else {
      run(FloatingSum<acc_t>(problem, grad_input));
    }
    if (grad_offset) expect_stored(grad_offset, 2 * points);
    if (grad_mask) expect_stored(grad_mask, points);
  }
};

}  // namespace mmdcn::cuda
