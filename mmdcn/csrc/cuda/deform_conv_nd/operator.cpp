// deform_conv_nd on CUDA: layouts, memory, device and stream around the kernels.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../../deform_conv_nd_tensors.h"
#include "../device.h"
#include "kernels.h"

namespace mmdcn::cuda {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <int R>
Tensor forward(const DeformConvNdShape<R>& shape, const Tensor& input, const Tensor& offset,
               const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& mask) {
  const Precision precision = precision_of("deform_conv_nd", input);
  const OnDevice device(input);
  const Tensor output = new_tensor(input, output_size(shape), input.scalar_type());
  if (output.numel() == 0) return output;

  const Tensor features = as_contiguous(input);
  const Tensor offsets = as_contiguous(offset);
  const Tensor weights = as_contiguous(weight);
  const std::optional<Tensor> biases = as_contiguous(bias), masks = as_contiguous(mask);
  conv_nd_forward(precision, ConvNdProblem<R>(shape), features.const_data_ptr(),
                  offsets.const_data_ptr(), pointer(masks), weights.const_data_ptr(),
                  pointer(biases), output.mutable_data_ptr(), device.current_stream());
  return output;
}

template <int R>
Gradients backward(const DeformConvNdShape<R>& shape, const Tensor& grad_output,
                   const Tensor& input, const Tensor& offset, const Tensor& weight,
                   const std::optional<Tensor>& mask, const std::vector<bool>& wanted) {
  const Precision precision = precision_of("deform_conv_nd", input);
  const OnDevice device(input);
  const bool to_mask = wanted[3] && mask.has_value();
  ConvNdGradients gradient(input, offset, weight, mask, wanted);
  if (grad_output.numel() == 0 || input.numel() == 0) {
    gradient.zero();
    return gradient.result();
  }

  const ConvNdProblem<R> problem(shape);
  const Tensor gradients = as_contiguous(grad_output);
  const Tensor features = as_contiguous(input);
  const Tensor offsets = as_contiguous(offset);
  const Tensor weights = as_contiguous(weight);
  const std::optional<Tensor> masks = as_contiguous(mask);
  if (wanted[0] || wanted[1] || to_mask) {
    // Half types are summed in float.
    const bool convert = wanted[0] && input.scalar_type() != offset.scalar_type();
    Tensor sum =
        convert ? new_tensor(input, sizes_of(input), offset.scalar_type()) : gradient.input;
    torch::stable::zero_(sum);
    conv_nd_backward_data(precision, problem, gradients.const_data_ptr(), features.const_data_ptr(),
                          offsets.const_data_ptr(), pointer(masks), weights.const_data_ptr(),
                          wanted[0] ? sum.mutable_data_ptr() : nullptr,
                          wanted[1] ? gradient.offset.mutable_data_ptr() : nullptr,
                          to_mask ? gradient.mask.mutable_data_ptr() : nullptr,
                          device.current_stream());
    if (convert) torch::stable::copy_(gradient.input, sum);
  }
  if (wanted[2]) {
    conv_nd_backward_weight(precision, problem, gradients.const_data_ptr(),
                            features.const_data_ptr(), offsets.const_data_ptr(), pointer(masks),
                            gradient.weight.mutable_data_ptr(), device.current_stream());
  }
  return gradient.result();
}

Tensor deform_conv_nd(const Tensor& input, const Tensor& offset, const Tensor& weight,
                      const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                      const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                      const std::optional<Tensor>& mask) {
  const auto shape = deform_conv_nd_shape<kConvNdRank>(input, offset, weight, bias, stride, padding,
                                                       dilation, mask);
  return forward(shape, input, offset, weight, bias, mask);
}

Gradients deform_conv_nd_backward(const Tensor& grad_output, const Tensor& input,
                                  const Tensor& offset, const Tensor& weight,
                                  const std::vector<int64_t>& stride,
                                  const std::vector<int64_t>& padding,
                                  const std::vector<int64_t>& dilation,
                                  const std::optional<Tensor>& mask,
                                  const std::vector<bool>& output_mask) {
  const auto shape = deform_conv_nd_shape<kConvNdRank>(input, offset, weight, std::nullopt, stride,
                                                       padding, dilation, mask);
  check_grad_output(shape, grad_output, input, output_mask);
  return backward(shape, grad_output, input, offset, weight, mask, output_mask);
}

}  // namespace
}  // namespace mmdcn::cuda

STABLE_TORCH_LIBRARY_IMPL(mmdcn, CUDA, m) {
  m.impl("deform_conv_nd", TORCH_BOX(&mmdcn::cuda::deform_conv_nd));
  m.impl("deform_conv_nd_backward", TORCH_BOX(&mmdcn::cuda::deform_conv_nd_backward));
}
