// The interface of deform_conv2d's CPU kernels. They are compiled once for each instruction set;
// operator.cpp chooses one, owns all memory and runs the threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../deform_conv2d_shape.h"
#include "../simd.h"

namespace mmdcn {

// Output pixels that a tile of the forward pass, and of the backward pass, holds at most.
constexpr int kForwardTile = 48;
constexpr int kPlanarTile = 192;  // of the forward pass, where offset groups have few channels
constexpr int kBackwardTile = 192;

// How an image is sampled: row by row of channels, as vectors, or channel by channel, over the
// pixels of a tile, where offset groups have few channels.
enum class Sampling { kRows, kPlanes };

// Up to so many channels of an offset group are sampled from the planes.
constexpr int64_t kPlanarChannels = 4;

// The strides between the elements of one image: channels lie in planes, or pixel by pixel.
struct ImageLayout {
  int64_t pixel_stride, channel_stride;

  MMDCN_HOST_DEVICE bool channels_last() const { return channel_stride == 1; }
};

// Where the offsets, or the modulations, of images lie. Rows of pixels follow one another; either
// neighbouring pixels or neighbouring channels lie together.
template <typename A>
struct SamplingTensor {
  const A* data;  // null for no modulation
  int64_t image_stride, channel_stride, pixel_stride;

  MMDCN_HOST_DEVICE bool in_planes() const { return pixel_stride == 1; }
  MMDCN_HOST_DEVICE SamplingTensor image(int64_t number) const {
    return {data ? data + number * image_stride : nullptr, image_stride, channel_stride,
            pixel_stride};
  }
};

// Where the gradients of one image's offsets, or modulations, go: likewise.
template <typename A>
struct SamplingGradients {
  A* data;  // null where not asked for
  int64_t channel_stride, pixel_stride;

  MMDCN_HOST_DEVICE bool in_planes() const { return pixel_stride == 1; }
  MMDCN_HOST_DEVICE A* at(int64_t channel, int64_t pixel) const {
    return data + channel * channel_stride + pixel * pixel_stride;
  }
};

// Where the elements of a weight lie: (Co, C/groups, taps).
struct WeightLayout {
  int64_t out_stride, channel_stride, tap_stride;
};

// Output pixels of one strip, in row-major order, as runs of pixels that are neighbours in memory.
template <int kMost>
struct Tile {
  struct Run {
    int64_t first, count, pixel;  // index in the tile, length, and index in the image
  };
  int64_t count, runs;
  Run run[kMost];
  int32_t y[kMost], x[kMost];
};

// How images whose channels lie in planes are worked through: in vertical strips of the output, by
// tiles of pixels from top to bottom, with `rows` rows of at most `columns` pixels of the input
// kept as channels-last rows around the tile at work.
struct WindowPlan {
  int64_t strip_width, strips;  // of the output
  int64_t rows, columns;        // of the input; 0 where no window is needed
};

// A rolling window on the rows of one image, as channels-last pixels: row y lies in slot number
// y mod capacity. Over the whole of a channels-last image, it rolls nowhere.
template <typename S>
struct Rows {
  S* data;
  int64_t pixel_stride, row_stride, capacity;
  int64_t begin, end;   // rows that are there
  int64_t left, right;  // columns that are there
  int64_t origin;       // the largest multiple of capacity up to begin

