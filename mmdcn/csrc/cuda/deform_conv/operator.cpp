// deform_conv2d and deform_conv_nd on CUDA: layouts, memory, device and stream around the kernels
// and products.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../../deform_conv_nd_tensors.h"
#include "../device.h"
#include "chunks.h"
#include "kernels.h"
#include "product.h"
#include "spans.h"

namespace mmdcn::cuda {
namespace {

// Bytes of columns to work on at a time, in place of what the device suggests, unless it is 0.
std::atomic<int64_t> imposed_chunk{0};

void set_cuda_chunk(int64_t bytes) {
  STD_TORCH_CHECK(bytes >= 0, "mmdcn::set_cuda_chunk: bytes: expected 0 or more, got ", bytes);
  imposed_chunk = bytes;
}

template <int R>
ProductShape product_shape(const ConvProblem<R>& problem) {
  return {problem.shape.groups, problem.group_out_channels, problem.columns, problem.pixels};
}

// The part of a call that its tensors' layouts do not change.
template <int R>
struct Context {
  DeformConvNdShape<R> shape;
  Precision precision;
  OnDevice device;
  Stream stream;
  ProductCalls calls;

  Context(const char* op, const DeformConvNdShape<R>& shape, const Tensor& input, bool tf32,
          bool matmul_tf32, bool deterministic)
      : shape(shape),
        precision(precision_of(op, input)),
        device(input),
        stream(device.current_stream()),
        calls(precision, tf32, matmul_tf32, deterministic, stream) {}

  // The problem of some images alone, with their offsets and masks as the kernels take them.
  ConvProblem<R> problem(const Images& images, const Tensor& offsets,
                         const std::optional<Tensor>& masks) const {
    DeformConvNdShape<R> of_images = shape;
    of_images.batch = images.count;
    ConvProblem<R> problem(of_images);
    problem.offset_image = offsets.stride(0);
    if (masks.has_value()) problem.mask_image = masks->stride(0);
    return problem;
  }

  Chunks chunks(const ConvProblem<R>& problem, int64_t element_size) const {
    const int64_t imposed = imposed_chunk;
    const int64_t bytes = imposed > 0 ? imposed : chunk_bytes(stream.device);
    // A product that is copied into planes takes memory beside its columns; where a pixel has many
    // more outputs than inputs, most of it.
    const int64_t with_product = (problem.row + problem.shape.out_channels) * element_size;
    const int64_t most =
        std::min(bytes / (problem.row * element_size), (bytes + copy_bytes()) / with_product);
    return Chunks(problem.shape.batch, problem.pixels, most);
  }
};

template <int R>
Tensor forward(const char* op, const Tensor& input, const Tensor& offset, const Tensor& weight,
               const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
               const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
               const std::optional<Tensor>& mask, bool tf32, bool matmul_tf32) {
  const Context<R> context(
      op, deform_conv_nd_shape<R>(input, offset, weight, bias, stride, padding, dilation, mask, op),
      input, tf32, matmul_tf32, false);
  const DeformConvNdShape<R>& shape = context.shape;
  const MemoryFormat format = R == 2 ? layout_of(input) : MemoryFormat::Contiguous;
  const bool to_channels_last = format == MemoryFormat::ChannelsLast;
  const Tensor output = new_tensor(input, output_size(shape), input.scalar_type(), format);
  if (output.numel() == 0) return output;

  const Tensor weights = channels_last(weight, context.stream);
  const int64_t image_bytes = copied_bytes(input, is_usable(input)) + copied_bytes(offset, mask);
  for_each_span(shape.batch, images_at_a_time(shape.batch, image_bytes), [&](const Images& span) {
    const Tensor features = channels_last(span.of(input), context.stream);
    const Tensor offsets = as_planes(span.of(offset), context.stream), result = span.of(output);
    const std::optional<Tensor> masks = as_planes(span.of(mask), context.stream);
    const ConvProblem<R> problem = context.problem(span, offsets, masks);
    context.chunks(problem, input.element_size()).for_each([&](const Chunk& chunk) {
      const PixelRange range = chunk.range(problem.pixels);
      const Tensor columns = new_tensor(input, {range.count, problem.row}, input.scalar_type());
      gather(context.precision, problem, range, features.const_data_ptr(), offsets.const_data_ptr(),
             pointer(masks), columns.mutable_data_ptr(), false, context.stream);
      multiply_output(context.calls, product_shape(problem), columns, chunk.images, chunk.pixels,
                      weights, result, to_channels_last, range.first);
    });
  });
  if (bias.has_value()) {
    add_bias(context.precision, output.numel(), shape.out_channels,
             to_channels_last ? 1 : shape.pixels(), as_contiguous(*bias).const_data_ptr(),
             output.mutable_data_ptr(), context.stream);
  }
  return output;
}

// The backward pass of some images, which adds to what those before them left.
template <int R>
class Backward {
  const Context<R>& context_;
  const bool deterministic_;
  const Tensor weight_;  // channels last
  std::optional<Tensor> transposed_weight_;
  const Tensor& grad_input_;  // these four of no elements where not wanted
  const Tensor &grad_offset_, &grad_mask_;
  const std::optional<Tensor>& grad_weight_sum_;  // in the type of offsets, channels last
  bool first_chunk_ = true;

