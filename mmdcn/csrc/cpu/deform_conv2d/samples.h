// What the forward and the backward kernels of deform_conv2d share: tiles of output pixels, the
// windows on images around them, and where the samples of a tile lie.
#pragma once

#include <algorithm>

#include "../transpose.h"
#include "kernel.h"
#include "weight_rows.h"

namespace mmdcn {
namespace {

// Up to so many channels of an offset group are sampled one by one, straight from the planes.
constexpr int64_t kPlanarChannels = 4;

// A window may reach so far beyond the regular grid, and takes about so many bytes at most.
constexpr int64_t kMargin = 8;
constexpr int64_t kWindowBytes = 2 << 20;

inline bool is_planar(const DeformConv2dShape& shape) {
  return shape.deform_group_channels() <= kPlanarChannels;
}

// Memory handed out piece by piece, at the borders of cache lines.
class Arena {
 public:
  explicit Arena(std::byte* memory) : memory_(memory) {}

  template <typename E>
  E* take(int64_t count) {
    E* piece = reinterpret_cast<E*>(memory_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(E)) + 63) / 64 * 64;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  std::byte* memory_;
  int64_t used_ = 0;
};

// Rows of channels lie this far apart in scratch memory: an odd number of cache lines, so that the
// rows of a register block do not compete for the same cache set.
template <typename E>
inline int64_t row_stride(int64_t channels) {
  const int64_t line = 64 / static_cast<int64_t>(sizeof(E));
  return ((channels + line - 1) / line | 1) * line;
}

template <typename E>
inline void fill_zero(E* target, int64_t count) {
  std::memset(target, 0, count * sizeof(E));
}

// Copies a row, converting; one of the two is of the accumulator's type A.
template <typename A, typename S, typename T>
inline void copy_row(const S* source, int64_t count, T* target) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) {
    store_register(target + i, load_register(source + i));
  }
  for (; i < count; ++i) store(target + i, load(source + i));
}

// ------------------------------------------------------------------------------ tiles

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

// Leaves of a tile only its pixels [begin, end), as far as there are such.
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

// ------------------------------------------------------------------------------ windows

// Rows of the input that the regular grid of output rows [first, last] reads, corners included.
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
    // Without room for more than the grid itself, what lies off it is read from the planes.
    plan.rows = std::clamp(fitting, std::min(shape.height, rows), wanted);
    break;
  }
  plan.strips = (shape.out_width + plan.strip_width - 1) / plan.strip_width;
  return plan;
}

// One strip and no window.
inline WindowPlan no_windows(const DeformConv2dShape& shape) { return {shape.out_width, 1, 0, 0}; }

struct WindowRange {
  int64_t begin, end, left, right;
};

