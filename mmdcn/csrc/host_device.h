// MMDCN_HOST_DEVICE, which declares functions for the host, in every instruction set, and for the
// device.
#pragma once

#ifdef __CUDACC__
#define MMDCN_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: the CPU kernels are compiled once for each instruction set, and the linker must
// not replace the copy for one instruction set by the copy for another.
#define MMDCN_HOST_DEVICE inline __attribute__((always_inline))
#endif
