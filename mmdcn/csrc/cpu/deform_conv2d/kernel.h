// The interface of deform_conv2d's CPU kernels. They are compiled once for each instruction set;
// operator.cpp chooses one, owns all memory and runs the threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../deform_conv2d_shape.h"
#include "../channel_block.h"
#include "../row_corners.h"
#include "../simd.h"

namespace mmdcn {

// The most output pixels of a tile.
constexpr int kForwardTile = 48;    // of the forward pass, sampled by rows
constexpr int kPlanarTile = 192;    // of the forward pass, sampled by planes
constexpr int kBackwardTile = 192;  // of the backward pass

// How an image is sampled: a pixel's channels as vectors, from rows of channels, or where offset
// groups have few channels, one channel after the other, for all pixels of a tile.
enum class Sampling { kRows, kPlanes };

// The most channels of an offset group that are sampled from the planes.
constexpr int64_t kPlanarChannels = 4;

// The strides of one image, in elements: its channels lie in planes, or pixel by pixel.
struct ImageLayout {
  int64_t pixel_stride, channel_stride;

  MMDCN_HOST_DEVICE bool channels_last() const { return channel_stride == 1; }
};

// The offsets, or the modulations, of the images of a batch, with strides in elements. All pixels
// of an image are at one stride, and either the pixels or the channels are contiguous.
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

// Whether each channel is a group by itself, with one output channel, and is sampled from rows.
// Then there is no matrix product: samples are multiplied by the weights of their channels.
MMDCN_HOST_DEVICE bool is_depthwise(const DeformConv2dShape& shape) {
  return shape.group_channels() == 1 && shape.group_out_channels() == 1 &&
         shape.deform_group_channels() > kPlanarChannels;
}

// The gradients of one image's offsets, or modulations, likewise.
template <typename A>
struct SamplingGradients {
  A* data;  // null where not wanted
  int64_t channel_stride, pixel_stride;

