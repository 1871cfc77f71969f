// The execution context of a thread block.
//
// Every kernel here is written once, as a function template over a context `Ctx`, which is all a
// block's program may ask of the machine:
//
//   Ctx::kRows, Ctx::kColumns  the block's threads seen as a grid that shares a product tile
//   Ctx::kThreads              their number
//   thread()                   this thread's number, in [0, kThreads)
//   block(), blocks()          this block's number and how many there are, for strided loops
//   sync()                     barrier of the block
//   atomic_add(address, value) addition that other blocks may make to the same address
//   store(address, value)      writes an element of a result; made once per element
//
// On the GPU these are threads and __syncthreads(). On the host a block may be a single thread, for
// which the same source is valid as it stands (work is distributed by strided loops, and registers
// are arrays whose size follows from kThreads), so that tests run the kernels' own source without a
// GPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MMDCN_BLOCK __device__ __forceinline__
#define MMDCN_UNROLL _Pragma("unroll")
#else
#define MMDCN_BLOCK inline
#define MMDCN_UNROLL
#endif

#ifdef __CUDACC__
namespace mmdcn::cuda {

struct DeviceContext {
  static constexpr int kRows = 16;
  static constexpr int kColumns = 16;
  static constexpr int kThreads = kRows * kColumns;

  __device__ int thread() const { return threadIdx.x; }
  __device__ int64_t block() const { return blockIdx.x; }
  __device__ int64_t blocks() const { return gridDim.x; }
  __device__ void sync() const { __syncthreads(); }

  template <typename T>
  __device__ void atomic_add(T* address, T value) const {
    atomicAdd(address, value);
  }

  template <typename T>
  __device__ void store(T* address, T value) const {
    *address = value;
  }
};

}  // namespace mmdcn::cuda
#endif
