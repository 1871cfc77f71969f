// The choice of the instruction set, and the operator that names it.
#include "capability.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>

#ifdef __x86_64__
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mmdcn {
namespace {

constexpr std::array<const char*, 5> kNames = {"portable", "avx2", "avx512", "avx512_bf16",
                                               "avx512_amx"};

#ifdef __x86_64__
// Whether the processor has tile registers that multiply bfloat16, and the system lets this process
// use them. Linux asks to be asked, as their 8 KB are then saved at every switch between threads,
// and refuses where some thread's stack for signals has no room for them.
bool may_use_amx() {
#ifdef __linux__
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of <asm/prctl.h>, since 5.16
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  if ((edx & kBfloat16) == 0 || (edx & kTiles) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// The last one that this machine can execute.
Capability last_capability() {
#ifdef __x86_64__
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    return Capability::kPortable;
  }
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return Capability::kAvx2;
  if (!__builtin_cpu_supports("avx512bf16")) return Capability::kAvx512;
  return may_use_amx() ? Capability::kAvx512Amx : Capability::kAvx512Bf16;
#else
  return Capability::kPortable;
#endif
}

// On Intel's processors the instruction of AVX512-BF16 is issued half as often as a fused
// multiply-add, and loses to float32; on AMD's it is issued as often.
Capability best_capability(Capability last) {
#ifdef __x86_64__
  if (last == Capability::kAvx512Bf16 && !__builtin_cpu_is("amd")) return Capability::kAvx512;
#endif
  return last;
}

std::string names() {
  std::string listed;
  for (size_t i = 0; i < kNames.size(); ++i) {
    listed += std::string(i == 0 ? "" : i + 1 < kNames.size() ? ", " : " or ") + kNames[i];
  }
  return listed;
}

Capability choose() {
  const Capability last = last_capability();
  const char* wanted = std::getenv("MMDCN_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return best_capability(last);
  for (int i = 0; i < static_cast<int>(kNames.size()); ++i) {
    if (std::string(wanted) != kNames[i]) continue;
    if (i <= static_cast<int>(last)) return static_cast<Capability>(i);
    throw std::runtime_error(std::string("MMDCN_CPU_CAPABILITY: this machine has no ") + wanted);
  }
  throw std::runtime_error("MMDCN_CPU_CAPABILITY: expected " + names() + ", got " + wanted);
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
