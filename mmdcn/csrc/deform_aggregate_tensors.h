// Reads the sizes of a deformable aggregation off its arguments, for the registration files.
#pragma once

#include "deform_aggregate_shape.h"
#include "tensors.h"

namespace mmdcn {

// mmdcn.ops has checked the arguments with errors that say what to do; what is checked again here
// is what keeps every memory access in bounds for those who call the compiled operator directly.
inline DeformAggregateShape deform_aggregate_shape(const Tensor& input, const Tensor& offset,
                                                   const Tensor& mask,
                                                   const std::vector<int64_t>& kernel_size,
                                                   const std::vector<int64_t>& stride,
                                                   const std::vector<int64_t>& padding,
                                                   const std::vector<int64_t>& dilation,
                                                   double offset_scale, bool remove_center) {
#define MMDCN_REQUIRE(condition)                                                         \
  STD_TORCH_CHECK(condition, "mmdcn::deform_aggregate: arguments do not fit together (", \
                  #condition, "); call mmdcn.ops.dcnv3 or dcnv4, which say what must change")
  MMDCN_REQUIRE(input.dim() == 4 && offset.dim() == 5 && mask.dim() == 5);
  MMDCN_REQUIRE(kernel_size.size() == 2 && stride.size() == 2);
  MMDCN_REQUIRE(padding.size() == 2 && dilation.size() == 2);
  // Rows and columns are counted in 32 bits.
  constexpr int64_t too_long = INT64_C(1) << 30;
  DeformAggregateShape shape = {};
  shape.batch = input.size(0);
  shape.channels = input.size(3);
  shape.groups = offset.size(3);
  shape.offset_scale = offset_scale;
  shape.remove_center = remove_center;
  for (int d = 0; d < 2; ++d) {
    AggregateAxis& axis = d == 0 ? shape.y : shape.x;
    axis = {input.size(1 + d),
            offset.size(1 + d),
            kernel_size[d],
            {stride[d], padding[d], dilation[d]}};
    MMDCN_REQUIRE(axis.size < too_long && axis.out_size < too_long);
    MMDCN_REQUIRE(axis.kernel > 0 && axis.kernel < too_long);
  }
  MMDCN_REQUIRE(shape.taps() > 0);
  MMDCN_REQUIRE(shape.channels > 0 && shape.groups > 0 && shape.channels % shape.groups == 0);
  MMDCN_REQUIRE(offset.size(0) == shape.batch && offset.size(4) == 2 * shape.taps());
  MMDCN_REQUIRE(mask.size(0) == shape.batch && mask.size(1) == shape.y.out_size);
  MMDCN_REQUIRE(mask.size(2) == shape.x.out_size && mask.size(3) == shape.groups);
  MMDCN_REQUIRE(mask.size(4) == shape.taps());
  MMDCN_REQUIRE(offset.scalar_type() == coordinate_type(input.scalar_type()));
  MMDCN_REQUIRE(mask.scalar_type() == offset.scalar_type());
  MMDCN_REQUIRE(offset.device() == input.device() && mask.device() == input.device());
#undef MMDCN_REQUIRE
  return shape;
}

inline void check_grad_output(const DeformAggregateShape& shape, const Tensor& grad_output,
                              const Tensor& input, const std::vector<bool>& output_mask) {
  STD_TORCH_CHECK(
      grad_output.dim() == 4 && grad_output.size(0) == shape.batch &&
          grad_output.size(1) == shape.y.out_size && grad_output.size(2) == shape.x.out_size &&
          grad_output.size(3) == shape.channels &&
          grad_output.scalar_type() == input.scalar_type() &&
          grad_output.device() == input.device() && output_mask.size() == 3,
      "mmdcn::deform_aggregate_backward: grad_output must have the shape, dtype and device of the "
      "output, and output_mask three elements");
}

// Offsets or modulations, (N, Ho, Wo, G, taps), or else a copy of them, that the kernels can read:
// pixels that follow one another, and the taps of a group together.
inline Tensor aggregate_points(const Tensor& tensor) {
  const int64_t width = tensor.size(2), height = tensor.size(1);
  const bool rows = height == 1 || tensor.stride(1) == width * tensor.stride(2);
  const bool images = tensor.size(0) == 1 || tensor.stride(0) == height * width * tensor.stride(2);
  const bool together = tensor.size(4) == 1 || tensor.stride(4) == 1;
  return rows && images && together ? tensor : torch::stable::contiguous(tensor);
}

// Of a tensor that aggregate_points() gave.
inline AggregateLayout aggregate_layout(const Tensor& tensor) {
  return {tensor.size(2) == 1 ? tensor.stride(1) : tensor.stride(2), tensor.stride(3)};
}

}  // namespace mmdcn
