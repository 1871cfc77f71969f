// The corners of located samples as rows of channels: their addresses, in channels-last memory, and
// their weights.
#pragma once

#include <cstdint>

#include "../sampling.h"
#include "simd.h"

namespace mmdcn {

// A window on the rows of one image, as channels-last pixels, that rolls down the image: row y is
// in slot number y mod capacity. A channels-last image is a window by itself, which does not roll.
template <typename S>
struct RowWindow {
  S* data;
  int64_t pixel_stride, row_stride, capacity;
  int64_t begin, end;   // rows in the window
  int64_t left, right;  // columns in the window
  int64_t origin;       // the largest multiple of capacity up to begin

  MMDCN_HOST_DEVICE bool has(int64_t y, int64_t x) const {
    return y >= begin && y < end && x >= left && x < right;
  }
  // Row y, which must be in the window, from column `left` on.
  MMDCN_HOST_DEVICE S* row(int64_t y) const {
    const int64_t slot = y - origin;
    return data + (slot < capacity ? slot : slot - capacity) * row_stride;
  }
  MMDCN_HOST_DEVICE void set_rows(int64_t first, int64_t last) {
    begin = first;
    end = last;
    origin = first - first % capacity;
  }
};

namespace {

// A channels-last image as a window that has all of it.
template <typename S>
inline RowWindow<S> whole_image(S* image, int64_t height, int64_t width, int64_t channels) {
  return {image, channels, width * channels, height, 0, height, 0, width, 0};
}

// Samples, one array for each quantity.
template <typename A, int kMost>
struct Samples : CornerArrays<A, kMost> {
  A modulation[kMost];  // 0 of a sample that contributes nothing
};

// The addresses of the samples' corners; corners are numbered as in sampling.h.
template <int kMost>
struct CornerAddresses {
  uintptr_t corner[4][kMost];
  int32_t missing[kMost];  // whether a corner exists that is not in the window
};

// The samples' corners, with their weights times the modulation.
template <typename A, int kMost>
struct WeightedCorners {
  CornerAddresses<kMost> at;
  A weight[4][kMost];
};

// Sets the addresses of the corners' channels from `channel` on in `rows`, which is a window on an
// image of this size. A corner number q that does not exist is at `nowhere` + q · nowhere_stride.
// Returns whether any corner is missing.
template <typename S, typename A, int kMost>
inline bool set_corners(int64_t image_height, int64_t image_width, const RowWindow<S>& rows,
                        int64_t channel, const Samples<A, kMost>& samples, int64_t count,
                        const S* nowhere, int64_t nowhere_stride,
                        CornerAddresses<kMost>& addresses) {
  // Two loops, for numbers of 32 bits and of 64 bits, as loops that mix them are not vectorised
  // well.
  const int32_t begin = static_cast<int32_t>(rows.begin), left = static_cast<int32_t>(rows.left);
  const int32_t origin = static_cast<int32_t>(rows.origin);
  const int32_t capacity = static_cast<int32_t>(rows.capacity);
  const int32_t height = static_cast<int32_t>(image_height);
  const int32_t width = static_cast<int32_t>(image_width);
  const uint32_t shown_rows = static_cast<uint32_t>(rows.end - rows.begin);
  const uint32_t shown_columns = static_cast<uint32_t>(rows.right - rows.left);
  int32_t row[2][kMost], column[2][kMost];  // within the window; -1 where none exists
  int32_t any = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t y0 = samples.low_y[i], x0 = samples.low_x[i];
    const int32_t y1 = y0 + 1, x1 = x0 + 1;
    const int32_t top = exists(y0, height), bottom = exists(y1, height);
    const int32_t first = exists(x0, width), last = exists(x1, width);
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

// Whether both windows have the same rows and columns at the same distances.
template <typename S, typename A>
inline bool alike(const RowWindow<S>& one, const RowWindow<A>& other) {
  return one.pixel_stride == other.pixel_stride && one.row_stride == other.row_stride &&
         one.capacity == other.capacity && one.begin == other.begin && one.end == other.end &&
         one.left == other.left && one.right == other.right;
}

// Sets the addresses of what belongs to the corners: place(address) for one at `address`. Corners
// that are `nowhere` have the place sinks + q · sink_stride.
template <typename A, int kMost, typename Place>
inline void move_corners(const CornerAddresses<kMost>& source, int64_t count, const void* nowhere,
                         A* sinks, int64_t sink_stride, CornerAddresses<kMost>& target,
                         const Place& place) {
  const uintptr_t none = reinterpret_cast<uintptr_t>(nowhere);
  for (int q = 0; q < 4; ++q) {
    const uintptr_t sink = reinterpret_cast<uintptr_t>(sinks + q * sink_stride);
    const uintptr_t* from = source.corner[q];
    uintptr_t* to = target.corner[q];
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) to[i] = from[i] == none ? sink : place(from[i]);
  }
}

// The weights of the corners times the modulation.
template <typename A, int kMost>
inline void set_weights(const Samples<A, kMost>& samples, int64_t count, A (&weight)[4][kMost]) {
  for (int64_t i = 0; i < count; ++i) {
    const A high_y = samples.modulation[i] * samples.weight_y(1, i);
    const A low_y = samples.modulation[i] * samples.weight_y(0, i);
    const A high_x = samples.weight_x(1, i), low_x = samples.weight_x(0, i);
    weight[0][i] = low_y * low_x;
    weight[1][i] = low_y * high_x;
    weight[2][i] = high_y * low_x;
    weight[3][i] = high_y * high_x;
  }
}

}  // namespace
}  // namespace mmdcn
