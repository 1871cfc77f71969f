// Windows of channels-last rows on images whose channels lie in planes, and on their gradients.
#pragma once

#include <algorithm>

#include "../rows.h"
#include "../transpose.h"
#include "kernel.h"

namespace mmdcn {
namespace {

// The pixels that a window reaches beyond the regular grid on each side, and its bytes, at most.
constexpr int64_t kMargin = 8;
constexpr int64_t kWindowBytes = 2 << 20;

// Rows, or columns, of the input that the regular grid of so many outputs reads, corners included.
inline int64_t grid_extent(const GridAxis& axis, int64_t kernel, int64_t outputs) {
  return (outputs - 1) * axis.stride + (kernel - 1) * axis.dilation + 2;
}

// The plan for windows of `channels` channels of type A.
template <typename A>
inline WindowPlan plan_windows(const DeformConv2dShape& shape, int64_t channels, int64_t most) {
  WindowPlan plan = {};
  for (plan.strips = 1;; ++plan.strips) {
    plan.strip_width = (shape.out_width + plan.strips - 1) / plan.strips;
    const int64_t tile_rows = std::min(shape.out_height, (most - 2) / plan.strip_width + 2);
    const int64_t rows = grid_extent(shape.y, shape.kernel_height, tile_rows);
    const int64_t columns = grid_extent(shape.x, shape.kernel_width, plan.strip_width);
    plan.columns = std::min(shape.width, plan.strips == 1 ? shape.width : columns + 2 * kMargin);
    const int64_t fitting =
        kWindowBytes / (plan.columns * channels * static_cast<int64_t>(sizeof(A)));
    const int64_t wanted = std::min(shape.height, rows + 2 * kMargin);
    if (fitting < wanted && plan.strip_width > 32) continue;
    // If there is room for the grid only, corners outside it are read from the planes.
    plan.rows = std::clamp(fitting, std::min(shape.height, rows), wanted);
    break;
  }
  plan.strips = (shape.out_width + plan.strip_width - 1) / plan.strip_width;
  return plan;
}

// The plan for one strip and no window.
inline WindowPlan no_windows(const DeformConv2dShape& shape) { return {shape.out_width, 1, 0, 0}; }

struct WindowRange {
  int64_t begin, end, left, right;
};

// The range of the input that the window should have for a tile, around its grid, for a window of
// `capacity` rows and at most `columns` columns.
template <int kMost>
inline WindowRange range_around(const DeformConv2dShape& shape, const Tile<kMost>& tile,
                                const WindowPlan& plan, int64_t capacity, int64_t columns) {
  const int64_t top = shape.y.base(tile.y[0], 0);
  const int64_t bottom = shape.y.base(tile.y[tile.count - 1], shape.kernel_height - 1) + 2;
  WindowRange range = {};
  range.begin = std::clamp<int64_t>((top + bottom - capacity) / 2, 0, shape.height - capacity);
  range.end = range.begin + capacity;
  const int64_t strip = tile.x[0] / plan.strip_width * plan.strip_width;
  range.left = std::clamp<int64_t>(shape.x.base(strip, 0) - kMargin, 0, shape.width - columns);
  range.right = range.left + columns;
  return range;
}

template <typename A>
inline RowWindow<A> empty_window(A* data, int64_t channels, int64_t capacity, int64_t columns) {
  const int64_t pixel = (channels + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
  return {data, pixel, pixel * columns, capacity, 0, 0, 0, 0, 0};
}

template <typename A>
inline int64_t window_size(int64_t channels, int64_t capacity, int64_t columns) {
  return (channels + kLanes<A> - 1) / kLanes<A> * kLanes<A> * capacity * columns;
}

// Moves a window on an image, of `channels` channels in planes, to a range: rows that enter it are
// transposed from the planes.
template <typename T, typename A>
inline void roll_input(const DeformConv2dShape& shape, const WindowRange& range, const T* planes,
                       int64_t channels, RowWindow<A>& window) {
  const bool elsewhere = range.left != window.left || range.right != window.right ||
                         range.begin < window.begin || range.begin > window.end;
  const int64_t first = elsewhere ? range.begin : window.end;
  window.left = range.left;
  window.right = range.right;
  window.set_rows(range.begin, range.end);
  for (int64_t y = first; y < range.end; ++y) {
    transpose<A>(planes + y * shape.width + range.left, shape.height * shape.width, channels,
                 range.right - range.left, window.row(y), window.pixel_stride);
  }
}

// Adds rows [begin, end) of a window on the gradient to the gradient of the image.
template <typename T, typename A>
inline void flush_gradient(const DeformConv2dShape& shape, const RowWindow<A>& window,
                           int64_t begin, int64_t end, T* image, ImageLayout layout,
                           int64_t channels) {
  const int64_t columns = window.right - window.left;
  for (int64_t y = begin; y < end; ++y) {
    const A* row = window.row(y);
    T* target = image + (y * shape.width + window.left) * layout.pixel_stride;
    if (!layout.channels_last()) {
      transpose<A, true>(row, window.pixel_stride, columns, channels, target,
                         layout.channel_stride);
      continue;
    }
    // Windows on a channels-last gradient hold all of it, so each pixel is stored once, not added.
    for (int64_t x = 0; x < columns; ++x) {
      copy_row<A>(row + x * window.pixel_stride, channels, target + x * layout.pixel_stride);
    }
  }
}

// Moves a window on the gradient to a range: rows that leave it are added to the gradient of the
// image, rows that enter it begin with zeros.
template <typename T, typename A>
inline void roll_gradient(const DeformConv2dShape& shape, const WindowRange& range, T* image,
                          ImageLayout layout, int64_t channels, RowWindow<A>& window) {
  const bool elsewhere = range.left != window.left || range.right != window.right ||
                         range.begin < window.begin || range.begin > window.end;
  flush_gradient(shape, window, window.begin, elsewhere ? window.end : range.begin, image, layout,
                 channels);
  const int64_t first = elsewhere ? range.begin : window.end;
  window.left = range.left;
  window.right = range.right;
  window.set_rows(range.begin, range.end);
  for (int64_t y = first; y < range.end; ++y) fill_zero(window.row(y), window.row_stride);
}

}  // namespace
}  // namespace mmdcn
