// The samples of a tile, from the offsets and modulations to their positions.
#pragma once

#include <cstdint>

#include "../row_corners.h"
#include "../rows.h"
#include "../transpose.h"
#include "kernel.h"

namespace mmdcn {
namespace {

// The offsets and modulations of some offset groups, a row of pixels for each channel: either the
// pixels of the image or, staged, those of the tile.
template <typename A>
struct SamplingRows {
  const A* offset;
  const A* mask;
  int64_t offset_stride, mask_stride;  // from channel to channel
  int64_t first_group, rows;           // the first offset group, and rows of the mask
  bool staged;

  int64_t row(const DeformConv2dShape& shape, int64_t d, int64_t tap) const {
    return (d - first_group) * shape.taps() + tap;
  }
};

// Elements of memory for the staged rows of `groups` offset groups.
template <int kMost, typename A>
inline int64_t staged_size(const DeformConv2dShape& shape, const SamplingTensor<A>& offset,
                           const SamplingTensor<A>& mask, int64_t groups) {
  return offset.in_planes() && mask.in_planes() ? 0 : 3 * groups * shape.taps() * kMost;
}

// Stages channels [first, first + count) of a tile's offsets or modulations.
template <int kMost, typename A>
inline void stage(const Tile<kMost>& tile, const SamplingTensor<A>& tensor, int64_t first,
                  int64_t count, A* rows) {
  for (int64_t r = 0; r < tile.runs; ++r) {
    const auto& run = tile.run[r];
    const A* source = tensor.data + first * tensor.channel_stride + run.pixel * tensor.pixel_stride;
    A* target = rows + run.first;
    if (!tensor.in_planes()) {
      transpose<A>(source, tensor.pixel_stride, run.count, count, target, kMost);
      continue;
    }
    for (int64_t c = 0; c < count; ++c) {
      copy_row<A>(source + c * tensor.channel_stride, run.count, target + c * kMost);
    }
  }
}

// The rows of offset groups [first, first + groups) of one image, staged in `memory`, which has
// staged_size() elements, unless the tensors lie in planes.
template <int kMost, typename A>
inline SamplingRows<A> sampling_rows(const DeformConv2dShape& shape, const Tile<kMost>& tile,
                                     const SamplingTensor<A>& offset, const SamplingTensor<A>& mask,
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

// Locates the samples of a tile for one tap and offset group.
template <typename A, int kMost>
inline void locate_samples(const DeformConv2dShape& shape, const Tile<kMost>& tile,
                           const SamplingRows<A>& sampling, int64_t d, int64_t tap,
                           Samples<A, kMost>& samples) {
  const int64_t row = sampling.row(shape, d, tap);
  const A tap_y = A(shape.y.base(0, tap / shape.kernel_width));
  const A tap_x = A(shape.x.base(0, tap % shape.kernel_width));
  const int64_t height = shape.height, width = shape.width;
  const A stride_y = A(shape.y.stride), stride_x = A(shape.x.stride);
  for (int64_t r = 0; r < tile.runs; ++r) {
    const int64_t first = tile.run[r].first, count = tile.run[r].count;
    const int64_t start = sampling.staged ? first : tile.run[r].pixel;
    const A* offset_y = sampling.offset + 2 * row * sampling.offset_stride + start;
    const A* offset_x = offset_y + sampling.offset_stride;
    const A* mask = sampling.mask ? sampling.mask + row * sampling.mask_stride + start : nullptr;
    for (int64_t j = 0; j < count; ++j) samples.modulation[first + j] = mask ? mask[j] : A(1);
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j) {
      const int64_t i = first + j;
      const A p_y = A(tile.y[i]) * stride_y + tap_y + offset_y[j];
      const A p_x = A(tile.x[i]) * stride_x + tap_x + offset_x[j];
      const bool there = samples.locate(i, p_y, p_x, height, width);
      samples.modulation[i] = there ? samples.modulation[i] : A(0);
    }
  }
}

// Prefetches the offsets and the modulations of a row, if there is one of this number. It is too
// far from the row before for the processor to prefetch it by itself.
template <typename A, int kMost>
inline void prefetch_sampling(const Tile<kMost>& tile, const SamplingRows<A>& sampling,
                              int64_t row) {
  if (sampling.staged || row >= sampling.rows) return;
  constexpr int64_t line = 64 / sizeof(A);
  for (int64_t r = 0; r < tile.runs; ++r) {
    const A* offset = sampling.offset + 2 * row * sampling.offset_stride + tile.run[r].pixel;
    for (int64_t j = 0; j < tile.run[r].count; j += line) {
      __builtin_prefetch(offset + j);
      __builtin_prefetch(offset + sampling.offset_stride + j);
    }
    if (sampling.mask == nullptr) continue;
    const A* mask = sampling.mask + row * sampling.mask_stride + tile.run[r].pixel;
    for (int64_t j = 0; j < tile.run[r].count; j += line) __builtin_prefetch(mask + j);
  }
}

}  // namespace
}  // namespace mmdcn
