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

// A right-hand side: element (k, j) of panel number q is data[q·panel_stride + k·row_stride + j].
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

// Panels of `depth` rows, one after the other.
template <typename A>
inline Panels<A> packed(const A* data, int64_t depth) {
  return {data, depth * kPanelWidth<A>, kPanelWidth<A>};
}

template <typename A>
inline int64_t packed_size(int64_t depth, int64_t columns) {
  return (columns + kPanelWidth<A> - 1) / kPanelWidth<A> * kPanelWidth<A> * depth;
}

// Whether C is added to, or overwritten.
enum class Into { kAdd, kSet };

// What a left-hand side is: element (i, k) is data[i·stride + k], or data[k·stride + i].
enum class Order { kRows, kColumns };

// One step of the depth for a register block. Elements are multiplied one by one.
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
// The same for pairs of bfloat16 along the depth: step k takes elements 2k and 2k + 1 of a row of
// A, and of B a row that holds the pair of each column.
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

// One step of the depth, of whatever kind the elements ask for.
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

// Other work that is done in pieces between the steps of a multiplication: multiplying keeps the
// arithmetic units busy and little else, so that loads and stores in between cost next to nothing.
// `wait` counts the steps until the next piece, and work() does it and sets `wait` anew.
struct NoWork {
  static constexpr bool kAny = false;
};

// The depth of a product, in parts of so many steps that lie apart in A and in B. For bfloat16, a
// step is a pair of elements; otherwise it is one.
struct Depth {
  int64_t steps, parts, a_part, b_part;
};

// One register block: Rows × Registers registers of C stay put while A and B stream by. Not
// inlined, so that all registers are its own.
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
  // Or else the registers are copied at both ends of the loops.
  if (steps < 1 || depth.parts < 1) __builtin_unreachable();
  for (int64_t part = 0; part < depth.parts; ++part) {
    int64_t k = 0;
    if constexpr (Work::kAny) {
      while (k + work.wait <= steps) {
        const int64_t until = k + work.wait;
        for (; k < until; ++k) multiply_once<Rows, Registers, order>(k, a, a_stride, b, b_row, sum);
        work.work();
      }
      work.wait -= steps - k;
    }
    for (; k < steps; ++k) multiply_once<Rows, Registers, order>(k, a, a_stride, b, b_row, sum);
    a += depth.a_part;
    b += depth.b_part;
  }
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < Registers; ++j) store_register(c + i * c_row + j * kLanes<A>, sum[i][j]);
  }
}

// The rows left over after whole register blocks: at most `Rows` of them.
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

// Steps that `multiply` takes in whole register blocks, in between which other work is done.
template <typename A>
inline int64_t whole_steps(int64_t rows, int64_t columns, const Depth& depth) {
  return rows / kBlockRows * ((columns + kLanes<A> - 1) / kPanelWidth<A>)*depth.steps * depth.parts;
}

// C (rows × columns) += or = A (rows × depth) · B (depth × columns). Rows of C are c_row apart and
// padded to whole registers.
template <Order order, Into into, typename L, typename A, typename Work>
inline void multiply(int64_t rows, int64_t columns, const Depth& depth, const L* a,
                     int64_t a_stride, Panels<L> b, A* c, int64_t c_row, Work& work) {
  for (int64_t first = 0, q = 0; first < columns; first += kPanelWidth<A>, ++q) {
    const L* panel = b.data + q * b.panel_stride;
    const bool wide = columns - first > kLanes<A>;
    for (int64_t i = 0; i < rows; i += kBlockRows) {
      const int64_t some = rows - i < kBlockRows ? rows - i : kBlockRows;
      const L* a_block = order == Order::kRows ? a + i * a_stride : a + i;
      A* c_block = c + i * c_row + first;
      if (wide && some == kBlockRows) {
        multiply_block<kBlockRows, 2, order, into>(depth, a_block, a_stride, panel, b.row_stride,
                                                   c_block, c_row, work);
      } else if (wide) {
        multiply_rows<kBlockRows - 1, 2, order, into>(some, depth, a_block, a_stride, panel,
                                                      b.row_stride, c_block, c_row);
      } else {
        multiply_rows<kBlockRows, 1, order, into>(some, depth, a_block, a_stride, panel,
                                                  b.row_stride, c_block, c_row);
      }
    }
  }
}

template <Order order, Into into, typename L, typename A>
inline void multiply(int64_t rows, int64_t columns, int64_t steps, const L* a, int64_t a_stride,
                     Panels<L> b, A* c, int64_t c_row) {
  NoWork none;
  multiply<order, into>(rows, columns, {steps, 1, 0, 0}, a, a_stride, b, c, c_row, none);
}

}  // namespace
}  // namespace mmdcn
