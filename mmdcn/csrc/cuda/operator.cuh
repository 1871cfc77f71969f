// What binds the block programs of operators to the GPU: kernels, launches, element types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "context.h"
#include "deform_conv2d.h"

namespace mmdcn::cuda {
namespace {

// At least two blocks per multiprocessor, which leaves a thread 128 registers; in double precision
// those would spill, and one block gets twice as many.
#define MMDCN_KERNEL \
  __global__ void __launch_bounds__(DeviceContext::kThreads, sizeof(acc_t) == 4 ? 2 : 1)

inline int64_t tiles(int64_t elements, int64_t size) { return (elements + size - 1) / size; }

// Launches a kernel on `blocks` blocks, or as many as a grid can have: kernels stride over the
// rest.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, const Stream& stream,
            Arguments... arguments) {
  constexpr int64_t kLargestGrid = 2147483647;
  const dim3 grid(static_cast<unsigned>(std::min(blocks, kLargestGrid)));
  // PyTorch's choice of device is known to its own copy of the CUDA runtime; this library has
  // another.
  cudaError_t error = cudaSetDevice(stream.device);
  if (error == cudaSuccess) {
    kernel<<<grid, DeviceContext::kThreads, 0, static_cast<cudaStream_t>(stream.handle)>>>(
        arguments...);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("mmdcn: CUDA refused to launch a kernel: ") +
                             cudaGetErrorString(error));
  }
}

template <typename T>
struct Type {
  using type = T;
};

// Calls run(Type<scalar_t>, Type<acc_t>) for a precision.
template <typename Run>
void dispatch(Precision precision, const Run& run) {
  switch (precision) {
    case Precision::kFloat64:
      return run(Type<double>{}, Type<double>{});
    case Precision::kFloat32:
      return run(Type<float>{}, Type<float>{});
    case Precision::kFloat16:
      return run(Type<__half>{}, Type<float>{});
    case Precision::kBFloat16:
      return run(Type<__nv_bfloat16>{}, Type<float>{});
  }
}

}  // namespace
}  // namespace mmdcn::cuda
