// The launches of deformable convolution's CUDA kernels. No PyTorch and no CUDA header.
#pragma once

#include <cstdint>

#include "../transpose.h"
#include "problem.h"

namespace mmdcn::cuda {

// Bytes of columns to work on at a time: twice what the device's second-level cache holds, within
// bounds. Larger chunks need fewer launches and more memory.
int64_t chunk_bytes(int device);

// Memory that a call may take for copies and sums of its images, in bytes, unless one image takes
// more: it works on as many images at a time as fit.
int64_t copy_bytes();

// Where the gradient of the input is added up; with neither `sum` nor `fixed`, it is not.
struct GradInput {
  void* sum = nullptr;            // float or double, added to in no fixed order
  int64_t* fixed = nullptr;       // added to in fixed point: the same, to the bit, in any order
  int32_t* magnitudes = nullptr;  // kMagnitudes, which the unit of `fixed` follows from
};

constexpr int kNotFiniteSeen = 3;  // which of them says that some addition was not finite
constexpr int kMagnitudes = 4;

// All pointers are to memory of the stream's device. Input, columns and their gradients are as
// ConvProblem says, and begin at multiples of 16 bytes; offset and mask and their gradients are
// contiguous. The batch is that of the tensors given. No tensor may be empty, except an input
// without pixels in gather(). Nothing waits for the device. A launch that CUDA refuses throws
// std::runtime_error.

// `columns`, every element written once: in the input's type or, where `wide`, in that of offsets.
template <int R>
void gather(Precision precision, const ConvProblem<R>& problem, const PixelRange& range,
            const void* input, const void* offset, const void* mask, void* columns, bool wide,
            const Stream& stream);

// Adds to `grad_input`, and writes `grad_offset` and `grad_mask`, each element once and in a fixed
// order of summation; these may be null.
template <int R>
void scatter(Precision precision, const ConvProblem<R>& problem, const PixelRange& range,
             const void* grad_columns, const void* input, const void* offset, const void* mask,
             const GradInput& grad_input, void* grad_offset, void* grad_mask, const Stream& stream);

// Finds the magnitudes for sums in fixed point; these must be zeros before.
template <int R>
void find_magnitudes(Precision precision, const ConvProblem<R>& problem, const void* grad_output,
                     const void* weight, const void* mask, int32_t* magnitudes,
                     const Stream& stream);

// sum = what the fixed-point sums of grad_input stand for.
template <int R>
void from_fixed(Precision precision, const ConvProblem<R>& problem, const GradInput& grad_input,
                void* sum, const Stream& stream);

// sum += values, of so many elements of the type of offsets.
void accumulate(Precision precision, int64_t elements, const void* values, void* sum,
                const Stream& stream);

// Matrices of elements of the precision's type, transposed to others of it. Where `from_sums`, what
// is transposed is in the type of offsets.
void transpose(Precision precision, const Transposition& sizes, bool from_sums, const void* from,
               void* to, const Stream& stream);

// output[i][channel][j] += bias[channel], `inner` being the number of j, in the input's type.
void add_bias(Precision precision, int64_t elements, int64_t channels, int64_t inner,
              const void* bias, void* output, const Stream& stream);

}  // namespace mmdcn::cuda
