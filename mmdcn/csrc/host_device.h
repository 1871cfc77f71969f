// Functions that are compiled for the host, for every instruction set, and for the device.
#pragma once

#ifdef __CUDACC__
#define MMDCN_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: the CPU kernels are compiled once for each instruction set, and the linker must
// not share a function of one with another.
#define MMDCN_HOST_DEVICE inline __attribute__((always_inline))
#endif
