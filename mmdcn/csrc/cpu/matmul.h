// Matrix products C += A · B of tiles that stay in the second-level cache, on the widest registers,
// or on the tile registers, that this file is compiled for.
#pragma once

#include "amx.h"
#include "operands.h"

namespace mmdcn {
namespace {

// Rows of a register block, of two registers each: as many as leave registers for A and B.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlockRows = 12;
#else
constexpr int kBlockRows = 6;
#endif

// Rows of a register block where only one register of C is left: six sums would wait for each
// other.
constexpr int kNarrowRows = 12;

// Multiplies one step of the depth, an element of each row of A, for a register block.
template <int Rows, int Registers, Order order, typename A>
inline void multiply_step(int64_t k, const A* a, int64_t a_stride, const A* b, int64_t b_row,
                          register_t<A> (&sum)[Rows][Registers]) {
  register_t<A> right[Registers];
#pragma GCC unroll 2
  for (int j = 0; j < Registers; ++j) right[j] = load_register(b + k * b_row + j * kLanes<A>);
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) {
    const A left = order == Order::kRows ? a[i * a_stride + k] : a[k * a_stride + i];
#pragma GCC unroll 2
    for (int j = 0; j < Registers; ++j) sum[i][j] += left * right[j];
  }
}

#ifdef __AVX512BF16__
// The same for bfloat16, whose steps are pairs of elements along the depth: elements 2k and 2k + 1
// of each row of A, and a row of B that has such a pair for each column.
template <int Rows, int Registers, Order order>
inline void multiply_pairs(int64_t k, const BFloat16* a, int64_t a_stride, const BFloat16* b,
                           int64_t b_row, register_t<float> (&sum)[Rows][Registers]) {
  static_assert(order == Order::kRows, "pairs lie in rows");
  __m512bh right[Registers];
#pragma GCC unroll 2
  for (int j = 0; j < Registers; ++j) {
    right[j] = (__m512bh)load_bytes<__m512i>(b + 2 * (k * b_row + j * kLanes<float>));
  }
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) {
    const __m512bh left =
        (__m512bh)_mm512_set1_epi32(load_bytes<int32_t>(a + i * a_stride + 2 * k));
#pragma GCC unroll 2
    for (int j = 0; j < Registers; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
  }
}
#endif

// One step of the depth, of the kind that belongs to the type of the elements.
template <int Rows, int Registers, Order order, typename L, typename A>
inline void multiply_once(int64_t k, const L* a, int64_t a_stride, const L* b, int64_t b_row,
                          A (&sum)[Rows][Registers]) {
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<L, BFloat16>) {
    multiply_pairs<Rows, Registers, order>(k, a, a_stride, b, b_row, sum);
    return;
  } else
#endif
    multiply_step<Rows, Registers, order>(k, a, a_stride, b, b_row, sum);
}

// One register block: Rows × Registers registers of C stay in place while A and B stream by. Not
// inlined, so that the compiler has all registers for it and spills none of the sums.
template <int Rows, int Registers, Order order, Into into, typename L, typename A, typename Work>
__attribute__((noinline)) void multiply_block(const Depth& depth, const L* a, int64_t a_stride,
                                              const L* b, int64_t b_row, A* c, int64_t c_row,
                                              Work& work) {
  const int64_t steps = depth.steps;
  register_t<A> sum[Rows][Registers];
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < Registers; ++j) {
      sum[i][j] =
          into == Into::kAdd ? load_register(c + i * c_row + j * kLanes<A>) : register_t<A>{};
    }
  }
  // Otherwise the compiler copies the registers before and after the loops, for depths of zero.
  if (steps < 1 || depth.segments < 1) __builtin_unreachable();
  for (int64_t segment = 0; segment < depth.segments; ++segment) {
    int64_t k = 0;
    if constexpr (Work::kAny) {
      while (k + work.wait <= steps) {
        const int64_t until = k + work.wait;
#pragma GCC unroll 4
        for (; k < until; ++k) multiply_once<Rows, Registers, order>(k, a, a_stride, b, b_row, sum);
        work.work();
      }
      work.wait -= steps - k;
    }
#pragma GCC unroll 4
    for (; k < steps; ++k) multiply_once<Rows, Registers, order>(k, a, a_stride, b, b_row, sum);
    a += depth.a_segment;
    b += depth.b_segment;
  }
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < Registers; ++j) store_register(c + i * c_row + j * kLanes<A>, sum[i][j]);
  }
}