  MMDCN_HOST_DEVICE bool in_planes() const { return pixel_stride == 1; }
  MMDCN_HOST_DEVICE A* at(int64_t channel, int64_t pixel) const {
    return data + channel * channel_stride + pixel * pixel_stride;
  }
};

// The strides, in elements, of a weight, (Co, C/groups, taps).
struct WeightLayout {
  int64_t out_stride, channel_stride, tap_stride;
};

// Output pixels of one strip in row-major order, divided into runs of consecutive pixels of the
// image.
template <int kMost>
struct Tile {
  struct Run {
    int64_t first, count, pixel;  // index in the tile, length, and index in the image
  };
  int64_t count, runs;
  Run run[kMost];
  int32_t y[kMost], x[kMost];
};

// The order in which the tiles of an image are computed, and the window that they read. The output
// is divided into vertical strips, and each strip into tiles from top to bottom. If the channels of
// the input lie in planes, `rows` rows of at most `columns` pixels around the current tile are kept
// as channels-last rows.
struct WindowPlan {
  int64_t strip_width, strips;  // of the output
  int64_t rows, columns;        // of the input; 0 where no window is needed
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
  int64_t output_image;  // stride from image to image; images have channels of other blocks too
};

template <typename T>
struct ForwardKernel {
  using acc_t = accumulator_t<T>;
  // The best number of blocks of output channels, of one size, for so many threads. The functions
  // that follow compute one block, and take a shape that has the block's output channels only.
  int64_t (*out_blocks)(const DeformConv2dShape&, int64_t threads);
  // The weight is packed in slices, all of them before the first call of `run`. Each slice fills
  // its own share of packed_bytes.
  int64_t (*pack_slices)(const DeformConv2dShape&);
  int64_t (*packed_bytes)(const DeformConv2dShape&);
  void (*pack_weight)(const DeformConv2dShape&, const T* weight, const WeightLayout&, int64_t begin,
                      int64_t end, std::byte* packed);
  // The number of equal shares of the work on the batch, of which `run` computes [begin, end), and
  // the bytes of scratch memory that one thread needs.
  int64_t (*shares)(const DeformConv2dShape&);
  int64_t (*scratch_bytes)(const DeformConv2dShape&, const ForwardTensors<T>&);
  void (*run)(const DeformConv2dShape&, const ForwardTensors<T>&, int64_t begin, int64_t end,
              std::byte* scratch);
};

// Tensors of the backward pass for one image, and for one block of channels where they say so; null
// where a gradient is not wanted. One thread computes the gradients of a block alone. Those of
// offset and mask sum over the channels of an offset group: where its channels lie in several
// blocks, each block leaves its sum in `partial`, and the sums are added in the order of the
// blocks, so that the result does not depend on the number of threads.
template <typename T>
struct BackwardTensors {
  using acc_t = accumulator_t<T>;
  const T* grad_output;  // (Co, Ho, Wo)
  ImageLayout output_layout;
  const T* input;  // (C, H, W)
  ImageLayout input_layout;
  SamplingTensor<acc_t> offset;  // (deform_groups, taps, 2, Ho, Wo)
  SamplingTensor<acc_t> mask;    // (deform_groups, taps, Ho, Wo)
  // The block's, packed: for each tap, and each group, Co/groups × channels in panels. Where
  // is_depthwise(): (taps, channels of the block).
  const acc_t* weight;
  T* grad_input;                         // (C, H, W) in the input's layout, added to
  SamplingGradients<acc_t> grad_offset;  // (deform_groups, taps, 2, Ho, Wo)
  SamplingGradients<acc_t> grad_mask;    // (deform_groups, taps, Ho, Wo)
  // The block's, added to: (channels, taps, padded Co/groups), or where is_depthwise(), (taps,
  // channels).
  acc_t* grad_weight;
  acc_t* partial;  // (tiles, partial_tile), see partial_index; null if no group is shared
  int64_t partial_tile;
};

// The windows that a block of channels keeps from tile to tile of one image.
template <typename T>
struct BlockWindows {
  RowWindow<accumulator_t<T>> input, grad_input;
};

template <typename T>
struct BackwardKernel {
  using acc_t = accumulator_t<T>;
  // Elements of a block's packed weights, and of the sums of their gradient, which unpack_sums
  // stores to the block's channels of grad_weight, or adds to them.
  int64_t (*packed_size)(const DeformConv2dShape&, const ChannelBlock&);
  void (*pack_weight)(const DeformConv2dShape&, const T* weight, const WeightLayout&,
                      const ChannelBlock&, acc_t* packed);
  int64_t (*sums_size)(const DeformConv2dShape&, const ChannelBlock&);
  void (*unpack_sums)(const DeformConv2dShape&, const acc_t* sums, const ChannelBlock&, bool add,
                      T* grad_weight, const WeightLayout&);
  int64_t (*tiles)(const DeformConv2dShape&);  // of one image
  void (*tile_at)(const DeformConv2dShape&, int64_t index, Tile<kBackwardTile>&);
  // Bytes of scratch memory that one thread needs, and that one block's windows need.
  int64_t (*scratch_bytes)(const DeformConv2dShape&, const BackwardTensors<T>&,
                           int64_t block_channels);
  int64_t (*window_bytes)(const DeformConv2dShape&, const BackwardTensors<T>&,
                          int64_t block_channels);
  // For each block and image: `open`, then `run` for all tiles in ascending order, some at a time,
  // then `close`. `run` computes the gradients of the block's channels for these tiles.
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

// Elements of the sums that a block leaves in `partial` for a tile and one offset group.
MMDCN_HOST_DEVICE int64_t partial_size(const DeformConv2dShape& shape) {
  return shape.taps() * 3 * kBackwardTile;
}

// The index in a tile's `partial` of the sums of block number `b` for offset group d, which are
// (taps, 3, pixels). A block shares at most two groups: the one that begins before it or with it,
// and the one that ends after it.
MMDCN_HOST_DEVICE int64_t partial_index(const DeformConv2dShape& shape, const ChannelBlock& block,
                                        int64_t b, int64_t d) {
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
MMDCN_DECLARE_KERNELS(avx512_amx)
#undef MMDCN_DECLARE_KERNELS

}  // namespace mmdcn
