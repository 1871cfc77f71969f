// What the registration files of all devices do with the tensors of a deformable convolution over R
// dimensions.
#pragma once

#include <tuple>

#include "deform_conv_nd_shape.h"
#include "tensors.h"

namespace mmdcn {

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

// The gradients that the operator gives.
struct ConvNdGradients {
  Tensor input, offset, weight, mask;

  // New ones for arguments as given, of no elements where they are not wanted.
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

// Calls `function` with the rank of an input as a constant: std::integral_constant<int, R>.
template <typename F>
auto with_rank(const Tensor& input, const F& function) {
  switch (input.dim()) {
    case 3:
      return function(std::integral_constant<int, 1>{});
    case 4:
      return function(std::integral_constant<int, 2>{});
    case 5:
      return function(std::integral_constant<int, 3>{});
    default:
      STD_TORCH_CHECK(false, "mmdcn::deform_conv_nd: input must have 3, 4 or 5 dimensions");
  }
}

}  // namespace mmdcn