// A register block of `rows` rows, at most `Rows`: what is left over after whole blocks.
template <int Rows, int Registers, Order order, Into into, typename L, typename A>
inline void multiply_rows(int64_t rows, const Depth& depth, const L* a, int64_t a_stride,
                          const L* b, int64_t b_row, A* c, int64_t c_row) {
  if (rows == Rows) {
    NoWork none;
    multiply_block<Rows, Registers, order, into>(depth, a, a_stride, b, b_row, c, c_row, none);
  } else if constexpr (Rows > 1) {
    multiply_rows<Rows - 1, Registers, order, into>(rows, depth, a, a_stride, b, b_row, c, c_row);
  }
}

// The steps that multiply() takes in whole register blocks, between which alone other work is done;
// in tiles, all of them.
template <typename L, typename A>
inline int64_t whole_steps(int64_t rows, int64_t columns, const Depth& depth) {
  if (kHasTiles && std::is_same_v<L, BFloat16>) {
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows * ((columns - 1) / kTileRows + 1);
    return tiles * (depth.steps / kTileRows) * depth.segments * kTileSteps;
  }
  return rows / kBlockRows * ((columns + kLanes<A> - 1) / kPanelWidth<A>)*depth.steps *
         depth.segments;
}

// C (rows × columns) += or = A (rows × depth) · B (depth × columns). Rows of C are c_row elements
// apart, and padded to whole registers.
template <Order order, Into into, typename L, typename A, typename Work>
inline void multiply(int64_t rows, int64_t columns, const Depth& depth, const L* a,
                     int64_t a_stride, Panels<L> b, A* c, int64_t c_row, Work& work) {
#ifdef __AMX_BF16__
  if constexpr (std::is_same_v<L, BFloat16>) {
    return multiply_in_tiles<into>(rows, columns, depth, a, a_stride, b, c, c_row, work);
  }
#endif
  for (int64_t first = 0, q = 0; first < columns; first += kPanelWidth<A>, ++q) {
    const L* panel = b.data + q * b.panel_stride;
    const bool wide = columns - first > kLanes<A>;
    const int64_t block_rows = wide ? kBlockRows : kNarrowRows;
    for (int64_t i = 0; i < rows; i += block_rows) {
      const int64_t some = rows - i < block_rows ? rows - i : block_rows;
      const L* a_block = order == Order::kRows ? a + i * a_stride : a + i;
      A* c_block = c + i * c_row + first;
      if (wide && some == kBlockRows) {
        multiply_block<kBlockRows, 2, order, into>(depth, a_block, a_stride, panel, b.row_stride,
                                                   c_block, c_row, work);
      } else if (wide) {
        multiply_rows<kBlockRows - 1, 2, order, into>(some, depth, a_block, a_stride, panel,
                                                      b.row_stride, c_block, c_row);
      } else {
        multiply_rows<kNarrowRows, 1, order, into>(some, depth, a_block, a_stride, panel,
                                                   b.row_stride, c_block, c_row);
      }
    }
  }
}

// The same for a depth of one segment, without other work.
template <Order order, Into into, typename L, typename A>
inline void multiply(int64_t rows, int64_t columns, int64_t steps, const L* a, int64_t a_stride,
                     Panels<L> b, A* c, int64_t c_row) {
  NoWork none;
  multiply<order, into>(rows, columns, {steps, 1, 0, 0}, a, a_stride, b, c, c_row, none);
}

}  // namespace
}  // namespace mmdcn
