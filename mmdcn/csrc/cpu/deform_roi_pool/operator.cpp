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

// About the number of pixels that a bin reads, with the usual two samples along each dimension.
constexpr int64_t kBinPixels = 9;

// Multiply-adds of the forward pass.
int64_t pass_work(const DeformRoIPoolShape& shape) {
  return shape.rois * shape.bins() * shape.out_channels * kBinPixels;
}

// Splits the output channels into blocks of at most `width` that lie inside one offset group.
std::vector<ChannelBlock> output_blocks(const DeformRoIPoolShape& shape, int64_t width) {
  return channel_blocks(shape.deform_groups, shape.deform_group_channels(), width);
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

  const Tensor inputs = as_channels_last(input);
  const std::optional<Tensor> offsets = as_contiguous(offset);
  RoIPoolTensors<T> tensors = {};
  tensors.input = const_data<T>(inputs);
  tensors.rois = const_data<acc_t>(boxes);
  tensors.offset = offsets.has_value() ? const_data<acc_t>(*offsets) : nullptr;
  tensors.output = data<T>(output);

  // As many channels at a time as keep a RoI's bins in the second-level cache.
  constexpr int64_t kValues = 1 << 16;
  const int64_t width = std::max<int64_t>(kValues / shape.bins() / 64 * 64, 64);
  const std::vector<ChannelBlock> blocks = output_blocks(shape, width);
  const RoIPoolKernel<T> kernel = MMDCN_CPU_KERNEL(deform_roi_pool, T)();
  const int64_t scratch_bytes = kernel.scratch_bytes(shape, std::min(width, shape.out_channels));
  parallel_for(0, shape.rois, grain(shape.rois, pass_work(shape)), [&](int64_t begin, int64_t end) {
    const Buffer<std::byte> scratch(scratch_bytes);
    for (const ChannelBlock& block : blocks) {
      kernel.forward(shape, tensors, block, begin, end, scratch.get());
    }
  });
  return output;
}

using Gradients = std::tuple<Tensor, Tensor>;

// Fills the gradients; those of no elements are not wanted. `grad_input` is channels-last and of
// the accumulators' type, and `rois` is contiguous. Each thread computes the gradients of some
// blocks of channels of some images alone. The gradients of the offsets sum over the channels of an
// offset group: each of its blocks leaves its sums in an array of its own, and these are added in
// the order of the blocks.
template <typename T, typename A = accumulator_t<T>>
void run_backward(const DeformRoIPoolShape& shape, const Tensor& grad_output, const Tensor& input,
                  const Tensor& rois, const std::optional<Tensor>& offset, const Tensor& grad_input,
                  const Tensor& grad_offset) {
  const int64_t width = block_width(shape.deform_group_channels());
  const std::vector<ChannelBlock> blocks = output_blocks(shape, width);
  const int64_t block_count = static_cast<int64_t>(blocks.size());
  const int64_t group_blocks = block_count / shape.deform_groups;
  const Tensor gradients = as_channels_last(grad_output);
  const Tensor inputs = as_channels_last(input);
  const std::optional<Tensor> offsets = as_contiguous(offset);
  const Buffer<A> offset_sums(group_blocks * grad_offset.numel());
  RoIPoolTensors<T> tensors = {};
  tensors.input = const_data<T>(inputs);
  tensors.rois = const_data<A>(rois);
  tensors.offset = offsets.has_value() ? const_data<A>(*offsets) : nullptr;
  tensors.grad_output = const_data<T>(gradients);
  tensors.grad_input = grad_input.numel() > 0 ? data<A>(grad_input) : nullptr;

  const RoIPoolKernel<T> kernel = MMDCN_CPU_KERNEL(deform_roi_pool, T)();
  const int64_t scratch_bytes = kernel.scratch_bytes(shape, width);
  const int64_t tasks = shape.batch * block_count;
  parallel_for(0, tasks, grain(tasks, 2 * pass_work(shape)), [&](int64_t begin, int64_t end) {
    const Buffer<std::byte> scratch(scratch_bytes);
    RoIPoolTensors<T> own = tensors;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task % block_count;
      if (grad_offset.numel() > 0) {
        own.grad_offset = offset_sums.get() + block % group_blocks * grad_offset.numel();
      }
      kernel.backward(shape, own, blocks[block], task / block_count, scratch.get());
    }
  });
  if (grad_offset.numel() > 0) add_in_order(offset_sums.get(), group_blocks, grad_offset);
}

template <typename T>
Gradients backward(const DeformRoIPoolShape& shape, const Tensor& grad_output, const Tensor& input,
                   const Tensor& rois, const std::optional<Tensor>& offset,
                   const std::vector<bool>& wanted) {
  const ScalarType acc_type = rois.scalar_type();
  const bool wants_input = wanted[0], wants_offset = wanted[1] && offset.has_value();
  Tensor grad_input =
      wants_input ? new_tensor(input, sizes_of(input), input.scalar_type(), layout_of(input))
                  : new_tensor(input, {0}, input.scalar_type());
  Tensor grad_offset = wants_offset ? new_tensor(input, sizes_of(*offset), acc_type)
                                    : new_tensor(input, {0}, acc_type);
  const Tensor boxes = as_contiguous(rois);
  check_images(shape, const_data<accumulator_t<T>>(boxes));
  if (grad_output.numel() == 0) {
    torch::stable::zero_(grad_input);
    torch::stable::zero_(grad_offset);
    return {grad_input, grad_offset};
  }

  // Half types are summed in float, and all types in channels-last order.
  const bool convert = wants_input && (input.scalar_type() != acc_type ||
                                       layout_of(input) != MemoryFormat::ChannelsLast);
  Tensor sum = convert ? new_tensor(input, sizes_of(input), acc_type, MemoryFormat::ChannelsLast)
                       : grad_input;
  torch::stable::zero_(sum);
  run_backward<T>(shape, grad_output, input, boxes, offset, sum, grad_offset);
  if (convert) torch::stable::copy_(grad_input, sum);
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
