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

// Multiply-adds of sampling the input, and multiplying the samples by the weight.
template <int R>
int64_t pass_work(const DeformConvNdShape<R>& shape) {
  const int64_t samples = shape.batch * shape.pixels() * shape.taps();
  return samples * (shape.channels * (shape.group_out_channels() + (1 << R)) +
                    kElementWork * shape.deform_groups);
}

// As much memory as the rows of a batch take, with kRowSlack more elements.
template <typename A>
Buffer<A> memory_for(const VolumeRows& at, int64_t batch) {
  return Buffer<A>(batch * at.image + kRowSlack);
}

// The images of a tensor, (N, C, …), as rows.
template <int R, typename T, typename A = accumulator_t<T>>
Buffer<A> image_rows(const ConvNdKernel<R, T>& kernel, const Tensor& tensor, const VolumeRows& at) {
  const Tensor planes = as_contiguous(tensor);
  Buffer<A> rows = memory_for<A>(at, planes.size(0));
  at.for_borders(planes.size(0), [&](int64_t first, int64_t elements) {
    std::fill_n(rows.get() + first, elements, A(0));
  });
  const int64_t all = planes.size(0) * at.positions;
  const int64_t some = grain(all, planes.numel() * kElementWork + 1);
  parallel_for(0, all, some, [&](int64_t begin, int64_t end) {
    kernel.to_rows(const_data<T>(planes), at, begin, end, rows.get());
  });
  return rows;
}

