// The matrix products of deformable convolution, by calls of torch's operators.
#include "product.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <exception>
#include <string>

#include "../../integers.h"
#include "layouts.h"

namespace mmdcn::cuda {
namespace {

constexpr int kMostDevices = 64;

// The calls in force, kMatmul being number 0; kReplaceable is added where they may be replaced. The
// first device is the CPU, which has number -1 and is where the tests run.
std::atomic<int> chosen[1 + kMostDevices][kProducts][kArithmetics];
constexpr int kReplaceable = kCalls;

const char* const kProductNames[kProducts] = {"output", "grad_columns", "grad_weight"};
const char* const kArithmeticNames[kArithmetics] = {"float64", "float32",  "tf32",
                                                    "float16", "bfloat16", "float32_beside_tf32"};
const char* const kCallNames[kCalls] = {"matmul", "matmul_to_float", "cudnn", "convolution"};

template <int N>
int number_of(const char* argument, const std::string& name, const char* const (&names)[N]) {
  for (int i = 0; i < N; ++i) {
    if (name == names[i]) return i;
  }
  STD_TORCH_CHECK(false, "mmdcn::set_cuda_product: ", argument, ": unknown: ", name);
}

std::atomic<int>& choice(int64_t device, int product, int arithmetic) {
  STD_TORCH_CHECK(device >= -1 && device < kMostDevices, "mmdcn: no device has number ", device);
  return chosen[1 + device][product][arithmetic];
}

void set_cuda_product(int64_t device, std::string product, std::string arithmetic, std::string call,
                      bool may_be_replaced) {
  choice(device, number_of("product", product, kProductNames),
         number_of("arithmetic", arithmetic, kArithmeticNames)) =
      number_of("call", call, kCallNames) + (may_be_replaced ? kReplaceable : 0);
}

std::string cuda_product(int64_t device, std::string product, std::string arithmetic) {
  return kCallNames[choice(device, number_of("product", product, kProductNames),
                           number_of("arithmetic", arithmetic, kArithmeticNames)) %
                    kReplaceable];
}

// What torch's settings say: see library.cpp.
struct Settings {
  bool tf32 = false, matmul_tf32 = false, cudnn = true, deterministic = false;
};

Settings settings_now() {
  // In a process without Python, as of a model that AOTInductor compiled, nothing tells, and asking
  // in vain takes long.
  static std::atomic<bool> told{false}, in_vain{false};
  if (in_vain) return {};
  std::array<StableIValue, 4> said{};
  if (torch_call_dispatcher("mmdcn::cuda_settings", "", said.data(), TORCH_ABI_VERSION) != 0) {
    in_vain = !told;
    return {};
  }
  told = true;
  using torch::stable::detail::to;
  return {to<bool>(said[0]), to<bool>(said[1]), to<bool>(said[2]), to<bool>(said[3])};
}

Arithmetic arithmetic_of(Precision precision, bool tf32, bool matmul_tf32) {
  switch (precision) {
    case Precision::kFloat64:
      return Arithmetic::kFloat64;
    case Precision::kFloat32:
      if (tf32) return Arithmetic::kTF32;
      return matmul_tf32 ? Arithmetic::kFloat32BesideTF32 : Arithmetic::kFloat32;
    case Precision::kFloat16:
      return Arithmetic::kFloat16;
    default:
      return Arithmetic::kBFloat16;
  }
}

// Matrices in a tensor's memory, from element number `first` on.
struct Matrices {
  int64_t count, rows, columns;
  int64_t strides[3];  // from one to the next, from row to row, from column to column

