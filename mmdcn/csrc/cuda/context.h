// The execution context of a thread block.
//
// Every kernel here is written once, as a function template over a context `Ctx`, which is all a
// block's program may ask of the machine:
//
//   Ctx::kThreads              the number of the block's threads
//   Ctx::kLanes                how many neighbouring threads can add up what each of them has
//   thread()                   this thread's number, in [0, kThreads)
//   block(), blocks()          this block's number and how many there are, for strided loops
//   sync()                     barrier of the block
//   sum_lanes(values, lanes)   each value becomes the sum over `lanes` neighbouring threads, a
//   power
//                              of two; all threads of the block call it together
//   load(address, vector)      neighbouring elements of the arguments (see vector.h)
//   store(address, value)      writes an element of a result, or a vector of them; made once per
//                              element
//   atomic_add(address, value) addition that other blocks may make to the same address; of an
//                              array, to neighbouring elements from a multiple of their number on
//   atomic_max(address, value) likewise
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
  static constexpr int kThreads = 256;
  static constexpr int kLanes = 32;

  __device__ int thread() const { return threadIdx.x; }
  __device__ int64_t block() const { return blockIdx.x; }
  __device__ int64_t blocks() const { return gridDim.x; }
  __device__ void sync() const { __syncthreads(); }

  template <typename T, int N>
  __device__ void sum_lanes(T (&values)[N], int lanes) const {
    for (int other = lanes / 2; other > 0; other /= 2) {
      MMDCN_UNROLL
      for (int i = 0; i < N; ++i) values[i] += __shfl_xor_sync(0xFFFFFFFFu, values[i], other);
    }
  }

  // Vectors are of 16 bytes, of 8, or of a single element.
  template <typename T, typename V>
  __device__ void load(const T* address, V& vector) const {
    if constexpr (sizeof(V) == sizeof(uint4)) {
      as<uint4>(vector) = __ldg(reinterpret_cast<const uint4*>(address));
    } else if constexpr (sizeof(V) == sizeof(uint2)) {
      as<uint2>(vector) = __ldg(reinterpret_cast<const uint2*>(address));
    } else {
      static_assert(sizeof(V) == sizeof(T), "no instruction loads these");
      vector.value[0] = address[0];
    }
  }

  template <typename T>
  __device__ void store(T* address, T value) const {
    *address = value;
  }
  template <typename T, int N, template <typename, int> typename V>
  __device__ void store(T* address, const V<T, N>& vector) const {
    *reinterpret_cast<V<T, N>*>(address) = vector;
  }

  template <typename T>
  __device__ void atomic_add(T* address, T value) const {
    atomicAdd(address, value);
  }
  __device__ void atomic_add(int64_t* address, int64_t value) const {
    atomicAdd(reinterpret_cast<unsigned long long*>(address),
              static_cast<unsigned long long>(value));
  }
  template <typename T, int N>
  __device__ void atomic_add(T* address, const T (&values)[N]) const {
    MMDCN_UNROLL
    for (int i = 0; i < N; ++i) atomicAdd(address + i, values[i]);
  }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __device__ void atomic_add(float* address, const float (&values)[4]) const {
    const float4 four = make_float4(values[0], values[1], values[2], values[3]);
    atomicAdd(reinterpret_cast<float4*>(address), four);
  }
#endif
  __device__ void atomic_max(int32_t* address, int32_t value) const { atomicMax(address, value); }

 private:
  template <typename T, typename V>
  __device__ static T& as(V& vector) {
    return reinterpret_cast<T&>(vector);
  }
};

}  // namespace mmdcn::cuda
#endif
