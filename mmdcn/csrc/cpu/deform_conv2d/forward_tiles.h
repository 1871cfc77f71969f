// The sums of the output tiles of the forward pass, from the bias to the image.
#pragma once

#include <cstddef>

#include "../matmul.h"
#include "../rows.h"
#include "../transpose.h"
#include "kernel.h"
#include "tiles.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

// Sets the sums of a tile's first `count` pixels to the bias, or to zero.
template <typename T, typename A = accumulator_t<T>>
inline void start_tile(const DeformConv2dShape& shape, const ForwardTensors<T>& tensors,
                       int64_t count, A* sums) {
  const int64_t out = shape.group_out_channels();
  for (int64_t g = 0; g < shape.groups; ++g) {
    for (int64_t i = 0; i < count; ++i) {
      A* row = sums + (i * shape.groups + g) * padded<A>(out);
      fill_zero(row, padded<A>(out));
      if (tensors.bias) copy_row<A>(tensors.bias + g * out, out, row);
    }
  }
}

// Writes a tile's sums to the image.
template <int kMost, typename T, typename A = accumulator_t<T>>
inline void store_tile(const DeformConv2dShape& shape, const Tile<kMost>& tile, const A* sums,
                       T* output, ImageLayout layout) {
  const int64_t out = shape.group_out_channels(), stride = shape.groups * padded<A>(out);
  for (int64_t r = 0; r < tile.runs; ++r) {
    const auto& run = tile.run[r];
    for (int64_t g = 0; g < shape.groups; ++g) {
      const A* source = sums + run.first * stride + g * padded<A>(out);
      T* target = output + run.pixel * layout.pixel_stride + g * out * layout.channel_stride;
      if (!layout.channels_last()) {
        transpose<A>(source, stride, run.count, out, target, layout.channel_stride);
        continue;
      }
      for (int64_t i = 0; i < run.count; ++i) {
        copy_row<A>(source + i * stride, out, target + i * layout.pixel_stride);
      }
    }
  }
}

// The tensors of one image.
template <typename T, typename A = accumulator_t<T>>
struct Image {
  const T* input;
  SamplingTensor<A> offset, mask;
  T* output;

  Image(const DeformConv2dShape& shape, const ForwardTensors<T>& tensors, int64_t number) {
    input = tensors.input + number * shape.channels * shape.height * shape.width;
    offset = tensors.offset.image(number);
    mask = tensors.mask.image(number);
    output = tensors.output + number * tensors.output_image;
  }
};

}  // namespace
}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
