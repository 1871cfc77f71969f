// Helpers of the CUDA registration files: optional tensors, precision, device and stream.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <optional>

#include "../tensors.h"
#include "types.h"

namespace mmdcn::cuda {
namespace {

inline const void* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

// Whether the kernels can load vectors of so many bytes from a tensor's address: 16 are the most.
inline bool is_aligned(const Tensor& tensor, int64_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0;
}

// The tensor itself if it is so, or else a copy.
inline Tensor aligned(const Tensor& tensor, int64_t bytes = 16) {
  if (is_aligned(tensor, bytes)) return tensor;
  return copied("to make an aligned copy of a tensor", tensor, tensor.scalar_type(),
                [&] { return torch::stable::clone(tensor); });
}

inline Precision precision_of(const char* name, const Tensor& input) {
  switch (input.scalar_type()) {
    case ScalarType::Double:
      return Precision::kFloat64;
    case ScalarType::Float:
      return Precision::kFloat32;
    case ScalarType::Half:
      return Precision::kFloat16;
    case ScalarType::BFloat16:
      return Precision::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "mmdcn::", name, ": input must be a floating-point tensor");
  }
}

// Makes the device of a tensor the current one for its lifetime.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}

  Stream current_stream() const {
    void* handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &handle));
    return {index_, handle};
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace
}  // namespace mmdcn::cuda
