// Registration of deform_roi_pool on the CPU: layouts, memory and threads around the kernels.
#include "../operator.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstddef>
#include <tuple>
#include <vector>

#include "../../deform_roi_pool_tensors.h"
#include "kernel.h"

namespace mmdcn {
namespace {

// Pixels that a bin reads, about, where each has the usual two points a dimension.
constexpr int64_t kBinPixels = 9;

// Splits the output channels into parts that lie inside one offset group, of `width` channels at
// most. They follow from the shape alone, so that the order of every sum does too.
std::vector<RoIPoolChannels> split_channels(const DeformRoIPoolShape& shape, int64_t width) {
  std::vector<RoIPoolChannels> parts;
  for (int64_t group = 0; group < shape.deform_groups; ++group) {
    const int64_t end = (group + 1) * shape.deform_group_channels();
    for (int64_t c = group * shape.deform_group_channels(); c < end; c += width) {
      parts.push_back({group, c, std::min(c + width, end)});
    }
  }
  return parts;
}

int64_t pass_work(const DeformRoIPoolShape& shape) {
  return shape.rois * shape.bins() * shape.out_channels * kBinPixels;
}

template <typename T>
void check_images(const DeformRoIPoolShape& shape, const T* rois) {
  for (int64_t r = 0; r < shape.rois; ++r) {
    STD_TORCH_CHECK(image_of_roi(shape, rois + 5 * r) >= 0,
                    "rois: expected in column 0 the number of an image, from 0 to ",
                    shape.batch - 1, ", got ", rois[5 * r], " in row ", r);
  }
}

template <typename T>
Tensor forward(const DeformRoIPoolShape& shape, const Tensor& input, const Tensor& rois,
               const std::optional<Tensor>& offset) {
  using acc_t = accumulator_t<T>;
  Tensor output =
      new_tensor(input, {shape.rois, shape.out_channels, shape.out_height, shape.out_width},
                 input.scalar_type());
  const Tensor boxes = as_contiguous(rois);
  check_images(shape, const_data<acc_t>(boxes));
  if (output.numel() == 0) return output;

  const Tensor inputs = torch::stable::contiguous(input, MemoryFormat::ChannelsLast);
  const std::optional<Tensor> offsets = as_contiguous(offset);
  RoIPoolTensors<T> tensors = {};
  tensors.input = const_data<T>(inputs);
  tensors.rois = const_data<acc_t>(boxes);
  tensors.offset = offsets.has_value() ? const_data<acc_t>(*offsets) : nullptr;
  tensors.output = data<T>(output);

  // All channels at once, as long as their bins stay in the second-level cache.
  constexpr int64_t kValues = 1 << 16;
  const int64_t width = std::max<int64_t>(kValues / shape.bins() / 64 * 64, 64);
  const std::vector<RoIPoolChannels> parts = split_channels(shape, width);
  const RoIPoolKernel<T> kernel = MMDCN_CPU_KERNEL(deform_roi_pool, T)();
  const int64_t scratch_bytes = kernel.scratch_bytes(shape, std::min(width, shape.out_channels));
  torch::stable::parallel_for(
      0, shape.rois, grain(shape.rois, pass_work(shape)), [&](int64_t begin, int64_t end) {
        const Buffer<std::byte> scratch(scratch_bytes);
        for (const RoIPoolChannels& channels : parts) {
          kernel.forward(shape, tensors, channels, begin, end, scratch.get());
        }
      });
  return output;
}

using Gradients = std::tuple<Tensor, Tensor>;

template <typename T>
Gradients backward(const DeformRoIPoolShape& shape, const Tensor& grad_output, const Tensor& input,
                   const Tensor& rois, const std::optional<Tensor>& offset,
                   const std::vector<bool>& wanted) {
  using acc_t = accumulator_t<T>;
  const ScalarType acc_type = rois.scalar_type();
  const bool wants_offset = wanted[1] && offset.has_value();
  Tensor grad_input =
      wanted[0] ? new_tensor(input, sizes_of(input), input.scalar_type(), layout_of(input))
                : new_tensor(input, {0}, input.scalar_type());
  Tensor grad_offset = wants_offset ? new_tensor(input, sizes_of(*offset), acc_type)
                                    : new_tensor(input, {0}, acc_type);
  const Tensor boxes = as_contiguous(rois);
  check_images(shape, const_data<acc_t>(boxes));
  if (grad_output.numel() == 0) {
    torch::stable::zero_(grad_input);
    torch::stable::zero_(grad_offset);
    return {grad_input, grad_offset};
  }

  // Each thread computes the gradients of some channels of some images alone. Those of the offsets
  // sum over the channels of an offset group: its parts are kept aside and added in their order.
  const int64_t quarter = (shape.deform_group_channels() + 3) / 4;
  const int64_t width = std::clamp<int64_t>((quarter + 15) / 16 * 16, 16, 64);
  const std::vector<RoIPoolChannels> parts = split_channels(shape, width);
  const int64_t part_count = static_cast<int64_t>(parts.size());
  const int64_t group_parts = part_count / shape.deform_groups;

  const Tensor gradients = torch::stable::contiguous(grad_output, MemoryFormat::ChannelsLast);
  const Tensor inputs = torch::stable::contiguous(input, MemoryFormat::ChannelsLast);
  const std::optional<Tensor> offsets = as_contiguous(offset);
  // Half types are summed in float.
  const bool convert =
      input.scalar_type() != acc_type || layout_of(input) != MemoryFormat::ChannelsLast;
  Tensor sum = grad_input;
  if (wanted[0] && convert) {
    sum = new_tensor(input, sizes_of(input), acc_type, MemoryFormat::ChannelsLast);
  }
  torch::stable::zero_(sum);
  const Buffer<acc_t> partial(wants_offset ? group_parts * grad_offset.numel() : 0);

  RoIPoolTensors<T> tensors = {};
  tensors.input = const_data<T>(inputs);
  tensors.rois = const_data<acc_t>(boxes);
  tensors.offset = offsets.has_value() ? const_data<acc_t>(*offsets) : nullptr;
  tensors.grad_output = const_data<T>(gradients);
  tensors.grad_input = wanted[0] ? data<acc_t>(sum) : nullptr;
  const RoIPoolKernel<T> kernel = MMDCN_CPU_KERNEL(deform_roi_pool, T)();
  const int64_t scratch_bytes = kernel.scratch_bytes(shape, width);
  const int64_t tasks = shape.batch * part_count;
  torch::stable::parallel_for(
      0, tasks, grain(tasks, 2 * pass_work(shape)), [&](int64_t begin, int64_t end) {
        const Buffer<std::byte> scratch(scratch_bytes);
        RoIPoolTensors<T> mine = tensors;
        for (int64_t task = begin; task < end; ++task) {
          const int64_t part = task % part_count;
          if (wants_offset) {
            mine.grad_offset = partial.get() + part % group_parts * grad_offset.numel();
          }
          kernel.backward(shape, mine, parts[part], task / part_count, scratch.get());
        }
      });

  if (wants_offset) {
    acc_t* target = data<acc_t>(grad_offset);
    const int64_t elements = grad_offset.numel();
    torch::stable::parallel_for(0, elements, grain(elements, elements * group_parts),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t i = begin; i < end; ++i) {
                                    acc_t total = 0;
                                    for (int64_t part = 0; part < group_parts; ++part) {
                                      total += partial.get()[part * elements + i];
                                    }
                                    target[i] = total;
                                  }
                                });
  }
  if (wanted[0] && convert) torch::stable::copy_(grad_input, sum);
  return {grad_input, grad_offset};
}

