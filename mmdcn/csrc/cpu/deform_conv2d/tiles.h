// The tiles of output pixels that an image is divided into, and the pixels of each.
#pragma once

#include <algorithm>

#include "kernel.h"

namespace mmdcn {
namespace {

inline int64_t tiles_of_strip(const DeformConv2dShape& shape, int64_t width, int64_t most) {
  return (shape.out_height * width + most - 1) / most;
}

inline int64_t tiles_of_image(const DeformConv2dShape& shape, const WindowPlan& plan,
                              int64_t most) {
  const int64_t last = shape.out_width - (plan.strips - 1) * plan.strip_width;
  return (plan.strips - 1) * tiles_of_strip(shape, plan.strip_width, most) +
         tiles_of_strip(shape, last, most);
}

template <int kMost>
inline void set_tile(const DeformConv2dShape& shape, const WindowPlan& plan, int64_t index,
                     Tile<kMost>& tile) {
  const int64_t per_strip = tiles_of_strip(shape, plan.strip_width, kMost);
  const int64_t strip = std::min(index / per_strip, plan.strips - 1);
  const int64_t left = strip * plan.strip_width;
  const int64_t width = std::min(plan.strip_width, shape.out_width - left);
  const int64_t start = (index - strip * per_strip) * kMost;
  tile.count = std::min<int64_t>(kMost, width * shape.out_height - start);
  tile.runs = 0;
  int64_t y = start / width, x = left + start % width;
  for (int64_t i = 0; i < tile.count; ++i) {
    tile.y[i] = static_cast<int32_t>(y);
    tile.x[i] = static_cast<int32_t>(x);
    const int64_t pixel = y * shape.out_width + x;
    if (i == 0 || tile.run[tile.runs - 1].pixel + tile.run[tile.runs - 1].count != pixel) {
      tile.run[tile.runs++] = {i, 0, pixel};
    }
    ++tile.run[tile.runs - 1].count;
    if (++x == left + width) {
      x = left;
      ++y;
    }
  }
}

// Reduces a tile to those of its pixels that are in [begin, end).
template <int kMost>
inline void crop(Tile<kMost>& tile, int64_t begin, int64_t end) {
  begin = std::max<int64_t>(begin, 0);
  end = std::min(end, tile.count);
  if (begin == 0 && end == tile.count) return;
  const int64_t runs = tile.runs;
  tile.count = tile.runs = 0;
  for (int64_t r = 0; r < runs; ++r) {
    const auto [first, count, pixel] = tile.run[r];
    const int64_t from = std::max(first, begin), to = std::min(first + count, end);
    if (from >= to) continue;
    std::copy(tile.y + from, tile.y + to, tile.y + tile.count);
    std::copy(tile.x + from, tile.x + to, tile.x + tile.count);
    tile.run[tile.runs++] = {tile.count, to - from, pixel + from - first};
    tile.count += to - from;
  }
}

}  // namespace
}  // namespace mmdcn
