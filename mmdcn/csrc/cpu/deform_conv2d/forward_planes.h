// The forward pass for offset groups of few channels, which are sampled one by one, straight from
// the planes, for all pixels of a tile.
#pragma once

#include <algorithm>
#include <cstddef>

#include "../arena.h"
#include "corners.h"
#include "forward_tiles.h"
#include "forward_weights.h"
#include "windows.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

using PlanarTile = Tile<kPlanarTile>;

// Samples the columns of one tap and offset group, which have a row of the tile's pixels for each
// channel. `input` begins with the offset group's first channel.
template <typename T, typename A>
inline void sample_planes(const DeformConv2dShape& shape, const PlanarTile& tile,
                          const Samples<A, kPlanarTile>& samples, const T* input,
                          ImageLayout layout, A* columns) {
  int64_t position[4][kPlanarTile];
  A weight[4][kPlanarTile];
  set_planar_corners(shape, samples, tile.count, layout.pixel_stride, position, weight);
  for (int64_t c = 0; c < shape.deform_group_channels(); ++c) {
    const T* plane = input + c * layout.channel_stride;
    A* row = columns + c * kPlanarTile;
    for (int64_t i = 0; i < tile.count; ++i) {
      const A value = weight[0][i] * load(plane + position[0][i]) +
                      weight[1][i] * load(plane + position[1][i]) +
                      weight[2][i] * load(plane + position[2][i]) +
                      weight[3][i] * load(plane + position[3][i]);
      // Not 0 · value, which is NaN for an infinite value.
      row[i] = samples.low_y[i] == samples.kNowhere ? A(0) : value;
    }
  }
}

// Tiles that are computed together, offset group by offset group.
constexpr int64_t kPlanarSpan = 4;

// Offset groups that are sampled together, for all taps. Their columns must stay in the
// second-level cache.
inline int64_t planar_groups(const DeformConv2dShape& shape) {
  constexpr int64_t deepest = 288;
  const int64_t most = deepest / (shape.taps() * shape.deform_group_channels());
  return std::clamp<int64_t>(most, 1, shape.deform_groups);
}

// Scratch memory of one thread.
template <typename A>
struct PlanarScratch {
  PlanarTile* tiles;  // of one span
  Samples<A, kPlanarTile>* samples;
  A* sums;            // of each tile, pixels × groups × padded out channels
  int64_t tile_sums;  // elements of one tile's
  A* columns;         // taps × channels × pixels
  A* sampling;        // staged offsets and modulations

  template <typename T>
  PlanarScratch(const DeformConv2dShape& shape, const ForwardTensors<T>& tensors, Arena& arena)
      : tiles(arena.take<PlanarTile>(kPlanarSpan)),
        samples(arena.take<Samples<A, kPlanarTile>>(1)) {
    const int64_t groups = planar_groups(shape);
    tile_sums = kPlanarTile * shape.groups * padded<A>(shape.group_out_channels());
    sums = arena.take<A>(kPlanarSpan * tile_sums);
    columns = arena.take<A>(shape.taps() * groups * shape.deform_group_channels() * kPlanarTile);
    sampling = arena.take<A>(staged_size<kPlanarTile>(shape, tensors.offset, tensors.mask, groups));
  }
};

// sums += columns · weights, for the channels [begin, end) and all taps. Columns are rows of
// pixels.
template <typename T, typename A>
inline void multiply_planes(const DeformConv2dShape& shape, int64_t pixels, int64_t begin,
                            int64_t end, const A* columns, int64_t tap_stride,
                            const std::byte* weight, A* sums) {
  const int64_t in = shape.group_channels(), out = shape.group_out_channels();
  const int64_t per_tap = tap_bytes<Sampling::kPlanes, T>(shape);
  NoWork none;
  for (int64_t g = begin / in; g * in < end; ++g) {
    const int64_t first = std::max(g * in, begin), last = std::min((g + 1) * in, end);
    const A* values = reinterpret_cast<const A*>(weight + g * shape.taps() * per_tap);
    const Depth depth = {last - first, shape.taps(), tap_stride,
                         per_tap / static_cast<int64_t>(sizeof(A))};
    const Panels<A> panels = {values + (first - g * in) * kPanelWidth<A>, in * kPanelWidth<A>,
                              kPanelWidth<A>};
    multiply<Order::kColumns, Into::kAdd>(
        pixels, out, depth, columns + (first - begin) * kPlanarTile, kPlanarTile, panels,
        sums + g * padded<A>(out), shape.groups * padded<A>(out), none);
  }
}

template <typename T>
int64_t plane_shares(const DeformConv2dShape& shape) {
  return shape.batch * tiles_of_image(shape, no_windows(shape), kPlanarTile);
}

template <typename T, typename A = accumulator_t<T>>
int64_t plane_scratch_bytes(const DeformConv2dShape& shape, const ForwardTensors<T>& tensors) {
  Arena arena(nullptr);
  PlanarScratch<A>(shape, tensors, arena);
  return arena.used();
}

// Computes shares [begin, end), which are tiles, with some offset groups at a time. The rows of
// offsets of different groups lie on different pages of memory, so several tiles are computed for
// one group before the next one, and the pages are looked up once for all of them.
template <typename T, typename A = accumulator_t<T>>
void run_planes(const DeformConv2dShape& shape, const ForwardTensors<T>& tensors, int64_t begin,
                int64_t end, std::byte* memory) {
  const WindowPlan plan = no_windows(shape);
  const int64_t per_image = tiles_of_image(shape, plan, kPlanarTile);
  const int64_t taps = shape.taps(), channels = shape.deform_group_channels();
  const int64_t most = planar_groups(shape), tap_stride = most * channels * kPlanarTile;
  const ImageLayout layout = tensors.input_layout;
  Arena arena(memory);
  const PlanarScratch<A> scratch(shape, tensors, arena);
  for (int64_t index = begin; index < end;) {
    const Image<T> image(shape, tensors, index / per_image);
    const int64_t tiles = std::min({kPlanarSpan, end - index, per_image - index % per_image});
    for (int64_t t = 0; t < tiles; ++t) {
      set_tile(shape, plan, (index + t) % per_image, scratch.tiles[t]);
      start_tile(shape, tensors, scratch.tiles[t].count, scratch.sums + t * scratch.tile_sums);
    }
    for (int64_t first = 0; first < shape.deform_groups; first += most) {
      const int64_t last = std::min(first + most, shape.deform_groups);
      for (int64_t t = 0; t < tiles; ++t) {
        const PlanarTile& tile = scratch.tiles[t];
        const SamplingRows<A> sampling = sampling_rows(shape, tile, image.offset, image.mask, first,
                                                       last - first, scratch.sampling);
        for (int64_t d = first; d < last; ++d) {
          for (int64_t tap = 0; tap < taps; ++tap) {
            prefetch_sampling(tile, sampling, sampling.row(shape, d, tap) + 1);
            locate_samples(shape, tile, sampling, d, tap, *scratch.samples);
            sample_planes(
                shape, tile, *scratch.samples, image.input + d * channels * layout.channel_stride,
                layout, scratch.columns + tap * tap_stride + (d - first) * channels * kPlanarTile);
          }
        }
        multiply_planes<T>(shape, tile.count, first * channels, last * channels, scratch.columns,
                           tap_stride, tensors.weight, scratch.sums + t * scratch.tile_sums);
      }
    }
    for (int64_t t = 0; t < tiles; ++t) {
      store_tile(shape, scratch.tiles[t], scratch.sums + t * scratch.tile_sums, image.output,
                 tensors.output_layout);
    }
    index += tiles;
  }
}

}  // namespace
}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
