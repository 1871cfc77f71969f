// deform_conv2d on CUDA: layouts, memory, device and stream around the kernels.
#include "deform_conv2d.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../tensors.h"

namespace mmdcn::cuda {
namespace {

// A 4-D tensor made dense in one of the two layouts that the kernels take, by a copy if need be.
struct Features {
  Tensor tensor;
  Layout layout;

  explicit Features(const Tensor& any)
      : tensor(torch::stable::contiguous(any, layout_of(any))),
        layout(layout_in(tensor, layout_of(any))) {}

  static Layout layout_in(const Tensor& tensor, MemoryFormat format) {
    const int64_t channels = tensor.size(1), positions = tensor.size(2) * tensor.size(3);
    return format == MemoryFormat::ChannelsLast ? channels_last_layout(channels, positions)
                                                : contiguous_layout(channels, positions);
  }
};

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return torch::stable::contiguous(*tensor);
}

const void* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

Precision precision_of(const Tensor& input) {
  switch (input.scalar_type()) {
    case ScalarType::Double:
      return Precision::kFloat64;
    case ScalarType::Float:
      return Precision::kFloat32;
    case ScalarType::Half:
      return Precision::kFloat16;
    case ScalarType::BFloat16:
      return Precision::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "mmdcn::deform_conv2d: input must be a floating-point tensor");
  }
}

// Makes the device of a tensor the current one for its lifetime.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}

  Stream current_stream() const {
    void* handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &handle));
    return {index_, handle};
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

Tensor deform_conv2d(const Tensor& input, const Tensor& offset, const Tensor& weight,
                     const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                     const std::optional<Tensor>& mask) {
  const DeformConv2dShape shape =
      deform_conv2d_shape(input, offset, weight, bias, stride, padding, dilation, mask);
  const Precision precision = precision_of(input);
  const OnDevice device(input);
  const MemoryFormat format = layout_of(input);
  const Tensor output =
      new_tensor(input, {shape.batch, shape.out_channels, shape.out_height, shape.out_width},
                 input.scalar_type(), format);
  if (output.numel() == 0) return output;

  const Features features(input);
  const Tensor offsets = torch::stable::contiguous(offset);
  const Tensor weights = torch::stable::contiguous(weight, MemoryFormat::ChannelsLast);
  const std::optional<Tensor> biases = contiguous(bias), masks = contiguous(mask);
  const DeformConv2dProblem problem(shape, features.layout, Features::layout_in(output, format));
  deform_conv2d_forward(precision, problem, features.tensor.const_data_ptr(),
                        offsets.const_data_ptr(), pointer(masks), weights.const_data_ptr(),
                        pointer(biases), output.mutable_data_ptr(), device.current_stream());
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> deform_conv2d_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& offset, const Tensor& weight,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, const std::optional<Tensor>& mask,
    const std::vector<bool>& output_mask) {
  const DeformConv2dShape shape =
      deform_conv2d_shape(input, offset, weight, std::nullopt, stride, padding, dilation, mask);
  check_grad_output(shape, grad_output, input, output_mask);
  const Precision precision = precision_of(input);
  const OnDevice device(input);
  const bool to_input = output_mask[0], to_offset = output_mask[1], to_weight = output_mask[2];
  const bool to_mask = output_mask[3] && mask.has_value();

  const auto gradient = [&](bool wanted, const Tensor& of,
                            MemoryFormat format = MemoryFormat::Contiguous) {
    return wanted ? new_tensor(input, sizes_of(of), of.scalar_type(), format)
                  : new_tensor(input, {0}, of.scalar_type());
  };
  Tensor grad_input = gradient(to_input, input, layout_of(input));
  Tensor grad_offset = gradient(to_offset, offset);
  Tensor grad_weight = gradient(to_weight, weight);
  Tensor grad_mask = gradient(to_mask, to_mask ? *mask : offset);

  // Sums over nothing, and samples of nothing.
  if (grad_output.numel() == 0 || input.numel() == 0) {
    for (Tensor* tensor : {&grad_input, &grad_offset, &grad_weight, &grad_mask}) {
      torch::stable::zero_(*tensor);
    }
    return {grad_input, grad_offset, grad_weight, grad_mask};
  }

  const Features gradients(grad_output), features(input);
  const Tensor offsets = torch::stable::contiguous(offset);
  const std::optional<Tensor> masks = contiguous(mask);
  const ScalarType acc_type = offset.scalar_type();
  const DeformConv2dProblem problem(shape, features.layout, gradients.layout);

  if (to_input || to_offset || to_mask) {
    // Half types are summed in float.
    const bool convert = to_input && input.scalar_type() != acc_type;
    Tensor sum =
        convert ? new_tensor(input, sizes_of(input), acc_type, layout_of(input)) : grad_input;
    torch::stable::zero_(sum);
    const Tensor weights = torch::stable::contiguous(weight, MemoryFormat::ChannelsLast);
    deform_conv2d_backward_data(
        precision, problem, gradients.tensor.const_data_ptr(), features.tensor.const_data_ptr(),
        offsets.const_data_ptr(), pointer(masks), weights.const_data_ptr(),
        to_input ? sum.mutable_data_ptr() : nullptr,
        to_offset ? grad_offset.mutable_data_ptr() : nullptr,
        to_mask ? grad_mask.mutable_data_ptr() : nullptr, device.current_stream());
    if (convert) torch::stable::copy_(grad_input, sum);
  }

  if (to_weight) {
    const int64_t splits = deform_conv2d_weight_splits(problem);
    const Tensor workspace =
        new_tensor(input, {splits, shape.out_channels, problem.columns}, acc_type);
    deform_conv2d_backward_weight(precision, problem, gradients.tensor.const_data_ptr(),
                                  features.tensor.const_data_ptr(), offsets.const_data_ptr(),
                                  pointer(masks), splits, workspace.mutable_data_ptr(),
                                  grad_weight.mutable_data_ptr(), device.current_stream());
  }
  return {grad_input, grad_offset, grad_weight, grad_mask};
}

}  // namespace
}  // namespace mmdcn::cuda

STABLE_TORCH_LIBRARY_IMPL(mmdcn, CUDA, m) {
  m.impl("deform_conv2d", TORCH_BOX(&mmdcn::cuda::deform_conv2d));
  m.impl("deform_conv2d_backward", TORCH_BOX(&mmdcn::cuda::deform_conv2d_backward));
}