Tensor deform_roi_pool(const Tensor& input, const Tensor& rois, const std::optional<Tensor>& offset,
                       const std::vector<int64_t>& output_size, double spatial_scale,
                       int64_t sampling_ratio, double gamma, bool position_sensitive) {
  const DeformRoIPoolShape shape = deform_roi_pool_shape(
      input, rois, offset, output_size, spatial_scale, sampling_ratio, gamma, position_sensitive);
  return with_element_type(
      input, [&](auto element) { return forward<decltype(element)>(shape, input, rois, offset); });
}

Gradients deform_roi_pool_backward(const Tensor& grad_output, const Tensor& input,
                                   const Tensor& rois, const std::optional<Tensor>& offset,
                                   const std::vector<int64_t>& output_size, double spatial_scale,
                                   int64_t sampling_ratio, double gamma, bool position_sensitive,
                                   const std::vector<bool>& output_mask) {
  const DeformRoIPoolShape shape = deform_roi_pool_shape(
      input, rois, offset, output_size, spatial_scale, sampling_ratio, gamma, position_sensitive);
  check_grad_output(shape, grad_output, input, output_mask);
  return with_element_type(input, [&](auto element) {
    return backward<decltype(element)>(shape, grad_output, input, rois, offset, output_mask);
  });
}

}  // namespace
}  // namespace mmdcn

STABLE_TORCH_LIBRARY_IMPL(mmdcn, CPU, m) {
  m.impl("deform_roi_pool", TORCH_BOX(&mmdcn::deform_roi_pool));
  m.impl("deform_roi_pool_backward", TORCH_BOX(&mmdcn::deform_roi_pool_backward));
}