// The part of the input that the window should show around a tile, for windows of `capacity` rows
// and at most `columns` columns.
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
inline Rows<A> empty_window(A* data, int64_t channels, int64_t capacity, int64_t columns) {
  const int64_t pixel = (channels + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
  return {data, pixel, pixel * columns, capacity, 0, 0, 0, 0, 0};
}

template <typename A>
inline int64_t window_size(int64_t channels, int64_t capacity, int64_t columns) {
  return (channels + kLanes<A> - 1) / kLanes<A> * kLanes<A> * capacity * columns;
}

// All of a channels-last image.
template <typename T>
inline Rows<const T> whole_image(const DeformConv2dShape& shape, const T* image) {
  return {image,
          shape.channels,
          shape.width * shape.channels,
          shape.height,
          0,
          shape.height,
          0,
          shape.width,
          0};
}

// Shows rows of an image whose channels lie in planes, of which the window holds `channels`.
template <typename T, typename A>
inline void roll_input(const DeformConv2dShape& shape, const WindowRange& range, const T* planes,
                       int64_t channels, Rows<A>& window) {
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

// Adds rows of the gradient to that of the image.
template <typename T, typename A>
inline void flush_gradient(const DeformConv2dShape& shape, const Rows<A>& window, int64_t begin,
                           int64_t end, T* image, ImageLayout layout, int64_t channels) {
  const int64_t columns = window.right - window.left;
  for (int64_t y = begin; y < end; ++y) {
    const A* row = window.row(y);
    T* target = image + (y * shape.width + window.left) * layout.pixel_stride;
    if (!layout.channels_last()) {
      transpose<A, true>(row, window.pixel_stride, columns, channels, target,
                         layout.channel_stride);
      continue;
    }
    // Only windows that hold all of the image are of a channels-last one: each pixel comes once.
    for (int64_t x = 0; x < columns; ++x) {
      copy_row<A>(row + x * window.pixel_stride, channels, target + x * layout.pixel_stride);
    }
  }
}

// Moves the window on the gradient: what leaves it is added to the image, what enters is zero.
template <typename T, typename A>
inline void roll_gradient(const DeformConv2dShape& shape, const WindowRange& range, T* image,
                          ImageLayout layout, int64_t channels, Rows<A>& window) {
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

// ------------------------------------------------------------------------------ samples

// The samples of a tile for one tap and one offset group, one array for each quantity.
template <typename A, int kMost>
struct Samples {
  static constexpr int32_t kNowhere = -2;  // neither this row nor the next exists

  int32_t low_y[kMost], low_x[kMost];  // floor of the coordinates; kNowhere: contributes nothing
  A fraction_y[kMost], fraction_x[kMost];
  A modulation[kMost];  // 0 for what contributes nothing
};

// Where the offsets and modulations of some offset groups are read for a tile: a row of pixels for
// each channel, either of all the image or, staged, of the tile.
template <typename A>
struct PointRows {
  const A* offset;
  const A* mask;
  int64_t offset_stride, mask_stride;  // from channel to channel
  int64_t first_group, rows;           // rows: of the mask
  bool staged;

  int64_t row(const DeformConv2dShape& shape, int64_t d, int64_t tap) const {
    return (d - first_group) * shape.taps() + tap;
  }
};

// Elements of memory that staging takes for `groups` offset groups.
template <int kMost, typename A>
inline int64_t staged_size(const DeformConv2dShape& shape, const PointTensor<A>& offset,
                           const PointTensor<A>& mask, int64_t groups) {
  return offset.in_planes() && mask.in_planes() ? 0 : 3 * groups * shape.taps() * kMost;
}

// Channels [first, first + count) of a tile's points, as rows of pixels.
template <int kMost, typename A>
inline void stage(const Tile<kMost>& tile, const PointTensor<A>& points, int64_t first,
                  int64_t count, A* rows) {
  for (int64_t r = 0; r < tile.runs; ++r) {
    const auto& run = tile.run[r];
    const A* source = points.data + first * points.channel_stride + run.pixel * points.pixel_stride;
    A* target = rows + run.first;
    if (!points.in_planes()) {
      transpose<A>(source, points.pixel_stride, run.count, count, target, kMost);
      continue;
    }
    for (int64_t c = 0; c < count; ++c) {
      copy_row<A>(source + c * points.channel_stride, run.count, target + c * kMost);
    }
  }
}

// The rows of offset groups [first, first + groups) of one image; `memory` has staged_size elements
// for them.
template <int kMost, typename A>
inline PointRows<A> point_rows(const DeformConv2dShape& shape, const Tile<kMost>& tile,
                               const PointTensor<A>& offset, const PointTensor<A>& mask,
                               int64_t first, int64_t groups, A* memory) {
  const int64_t skipped = first * shape.taps(), rows = groups * shape.taps();
  if (offset.in_planes() && mask.in_planes()) {
    return {offset.data + 2 * skipped * offset.channel_stride,
            mask.data ? mask.data + skipped * mask.channel_stride : nullptr,
            offset.channel_stride,
            mask.channel_stride,
            first,
            rows,
            false};
  }
  A* mask_memory = memory + 2 * rows * kMost;
  stage(tile, offset, 2 * skipped, 2 * rows, memory);
  if (mask.data) stage(tile, mask, skipped, rows, mask_memory);
  return {memory, mask.data ? mask_memory : nullptr, kMost, kMost, first, rows, true};
}

template <typename A, int kMost>
inline void locate_samples(const DeformConv2dShape& shape, const Tile<kMost>& tile,
                           const PointRows<A>& points, int64_t d, int64_t tap,
                           Samples<A, kMost>& samples) {
  const int64_t row = points.row(shape, d, tap);
  const A tap_y = A(shape.y.base(0, tap / shape.kernel_width));
  const A tap_x = A(shape.x.base(0, tap % shape.kernel_width));
  const int64_t height = shape.height, width = shape.width;
  const A stride_y = A(shape.y.stride), stride_x = A(shape.x.stride);
  for (int64_t r = 0; r < tile.runs; ++r) {
    const int64_t first = tile.run[r].first, count = tile.run[r].count;
    const int64_t place = points.staged ? first : tile.run[r].pixel;
    const A* offset_y = points.offset + 2 * row * points.offset_stride + place;
    const A* offset_x = offset_y + points.offset_stride;
    const A* mask = points.mask ? points.mask + row * points.mask_stride + place : nullptr;
    for (int64_t j = 0; j < count; ++j) samples.modulation[first + j] = mask ? mask[j] : A(1);
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j) {
      const int64_t i = first + j;
      const A p_y = A(tile.y[i]) * stride_y + tap_y + offset_y[j];
      const A p_x = A(tile.x[i]) * stride_x + tap_x + offset_x[j];
      const bool there = reaches(p_y, height) & reaches(p_x, width);
      int32_t low_y, low_x;
      split(there ? p_y : A(0), low_y, samples.fraction_y[i]);
      split(there ? p_x : A(0), low_x, samples.fraction_x[i]);
      samples.low_y[i] = there ? low_y : samples.kNowhere;
      samples.low_x[i] = low_x;
      samples.modulation[i] = there ? samples.modulation[i] : A(0);
    }
  }
}

// Asks for the offsets and the modulation of one of the rows, if there is such a row: it lies too
// far away for the processor to guess.
template <typename A, int kMost>
inline void prefetch_points(const Tile<kMost>& tile, const PointRows<A>& points, int64_t row) {
  if (points.staged || row >= points.rows) return;
  constexpr int64_t line = 64 / sizeof(A);
  for (int64_t r = 0; r < tile.runs; ++r) {
    const A* offset = points.offset + 2 * row * points.offset_stride + tile.run[r].pixel;
    for (int64_t j = 0; j < tile.run[r].count; j += line) {
      __builtin_prefetch(offset + j);
      __builtin_prefetch(offset + points.offset_stride + j);
    }
    if (points.mask == nullptr) continue;
    const A* mask = points.mask + row * points.mask_stride + tile.run[r].pixel;
    for (int64_t j = 0; j < tile.run[r].count; j += line) __builtin_prefetch(mask + j);
  }
}

// Where the channels of the corners of a tile's samples lie, in the order of Corners.
template <int kMost>
struct CornerAddresses {
  uintptr_t corner[4][kMost];
  int32_t missing[kMost];  // whether a corner exists that the rows do not show
};

// Addresses in `rows`, `channel` channels further on. Where a corner does not exist, corner number
// q is at `nowhere` + q · nowhere_stride. Returns whether any corner is missing.
template <typename S, typename A, int kMost>
inline bool set_corners(const DeformConv2dShape& shape, const Rows<S>& rows, int64_t channel,
                        const Samples<A, kMost>& samples, int64_t count, const S* nowhere,
                        int64_t nowhere_stride, CornerAddresses<kMost>& addresses) {
  // First what has 32 bits, then what has 64: the latter is half as wide a register's worth.
  const int32_t begin = static_cast<int32_t>(rows.begin), left = static_cast<int32_t>(rows.left);
  const int32_t origin = static_cast<int32_t>(rows.origin);
  const int32_t capacity = static_cast<int32_t>(rows.capacity);
  const uint32_t height = static_cast<uint32_t>(shape.height);
  const uint32_t width = static_cast<uint32_t>(shape.width);
  const uint32_t shown_rows = static_cast<uint32_t>(rows.end - rows.begin);
  const uint32_t shown_columns = static_cast<uint32_t>(rows.right - rows.left);
  int32_t row[2][kMost], column[2][kMost];  // within `rows`; -1 where there is none
  int32_t any = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t y0 = samples.low_y[i], x0 = samples.low_x[i];
    const int32_t y1 = y0 + 1, x1 = x0 + 1;
    // A single comparison, as negative numbers become large ones.
    const int32_t top = uint32_t(y0) < height, bottom = uint32_t(y1) < height;
    const int32_t first = uint32_t(x0) < width, last = uint32_t(x1) < width;
    const int32_t missing = (top & int32_t(uint32_t(y0 - begin) >= shown_rows)) |
                            (bottom & int32_t(uint32_t(y1 - begin) >= shown_rows)) |
                            (first & int32_t(uint32_t(x0 - left) >= shown_columns)) |
                            (last & int32_t(uint32_t(x1 - left) >= shown_columns));
    addresses.missing[i] = missing;
    any |= missing;
    const int32_t upper = y0 - origin - (y0 - origin >= capacity ? capacity : 0);
    const int32_t lower = y1 - origin - (y1 - origin >= capacity ? capacity : 0);
    row[0][i] = top ? upper : -1;
    row[1][i] = bottom ? lower : -1;
    column[0][i] = first ? x0 - left : -1;
    column[1][i] = last ? x1 - left : -1;
  }
  const int64_t row_bytes = rows.row_stride * sizeof(S);
  const int64_t pixel_bytes = rows.pixel_stride * sizeof(S);
  const uintptr_t base = reinterpret_cast<uintptr_t>(rows.data + channel);
  const uintptr_t none = reinterpret_cast<uintptr_t>(nowhere);
  const uintptr_t step = nowhere_stride * sizeof(S);
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const int64_t y0 = row[0][i], y1 = row[1][i], x0 = column[0][i], x1 = column[1][i];
    const uintptr_t upper = base + y0 * row_bytes, lower = base + y1 * row_bytes;
    const uintptr_t before = x0 * pixel_bytes, after = x1 * pixel_bytes;
    addresses.corner[0][i] = (y0 | x0) < 0 ? none : upper + before;
    addresses.corner[1][i] = (y0 | x1) < 0 ? none + step : upper + after;
    addresses.corner[2][i] = (y1 | x0) < 0 ? none + 2 * step : lower + before;
    addresses.corner[3][i] = (y1 | x1) < 0 ? none + 3 * step : lower + after;
  }
  return any != 0;
}

