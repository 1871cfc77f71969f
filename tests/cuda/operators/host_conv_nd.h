// The launches of mmdcn/csrc/cuda/deform_conv_nd/kernels.cu, on the host.
#pragma once

#include "../../../mmdcn/csrc/cuda/deform_conv_nd/backward.h"
#include "../../../mmdcn/csrc/cuda/deform_conv_nd/forward.h"
#include "../host_context.h"
#include "blocks.h"

namespace mmdcn::cuda {

template <typename Ctx, int R, typename scalar_t, typename acc_t>
struct HostConvNd {
  using Problem = ConvNdProblem<R>;

  static void forward(const Problem& problem, const scalar_t* input, const acc_t* offset,
                      const acc_t* mask, const scalar_t* weight, const scalar_t* bias,
                      scalar_t* output) {
    const int64_t elements = all_pixels(problem) * problem.shape.out_channels;
    poison(output, elements);
    using Storage = ConvNdForwardStorage<acc_t, R>;
    run_blocks<Ctx, Storage>(kFewBlocks, [&](const Ctx& ctx, Storage& storage) {
      conv_nd_forward_block(ctx, problem, input, offset, mask, weight, bias, output, storage);
    });
    expect_stored(output, elements);
  }

  static void backward_data(const Problem& problem, const scalar_t* grad_output,
                            const scalar_t* input, const acc_t* offset, const acc_t* mask,
                            const scalar_t* weight, acc_t* grad_input, acc_t* grad_offset,
                            acc_t* grad_mask) {
    const int64_t samples = all_pixels(problem) * problem.shape.samples();
    if (grad_offset) poison(grad_offset, R * samples);
    if (grad_mask) poison(grad_mask, samples);
    using Storage = ConvNdBackwardStorage<acc_t, R>;
    run_blocks<Ctx, Storage>(kFewBlocks, [&](const Ctx& ctx, Storage& storage) {
      conv_nd_backward_data_block(ctx, problem, grad_output, input, offset, mask, weight,
                                  grad_input, grad_offset, grad_mask, storage);
    });
    if (grad_offset) expect_stored(grad_offset, R * samples);
    if (grad_mask) expect_stored(grad_mask, samples);
  }

  static void backward_weight(const Problem& problem, const scalar_t* grad_output,
                              const scalar_t* input, const acc_t* offset, const acc_t* mask,
                              scalar_t* grad_weight) {
    const DeformConvNdShape<R>& shape = problem.shape;
    const int64_t elements = shape.out_channels * shape.group_channels() * shape.taps();
    poison(grad_weight, elements);
    using Storage = ConvNdWeightStorage<acc_t, R>;
    run_blocks<Ctx, Storage>(kFewBlocks, [&](const Ctx& ctx, Storage& storage) {
      conv_nd_backward_weight_block(ctx, problem, grad_output, input, offset, mask, grad_weight,
                                    storage);
    });
    expect_stored(grad_weight, elements);
  }
};

}  // namespace mmdcn::cuda
