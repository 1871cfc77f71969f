// deform_conv2d on CUDA: layouts, memory, device and stream around the kernels.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../../deform_conv2d_tensors.h"
#include "../device.h"
#include "kernels.h"

namespace mmdcn::cuda {
namespace {

Layout layout_in(const Tensor& tensor, MemoryFormat format) {
  const int64_t channels = tensor.size(1), positions = tensor.size(2) * tensor.size(3);
  return format == MemoryFormat::ChannelsLast ? channels_last_layout(channels, positions)
                                              : contiguous_layout(channels, positions);
}

// A 4-D tensor dense in one of the two layouts that the kernels take, at an address that they can
// load vectors from: a copy, where it is neither.
Tensor dense(const Tensor& any, MemoryFormat format) {
  const Tensor tensor = torch::stable::contiguous(any, format);
  const bool aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  return aligned ? tensor : torch::stable::clone(tensor);
}

// Which kernels compute a call.
Kernels kernels_for(Precision precision, const DeformConv2dShape& shape, bool allow_tf32,
                    int device) {
  const bool allowed = precision != Precision::kFloat32 || allow_tf32;
  const bool possible = takes_tensor_cores(precision, shape) && has_tensor_cores(device);
  return allowed && possible ? chosen_kernels() : Kernels::kSimple;
}

int64_t image_bytes(const Tensor& tensor, int64_t element_size) {
  return tensor.size(1) * tensor.size(2) * tensor.size(3) * element_size;
}

// How many images to work on at a time, if each takes so much memory.
int64_t images_at_a_time(int64_t batch, int64_t bytes) {
  if (bytes == 0) return batch;
  return std::clamp<int64_t>(deform_conv2d_workspace_bytes() / bytes, 1, batch);
}

// Some images of a batch, by their numbers.
struct Images {
  int64_t first, count;

  Tensor of(Tensor tensor) const { return torch::stable::narrow(tensor, 0, first, count); }
  std::optional<Tensor> of(const std::optional<Tensor>& tensor) const {
    if (!tensor.has_value()) return std::nullopt;
    return of(*tensor);
  }
};

Tensor deform_conv2d(const Tensor& input, const Tensor& offset, const Tensor& weight,
                     const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                     const std::optional<Tensor>& mask, bool allow_tf32) {
  DeformConv2dShape shape =
      deform_conv2d_shape(input, offset, weight, bias, stride, padding, dilation, mask);
  const Precision precision = precision_of("deform_conv2d", input);
  const OnDevice device(input);
  const MemoryFormat format = layout_of(input);
  const Tensor output =
      new_tensor(input, {shape.batch, shape.out_channels, shape.out_height, shape.out_width},
                 input.scalar_type(), format);
  if (output.numel() == 0) return output;

  const Stream stream = device.current_stream();
  const Kernels kernels = kernels_for(precision, shape, allow_tf32, stream.device);
  const MemoryFormat sampled =
      kernels == Kernels::kTensorCore ? MemoryFormat::ChannelsLast : format;
  const Tensor offsets = as_contiguous(offset);
  const Tensor weights = dense(weight, MemoryFormat::ChannelsLast);
  const std::optional<Tensor> biases = as_contiguous(bias), masks = as_contiguous(mask);
  const int64_t batch = shape.batch;
  const int64_t bytes = sampled == format ? 0 : image_bytes(input, input.element_size());
  const int64_t images = images_at_a_time(batch, bytes);
  for (int64_t first = 0; first < batch; first += images) {
    const Images some = {first, std::min(images, batch - first)};
    shape.batch = some.count;
    const Tensor features = dense(some.of(input), sampled), part = some.of(output);
    const DeformConv2dProblem problem(shape, layout_in(features, sampled), layout_in(part, format));
    const std::optional<Tensor> part_masks = some.of(masks);
    deform_conv2d_forward(kernels, precision, problem, features.const_data_ptr(),
                          some.of(offsets).const_data_ptr(), pointer(part_masks),
                          weights.const_data_ptr(), pointer(biases), part.mutable_data_ptr(),
                          stream);
  }
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> deform_conv2d_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& offset, const Tensor& weight,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, const std::optional<Tensor>& mask,
    const std::vector<bool>& output_mask, bool allow_tf32, bool deterministic) {
  DeformConv2dShape shape =
      deform_conv2d_shape(input, offset, weight, std::nullopt, stride, padding, dilation, mask);
  check_grad_output(shape, grad_output, input, output_mask);
  const Precision precision = precision_of("deform_conv2d", input);
  const OnDevice device(input);
  const Stream stream = device.current_stream();
  const bool to_input = output_mask[0], to_offset = output_mask[1], to_weight = output_mask[2];
  const bool to_mask = output_mask[3] && mask.has_value();

  const auto gradient = [&](bool wanted, const Tensor& of,
                            MemoryFormat format = MemoryFormat::Contiguous) {
    return wanted ? new_tensor(input, sizes_of(of), of.scalar_type(), format)
                  : new_tensor(input, {0}, of.scalar_type());
  };
  const MemoryFormat format = layout_of(input);
  Tensor grad_input = gradient(to_input, input, format);
  Tensor grad_offset = gradient(to_offset, offset);
  Tensor grad_weight = gradient(to_weight, weight);
  Tensor grad_mask = gradient(to_mask, to_mask ? *mask : offset);
  // Each in the layout of what it is the gradient of; the kernels write planes.
  const auto in_layouts = [&]() -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    const auto as = [](bool wanted, const Tensor& gradient, const Tensor& of) {
      return wanted ? dense(gradient, layout_of(of)) : gradient;
    };
    return {grad_input, as(to_offset, grad_offset, offset), as(to_weight, grad_weight, weight),
            as(to_mask, grad_mask, to_mask ? *mask : offset)};
  };

