// deform_aggregate on CUDA: layouts, memory, device and stream around the kernels.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../../deform_aggregate_tensors.h"
#include "../device.h"
#include "kernels.h"

namespace mmdcn::cuda {
namespace {

Tensor deform_aggregate(const Tensor& input, const Tensor& offset, const Tensor& mask,
                        const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                        double offset_scale, bool remove_center) {
  const DeformAggregateShape shape = deform_aggregate_shape(
      input, offset, mask, kernel_size, stride, padding, dilation, offset_scale, remove_center);
  const Precision precision = precision_of("deform_aggregate", input);
  const OnDevice device(input);
  const Tensor output =
      new_tensor(input, {shape.batch, shape.y.out_size, shape.x.out_size, shape.channels},
                 input.scalar_type());
  if (output.numel() == 0) return output;

  const Tensor features = aligned(as_contiguous(input));
  const Tensor offsets = readable_taps(offset), masks = readable_taps(mask);
  const AggregateProblem problem = {shape, aggregate_layout(offsets), aggregate_layout(masks)};
  aggregate_forward(precision, problem, features.const_data_ptr(), offsets.const_data_ptr(),
                    masks.const_data_ptr(), output.mutable_data_ptr(), device.current_stream());
  return output;
}

std::tuple<Tensor, Tensor, Tensor> deform_aggregate_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& offset, const Tensor& mask,
    const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, double offset_scale,
    bool remove_center, const std::vector<bool>& output_mask) {
  const DeformAggregateShape shape = deform_aggregate_shape(
      input, offset, mask, kernel_size, stride, padding, dilation, offset_scale, remove_center);
  check_grad_output(shape, grad_output, input, output_mask);
  const Precision precision = precision_of("deform_aggregate", input);
  const OnDevice device(input);
  const auto gradient_of = [&](const Tensor& tensor, bool wanted) {
    return new_tensor(input, wanted ? sizes_of(tensor) : std::vector<int64_t>{0},
                      tensor.scalar_type());
  };
  const bool to_input = output_mask[0], to_offset = output_mask[1], to_mask = output_mask[2];
  Tensor grad_input = gradient_of(input, to_input);
  Tensor grad_offset = gradient_of(offset, to_offset);
  Tensor grad_mask = gradient_of(mask, to_mask);
  if (grad_output.numel() == 0) {
    for (Tensor* gradient : {&grad_input, &grad_offset, &grad_mask}) {
      torch::stable::zero_(*gradient);
    }
  }
  if (grad_output.numel() == 0 || !(to_input || to_offset || to_mask)) {
    return {grad_input, grad_offset, grad_mask};
  }

  const Tensor gradients = aligned(as_contiguous(grad_output));
  const Tensor features = aligned(as_contiguous(input));
  const Tensor offsets = readable_taps(offset), masks = readable_taps(mask);
  const AggregateProblem problem = {shape, aggregate_layout(offsets), aggregate_layout(masks)};
  // Half types are summed in float.
  const bool convert = to_input && input.scalar_type() != offset.scalar_type();
  Tensor sum = convert ? new_tensor(input, sizes_of(input), offset.scalar_type()) : grad_input;
  torch::stable::zero_(sum);
  aggregate_backward(precision, problem, gradients.const_data_ptr(), features.const_data_ptr(),
                     offsets.const_data_ptr(), masks.const_data_ptr(),
                     to_input ? sum.mutable_data_ptr() : nullptr,
                     to_offset ? grad_offset.mutable_data_ptr() : nullptr,
                     to_mask ? grad_mask.mutable_data_ptr() : nullptr, device.current_stream());
  if (convert) torch::stable::copy_(grad_input, sum);
  return {grad_input, grad_offset, grad_mask};
}

}  // namespace
}  // namespace mmdcn::cuda

STABLE_TORCH_LIBRARY_IMPL(mmdcn, CUDA, m) {
  m.impl("deform_aggregate", TORCH_BOX(&mmdcn::cuda::deform_aggregate));
  m.impl("deform_aggregate_backward", TORCH_BOX(&mmdcn::cuda::deform_aggregate_backward));
}