  MMDCN_HOST_DEVICE bool has(int64_t y, int64_t x) const {
    return y >= begin && y < end && x >= left && x < right;
  }
  // Row y, which must be there, from column `left` on.
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

// Tensors of the forward pass.
template <typename T>
struct ForwardTensors {
  using acc_t = accumulator_t<T>;
  const T* input;  // (N, C, H, W) in the layout below
  ImageLayout input_layout;
  SamplingTensor<acc_t> offset;  // (N, deform_groups, taps, 2, Ho, Wo)
  SamplingTensor<acc_t> mask;    // (N, deform_groups, taps, Ho, Wo)
  const std::byte* weight;       // as pack_weight made it
  const acc_t* bias;             // (Co), or null
  T* output;                     // (N, Co, Ho, Wo) in the layout below
  ImageLayout output_layout;
  int64_t output_image;  // from image to image; more than an image's elements in a block's call
};

template <typename T>
struct ForwardKernel {
  using acc_t = accumulator_t<T>;
  // Blocks of output channels, of one size, that so many threads had best compute each on its own.
  // What follows works on one block at a time: the shape has its output channels only.
  int64_t (*out_blocks)(const DeformConv2dShape&, int64_t threads);
  // The weight is packed in slices, all of them before the first call of `run`; each fills elements
  // of its own among packed_bytes.
  int64_t (*pack_slices)(const DeformConv2dShape&);
  int64_t (*packed_bytes)(const DeformConv2dShape&);
  void (*pack_weight)(const DeformConv2dShape&, const T* weight, const WeightLayout&, int64_t begin,
                      int64_t end, std::byte* packed);
  // Shares of the work on all images, and bytes of scratch memory that one thread needs.
  int64_t (*shares)(const DeformConv2dShape&);
  int64_t (*scratch_bytes)(const DeformConv2dShape&, const ForwardTensors<T>&);
  void (*run)(const DeformConv2dShape&, const ForwardTensors<T>&, int64_t begin, int64_t end,
              std::byte* scratch);
};

// A range of channels, inside one group, whose gradients one thread computes alone. The gradients
// of offset and mask sum over the channels of an offset group: where its channels lie in several
// blocks, each block leaves its sum in `partial` and the sums are added in the order of the
// blocks, so that the result does not depend on the number of threads.
struct ChannelBlock {
  int64_t group, begin, end;
};

// Tensors of the backward pass for one image, and for one block where they say so; null where a
// gradient is not asked for.
template <typename T>
struct BackwardTensors {
  using acc_t = accumulator_t<T>;
  const T* grad_output;  // (Co, Ho, Wo)
  ImageLayout output_layout;
  const T* input;  // (C, H, W)
  ImageLayout input_layout;
  SamplingTensor<acc_t> offset;  // (deform_groups, taps, 2, Ho, Wo)
  SamplingTensor<acc_t> mask;    // (deform_groups, taps, Ho, Wo)
  const acc_t* weight;  // the block's, packed: for each tap, Co/groups × channels in panels
  T* grad_input;        // (C, H, W) in the input's layout, added to
  SamplingGradients<acc_t> grad_offset;  // (deform_groups, taps, 2, Ho, Wo)
  SamplingGradients<acc_t> grad_mask;    // (deform_groups, taps, Ho, Wo)
  acc_t* grad_weight;  // the block's: (channels, taps, padded Co/groups), added to
  acc_t* partial;      // (tiles, partial_tile), see partial_position; null where all is owned
  int64_t partial_tile;
};

// What a block of channels keeps from tile to tile of one image.
template <typename T>
struct BlockWindows {
  Rows<accumulator_t<T>> input, grad_input;
};

template <typename T>
struct BackwardKernel {
  using acc_t = accumulator_t<T>;
  // Elements of a block's packed weights, and of the sums that make up their gradient. The latter
  // goes to the block's channels of grad_weight, or is added to what is there.
  int64_t (*packed_size)(const DeformConv2dShape&, const ChannelBlock&);
  void (*pack_weight)(const DeformConv2dShape&, const T* weight, const WeightLayout&,
                      const ChannelBlock&, acc_t* packed);
  int64_t (*sums_size)(const DeformConv2dShape&, const ChannelBlock&);
  void (*unpack_sums)(const DeformConv2dShape&, const acc_t* sums, const ChannelBlock&, bool add,
                      T* grad_weight, const WeightLayout&);
  int64_t (*tiles)(const DeformConv2dShape&);  // of one image
  void (*tile_at)(const DeformConv2dShape&, int64_t index, Tile<kBackwardTile>&);
  // Memory that one thread needs, and that one block's windows need.
  int64_t (*scratch_bytes)(const DeformConv2dShape&, const BackwardTensors<T>&,
                           int64_t block_channels);
  int64_t (*window_bytes)(const DeformConv2dShape&, const BackwardTensors<T>&,
                          int64_t block_channels);
  // For each block and image: `open`, then `run` for all tiles in ascending order, some at a time,
  // then `close`. `run` computes what the block contributes for these tiles.
  void (*open)(const DeformConv2dShape&, const BackwardTensors<T>&, const ChannelBlock&,
               std::byte* memory, BlockWindows<T>&);
  void (*run)(const DeformConv2dShape&, const BackwardTensors<T>&, const ChannelBlock* blocks,
              int64_t block_index, int64_t begin_tile, int64_t end_tile, BlockWindows<T>&,
              std::byte* scratch);
  void (*close)(const DeformConv2dShape&, const BackwardTensors<T>&, const ChannelBlock&,
                BlockWindows<T>&);
};

// The offset groups [first_owned, last_owned) of which all channels lie in one block; there may be
// none.
MMDCN_HOST_DEVICE int64_t first_owned(const DeformConv2dShape& shape, const ChannelBlock& block) {
  const int64_t channels = shape.deform_group_channels();
  return (block.begin + channels - 1) / channels;
}
MMDCN_HOST_DEVICE int64_t last_owned(const DeformConv2dShape& shape, const ChannelBlock& block) {
  return block.end / shape.deform_group_channels();
}
MMDCN_HOST_DEVICE bool owns_deform_group(const DeformConv2dShape& shape, const ChannelBlock& block,
                                         int64_t d) {
  return d >= first_owned(shape, block) && d < last_owned(shape, block);
}

// Elements that a block keeps aside in `partial` for a tile and one offset group.
MMDCN_HOST_DEVICE int64_t partial_size(const DeformConv2dShape& shape) {
  return shape.taps() * 3 * kBackwardTile;
}

// Where, in what `partial` has of a tile, block number `b` keeps its sums of offset group d: as
// (taps, 3, pixels). A block shares at most two groups, the one that begins before it or at its
// beginning, and the one that ends after it.
MMDCN_HOST_DEVICE int64_t partial_position(const DeformConv2dShape& shape,
                                           const ChannelBlock& block, int64_t b, int64_t d) {
  return (2 * b + (d * shape.deform_group_channels() > block.begin ? 1 : 0)) * partial_size(shape);
}

// The kernels for convolutions of this shape.
#define MMDCN_DECLARE_KERNELS(capability)                             \
  namespace capability {                                              \
  template <typename T>                                               \
  ForwardKernel<T> deform_conv2d_forward(const DeformConv2dShape&);   \
  template <typename T>                                               \
  BackwardKernel<T> deform_conv2d_backward(const DeformConv2dShape&); \
  }
MMDCN_DECLARE_KERNELS(portable)
MMDCN_DECLARE_KERNELS(avx2)
MMDCN_DECLARE_KERNELS(avx512)
MMDCN_DECLARE_KERNELS(avx512_bf16)
#undef MMDCN_DECLARE_KERNELS

}  // namespace mmdcn
