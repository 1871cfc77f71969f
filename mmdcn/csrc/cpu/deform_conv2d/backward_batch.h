// The backward pass of deform_conv2d on a batch: the memory and threads around the kernel.
#pragma once

#include <algorithm>
#include <cstddef>
#include <tuple>
#include <vector>

#include "layouts.h"

namespace mmdcn {
namespace {

// The backward pass has a barrier after each span of tiles. Between two barriers, the blocks of
// channels that share an offset group leave at most so many bytes of sums, and a span has at most
// so many tiles.
constexpr int64_t kPartialBytes = 2 << 20;
constexpr int64_t kSpanTiles = 24;

// Up to so many bytes, the packed weights and the sums of their gradient are kept from span to
// span. If there are more, each thread packs the weights of its current block again for each span,
// and adds the sums to the gradient after it. That takes little time for spans of so many tiles or
// more.
constexpr int64_t kKeptBytes = 8 << 20;
constexpr int64_t kWorthPackingTiles = 6;

// Adds up the sums of the offset groups that several blocks share, in the order of the blocks, for
// one tile.
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
      const acc_t* source = partial + partial_index(shape, block, b, d);
      for (int64_t tap = 0; tap < shape.taps(); ++tap, source += 3 * kBackwardTile) {
        const int64_t row = d * shape.taps() + tap;
        add(source, tensors.grad_offset, 2 * row, first);
        add(source + kBackwardTile, tensors.grad_offset, 2 * row + 1, first);
        add(source + 2 * kBackwardTile, tensors.grad_mask, row, first);
      }
    }
  }
}

// The width of the blocks of channels. Depthwise convolutions have two instead of three, which two
// threads would share badly, and for each of which samples are located again.
inline int64_t backward_width(const DeformConv2dShape& shape) {
  const int64_t width = block_width(shape.channels);
  const bool three = 2 * width < shape.channels && shape.channels <= 3 * width;
  return three && is_depthwise(shape) ? ((shape.channels + 1) / 2 + 15) / 16 * 16 : width;
}

// The plan of a backward pass: its blocks, its spans, and the sizes of what it keeps in memory.
template <typename T>
struct BackwardPlan {
  using acc_t = accumulator_t<T>;
  const std::vector<ChannelBlock> blocks;
  const int64_t block_count;
  int64_t packed_size = 0, sums_size = 0, widest = 0;  // of the largest block
  int64_t weight_size;                                 // packed_size + sums_size
  bool kept;                                           // whether both are kept between spans
  bool shared = false;                                 // whether blocks leave sums in `partial`
  int64_t partial_tile;                                // elements of `partial` for one tile
  int64_t tiles, span;                                 // of an image, and of a span

  BackwardPlan(const DeformConv2dShape& shape, const BackwardKernel<T>& kernel, bool wants_weight,
               bool wants_sampling)
      : blocks(channel_blocks(shape.groups, shape.group_channels(), backward_width(shape), true)),
        block_count(static_cast<int64_t>(blocks.size())) {
    const int64_t group_channels = shape.deform_group_channels();
    for (const ChannelBlock& block : blocks) {
      packed_size = std::max(packed_size, kernel.packed_size(shape, block));
      if (wants_weight) sums_size = std::max(sums_size, kernel.sums_size(shape, block));
      widest = std::max(widest, block.channels());
      shared = shared || block.begin % group_channels != 0 || block.end % group_channels != 0;
    }
    shared = shared && wants_sampling;
    weight_size = packed_size + sums_size;
    const int64_t weight_bytes = block_count * weight_size * static_cast<int64_t>(sizeof(acc_t));
    // A gradient that is stored in 16 bits is rounded once, after everything has been added.
    kept = !std::is_same_v<T, acc_t> || weight_bytes <= kKeptBytes;
    partial_tile = shared ? 2 * block_count * partial_size(shape) : 0;
    tiles = kernel.tiles(shape);
    span = std::min(tiles, kSpanTiles);
    if (shared) {
      const int64_t tile_bytes = partial_tile * static_cast<int64_t>(sizeof(acc_t));
      const int64_t least = kept ? 1 : kWorthPackingTiles;
      span = std::min(tiles, std::clamp(kPartialBytes / tile_bytes, least, kSpanTiles));
    }
  }
};