 public:
  Backward(const Context<R>& context, bool deterministic, const Tensor& weight,
           const Tensor& grad_input, const Tensor& grad_offset,
           const std::optional<Tensor>& grad_weight_sum, const Tensor& grad_mask)
      : context_(context),
        deterministic_(deterministic),
        weight_(channels_last(weight, context.stream)),
        grad_input_(grad_input),
        grad_offset_(grad_offset),
        grad_mask_(grad_mask),
        grad_weight_sum_(grad_weight_sum) {}

  void run(const Images& span, const Tensor& grad_output, const Tensor& input, const Tensor& offset,
           const std::optional<Tensor>& mask) {
    const Stream& stream = context_.stream;
    const Tensor features = channels_last(span.of(input), stream);
    const Tensor gradients = channels_last(span.of(grad_output), stream);
    const Tensor offsets = as_planes(span.of(offset), stream);
    const std::optional<Tensor> masks = as_planes(span.of(mask), stream);
    const ConvProblem<R> problem = context_.problem(span, offsets, masks);
    const bool to_input = grad_input_.numel() > 0;
    const bool to_samples = to_input || grad_offset_.numel() > 0 || grad_mask_.numel() > 0;
    const bool wide = grad_weight_sum_.has_value() && context_.calls.wide_columns();
    PlanesOfSpan grad_offset(grad_offset_, span, stream), grad_mask(grad_mask_, span, stream);
    InputSum sum(*this, problem, span, gradients, masks, offset.scalar_type());
    const int64_t element_size = wide ? offset.element_size() : input.element_size();
    context_.chunks(problem, element_size).for_each([&](const Chunk& chunk) {
      const PixelRange range = chunk.range(problem.pixels);
      if (grad_weight_sum_.has_value()) {
        const ScalarType type = wide ? offset.scalar_type() : input.scalar_type();
        const Tensor columns = new_tensor(input, {range.count, problem.row}, type);
        gather(context_.precision, problem, range, features.const_data_ptr(),
               offsets.const_data_ptr(), pointer(masks), columns.mutable_data_ptr(), wide,
               context_.stream);
        add_to_weight(problem, range, columns, gradients);
      }
      if (!to_samples) return;
      const Tensor columns = new_tensor(input, {range.count, problem.row}, input.scalar_type());
      multiply_grad_columns(context_.calls, product_shape(problem), gradients, range.first,
                            range.count, weight_, transposed_weight_, columns);
      scatter(context_.precision, problem, range, columns.const_data_ptr(),
              features.const_data_ptr(), offsets.const_data_ptr(), pointer(masks), sum.target(),
              grad_offset.pointer(), grad_mask.pointer(), context_.stream);
    });
    sum.finish();
    grad_offset.finish();
    grad_mask.finish();
  }

 private:
  void add_to_weight(const ConvProblem<R>& problem, const PixelRange& range, const Tensor& columns,
                     const Tensor& gradients) {
    const Tensor& sum = *grad_weight_sum_;
    const Tensor result = first_chunk_ ? sum : new_tensor(sum, sizes_of(sum), sum.scalar_type());
    multiply_grad_weight(context_.calls, product_shape(problem), columns, gradients, range.first,
                         range.count, result);
    if (!first_chunk_) {
      accumulate(context_.precision, sum.numel(), result.const_data_ptr(), sum.mutable_data_ptr(),
                 context_.stream);
    }
    first_chunk_ = false;
  }

