// The execution context of a thread block on a GPU with tensor cores, compute capability 8.0 or
// newer: asynchronous copies and mma.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../context.h"
#include "tensor_core_tile.h"

namespace mmdcn::cuda {

// What the instructions are called for each type of operands, and how its pairs become floats.
template <typename T>
struct TensorType;

template <>
struct TensorType<__half> {
  static __device__ float2 to_floats(uint32_t pair) {
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  }
  static __device__ uint32_t to_pair(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static __device__ void multiply(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0,
                                  uint32_t right1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
  }
};

template <>
struct TensorType<__nv_bfloat16> {
  static __device__ float2 to_floats(uint32_t pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u)};
  }
  static __device__ uint32_t to_pair(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static __device__ void multiply(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0,
                                  uint32_t right1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
  }
};

// In TF32: the operands lose 13 bits of their significands, and are rounded here; the unit would
// cut them off.
template <>
struct TensorType<float> {
  static __device__ uint32_t round(uint32_t value) {
    uint32_t rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(value)));
    return rounded;
  }
  static __device__ void multiply(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0,
                                  uint32_t right1) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
  }
};

// Loads four matrices of 8 lines by 16 bytes, of which lane l names line l % 8 of matrix l / 8.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&fragment)[4], const void* line) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(line));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address)
                 : "memory");
  }
}

// This lane's share of 16 rows (of the left operand) or columns (of the right one) from `first` on,
// for one part of the step, as mma wants it: four registers for 8 x 16 bytes each. Those that
// follow each other are, on the left, of rows that follow each other; on the right, of summands.
template <bool kLeft, typename T, int kExtent, Lines kLines>
__device__ __forceinline__ void load_fragment(uint32_t (&fragment)[4],
                                              const Operand<T, kExtent, kLines>& operand, int first,
                                              int part) {
  const int lane = threadIdx.x % 32;
  // Of the matrix that this lane names a line of.
  const int across = kLeft ? lane >> 3 & 1 : lane >> 4, along = kLeft ? lane >> 4 : lane >> 3 & 1;
  if constexpr (kLines == Lines::kAlongSum) {
    load_matrices<false>(fragment, operand.vector(first + across * 8 + lane % 8, part * 2 + along));
  } else if constexpr (sizeof(T) == 2) {
    load_matrices<true>(fragment,
                        operand.vector(part * 16 + along * 8 + lane % 8, first / 8 + across));
  } else {
    // ldmatrix transposes pairs of bytes only.
    for (int i = 0; i < 4; ++i) {
      const int far = kLeft ? i & 1 : i >> 1, late = kLeft ? i >> 1 : i & 1;
      fragment[i] =
          __float_as_uint(operand.at(first + far * 8 + lane / 4, part * 8 + late * 4 + lane % 4));
    }
  }
  if constexpr (sizeof(T) == 4) {
    for (int i = 0; i < 4; ++i) fragment[i] = TensorType<float>::round(fragment[i]);
  }
}

struct TensorCoreContext : DeviceContext {
  // ---- 8 or 16 bytes of global memory that nothing writes while the kernel runs

  template <typename T, typename V>
  __device__ void load(const T* address, V& vector) const {
    if constexpr (sizeof(V) == 16) {
      reinterpret_cast<uint4&>(vector) = __ldg(reinterpret_cast<const uint4*>(address));
    } else {
      static_assert(sizeof(V) == 8, "8 or 16 bytes");
      reinterpret_cast<uint2&>(vector) = __ldg(reinterpret_cast<const uint2*>(address));
    }
  }

  using DeviceContext::store;
  template <typename T, int kLength>
  __device__ void store(T* address, const Vector<T, kLength>& vector) const {
    *reinterpret_cast<Vector<T, kLength>*>(address) = vector;
  }

  // ---- vectors in shared memory

  template <typename T, int kLength>
  __device__ void load_shared(const T* address, Vector<T, kLength>& vector) const {
    vector = *reinterpret_cast<const Vector<T, kLength>*>(address);
  }
  template <typename T, int kLength>
  __device__ void store_shared(T* address, const Vector<T, kLength>& vector) const {
    *reinterpret_cast<Vector<T, kLength>*>(address) = vector;
  }

