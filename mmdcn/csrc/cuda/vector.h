// Vectors of neighbouring elements, which a thread loads and stores at once.
#pragma once

#include "context.h"

namespace mmdcn::cuda {

template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T value[N];
};

// N neighbouring elements as numbers to compute with.
template <typename acc_t, typename Ctx, typename T, int N>
MMDCN_BLOCK void load_as(const Ctx& ctx, const T* address, acc_t (&values)[N]) {
  Vector<T, N> vector;
  ctx.load(address, vector);
  MMDCN_UNROLL
  for (int i = 0; i < N; ++i) values[i] = static_cast<acc_t>(vector.value[i]);
}

}  // namespace mmdcn::cuda
