// Rows of channels in scratch memory: their stride, and functions that fill and copy them.
#pragma once

#include "simd.h"

namespace mmdcn {
namespace {

// The stride of rows in scratch memory: an odd number of cache lines, so that the rows of a
// register block do not compete for the same cache set.
template <typename E>
inline int64_t row_stride(int64_t channels) {
  const int64_t line = 64 / static_cast<int64_t>(sizeof(E));
  return ((channels + line - 1) / line | 1) * line;
}

template <typename E>
inline void fill_zero(E* target, int64_t count) {
  std::memset(target, 0, count * sizeof(E));
}

// Copies a row, and converts it; one of the two types is A, the accumulators'.
template <typename A, typename S, typename T>
inline void copy_row(const S* source, int64_t count, T* target) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) {
    store_register(target + i, load_register(source + i));
  }
  for (; i < count; ++i) store(target + i, load(source + i));
}

// Copies some elements that are few, without a call: in vectors of N elements, of which the last
// ends where the elements do, or in smaller ones.
template <typename A, int N = kLanes<A>>
inline void copy_few(const A* source, int64_t count, A* target) {
  if constexpr (N == 1) {
    if (count > 0) *target = *source;
  } else if (count < N) {
    copy_few<A, N / 2>(source, count, target);
  } else {
    const auto copy = [&](int64_t i) {
      const auto some = load_bytes<vector_t<A, N>>(source + i);
      std::memcpy(target + i, &some, sizeof(some));
    };
    for (int64_t i = 0; i + N < count; i += N) copy(i);
    copy(count - N);
  }
}

}  // namespace
}  // namespace mmdcn
