// deform_conv2d on the CPU: layouts, memory and threads around the kernels.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "capability.h"
#include "deform_conv2d_kernel.h"

namespace mmdcn {
namespace {

// Output pixels that the backward pass works on between two barriers; bounds what blocks of
// channels that share an offset group keep aside.
constexpr int64_t kBackwardSpan = 21 * kBackwardTile;

template <typename T>
DeformConv2dKernels<T> kernels() {
#ifdef __x86_64__
  if (capability() == Capability::kAvx512) return avx512::deform_conv2d_kernels<T>();
  if (capability() == Capability::kAvx2) return avx2::deform_conv2d_kernels<T>();
#endif
  return portable::deform_conv2d_kernels<T>();
}

template <typename A>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<A*>(std::aligned_alloc(64, (count * sizeof(A) + 63) / 64 * 64))) {
    STD_TORCH_CHECK(data_ != nullptr || count == 0, "mmdcn: out of memory for ", count,
                    " elements of scratch space");
  }
  A* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(A* pointer) const { std::free(pointer); }
  };
  std::unique_ptr<A, Free> data_;
};

template <typename T>
Tensor forward(const DeformConv2dShape& shape, const Tensor& input, const Tensor& offset,
               const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& mask) {
  using acc_t = accumulator_t<T>;
  const MemoryFormat layout = layout_of(input);
  Tensor output =
      new_tensor(input, {shape.batch, shape.out_channels, shape.out_height, shape.out_width},
                 input.scalar_type(), layout);
  if (output.numel() == 0) return output;

  const Tensor features = torch::stable::contiguous(input, MemoryFormat::ChannelsLast);
  const Tensor offsets = torch::stable::contiguous(offset);
  const Tensor weights = torch::stable::contiguous(weight);
  std::optional<Tensor> masks, biases;
  if (mask.has_value()) masks = torch::stable::contiguous(*mask);
  if (bias.has_value()) {
    biases =
        torch::stable::contiguous(torch::stable::to(*bias, coordinate_type(input.scalar_type())));
  }

  const DeformConv2dKernels<T> kernel = kernels<T>();
  const int64_t taps = shape.taps();
  const int64_t in = shape.group_channels(), out = shape.group_out_channels();
  const int64_t packed_size = kernel.packed_size(in, out);
  const Buffer<acc_t> packed(shape.groups * taps * packed_size);
  torch::stable::parallel_for(0, shape.groups * taps, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t group = unit / taps, tap = unit % taps;
      kernel.pack(const_data<T>(weights) + group * out * in * taps + tap, taps, in * taps, in, out,
                  packed.get() + unit * packed_size);
    }
  });

  ForwardTensors<T> tensors = {};
  tensors.input = const_data<T>(features);
  tensors.offset = const_data<acc_t>(offsets);
  tensors.mask = masks.has_value() ? const_data<acc_t>(*masks) : nullptr;
  tensors.weight = packed.get();
  tensors.bias = biases.has_value() ? const_data<acc_t>(*biases) : nullptr;
  tensors.output = data<T>(output);
  const bool channels_last = layout == MemoryFormat::ChannelsLast;
  tensors.output_pixel_stride = channels_last ? shape.out_channels : 1;
  tensors.output_channel_stride = channels_last ? 1 : shape.pixels();

  const int64_t tiles = (shape.pixels() + kForwardTile - 1) / kForwardTile;
  torch::stable::parallel_for(0, shape.batch * tiles, 1, [&](int64_t begin, int64_t end) {
    const Buffer<acc_t> scratch(kernel.forward_scratch(shape));
    kernel.forward(shape, tensors, begin, end, scratch.get());
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
      blocks.push_back({group, c, std::min(c + width, end), 0});
    }
  }
  return blocks;
}

