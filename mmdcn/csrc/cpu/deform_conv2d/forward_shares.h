// The shares and windows of forward passes that sample rows of channels.
#pragma once

#include <algorithm>

#include "forward_tiles.h"
#include "windows.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

using ForwardTile = Tile<kForwardTile>;
template <typename A>
using ForwardSamples = Samples<A, kForwardTile>;

// Tiles are divided into shares of so many pixels for the threads: whole register blocks, but less
// than a tile, so that the threads finish together. The result of a pixel does not depend on the
// share it is in, as all pixels of a tile are sampled from the same window.
constexpr int64_t kSharePixels = 12;
constexpr int64_t kShares = kForwardTile / kSharePixels;
static_assert(kShares * kSharePixels == kForwardTile && kSharePixels % kBlockRows == 0, "uneven");

// The plan is the same for both layouts, and so is the number of tiles.
template <typename A>
inline WindowPlan plan_forward(const DeformConv2dShape& shape) {
  return plan_windows<A>(shape, shape.channels, kForwardTile);
}

template <typename T, typename A = accumulator_t<T>>
int64_t row_shares(const DeformConv2dShape& shape) {
  return shape.batch * tiles_of_image(shape, plan_forward<A>(shape), kForwardTile) * kShares;
}

// The range that the window should have for a tile. It ends with the rows that the tile may read,
// so that the first tile does not wait for the window to be filled.
inline WindowRange forward_range(const DeformConv2dShape& shape, const WindowPlan& plan,
                                 const ForwardTile& tile) {
  WindowRange range = range_around(shape, tile, plan, plan.rows, plan.columns);
  const int64_t reached =
      shape.y.base(tile.y[tile.count - 1], shape.kernel_height - 1) + 2 + kMargin;
  range.end = std::clamp(reached, range.begin, range.end);
  return range;
}

}  // namespace
}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
