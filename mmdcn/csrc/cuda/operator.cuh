// Helpers that bind the operators' block programs to the GPU: kernels, element types, and launches
// (see launch.h).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"

namespace mmdcn::cuda {
namespace {

// Declares a kernel of at least two blocks per multiprocessor, which leaves a thread 128 registers.
// In double precision 128 would spill, so one block per multiprocessor has twice as many.
#define MMDCN_KERNEL \
  __global__ void __launch_bounds__(DeviceContext::kThreads, sizeof(acc_t) == 4 ? 2 : 1)

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
