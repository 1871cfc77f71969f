// Registration of deform_conv_nd on the CPU: layouts, memory and threads around the kernels.
#include "../operator.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstddef>
#include <tuple>
#include <vector>

#include "../../deform_conv_nd_tensors.h"
#include "kernel.h"

namespace mmdcn {
namespace {

// Work of sampling the input, and multiplying the samples by the weight.
template <int R>
int64_t pass_work(const DeformConvNdShape<R>& shape) {
  const int64_t samples = shape.batch * shape.pixels() * shape.taps();
  return samples * (shape.channels * (shape.group_out_channels() + (1 << R)) +
                    kElementWork * shape.deform_groups);
}

// The images of a tensor, (N, C, …), as rows.
template <int R, typename T, typename A = accumulator_t<T>>
Buffer<A> rows_of(const ConvNdKernel<R, T>& kernel, const Tensor& tensor, int64_t positions) {
  const Tensor planes = as_contiguous(tensor);
  Buffer<A> rows(planes.numel() + kRowSlack);
  const int64_t channels = planes.size(1), all = planes.size(0) * positions;
  const int64_t some = grain(all, planes.numel() * kElementWork + 1);
  torch::stable::parallel_for(0, all, some, [&](int64_t begin, int64_t end) {
    kernel.to_rows(const_data<T>(planes), channels, positions, begin, end, rows.get());
  });
  return rows;
}

template <int R, typename T, typename A = accumulator_t<T>>
void store_rows(const ConvNdKernel<R, T>& kernel, const A* rows, int64_t positions,
                const Tensor& target) {
  const int64_t channels = target.size(1), all = target.size(0) * positions;
  const int64_t some = grain(all, target.numel() * kElementWork + 1);
  torch::stable::parallel_for(0, all, some, [&](int64_t begin, int64_t end) {
    kernel.from_rows(rows, channels, positions, begin, end, data<T>(target));
  });
}

template <int R, typename T>
Tensor forward(const DeformConvNdShape<R>& shape, const Tensor& input, const Tensor& offset,
               const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& mask) {
  using acc_t = accumulator_t<T>;
  Tensor output = new_tensor(input, output_size(shape), input.scalar_type());
  if (output.numel() == 0) return output;

  const ConvNdKernel<R, T> kernel = MMDCN_CPU_KERNEL(deform_conv_nd, R, T)();
  const Tensor offsets = as_contiguous(offset);
  const Tensor weights = as_contiguous(weight);
  const std::optional<Tensor> masks = as_contiguous(mask);
  std::optional<Tensor> biases;
  if (bias.has_value()) {
    biases = as_contiguous(converted(*bias, offset.scalar_type()));
  }
  const Buffer<acc_t> inputs = rows_of(kernel, input, shape.positions());
  const Buffer<acc_t> outputs(output.numel()), packed(kernel.packed_size(shape));
  const int64_t tasks = shape.groups * shape.taps();
  const int64_t task_grain = grain(tasks, weights.numel() * kElementWork);
  torch::stable::parallel_for(0, tasks, task_grain, [&](int64_t begin, int64_t end) {
    kernel.pack_weight(shape, const_data<T>(weights), begin, end, packed.get());
  });

  ConvNdForward<acc_t> tensors = {};
  tensors.input = inputs.get();
  tensors.offset = const_data<acc_t>(offsets);
  tensors.mask = masks.has_value() ? const_data<acc_t>(*masks) : nullptr;
  tensors.weight = packed.get();
  tensors.bias = biases.has_value() ? const_data<acc_t>(*biases) : nullptr;
  tensors.output = outputs.get();
  const int64_t pixels = shape.batch * shape.pixels();
  torch::stable::parallel_for(
      0, pixels, grain(pixels, pass_work(shape)), [&](int64_t begin, int64_t end) {
        const Buffer<std::byte> scratch(kernel.forward_scratch_bytes(shape));
        kernel.forward(shape, tensors, begin, end, scratch.get());
      });
  store_rows(kernel, outputs.get(), shape.pixels(), output);
  return output;
}

// Splits the channels into parts. They follow from the shape alone, so that the order of every sum
// does too. All but the last are of the same width.
template <int R>
std::vector<ChannelPart> split_channels(const DeformConvNdShape<R>& shape) {
  const int64_t quarter = (shape.channels + 3) / 4;
  const int64_t width = std::clamp<int64_t>((quarter + 15) / 16 * 16, 16, 64);
  std::vector<ChannelPart> parts;
  for (int64_t c = 0; c < shape.channels; c += width) {
    parts.push_back({c, std::min(c + width, shape.channels), 0});
  }
  return parts;
}

// Gradients of offsets or of modulations sum over the channels of an offset group, which several
// parts may have some of. What each of these contributes is kept aside, and added in their order.
template <int R, typename A>
class SharedGradients {
 public:
  // `channels` is the number of channels of a sample in the target: R, or 1.
  SharedGradients(const DeformConvNdShape<R>& shape, const std::vector<ChannelPart>& parts,
                  const Tensor& target, int64_t channels)
      : shape_(shape),
        width_(parts.front().end),
        target_(target),
        size_(channels * shape.taps() * shape.pixels()),
        most_(most_parts()),
        partial_(most_ > 1 ? most_ * target.numel() : 0) {}

