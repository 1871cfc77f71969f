// What the CPU kernels of deform_conv2d are given and give. The kernels are compiled once for each
// instruction set; deform_conv2d.cpp chooses one, owns all memory and runs the threads.
#pragma once

#include <cstdint>

#include "../deform_conv2d_shape.h"
#include "simd.h"

namespace mmdcn {

// Output pixels that a tile of the forward pass, and of the backward pass, holds.
constexpr int64_t kForwardTile = 48;
constexpr int64_t kBackwardTile = 96;

// Tensors of the forward pass. Features are channels-last in `input`; `output` may be either way.
template <typename T>
struct ForwardTensors {
  using acc_t = accumulator_t<T>;
  const T* input;       // (N, H, W, C)
  const acc_t* offset;  // (N, deform_groups, taps, 2, Ho, Wo)
  const acc_t* mask;    // (N, deform_groups, taps, Ho, Wo), or null
  const acc_t* weight;  // packed: (groups, taps), each C/groups × Co/groups in panels
  const acc_t* bias;    // (Co), or null
  T* output;            // (N, Co, Ho, Wo) with the strides below inside an image
  int64_t output_pixel_stride, output_channel_stride;
};

// A range of channels, inside one group, whose gradients one thread computes alone. The gradients
// of offset and mask sum over the channels of an offset group: where its channels lie in several
// blocks, each block leaves its part in `partial` and the parts are added in the order of the
// blocks, so that the result does not depend on the number of threads.
struct ChannelBlock {
  int64_t group, begin, end;
  int64_t weight_begin;  // position of this block's packed weights
};

// Tensors of the backward pass for one image; null where a gradient is not asked for.
template <typename T>
struct BackwardTensors {
  using acc_t = accumulator_t<T>;
  const T* grad_output;  // (Ho, Wo, Co)
  const T* input;        // (H, W, C)
  const acc_t* offset;   // (deform_groups, taps, 2, Ho, Wo)
  const acc_t* mask;     // (deform_groups, taps, Ho, Wo), or null
  const acc_t* weight;   // packed: for each block and tap, Co/groups × its channels in panels
  acc_t* grad_input;     // (H, W, C), added to
  acc_t* grad_offset;    // (deform_groups, taps, 2, Ho, Wo)
  acc_t* grad_mask;      // (deform_groups, taps, Ho, Wo)
  acc_t* grad_weight;    // (C, taps, padded Co/groups), added to
  acc_t* partial;        // (blocks, 2, taps, 3, pixel_end - pixel_begin)
  int64_t pixel_begin, pixel_end;
};

template <typename T>
struct DeformConv2dKernels {
  using acc_t = accumulator_t<T>;
  // Columns padded to whole registers, and the size of a packed matrix, in elements.
  int64_t (*padded)(int64_t columns);
  int64_t (*packed_size)(int64_t depth, int64_t columns);
  void (*pack)(const T* source, int64_t row_stride, int64_t column_stride, int64_t depth,
               int64_t columns, acc_t* target);
  // Elements of scratch memory that one thread needs.
  int64_t (*forward_scratch)(const DeformConv2dShape&);
  int64_t (*backward_scratch)(const DeformConv2dShape&, int64_t block_channels);
  // Computes tiles [begin, end) of all images.
  void (*forward)(const DeformConv2dShape&, const ForwardTensors<T>&, int64_t begin, int64_t end,
                  acc_t* scratch);
  // Computes what one block of channels contributes for the pixels of `tensors`.
  void (*backward)(const DeformConv2dShape&, const BackwardTensors<T>&, const ChannelBlock*,
                   int64_t block_index, acc_t* scratch);
};

// Whether the channels of offset group d all lie in one block.
MMDCN_HOST_DEVICE bool owns_deform_group(const DeformConv2dShape& shape, const ChannelBlock& block,
                                         int64_t d) {
  return d * shape.deform_group_channels() >= block.begin &&
         (d + 1) * shape.deform_group_channels() <= block.end;
}

// Where block number `b` keeps its part of offset group d in `partial`: it shares at most two, the
// one that begins before it or at its beginning, and the one that ends after it.
MMDCN_HOST_DEVICE int64_t partial_index(const DeformConv2dShape& shape, const ChannelBlock& block,
                                        int64_t b, int64_t d) {
  return 2 * b + (d * shape.deform_group_channels() > block.begin ? 1 : 0);
}

#define MMDCN_DECLARE_KERNELS(capability)         \
  namespace capability {                          \
  template <typename T>                           \
  DeformConv2dKernels<T> deform_conv2d_kernels(); \
  }
MMDCN_DECLARE_KERNELS(portable)
MMDCN_DECLARE_KERNELS(avx2)
MMDCN_DECLARE_KERNELS(avx512)
#undef MMDCN_DECLARE_KERNELS

}  // namespace mmdcn
