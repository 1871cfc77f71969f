// The instruction sets that kernels are compiled for, and the one in use.
#pragma once

namespace mmdcn {

enum class Capability { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

// The best instruction set of this machine, or the one that the environment variable
// MMDCN_CPU_CAPABILITY names: portable, avx2, avx512 or avx512_bf16. Read once.
Capability capability();

}  // namespace mmdcn
