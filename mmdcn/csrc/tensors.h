// Helpers for torch's tensors on its stable ABI, for the registration files of all devices.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "sampling.h"

// The message of the error behind a call of torch's that failed. Torch has it from 2.13 on, beyond
// the stable ABI that is compiled against; under older releases the pointer is null.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace mmdcn {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Whether a 4-D tensor is dense in channels-last order and in no other. If the input is, so is the
// output.
inline bool is_channels_last(const Tensor& tensor) {
  if (tensor.is_contiguous()) return false;
  int64_t expected = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (tensor.size(d) == 1) continue;
    if (tensor.stride(d) != expected) return false;
    expected *= tensor.size(d);
  }
  return true;
}

inline MemoryFormat layout_of(const Tensor& tensor) {
  return is_channels_last(tensor) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// The type that coordinates come in beside features of the given type.
inline ScalarType coordinate_type(ScalarType features) {
  return features == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename T>
const T* const_data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  return std::vector<int64_t>(tensor.sizes().begin(), tensor.sizes().end());
}

// The message of the error behind a call of torch's that failed, or, where the torch at hand does
// not tell, what it most likely is.
inline std::string cause_of_failure(const char* most_likely) {
  if (torch_exception_get_what_without_backtrace != nullptr) {
    const char* what = torch_exception_get_what_without_backtrace();
    if (what != nullptr && *what != '\0') return what;
  }
  return most_likely;
}

// Throws an error for a call of torch's that failed on a tensor of these sizes. Torch's own check
// would name the call and its line here, which tells a user nothing.
[[noreturn]] inline void throw_failure(const char* doing, const std::vector<int64_t>& size,
                                       ScalarType type) {
  const bool half = type == ScalarType::Half || type == ScalarType::BFloat16;
  int64_t bytes = half ? 2 : type == ScalarType::Float ? 4 : 8;
  std::string shape;
  for (const int64_t length : size) {
    if (__builtin_mul_overflow(bytes, length, &bytes)) bytes = INT64_MAX;
    shape += (shape.empty() ? "" : ", ") + std::to_string(length);
  }
  throw std::runtime_error(std::string("mmdcn: failed ") + doing + " of shape (" + shape + "), " +
                           std::to_string(bytes) + " bytes: " +
                           cause_of_failure("most likely, the device is out of memory"));
}

// Returns make(), which calls operators of torch's to make a tensor of this one's sizes; if they
// fail, throws the error of throw_failure().
template <typename F>
Tensor copied(const char* doing, const Tensor& tensor, ScalarType type, const F& make) {
  try {
    return make();
  } catch (const std::exception&) {
    throw_failure(doing, sizes_of(tensor), type);
  }
}

// The functions of torch::stable look up their operator by name whether there is anything to do or
// not, which small layers would feel; the following call them only if there is.

// The tensor itself if it is contiguous, otherwise a copy that is.
inline Tensor as_contiguous(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  return copied("to make a contiguous copy of a tensor", tensor, tensor.scalar_type(),
                [&] { return torch::stable::contiguous(tensor); });
}
inline Tensor as_channels_last(const Tensor& tensor) {
  return copied("to make a channels-last copy of a tensor", tensor, tensor.scalar_type(),
                [&] { return torch::stable::contiguous(tensor, MemoryFormat::ChannelsLast); });
}
inline std::optional<Tensor> as_contiguous(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return as_contiguous(*tensor);
}

// The tensor itself if it has this type, otherwise a copy that has.
inline Tensor converted(const Tensor& tensor, ScalarType type) {
  if (tensor.scalar_type() == type) return tensor;
  return copied("to convert a tensor", tensor, type,
                [&] { return torch::stable::to(tensor, type); });
}

// An uninitialised tensor on the device of `like`. Only 4-D tensors can be channels-last.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& size, ScalarType type,
                         MemoryFormat layout = MemoryFormat::Contiguous) {
  const int64_t dimensions = static_cast<int64_t>(size.size());
  const bool channels_last = layout == MemoryFormat::ChannelsLast;
  constexpr int64_t order[] = {0, 2, 3, 1};
  std::vector<int64_t> stride(dimensions);
  int64_t elements = 1;
  for (int64_t i = dimensions - 1; i >= 0; --i) {
    const int64_t d = channels_last ? order[i] : i;
    stride[d] = elements;
    elements *= std::max(size[d], INT64_C(1));
  }
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle tensor;
  const auto error = aoti_torch_empty_strided(
      dimensions, size.data(), stride.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device_type,
      device_index, &tensor);
  if (error != TORCH_SUCCESS) throw_failure("to allocate a tensor", size, type);
  return Tensor(tensor);
}

// The number of output positions along one dimension of an input of this size. -1 if there is none,
// or if the stride, padding or dilation, which may be any number, is not a valid one.
inline int64_t outputs(const GridAxis& axis, int64_t size, int64_t kernel) {
  constexpr int64_t most = INT64_C(1) << 31;
  if (axis.stride < 1 || axis.padding < 0 || axis.padding > most || axis.dilation < 1) return -1;
  const int64_t room = size + 2 * axis.padding - 1;
  if (room < 0 || (kernel > 1 && axis.dilation > room / (kernel - 1))) return -1;
  return (room - axis.dilation * (kernel - 1)) / axis.stride + 1;
}

// Refuses arguments that do not fit together, in a function that has the operator's name in `op`.
// These checks keep every memory access in bounds for those who call a compiled operator directly;
// the operator's function in mmdcn.ops has the errors that tell a user what must change.
#define MMDCN_REQUIRE(condition)                                       \
  STD_TORCH_CHECK(condition, "mmdcn::", op, ": expected ", #condition, \
                  ", which does not hold; the function in mmdcn.ops says what must change")

// Lengths of dimensions must be below this, as kernels count positions along one in 32 bits.
constexpr int64_t kTooLong = INT64_C(1) << 30;

// Checks the arguments that a backward operator has in addition to the forward one's: the gradient
// of an output of these sizes, and a mask that says which of `gradients` gradients are wanted.
inline void check_grad_output(const char* op, const Tensor& grad_output,
                              const std::vector<int64_t>& output_size, const Tensor& input,
                              const std::vector<bool>& output_mask, size_t gradients) {
  MMDCN_REQUIRE(sizes_of(grad_output) == output_size);
  MMDCN_REQUIRE(grad_output.scalar_type() == input.scalar_type());
  MMDCN_REQUIRE(grad_output.device() == input.device());
  MMDCN_REQUIRE(output_mask.size() == gradients);
}

}  // namespace mmdcn
