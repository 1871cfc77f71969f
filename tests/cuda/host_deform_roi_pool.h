// The launches of mmdcn/csrc/cuda/deform_roi_pool/kernels.cu, on the host.
#pragma once

#include "../../mmdcn/csrc/cuda/deform_roi_pool/backward.h"
#include "../../mmdcn/csrc/cuda/deform_roi_pool/forward.h"
#include "host_context.h"

namespace mmdcn::cuda {

template <typename Ctx, int V, typename scalar_t, typename acc_t>
struct HostRoIPool {
  static void forward(const DeformRoIPoolShape& shape, const scalar_t* input, const acc_t* rois,
                      const acc_t* offset, scalar_t* output) {
    const int64_t elements = shape.rois * shape.out_channels * shape.bins();
    poison(output, elements);
    run_blocks<Ctx, BinStorage<acc_t>>(kFewBlocks, [&](const Ctx& ctx, BinStorage<acc_t>& storage) {
      deform_roi_pool_forward_block<V>(ctx, shape, input, rois, offset, output, storage);
    });
    expect_stored(output, elements);
  }

  static void backward(const DeformRoIPoolShape& shape, const scalar_t* grad_output,
                       const scalar_t* input, const acc_t* rois, const acc_t* offset,
                       acc_t* grad_input, acc_t* grad_offset) {
    const int64_t offsets = shape.rois * 2 * shape.deform_groups * shape.bins();
    if (grad_offset) poison(grad_offset, offsets);
    run_blocks<Ctx, RoIPoolBackwardStorage<acc_t>>(
        kFewBlocks, [&](const Ctx& ctx, RoIPoolBackwardStorage<acc_t>& storage) {
          deform_roi_pool_backward_block<V>(ctx, shape, grad_output, input, rois, offset,
                                            grad_input, grad_offset, storage);
        });
    if (grad_offset) expect_stored(grad_offset, offsets);
  }
};

}  // namespace mmdcn::cuda
