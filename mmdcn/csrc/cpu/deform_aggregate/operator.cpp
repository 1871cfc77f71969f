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

// Multiply-adds of a pass that reads the four corners of every sample once.
int64_t pass_work(const DeformAggregateShape& shape) {
  const int64_t samples = shape.batch * shape.pixels() * shape.taps();
  return samples * (4 * shape.channels + kElementWork * shape.groups);
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
  const Tensor offsets = readable_taps(offset), masks = readable_taps(mask);
  AggregateTensors<T> tensors = tensors_of<T>(inputs, offsets, masks);
  tensors.output = data<T>(output);
  const AggregateKernel<T> kernel = MMDCN_CPU_KERNEL(deform_aggregate, T)();
  const int64_t pixels = shape.batch * shape.pixels();
  parallel_for(0, pixels, grain(pixels, pass_work(shape)), [&](int64_t begin, int64_t end) {
    const Buffer<std::byte> scratch(kernel.scratch_bytes(shape));
    kernel.forward(shape, tensors, begin, end, scratch.get());
  });
  return output;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// The width of the backward pass's blocks of channels: most groups are one block, as much is done
// once for each sample and block.
constexpr int64_t kBackwardWidth = 512;

// The strips that an image of so many blocks is divided into for the backward pass. They do not
// depend on the number of threads, so that sums have the same bits for any. There are two for a
// single image that is large enough, as threads at different channels of the same pixels would take
// cache lines from each other (prefetching reaches for those beside one's own), and more where
// there would be fewer than four tasks, down to four rows.
int64_t strips_of_image(const DeformAggregateShape& shape, int64_t blocks) {
  const int64_t rows = shape.y.size, tasks = shape.batch * blocks;
  int64_t strips = shape.batch == 1 && rows >= 16 ? 2 : 1;
  while (strips * tasks < 4 && rows >= 8 * strips) strips *= 2;
  return strips;
}

// Gradients of offsets or of modulations sum over the channels of a group. Where a group has
// several blocks, each leaves its sums in an array of its own, and these are added in the order of
// the blocks.
template <typename A>
class GroupSums {
 public:
  // `target` has no elements where it is not wanted.
  GroupSums(const Tensor& target, int64_t group_blocks)
      : target_(target),
        group_blocks_(group_blocks),
        sums_(group_blocks > 1 ? group_blocks * target.numel() : 0) {}

  // Where the blocks leave their sums, or null.
  A* get() const {
    if (target_.numel() == 0) return nullptr;
    return group_blocks_ == 1 ? data<A>(target_) : sums_.get();
  }

  void add_up() const {
    if (group_blocks_ > 1 && target_.numel() > 0) add_in_order(sums_.get(), group_blocks_, target_);
  }

 private:
  const Tensor& target_;
  const int64_t group_blocks_;
  const Buffer<A> sums_;
};

// The strips of all images, image by image.
template <typename A>
class Strips {
 public:
  // `grad_input` has no elements where it is not wanted.
  Strips(const DeformAggregateShape& shape, const std::vector<ChannelBlock>& blocks,
         const Tensor& grad_input)
      : shape_(shape),
        blocks_(blocks),
        grad_input_(grad_input),
        of_image_(strips_of_image(shape, blocks.size())),
        image_size_(grad_input.numel() / shape.batch),
        beyond_(new_tensor(grad_input, {of_image_ > 1 ? count() : 0, image_size_},
                           grad_input.scalar_type())),
        reached_(count() * blocks.size()) {
    for (int64_t number = 0; number < count(); ++number) {
      const ImageStrip<A> strip = (*this)[number];
      std::fill_n(strip.reached, blocks.size(), strip.own);
    }
  }

  int64_t count() const { return shape_.batch * of_image_; }

  ImageStrip<A> operator[](int64_t number) {
    const int64_t image = number / of_image_, strip = number % of_image_;
    const auto border = [&](int64_t of, int64_t i) { return of * i / of_image_; };
    const int64_t pixels = shape_.pixels(), rows = shape_.y.size;
    return {image,
            image * pixels + border(pixels, strip),
            image * pixels + border(pixels, strip + 1),
            {border(rows, strip), border(rows, strip + 1)},
            of_image_ > 1 ? data<A>(beyond_) + number * image_size_ : nullptr,
            &reached_[number * blocks_.size()]};
  }

  // Adds what strips have summed for the rows of others, in the order of the strips.
  void add_up() {
    if (of_image_ == 1 || grad_input_.numel() == 0) return;
    const int64_t blocks = static_cast<int64_t>(blocks_.size()), tasks = count() * blocks;
    const int64_t work = grad_input_.numel() * kElementWork;
    parallel_for(0, tasks, grain(tasks, work), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const ImageStrip<A> target = (*this)[task / blocks];
        const int64_t first = target.image * of_image_;
        for (int64_t number = first; number < first + of_image_; ++number) {
          add(task % blocks, (*this)[number], target);
        }
      }
    });
  }

 private:
  // Adds a block's channels of the rows that are `target`'s own.
  void add(int64_t number, const ImageStrip<A>& strip, const ImageStrip<A>& target) const {
    const ChannelBlock& block = blocks_[number];
    A* const gradients = data<A>(grad_input_) + target.image * image_size_;
    const auto add_rows = [&](int64_t first, int64_t last) {
      first = std::max(first, target.own.first) * shape_.x.size;
      last = std::min(last, target.own.last) * shape_.x.size;
      for (int64_t pixel = first; pixel < last; ++pixel) {
        const A* source = strip.beyond + pixel * shape_.channels;
        A* sums = gradients + pixel * shape_.channels;
        for (int64_t c = block.begin; c < block.end; ++c) sums[c] += source[c];
      }
    };
    add_rows(strip.reached[number].first, strip.own.first);
    add_rows(strip.own.last, strip.reached[number].last);
  }

  const DeformAggregateShape& shape_;
  const std::vector<ChannelBlock>& blocks_;
  const Tensor& grad_input_;
  const int64_t of_image_, image_size_;
  // Not scratch memory in huge pages: next to nothing of it is touched.
  Tensor beyond_;
  std::vector<RowRange> reached_;
};