// The tensors of the backward pass of a batch, in layouts that the kernels can read and write;
// gradients that are not wanted have no elements.
struct BackwardBatch {
  Tensor grad_output, input, offset, weight;
  std::optional<Tensor> mask;
  Tensor grad_input, grad_offset, grad_weight, grad_mask;
  bool wants_input, wants_offset, wants_weight, wants_mask;
};

// The backward pass of a batch, by images and spans of tiles. Within a span, each thread computes
// the gradients of some blocks of channels alone.
template <typename T>
class Backward {
 public:
  using acc_t = accumulator_t<T>;

  Backward(const DeformConv2dShape& shape, const BackwardBatch& batch)
      : shape_(shape),
        batch_(batch),
        kernel_(MMDCN_CPU_KERNEL(deform_conv2d_backward, T)(shape)),
        plan_(shape, kernel_, batch.wants_weight, batch.wants_offset || batch.wants_mask),
        weight_layout_(weight_layout(batch.weight)),
        kept_weights_(plan_.kept ? plan_.block_count * plan_.weight_size : 0),
        partial_(plan_.span * plan_.partial_tile),
        tensors_(image_tensors(0)),
        window_bytes_(kernel_.window_bytes(shape, tensors_, plan_.widest)),
        window_memory_(plan_.block_count * window_bytes_),
        windows_(plan_.block_count),
        scratch_bytes_(kernel_.scratch_bytes(shape, tensors_, plan_.widest)) {}

  void run() {
    for (int64_t image = 0; image < shape_.batch; ++image) {
      tensors_ = image_tensors(image);
      for (int64_t first = 0; first < plan_.tiles; first += plan_.span) {
        const int64_t last = std::min(first + plan_.span, plan_.tiles);
        run_span(image, first, last);
        if (plan_.shared) add_shared(first, last);
      }
    }
  }

 private:
  BackwardTensors<T> image_tensors(int64_t image) const {
    const int64_t pixels = shape_.pixels();
    const int64_t first_sample = image * shape_.deform_groups * shape_.taps() * pixels;
    const int64_t area = image * shape_.height * shape_.width * shape_.channels;
    BackwardTensors<T> tensors = {};
    tensors.output_layout = image_layout(batch_.grad_output);
    tensors.input_layout = image_layout(batch_.input);
    tensors.partial_tile = plan_.partial_tile;
    tensors.partial = plan_.shared ? partial_.get() : nullptr;
    tensors.grad_output = const_data<T>(batch_.grad_output) + image * pixels * shape_.out_channels;
    tensors.input = const_data<T>(batch_.input) + area;
    tensors.offset = sampling_tensor<acc_t>(batch_.offset).image(image);
    tensors.mask = sampling_tensor<acc_t>(batch_.mask).image(image);
    tensors.grad_input = batch_.wants_input ? data<T>(batch_.grad_input) + area : nullptr;
    tensors.grad_offset = gradients_of(batch_.grad_offset, batch_.wants_offset, 2 * first_sample);
    tensors.grad_mask = gradients_of(batch_.grad_mask, batch_.wants_mask, first_sample);
    return tensors;
  }

  static SamplingGradients<acc_t> gradients_of(const Tensor& gradient, bool wanted, int64_t first) {
    if (!wanted) return {nullptr, 0, 1};
    const ImageLayout layout = image_layout(gradient);
    return {data<acc_t>(gradient) + first, layout.channel_stride, layout.pixel_stride};
  }

  void run_span(int64_t image, int64_t first, int64_t last) {
    const int64_t pixels = std::min((last - first) * kBackwardTile, shape_.pixels());
    const int64_t block_grain = grain(plan_.block_count, 3 * pass_work(shape_, pixels));
    parallel_for(0, plan_.block_count, block_grain, [&](int64_t begin, int64_t end) {
      const Buffer<std::byte> scratch(scratch_bytes_);
      const Buffer<acc_t> weights(plan_.kept ? 0 : plan_.weight_size);
      for (int64_t b = begin; b < end; ++b) {
        acc_t* own = plan_.kept ? kept_weights_.get() + b * plan_.weight_size : weights.get();
        run_block(b, image, first, last, own, scratch.get());
      }
    });
  }

