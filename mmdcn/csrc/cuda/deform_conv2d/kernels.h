// Deformable convolution on CUDA: what the registration file calls. No PyTorch and no CUDA header.
#pragma once

#include <cstdint>

#include "../../deform_conv2d_shape.h"
#include "../types.h"

namespace mmdcn::cuda {

// One deformable convolution as the kernels see it. The numbers that follow from the shape are
// worked out once, here, so that no thread has to divide for them.
struct DeformConv2dProblem {
  DeformConv2dShape shape;
  Layout input, output;  // and of their gradients

  int64_t taps;
  int64_t pixels, all_pixels;  // output positions of one image, and of the batch
  int64_t group_channels;      // input and output channels of one group
  int64_t group_out_channels;
  int64_t deform_group_channels;  // input channels that share sampling points
  int64_t columns;                // summands of an output element: taps * group_channels

  DeformConv2dProblem(const DeformConv2dShape& shape, const Layout& input, const Layout& output)
      : shape(shape),
        input(input),
        output(output),
        taps(shape.taps()),
        pixels(shape.pixels()),
        all_pixels(shape.batch * pixels),
        group_channels(shape.group_channels()),
        group_out_channels(shape.group_out_channels()),
        deform_group_channels(shape.deform_group_channels()),
        columns(taps * group_channels) {}
};

// The simple kernels take every problem. Those for tensor cores multiply in the input's type, or in
// TF32 for kFloat32, and take what takes_tensor_cores() says.
enum class Kernels { kSimple, kTensorCore };

// Those that the environment variable MMDCN_CUDA_KERNELS names: simple, the default, or
// tensor_core. Read once.
Kernels chosen_kernels();

// Whether a device has the tensor cores that they need, those of compute capability 8.0 or newer.
bool has_tensor_cores(int device);

// Whether they take a problem: channels come in whole steps of the
// multiplication (64 bytes) wherever a group or an offset group begins, output channels in whole
// vectors, and all that the kernels count in 32 bits stays below 2^31.
inline bool takes_tensor_cores(Precision precision, const DeformConv2dShape& shape) {
  if (precision == Precision::kFloat64) return false;
  const int64_t step = precision == Precision::kFloat32 ? 16 : 32;
  const int64_t one = shape.group_channels(), other = shape.deform_group_channels();
  const int64_t shorter = one < other ? one : other, longer = one < other ? other : one;
  constexpr int64_t kTooMany = INT64_C(1) << 31;
  // A block counts in the weights of up to 256 output channels.
  return longer % shorter == 0 && shorter % step == 0 && shape.group_out_channels() % 8 == 0 &&
         256 * shape.taps() * one < kTooMany && shape.channels < kTooMany &&
         shape.out_channels < kTooMany && shape.taps() * shape.deform_groups < kTooMany &&
         2 * shape.width * shape.channels < kTooMany && shape.height * shape.width < kTooMany &&
         shape.batch * shape.pixels() < kTooMany;
}

// Where the gradient of the input is added up; with neither `sum` nor `fixed`, it is not.
struct GradInput {
  void* sum = nullptr;       // float or double, added to in no fixed order
  int64_t* fixed = nullptr;  // added to in fixed point: the same, to the bit, in any order
  const int32_t* magnitudes = nullptr;  // which the unit of `fixed` follows from
};

// All pointers are to memory of the stream's device. Offset and mask and their gradients are
// contiguous; the weight is (out_channels, kernel_height, kernel_width, group_channels), which is
// its channels-last layout. For tensor cores, input, grad_output and the input's gradient are
// channels last, and these, weight and output begin at multiples of 16 bytes. No tensor may be
// empty, except an input without pixels in the forward pass. Nothing waits for the device. A launch
// that CUDA refuses throws std::runtime_error.

// Memory that a call may take for copies and sums of its images, in bytes, unless one image takes
// more: it works on as many images at a time as fit.
int64_t deform_conv2d_workspace_bytes();

// output = deformable convolution, every element written once. `bias` and `mask` may be null.
void deform_conv2d_forward(Kernels kernels, Precision precision, const DeformConv2dProblem& problem,
                           const void* input, const void* offset, const void* mask,
                           const void* weight, const void* bias, void* output,
                           const Stream& stream);

// Raises each of the three `magnitudes`, which start at zero, to that of a tensor. `mask` may be
// null.
void deform_conv2d_magnitudes(Precision precision, const DeformConv2dProblem& problem,
                              const void* grad_output, const void* weight, const void* mask,
                              int32_t* magnitudes, const Stream& stream);

// Gradients through the sampling. What `grad_input` points to must hold zeros. Every element of
// `grad_offset` and `grad_mask` is written once, in a fixed order of summation. Any of the three
// may be null.
void deform_conv2d_backward_data(Kernels kernels, Precision precision,
                                 const DeformConv2dProblem& problem, const void* grad_output,
                                 const void* input, const void* offset, const void* mask,
                                 const void* weight, const GradInput& grad_input, void* grad_offset,
                                 void* grad_mask, const Stream& stream);

// sum, in float or double, = the fixed-point sums of `grad_input`.
void deform_conv2d_from_fixed(Precision precision, const DeformConv2dProblem& problem,
                              const GradInput& grad_input, void* sum, const Stream& stream);

// Into how many parts deform_conv2d_backward_weight() splits its sum over output pixels.
int64_t deform_conv2d_weight_splits(Kernels kernels, Precision precision,
                                    const DeformConv2dProblem& problem);

// `workspace`, of splits * out_channels * columns elements, = the parts of the weight's gradient;
// or, where `accumulate` is set, they are added to it.
void deform_conv2d_backward_weight(Kernels kernels, Precision precision,
                                   const DeformConv2dProblem& problem, const void* grad_output,
                                   const void* input, const void* offset, const void* mask,
                                   int64_t splits, bool accumulate, void* workspace,
                                   const Stream& stream);

// grad_weight, contiguous (out_channels, group_channels, kernel_height, kernel_width), = the sum of
// the parts, in a fixed order.
void deform_conv2d_sum_splits(Precision precision, const DeformConv2dProblem& problem,
                              int64_t splits, const void* workspace, void* grad_weight,
                              const Stream& stream);

}  // namespace mmdcn::cuda
