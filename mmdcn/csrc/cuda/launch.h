// The launch of a kernel on a stream, and its errors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "context.h"
#include "types.h"

namespace mmdcn::cuda {

inline int64_t tiles(int64_t elements, int64_t size) { return (elements + size - 1) / size; }

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("mmdcn: CUDA refused to launch a kernel: ") +
                           cudaGetErrorString(error));
}

// Launches a kernel on `blocks` blocks, or on as many as a grid can have, as kernels stride over
// the rest. Each has so many bytes of shared memory beside what the kernel declares.
template <typename... Parameters, typename... Arguments>
void launch_with_memory(void (*kernel)(Parameters...), int64_t blocks, size_t shared_bytes,
                        const Stream& stream, Arguments... arguments) {
  constexpr int64_t kLargestGrid = 2147483647;
  const dim3 grid(static_cast<unsigned>(std::min(blocks, kLargestGrid)));
  // PyTorch sets the device in its own copy of the CUDA runtime, and this library has another.
  check(cudaSetDevice(stream.device));
  kernel<<<grid, DeviceContext::kThreads, shared_bytes, static_cast<cudaStream_t>(stream.handle)>>>(
      arguments...);
  check(cudaGetLastError());
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, const Stream& stream,
            Arguments... arguments) {
  launch_with_memory(kernel, blocks, 0, stream, arguments...);
}

inline int device_attribute(int device, cudaDeviceAttr which) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// Whether a device adds vectors of floats to memory in one operation. Others add single elements,
// which neighbouring lanes should have next to each other.
inline bool adds_vectors_at_once(int device) {
  return device_attribute(device, cudaDevAttrComputeCapabilityMajor) >= 9;
}

template <typename T>
struct Type {
  using type = T;
};

template <int N>
struct Int {
  constexpr int operator()() const { return N; }
};

}  // namespace mmdcn::cuda
