// Scratch memory of the CPU operators: buffers, and the arenas that kernels take their arrays from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

#if defined(MMDCN_SANITIZED) && defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define MMDCN_BETWEEN_ARRAYS 64
#else
#define MMDCN_BETWEEN_ARRAYS 0
#endif

namespace mmdcn {

// Allocates `bytes` bytes that begin on a cache line, or throws when there is no memory. From the
// size of a huge page on, the memory is put into huge pages where the system has them: packed
// weights are read from end to end for every tile, which would miss in the TLB all the time.
void* allocate(int64_t bytes);

namespace {

// An array of `count` elements, not initialised, which is freed with the buffer.
template <typename A>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<A*>(allocate(count * static_cast<int64_t>(sizeof(A))))) {}
  A* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(A* pointer) const { std::free(pointer); }
  };
  std::unique_ptr<A, Free> data_;
};

// Hands out one block of memory array by array, each array on a cache line of its own. Whoever
// takes arrays in a constructor finds out how many bytes it needs by being constructed on an arena
// without memory, which counts what is taken and hands out null pointers. Under AddressSanitizer,
// what lies between two arrays, a line more than otherwise, may not be touched.
class Arena {
 public:
  explicit Arena(std::byte* memory) : memory_(memory) {}

  template <typename E>
  E* take(int64_t count) {
    const int64_t offset = used_;
    used_ += (count * static_cast<int64_t>(sizeof(E)) + 63) / 64 * 64 + MMDCN_BETWEEN_ARRAYS;
#if MMDCN_BETWEEN_ARRAYS
    if (memory_ != nullptr) {
      ASAN_UNPOISON_MEMORY_REGION(memory_ + offset, used_ - offset);
      ASAN_POISON_MEMORY_REGION(memory_ + used_ - MMDCN_BETWEEN_ARRAYS, MMDCN_BETWEEN_ARRAYS);
    }
#endif
    return memory_ == nullptr ? nullptr : reinterpret_cast<E*>(memory_ + offset);
  }
  // Bytes that have been taken.
  int64_t used() const { return used_; }

 private:
  std::byte* memory_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace mmdcn