  Tensor in(const Tensor& tensor, int64_t first = 0) const {
    return view(tensor, {count, rows, columns}, {strides[0], strides[1], strides[2]}, first);
  }
  Matrices transposed() const {
    return {count, columns, rows, {strides[0], strides[2], strides[1]}};
  }
};

Matrices columns_of(const ProductShape& shape, int64_t pixels) {
  return {shape.groups, pixels, shape.columns, {shape.columns, shape.row(), 1}};
}
Matrices weights_of(const ProductShape& shape) {
  return {shape.groups,
          shape.out_channels,
          shape.columns,
          {shape.out_channels * shape.columns, shape.columns, 1}};
}
Matrices outputs_of(const ProductShape& shape, int64_t pixels) {
  return {
      shape.groups, pixels, shape.out_channels, {shape.out_channels, shape.all_out_channels(), 1}};
}

void matmul(const Tensor& left, const Tensor& right, const Tensor& result) {
  call("aten::bmm", "out", left, right, result);
}

// Puts matmul into force for a product, and has it said.
void replace(const ProductCalls& calls, Product product, const std::string& why) {
  using torch::stable::detail::from;
  const int number = static_cast<int>(product), arithmetic = static_cast<int>(calls.arithmetic);
  const int by_matmul = static_cast<int>(Call::kMatmul);
  if (choice(calls.stream.device, number, arithmetic).exchange(by_matmul) == by_matmul) return;
  std::array<StableIValue, 5> stack{
      from(int64_t{calls.stream.device}), from(std::string(kProductNames[number])),
      from(std::string(kArithmeticNames[arithmetic])),
      from(std::string(kCallNames[static_cast<int>(calls.of(product).call)])), from(why)};
  // A process without Python has nobody to say it.
  torch_call_dispatcher("mmdcn::cuda_product_replaced", "", stack.data(), TORCH_ABI_VERSION);
}

// Computes a product as was chosen: by matmul, or by another call. The tensors that this was tried
// with say little of all others, so that torch may refuse it now, which is an error unless it may
// be replaced: then matmul computes the product, and is in force from then on.
template <typename ByOther, typename ByMatmul>
void compute(const ProductCalls& calls, Product product, const ByOther& by_other,
             const ByMatmul& by_matmul) {
  const ProductCalls::Choice& chosen = calls.of(product);
  if (chosen.call == Call::kMatmul) return by_matmul();
  std::string why;
  try {
    return by_other();
  } catch (const std::exception& error) {
    if (!chosen.may_be_replaced) throw;
    why = error.what();
  }
  by_matmul();
  replace(calls, product, why);
}

// Pixels of `channels` channels each, as one image of width 1, channels last.
Tensor as_image(const Tensor& tensor, int64_t channels, int64_t pixels, int64_t first = 0) {
  return view(tensor, {1, channels, pixels, 1}, {pixels * channels, 1, channels, channels}, first);
}

// A weight of (rows, columns) as a convolution's with a kernel of one pixel.
Tensor as_kernel(const Tensor& weight, int64_t rows, int64_t columns) {
  return view(weight, {rows, columns, 1, 1}, {columns, 1, columns, columns});
}

void convolve(const ProductCalls& calls, int64_t groups, const Tensor& image, const Tensor& kernel,
              const Tensor& result) {
  const std::vector<int64_t> zeros = {0, 0}, ones = {1, 1};
  const bool benchmark = false;
  call("aten::cudnn_convolution", "out", image, kernel, zeros, ones, ones, groups, benchmark,
       calls.deterministic, calls.tf32, result);
}

// The gradient of a kernel of one pixel, in the settings that torch has for convolutions.
Tensor convolution_grad_kernel(int64_t groups, const Tensor& grad_output, const Tensor& image,
                               const Tensor& kernel) {
  using torch::stable::detail::from;
  const std::vector<int64_t> zeros = {0, 0}, ones = {1, 1};
  constexpr bool wanted[] = {false, true, false};
  const torch::headeronly::HeaderOnlyArrayRef<bool> output_mask(wanted);
  std::array<StableIValue, 11> stack{from(grad_output),  from(image),      from(kernel),
                                     from(std::nullopt), from(ones),       from(zeros),
                                     from(ones),         from(false),      from(zeros),
                                     from(groups),       from(output_mask)};
  call_on(stack, "aten::convolution_backward");
  torch::stable::detail::to<Tensor>(stack[0]);
  torch::stable::detail::to<Tensor>(stack[2]);
  return torch::stable::detail::to<Tensor>(stack[1]);
}

// The weights, (groups, out_channels, columns), as (groups, columns, out_channels).
Tensor transposed_weight(const ProductCalls& calls, const ProductShape& shape,
                         const Tensor& weight) {
  if (!transposes(shape.out_channels, shape.columns)) {
    return as_contiguous(weights_of(shape).transposed().in(weight));
  }
  const Tensor result =
      new_tensor(weight, {shape.groups, shape.columns, shape.out_channels}, weight.scalar_type());
  transpose(calls.precision, {shape.groups, shape.out_channels, shape.columns}, false,
            weight.const_data_ptr(), result.mutable_data_ptr(), calls.stream);
  return result;
}

// Where some pixels of each of some images are in an output in planes of channels, as (images,
// pixels, channels).
Tensor in_planes(const ProductShape& shape, int64_t images, int64_t pixels, const Tensor& output,
                 int64_t pixel) {
  const int64_t channels = shape.all_out_channels(), image = divide(pixel, shape.pixels);
  return view(output, {images, pixels, channels}, {channels * shape.pixels, 1, shape.pixels},
              pixel + image * (channels - 1) * shape.pixels);
}

// The product by `multiply(result)`, which writes channels last, and then a transposition.
template <typename Multiply>
void transposed_product(const ProductCalls& calls, const ProductShape& shape, const Tensor& columns,
                        const Tensor& planes, const Multiply& multiply) {
  const int64_t images = planes.size(0), pixels = planes.size(1), channels = planes.size(2);
  const Tensor result = new_tensor(columns, {images, pixels, channels}, columns.scalar_type());
  multiply(result);
  if (!transposes(pixels, channels)) {
    Tensor target = planes;
    torch::stable::copy_(target, result);
    return;
  }
  transpose(calls.precision, {images, pixels, channels, shape.pixels, channels * shape.pixels},
            false, result.const_data_ptr(), planes.mutable_data_ptr(), calls.stream);
}

void matmul_output(const ProductCalls& calls, const ProductShape& shape, const Tensor& columns,
                   int64_t images, int64_t pixels, const Tensor& weight, const Tensor& output,
                   bool channels_last, int64_t pixel) {
  const int64_t channels = shape.all_out_channels();
  const Matrices weights = weights_of(shape), outputs = outputs_of(shape, images * pixels);
  const auto multiply = [&](const Tensor& result, int64_t first = 0) {
    matmul(columns_of(shape, images * pixels).in(columns), weights.transposed().in(weight),
           outputs.in(result, first));
  };
  if (channels_last) return multiply(output, pixel * channels);
  const Tensor planes = in_planes(shape, images, pixels, output, pixel);
  // In planes that start at addresses of any kind, the product takes longer than it does with a
  // transposition after it.
  const bool at_vectors = is_aligned(planes) && shape.pixels * output.element_size() % 16 == 0;
  if (shape.groups > 1 || !at_vectors) {
    return transposed_product(calls, shape, columns, planes, multiply);
  }
  const Matrices each = {images, shape.columns, pixels, {pixels * shape.row(), 1, shape.row()}};
  const Matrices shared = {images, channels, shape.columns, {0, shape.columns, 1}};
  const Matrices result = {images, channels, pixels, {channels * shape.pixels, shape.pixels, 1}};
  matmul(shared.in(weight), each.in(columns), result.in(planes));
}

void cudnn_output(const ProductCalls& calls, const ProductShape& shape, const Tensor& columns,
                  int64_t images, int64_t pixels, const Tensor& weight, const Tensor& output,
                  bool channels_last, int64_t pixel) {
  const int64_t channels = shape.all_out_channels();
  const auto multiply = [&](const Tensor& result, int64_t first = 0) {
    convolve(calls, shape.groups, as_image(columns, shape.row(), images * pixels),
             as_kernel(weight, channels, shape.columns),
             as_image(result, channels, images * pixels, first));
  };
  if (channels_last) return multiply(output, pixel * channels);
  transposed_product(calls, shape, columns, in_planes(shape, images, pixels, output, pixel),
                     multiply);
}

}  // namespace

ProductCalls::ProductCalls(Precision precision, bool tf32, bool matmul_tf32, bool deterministic,
                           const Stream& stream)
    : precision(precision), stream(stream) {
  const Settings settings = precision == Precision::kFloat64 ? Settings{} : settings_now();
  this->tf32 = tf32 || settings.tf32;
  this->deterministic = deterministic || settings.deterministic;
  arithmetic = arithmetic_of(precision, this->tf32, matmul_tf32 || settings.matmul_tf32);
  for (int product = 0; product < kProducts; ++product) {
    const int number = choice(stream.device, product, static_cast<int>(arithmetic));
    const auto call = static_cast<Call>(number % kReplaceable);
    const bool by_cudnn = call == Call::kCudnn || call == Call::kConvolution;
    choices[product] = {by_cudnn && !settings.cudnn ? Call::kMatmul : call, number >= kReplaceable};
  }
}

void multiply_output(const ProductCalls& calls, const ProductShape& shape, const Tensor& columns,
                     int64_t images, int64_t pixels, const Tensor& weight, const Tensor& output,
                     bool channels_last, int64_t pixel) {
  compute(
      calls, Product::kOutput,
      [&] {
        cudnn_output(calls, shape, columns, images, pixels, weight, output, channels_last, pixel);
      },
      [&] {
        matmul_output(calls, shape, columns, images, pixels, weight, output, channels_last, pixel);
      });
}

void multiply_grad_columns(const ProductCalls& calls, const ProductShape& shape,
                           const Tensor& grad_output, int64_t pixel, int64_t pixels,
                           const Tensor& weight, std::optional<Tensor>& transposed,
                           const Tensor& grad_columns) {
  const int64_t channels = shape.all_out_channels(), first = pixel * channels;
  compute(
      calls, Product::kGradColumns,
      [&] {
        if (!transposed.has_value()) transposed = transposed_weight(calls, shape, weight);
        convolve(calls, shape.groups, as_image(grad_output, channels, pixels, first),
                 as_kernel(*transposed, shape.row(), shape.out_channels),
                 as_image(grad_columns, shape.row(), pixels));
      },
      [&] {
        matmul(outputs_of(shape, pixels).in(grad_output, first), weights_of(shape).in(weight),
               columns_of(shape, pixels).in(grad_columns));
      });
}

void multiply_grad_weight(const ProductCalls& calls, const ProductShape& shape,
                          const Tensor& columns, const Tensor& grad_output, int64_t pixel,
                          int64_t pixels, const Tensor& grad_weight) {
  const int64_t channels = shape.all_out_channels(), first = pixel * channels;
  const Tensor left = outputs_of(shape, pixels).transposed().in(grad_output, first);
  const Tensor right = columns_of(shape, pixels).in(columns);
  const Tensor result = weights_of(shape).in(grad_weight);
  compute(
      calls, Product::kGradWeight,
      [&] {
        if (calls.of(Product::kGradWeight).call == Call::kMatmulToFloat) {
          return call("aten::bmm", "dtype_out", left, right, ScalarType::Float, result);
        }
        const Tensor kernel = as_kernel(grad_weight, channels, shape.columns);
        Tensor target = kernel;
        const Tensor gradient = convolution_grad_kernel(
            shape.groups, as_image(grad_output, channels, pixels, first),
            as_image(columns, shape.row(), pixels), converted(kernel, columns.scalar_type()));
        torch::stable::copy_(target, gradient);
      },
      [&] {
        const ScalarType type = grad_weight.scalar_type();
        matmul(converted(left, type), converted(right, type), result);
      });
}

}  // namespace mmdcn::cuda

STABLE_TORCH_LIBRARY_IMPL(mmdcn, CompositeExplicitAutograd, m) {
  m.impl("set_cuda_product", TORCH_BOX(&mmdcn::cuda::set_cuda_product));
  m.impl("cuda_product", TORCH_BOX(&mmdcn::cuda::cuda_product));
}
