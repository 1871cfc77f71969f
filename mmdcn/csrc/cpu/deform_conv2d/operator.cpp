// Registration of deform_conv2d on the CPU: layouts, memory and threads around the kernels.
#include "../operator.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstddef>
#include <tuple>
#include <vector>

#include "../../deform_conv2d_tensors.h"
#include "kernel.h"

namespace mmdcn {
namespace {

// Bytes of what blocks of channels that share an offset group keep aside, between two barriers of
// the backward pass, and the tiles that lie between two barriers at most.
constexpr int64_t kPartialBytes = 2 << 20;
constexpr int64_t kSpanTiles = 24;

// Packed weights, and the sums of their gradient, are kept from span to span up to so many bytes.
// Beyond, each thread packs those of the block at work anew for each span, and adds the sums to the
// gradient after it: next to nothing for spans of so many tiles or more.
constexpr int64_t kKeptBytes = 8 << 20;
constexpr int64_t kWorthPackingTiles = 6;

// Work of sampling the input for some output pixels, and multiplying the samples by the weight.
int64_t pass_work(const DeformConv2dShape& shape, int64_t pixels) {
  return pixels * shape.channels * shape.taps() * (shape.group_out_channels() + kElementWork);
}

// Layout of the images of a tensor that is contiguous in one of the two ways.
ImageLayout image_layout(const Tensor& tensor) {
  if (is_channels_last(tensor)) return {tensor.size(1), 1};
  return {1, tensor.size(2) * tensor.size(3)};
}

// The tensor itself if it is contiguous in one of the two ways, or else a copy that is.
Tensor either_way(const Tensor& tensor) {
  return is_channels_last(tensor) ? tensor : as_contiguous(tensor);
}

// A tensor of offsets or modulations, or else a copy of it, that the kernels can read: rows of
// pixels that follow one another, with neighbouring pixels or neighbouring channels together.
Tensor readable_sampling(const Tensor& tensor) {
  const bool even = tensor.size(2) == 1 || tensor.stride(2) == tensor.size(3) * tensor.stride(3);
  const int64_t pixel = tensor.size(3) == 1 ? tensor.stride(2) : tensor.stride(3);
  const bool together = pixel == 1 || tensor.stride(1) == 1 || tensor.size(1) == 1;
  return even && together ? tensor : as_contiguous(tensor);
}

template <typename A>
SamplingTensor<A> sampling_tensor(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return {nullptr, 0, 0, 1};
  const int64_t pixel = tensor->size(3) == 1 ? tensor->stride(2) : tensor->stride(3);
  return {const_data<A>(*tensor), tensor->stride(0), tensor->stride(1), pixel};
}

// Of a weight that is contiguous in one of the two ways.
WeightLayout weight_layout(const Tensor& weight) {
  const int64_t in = weight.size(1), taps = weight.size(2) * weight.size(3);
  if (is_channels_last(weight)) return {in * taps, 1, in};
  return {in * taps, taps, 1};
}

template <typename T>
Tensor forward(const DeformConv2dShape& shape, const Tensor& input, const Tensor& offset,
               const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& mask) {
  using acc_t = accumulator_t<T>;
  Tensor output =
      new_tensor(input, {shape.batch, shape.out_channels, shape.out_height, shape.out_width},
                 input.scalar_type(), layout_of(input));
  if (output.numel() == 0) return output;
  if (input.numel() == 0) {  // Larger padding than the kernel can surround nothing.
    torch::stable::zero_(output);
    if (bias.has_value()) {
      torch::stable::copy_(output, torch::stable::view(*bias, {1, shape.out_channels, 1, 1}));
    }
    return output;
  }

  const Tensor inputs = either_way(input), weights = either_way(weight);
  const Tensor offsets = readable_sampling(offset);
  std::optional<Tensor> masks, biases;
  if (mask.has_value()) masks = readable_sampling(*mask);
  if (bias.has_value()) {
    biases = as_contiguous(converted(*bias, coordinate_type(input.scalar_type())));
  }

  const ForwardKernel<T> kernel = MMDCN_CPU_KERNEL(deform_conv2d_forward, T)(shape);
  const int64_t blocks = kernel.out_blocks(shape, torch::stable::get_num_threads());
  DeformConv2dShape block_shape = shape;
  block_shape.out_channels /= blocks;
  const int64_t block_bytes = kernel.packed_bytes(block_shape);
  const Buffer<std::byte> packed(blocks * block_bytes);
  // Threads get the same blocks of the slices and of the shares: blocks stay with who packs them.
  const auto in_blocks = [&](int64_t per_block, int64_t work, const auto& function) {
    const int64_t all = blocks * per_block;
    torch::stable::parallel_for(0, all, grain(all, work), [&](int64_t begin, int64_t end) {
      for (int64_t block = begin / per_block; block * per_block < end; ++block) {
        const int64_t first = block * per_block;
        function(block, std::max(begin - first, INT64_C(0)), std::min(end - first, per_block));
      }
    });
  };

  const WeightLayout layout = weight_layout(weights);
  in_blocks(kernel.pack_slices(block_shape), weights.numel() * kElementWork,
            [&](int64_t block, int64_t begin, int64_t end) {
              const T* weight =
                  const_data<T>(weights) + block * block_shape.out_channels * layout.out_stride;
              kernel.pack_weight(block_shape, weight, layout, begin, end,
                                 packed.get() + block * block_bytes);
            });

  ForwardTensors<T> tensors = {};
  tensors.input = const_data<T>(inputs);
  tensors.input_layout = image_layout(inputs);
  tensors.offset = sampling_tensor<acc_t>(offsets);
  tensors.mask = sampling_tensor<acc_t>(masks);
  tensors.weight = packed.get();
  tensors.bias = biases.has_value() ? const_data<acc_t>(*biases) : nullptr;
  tensors.output = data<T>(output);
  tensors.output_layout = image_layout(output);
  tensors.output_image = shape.out_channels * shape.pixels();
  in_blocks(kernel.shares(block_shape), pass_work(shape, shape.batch * shape.pixels()),
            [&](int64_t block, int64_t begin, int64_t end) {
              const Buffer<std::byte> scratch(kernel.scratch_bytes(block_shape, tensors));
              const int64_t first = block * block_shape.out_channels;
              ForwardTensors<T> own = tensors;
              own.weight += block * block_bytes;
              if (own.bias) own.bias += first;
              own.output += first * own.output_layout.channel_stride;
              kernel.run(block_shape, own, begin, end, scratch.get());
            });
  return output;
}

// Splits the channels into blocks that lie inside one group. Their number follows from the shape
// alone, so that the order of every sum does too.
std::vector<ChannelBlock> channel_blocks(const DeformConv2dShape& shape) {
  const int64_t quarter = (shape.channels + 3) / 4;
  const int64_t width = std::clamp<int64_t>((quarter + 15) / 16 * 16, 16, 64);
  std::vector<ChannelBlock> blocks;
  for (int64_t group = 0; group < shape.groups; ++group) {
    const int64_t end = (group + 1) * shape.group_channels();
    for (int64_t c = group * shape.group_channels(); c < end; c += width) {
      blocks.push_back({group, c, std::min(c + width, end)});
    }
  }
  return blocks;
}

// Adds up, in the order of the blocks, the sums of offset groups that several blocks share, for one
// tile.
template <typename T>
void add_partial(const DeformConv2dShape& shape, const BackwardTensors<T>& tensors,
                 const std::vector<ChannelBlock>& blocks, const Tile<kBackwardTile>& tile,
                 const accumulator_t<T>* partial) {
  using acc_t = accumulator_t<T>;
  const int64_t channels = shape.deform_group_channels();
  const auto add = [&](const acc_t* source, const SamplingGradients<acc_t>& target, int64_t channel,
                       bool first) {
    if (target.data == nullptr) return;
    const int64_t stride = target.pixel_stride;
    for (int64_t r = 0; r < tile.runs; ++r) {
      const auto& run = tile.run[r];
      const acc_t* values = source + run.first;
      acc_t* sums = target.at(channel, run.pixel);
      for (int64_t i = 0; i < run.count; ++i) {
        acc_t& sum = sums[i * stride];
        sum = first ? values[i] : sum + values[i];
      }
    }
  };
  for (int64_t b = 0; b < static_cast<int64_t>(blocks.size()); ++b) {
    const ChannelBlock& block = blocks[b];
    for (int64_t d = block.begin / channels; d * channels < block.end; ++d) {
      if (owns_deform_group(shape, block, d)) continue;
      const bool first = d * channels >= block.begin;
      const acc_t* source = partial + partial_position(shape, block, b, d);
      for (int64_t tap = 0; tap < shape.taps(); ++tap, source += 3 * kBackwardTile) {
        const int64_t row = d * shape.taps() + tap;
        add(source, tensors.grad_offset, 2 * row, first);
        add(source + kBackwardTile, tensors.grad_offset, 2 * row + 1, first);
        add(source + 2 * kBackwardTile, tensors.grad_mask, row, first);
      }
    }
  }
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Gradients backward(const DeformConv2dShape& shape, const Tensor& grad_output, const Tensor& input,
                   const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& mask,
                   const std::vector<bool>& wanted) {
  using acc_t = accumulator_t<T>;
  const bool wants_mask = wanted[3] && mask.has_value();
  const auto gradient_of = [&](const Tensor& tensor, bool present) {
    return new_tensor(input, present ? sizes_of(tensor) : std::vector<int64_t>{0},
                      tensor.scalar_type(), present ? layout_of(tensor) : MemoryFormat::Contiguous);
  };
  Tensor grad_input = gradient_of(input, wanted[0]), grad_offset = gradient_of(offset, wanted[1]);
  Tensor grad_weight = gradient_of(weight, wanted[2]);
  Tensor grad_mask = gradient_of(mask.value_or(offset), wants_mask);
  // It is added to. All of the others are written once, where there is any output.
  torch::stable::zero_(grad_input);
  if (grad_output.numel() == 0 || input.numel() == 0) {
    for (Tensor* gradient : {&grad_offset, &grad_weight, &grad_mask}) {
      torch::stable::zero_(*gradient);
    }
    return {grad_input, grad_offset, grad_weight, grad_mask};
  }

  const Tensor gradients = either_way(grad_output), inputs = either_way(input);
  const Tensor weights = either_way(weight), offsets = readable_sampling(offset);
  std::optional<Tensor> masks;
  if (mask.has_value()) masks = readable_sampling(*mask);

  const BackwardKernel<T> kernel = MMDCN_CPU_KERNEL(deform_conv2d_backward, T)(shape);
  const int64_t taps = shape.taps(), pixels = shape.pixels();
  const int64_t group_channels = shape.deform_group_channels();
  const std::vector<ChannelBlock> blocks = channel_blocks(shape);
  const int64_t block_count = static_cast<int64_t>(blocks.size());
  int64_t packed_size = 0, sums_size = 0, widest = 0;
  bool shared = false;
  for (const ChannelBlock& block : blocks) {
    packed_size = std::max(packed_size, kernel.packed_size(shape, block));
    if (wanted[2]) sums_size = std::max(sums_size, kernel.sums_size(shape, block));
    widest = std::max(widest, block.end - block.begin);
    shared = shared || block.begin % group_channels != 0 || block.end % group_channels != 0;
  }
  shared = shared && (wanted[1] || wants_mask);
  const int64_t weight_size = packed_size + sums_size;
  const int64_t weight_bytes = block_count * weight_size * static_cast<int64_t>(sizeof(acc_t));
  // In 16 bits the gradient must not be rounded before all is added.
  const bool kept = !std::is_same_v<T, acc_t> || weight_bytes <= kKeptBytes;
  const Buffer<acc_t> kept_weights(kept ? block_count * weight_size : 0);

  BackwardTensors<T> tensors = {};
  tensors.output_layout = image_layout(gradients);
  tensors.input_layout = image_layout(inputs);
  tensors.partial_tile = shared ? 2 * block_count * partial_size(shape) : 0;
  const int64_t tiles = kernel.tiles(shape);
  int64_t span = std::min(tiles, kSpanTiles);
  if (shared) {
    const int64_t tile_bytes = tensors.partial_tile * static_cast<int64_t>(sizeof(acc_t));
    const int64_t least = kept ? 1 : kWorthPackingTiles;
    span = std::min(tiles, std::clamp(kPartialBytes / tile_bytes, least, kSpanTiles));
  }
  const Buffer<acc_t> partial(span * tensors.partial_tile);
  tensors.partial = shared ? partial.get() : nullptr;
  const SamplingTensor<acc_t> all_offsets = sampling_tensor<acc_t>(offsets);
  const SamplingTensor<acc_t> all_masks = sampling_tensor<acc_t>(masks);
  const auto gradients_of = [](const Tensor& gradient, bool present,
                               int64_t first) -> SamplingGradients<acc_t> {
    if (!present) return {nullptr, 0, 1};
    const ImageLayout layout = image_layout(gradient);
    return {data<acc_t>(gradient) + first, layout.channel_stride, layout.pixel_stride};
  };
  const auto set_image = [&](int64_t image) {
    const int64_t first_sample = image * shape.deform_groups * taps * pixels;
    const int64_t area = image * shape.height * shape.width * shape.channels;
    tensors.grad_output = const_data<T>(gradients) + image * pixels * shape.out_channels;
    tensors.input = const_data<T>(inputs) + area;
    tensors.offset = all_offsets.image(image);
    tensors.mask = all_masks.image(image);
    tensors.grad_input = wanted[0] ? data<T>(grad_input) + area : nullptr;
    tensors.grad_offset = gradients_of(grad_offset, wanted[1], 2 * first_sample);
    tensors.grad_mask = gradients_of(grad_mask, wants_mask, first_sample);
  };
  set_image(0);
  const int64_t window_bytes = kernel.window_bytes(shape, tensors, widest);
  const Buffer<std::byte> window_memory(block_count * window_bytes);
  std::vector<BlockWindows<T>> windows(block_count);
  const int64_t scratch_bytes = kernel.scratch_bytes(shape, tensors, widest);
  const WeightLayout layout = weight_layout(weights);  // its gradient's too

  for (int64_t image = 0; image < shape.batch; ++image) {
    set_image(image);
    for (int64_t first = 0; first < tiles; first += span) {
      const int64_t last = std::min(first + span, tiles);
      const bool starts = image == 0 && first == 0;
      const bool ends = image == shape.batch - 1 && last == tiles;
      const int64_t span_pixels = std::min((last - first) * kBackwardTile, pixels);
      const int64_t block_grain = grain(block_count, 3 * pass_work(shape, span_pixels));
      torch::stable::parallel_for(0, block_count, block_grain, [&](int64_t begin, int64_t end) {
        const Buffer<std::byte> scratch(scratch_bytes);
        const Buffer<acc_t> own_weights(kept ? 0 : weight_size);
        for (int64_t b = begin; b < end; ++b) {
          acc_t* packed = kept ? kept_weights.get() + b * weight_size : own_weights.get();
          acc_t* sums = packed + packed_size;
          if (starts || !kept) {
            kernel.pack_weight(shape, const_data<T>(weights), layout, blocks[b], packed);
            std::fill(sums, sums + sums_size, acc_t(0));
          }
          BackwardTensors<T> own = tensors;
          own.weight = packed;
          own.grad_weight = wanted[2] ? sums : nullptr;
          if (first == 0) {
            kernel.open(shape, own, blocks[b], window_memory.get() + b * window_bytes, windows[b]);
          }
          kernel.run(shape, own, blocks.data(), b, first, last, windows[b], scratch.get());
          if (last == tiles) kernel.close(shape, own, blocks[b], windows[b]);
          if (wanted[2] && (ends || !kept)) {
            kernel.unpack_sums(shape, sums, blocks[b], !kept && !starts, data<T>(grad_weight),
                               layout);
          }
        }
      });
      if (!shared) continue;
      const int64_t tile_grain = grain(1, tensors.partial_tile * kElementWork);
      torch::stable::parallel_for(first, last, tile_grain, [&](int64_t begin, int64_t end) {
        Tile<kBackwardTile> tile;
        for (int64_t index = begin; index < end; ++index) {
          kernel.tile_at(shape, index, tile);
          add_partial(shape, tensors, blocks, tile,
                      partial.get() + (index - first) * tensors.partial_tile);
        }
      });
    }
  }
  return {grad_input, grad_offset, grad_weight, grad_mask};
}

Tensor deform_conv2d(const Tensor& input, const Tensor& offset, const Tensor& weight,
                     const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                     const std::optional<Tensor>& mask, bool /* allow_tf32 */) {
  const DeformConv2dShape shape =
      deform_conv2d_shape(input, offset, weight, bias, stride, padding, dilation, mask);
  return with_element_type(input, [&](auto element) {
    return forward<decltype(element)>(shape, input, offset, weight, bias, mask);
  });
}

Gradients deform_conv2d_backward(const Tensor& grad_output, const Tensor& input,
                                 const Tensor& offset, const Tensor& weight,
                                 const std::vector<int64_t>& stride,
                                 const std::vector<int64_t>& padding,
                                 const std::vector<int64_t>& dilation,
                                 const std::optional<Tensor>& mask,
                                 const std::vector<bool>& output_mask, bool /* allow_tf32 */,
                                 bool /* deterministic: it always is */) {
  const DeformConv2dShape shape =
      deform_conv2d_shape(input, offset, weight, std::nullopt, stride, padding, dilation, mask);
  check_grad_output(shape, grad_output, input, output_mask);
  return with_element_type(input, [&](auto element) {
    return backward<decltype(element)>(shape, grad_output, input, offset, weight, mask,
                                       output_mask);
  });
}

}  // namespace
}  // namespace mmdcn

STABLE_TORCH_LIBRARY_IMPL(mmdcn, CPU, m) {
  m.impl("deform_conv2d", TORCH_BOX(&mmdcn::deform_conv2d));
  m.impl("deform_conv2d_backward", TORCH_BOX(&mmdcn::deform_conv2d_backward));
}
