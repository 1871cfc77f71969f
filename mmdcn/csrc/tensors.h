// What the registration files of all devices do with torch's tensors, on its stable ABI.
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

// What torch 2.13 and newer have: the message of the error behind a call of theirs that failed.
// Null under older releases, as it is not part of the stable ABI that we compile against.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace mmdcn {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Whether a 4-D tensor is dense in channels-last order and in no other: what channels-last out
// follows from.
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

// Throws the error of a call of torch's that failed, made for a tensor of these sizes. What torch's
// own check says is the call and its line here, which tells a user nothing.
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

// What `make` gives, a tensor like the given one; it calls operators of torch's.
template <typename F>
Tensor copied(const char* doing, const Tensor& tensor, ScalarType type, const F& make) {
  try {
    return make();
  } catch (const std::exception&) {
    throw_failure(doing, sizes_of(tensor), type);
  }
}

// What torch::stable has for these looks for its operator by name, whether there is anything to do
// or not: small layers wait for that.

// The tensor itself if it is contiguous, or else a copy that is.
inline Tensor as_contiguous(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  return copied("to make a contiguous copy of a tensor", tensor, tensor.scalar_type(),
                [&] { return torch::stable::contiguous(tensor); });
}
inline std::optional<Tensor> as_contiguous(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return as_contiguous(*tensor);
}

// The tensor itself if it has this type, or else a copy that has.
inline Tensor converted(const Tensor& tensor, ScalarType type) {
  if (tensor.scalar_type() == type) return tensor;
  return copied("to convert a tensor", tensor, type,
                [&] { return torch::stable::to(tensor, type); });
}

// A tensor with memory as it comes, on the device of `like`. Channels-last order is for images.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& size, ScalarType type,
                         MemoryFormat layout = MemoryFormat::Contiguous) {
  const int64_t dimensions = static_cast<int64_t>(size.size());
  const bool channels_last = layout == MemoryFormat::ChannelsLast;
  constexpr int64_t order[] = {0, 2, 3, 1};
  std::vector<int64_t> stride(dimensions);
  int64_t elements = 1;
  for (int64_t place = dimensions - 1; place >= 0; --place) {
    const int64_t d = channels_last ? order[place] : place;
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

// Output positions along an axis of the input of this size; -1 where there is none, or where the
// axis makes no sense. Its numbers may be anything.
inline int64_t outputs(const GridAxis& axis, int64_t size, int64_t kernel) {
  constexpr int64_t most = INT64_C(1) << 31;
  if (axis.stride < 1 || axis.padding < 0 || axis.padding > most || axis.dilation < 1) return -1;
  const int64_t room = size + 2 * axis.padding - 1;
  if (room < 0 || (kernel > 1 && axis.dilation > room / (kernel - 1))) return -1;
  return (room - axis.dilation * (kernel - 1)) / axis.stride + 1;
}

// Refuses arguments that do not fit together, in a function with the operator's name in `op`. What
// is checked keeps every memory access in bounds for those who call a compiled operator directly;
// its function in mmdcn.ops finds out what is at fault, and says what must change.
#define MMDCN_REQUIRE(condition)                                       \
  STD_TORCH_CHECK(condition, "mmdcn::", op, ": expected ", #condition, \
                  ", which does not hold; the function in mmdcn.ops says what must change")

// Lengths along one dimension are counted in 32 bits.
constexpr int64_t kTooLong = INT64_C(1) << 30;

// Checks what a backward operator is given beside the arguments of the forward one: the gradient of
// an output of these sizes, and which of so many gradients are wanted.
inline void check_grad_output(const char* op, const Tensor& grad_output,
                              const std::vector<int64_t>& output_size, const Tensor& input,
                              const std::vector<bool>& output_mask, size_t gradients) {
  MMDCN_REQUIRE(sizes_of(grad_output) == output_size);
  MMDCN_REQUIRE(grad_output.scalar_type() == input.scalar_type());
  MMDCN_REQUIRE(grad_output.device() == input.device());
  MMDCN_REQUIRE(output_mask.size() == gradients);
}

}  // namespace mmdcn