// The weights of the corners, with the modulation.
template <typename A, int kMost>
inline void set_weights(const Samples<A, kMost>& samples, int64_t count, A (&weight)[4][kMost]) {
  for (int64_t i = 0; i < count; ++i) {
    const A high_y = samples.modulation[i] * samples.fraction_y[i];
    const A low_y = samples.modulation[i] * (A(1) - samples.fraction_y[i]);
    const A high_x = samples.fraction_x[i], low_x = A(1) - high_x;
    weight[0][i] = low_y * low_x;
    weight[1][i] = low_y * high_x;
    weight[2][i] = high_y * low_x;
    weight[3][i] = high_y * high_x;
  }
}

// The corners of sample number i as Corners has them; false where it contributes nothing.
template <typename A, int kMost>
inline bool corners_of(const DeformConv2dShape& shape, const Samples<A, kMost>& samples, int64_t i,
                       Corners<A, 2>& corners) {
  if (samples.low_y[i] == samples.kNowhere) return false;
  const int64_t low[2] = {samples.low_y[i], samples.low_x[i]};
  const A fraction[2] = {samples.fraction_y[i], samples.fraction_x[i]};
  const int64_t size[2] = {shape.height, shape.width};
  corners.fill(low, fraction, size);
  return true;
}

// The corners of a tile's samples for reading channel by channel: positions, in elements of a plane
// whose pixels are pixel_stride apart, and weights with the modulation. A corner that does not
// exist weighs 0, at the position of one that does.
template <typename A, int kMost>
inline void set_planar_corners(const DeformConv2dShape& shape, const Samples<A, kMost>& samples,
                               int64_t count, int64_t pixel_stride, int64_t (&position)[4][kMost],
                               A (&weight)[4][kMost]) {
  const int32_t bottom = static_cast<int32_t>(shape.height) - 1;
  const int32_t right = static_cast<int32_t>(shape.width) - 1;
  // First what has 32 bits, then what has 64: loops that mix them are not vectorised.
  int32_t y[kMost], x[kMost], down[kMost], along[kMost];
  for (int64_t i = 0; i < count; ++i) {
    const int32_t low_y = samples.low_y[i] == samples.kNowhere ? 0 : samples.low_y[i];
    const int32_t low_x = samples.low_x[i];
    y[i] = low_y >= 0 ? low_y : 0;
    x[i] = low_x >= 0 ? low_x : 0;
    down[i] = low_y < 0 ? 0 : low_y < bottom ? 1 : 0;
    along[i] = low_x < 0 ? 0 : low_x < right ? 1 : 0;
    const A modulation = samples.modulation[i];
    const A fraction_y = samples.fraction_y[i], fraction_x = samples.fraction_x[i];
    const A upper = low_y >= 0 ? modulation * (A(1) - fraction_y) : A(0);
    const A lower = low_y < bottom ? modulation * fraction_y : A(0);
    const A first = low_x >= 0 ? A(1) - fraction_x : A(0);
    const A last = low_x < right ? fraction_x : A(0);
    weight[0][i] = upper * first;
    weight[1][i] = upper * last;
    weight[2][i] = lower * first;
    weight[3][i] = lower * last;
  }
  const int64_t row = shape.width * pixel_stride;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t corner = y[i] * row + x[i] * pixel_stride;
    const int64_t next = along[i] * pixel_stride, below = down[i] * row;
    position[0][i] = corner;
    position[1][i] = corner + next;
    position[2][i] = corner + below;
    position[3][i] = corner + below + next;
  }
}

}  // namespace
}  // namespace mmdcn
