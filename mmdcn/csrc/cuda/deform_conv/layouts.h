// Layouts of tensors (N, C, ...): channels last, as the kernels take features, and planes of
// channels, as they take offsets and masks; and copies of one as the other.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../device.h"
#include "../views.h"
#include "kernels.h"

namespace mmdcn::cuda {

// The dimensions of a tensor (N, C, ...) as (N, ..., C), of the same memory.
inline Tensor channels_last_view(const Tensor& tensor) {
  const int64_t dimensions = tensor.dim();
  std::vector<int64_t> size, stride;
  for (int64_t d = 0; d < dimensions; ++d) {
    const int64_t from = d == 0 ? 0 : d == dimensions - 1 ? 1 : d + 1;
    size.push_back(tensor.size(from));
    stride.push_back(tensor.stride(from));
  }
  return view(tensor, size, stride);
}

// The bytes that the address of a tensor (N, C, ...) must be a multiple of where channels are last:
// those of the widest vector that the channels of a pixel divide into, as the kernels load none
// that do not. So if the first image is aligned, all are.
inline int64_t alignment_for(const Tensor& tensor) {
  const int64_t pixel = tensor.size(1) * tensor.element_size();
  return std::min(pixel & -pixel, INT64_C(16));
}

// Whether the kernels can take a tensor as it is: its channels are last, and its address is one
// that they can load vectors from.
inline bool is_usable(const Tensor& tensor) {
  return is_aligned(tensor, alignment_for(tensor)) && channels_last_view(tensor).is_contiguous();
}

// Whether our kernel is the one to transpose matrices. Of narrow ones it would leave most of each
// tile empty, and torch copies these.
inline bool transposes(int64_t rows, int64_t columns) {
  constexpr int64_t kLeast = 16;
  return std::min(rows, columns) >= kLeast;
}

inline int64_t pixels_of(const Tensor& tensor) {
  return tensor.numel() / (tensor.size(0) * tensor.size(1));
}

// Writes the matrices of `from`, one for each of its first dimension, to `to`, transposed. `from`
// is of the same type, or of that of offsets.
inline void transpose(const Tensor& from, int64_t rows, int64_t columns, const Tensor& to,
                      const Stream& stream) {
  transpose(precision_of("transpose", to), {from.size(0), rows, columns},
            from.scalar_type() != to.scalar_type(), from.const_data_ptr(), to.mutable_data_ptr(),
            stream);
}

// The same elements as the kernels take features: a copy, where they are not so already.
inline Tensor channels_last(const Tensor& any, const Stream& stream) {
  const Tensor last = channels_last_view(any);
  const bool by_torch = last.is_contiguous() || !any.is_contiguous();
  if (by_torch || !transposes(any.size(1), pixels_of(any))) {
    return aligned(as_contiguous(last), alignment_for(any));
  }
  const Tensor result = new_tensor(any, sizes_of(last), any.scalar_type());
  transpose(any, any.size(1), pixels_of(any), result, stream);
  return result;
}

// Whether the kernels can take offsets or masks as they are: each image's are contiguous planes,
// as those that a branch predicts together are, where the images do not follow each other.
inline bool are_planes(const Tensor& any) {
  int64_t expected = 1;
  for (int64_t d = any.dim() - 1; d > 0; --d) {
    if (any.size(d) != 1 && any.stride(d) != expected) return false;
    expected *= any.size(d);
  }
  return true;
}

// The same elements as the kernels take offsets and masks.
inline Tensor as_planes(const Tensor& any, const Stream& stream) {
  if (are_planes(any)) return any;
  const bool by_torch = !channels_last_view(any).is_contiguous();
  if (by_torch || !transposes(any.size(1), pixels_of(any))) return as_contiguous(any);
  const Tensor result = new_tensor(any, sizes_of(any), any.scalar_type());
  transpose(any, pixels_of(any), any.size(1), result, stream);
  return result;
}
inline std::optional<Tensor> as_planes(const std::optional<Tensor>& any, const Stream& stream) {
  if (!any.has_value()) return std::nullopt;
  return as_planes(*any, stream);
}

// Copies planes, (N, C, ...) and contiguous, to a tensor of their type and of any layout.
inline void copy_planes(const Tensor& planes, Tensor& any, const Stream& stream) {
  const bool by_torch = !channels_last_view(any).is_contiguous();
  if (by_torch || !transposes(any.size(1), pixels_of(any))) {
    torch::stable::copy_(any, planes);
    return;
  }
  transpose(planes, any.size(1), pixels_of(any), any, stream);
}

// Copies features, (N, ..., C) and contiguous, of the type of `any` or of that of its offsets, to
// `any`, (N, C, ...) and of any layout.
inline void copy_features(const Tensor& features, const Tensor& any, const Stream& stream) {
  if (!any.is_contiguous() || !transposes(any.size(1), pixels_of(any))) {
    Tensor last = channels_last_view(any);
    torch::stable::copy_(last, features);
    return;
  }
  transpose(features, pixels_of(any), any.size(1), any, stream);
}

}  // namespace mmdcn::cuda
