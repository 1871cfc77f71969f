// C += A · B on tiles that stay in the second-level cache, for the widest registers that this file
// is compiled for. The right-hand side is held in panels of two registers' width.
#pragma once

#include "simd.h"

namespace mmdcn {
namespace {

// Rows of the register block: with two registers a row, what the register file holds beside them.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlockRows = 12;
#else
constexpr int kBlockRows = 6;
#endif

template <typename A>
constexpr int64_t kPanelWidth = 2 * kLanes<A>;

// Columns of right-hand sides and of C are padded to whole registers.
template <typename A>
inline int64_t padded(int64_t columns) {
  return (columns + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// A right-hand side of `depth` rows: element (k, j) of panel number q is data[q·panel_stride +
// k·row_stride + j].
template <typename A>
struct Panels {
  const A* data;
  int64_t panel_stride;
  int64_t row_stride;
};

// Rows of a plain row-major matrix, seen as panels.
template <typename A>
inline Panels<A> row_major(const A* data, int64_t row_stride) {
  return {data, kPanelWidth<A>, row_stride};
}

// Panels that `pack` wrote one after the other.
template <typename A>
inline Panels<A> packed(const A* data, int64_t depth) {
  return {data, depth * kPanelWidth<A>, kPanelWidth<A>};
}

template <typename A>
inline int64_t packed_size(int64_t depth, int64_t columns) {
  return (columns + kPanelWidth<A> - 1) / kPanelWidth<A> * kPanelWidth<A> * depth;
}

// Writes a depth × columns matrix as panels, zero beyond its last column.
template <typename T, typename A>
inline void pack(const T* source, int64_t row_stride, int64_t column_stride, int64_t depth,
                 int64_t columns, A* target) {
  for (int64_t first = 0; first < columns; first += kPanelWidth<A>) {
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t j = first; j < first + kPanelWidth<A>; ++j) {
        *target++ = j < columns ? load(source + k * row_stride + j * column_stride) : A(0);
      }
    }
  }
}

// One register block: Rows × Registers registers of C stay put while A and B stream by.
template <int Rows, int Registers, typename A>
inline void multiply_block(int64_t depth, const A* a, int64_t a_row, int64_t a_column, const A* b,
                           int64_t b_row, A* c, int64_t c_row) {
  register_t<A> sum[Rows][Registers];
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < Registers; ++j) sum[i][j] = load_register(c + i * c_row + j * kLanes<A>);
  }
  for (int64_t k = 0; k < depth; ++k) {
    register_t<A> right[Registers];
#pragma GCC unroll 2
    for (int j = 0; j < Registers; ++j) right[j] = load_register(b + k * b_row + j * kLanes<A>);
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) {
      const A left = a[i * a_row + k * a_column];
#pragma GCC unroll 2
      for (int j = 0; j < Registers; ++j) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < Registers; ++j) store_register(c + i * c_row + j * kLanes<A>, sum[i][j]);
  }
}

// The rows left over after whole register blocks: at most `Rows` of them.
template <int Rows, int Registers, typename A>
inline void multiply_rows(int64_t rows, int64_t depth, const A* a, int64_t a_row, int64_t a_column,
                          const A* b, int64_t b_row, A* c, int64_t c_row) {
  if (rows == Rows) {
    multiply_block<Rows, Registers>(depth, a, a_row, a_column, b, b_row, c, c_row);
  } else if constexpr (Rows > 1) {
    multiply_rows<Rows - 1, Registers>(rows, depth, a, a_row, a_column, b, b_row, c, c_row);
  }
}

// C (rows × columns) += A (rows × depth) · B (depth × columns). Element (i, k) of A is
// a[i·a_row + k·a_column], so that A may be transposed; rows of C are c_row apart and padded to
// whole registers.
template <typename A>
inline void multiply(int64_t rows, int64_t columns, int64_t depth, const A* a, int64_t a_row,
                     int64_t a_column, Panels<A> b, A* c, int64_t c_row) {
  for (int64_t first = 0, q = 0; first < columns; first += kPanelWidth<A>, ++q) {
    const A* panel = b.data + q * b.panel_stride;
    const bool wide = columns - first > kLanes<A>;
    for (int64_t i = 0; i < rows; i += kBlockRows) {
      const int64_t some = rows - i < kBlockRows ? rows - i : kBlockRows;
      const A* a_block = a + i * a_row;
      A* c_block = c + i * c_row + first;
      if (wide) {
        multiply_rows<kBlockRows, 2>(some, depth, a_block, a_row, a_column, panel, b.row_stride,
                                     c_block, c_row);
      } else {
        multiply_rows<kBlockRows, 1>(some, depth, a_block, a_row, a_column, panel, b.row_stride,
                                     c_block, c_row);
      }
    }
  }
}

}  // namespace
}  // namespace mmdcn