  // Where the gradient of the span's input is added up, if it is wanted.
  class InputSum {
    const Backward& backward_;
    const ConvProblem<R>& problem_;
    std::optional<Tensor> gradient_;  // of the span, as it is returned
    std::optional<Tensor> sum_, fixed_, magnitudes_;

   public:
    InputSum(const Backward& backward, const ConvProblem<R>& problem, const Images& span,
             const Tensor& gradients, const std::optional<Tensor>& masks, ScalarType type)
        : backward_(backward), problem_(problem) {
      if (backward.grad_input_.numel() == 0) return;
      gradient_ = span.of(backward.grad_input_);
      const Tensor last = channels_last_view(*gradient_);
      const bool apart = last.scalar_type() != type || !is_usable(*gradient_);
      sum_ = apart ? new_tensor(last, sizes_of(last), type) : last;
      if (!backward.deterministic_) {
        torch::stable::zero_(*sum_);
        return;
      }
      magnitudes_ = new_tensor(last, {kMagnitudes}, ScalarType::Int);
      torch::stable::zero_(*magnitudes_);
      fixed_ = new_tensor(last, {last.numel()}, ScalarType::Long);
      torch::stable::zero_(*fixed_);
      find_magnitudes(backward.context_.precision, problem, gradients.const_data_ptr(),
                      backward.weight_.const_data_ptr(), pointer(masks),
                      data<int32_t>(*magnitudes_), backward.context_.stream);
    }

    GradInput target() const {
      GradInput target;
      if (fixed_.has_value()) {
        target.fixed = data<int64_t>(*fixed_);
        target.magnitudes = data<int32_t>(*magnitudes_);
      } else if (sum_.has_value()) {
        target.sum = sum_->mutable_data_ptr();
      }
      return target;
    }

