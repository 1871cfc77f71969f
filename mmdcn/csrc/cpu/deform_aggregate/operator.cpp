// Registration of deform_aggregate on the CPU: layouts, memory and threads around the kernels.
#include "../operator.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstddef>
#include <tuple>
#include <vector>

#include "../../deform_aggregate_tensors.h"
#include "kernel.h"

namespace mmdcn {
namespace {

int64_t pass_work(const DeformAggregateShape& shape) {
  const int64_t samples = shape.batch * shape.pixels() * shape.taps();
  return samples * (4 * shape.channels + kElementWork * shape.groups);
}

// Splits the channels into parts that lie inside one group: as few as threads have enough of, as
// each locates its samples anew. They follow from the shape alone, so that the order of every sum
// does too.
std::vector<AggregateChannels> split_channels(const DeformAggregateShape& shape) {
  const int64_t quarter = (shape.channels + 3) / 4;
  const int64_t width = std::clamp<int64_t>((quarter + 15) / 16 * 16, 16, 64);
  std::vector<AggregateChannels> parts;
  for (int64_t group = 0; group < shape.groups; ++group) {
    const int64_t end = (group + 1) * shape.group_channels();
    for (int64_t c = group * shape.group_channels(); c < end; c += width) {
      parts.push_back({group, c, std::min(c + width, end)});
    }
  }
  return parts;
}

template <typename T>
AggregateTensors<T> tensors_of(const Tensor& input, const Tensor& offset, const Tensor& mask) {
  using acc_t = accumulator_t<T>;
  AggregateTensors<T> tensors = {};
  tensors.input = const_data<T>(input);
  tensors.offset = const_data<acc_t>(offset);
  tensors.mask = const_data<acc_t>(mask);
  tensors.offset_layout = aggregate_layout(offset);
  tensors.mask_layout = aggregate_layout(mask);
  return tensors;
}

template <typename T>
Tensor forward(const DeformAggregateShape& shape, const Tensor& input, const Tensor& offset,
               const Tensor& mask) {
  Tensor output =
      new_tensor(input, {shape.batch, shape.y.out_size, shape.x.out_size, shape.channels},
                 input.scalar_type());
  if (output.numel() == 0) return output;

  const Tensor inputs = as_contiguous(input);
  const Tensor offsets = aggregate_points(offset), masks = aggregate_points(mask);
  AggregateTensors<T> tensors = tensors_of<T>(inputs, offsets, masks);
  tensors.output = data<T>(output);
  const AggregateKernel<T> kernel = MMDCN_CPU_KERNEL(deform_aggregate, T)();
  const int64_t pixels = shape.batch * shape.pixels();
  torch::stable::parallel_for(0, pixels, grain(pixels, pass_work(shape)),
                              [&](int64_t begin, int64_t end) {
                                const Buffer<std::byte> scratch(kernel.scratch_bytes(shape));
                                kernel.forward(shape, tensors, begin, end, scratch.get());
                              });
  return output;
}

// target = the sum of `count` parts of its size, in their order.
template <typename A>
void add_parts(const A* parts, int64_t count, const Tensor& target) {
  const int64_t elements = target.numel();
  A* sums = data<A>(target);
  torch::stable::parallel_for(0, elements, grain(elements, elements * count),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  A total = 0;
                                  for (int64_t part = 0; part < count; ++part)
                                    total += parts[part * elements + i];
                                  sums[i] = total;
                                }
                              });
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

template <typename T>
Gradients backward(const DeformAggregateShape& shape, const Tensor& grad_output,
                   const Tensor& input, const Tensor& offset, const Tensor& mask,
                   const std::vector<bool>& wanted) {
  using acc_t = accumulator_t<T>;
  const ScalarType acc_type = offset.scalar_type();
  const auto gradient_of = [&](const Tensor& tensor, bool present) {
    return new_tensor(input, present ? sizes_of(tensor) : std::vector<int64_t>{0},
                      tensor.scalar_type());
  };
  Tensor grad_input = gradient_of(input, wanted[0]);
  Tensor grad_offset = gradient_of(offset, wanted[1]);
  Tensor grad_mask = gradient_of(mask, wanted[2]);
  if (grad_output.numel() == 0) {
    for (Tensor* gradient : {&grad_input, &grad_offset, &grad_mask}) {
      torch::stable::zero_(*gradient);
    }
    return {grad_input, grad_offset, grad_mask};
  }

  // Each thread computes the gradients of some channels of some images alone. Those of offsets and
  // modulations sum over the channels of a group: its parts are kept aside and added in their
  // order.
  const std::vector<AggregateChannels> parts = split_channels(shape);
  const int64_t part_count = static_cast<int64_t>(parts.size());
  const int64_t group_parts = part_count / shape.groups;
  const Tensor gradients = as_contiguous(grad_output);
  const Tensor inputs = as_contiguous(input);
  const Tensor offsets = aggregate_points(offset), masks = aggregate_points(mask);
  // Half types are summed in float.
  const bool convert = wanted[0] && input.scalar_type() != acc_type;
  Tensor sum = convert ? new_tensor(input, sizes_of(input), acc_type) : grad_input;
  torch::stable::zero_(sum);
  const bool in_parts = group_parts > 1;
  const Buffer<acc_t> offset_parts(in_parts ? group_parts * grad_offset.numel() : 0);
  const Buffer<acc_t> mask_parts(in_parts ? group_parts * grad_mask.numel() : 0);

  AggregateTensors<T> tensors = tensors_of<T>(inputs, offsets, masks);
  tensors.grad_output = const_data<T>(gradients);
  tensors.grad_input = wanted[0] ? data<acc_t>(sum) : nullptr;
  acc_t* offset_target = in_parts ? offset_parts.get() : data<acc_t>(grad_offset);
  acc_t* mask_target = in_parts ? mask_parts.get() : data<acc_t>(grad_mask);
  const AggregateKernel<T> kernel = MMDCN_CPU_KERNEL(deform_aggregate, T)();
  const int64_t tasks = shape.batch * part_count;
  torch::stable::parallel_for(
      0, tasks, grain(tasks, 2 * pass_work(shape)), [&](int64_t begin, int64_t end) {
        const Buffer<std::byte> scratch(kernel.scratch_bytes(shape));
        AggregateTensors<T> mine = tensors;
        for (int64_t task = begin; task < end; ++task) {
          const int64_t part = task % part_count, slot = part % group_parts;
          if (wanted[1]) mine.grad_offset = offset_target + slot * grad_offset.numel();
          if (wanted[2]) mine.grad_mask = mask_target + slot * grad_mask.numel();
          kernel.backward(shape, mine, parts[part], task / part_count, scratch.get());
        }
      });

  if (in_parts && wanted[1]) add_parts(offset_parts.get(), group_parts, grad_offset);
  if (in_parts && wanted[2]) add_parts(mask_parts.get(), group_parts, grad_mask);
  if (convert) torch::stable::copy_(grad_input, sum);
  return {grad_input, grad_offset, grad_mask};
}

Tensor deform_aggregate(const Tensor& input, const Tensor& offset, const Tensor& mask,
                        const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                        double offset_scale, bool remove_center) {
  const DeformAggregateShape shape = deform_aggregate_shape(
      input, offset, mask, kernel_size, stride, padding, dilation, offset_scale, remove_center);
  return with_element_type(
      input, [&](auto element) { return forward<decltype(element)>(shape, input, offset, mask); });
}

Gradients deform_aggregate_backward(const Tensor& grad_output, const Tensor& input,
                                    const Tensor& offset, const Tensor& mask,
                                    const std::vector<int64_t>& kernel_size,
                                    const std::vector<int64_t>& stride,
                                    const std::vector<int64_t>& padding,
                                    const std::vector<int64_t>& dilation, double offset_scale,
                                    bool remove_center, const std::vector<bool>& output_mask) {
  const DeformAggregateShape shape = deform_aggregate_shape(
      input, offset, mask, kernel_size, stride, padding, dilation, offset_scale, remove_center);
  check_grad_output(shape, grad_output, input, output_mask);
  return with_element_type(input, [&](auto element) {
    return backward<decltype(element)>(shape, grad_output, input, offset, mask, output_mask);
  });
}

}  // namespace
}  // namespace mmdcn

STABLE_TORCH_LIBRARY_IMPL(mmdcn, CPU, m) {
  m.impl("deform_aggregate", TORCH_BOX(&mmdcn::deform_aggregate));
  m.impl("deform_aggregate_backward", TORCH_BOX(&mmdcn::deform_aggregate_backward));
}
