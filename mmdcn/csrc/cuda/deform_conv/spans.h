// Spans of a batch: some images at a time, and their tensors as the kernels take them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "../device.h"
#include "../views.h"

namespace mmdcn::cuda {

// How many images to work on at a time, if the copies of each take so much memory.
inline int64_t images_at_a_time(int64_t batch, int64_t bytes) {
  if (bytes == 0) return batch;
  return std::clamp<int64_t>(copy_bytes() / bytes, 1, batch);
}

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

// The same elements as the kernels take them: a copy, where they are not so already.
inline Tensor channels_last(const Tensor& any) {
  return aligned(as_contiguous(channels_last_view(any)), alignment_for(any));
}

// Some images of a batch, by their numbers.
struct Images {
  int64_t first, count;

  Tensor of(Tensor tensor) const { return torch::stable::narrow(tensor, 0, first, count); }
  std::optional<Tensor> of(const std::optional<Tensor>& tensor) const {
    if (!tensor.has_value()) return std::nullopt;
    return of(*tensor);
  }
};

template <typename Run>
void for_each_span(int64_t batch, int64_t images, const Run& run) {
  for (int64_t first = 0; first < batch; first += images) {
    run(Images{first, std::min(images, batch - first)});
  }
}

// Bytes of one image in a tensor that must be copied for the kernels.
inline int64_t copied_bytes(const Tensor& tensor, bool is_taken_as_it_is) {
  return is_taken_as_it_is ? 0 : tensor.numel() / tensor.size(0) * tensor.element_size();
}

// The same of offsets and masks, which the kernels take as planes.
inline int64_t copied_bytes(const Tensor& offset, const std::optional<Tensor>& mask) {
  const int64_t of_mask = mask.has_value() ? copied_bytes(*mask, mask->is_contiguous()) : 0;
  return copied_bytes(offset, offset.is_contiguous()) + of_mask;
}

// The gradients of some images' offsets or masks, which the kernels write as planes.
class PlanesOfSpan {
  std::optional<Tensor> result_, planes_;

 public:
  PlanesOfSpan(const Tensor& gradient, const Images& span) {
    if (gradient.numel() == 0) return;
    result_ = span.of(gradient);
    planes_ = result_->is_contiguous()
                  ? *result_
                  : new_tensor(*result_, sizes_of(*result_), result_->scalar_type());
  }

  // Null where they are not wanted.
  void* pointer() const { return planes_.has_value() ? planes_->mutable_data_ptr() : nullptr; }

  void finish() {
    if (planes_.has_value() && planes_->mutable_data_ptr() != result_->mutable_data_ptr()) {
      torch::stable::copy_(*result_, *planes_);
    }
  }
};

}  // namespace mmdcn::cuda
