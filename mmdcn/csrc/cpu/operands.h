// The operands of matrix products C += A · B, their depth, and the work that is done meanwhile. B
// lies in panels of two registers' width.
#pragma once

#include "simd.h"

namespace mmdcn {
namespace {

template <typename A>
constexpr int64_t kPanelWidth = 2 * kLanes<A>;

// The columns of B and C are padded to whole registers.
template <typename A>
inline int64_t padded(int64_t columns) {
  return (columns + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// A matrix B: element (k, j) of panel number q is data[q·panel_stride + k·row_stride + j].
template <typename A>
struct Panels {
  const A* data;
  int64_t panel_stride;
  int64_t row_stride;
};

// A row-major matrix as panels, of which each has some columns of every row.
template <typename A>
inline Panels<A> row_major(const A* data, int64_t row_stride) {
  return {data, kPanelWidth<A>, row_stride};
}

// Packed panels of `depth` rows, which follow one another.
template <typename A>
inline Panels<A> packed(const A* data, int64_t depth) {
  return {data, depth * kPanelWidth<A>, kPanelWidth<A>};
}

// Elements of a packed matrix.
template <typename A>
inline int64_t packed_size(int64_t depth, int64_t columns) {
  return (columns + kPanelWidth<A> - 1) / kPanelWidth<A> * kPanelWidth<A> * depth;
}

// Whether C is added to, or overwritten.
enum class Into { kAdd, kSet };

// The order of A: element (i, k) is data[i·stride + k], or data[k·stride + i].
enum class Order { kRows, kColumns };

// No other work between the steps of a multiplication. A multiplication leaves the units that load
// and store almost idle, so other loads and stores cost next to nothing when they are done in
// pieces between its steps. A class for such work has kAny = true; `wait`, the number of steps
// until the next piece; and work(), which does the piece and sets `wait` again.
struct NoWork {
  static constexpr bool kAny = false;
};

// The depth of a product: segments of `steps` steps each, which begin every a_segment elements in A
// and every b_segment in B. For bfloat16 a step is a pair of elements, otherwise one element.
struct Depth {
  int64_t steps, segments, a_segment, b_segment;
};

}  // namespace
}  // namespace mmdcn
