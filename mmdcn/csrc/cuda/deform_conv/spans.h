// Spans of a batch: some images at a time, and their tensors as the kernels take them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "layouts.h"

namespace mmdcn::cuda {

// How many images to work on at a time, if the copies of each take so much memory.
inline int64_t images_at_a_time(int64_t batch, int64_t bytes) {
  if (bytes == 0) return batch;
  return std::clamp<int64_t>(copy_bytes() / bytes, 1, batch);
}

// Some images of a batch, by their numbers.
struct Images {
  int64_t first, count;

  Tensor of(Tensor tensor) const {
    if (count == tensor.size(0)) return tensor;
    return torch::stable::narrow(tensor, 0, first, count);
  }
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
  const int64_t of_mask = mask.has_value() ? copied_bytes(*mask, are_planes(*mask)) : 0;
  return copied_bytes(offset, are_planes(offset)) + of_mask;
}

// The gradients of some images' offsets or masks, which the kernels write as planes.
class PlanesOfSpan {
  const Stream& stream_;
  std::optional<Tensor> result_, planes_;

 public:
  PlanesOfSpan(const Tensor& gradient, const Images& span, const Stream& stream) : stream_(stream) {
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
      copy_planes(*planes_, *result_, stream_);
    }
  }
};

}  // namespace mmdcn::cuda
