// Scratch memory of the CPU operators: buffers, and the arenas that kernels take their arrays from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace mmdcn {

// Memory for `bytes` bytes, from a cache line's border on; an error where there is none. What is
// larger than a huge page lies in such pages, where the system has them: weights that are read from
// end to end for every tile would otherwise miss in the table of pages all along.
void* allocate(int64_t bytes);

namespace {

// Memory for so many elements, which is freed with the buffer.
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

// Memory handed out array by array, at the borders of cache lines. An arena on null only counts:
// what takes its arrays from it says so how many bytes it needs.
class Arena {
 public:
  explicit Arena(std::byte* memory) : memory_(memory) {}

  template <typename E>
  E* take(int64_t count) {
    E* array = reinterpret_cast<E*>(memory_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(E)) + 63) / 64 * 64;
    return array;
  }
  int64_t used() const { return used_; }

 private:
  std::byte* memory_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace mmdcn