  // `weights` has room for the block's packed weights and, after them, the sums of their gradient.
  void run_block(int64_t b, int64_t image, int64_t first, int64_t last, acc_t* weights,
                 std::byte* scratch) {
    const ChannelBlock& block = plan_.blocks[b];
    const bool starts = image == 0 && first == 0;
    const bool ends = image == shape_.batch - 1 && last == plan_.tiles;
    acc_t* sums = weights + plan_.packed_size;
    if (starts || !plan_.kept) {
      kernel_.pack_weight(shape_, const_data<T>(batch_.weight), weight_layout_, block, weights);
      std::fill(sums, sums + plan_.sums_size, acc_t(0));
    }
    BackwardTensors<T> own = tensors_;
    own.weight = weights;
    own.grad_weight = batch_.wants_weight ? sums : nullptr;
    if (first == 0) {
      kernel_.open(shape_, own, block, window_memory_.get() + b * window_bytes_, windows_[b]);
    }
    kernel_.run(shape_, own, plan_.blocks.data(), b, first, last, windows_[b], scratch);
    if (last == plan_.tiles) kernel_.close(shape_, own, block, windows_[b]);
    if (batch_.wants_weight && (ends || !plan_.kept)) {
      kernel_.unpack_sums(shape_, sums, block, !plan_.kept && !starts, data<T>(batch_.grad_weight),
                          weight_layout_);
    }
  }

  // Adds up the sums that blocks have left in `partial` for tiles [first, last).
  void add_shared(int64_t first, int64_t last) const {
    const int64_t tile_grain = grain(1, plan_.partial_tile * kElementWork);
    parallel_for(first, last, tile_grain, [&](int64_t begin, int64_t end) {
      Tile<kBackwardTile> tile;
      for (int64_t index = begin; index < end; ++index) {
        kernel_.tile_at(shape_, index, tile);
        add_partial(shape_, tensors_, plan_.blocks, tile,
                    partial_.get() + (index - first) * plan_.partial_tile);
      }
    });
  }

  const DeformConv2dShape& shape_;
  const BackwardBatch& batch_;
  const BackwardKernel<T> kernel_;
  const BackwardPlan<T> plan_;
  const WeightLayout weight_layout_;  // of the weight and its gradient
  const Buffer<acc_t> kept_weights_, partial_;
  BackwardTensors<T> tensors_;  // of the current image
  const int64_t window_bytes_;
  const Buffer<std::byte> window_memory_;
  std::vector<BlockWindows<T>> windows_;
  const int64_t scratch_bytes_;
};

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Gradients backward(const DeformConv2dShape& shape, const Tensor& grad_output, const Tensor& input,
                   const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& mask,
                   const std::vector<bool>& wanted) {
  const bool wants_mask = wanted[3] && mask.has_value();
  const auto gradient_of = [&](const Tensor& tensor, bool present) {
    return new_tensor(input, present ? sizes_of(tensor) : std::vector<int64_t>{0},
                      tensor.scalar_type(), present ? layout_of(tensor) : MemoryFormat::Contiguous);
  };
  Tensor grad_input = gradient_of(input, wanted[0]), grad_offset = gradient_of(offset, wanted[1]);
  Tensor grad_weight = gradient_of(weight, wanted[2]);
  Tensor grad_mask = gradient_of(mask.value_or(offset), wants_mask);
  // The kernels add to this one, and write each element of the others once if there is any output.
  torch::stable::zero_(grad_input);
  if (grad_output.numel() == 0 || input.numel() == 0) {
    for (Tensor* gradient : {&grad_offset, &grad_weight, &grad_mask}) {
      torch::stable::zero_(*gradient);
    }
    return {grad_input, grad_offset, grad_weight, grad_mask};
  }

  std::optional<Tensor> masks;
  if (mask.has_value()) masks = readable_sampling(*mask);
  const BackwardBatch batch = {dense(grad_output), dense(input), readable_sampling(offset),
                               dense(weight),      masks,        grad_input,
                               grad_offset,        grad_weight,  grad_mask,
                               wanted[0],          wanted[1],    wanted[2],
                               wants_mask};
  Backward<T>(shape, batch).run();
  return {grad_input, grad_offset, grad_weight, grad_mask};
}

}  // namespace
}  // namespace mmdcn
