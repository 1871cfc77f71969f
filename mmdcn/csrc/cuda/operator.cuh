// What binds the block programs of operators to the GPU: kernels, launches (see launch.h), element
// types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"

namespace mmdcn::cuda {
namespace {

// At least so many blocks per multiprocessor, which leaves a thread 256 registers for one block,
// 128 for two, 80 for three and 64 for four. In double precision fewer would spill.
#define MMDCN_KERNEL_OF(blocks) \
  __global__ void __launch_bounds__(DeviceContext::kThreads, sizeof(acc_t) == 4 ? (blocks) : 1)
#define MMDCN_KERNEL MMDCN_KERNEL_OF(2)

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
