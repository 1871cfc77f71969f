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
