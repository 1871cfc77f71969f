// Ground of the CPU's registration files: the size of a thread's share, and the choice of a kernel
// by instruction set and element type.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../tensors.h"
#include "arena.h"
#include "capability.h"
#include "simd.h"

namespace mmdcn {
namespace {

// Less than so many multiply-adds are not worth waking a thread for. An element that is sampled,
// packed or added up takes about as long as some of them.
constexpr int64_t kWorthAThread = 1 << 20;
constexpr int64_t kElementWork = 16;

// How many of the tasks that so many multiply-adds fall into a thread should get at least.
inline int64_t grain(int64_t tasks, int64_t work) {
  return std::max<int64_t>(kWorthAThread * tasks / work, 1);
}

// The function of the instruction set in use that gives an operator's kernels.
#ifdef __x86_64__
#define MMDCN_CPU_KERNEL(name, ...)                                          \
  (capability() == Capability::kAvx512Bf16 ? &avx512_bf16::name<__VA_ARGS__> \
   : capability() == Capability::kAvx512   ? &avx512::name<__VA_ARGS__>      \
   : capability() == Capability::kAvx2     ? &avx2::name<__VA_ARGS__>        \
                                           : &portable::name<__VA_ARGS__>)
#else
#define MMDCN_CPU_KERNEL(name, ...) (&portable::name<__VA_ARGS__>)
#endif

// Calls `function` with a value of the type that the elements of `input` are stored in.
template <typename F>
auto with_element_type(const Tensor& input, const F& function) {
  switch (input.scalar_type()) {
    case ScalarType::Double:
      return function(double{});
    case ScalarType::Float:
      return function(float{});
    case ScalarType::Half:
      return function(Half{});
    case ScalarType::BFloat16:
      return function(BFloat16{});
    default:
      STD_TORCH_CHECK(false, "mmdcn: input must be a floating-point tensor");
  }
}

}  // namespace
}  // namespace mmdcn
