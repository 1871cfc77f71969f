// The layouts of deform_conv2d's tensors that the CPU kernels can work on, and the work of a pass.
#pragma once

#include "../../deform_conv2d_tensors.h"
#include "../operator.h"
#include "kernel.h"

namespace mmdcn {
namespace {

// Work of sampling the input for some output pixels, and multiplying the samples by the weight.
int64_t pass_work(const DeformConv2dShape& shape, int64_t pixels) {
  return pixels * shape.channels * shape.taps() * (shape.group_out_channels() + kElementWork);
}

// Layout of the images of a tensor that is contiguous in one of the two ways.
ImageLayout image_layout(const Tensor& tensor) {
  if (is_channels_last(tensor)) return {tensor.size(1), 1};
  return {1, tensor.size(2) * tensor.size(3)};
}

// The tensor itself if it is contiguous in one of the two ways, or else a copy that is.
Tensor either_way(const Tensor& tensor) {
  return is_channels_last(tensor) ? tensor : as_contiguous(tensor);
}

// A tensor of offsets or modulations, or else a copy of it, that the kernels can read: rows of
// pixels that follow one another, with neighbouring pixels or neighbouring channels together.
Tensor readable_sampling(const Tensor& tensor) {
  const bool even = tensor.size(2) == 1 || tensor.stride(2) == tensor.size(3) * tensor.stride(3);
  const int64_t pixel = tensor.size(3) == 1 ? tensor.stride(2) : tensor.stride(3);
  const bool together = pixel == 1 || tensor.stride(1) == 1 || tensor.size(1) == 1;
  return even && together ? tensor : as_contiguous(tensor);
}

template <typename A>
SamplingTensor<A> sampling_tensor(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return {nullptr, 0, 0, 1};
  const int64_t pixel = tensor->size(3) == 1 ? tensor->stride(2) : tensor->stride(3);
  return {const_data<A>(*tensor), tensor->stride(0), tensor->stride(1), pixel};
}

// Of a weight that is contiguous in one of the two ways.
WeightLayout weight_layout(const Tensor& weight) {
  const int64_t in = weight.size(1), taps = weight.size(2) * weight.size(3);
  if (is_channels_last(weight)) return {in * taps, 1, in};
  return {in * taps, taps, 1};
}

}  // namespace
}  // namespace mmdcn
