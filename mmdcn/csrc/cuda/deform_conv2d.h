// Deformable convolution on CUDA: what the registration file calls. No PyTorch and no CUDA header.
#pragma once

#include <cstdint>

#include "../deform_conv2d_shape.h"

namespace mmdcn::cuda {

// Distances, in elements, between neighbours of a dense 4-D tensor whose two inner dimensions are
// flattened: contiguous (NCHW) has position = 1, channels last (NHWC) has channel = 1.
struct Layout {
  int64_t batch, channel, position;
};

inline Layout contiguous_layout(int64_t channels, int64_t positions) {
  return {channels * positions, positions, 1};
}

inline Layout channels_last_layout(int64_t channels, int64_t positions) {
  return {channels * positions, 1, channels};
}

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

// dtype of input, weight, bias, output and their gradients. Offset, mask, their gradients, all
// workspaces and all arithmetic are double for kFloat64 and float for the others.
enum class Precision { kFloat64, kFloat32, kFloat16, kBFloat16 };

// Where to launch: a cudaStream_t and the device it belongs to, which becomes the current one.
struct Stream {
  int device;
  void* handle;
};

// All pointers are to memory of the stream's device. Offset and mask and their gradients are
// contiguous; the weight is (out_channels, kernel_height, kernel_width, group_channels), which is
// its channels-last layout. No tensor may be empty. Nothing waits for the device. A launch that
// CUDA refuses throws std::runtime_error.

// output = deformable convolution, every element written once. `bias` and `mask` may be null.
void deform_conv2d_forward(Precision precision, const DeformConv2dProblem& problem,
                           const void* input, const void* offset, const void* mask,
                           const void* weight, const void* bias, void* output,
                           const Stream& stream);

// Gradients through the sampling. `grad_input`, float or double, must hold zeros: it is added to
// atomically, in no fixed order. Every element of `grad_offset` and `grad_mask` is written once,
// in a fixed order of summation. Any of the three may be null.
void deform_conv2d_backward_data(Precision precision, const DeformConv2dProblem& problem,
                                 const void* grad_output, const void* input, const void* offset,
                                 const void* mask, const void* weight, void* grad_input,
                                 void* grad_offset, void* grad_mask, const Stream& stream);

// Into how many parts deform_conv2d_backward_weight() splits its sum over output pixels.
int64_t deform_conv2d_weight_splits(const DeformConv2dProblem& problem);

// grad_weight, contiguous (out_channels, group_channels, kernel_height, kernel_width), through
// `workspace` of splits * out_channels * columns elements. Fixed order of summation.
void deform_conv2d_backward_weight(Precision precision, const DeformConv2dProblem& problem,
                                   const void* grad_output, const void* input, const void* offset,
                                   const void* mask, int64_t splits, void* workspace,
                                   void* grad_weight, const Stream& stream);

}  // namespace mmdcn::cuda
