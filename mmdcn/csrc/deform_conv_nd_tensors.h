// The tensors that a deformable convolution over R dimensions takes, checked, its sizes, and the
// tensors of its gradients.
#pragma once

#include <tuple>

#include "deform_conv_nd_shape.h"
#include "tensors.h"

namespace mmdcn {

// The rank that deform_conv_nd is compiled for. Two dimensions have an operator of their own, which
// also takes one dimension, as an image of height one.
constexpr int kConvNdRank = 3;

// Checks the arguments against one another, and reads the sizes off them.
template <int R>
DeformConvNdShape<R> deform_conv_nd_shape(const Tensor& input, const Tensor& offset,
                                          const Tensor& weight, const std::optional<Tensor>& bias,
                                          const std::vector<int64_t>& stride,
                                          const std::vector<int64_t>& padding,
                                          const std::vector<int64_t>& dilation,
                                          const std::optional<Tensor>& mask,
                                          const char* op = "deform_conv_nd") {
  STD_TORCH_CHECK(input.dim() == R + 2, "mmdcn::", op, ": input: expected ", R + 2,
                  " dimensions, got ", input.dim());
  MMDCN_REQUIRE(offset.dim() == R + 2);
  MMDCN_REQUIRE(weight.dim() == R + 2);
  MMDCN_REQUIRE(stride.size() == R);
  MMDCN_REQUIRE(padding.size() == R);
  MMDCN_REQUIRE(dilation.size() == R);
  MMDCN_REQUIRE(input.size(1) > 0);
  MMDCN_REQUIRE(weight.numel() > 0);
  DeformConvNdShape<R> shape = {};
  shape.batch = input.size(0);
  shape.channels = input.size(1);
  shape.out_channels = weight.size(0);
  for (int d = 0; d < R; ++d) {
    shape.size[d] = input.size(2 + d);
    shape.out_size[d] = offset.size(2 + d);
    shape.kernel[d] = weight.size(2 + d);
    shape.axis[d] = {stride[d], padding[d], dilation[d]};
    MMDCN_REQUIRE(input.size(2 + d) < kTooLong);
    MMDCN_REQUIRE(offset.size(2 + d) < kTooLong);
    MMDCN_REQUIRE(stride[d] > 0);
    MMDCN_REQUIRE(padding[d] >= 0);
    MMDCN_REQUIRE(dilation[d] > 0);
    MMDCN_REQUIRE(offset.size(2 + d) == outputs(shape.axis[d], shape.size[d], shape.kernel[d]));
  }
  MMDCN_REQUIRE(shape.channels % weight.size(1) == 0);
  shape.groups = shape.channels / weight.size(1);
  MMDCN_REQUIRE(weight.size(0) % shape.groups == 0);
  shape.deform_groups = offset.size(1) / shape.taps() / R;
  MMDCN_REQUIRE(offset.size(0) == shape.batch);
  MMDCN_REQUIRE(offset.size(1) > 0 && offset.size(1) == R * shape.samples());
  MMDCN_REQUIRE(shape.channels % (offset.size(1) / (R * shape.taps())) == 0);
  MMDCN_REQUIRE(weight.scalar_type() == input.scalar_type());
  MMDCN_REQUIRE(offset.scalar_type() == coordinate_type(input.scalar_type()));
  MMDCN_REQUIRE(offset.device() == input.device());
  MMDCN_REQUIRE(weight.device() == input.device());
  if (bias.has_value()) {
    MMDCN_REQUIRE(bias->dim() == 1 && bias->size(0) == shape.out_channels);
    MMDCN_REQUIRE(bias->scalar_type() == input.scalar_type());
    MMDCN_REQUIRE(bias->device() == input.device());
  }
  if (mask.has_value()) {
    MMDCN_REQUIRE(mask->dim() == R + 2 && mask->size(0) == shape.batch);
    MMDCN_REQUIRE(mask->size(1) == shape.samples());
    for (int d = 0; d < R; ++d) MMDCN_REQUIRE(mask->size(2 + d) == shape.out_size[d]);
    MMDCN_REQUIRE(mask->scalar_type() == offset.scalar_type());
    MMDCN_REQUIRE(mask->device() == input.device());
  }
  return shape;
}

// Sizes of the output.
template <int R>
std::vector<int64_t> output_size(const DeformConvNdShape<R>& shape) {
  std::vector<int64_t> sizes = {shape.batch, shape.out_channels};
  sizes.insert(sizes.end(), shape.out_size, shape.out_size + R);
  return sizes;
}

template <int R>
void check_grad_output(const DeformConvNdShape<R>& shape, const Tensor& grad_output,
                       const Tensor& input, const std::vector<bool>& output_mask) {
  check_grad_output("deform_conv_nd_backward", grad_output, output_size(shape), input, output_mask,
                    4);
}

namespace {

// The gradients that deform_conv_nd_backward returns.
struct ConvNdGradients {
  Tensor input, offset, weight, mask;

  // Uninitialised, of no elements where they are not wanted.
  ConvNdGradients(const Tensor& input_, const Tensor& offset_, const Tensor& weight_,
                  const std::optional<Tensor>& mask_, const std::vector<bool>& wanted)
      : input(like(input_, wanted[0])),
        offset(like(offset_, wanted[1])),
        weight(like(weight_, wanted[2])),
        mask(like(mask_.value_or(offset_), wanted[3] && mask_.has_value())) {}

  void zero() {
    for (Tensor* gradient : {&input, &offset, &weight, &mask}) torch::stable::zero_(*gradient);
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor> result() const {
    return {input, offset, weight, mask};
  }

 private:
  static Tensor like(const Tensor& tensor, bool wanted) {
    return new_tensor(tensor, wanted ? sizes_of(tensor) : std::vector<int64_t>{0},
                      tensor.scalar_type());
  }
};

}  // namespace

}  // namespace mmdcn