// Adds up, in the order of the blocks, the parts of offset groups that several blocks share.
template <typename T>
void add_partial(const DeformConv2dShape& shape, const BackwardTensors<T>& tensors,
                 const std::vector<ChannelBlock>& blocks, int64_t d) {
  using acc_t = accumulator_t<T>;
  const int64_t part = shape.deform_group_channels(), taps = shape.taps(), pixels = shape.pixels();
  const int64_t span = tensors.pixel_end - tensors.pixel_begin;
  bool first = true;
  for (size_t b = 0; b < blocks.size(); ++b) {
    if (blocks[b].end <= d * part || blocks[b].begin >= (d + 1) * part) continue;
    if (owns_deform_group(shape, blocks[b], d)) return;
    const acc_t* source =
        tensors.partial +
        partial_index(shape, blocks[b], static_cast<int64_t>(b), d) * taps * 3 * span;
    const auto accumulate = [&](acc_t* target, const acc_t* values) {
      for (int64_t i = 0; i < span; ++i) target[i] = first ? values[i] : target[i] + values[i];
    };
    for (int64_t tap = 0; tap < taps; ++tap, source += 3 * span) {
      const int64_t row = d * taps + tap;
      if (tensors.grad_offset) {
        acc_t* target = tensors.grad_offset + 2 * row * pixels + tensors.pixel_begin;
        accumulate(target, source);
        accumulate(target + pixels, source + span);
      }
      if (tensors.grad_mask) {
        accumulate(tensors.grad_mask + row * pixels + tensors.pixel_begin, source + 2 * span);
      }
    }
    first = false;
  }
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Gradients backward(const DeformConv2dShape& shape, const Tensor& grad_output, const Tensor& input,
                   const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& mask,
                   const std::vector<bool>& wanted) {
  using acc_t = accumulator_t<T>;
  const ScalarType type = input.scalar_type(), acc_type = coordinate_type(type);
  const int64_t taps = shape.taps(), pixels = shape.pixels();
  const int64_t in = shape.group_channels(), out = shape.group_out_channels();
  const DeformConv2dKernels<T> kernel = kernels<T>();
  const int64_t padded_out = kernel.padded(out);

  const auto zeros = [&](bool present, const std::vector<int64_t>& size, MemoryFormat layout) {
    Tensor tensor = new_tensor(input, present ? size : std::vector<int64_t>{0}, acc_type, layout);
    torch::stable::zero_(tensor);
    return tensor;
  };
  const bool want_mask = wanted[3] && mask.has_value();
  Tensor grad_input = zeros(wanted[0], sizes_of(input),
                            wanted[0] ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  Tensor grad_offset = zeros(wanted[1], sizes_of(offset), MemoryFormat::Contiguous);
  Tensor grad_weight =
      zeros(wanted[2], {shape.groups, in * taps, padded_out}, MemoryFormat::Contiguous);
  Tensor grad_mask = zeros(want_mask, want_mask ? sizes_of(*mask) : std::vector<int64_t>{0},
                           MemoryFormat::Contiguous);

  if (grad_output.numel() > 0) {
    const Tensor gradients = torch::stable::contiguous(grad_output, MemoryFormat::ChannelsLast);
    const Tensor features = torch::stable::contiguous(input, MemoryFormat::ChannelsLast);
    const Tensor offsets = torch::stable::contiguous(offset);
    const Tensor weights = torch::stable::contiguous(weight);
    std::optional<Tensor> masks;
    if (mask.has_value()) masks = torch::stable::contiguous(*mask);

    std::vector<ChannelBlock> blocks = channel_blocks(shape);
    const int64_t block_count = static_cast<int64_t>(blocks.size());
    int64_t packed_total = 0, widest = 0;
    bool shared = false;
    for (ChannelBlock& block : blocks) {
      block.weight_begin = packed_total;
      packed_total += taps * kernel.packed_size(out, block.end - block.begin);
      widest = std::max(widest, block.end - block.begin);
      const int64_t part = shape.deform_group_channels();
      shared = shared || block.begin % part != 0 || block.end % part != 0;
    }
    const Buffer<acc_t> packed(packed_total);
    torch::stable::parallel_for(0, block_count * taps, 1, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const ChannelBlock& block = blocks[unit / taps];
        const int64_t tap = unit % taps, columns = block.end - block.begin;
        const T* source = const_data<T>(weights) + block.group * out * in * taps +
                          (block.begin - block.group * in) * taps + tap;
        kernel.pack(source, in * taps, taps, out, columns,
                    packed.get() + block.weight_begin + tap * kernel.packed_size(out, columns));
      }
    });
    const bool shifts = wanted[1] || want_mask;
    const int64_t span = std::min(pixels, kBackwardSpan);
    const Buffer<acc_t> partial(shared && shifts ? block_count * 2 * taps * 3 * span : 0);

    for (int64_t image = 0; image < shape.batch; ++image) {
      const int64_t samples = image * shape.deform_groups * taps * pixels;
      const int64_t area = image * shape.height * shape.width * shape.channels;
      BackwardTensors<T> tensors = {};
      tensors.grad_output = const_data<T>(gradients) + image * pixels * shape.out_channels;
      tensors.input = const_data<T>(features) + area;
      tensors.offset = const_data<acc_t>(offsets) + 2 * samples;
      tensors.mask = masks.has_value() ? const_data<acc_t>(*masks) + samples : nullptr;
      tensors.weight = packed.get();
      tensors.grad_input = wanted[0] ? data<acc_t>(grad_input) + area : nullptr;
      tensors.grad_offset = wanted[1] ? data<acc_t>(grad_offset) + 2 * samples : nullptr;
      tensors.grad_mask = want_mask ? data<acc_t>(grad_mask) + samples : nullptr;
      tensors.grad_weight = wanted[2] ? data<acc_t>(grad_weight) : nullptr;
      tensors.partial = partial.get();
      for (int64_t first = 0; first < pixels; first += span) {
        tensors.pixel_begin = first;
        tensors.pixel_end = std::min(first + span, pixels);
        torch::stable::parallel_for(0, block_count, 1, [&](int64_t begin, int64_t end) {
          const Buffer<acc_t> scratch(kernel.backward_scratch(shape, widest));
          for (int64_t b = begin; b < end; ++b) {
            kernel.backward(shape, tensors, blocks.data(), b, scratch.get());
          }
        });
        if (!shared || !shifts) continue;
        torch::stable::parallel_for(0, shape.deform_groups, 1, [&](int64_t begin, int64_t end) {
          for (int64_t d = begin; d < end; ++d) add_partial(shape, tensors, blocks, d);
        });
      }
    }
  }

  if (wanted[0]) grad_input = torch::stable::contiguous(grad_input, layout_of(input));
  grad_input = torch::stable::to(grad_input, type);
  if (wanted[2]) {
    grad_weight = torch::stable::transpose(torch::stable::narrow(grad_weight, 2, 0, out), 1, 2);
    grad_weight = torch::stable::reshape(torch::stable::contiguous(grad_weight), sizes_of(weight));
  }
  grad_weight = torch::stable::to(grad_weight, type);
  return {grad_input, grad_offset, grad_weight, grad_mask};
}

// Calls `function` with a value of the type that the elements of `input` are stored in.
template <typename F>
auto with_element_type(const Tensor& input, const F& function) {
  switch (input.scalar_type()) {
    case ScalarType::Double:
      return function(double{});
    case ScalarType::Float:
      return function(float{});
    case ScalarType::Half:
      return function(Half{});
    case ScalarType::BFloat16:
      return function(BFloat16{});
    default:
      STD_TORCH_CHECK(false, "mmdcn::deform_conv2d: input must be a floating-point tensor");
  }
}

Tensor deform_conv2d(const Tensor& input, const Tensor& offset, const Tensor& weight,
                     const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                     const std::optional<Tensor>& mask) {
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
                                 const std::vector<bool>& output_mask) {
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
