// What the CPU's registration files have in common: scratch memory, the size of a thread's share,
// and the choice of a kernel by instruction set and element type.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "../tensors.h"
#include "capability.h"
#include "simd.h"

namespace mmdcn {
namespace {

// Less than so many multiply-adds are not worth waking a thread for. An element that is sampled,
// packed or added up takes about as long as some of them.
constexpr int64_t kWorthAThread = 1 << 20;
constexpr int64_t kElementWork = 16;

// How many of the units that so many multiply-adds fall into a thread should get at least.
inline int64_t grain(int64_t units, int64_t work) {
  return std::max<int64_t>(kWorthAThread * units / work, 1);
}

// The kernels of the instruction set in use.
#ifdef __x86_64__
#define MMDCN_KERNEL(name, ...)                                               \
  (capability() == Capability::kAvx512Bf16 ? avx512_bf16::name<__VA_ARGS__>() \
   : capability() == Capability::kAvx512   ? avx512::name<__VA_ARGS__>()      \
   : capability() == Capability::kAvx2     ? avx2::name<__VA_ARGS__>()        \
                                           : portable::name<__VA_ARGS__>())
#else
#define MMDCN_KERNEL(name, ...) portable::name<__VA_ARGS__>()
#endif

template <typename A>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<A*>(std::aligned_alloc(64, (count * sizeof(A) + 63) / 64 * 64))) {
    STD_TORCH_CHECK(data_ != nullptr || count == 0, "mmdcn: out of memory for ", count,
                    " elements of scratch space");
  }
  A* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(A* pointer) const { std::free(pointer); }
  };
  std::unique_ptr<A, Free> data_;
};

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
