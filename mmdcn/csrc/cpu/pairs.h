// Pairs of bfloat16 along the depth of a product: their number, and matrices of them.
#pragma once

#include "amx.h"
#include "simd.h"

namespace mmdcn {
namespace {

// Whether bfloat16 is multiplied in pairs. Otherwise it is converted to float.
#ifdef __AVX512BF16__
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

// The pairs that `elements` elements take in the depth of a product: in tiles, whole rows of a
// tile.
inline int64_t pairs(int64_t elements) {
  constexpr int64_t step = kHasTiles ? kTileRows : 1;
  return (elements + 2 * step - 1) / (2 * step) * step;
}

// The pairs (even[i], odd[i]) of numbers that are exact in bfloat16, each pair in place of a float.
inline register_t<float> paired(register_t<float> even, register_t<float> odd) {
  using Bits = vector_t<uint32_t, kLanes<float>>;
  return bit_cast<register_t<float>>((bit_cast<Bits>(even) >> 16) | bit_cast<Bits>(odd));
}

inline void store_pairs(BFloat16* target, register_t<float> pairs) {
  std::memcpy(target, &pairs, sizeof(pairs));
}

// target[j·target_stride + i] = source[i·source_stride + j] for whole squares of pairs: `rows` is a
// multiple of twice the lanes of a register, `columns` one of its lanes.
inline void transpose_pairs(const BFloat16* source, int64_t source_stride, int64_t rows,
                            int64_t columns, BFloat16* target, int64_t target_stride) {
  constexpr int64_t lanes = kLanes<float>;
  for (int64_t i = 0; i < rows; i += 2 * lanes) {
    for (int64_t j = 0; j < columns; j += lanes) {
      register_t<float> square[lanes];
#pragma GCC unroll 16
      for (int k = 0; k < lanes; ++k) {
        const BFloat16* row = source + (i + 2 * k) * source_stride + j;
        square[k] = paired(load_register(row), load_register(row + source_stride));
      }
      transpose_square<float>(square);
#pragma GCC unroll 16
      for (int k = 0; k < lanes; ++k) store_pairs(target + (j + k) * target_stride + i, square[k]);
    }
  }
}

}  // namespace
}  // namespace mmdcn
