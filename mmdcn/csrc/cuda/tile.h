// The matrix product of two tiles in shared memory, accumulated in the registers of a block.
#pragma once

#include "context.h"

namespace mmdcn::cuda {

// Rows and columns of a product tile, and the length of the summed dimension that is staged in
// shared memory at a time.
constexpr int kTile = 64;
constexpr int kDepth = 32;

// `kLines` lines of kTile elements. The padding keeps lines aligned for 16-byte loads and spreads a
// column of the tile over the memory banks.
template <typename acc_t, int kLines>
struct alignas(16) Tile {
  static constexpr int kStride = kTile + 4;

  acc_t line[kLines][kStride];
};

// This thread's share of a kTile x kTile product: a rectangle of neighbouring elements.
template <typename Ctx, typename acc_t>
struct Product {
  static constexpr int kRows = kTile / Ctx::kRows;
  static constexpr int kColumns = kTile / Ctx::kColumns;

  acc_t value[kRows][kColumns];

  MMDCN_BLOCK void clear() {
    MMDCN_UNROLL
    for (int i = 0; i < kRows; ++i) {
      MMDCN_UNROLL
      for (int j = 0; j < kColumns; ++j) value[i][j] = 0;
    }
  }

  // value[row][column] += sum over `depth` lines of left[line][row] * right[line][column].
  MMDCN_BLOCK void add(const Ctx& ctx, const Tile<acc_t, kDepth>& left,
                       const Tile<acc_t, kDepth>& right, int depth) {
    const int row = first_row(ctx), column = first_column(ctx);
    for (int line = 0; line < depth; ++line) {
      acc_t a[kRows], b[kColumns];
      MMDCN_UNROLL
      for (int i = 0; i < kRows; ++i) a[i] = left.line[line][row + i];
      MMDCN_UNROLL
      for (int j = 0; j < kColumns; ++j) b[j] = right.line[line][column + j];
      MMDCN_UNROLL
      for (int i = 0; i < kRows; ++i) {
        MMDCN_UNROLL
        for (int j = 0; j < kColumns; ++j) value[i][j] += a[i] * b[j];
      }
    }
  }

  // Calls visit(row, column, value) for each element of this thread.
  template <typename Visit>
  MMDCN_BLOCK void for_each(const Ctx& ctx, const Visit& visit) const {
    const int row = first_row(ctx), column = first_column(ctx);
    MMDCN_UNROLL
    for (int i = 0; i < kRows; ++i) {
      MMDCN_UNROLL
      for (int j = 0; j < kColumns; ++j) visit(row + i, column + j, value[i][j]);
    }
  }

 private:
  // Threads with consecutive numbers own consecutive columns.
  MMDCN_BLOCK static int first_row(const Ctx& ctx) { return ctx.thread() / Ctx::kColumns * kRows; }
  MMDCN_BLOCK static int first_column(const Ctx& ctx) {
    return ctx.thread() % Ctx::kColumns * kColumns;
  }
};

}  // namespace mmdcn::cuda