  // Sums over nothing, and samples of nothing.
  if (grad_output.numel() == 0 || input.numel() == 0) {
    for (Tensor* tensor : {&grad_input, &grad_offset, &grad_weight, &grad_mask}) {
      torch::stable::zero_(*tensor);
    }
    return in_layouts();
  }

  const Kernels kernels = kernels_for(precision, shape, allow_tf32, stream.device);
  const bool tensor_cores = kernels == Kernels::kTensorCore;
  const MemoryFormat sampled = tensor_cores ? MemoryFormat::ChannelsLast : format;
  const MemoryFormat multiplied =
      tensor_cores ? MemoryFormat::ChannelsLast : layout_of(grad_output);
  const ScalarType acc_type = offset.scalar_type();
  const int64_t acc_size = offset.element_size();
  // Half types are summed in float.
  const bool sum_apart = to_input && (input.scalar_type() != acc_type || sampled != format);
  const bool fixed_point = to_input && deterministic;

  int64_t bytes = 0;
  if (sampled != format) bytes += image_bytes(input, input.element_size());
  if (multiplied != layout_of(grad_output)) {
    bytes += image_bytes(grad_output, grad_output.element_size());
  }
  if (sum_apart) bytes += image_bytes(input, acc_size);
  if (fixed_point) bytes += image_bytes(input, sizeof(int64_t));
  const int64_t batch = shape.batch, images = images_at_a_time(batch, bytes);

  const Tensor offsets = as_contiguous(offset);
  const std::optional<Tensor> masks = as_contiguous(mask);
  const Tensor weights = dense(weight, MemoryFormat::ChannelsLast);
  std::optional<Tensor> workspace;
  int64_t splits = 0;
  for (int64_t first = 0; first < batch; first += images) {
    const Images some = {first, std::min(images, batch - first)};
    shape.batch = some.count;
    const Tensor features = dense(some.of(input), sampled);
    const Tensor gradients = dense(some.of(grad_output), multiplied);
    const Tensor part_offsets = some.of(offsets);
    const std::optional<Tensor> part_masks = some.of(masks);
    const DeformConv2dProblem problem(shape, layout_in(features, sampled),
                                      layout_in(gradients, multiplied));

    if (to_input || to_offset || to_mask) {
      GradInput sums;
      std::optional<Tensor> part, sum, fixed, magnitudes;
      if (to_input) {
        part = some.of(grad_input);
        sum = sum_apart ? new_tensor(input, sizes_of(*part), acc_type, sampled) : *part;
      }
      if (fixed_point) {
        magnitudes = new_tensor(input, {3}, ScalarType::Int);
        torch::stable::zero_(*magnitudes);
        fixed = new_tensor(input, {part->numel()}, ScalarType::Long);
        torch::stable::zero_(*fixed);
        deform_conv2d_magnitudes(precision, problem, gradients.const_data_ptr(),
                                 weights.const_data_ptr(), pointer(part_masks),
                                 data<int32_t>(*magnitudes), stream);
        sums.fixed = data<int64_t>(*fixed);
        sums.magnitudes = const_data<int32_t>(*magnitudes);
      } else if (to_input) {
        torch::stable::zero_(*sum);
        sums.sum = sum->mutable_data_ptr();
      }
      deform_conv2d_backward_data(
          kernels, precision, problem, gradients.const_data_ptr(), features.const_data_ptr(),
          part_offsets.const_data_ptr(), pointer(part_masks), weights.const_data_ptr(), sums,
          to_offset ? some.of(grad_offset).mutable_data_ptr() : nullptr,
          to_mask ? some.of(grad_mask).mutable_data_ptr() : nullptr, stream);
      if (fixed_point) {
        deform_conv2d_from_fixed(precision, problem, sums, sum->mutable_data_ptr(), stream);
      }
      if (sum_apart) torch::stable::copy_(*part, *sum);
    }

    if (to_weight) {
      const bool accumulate = workspace.has_value();
      if (!accumulate) {
        splits = deform_conv2d_weight_splits(kernels, precision, problem);
        workspace = new_tensor(input, {splits, shape.out_channels, problem.columns}, acc_type);
      }
      deform_conv2d_backward_weight(kernels, precision, problem, gradients.const_data_ptr(),
                                    features.const_data_ptr(), part_offsets.const_data_ptr(),
                                    pointer(part_masks), splits, accumulate,
                                    workspace->mutable_data_ptr(), stream);
      if (first + images >= batch) {
        deform_conv2d_sum_splits(precision, problem, splits, workspace->const_data_ptr(),
                                 grad_weight.mutable_data_ptr(), stream);
      }
    }
  }
  return in_layouts();
}

}  // namespace
}  // namespace mmdcn::cuda

STABLE_TORCH_LIBRARY_IMPL(mmdcn, CUDA, m) {
  m.impl("deform_conv2d", TORCH_BOX(&mmdcn::cuda::deform_conv2d));
  m.impl("deform_conv2d_backward", TORCH_BOX(&mmdcn::cuda::deform_conv2d_backward));
}