  // Where a part writes what it contributes. No two parts write to the same element, because those
  // of one offset group have memory of their own.
  A* target_for(const ChannelPart& part) const {
    if (most_ == 1) return data<A>(target_);
    return partial_.get() + part.begin / width_ % most_ * target_.numel();
  }

  void add_up() const {
    if (most_ == 1) return;
    const int64_t tasks = shape_.batch * shape_.deform_groups;
    torch::stable::parallel_for(0, tasks, grain(tasks, most_ * target_.numel()),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t task = begin; task < end; ++task) add_task(task);
                                });
  }

 private:
  int64_t first_part(int64_t group) const {
    return group * shape_.deform_group_channels() / width_;
  }
  int64_t last_part(int64_t group) const {
    return ((group + 1) * shape_.deform_group_channels() - 1) / width_;
  }
  int64_t most_parts() const {
    int64_t most = 1;
    for (int64_t g = 0; g < shape_.deform_groups; ++g) {
      most = std::max(most, last_part(g) - first_part(g) + 1);
    }
    return most;
  }
  void add_task(int64_t task) const {
    const int64_t group = task % shape_.deform_groups;
    A* sums = data<A>(target_) + task * size_;
    for (int64_t part = first_part(group); part <= last_part(group); ++part) {
      const A* values = partial_.get() + part % most_ * target_.numel() + task * size_;
      const bool first = part == first_part(group);
      for (int64_t i = 0; i < size_; ++i) sums[i] = first ? values[i] : sums[i] + values[i];
    }
  }