    void finish() {
      if (!gradient_.has_value()) return;
      if (fixed_.has_value()) {
        from_fixed(backward_.context_.precision, problem_, target(), sum_->mutable_data_ptr(),
                   backward_.context_.stream);
      }
      if (sum_->mutable_data_ptr() != gradient_->mutable_data_ptr()) {
        copy_features(*sum_, *gradient_, backward_.context_.stream);
      }
    }
  };
};

// Bytes that the copies and sums of one image take in the backward pass.
int64_t backward_image_bytes(const Tensor& grad_output, const Tensor& input, const Tensor& offset,
                             const std::optional<Tensor>& mask, bool to_input, bool deterministic) {
  const auto image = [](const Tensor& tensor) { return tensor.numel() / tensor.size(0); };
  int64_t bytes =
      copied_bytes(input, is_usable(input)) + copied_bytes(grad_output, is_usable(grad_output));
  if (to_input && (bytes > 0 || input.scalar_type() != offset.scalar_type())) {
    bytes += image(input) * offset.element_size();
  }
  if (to_input && deterministic) bytes += image(input) * sizeof(int64_t);
  // Offsets and masks as planes, and their gradients.
  return bytes + 2 * copied_bytes(offset, mask);
}

template <int R>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const char* op, const Tensor& grad_output, const Tensor& input, const Tensor& offset,
    const Tensor& weight, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, const std::optional<Tensor>& mask,
    const std::vector<bool>& output_mask, bool tf32, bool matmul_tf32, bool deterministic) {
  const DeformConvNdShape<R> shape = deform_conv_nd_shape<R>(input, offset, weight, std::nullopt,
                                                             stride, padding, dilation, mask, op);
  check_grad_output(op, grad_output, output_size(shape), input, output_mask, 4);
  const Context<R> context(op, shape, input, tf32, matmul_tf32, deterministic);
  const bool to_input = output_mask[0], to_offset = output_mask[1], to_weight = output_mask[2];
  const bool to_mask = output_mask[3] && mask.has_value();
  const auto format_of = [](const Tensor& tensor) {
    return R == 2 ? layout_of(tensor) : MemoryFormat::Contiguous;
  };
  const auto gradient = [&](bool wanted, const Tensor& of, MemoryFormat format) {
    return wanted ? new_tensor(input, sizes_of(of), of.scalar_type(), format)
                  : new_tensor(input, {0}, of.scalar_type());
  };
  const Tensor& mask_or_offset = mask.has_value() ? *mask : offset;
  Tensor grad_input = gradient(to_input, input, format_of(input));
  Tensor grad_offset = gradient(to_offset, offset, format_of(offset));
  Tensor grad_weight = gradient(to_weight, weight, format_of(weight));
  Tensor grad_mask = gradient(to_mask, mask_or_offset, format_of(mask_or_offset));

  if (grad_output.numel() == 0 || input.numel() == 0) {
    // Sums over nothing, and samples of nothing.
    for (Tensor* tensor : {&grad_input, &grad_offset, &grad_weight, &grad_mask}) {
      torch::stable::zero_(*tensor);
    }
  } else {
    std::optional<Tensor> grad_weight_sum;
    if (to_weight) {
      grad_weight_sum =
          new_tensor(input, sizes_of(channels_last_view(weight)), offset.scalar_type());
    }
    Backward<R> pass(context, deterministic, weight, grad_input, grad_offset, grad_weight_sum,
                     grad_mask);
    const int64_t bytes =
        backward_image_bytes(grad_output, input, offset, mask, to_input, deterministic);
    for_each_span(shape.batch, images_at_a_time(shape.batch, bytes),
                  [&](const Images& span) { pass.run(span, grad_output, input, offset, mask); });
    if (to_weight) {
      Tensor result = channels_last_view(grad_weight);
      torch::stable::copy_(result, *grad_weight_sum);
    }
  }
  return {grad_input, grad_offset, grad_weight, grad_mask};
}

Tensor deform_conv2d(const Tensor& input, const Tensor& offset, const Tensor& weight,
                     const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                     const std::optional<Tensor>& mask, bool allow_tf32, bool matmul_tf32) {
  return forward<2>("deform_conv2d", input, offset, weight, bias, stride, padding, dilation, mask,
                    allow_tf32, matmul_tf32);
}

Tensor deform_conv_nd(const Tensor& input, const Tensor& offset, const Tensor& weight,
                      const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                      const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                      const std::optional<Tensor>& mask, bool allow_tf32, bool matmul_tf32) {
  return forward<kConvNdRank>("deform_conv_nd", input, offset, weight, bias, stride, padding,
                              dilation, mask, allow_tf32, matmul_tf32);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> deform_conv2d_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& offset, const Tensor& weight,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, const std::optional<Tensor>& mask,
    const std::vector<bool>& output_mask, bool allow_tf32, bool matmul_tf32, bool deterministic) {
  return backward<2>("deform_conv2d_backward", grad_output, input, offset, weight, stride, padding,
                     dilation, mask, output_mask, allow_tf32, matmul_tf32, deterministic);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> deform_conv_nd_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& offset, const Tensor& weight,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, const std::optional<Tensor>& mask,
    const std::vector<bool>& output_mask, bool allow_tf32, bool matmul_tf32, bool deterministic) {
  return backward<kConvNdRank>("deform_conv_nd_backward", grad_output, input, offset, weight,
                               stride, padding, dilation, mask, output_mask, allow_tf32,
                               matmul_tf32, deterministic);
}

}  // namespace
}  // namespace mmdcn::cuda

STABLE_TORCH_LIBRARY_IMPL(mmdcn, CompositeExplicitAutograd, m) {
  m.impl("set_cuda_chunk", TORCH_BOX(&mmdcn::cuda::set_cuda_chunk));
}

STABLE_TORCH_LIBRARY_IMPL(mmdcn, CUDA, m) {
  m.impl("deform_conv2d", TORCH_BOX(&mmdcn::cuda::deform_conv2d));
  m.impl("deform_conv2d_backward", TORCH_BOX(&mmdcn::cuda::deform_conv2d_backward));
  m.impl("deform_conv_nd", TORCH_BOX(&mmdcn::cuda::deform_conv_nd));
  m.impl("deform_conv_nd_backward", TORCH_BOX(&mmdcn::cuda::deform_conv_nd_backward));
}
