// deform_roi_pool, deform_aggregate and deform_conv_nd on CUDA, registration and all, for CPU
// tensors: namespace mmdcn_host_operators.
//
// The registration files and the kernels are compiled from their own source. Only what it takes to
// have a GPU is replaced: the launches run blocks on the host, there is no device to switch to, and
// the dispatch key is the CPU's.
#include "../../../mmdcn/csrc/cuda/deform_aggregate/kernels.h"
#include "../../../mmdcn/csrc/cuda/deform_conv_nd/kernels.h"
#include "../../../mmdcn/csrc/cuda/deform_roi_pool/kernels.h"
#include "../../../mmdcn/csrc/cuda/device.h"
#include "../../../mmdcn/csrc/deform_aggregate_tensors.h"
#include "../../../mmdcn/csrc/deform_conv_nd_tensors.h"
#include "../../../mmdcn/csrc/deform_roi_pool_tensors.h"
#include "../host_device.h"
#include "host_aggregate.h"
#include "host_conv_nd.h"
#include "host_roi_pool.h"

namespace mmdcn::cuda {
void roi_pool_forward(Precision precision, const DeformRoIPoolShape& shape, const void* input,
                      const void* rois, const void* offset, void* output, const Stream&) {
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    HostRoIPool<HostContext<1, 1>, scalar_t, acc_t>::forward(
        shape, static_cast<const scalar_t*>(input), static_cast<const acc_t*>(rois),
        static_cast<const acc_t*>(offset), static_cast<scalar_t*>(output));
  });
}

void roi_pool_backward(Precision precision, const DeformRoIPoolShape& shape,
                       const void* grad_output, const void* input, const void* rois,
                       const void* offset, void* grad_input, void* grad_offset, const Stream&) {
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    HostRoIPool<HostContext<1, 1>, scalar_t, acc_t>::backward(
        shape, static_cast<const scalar_t*>(grad_output), static_cast<const scalar_t*>(input),
        static_cast<const acc_t*>(rois), static_cast<const acc_t*>(offset),
        static_cast<acc_t*>(grad_input), static_cast<acc_t*>(grad_offset));
  });
}

void aggregate_forward(Precision precision, const AggregateProblem& problem, const void* input,
                       const void* offset, const void* mask, void* output, const Stream&) {
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    HostAggregate<HostContext<1, 1>, scalar_t, acc_t>::forward(
        problem, static_cast<const scalar_t*>(input), static_cast<const acc_t*>(offset),
        static_cast<const acc_t*>(mask), static_cast<scalar_t*>(output));
  });
}

void aggregate_backward(Precision precision, const AggregateProblem& problem,
                        const void* grad_output, const void* input, const void* offset,
                        const void* mask, void* grad_input, void* grad_offset, void* grad_mask,
                        const Stream&) {
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    HostAggregate<HostContext<1, 1>, scalar_t, acc_t>::backward(
        problem, static_cast<const scalar_t*>(grad_output), static_cast<const scalar_t*>(input),
        static_cast<const acc_t*>(offset), static_cast<const acc_t*>(mask),
        static_cast<acc_t*>(grad_input), static_cast<acc_t*>(grad_offset),
        static_cast<acc_t*>(grad_mask));
  });
}

template <int R>
void conv_nd_forward(Precision precision, const ConvNdProblem<R>& problem, const void* input,
                     const void* offset, const void* mask, const void* weight, const void* bias,
                     void* output, const Stream&) {
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    HostConvNd<HostContext<1, 1>, R, scalar_t, acc_t>::forward(
        problem, static_cast<const scalar_t*>(input), static_cast<const acc_t*>(offset),
        static_cast<const acc_t*>(mask), static_cast<const scalar_t*>(weight),
        static_cast<const scalar_t*>(bias), static_cast<scalar_t*>(output));
  });
}

template <int R>
void conv_nd_backward_data(Precision precision, const ConvNdProblem<R>& problem,
                           const void* grad_output, const void* input, const void* offset,
                           const void* mask, const void* weight, void* grad_input,
                           void* grad_offset, void* grad_mask, const Stream&) {
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    HostConvNd<HostContext<1, 1>, R, scalar_t, acc_t>::backward_data(
        problem, static_cast<const scalar_t*>(grad_output), static_cast<const scalar_t*>(input),
        static_cast<const acc_t*>(offset), static_cast<const acc_t*>(mask),
        static_cast<const scalar_t*>(weight), static_cast<acc_t*>(grad_input),
        static_cast<acc_t*>(grad_offset), static_cast<acc_t*>(grad_mask));
  });
}

template <int R>
void conv_nd_backward_weight(Precision precision, const ConvNdProblem<R>& problem,
                             const void* grad_output, const void* input, const void* offset,
                             const void* mask, void* grad_weight, const Stream&) {
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    HostConvNd<HostContext<1, 1>, R, scalar_t, acc_t>::backward_weight(
        problem, static_cast<const scalar_t*>(grad_output), static_cast<const scalar_t*>(input),
        static_cast<const acc_t*>(offset), static_cast<const acc_t*>(mask),
        static_cast<scalar_t*>(grad_weight));
  });
}

}  // namespace mmdcn::cuda

// Every header is included by now: what follows renames the dispatch key and the operators'
// namespace in the registration itself, and nothing else.
namespace mmdcn_host_operators {
using namespace mmdcn;
namespace cuda {
using namespace mmdcn::cuda;
}
}  // namespace mmdcn_host_operators
#define mmdcn mmdcn_host_operators
#define CUDA CPU
#include "../../../mmdcn/csrc/cuda/deform_aggregate/operator.cpp"
#include "../../../mmdcn/csrc/cuda/deform_conv_nd/operator.cpp"
#include "../../../mmdcn/csrc/cuda/deform_roi_pool/operator.cpp"
