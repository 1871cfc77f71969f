// Transposition of matrices: of images whose channels are last to planes of channels, and back.
#pragma once

#include "../integers.h"
#include "context.h"

namespace mmdcn::cuda {

// `count` matrices, one after the other, of rows of neighbouring elements. In what they are
// transposed to, rows begin `row_stride` elements apart, and matrices `matrix_stride`.
struct Transposition {
  int64_t count, rows, columns;
  int64_t row_stride, matrix_stride;

  // To matrices without gaps.
  Transposition(int64_t count, int64_t rows, int64_t columns)
      : Transposition(count, rows, columns, rows, rows * columns) {}
  Transposition(int64_t count, int64_t rows, int64_t columns, int64_t row_stride,
                int64_t matrix_stride)
      : count(count),
        rows(rows),
        columns(columns),
        row_stride(row_stride),
        matrix_stride(matrix_stride) {}
};

constexpr int kTransposed = 64;  // rows and columns that a block transposes at a time

inline int64_t tiles_of(const Transposition& sizes) {
  return sizes.count * divide_up(sizes.rows, kTransposed) * divide_up(sizes.columns, kTransposed);
}

template <typename T>
struct TransposeStorage {
  // What follows a row keeps the elements of a column in different banks of shared memory.
  static constexpr int kGap = sizeof(T) < 4 ? 4 / sizeof(T) : 1;
  T element[kTransposed][kTransposed + kGap];
};

template <typename Ctx, typename from_t, typename to_t>
MMDCN_BLOCK void transpose_block(const Ctx& ctx, const Transposition& sizes, const from_t* from,
                                 to_t* to, TransposeStorage<to_t>& storage) {
  // The threads lie side by side, and then below each other, and pass over the tile together.
  constexpr int kWide = Ctx::kThreads < kTransposed ? Ctx::kThreads : kTransposed;
  constexpr int kHigh = Ctx::kThreads / kWide;
  constexpr int kAcross = kTransposed / kWide, kOfThread = kAcross * (kTransposed / kHigh);
  const int x = ctx.thread() % kWide, y = ctx.thread() / kWide;
  const int64_t across = divide_up(sizes.columns, kTransposed);
  const int64_t of_matrix = across * divide_up(sizes.rows, kTransposed);
  for (int64_t tile = ctx.block(); tile < sizes.count * of_matrix; tile += ctx.blocks()) {
    const int64_t matrix = divide(tile, of_matrix), in_matrix = tile - matrix * of_matrix;
    const int64_t down = divide(in_matrix, across);
    const int64_t row = down * kTransposed, column = (in_matrix - down * across) * kTransposed;
    const int rows = static_cast<int>(smaller(kTransposed, sizes.rows - row));
    const int columns = static_cast<int>(smaller(kTransposed, sizes.columns - column));
    const from_t* source = from + (matrix * sizes.rows + row + y) * sizes.columns + column + x;
    to_t* target = to + matrix * sizes.matrix_stride + (column + y) * sizes.row_stride + row + x;

    // All are loaded before any is used, so that one wait serves them all.
    from_t element[kOfThread] = {};
    MMDCN_UNROLL
    for (int k = 0; k < kOfThread; ++k) {
      const int r = k / kAcross * kHigh, c = k % kAcross * kWide;
      if (y + r < rows && x + c < columns) element[k] = source[c];
      if (k % kAcross == kAcross - 1) source += kHigh * sizes.columns;
    }
    ctx.sync();  // The previous tile has been read.
    MMDCN_UNROLL
    for (int k = 0; k < kOfThread; ++k) {
      const int r = k / kAcross * kHigh, c = k % kAcross * kWide;
      storage.element[y + r][x + c] = static_cast<to_t>(element[k]);
    }
    ctx.sync();
    MMDCN_UNROLL
    for (int k = 0; k < kOfThread; ++k) {
      const int c = k / kAcross * kHigh, r = k % kAcross * kWide;
      if (x + r < rows && y + c < columns) ctx.store(target + r, storage.element[x + r][y + c]);
      if (k % kAcross == kAcross - 1) target += kHigh * sizes.row_stride;
    }
  }
}

}  // namespace mmdcn::cuda
