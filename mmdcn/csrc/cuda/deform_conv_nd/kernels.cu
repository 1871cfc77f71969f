// Kernels and launches of deformable convolution over R dimensions: the block programs, bound to
// the GPU.
#include "../operator.cuh"
#include "backward.h"
#include "forward.h"
#include "kernels.h"

namespace mmdcn::cuda {
namespace {

template <int R, typename scalar_t, typename acc_t>
MMDCN_KERNEL forward_kernel(const ConvNdProblem<R> problem, const scalar_t* input,
                            const acc_t* offset, const acc_t* mask, const scalar_t* weight,
                            const scalar_t* bias, scalar_t* output) {
  __shared__ ConvNdForwardStorage<acc_t, R> storage;
  conv_nd_forward_block(DeviceContext{}, problem, input, offset, mask, weight, bias, output,
                        storage);
}

template <int R, typename scalar_t, typename acc_t>
MMDCN_KERNEL backward_data_kernel(const ConvNdProblem<R> problem, const scalar_t* grad_output,
                                  const scalar_t* input, const acc_t* offset, const acc_t* mask,
                                  const scalar_t* weight, acc_t* grad_input, acc_t* grad_offset,
                                  acc_t* grad_mask) {
  __shared__ ConvNdBackwardStorage<acc_t, R> storage;
  conv_nd_backward_data_block(DeviceContext{}, problem, grad_output, input, offset, mask, weight,
                              grad_input, grad_offset, grad_mask, storage);
}

template <int R, typename scalar_t, typename acc_t>
MMDCN_KERNEL backward_weight_kernel(const ConvNdProblem<R> problem, const scalar_t* grad_output,
                                    const scalar_t* input, const acc_t* offset, const acc_t* mask,
                                    scalar_t* grad_weight) {
  __shared__ ConvNdWeightStorage<acc_t, R> storage;
  conv_nd_backward_weight_block(DeviceContext{}, problem, grad_output, input, offset, mask,
                                grad_weight, storage);
}

}  // namespace

template <int R>
void conv_nd_forward(Precision precision, const ConvNdProblem<R>& problem, const void* input,
                     const void* offset, const void* mask, const void* weight, const void* bias,
                     void* output, const Stream& stream) {
  const DeformConvNdShape<R>& shape = problem.shape;
  const int64_t blocks = tiles(shape.batch * shape.pixels(), kTile) * shape.groups *
                         tiles(shape.group_out_channels(), kTile);
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    launch(forward_kernel<R, scalar_t, acc_t>, blocks, 0, stream, problem,
           static_cast<const scalar_t*>(input), static_cast<const acc_t*>(offset),
           static_cast<const acc_t*>(mask), static_cast<const scalar_t*>(weight),
           static_cast<const scalar_t*>(bias), static_cast<scalar_t*>(output));
  });
}

template <int R>
void conv_nd_backward_data(Precision precision, const ConvNdProblem<R>& problem,
                           const void* grad_output, const void* input, const void* offset,
                           const void* mask, const void* weight, void* grad_input,
                           void* grad_offset, void* grad_mask, const Stream& stream) {
  const DeformConvNdShape<R>& shape = problem.shape;
  const int64_t blocks = tiles(shape.batch * shape.pixels(), kNdPixels) * shape.samples();
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    launch(backward_data_kernel<R, scalar_t, acc_t>, blocks, 0, stream, problem,
           static_cast<const scalar_t*>(grad_output), static_cast<const scalar_t*>(input),
           static_cast<const acc_t*>(offset), static_cast<const acc_t*>(mask),
           static_cast<const scalar_t*>(weight), static_cast<acc_t*>(grad_input),
           static_cast<acc_t*>(grad_offset), static_cast<acc_t*>(grad_mask));
  });
}

template <int R>
void conv_nd_backward_weight(Precision precision, const ConvNdProblem<R>& problem,
                             const void* grad_output, const void* input, const void* offset,
                             const void* mask, void* grad_weight, const Stream& stream) {
  const DeformConvNdShape<R>& shape = problem.shape;
  const int64_t blocks = shape.taps() * (shape.channels / problem.segment) *
                         tiles(problem.segment, kTile) * tiles(shape.group_out_channels(), kTile);
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    launch(backward_weight_kernel<R, scalar_t, acc_t>, blocks, 0, stream, problem,
           static_cast<const scalar_t*>(grad_output), static_cast<const scalar_t*>(input),
           static_cast<const acc_t*>(offset), static_cast<const acc_t*>(mask),
           static_cast<scalar_t*>(grad_weight));
  });
}

#define MMDCN_INSTANTIATE(R)                                                                     \
  template void conv_nd_forward<R>(Precision, const ConvNdProblem<R>&, const void*, const void*, \
                                   const void*, const void*, const void*, void*, const Stream&); \
  template void conv_nd_backward_data<R>(Precision, const ConvNdProblem<R>&, const void*,        \
                                         const void*, const void*, const void*, const void*,     \
                                         void*, void*, void*, const Stream&);                    \
  template void conv_nd_backward_weight<R>(Precision, const ConvNdProblem<R>&, const void*,      \
                                           const void*, const void*, const void*, void*,         \
                                           const Stream&);
MMDCN_INSTANTIATE(3)
#undef MMDCN_INSTANTIATE

}  // namespace mmdcn::cuda
