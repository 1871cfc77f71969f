// The transposition of matrices by squares of registers, for images whose channels lie in planes or
// in rows, and for weights in torch's order or in the kernels'.
#pragma once

#include "simd.h"

namespace mmdcn {
namespace {

// target[j·target_stride + i] = source[i·source_stride + j], or += where `add`, for i < rows and
// j < columns. At least one of the two matrices is of type A, the accumulators'.
template <typename A, bool add = false, typename S, typename T>
inline void transpose(const S* source, int64_t source_stride, int64_t rows, int64_t columns,
                      T* target, int64_t target_stride) {
  constexpr int64_t lanes = kLanes<A>;
  const auto one_by_one = [&](int64_t first_row, int64_t first_column) {
    for (int64_t j = first_column; j < columns; ++j) {
      for (int64_t i = first_row; i < rows; ++i) {
        const A value = load(source + i * source_stride + j);
        T* address = target + j * target_stride + i;
        store(address, add ? A(load(address)) + value : value);
      }
    }
  };
  if (rows < lanes || columns < lanes) return one_by_one(0, 0);

  // The last squares overlap the ones before them, except where adding twice would be wrong.
  const int64_t whole_rows = add ? rows / lanes * lanes : rows;
  const int64_t whole_columns = add ? columns / lanes * lanes : columns;
  for (int64_t row = 0; row < whole_rows; row += lanes) {
    const int64_t i = row + lanes <= rows ? row : rows - lanes;
    for (int64_t column = 0; column < whole_columns; column += lanes) {
      const int64_t j = column + lanes <= columns ? column : columns - lanes;
      register_t<A> square[lanes];
#pragma GCC unroll 16
      for (int k = 0; k < lanes; ++k) {
        square[k] = load_register(source + (i + k) * source_stride + j);
      }
      transpose_square<A>(square);
#pragma GCC unroll 16
      for (int k = 0; k < lanes; ++k) {
        T* address = target + (j + k) * target_stride + i;
        store_register(address, add ? load_register(address) + square[k] : square[k]);
      }
    }
  }
  if (whole_rows < rows) one_by_one(whole_rows, 0);
  rows = whole_rows;
  if (whole_columns < columns) one_by_one(0, whole_columns);
}

}  // namespace
}  // namespace mmdcn
