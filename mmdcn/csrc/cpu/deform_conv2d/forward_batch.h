// The forward pass of deform_conv2d on a batch: the memory and threads around the kernel.
#pragma once

#include <algorithm>
#include <cstddef>

#include "layouts.h"

namespace mmdcn {
namespace {

// The forward pass of a batch. Each block of output channels is computed by itself, and the shape
// that the kernel gets has the output channels of one block only.
template <typename T>
class Forward {
 public:
  using acc_t = accumulator_t<T>;

  Forward(const DeformConv2dShape& shape, const Tensor& weight)
      : shape_(shape),
        kernel_(MMDCN_CPU_KERNEL(deform_conv2d_forward, T)(shape)),
        blocks_(kernel_.out_blocks(shape, thread_count())),
        block_(block_shape()),
        block_bytes_(kernel_.packed_bytes(block_)),
        packed_(blocks_ * block_bytes_) {
    pack(weight);
  }

  // `tensors` has everything but the weight.
  void run(ForwardTensors<T> tensors) const {
    tensors.weight = packed_.get();
    in_blocks(kernel_.shares(block_), pass_work(shape_, shape_.batch * shape_.pixels()),
              [&](int64_t block, int64_t begin, int64_t end) {
                const Buffer<std::byte> scratch(kernel_.scratch_bytes(block_, tensors));
                const int64_t first = block * block_.out_channels;
                ForwardTensors<T> own = tensors;
                own.weight += block * block_bytes_;
                if (own.bias) own.bias += first;
                own.output += first * own.output_layout.channel_stride;
                kernel_.run(block_, own, begin, end, scratch.get());
              });
  }

 private:
  DeformConv2dShape block_shape() const {
    DeformConv2dShape shape = shape_;
    shape.out_channels /= blocks_;
    return shape;
  }

  void pack(const Tensor& weight) const {
    const WeightLayout layout = weight_layout(weight);
    in_blocks(kernel_.pack_slices(block_), weight.numel() * kElementWork,
              [&](int64_t block, int64_t begin, int64_t end) {
                const T* first =
                    const_data<T>(weight) + block * block_.out_channels * layout.out_stride;
                kernel_.pack_weight(block_, first, layout, begin, end,
                                    packed_.get() + block * block_bytes_);
              });
  }

  // Divides the `per_block` slices, or shares, of each block among the threads, and calls
  // `function(block, begin, end)` for a thread's. A thread gets slices and shares of the same
  // blocks, so that it reads the weights that it has packed itself.
  template <typename F>
  void in_blocks(int64_t per_block, int64_t work, const F& function) const {
    const int64_t all = blocks_ * per_block;
    parallel_for(0, all, grain(all, work), [&](int64_t begin, int64_t end) {
      for (int64_t block = begin / per_block; block * per_block < end; ++block) {
        const int64_t first = block * per_block;
        function(block, std::max(begin - first, INT64_C(0)), std::min(end - first, per_block));
      }
    });
  }

  const DeformConv2dShape& shape_;
  const ForwardKernel<T> kernel_;
  const int64_t blocks_;
  const DeformConv2dShape block_;
  const int64_t block_bytes_;  // of a block's packed weights
  const Buffer<std::byte> packed_;
};

template <typename T>
Tensor forward(const DeformConv2dShape& shape, const Tensor& input, const Tensor& offset,
               const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& mask) {
  using acc_t = accumulator_t<T>;
  Tensor output =
      new_tensor(input, {shape.batch, shape.out_channels, shape.out_height, shape.out_width},
                 input.scalar_type(), layout_of(input));
  if (output.numel() == 0) return output;
  if (input.numel() == 0) {  // With enough padding, an empty input has outputs.
    torch::stable::zero_(output);
    if (bias.has_value()) {
      torch::stable::copy_(output, torch::stable::view(*bias, {1, shape.out_channels, 1, 1}));
    }
    return output;
  }

  const Tensor inputs = dense(input), weights = dense(weight);
  const Tensor offsets = readable_sampling(offset);
  std::optional<Tensor> masks, biases;
  if (mask.has_value()) masks = readable_sampling(*mask);
  if (bias.has_value()) {
    biases = as_contiguous(converted(*bias, coordinate_type(input.scalar_type())));
  }
  ForwardTensors<T> tensors = {};
  tensors.input = const_data<T>(inputs);
  tensors.input_layout = image_layout(inputs);
  tensors.offset = sampling_tensor<acc_t>(offsets);
  tensors.mask = sampling_tensor<acc_t>(masks);
  tensors.bias = biases.has_value() ? const_data<acc_t>(*biases) : nullptr;
  tensors.output = data<T>(output);
  tensors.output_layout = image_layout(output);
  tensors.output_image = shape.out_channels * shape.pixels();
  Forward<T>(shape, weights).run(tensors);
  return output;
}

}  // namespace
}  // namespace mmdcn
