// The matrix products of deformable convolution, which torch computes.
//
// Each product can be computed by more than one of torch's operators. Which of them is right on a
// device, with the libraries that it has, is found out at the first call there
// (mmdcn/ops/_products.py lists them, best first, with the reasons); until then, and where all
// others fail, it is kMatmul, which works wherever torch does. So it is, too, from the first
// tensors on that torch refuses what was chosen for.
#pragma once

#include <optional>

#include "../types.h"
#include "../views.h"

namespace mmdcn::cuda {

enum class Product { kOutput, kGradColumns, kGradWeight };
constexpr int kProducts = 3;

enum class Arithmetic {
  kFloat64,
  kFloat32,
  kTF32,
  kFloat16,
  kBFloat16,
  kFloat32BesideTF32,  // exact, while torch's products of matrices are in TF32
};
constexpr int kArithmetics = 6;

enum class Call {
  kMatmul,         // aten::bmm.out
  kMatmulToFloat,  // aten::bmm.dtype_out: float32 from half types
  kCudnn,          // aten::cudnn_convolution.out with a kernel of one pixel
  kConvolution,    // aten::convolution_backward with a kernel of one pixel
};
constexpr int kCalls = 4;

// The sizes of the matrices. Columns are (pixels, groups, columns), weights (groups, out_channels,
// columns), outputs (pixels, groups, out_channels).
struct ProductShape {
  int64_t groups, out_channels, columns;
  int64_t pixels;  // of an image

  int64_t row() const { return groups * columns; }
  int64_t all_out_channels() const { return groups * out_channels; }
};

// How the products of one call of an operator are computed on a device.
struct ProductCalls {
  struct Choice {
    Call call;
    bool may_be_replaced;  // by kMatmul, if torch refuses the call
  };
  Choice choices[kProducts];
  bool tf32, deterministic;
  Precision precision;
  Stream stream;
  Arithmetic arithmetic;

  const Choice& of(Product product) const { return choices[static_cast<int>(product)]; }

  // As torch's settings say now. `tf32`, `matmul_tf32` and `deterministic` are what the caller
  // wants whatever they say: to multiply float32 in TF32, in convolutions and in products of
  // matrices, and to add in a fixed order. Without cuDNN, all products are products of matrices.
  ProductCalls(Precision precision, bool tf32, bool matmul_tf32, bool deterministic,
               const Stream& stream);

  // Whether the gradient of the weight takes columns in the type of offsets.
  bool wide_columns() const {
    const bool half = precision == Precision::kFloat16 || precision == Precision::kBFloat16;
    return half && of(Product::kGradWeight).call == Call::kMatmul;
  }
};

// output = columns * weight, for `pixels` pixels of each of `images` images. `output` is a batch of
// images, channels last or contiguous, whose memory is written from pixel number `pixel` on.
void multiply_output(const ProductCalls& calls, const ProductShape& shape, const Tensor& columns,
                     int64_t images, int64_t pixels, const Tensor& weight, const Tensor& output,
                     bool channels_last, int64_t pixel);

// grad_columns = grad_output * weight, for `pixels` pixels. `grad_output` is channels last, and is
// read from pixel number `pixel` on. `transposed` is the weight as another call has left it.
void multiply_grad_columns(const ProductCalls& calls, const ProductShape& shape,
                           const Tensor& grad_output, int64_t pixel, int64_t pixels,
                           const Tensor& weight, std::optional<Tensor>& transposed,
                           const Tensor& grad_columns);

// grad_weight = columns * grad_output, which is channels last, and is read from pixel number
// `pixel` on. The result is in the type of offsets; where wide_columns(), the columns are, too.
void multiply_grad_weight(const ProductCalls& calls, const ProductShape& shape,
                          const Tensor& columns, const Tensor& grad_output, int64_t pixel,
                          int64_t pixels, const Tensor& grad_weight);

}  // namespace mmdcn::cuda
