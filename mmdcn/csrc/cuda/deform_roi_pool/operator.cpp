// Registration of deform_roi_pool on CUDA: layouts, memory, device and stream around the kernels.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../../deform_roi_pool_tensors.h"
#include "../device.h"
#include "kernels.h"

namespace mmdcn::cuda {
namespace {

Tensor deform_roi_pool(const Tensor& input, const Tensor& rois, const std::optional<Tensor>& offset,
                       const std::vector<int64_t>& output_size, double spatial_scale,
                       int64_t sampling_ratio, double gamma, bool position_sensitive) {
  const DeformRoIPoolShape shape = deform_roi_pool_shape(
      input, rois, offset, output_size, spatial_scale, sampling_ratio, gamma, position_sensitive);
  const Precision precision = precision_of("deform_roi_pool", input);
  const OnDevice device(input);
  const Tensor output =
      new_tensor(input, {shape.rois, shape.out_channels, shape.out_height, shape.out_width},
                 input.scalar_type());
  if (output.numel() == 0) return output;

  const Tensor features = aligned(as_channels_last(input));
  const Tensor boxes = as_contiguous(rois);
  const std::optional<Tensor> offsets = as_contiguous(offset);
  roi_pool_forward(precision, shape, features.const_data_ptr(), boxes.const_data_ptr(),
                   pointer(offsets), output.mutable_data_ptr(), device.current_stream());
  return output;
}

std::tuple<Tensor, Tensor> deform_roi_pool_backward(const Tensor& grad_output, const Tensor& input,
                                                    const Tensor& rois,
                                                    const std::optional<Tensor>& offset,
                                                    const std::vector<int64_t>& output_size,
                                                    double spatial_scale, int64_t sampling_ratio,
                                                    double gamma, bool position_sensitive,
                                                    const std::vector<bool>& output_mask) {
  const DeformRoIPoolShape shape = deform_roi_pool_shape(
      input, rois, offset, output_size, spatial_scale, sampling_ratio, gamma, position_sensitive);
  check_grad_output(shape, grad_output, input, output_mask);
  const Precision precision = precision_of("deform_roi_pool", input);
  const OnDevice device(input);
  const bool to_input = output_mask[0], to_offset = output_mask[1] && offset.has_value();
  const ScalarType acc_type = rois.scalar_type();
  Tensor grad_input =
      to_input ? new_tensor(input, sizes_of(input), input.scalar_type(), layout_of(input))
               : new_tensor(input, {0}, input.scalar_type());
  Tensor grad_offset =
      to_offset ? new_tensor(input, sizes_of(*offset), acc_type) : new_tensor(input, {0}, acc_type);
  if (grad_output.numel() == 0) {
    torch::stable::zero_(grad_input);
    torch::stable::zero_(grad_offset);
  }
  if (grad_output.numel() == 0 || !(to_input || to_offset)) return {grad_input, grad_offset};

  const Tensor gradients = aligned(as_channels_last(grad_output));
  const Tensor features = aligned(as_channels_last(input));
  const Tensor boxes = as_contiguous(rois);
  const std::optional<Tensor> offsets = as_contiguous(offset);
  // Half types are summed in float, and all in channels-last order.
  const bool convert =
      input.scalar_type() != acc_type || layout_of(input) != MemoryFormat::ChannelsLast;
  Tensor sum = grad_input;
  if (to_input && convert) {
    sum = new_tensor(input, sizes_of(input), acc_type, MemoryFormat::ChannelsLast);
  }
  torch::stable::zero_(sum);
  roi_pool_backward(precision, shape, gradients.const_data_ptr(), features.const_data_ptr(),
                    boxes.const_data_ptr(), pointer(offsets),
                    to_input ? sum.mutable_data_ptr() : nullptr,
                    to_offset ? grad_offset.mutable_data_ptr() : nullptr, device.current_stream());
  if (to_input && convert) torch::stable::copy_(grad_input, sum);
  return {grad_input, grad_offset};
}

}  // namespace
}  // namespace mmdcn::cuda

STABLE_TORCH_LIBRARY_IMPL(mmdcn, CUDA, m) {
  m.impl("deform_roi_pool", TORCH_BOX(&mmdcn::cuda::deform_roi_pool));
  m.impl("deform_roi_pool_backward", TORCH_BOX(&mmdcn::cuda::deform_roi_pool_backward));
}
