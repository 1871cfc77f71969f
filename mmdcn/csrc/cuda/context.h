// The execution context of a thread block.
//
// Every kernel is written once, as a function template over a context `Ctx`, which has everything
// that a block's program may use of the machine:
//
//   Ctx::kRows, Ctx::kColumns  the block's threads as a grid, over which a product tile is divided
//   Ctx::kThreads              their number
//   thread()                   this thread's number, in [0, kThreads)
//   block(), blocks()          this block's number and how many there are, for strided loops
//   sync()                     barrier of the block
//   atomic_add(address, value) addition that other blocks may make to the same address
//   atomic_max(address, value) likewise
//   store(address, value)      writes an element of a result, each element once
//
// Programs that multiply on tensor cores ask for more:
//
//   load(address, vector)           8 or 16 bytes of the arguments, aligned to as many
//   store(address, vector)          writes a vector of a result; once per element, likewise
//   load_shared, store_shared       the same in shared memory, where vectors may be of two elements
//   unpack<T>, pack<T>              between vectors of T and floats
//   atomic_add(address, four)       as above, to four floats, aligned to 16 bytes
//   copy_async(shared, global, exists)
//                                   copies 16 bytes to shared memory, or zeros where they do not
//                                   exist, at any time until it is waited for
//   commit(), wait<kPending>()      closes a group of this thread's copies; waits for all of its
//                                   groups but the last kPending
//   TensorProduct<kM, kN>           a product of operands, accumulated in registers of the block:
//                                   clear(), add(ctx, left, right, part), and
//                                   for_each(ctx, visit), which calls visit(row, column, pair) for
//                                   pairs of neighbours in a row
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
#define MMDCN_NO_UNROLL _Pragma("unroll 1")
#else
#define MMDCN_BLOCK inline
#define MMDCN_UNROLL
#define MMDCN_NO_UNROLL
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

  __device__ void atomic_add(int64_t* address, int64_t value) const {
    atomicAdd(reinterpret_cast<unsigned long long*>(address),
              static_cast<unsigned long long>(value));
  }
  __device__ void atomic_max(int32_t* address, int32_t value) const { atomicMax(address, value); }

  template <typename T>
  __device__ void store(T* address, T value) const {
    *address = value;
  }
};

}  // namespace mmdcn::cuda
#endif
