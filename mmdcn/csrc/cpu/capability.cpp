// The choice of the instruction set, and the operator that names it.
#include "capability.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace mmdcn {
namespace {

constexpr std::array<const char*, 4> kNames = {"portable", "avx2", "avx512", "avx512_bf16"};

Capability best_capability() {
#ifdef __x86_64__
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    return Capability::kPortable;
  }
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return Capability::kAvx2;
  return __builtin_cpu_supports("avx512bf16") ? Capability::kAvx512Bf16 : Capability::kAvx512;
#else
  return Capability::kPortable;
#endif
}

Capability choose() {
  const Capability best = best_capability();
  const char* wanted = std::getenv("MMDCN_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (int i = 0; i < static_cast<int>(kNames.size()); ++i) {
    if (std::string(wanted) != kNames[i]) continue;
    if (i <= static_cast<int>(best)) return static_cast<Capability>(i);
    throw std::runtime_error(std::string("MMDCN_CPU_CAPABILITY: this machine has no ") + wanted);
  }
  throw std::runtime_error(
      std::string("MMDCN_CPU_CAPABILITY: expected portable, avx2, avx512 or avx512_bf16, got ") +
      wanted);
}

std::string cpu_capability() { return kNames[static_cast<int>(capability())]; }

}  // namespace

Capability capability() {
  static const Capability chosen = choose();
  return chosen;
}

}  // namespace mmdcn

STABLE_TORCH_LIBRARY_IMPL(mmdcn, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&mmdcn::cpu_capability));
}
