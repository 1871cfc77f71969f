// What the registration files of all devices do with torch's tensors, on its stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "deform_conv2d_shape.h"

namespace mmdcn {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Whether a 4-D tensor is dense in channels-last order and in no other: what channels-last out
// follows from.
inline bool is_channels_last(const Tensor& tensor) {
  if (tensor.is_contiguous()) return false;
  int64_t expected = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (tensor.size(d) == 1) continue;
    if (tensor.stride(d) != expected) return false;
    expected *= tensor.size(d);
  }
  return true;
}

inline MemoryFormat layout_of(const Tensor& tensor) {
  return is_channels_last(tensor) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// The type that coordinates come in beside features of the given type.
inline ScalarType coordinate_type(ScalarType features) {
  return features == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename T>
const T* const_data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& size, ScalarType type,
                         MemoryFormat layout = MemoryFormat::Contiguous) {
  return torch::stable::empty(size, type, std::nullopt, like.device(), std::nullopt, layout);
}

// Output positions along an axis of the input of this size; -1 where there is none, or where the
// axis makes no sense. Its numbers may be anything.
inline int64_t outputs(const GridAxis& axis, int64_t size, int64_t kernel) {
  constexpr int64_t most = INT64_C(1) << 31;
  if (axis.stride < 1 || axis.padding < 0 || axis.padding > most || axis.dilation < 1) return -1;
  const int64_t room = size + 2 * axis.padding - 1;
  if (room < 0 || (kernel > 1 && axis.dilation > room / (kernel - 1))) return -1;
  return (room - axis.dilation * (kernel - 1)) / axis.stride + 1;
}

// Reads the sizes off the arguments. Whatever does not fit is refused; mmdcn.ops.deform_conv2d then
// finds out what it is, and says what must change.
inline DeformConv2dShape deform_conv2d_shape(const Tensor& input, const Tensor& offset,
                                             const Tensor& weight,
                                             const std::optional<Tensor>& bias,
                                             const std::vector<int64_t>& stride,
                                             const std::vector<int64_t>& padding,
                                             const std::vector<int64_t>& dilation,
                                             const std::optional<Tensor>& mask) {
#define MMDCN_REQUIRE(condition)                                                                  \
  STD_TORCH_CHECK(condition, "mmdcn::deform_conv2d: arguments do not fit together (", #condition, \
                  "); call mmdcn.ops.deform_conv2d, which says what must change")
  MMDCN_REQUIRE(input.dim() == 4 && offset.dim() == 4 && weight.dim() == 4);
  MMDCN_REQUIRE(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2);
  DeformConv2dShape shape = {};
  shape.batch = input.size(0);
  shape.channels = input.size(1);
  shape.height = input.size(2);
  shape.width = input.size(3);
  shape.out_channels = weight.size(0);
  shape.kernel_height = weight.size(2);
  shape.kernel_width = weight.size(3);
  shape.out_height = offset.size(2);
  shape.out_width = offset.size(3);
  shape.y = {stride[0], padding[0], dilation[0]};
  shape.x = {stride[1], padding[1], dilation[1]};
  // Rows and columns are counted in 32 bits.
  constexpr int64_t too_long = INT64_C(1) << 30;
  MMDCN_REQUIRE(shape.height < too_long && shape.width < too_long);
  MMDCN_REQUIRE(shape.out_height < too_long && shape.out_width < too_long);
  MMDCN_REQUIRE(outputs(shape.y, shape.height, shape.kernel_height) == shape.out_height);
  MMDCN_REQUIRE(outputs(shape.x, shape.width, shape.kernel_width) == shape.out_width);
  MMDCN_REQUIRE(shape.taps() > 0 && shape.channels > 0 && weight.size(1) > 0);
  MMDCN_REQUIRE(shape.channels % weight.size(1) == 0);
  shape.groups = shape.channels / weight.size(1);
  shape.deform_groups = offset.size(1) / (2 * shape.taps());
  MMDCN_REQUIRE(shape.out_channels > 0 && shape.out_channels % shape.groups == 0);
  MMDCN_REQUIRE(shape.deform_groups > 0 && shape.channels % shape.deform_groups == 0);
  MMDCN_REQUIRE(offset.size(0) == shape.batch);
  MMDCN_REQUIRE(offset.size(1) == 2 * shape.taps() * shape.deform_groups);
  MMDCN_REQUIRE(weight.scalar_type() == input.scalar_type());
  MMDCN_REQUIRE(offset.scalar_type() == coordinate_type(input.scalar_type()));
  MMDCN_REQUIRE(offset.device() == input.device() && weight.device() == input.device());
  if (bias.has_value()) {
    MMDCN_REQUIRE(bias->dim() == 1 && bias->size(0) == shape.out_channels);
    MMDCN_REQUIRE(bias->scalar_type() == input.scalar_type() && bias->device() == input.device());
  }
  if (mask.has_value()) {
    MMDCN_REQUIRE(mask->dim() == 4 && mask->size(0) == shape.batch);
    MMDCN_REQUIRE(mask->size(1) == shape.taps() * shape.deform_groups);
    MMDCN_REQUIRE(mask->size(2) == shape.out_height && mask->size(3) == shape.out_width);
    MMDCN_REQUIRE(mask->scalar_type() == offset.scalar_type() && mask->device() == input.device());
  }
#undef MMDCN_REQUIRE
  return shape;
}

inline void check_grad_output(const DeformConv2dShape& shape, const Tensor& grad_output,
                              const Tensor& input, const std::vector<bool>& output_mask) {
  STD_TORCH_CHECK(
      grad_output.dim() == 4 && grad_output.size(0) == shape.batch &&
          grad_output.size(1) == shape.out_channels && grad_output.size(2) == shape.out_height &&
          grad_output.size(3) == shape.out_width &&
          grad_output.scalar_type() == input.scalar_type() &&
          grad_output.device() == input.device() && output_mask.size() == 4,
      "mmdcn::deform_conv2d_backward: grad_output must have the shape, dtype and device of the "
      "output, and output_mask four elements");
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  return std::vector<int64_t>(tensor.sizes().begin(), tensor.sizes().end());
}

}  // namespace mmdcn
