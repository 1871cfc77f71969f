// Deformable convolution over R dimensions on CUDA: what the registration file calls. No PyTorch
// and no CUDA header.
#pragma once

#include <numeric>

#include "../../deform_conv_nd_shape.h"
#include "../types.h"

namespace mmdcn::cuda {

template <int R>
struct ConvNdProblem {
  DeformConvNdShape<R> shape;
  // So many consecutive channels, from a multiple of it on, are of one group and one offset group.
  int64_t segment;

  explicit ConvNdProblem(const DeformConvNdShape<R>& shape)
      : shape(shape), segment(std::gcd(shape.group_channels(), shape.deform_group_channels())) {}
};

// All pointers are to memory of the stream's device, and all tensors are contiguous. Nothing may be
// empty. Nothing waits for the device. A launch that CUDA refuses throws std::runtime_error.

// `output`, every element written once. `mask` and `bias` may be null.
template <int R>
void conv_nd_forward(Precision precision, const ConvNdProblem<R>& problem, const void* input,
                     const void* offset, const void* mask, const void* weight, const void* bias,
                     void* output, const Stream& stream);

// `grad_input`, float or double, must hold zeros: it is added to atomically, in no fixed order.
// Every element of `grad_offset` and `grad_mask` is written once, in a fixed order of summation.
// Any of the three may be null.
template <int R>
void conv_nd_backward_data(Precision precision, const ConvNdProblem<R>& problem,
                           const void* grad_output, const void* input, const void* offset,
                           const void* mask, const void* weight, void* grad_input,
                           void* grad_offset, void* grad_mask, const Stream& stream);

// `grad_weight`, every element written once, in a fixed order of summation.
template <int R>
void conv_nd_backward_weight(Precision precision, const ConvNdProblem<R>& problem,
                             const void* grad_output, const void* input, const void* offset,
                             const void* mask, void* grad_weight, const Stream& stream);

}  // namespace mmdcn::cuda
