// The launches of deformable RoI pooling on CUDA, without a header of PyTorch's or CUDA's.
#pragma once

#include <cstddef>

#include "../../deform_roi_pool_shape.h"
#include "../types.h"

namespace mmdcn::cuda {

// Channels that a lane loads at once, for elements of so many bytes.
constexpr int roi_pool_vector(size_t bytes) { return bytes == 8 ? 2 : 4; }

// All pointers are to memory of the stream's device. `input` is channels-last and begins at a
// multiple of 16 bytes, as its gradient and grad_output do; `rois` and `offset` are contiguous, and
// `offset` may be null. Nothing may be empty. Nothing waits for the device: a
// RoI on an image that does not exist stops the kernel by an assertion. A launch that CUDA refuses
// throws std::runtime_error.

// `output`, contiguous, every element written once.
void roi_pool_forward(Precision precision, const DeformRoIPoolShape& shape, const void* input,
                      const void* rois, const void* offset, void* output, const Stream& stream);

// `grad_output` is channels-last. `grad_input`, channels-last, float or double, must hold zeros: it
// is added to atomically, in no fixed order. Every element of `grad_offset` is written once, in a
// fixed order of summation. Either may be null.
void roi_pool_backward(Precision precision, const DeformRoIPoolShape& shape,
                       const void* grad_output, const void* input, const void* rois,
                       const void* offset, void* grad_input, void* grad_offset,
                       const Stream& stream);

}  // namespace mmdcn::cuda
