// Matrix products of bfloat16 on the tile registers of AMX: 16 rows of 64 bytes each, in which one
// instruction multiplies 16 × 32 elements by 32 × 16 and adds to 16 × 16 sums in float32.
#pragma once

#include "operands.h"

namespace mmdcn {
namespace {

#ifdef __AMX_BF16__
constexpr bool kHasTiles = true;
#else
constexpr bool kHasTiles = false;
#endif

// The rows of a tile, which are also the columns of a tile of sums, and the pairs of elements in a
// row of a tile of bfloat16.
constexpr int64_t kTileRows = 16;

// The steps of a multiplication that one instruction counts for, as other work is done between
// steps and takes less time than an instruction does.
constexpr int64_t kTileSteps = 4;

#ifdef __AMX_BF16__

// Shapes all tile registers of this thread as whole tiles while it lives. The instructions below
// need one.
class TileRegisters {
 public:
  TileRegisters() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; ++i) {
      shape.row_bytes[i] = 64;
      shape.rows[i] = kTileRows;
    }
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~TileRegisters() { asm volatile("tilerelease" ::: "memory"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// Written in assembly, as GCC 12 does not know that its intrinsic reads memory. Rows are `stride`
// bytes apart.
template <int tile>
inline void load_tile(const void* source, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(source), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
inline void store_tile_to(void* target, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(target), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
// sums += left · right, where row k of `right` has elements 2k and 2k + 1 of each of its columns.
template <int sums, int left, int right>
inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(left), "i"(right));
}

// Does the other work that is due after so many instructions of a multiplication.
template <typename Work>
inline void work_between(int64_t instructions, Work& work) {
  if constexpr (Work::kAny) {
    work.wait -= instructions * kTileSteps;
    while (work.wait <= 0) {
      const int64_t late = work.wait;
      work.work();
      work.wait += late;
    }
  }
}

// One block of Rows × Columns tiles of C (1 or 2 each), which stay in tiles 0 to 3 while tiles of A
// and B stream through 4 to 7. See multiply() in matmul.h for the rest; strides are in elements.
template <int Rows, int Columns, Into into, typename Work>
__attribute__((noinline)) void multiply_tile_block(const Depth& depth, const BFloat16* a,
                                                   int64_t a_stride, const BFloat16* b,
                                                   int64_t b_row, float* c, int64_t c_row,
                                                   Work& work) {
  constexpr bool low = Rows == 2, right = Columns == 2;
  const int64_t a_bytes = a_stride * 2, b_bytes = b_row * 4, c_bytes = c_row * 4;
  float* c_low = c + kTileRows * c_row;
  if constexpr (into == Into::kAdd) {
    load_tile<0>(c, c_bytes);
    if constexpr (right) load_tile<1>(c + kTileRows, c_bytes);
    if constexpr (low) load_tile<2>(c_low, c_bytes);
    if constexpr (low && right) load_tile<3>(c_low + kTileRows, c_bytes);
  } else {
    zero_tile<0>();
    if constexpr (right) zero_tile<1>();
    if constexpr (low) zero_tile<2>();
    if constexpr (low && right) zero_tile<3>();
  }
  for (int64_t segment = 0; segment < depth.segments; ++segment) {
    for (int64_t k = 0; k < depth.steps; k += kTileRows) {
      const BFloat16* left_tile = a + 2 * k;
      const BFloat16* right_tile = b + 2 * k * b_row;
      load_tile<4>(left_tile, a_bytes);
      load_tile<6>(right_tile, b_bytes);
      if constexpr (right) load_tile<7>(right_tile + 2 * kTileRows, b_bytes);
      if constexpr (low) load_tile<5>(left_tile + kTileRows * a_stride, a_bytes);
      multiply_tiles<0, 4, 6>();
      if constexpr (right) multiply_tiles<1, 4, 7>();
      if constexpr (low) multiply_tiles<2, 5, 6>();
      if constexpr (low && right) multiply_tiles<3, 5, 7>();
      work_between(Rows * Columns, work);
    }
    a += depth.a_segment;
    b += depth.b_segment;
  }
  store_tile_to<0>(c, c_bytes);
  if constexpr (right) store_tile_to<1>(c + kTileRows, c_bytes);
  if constexpr (low) store_tile_to<2>(c_low, c_bytes);
  if constexpr (low && right) store_tile_to<3>(c_low + kTileRows, c_bytes);
}

// multiply() of matmul.h for bfloat16. The rows of A and C are padded to whole tiles, and so are
// the steps of the depth, with zeros.
template <Into into, typename Work>
inline void multiply_in_tiles(int64_t rows, int64_t columns, const Depth& depth, const BFloat16* a,
                              int64_t a_stride, Panels<BFloat16> b, float* c, int64_t c_row,
                              Work& work) {
  constexpr int64_t width = 2 * kTileRows;
  for (int64_t first = 0, q = 0; first < columns; first += width, ++q) {
    const BFloat16* panel = b.data + q * b.panel_stride;
    const bool wide = columns - first > kTileRows;
    for (int64_t i = 0; i < rows; i += 2 * kTileRows) {
      const bool high = rows - i > kTileRows;
      const auto block = high ? (wide ? multiply_tile_block<2, 2, into, Work>
                                      : multiply_tile_block<2, 1, into, Work>)
                              : (wide ? multiply_tile_block<1, 2, into, Work>
                                      : multiply_tile_block<1, 1, into, Work>);
      block(depth, a + i * a_stride, a_stride, panel, b.row_stride, c + i * c_row + first, c_row,
            work);
    }
  }
}

#endif

// What a thread holds while it multiplies elements of type L.
struct NoTileRegisters {};
#ifdef __AMX_BF16__
template <typename L>
using RegistersFor =
    std::conditional_t<std::is_same_v<L, BFloat16>, TileRegisters, NoTileRegisters>;
#else
template <typename L>
using RegistersFor = NoTileRegisters;
#endif

}  // namespace
}  // namespace mmdcn
