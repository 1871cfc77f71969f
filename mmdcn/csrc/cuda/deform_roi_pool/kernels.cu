// Kernels and launches of deformable RoI pooling: the block programs, bound to the GPU.
#include "../operator.cuh"
#include "backward.h"
#include "forward.h"
#include "kernels.h"

namespace mmdcn::cuda {
namespace {

template <int V, typename scalar_t, typename acc_t>
MMDCN_KERNEL forward_kernel(const DeformRoIPoolShape shape, const scalar_t* input,
                            const acc_t* rois, const acc_t* offset, scalar_t* output) {
  __shared__ BinStorage<acc_t> storage;
  deform_roi_pool_forward_block<V>(DeviceContext{}, shape, input, rois, offset, output, storage);
}

template <int V, typename scalar_t, typename acc_t>
MMDCN_KERNEL backward_kernel(const DeformRoIPoolShape shape, const scalar_t* grad_output,
                             const scalar_t* input, const acc_t* rois, const acc_t* offset,
                             acc_t* grad_input, acc_t* grad_offset) {
  __shared__ RoIPoolBackwardStorage<acc_t> storage;
  deform_roi_pool_backward_block<V>(DeviceContext{}, shape, grad_output, input, rois, offset,
                                    grad_input, grad_offset, storage);
}

int64_t blocks_for(const DeformRoIPoolShape& shape) {
  return tiles(shape.rois * shape.deform_groups * shape.bins(), kBins);
}

}  // namespace

void roi_pool_forward(Precision precision, const DeformRoIPoolShape& shape, const void* input,
                      const void* rois, const void* offset, void* output, const Stream& stream) {
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    const auto run = [&](auto kernel) {
      launch(kernel, blocks_for(shape), stream, shape, static_cast<const scalar_t*>(input),
             static_cast<const acc_t*>(rois), static_cast<const acc_t*>(offset),
             static_cast<scalar_t*>(output));
    };
    constexpr int kVector = roi_pool_vector(sizeof(scalar_t));
    shape.deform_group_channels() % kVector == 0 ? run(forward_kernel<kVector, scalar_t, acc_t>)
                                                 : run(forward_kernel<1, scalar_t, acc_t>);
  });
}

void roi_pool_backward(Precision precision, const DeformRoIPoolShape& shape,
                       const void* grad_output, const void* input, const void* rois,
                       const void* offset, void* grad_input, void* grad_offset,
                       const Stream& stream) {
  const bool adds_vectors = !grad_input || adds_vectors_at_once(stream.device);
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    const auto run = [&](auto kernel) {
      launch(kernel, blocks_for(shape), stream, shape, static_cast<const scalar_t*>(grad_output),
             static_cast<const scalar_t*>(input), static_cast<const acc_t*>(rois),
             static_cast<const acc_t*>(offset), static_cast<acc_t*>(grad_input),
             static_cast<acc_t*>(grad_offset));
    };
    constexpr int kVector = roi_pool_vector(sizeof(scalar_t));
    const bool whole = adds_vectors && shape.deform_group_channels() % kVector == 0;
    whole ? run(backward_kernel<kVector, scalar_t, acc_t>)
          : run(backward_kernel<1, scalar_t, acc_t>);
  });
}

}  // namespace mmdcn::cuda
