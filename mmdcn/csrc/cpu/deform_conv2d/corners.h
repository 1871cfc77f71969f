// The corners of a tile's samples: their addresses and their weights.
#pragma once

#include <cstdint>

#include "samples.h"

namespace mmdcn {
namespace {

// The addresses of the corners of a tile's samples; corners are numbered as in sampling.h.
template <int kMost>
struct CornerAddresses {
  uintptr_t corner[4][kMost];
  int32_t missing[kMost];  // whether a corner exists that is not in the window
};

// Sets the addresses of the corners' channels from `channel` on in `rows`. A corner number q that
// does not exist is at `nowhere` + q · nowhere_stride. Returns whether any corner is missing.
template <typename S, typename A, int kMost>
inline bool set_corners(const DeformConv2dShape& shape, const RowWindow<S>& rows, int64_t channel,
                        const Samples<A, kMost>& samples, int64_t count, const S* nowhere,
                        int64_t nowhere_stride, CornerAddresses<kMost>& addresses) {
  // Two loops, for numbers of 32 bits and of 64 bits, as loops that mix them are not vectorised
  // well.
  const int32_t begin = static_cast<int32_t>(rows.begin), left = static_cast<int32_t>(rows.left);
  const int32_t origin = static_cast<int32_t>(rows.origin);
  const int32_t capacity = static_cast<int32_t>(rows.capacity);
  const int32_t height = static_cast<int32_t>(shape.height);
  const int32_t width = static_cast<int32_t>(shape.width);
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

// The corners of sample number i as Corners. Returns false if the sample contributes nothing.
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
// whose pixels are pixel_stride apart, and weights times the modulation. A corner that does not
// exist has a weight of 0 and the position of one that does.
template <typename A, int kMost>
inline void set_planar_corners(const DeformConv2dShape& shape, const Samples<A, kMost>& samples,
                               int64_t count, int64_t pixel_stride, int64_t (&position)[4][kMost],
                               A (&weight)[4][kMost]) {
  const int32_t height = static_cast<int32_t>(shape.height);
  const int32_t width = static_cast<int32_t>(shape.width);
  // Two loops, for numbers of 32 bits and of 64 bits, as loops that mix them are not vectorised.
  int32_t y[kMost], x[kMost], down[kMost], along[kMost];
  for (int64_t i = 0; i < count; ++i) {
    const int32_t low_y = samples.low_y[i] == samples.kNowhere ? 0 : samples.low_y[i];
    const int32_t low_x = samples.low_x[i];
    y[i] = low_y >= 0 ? low_y : 0;
    x[i] = low_x >= 0 ? low_x : 0;
    down[i] = low_y < 0 ? 0 : low_y < height - 1 ? 1 : 0;
    along[i] = low_x < 0 ? 0 : low_x < width - 1 ? 1 : 0;
    const A modulation = samples.modulation[i];
    const A upper = samples.row_exists(0, i, height) ? modulation * samples.weight_y(0, i) : A(0);
    const A lower = samples.row_exists(1, i, height) ? modulation * samples.weight_y(1, i) : A(0);
    const A first = samples.column_exists(0, i, width) ? samples.weight_x(0, i) : A(0);
    const A last = samples.column_exists(1, i, width) ? samples.weight_x(1, i) : A(0);
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