  template <typename T, int kLength>
  __device__ void unpack(const Vector<T, kLength>& vector, float (&values)[kLength]) const {
    if constexpr (sizeof(T) == 4) {
      for (int i = 0; i < kLength; ++i) values[i] = __uint_as_float(vector.word[i]);
    } else {
      for (int i = 0; i < kLength; i += 2) {
        const float2 pair = TensorType<T>::to_floats(vector.word[i / 2]);
        values[i] = pair.x;
        values[i + 1] = pair.y;
      }
    }
  }

  template <typename T, int kLength>
  __device__ void pack(const float (&values)[kLength], Vector<T, kLength>& vector) const {
    if constexpr (sizeof(T) == 4) {
      for (int i = 0; i < kLength; ++i) vector.word[i] = __float_as_uint(values[i]);
    } else {
      for (int i = 0; i < kLength; i += 2) {
        vector.word[i / 2] = TensorType<T>::to_pair(values[i], values[i + 1]);
      }
    }
  }

  // ---- additions that other blocks may make to the same addresses

  using DeviceContext::atomic_add;
  __device__ void atomic_add(float* address, const float (&values)[4]) const {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(__cvta_generic_to_global(address)), "f"(values[0]), "f"(values[1]),
                   "f"(values[2]), "f"(values[3])
                 : "memory");
#else
    for (int i = 0; i < 4; ++i) atomicAdd(address + i, values[i]);
#endif
  }

  // ---- asynchronous copies of 16 bytes to shared memory

  template <typename T>
  __device__ void copy_async(T* shared, const T* global, bool exists) const {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(address), "l"(__cvta_generic_to_global(global)), "r"(exists ? 16 : 0)
                 : "memory");
  }
  __device__ void commit() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int kPending>
  __device__ void wait() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  }

  // ---- the product of two operands

  template <int kM, int kN>
  class TensorProduct {
    // Warps share the product as a grid of 2 x 4.
    static constexpr int kRows = kM / 2, kColumns = kN / 4;
    static_assert(kThreads == 256 && kRows % 16 == 0 && kColumns % 16 == 0, "uneven");

    // For 16 rows and 8 columns, as mma gives it: lane l has columns 2 * (l % 4) and the next of
    // rows l / 4 and l / 4 + 8.
    float value_[kRows / 16][kColumns / 8][4];

    static __device__ int first_row() { return threadIdx.x / 128 * kRows; }
    static __device__ int first_column() { return threadIdx.x / 32 % 4 * kColumns; }

   public:
    __device__ void clear() {
      for (auto& row : value_) {
        for (auto& tile : row) {
          for (float& value : tile) value = 0;
        }
      }
    }

    template <typename Ctx, typename T, Lines kLeftLines, Lines kRightLines>
    __device__ void add(const Ctx&, const Operand<T, kM, kLeftLines>& left,
                        const Operand<T, kN, kRightLines>& right, int part) {
      uint32_t b[kColumns / 16][4];
#pragma unroll
      for (int j = 0; j < kColumns / 16; ++j) {
        load_fragment<false>(b[j], right, first_column() + j * 16, part);
      }
#pragma unroll
      for (int i = 0; i < kRows / 16; ++i) {
        uint32_t a[4];
        load_fragment<true>(a, left, first_row() + i * 16, part);
#pragma unroll
        for (int j = 0; j < kColumns / 16; ++j) {
          TensorType<T>::multiply(value_[i][2 * j], a, b[j][0], b[j][1]);
          TensorType<T>::multiply(value_[i][2 * j + 1], a, b[j][2], b[j][3]);
        }
      }
    }

    template <typename Ctx, typename Visit>
    __device__ void for_each(const Ctx&, const Visit& visit) const {
      const int lane = threadIdx.x % 32;
#pragma unroll
      for (int i = 0; i < kRows / 16; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float pair[2] = {value_[i][j][2 * half], value_[i][j][2 * half + 1]};
            visit(first_row() + i * 16 + half * 8 + lane / 4, first_column() + j * 8 + lane % 4 * 2,
                  pair);
          }
        }
      }
    }
  };
};

}  // namespace mmdcn::cuda
