// The layouts of tensors that deform_conv2d's CPU kernels can work on, and the work of a pass.
#pragma once

#include "../../deform_conv2d_tensors.h"
#include "../operator.h"
#include "kernel.h"

namespace mmdcn {
namespace {

// Multiply-adds of sampling the input for some output pixels, and multiplying by the weight.
int64_t pass_work(const DeformConv2dShape& shape, int64_t pixels) {
  return pixels * shape.channels * shape.taps() * (shape.group_out_channels() + kElementWork);
}

// The layout of the images of a tensor that is contiguous or channels-last.
ImageLayout image_layout(const Tensor& tensor) {
  if (is_channels_last(tensor)) return {tensor.size(1), 1};
  return {1, tensor.size(2) * tensor.size(3)};
}

// The tensor itself if it is contiguous or channels-last, otherwise a contiguous copy.
Tensor dense(const Tensor& tensor) {
  return is_channels_last(tensor) ? tensor : as_contiguous(tensor);
}

// A tensor of offsets or modulations in a layout that the kernels can read: all pixels at one
// stride, and either the pixels or the channels contiguous. A tensor in another layout is copied.
Tensor readable_sampling(const Tensor& tensor) {
  const bool one_stride =
      tensor.size(2) == 1 || tensor.stride(2) == tensor.size(3) * tensor.stride(3);
  const int64_t pixel = tensor.size(3) == 1 ? tensor.stride(2) : tensor.stride(3);
  const bool contiguous = pixel == 1 || tensor.stride(1) == 1 || tensor.size(1) == 1;
  return one_stride && contiguous ? tensor : as_contiguous(tensor);
}

template <typename A>
SamplingTensor<A> sampling_tensor(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return {nullptr, 0, 0, 1};
  const int64_t pixel = tensor->size(3) == 1 ? tensor->stride(2) : tensor->stride(3);
  return {const_data<A>(*tensor), tensor->stride(0), tensor->stride(1), pixel};
}

// The layout of a weight that is contiguous or channels-last.
WeightLayout weight_layout(const Tensor& weight) {
  const int64_t in = weight.size(1), taps = weight.size(2) * weight.size(3);
  if (is_channels_last(weight)) return {in * taps, 1, in};
  return {in * taps, taps, 1};
}

}  // namespace
}  // namespace mmdcn
