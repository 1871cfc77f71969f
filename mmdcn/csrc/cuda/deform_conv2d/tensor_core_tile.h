// Operands of matrix products on tensor cores, in shared memory.
#pragma once

#include "../context.h"

namespace mmdcn::cuda {

// Neighbouring elements that a thread loads, copies or stores at a time.
template <typename T, int kLength>
struct alignas(kLength * sizeof(T)) Vector {
  uint32_t word[kLength * sizeof(T) / sizeof(uint32_t)];
};

// Elements in the widest of them, of 16 bytes.
template <typename T>
constexpr int kWide = 16 / sizeof(T);

// How much of the summed dimension is staged at a time: 64 bytes of each row and column. The
// multiplication takes it in two parts of 32 bytes, which is what one instruction sums: 16 halves
// or 8 floats.
template <typename T>
constexpr int kStep = 64 / sizeof(T);
constexpr int kParts = 2;

// The dimension along which an operand's neighbouring elements lie in memory: the one that is
// summed, or the other one, which is that of the product's rows or columns.
enum class Lines { kAlongSum, kAcrossSum };

// kExtent rows of the left operand, or columns of the right one, by kStep<T> summands. Lines are
// stored as vectors of 16 bytes, in an order that follows from the line's number such that a warp
// finds what it multiplies in different memory banks.
template <typename T, int kExtent, Lines kLines>
struct alignas(128) Operand {
  static constexpr bool kAlong = kLines == Lines::kAlongSum;
  static constexpr int kCount = kAlong ? kExtent : kStep<T>;  // of lines
  static constexpr int kVectors = (kAlong ? kStep<T> : kExtent) / kWide<T>;
  static_assert(kAlong ? kVectors == 4 : kVectors % 8 == 0, "the order below needs this");

  T element[kCount * kVectors * kWide<T>];

  MMDCN_BLOCK static int place(int line, int vector) {
    int order = line & 7;
    if (kAlong) {
      order = line >> 1 & 3;  // two lines fill the banks once
    } else if (sizeof(T) == 4) {
      order = (line & 3) << 1;  // read by single elements, of 4 lines and 2 vectors at a time
    }
    return (line * kVectors + (vector ^ order)) * kWide<T>;
  }

  MMDCN_BLOCK T* vector(int line, int vector) { return element + place(line, vector); }
  MMDCN_BLOCK const T* vector(int line, int vector) const { return element + place(line, vector); }

  // One element, by its place in the other dimension and in the summed one.
  MMDCN_BLOCK const T& at(int extent, int summand) const {
    const int line = kAlong ? extent : summand, along = kAlong ? summand : extent;
    return element[place(line, along / kWide<T>) + along % kWide<T>];
  }
};

}  // namespace mmdcn::cuda
