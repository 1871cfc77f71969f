// The corners of a tile's samples: their addresses and their weights.
#pragma once

#include <cstdint>

#include "samples.h"

namespace mmdcn {
namespace {

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

// Reads the corners of sample number i that are outside the window from `planes`, which begin with
// the samples' first channel. Each gets `count` elements of `strays`, and their address.
template <typename T, typename A, int kMost>
inline void read_strays(const DeformConv2dShape& shape, const Samples<A, kMost>& samples, int64_t i,
                        const RowWindow<A>& window, const T* planes, int64_t count, A* strays,
                        CornerAddresses<kMost>& addresses) {
  Corners<A, 2> corners;
  if (!corners_of(shape, samples, i, corners)) return;
  const int64_t plane = shape.height * shape.width;
  for (int q = 0; q < 4; ++q) {
    const int64_t y = samples.low_y[i] + (q >> 1), x = samples.low_x[i] + (q & 1);
    if (corners.position[q] < 0 || window.has(y, x)) continue;
    A* stray = strays + q * count;
    const T* source = planes + corners.position[q];
    for (int64_t c = 0; c < count; ++c) stray[c] = load(source + c * plane);
    addresses.corner[q][i] = reinterpret_cast<uintptr_t>(stray);
  }
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
