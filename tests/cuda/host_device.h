// What a library of the CUDA operators for CPU tensors has instead of a GPU: no device to switch
// to, no stream, and element types by the precision that launches are given.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../../mmdcn/csrc/cuda/types.h"

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

namespace mmdcn::cuda {
namespace {

template <typename T>
struct Type {
  using type = T;
};

template <typename Run>
void dispatch(Precision precision, const Run& run) {
  switch (precision) {
    case Precision::kFloat64:
      return run(Type<double>{}, Type<double>{});
    case Precision::kFloat32:
      return run(Type<float>{}, Type<float>{});
    case Precision::kFloat16:
      return run(Type<torch::headeronly::Half>{}, Type<float>{});
    case Precision::kBFloat16:
      return run(Type<torch::headeronly::BFloat16>{}, Type<float>{});
  }
}

}  // namespace
}  // namespace mmdcn::cuda