// Fills the gradients, of which `grad_input` is of the accumulators' type; those of no elements are
// not wanted. Each thread computes the gradients of some blocks of some strips alone.
template <typename T, typename A = accumulator_t<T>>
void run_backward(const DeformAggregateShape& shape, const Tensor& grad_output, const Tensor& input,
                  const Tensor& offset, const Tensor& mask, const Tensor& grad_input,
                  const Tensor& grad_offset, const Tensor& grad_mask) {
  const std::vector<ChannelBlock> blocks =
      channel_blocks(shape.groups, shape.group_channels(), kBackwardWidth);
  const int64_t block_count = static_cast<int64_t>(blocks.size());
  const ChannelBlocks all = {blocks.data(), block_count / shape.groups};
  const GroupSums<A> offset_sums(grad_offset, all.of_group);
  const GroupSums<A> mask_sums(grad_mask, all.of_group);
  Strips<A> strips(shape, blocks, grad_input);
  const Tensor gradients = as_contiguous(grad_output);
  const Tensor inputs = as_contiguous(input);
  const Tensor offsets = readable_taps(offset), masks = readable_taps(mask);
  AggregateTensors<T> tensors = tensors_of<T>(inputs, offsets, masks);
  tensors.grad_output = const_data<T>(gradients);
  tensors.grad_input = grad_input.numel() > 0 ? data<A>(grad_input) : nullptr;
  tensors.grad_offset = offset_sums.get();
  tensors.grad_mask = mask_sums.get();
  const AggregateKernel<T> kernel = MMDCN_CPU_KERNEL(deform_aggregate, T)();
  const int64_t tasks = strips.count() * block_count;
  parallel_for(0, tasks, grain(tasks, 2 * pass_work(shape)), [&](int64_t begin, int64_t end) {
    const Buffer<std::byte> scratch(kernel.scratch_bytes(shape));
    while (begin < end) {
      const int64_t strip = begin / block_count, first = begin - strip * block_count;
      const int64_t last = std::min(first + end - begin, block_count);
      kernel.backward(shape, tensors, all, first, last, strips[strip], scratch.get());
      begin += last - first;
    }
  });
  strips.add_up();
  offset_sums.add_up();
  mask_sums.add_up();
}

template <typename T>
Gradients backward(const DeformAggregateShape& shape, const Tensor& grad_output,
                   const Tensor& input, const Tensor& offset, const Tensor& mask,
                   const std::vector<bool>& wanted) {
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

  // Half types are summed in float.
  const ScalarType acc_type = offset.scalar_type();
  const bool convert = wanted[0] && input.scalar_type() != acc_type;
  Tensor sum = convert ? new_tensor(input, sizes_of(input), acc_type) : grad_input;
  torch::stable::zero_(sum);
  run_backward<T>(shape, grad_output, input, offset, mask, sum, grad_offset, grad_mask);
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
