// The tensors that deform_conv2d takes, checked, and its sizes.
#pragma once

#include <vector>

#include "deform_conv2d_shape.h"
#include "deform_conv_nd_tensors.h"
#include "tensors.h"

namespace mmdcn {

inline DeformConv2dShape deform_conv2d_shape(const Tensor& input, const Tensor& offset,
                                             const Tensor& weight,
                                             const std::optional<Tensor>& bias,
                                             const std::vector<int64_t>& stride,
                                             const std::vector<int64_t>& padding,
                                             const std::vector<int64_t>& dilation,
                                             const std::optional<Tensor>& mask) {
  const DeformConvNdShape<2> nd = deform_conv_nd_shape<2>(input, offset, weight, bias, stride,
                                                          padding, dilation, mask, "deform_conv2d");
  DeformConv2dShape shape = {};
  shape.batch = nd.batch;
  shape.channels = nd.channels;
  shape.height = nd.size[0];
  shape.width = nd.size[1];
  shape.out_channels = nd.out_channels;
  shape.out_height = nd.out_size[0];
  shape.out_width = nd.out_size[1];
  shape.kernel_height = nd.kernel[0];
  shape.kernel_width = nd.kernel[1];
  shape.groups = nd.groups;
  shape.deform_groups = nd.deform_groups;
  shape.y = nd.axis[0];
  shape.x = nd.axis[1];
  return shape;
}

inline void check_grad_output(const DeformConv2dShape& shape, const Tensor& grad_output,
                              const Tensor& input, const std::vector<bool>& output_mask) {
  check_grad_output("deform_conv2d_backward", grad_output,
                    {shape.batch, shape.out_channels, shape.out_height, shape.out_width}, input,
                    output_mask, 4);
}

}  // namespace mmdcn
