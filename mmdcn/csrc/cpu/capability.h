// The instruction sets that kernels are compiled for, and the one in use.
#pragma once

namespace mmdcn {

enum class Capability { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAvx512Amx };

// The best instruction set of this machine, or the one that the environment variable
// MMDCN_CPU_CAPABILITY names: portable, avx2, avx512, avx512_bf16 or
// avx512_amx. Read once.
Capability capability();

}  // namespace mmdcn
