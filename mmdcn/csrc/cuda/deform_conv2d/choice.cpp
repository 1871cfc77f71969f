// The choice of kernels, by the environment.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

#include "kernels.h"

namespace mmdcn::cuda {
namespace {

Kernels choose() {
  const char* wanted = std::getenv("MMDCN_CUDA_KERNELS");
  if (wanted == nullptr || *wanted == '\0') return Kernels::kSimple;
  if (std::string(wanted) == "simple") return Kernels::kSimple;
  STD_TORCH_CHECK(std::string(wanted) == "tensor_core",
                  "MMDCN_CUDA_KERNELS: expected simple or tensor_core, got ", wanted);
  return Kernels::kTensorCore;
}

std::string cuda_kernels() {
  return chosen_kernels() == Kernels::kTensorCore ? "tensor_core" : "simple";
}

}  // namespace

Kernels chosen_kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace mmdcn::cuda

STABLE_TORCH_LIBRARY_IMPL(mmdcn, CompositeExplicitAutograd, m) {
  m.impl("cuda_kernels", TORCH_BOX(&mmdcn::cuda::cuda_kernels));
}
