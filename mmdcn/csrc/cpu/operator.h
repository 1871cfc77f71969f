// What the CPU's registration files have in common: scratch memory, the size of a thread's share,
// and the choice of a kernel by instruction set and element type.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

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

// Memory for `bytes` bytes, from a cache line's border on; null where there is none. What is larger
// than a huge page lies in such pages, where the system has them: weights that are read from end to
// end for every tile would otherwise miss in the table of pages all along.
inline void* allocate(int64_t bytes) {
  constexpr int64_t line = 64, huge_page = 2 << 20;
  const int64_t border = bytes < huge_page ? line : huge_page;
  void* memory = std::aligned_alloc(border, (bytes + border - 1) / border * border);
#ifdef MADV_HUGEPAGE
  if (border == huge_page && memory != nullptr) {
    // Refused where the system has none: the pages are then small.
    madvise(memory, bytes, MADV_HUGEPAGE);
  }
#endif
  return memory;
}

template <typename A>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<A*>(allocate(count * static_cast<int64_t>(sizeof(A))))) {
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
