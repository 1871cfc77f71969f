// Views of tensors, and calls of torch's operators on them, through the dispatcher.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "../tensors.h"

namespace mmdcn::cuda {
namespace {

// The same memory with other sizes and strides, from element number `first` of the tensor on.
inline Tensor view(const Tensor& tensor, const std::vector<int64_t>& size,
                   const std::vector<int64_t>& stride, int64_t first = 0) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      tensor.get(), size.size(), size.data(), stride.data(), first, &handle));
  return Tensor(handle);
}

// Calls one of torch's operators. The stack holds its arguments, and afterwards its results.
template <size_t N>
void call_on(std::array<StableIValue, N>& stack, const char* name, const char* overload = "") {
  if (torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION) == 0) return;
  throw std::runtime_error(std::string("mmdcn: torch's ") + name +
                           " failed: " + cause_of_failure("torch >= 2.13 says why"));
}

// Calls an operator with these arguments, whose result is a tensor that one of them is.
template <typename... Arguments>
void call(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  call_on(stack, name, overload);
  torch::stable::detail::to<Tensor>(stack[0]);  // owns the result, and lets go of it
}

}  // namespace
}  // namespace mmdcn::cuda