// Stores rows to the images of a tensor, (N, C, …).
template <int R, typename T, typename A = accumulator_t<T>>
void store_rows(const ConvNdKernel<R, T>& kernel, const A* rows, const VolumeRows& at,
                const Tensor& target) {
  const int64_t all = target.size(0) * at.positions;
  const int64_t some = grain(all, target.numel() * kElementWork + 1);
  parallel_for(0, all, some, [&](int64_t begin, int64_t end) {
    kernel.from_rows(rows, at, begin, end, data<T>(target));
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
  const Buffer<acc_t> inputs = image_rows(kernel, input, VolumeRows(shape));
  const Buffer<acc_t> outputs(output.numel()), packed(kernel.packed_size(shape));
  const int64_t tasks = shape.groups * shape.taps();
  const int64_t task_grain = grain(tasks, weights.numel() * kElementWork);
  parallel_for(0, tasks, task_grain, [&](int64_t begin, int64_t end) {
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
  parallel_for(0, pixels, grain(pixels, pass_work(shape)), [&](int64_t begin, int64_t end) {
    const Buffer<std::byte> scratch(kernel.forward_scratch_bytes(shape));
    kernel.forward(shape, tensors, begin, end, scratch.get());
  });
  store_rows(kernel, outputs.get(), VolumeRows(shape.out_channels, shape.pixels()), output);
  return output;
}

// Splits the channels into ranges, whatever their groups. All but the last are of the same width.
std::vector<ChannelRange> channel_ranges(int64_t channels, int64_t batch) {
  // Several images are enough for some threads, and samples are located once for each range.
  const int64_t width = std::max<int64_t>(block_width(channels), batch > 1 ? 32 : 16);
  std::vector<ChannelRange> ranges;
  for (int64_t c = 0; c < channels; c += width) {
    ranges.push_back({c, std::min(c + width, channels)});
  }
  return ranges;
}

// Gradients of offsets or of modulations sum over the channels of an offset group, which may lie in
// several ranges. Each of these leaves its sums in memory of its own, and they are added in the
// order of the ranges.
template <int R, typename A>
class SharedGradients {
 public:
  // `channels` is the number of channels that a sample has in the target: R, or 1. A target of no
  // elements is not wanted.
  SharedGradients(const DeformConvNdShape<R>& shape, const std::vector<ChannelRange>& ranges,
                  const Tensor& target, int64_t channels)
      : shape_(shape),
        width_(ranges.front().end),
        target_(target),
        size_(channels * shape.taps() * shape.pixels()),
        most_(most_ranges()),
        partial_(most_ > 1 ? most_ * target.numel() : 0) {}

  // Where a range writes its sums, or null. No two ranges write to the same element, as each range
  // of an offset group has memory of its own.
  A* target_for(const ChannelRange& range) const {
    if (target_.numel() == 0) return nullptr;
    if (most_ == 1) return data<A>(target_);
    return partial_.get() + range.begin / width_ % most_ * target_.numel();
  }

  void add_up() const {
    if (most_ == 1 || target_.numel() == 0) return;
    const int64_t tasks = shape_.batch * shape_.deform_groups;
    parallel_for(0, tasks, grain(tasks, most_ * target_.numel()), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) add_task(task);
    });
  }

 private:
  int64_t first_range(int64_t group) const {
    return group * shape_.deform_group_channels() / width_;
  }
  int64_t last_range(int64_t group) const {
    return ((group + 1) * shape_.deform_group_channels() - 1) / width_;
  }
  int64_t most_ranges() const {
    int64_t most = 1;
    for (int64_t g = 0; g < shape_.deform_groups; ++g) {
      most = std::max(most, last_range(g) - first_range(g) + 1);
    }
    return most;
  }
  // Adds up the sums of one offset group of one image.
  void add_task(int64_t task) const {
    const int64_t group = task % shape_.deform_groups;
    A* sums = data<A>(target_) + task * size_;
    for (int64_t range = first_range(group); range <= last_range(group); ++range) {
      const A* values = partial_.get() + range % most_ * target_.numel() + task * size_;
      const bool first = range == first_range(group);
      for (int64_t i = 0; i < size_; ++i) sums[i] = first ? values[i] : sums[i] + values[i];
    }
  }

  const DeformConvNdShape<R>& shape_;
  int64_t width_;
  const Tensor& target_;
  int64_t size_;  // elements of one offset group of one image
  int64_t most_;  // ranges that the channels of one offset group lie in, at most
  Buffer<A> partial_;
};

// The most shares of a batch that sum up gradients of the weight, and the memory that these take at
// most, unless it is a single one.
constexpr int64_t kMostShares = 8;
constexpr int64_t kShareBytes = 16 << 20;

// The backward pass of a batch. Gradients of no elements are not wanted.
template <int R, typename T>
class Backward {
 public:
  using acc_t = accumulator_t<T>;

  Backward(const DeformConvNdShape<R>& shape, const Tensor& grad_output, const Tensor& input,
           const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& mask)
      : shape_(shape),
        kernel_(MMDCN_CPU_KERNEL(deform_conv_nd, R, T)()),
        ranges_(channel_ranges(shape.channels, shape.batch)),
        range_count_(static_cast<int64_t>(ranges_.size())),
        offset_(as_contiguous(offset)),
        weight_(as_contiguous(weight)),
        mask_(as_contiguous(mask)),
        rows_(shape),
        input_(image_rows(kernel_, input, rows_)),
        grad_output_(
            image_rows(kernel_, grad_output, VolumeRows(shape.out_channels, shape.pixels()))) {
    tensors_.grad_output = grad_output_.get();
    tensors_.input = input_.get();
    tensors_.offset = const_data<acc_t>(offset_);
    tensors_.mask = mask_.has_value() ? const_data<acc_t>(*mask_) : nullptr;
  }

  // Each thread computes the gradients of some ranges of channels of some images alone. The
  // gradient of the weight is summed over the images of a share, and then over the shares in order.
  void run(const ConvNdGradients& gradient, bool wants_data, bool wants_weight) const {
    std::vector<int64_t> packed_begin(range_count_, 0);
    const Buffer<acc_t> packed = wants_data ? packed_weight(packed_begin) : Buffer<acc_t>(0);
    const bool wants_input = gradient.input.numel() > 0;
    const int64_t images = wants_input ? shape_.batch : 0;
    const Buffer<acc_t> sums = memory_for<acc_t>(rows_, images);
    std::fill_n(sums.get(), images * rows_.image, acc_t(0));
    const SharedGradients<R, acc_t> offset_sums(shape_, ranges_, gradient.offset, R);
    const SharedGradients<R, acc_t> mask_sums(shape_, ranges_, gradient.mask, 1);
    const int64_t shares = share_count(wants_weight), weights = weight_.numel();
    const Buffer<acc_t> weight_sums(wants_weight ? shares * weights : 0);
    const int64_t tasks = shares * range_count_;
    parallel_for(0, tasks, grain(tasks, 3 * pass_work(shape_)), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t index = task % range_count_, share = task / range_count_;
        const ChannelRange& range = ranges_[index];
        ConvNdBackward<acc_t> own = tensors_;
        own.weight = packed.get() + packed_begin[index];
        own.grad_input = wants_input ? sums.get() : nullptr;
        own.grad_offset = offset_sums.target_for(range);
        own.grad_mask = mask_sums.target_for(range);
        own.grad_weight = wants_weight ? weight_sums.get() + share * weights : nullptr;
        const Buffer<std::byte> scratch(kernel_.backward_scratch_bytes(shape_, own, range));
        kernel_.backward(shape_, own, range, share * shape_.batch / shares,
                         (share + 1) * shape_.batch / shares, scratch.get());
      }
    });
    offset_sums.add_up();
    mask_sums.add_up();
    if (wants_input) store_rows(kernel_, sums.get(), rows_, gradient.input);
    if (wants_weight) store_weight(weight_sums.get(), shares, data<T>(gradient.weight));
  }

 private:
  // The weights of all ranges, packed. Sets the element that each range's begin with.
  Buffer<acc_t> packed_weight(std::vector<int64_t>& packed_begin) const {
    int64_t size = 0;
    for (int64_t i = 0; i < range_count_; ++i) {
      packed_begin[i] = size;
      size += kernel_.range_packed_size(shape_, ranges_[i]);
    }
    Buffer<acc_t> packed(size);
    const int64_t range_grain = grain(range_count_, weight_.numel() * kElementWork);
    parallel_for(0, range_count_, range_grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        kernel_.pack_range(shape_, const_data<T>(weight_), ranges_[i],
                           packed.get() + packed_begin[i]);
      }
    });
    return packed;
  }

  // In how many shares the images are gone through: as many as keep threads busy, and no more than
  // there is memory for, as each has a gradient of the weight.
  int64_t share_count(bool wants_weight) const {
    if (!wants_weight) return shape_.batch;
    const int64_t bytes = weight_.numel() * static_cast<int64_t>(sizeof(acc_t));
    const int64_t fitting = std::clamp<int64_t>(kShareBytes / bytes, 1, kMostShares);
    return std::min(shape_.batch, fitting);
  }

  // Adds up the gradients of the weight of all shares.
  void store_weight(const acc_t* sums, int64_t shares, T* target) const {
    const int64_t weights = weight_.numel();
    parallel_for(0, weights, grain(weights, shares * weights * kElementWork),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     acc_t sum = sums[i];
                     for (int64_t k = 1; k < shares; ++k) sum += sums[k * weights + i];
                     store(target + i, sum);
                   }
                 });
  }

  const DeformConvNdShape<R>& shape_;
  const ConvNdKernel<R, T> kernel_;
  const std::vector<ChannelRange> ranges_;
  const int64_t range_count_;
  const Tensor offset_, weight_;
  const std::optional<Tensor> mask_;
  const VolumeRows rows_;                    // of the input and its gradient
  const Buffer<acc_t> input_, grad_output_;  // as rows
  ConvNdBackward<acc_t> tensors_ = {};       // but for the weight and the gradients
};

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <int R, typename T>
Gradients backward(const DeformConvNdShape<R>& shape, const Tensor& grad_output,
                   const Tensor& input, const Tensor& offset, const Tensor& weight,
                   const std::optional<Tensor>& mask, const std::vector<bool>& wanted) {
  ConvNdGradients gradient(input, offset, weight, mask, wanted);
  if (grad_output.numel() == 0 || input.numel() == 0) {
    gradient.zero();
    return gradient.result();
  }
  const bool wants_data = wanted[0] || wanted[1] || (wanted[3] && mask.has_value());
  if (wants_data || wanted[2]) {
    Backward<R, T>(shape, grad_output, input, offset, weight, mask)
        .run(gradient, wants_data, wanted[2]);
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
