// The tensors that deform_aggregate takes, checked, and its sizes.
#pragma once

#include "deform_aggregate_shape.h"
#include "tensors.h"

namespace mmdcn {

inline DeformAggregateShape deform_aggregate_shape(const Tensor& input, const Tensor& offset,
                                                   const Tensor& mask,
                                                   const std::vector<int64_t>& kernel_size,
                                                   const std::vector<int64_t>& stride,
                                                   const std::vector<int64_t>& padding,
                                                   const std::vector<int64_t>& dilation,
                                                   double offset_scale, bool remove_center) {
  constexpr const char* op = "deform_aggregate";
  MMDCN_REQUIRE(input.dim() == 4);
  MMDCN_REQUIRE(offset.dim() == 5);
  MMDCN_REQUIRE(mask.dim() == 5);
  MMDCN_REQUIRE(kernel_size.size() == 2);
  MMDCN_REQUIRE(stride.size() == 2);
  MMDCN_REQUIRE(padding.size() == 2);
  MMDCN_REQUIRE(dilation.size() == 2);
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
    MMDCN_REQUIRE(input.size(1 + d) < kTooLong);
    MMDCN_REQUIRE(offset.size(1 + d) < kTooLong);
    MMDCN_REQUIRE(kernel_size[d] > 0 && kernel_size[d] < kTooLong);
    MMDCN_REQUIRE(!remove_center || kernel_size[d] % 2 == 1);
    MMDCN_REQUIRE(stride[d] > 0);
    MMDCN_REQUIRE(padding[d] >= 0);
    MMDCN_REQUIRE(dilation[d] > 0);
    MMDCN_REQUIRE(offset.size(1 + d) == outputs(axis.grid, axis.size, axis.kernel));
  }
  MMDCN_REQUIRE(!remove_center || kernel_size[0] * kernel_size[1] > 1);
  MMDCN_REQUIRE(input.size(3) > 0);
  MMDCN_REQUIRE(offset.size(3) > 0 && input.size(3) % offset.size(3) == 0);
  MMDCN_REQUIRE(offset.size(0) == shape.batch);
  MMDCN_REQUIRE(offset.size(4) == 2 * shape.taps());
  for (int d = 0; d < 4; ++d) MMDCN_REQUIRE(mask.size(d) == offset.size(d));
  MMDCN_REQUIRE(mask.size(4) == shape.taps());
  MMDCN_REQUIRE(offset.scalar_type() == coordinate_type(input.scalar_type()));
  MMDCN_REQUIRE(mask.scalar_type() == offset.scalar_type());
  MMDCN_REQUIRE(offset.device() == input.device());
  MMDCN_REQUIRE(mask.device() == input.device());
  return shape;
}

inline void check_grad_output(const DeformAggregateShape& shape, const Tensor& grad_output,
                              const Tensor& input, const std::vector<bool>& output_mask) {
  check_grad_output("deform_aggregate_backward", grad_output,
                    {shape.batch, shape.y.out_size, shape.x.out_size, shape.channels}, input,
                    output_mask, 3);
}

// From one pixel of (N, Ho, Wo, ...) to the next. A dimension of size one says nothing of it: its
// stride may be any number, in a contiguous tensor too.
inline int64_t pixel_stride(const Tensor& tensor) {
  for (const int64_t d : {2, 1, 0}) {
    if (tensor.size(d) != 1) return tensor.stride(d);
  }
  return 0;
}

// Offsets or modulations, (N, Ho, Wo, G, taps), in a layout that the kernels can read: all pixels
// at one stride, and the taps of a group contiguous. A tensor in another layout is copied.
inline Tensor readable_taps(const Tensor& tensor) {
  bool readable = tensor.size(4) == 1 || tensor.stride(4) == 1;
  int64_t expected = pixel_stride(tensor);
  for (const int64_t d : {2, 1, 0}) {
    readable = readable && (tensor.size(d) == 1 || tensor.stride(d) == expected);
    expected *= tensor.size(d);
  }
  return readable ? tensor : as_contiguous(tensor);
}

// The layout of a tensor that readable_taps() returned.
inline AggregateLayout aggregate_layout(const Tensor& tensor) {
  return {pixel_stride(tensor), tensor.stride(3)};
}

}  // namespace mmdcn