  const DeformConvNdShape<R>& shape_;
  int64_t width_;
  const Tensor& target_;
  int64_t size_;  // of what one image and offset group has
  int64_t most_;  // parts that an offset group has channels in
  Buffer<A> partial_;
};

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <int R, typename T>
Gradients backward(const DeformConvNdShape<R>& shape, const Tensor& grad_output,
                   const Tensor& input, const Tensor& offset, const Tensor& weight,
                   const std::optional<Tensor>& mask, const std::vector<bool>& wanted) {
  using acc_t = accumulator_t<T>;
  const bool to_mask = wanted[3] && mask.has_value();
  ConvNdGradients gradient(input, offset, weight, mask, wanted);
  if (grad_output.numel() == 0 || input.numel() == 0) {
    gradient.zero();
    return gradient.result();
  }

  const ConvNdKernel<R, T> kernel = MMDCN_CPU_KERNEL(deform_conv_nd, R, T)();
  const Tensor offsets = as_contiguous(offset);
  const Tensor weights = as_contiguous(weight);
  const std::optional<Tensor> masks = as_contiguous(mask);
  const Buffer<acc_t> inputs = rows_of(kernel, input, shape.positions());
  const Buffer<acc_t> gradients = rows_of(kernel, grad_output, shape.pixels());
  std::vector<ChannelPart> parts = split_channels(shape);
  const int64_t part_count = static_cast<int64_t>(parts.size());
  const int64_t scratch_bytes = kernel.backward_scratch_bytes(shape, parts.front().end);

  ConvNdBackward<acc_t> tensors = {};
  tensors.grad_output = gradients.get();
  tensors.input = inputs.get();
  tensors.offset = const_data<acc_t>(offsets);
  tensors.mask = masks.has_value() ? const_data<acc_t>(*masks) : nullptr;

  if (wanted[0] || wanted[1] || to_mask) {
    int64_t packed_total = 0;
    for (ChannelPart& part : parts) {
      part.packed_begin = packed_total;
      packed_total += kernel.part_packed_size(shape, part);
    }
    const Buffer<acc_t> packed(packed_total);
    const int64_t part_grain = grain(part_count, weights.numel() * kElementWork);
    torch::stable::parallel_for(0, part_count, part_grain, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        kernel.pack_part(shape, const_data<T>(weights), parts[p],
                         packed.get() + parts[p].packed_begin);
      }
    });
    const Buffer<acc_t> sums(wanted[0] ? input.numel() : 0);
    std::fill(sums.get(), sums.get() + (wanted[0] ? input.numel() : 0), acc_t(0));
    const SharedGradients<R, acc_t> offset_sums(shape, parts, gradient.offset, R);
    const SharedGradients<R, acc_t> mask_sums(shape, parts, gradient.mask, 1);
    tensors.weight = packed.get();
    tensors.grad_input = wanted[0] ? sums.get() : nullptr;

    // Each thread computes the gradients of some channels of some images alone.
    const int64_t tasks = shape.batch * part_count;
    torch::stable::parallel_for(
        0, tasks, grain(tasks, 2 * pass_work(shape)), [&](int64_t begin, int64_t end) {
          const Buffer<std::byte> scratch(scratch_bytes);
          ConvNdBackward<acc_t> mine = tensors;
          for (int64_t task = begin; task < end; ++task) {
            const ChannelPart& part = parts[task % part_count];
            mine.grad_offset = wanted[1] ? offset_sums.target_for(part) : nullptr;
            mine.grad_mask = to_mask ? mask_sums.target_for(part) : nullptr;
            kernel.backward_data(shape, mine, part, task / part_count, scratch.get());
          }
        });
    if (wanted[1]) offset_sums.add_up();
    if (to_mask) mask_sums.add_up();
    if (wanted[0]) store_rows(kernel, sums.get(), shape.positions(), gradient.input);
  }

  if (wanted[2]) {
    // Each thread computes the gradients of some channels' weights for some taps alone.
    const int64_t tasks = shape.taps() * part_count;
    torch::stable::parallel_for(
        0, tasks, grain(tasks, pass_work(shape)), [&](int64_t begin, int64_t end) {
          const Buffer<std::byte> scratch(scratch_bytes);
          for (int64_t task = begin; task < end; ++task) {
            kernel.backward_weight(shape, tensors, parts[task % part_count], task / part_count,
                                   data<T>(gradient.weight), scratch.get());
          }
        });
  }
  return gradient.result();
}

Tensor deform_conv_nd(const Tensor& input, const Tensor& offset, const Tensor& weight,
                      const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                      const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                      const std::optional<Tensor>& mask, bool /* allow_tf32 */,
                      bool /* matmul_tf32 */) {
  const auto shape = deform_conv_nd_shape<kConvNdRank>(input, offset, weight, bias, stride, padding,
                                                       dilation, mask);
  return with_element_type(input, [&](auto element) {
    return forward<kConvNdRank, decltype(element)>(shape, input, offset, weight, bias, mask);
  });
}

Gradients deform_conv_nd_backward(const Tensor& grad_output, const Tensor& input,
                                  const Tensor& offset, const Tensor& weight,
                                  const std::vector<int64_t>& stride,
                                  const std::vector<int64_t>& padding,
                                  const std::vector<int64_t>& dilation,
                                  const std::optional<Tensor>& mask,
                                  const std::vector<bool>& output_mask, bool /* allow_tf32 */,
                                  bool /* matmul_tf32 */, bool /* deterministic: it always is */) {
  const auto shape = deform_conv_nd_shape<kConvNdRank>(input, offset, weight, std::nullopt, stride,
                                                       padding, dilation, mask);
  check_grad_output(shape, grad_output, input, output_mask);
  return with_element_type(input, [&](auto element) {
    return backward<kConvNdRank, decltype(element)>(shape, grad_output, input, offset, weight, mask,
                                                    output_mask);
  });
}

}  // namespace
}  // namespace mmdcn

STABLE_TORCH_LIBRARY_IMPL(mmdcn, CPU, m) {
  m.impl("deform_conv_nd", TORCH_BOX(&mmdcn::deform_conv_nd));
  m.impl("deform_conv_nd_backward", TORCH_BOX(&mmdcn::deform_conv_nd_backward));
}
