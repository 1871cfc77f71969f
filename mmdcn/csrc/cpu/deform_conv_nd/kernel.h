// The interface of deform_conv_nd's CPU kernels. They are compiled once for each instruction set;
// operator.cpp chooses one, owns all memory and runs the threads.
//
// The kernels work on rows: an image's channels pixel by pixel, in the accumulators' type. Those of
// the input and of its gradient have borders.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../deform_conv_nd_shape.h"
#include "../simd.h"
#include "volume_rows.h"

namespace mmdcn {

// Elements beyond the last row of output gradients that the kernels may read.
constexpr int64_t kRowSlack = 16;

// Input channels that one thread works on alone; they may belong to several groups.
struct ChannelRange {
  int64_t begin, end;
};

template <typename A>
struct ConvNdForward {
  const A* input;   // rows, with a border of zeros
  const A* offset;  // (N, samples, R, pixels)
  const A* mask;    // (N, samples, pixels), or null
  const A* weight;  // packed
  const A* bias;    // (Co), or null
  A* output;        // rows, (N, pixels, Co)
};

template <typename A>
struct ConvNdBackward {
  const A* grad_output;  // rows, (N, pixels, Co), and kRowSlack more
  const A* input;        // rows, with a border of zeros
  const A* offset;       // (N, samples, R, pixels)
  const A* mask;         // (N, samples, pixels), or null
  const A* weight;       // the range's, packed
  A* grad_input;         // rows, with a border, added to; or null
  // The sums over the range's channels, (N, samples, R, pixels) and (N, samples, pixels); or null.
  A* grad_offset;
  A* grad_mask;
  A* grad_weight;  // (Co, C / groups, taps), of which the range's are stored; or null
};

template <int R, typename T>
struct ConvNdKernel {
  using Shape = DeformConvNdShape<R>;
  using A = accumulator_t<T>;

  // Converts positions [begin, end), numbered over the whole batch, of images whose channels lie in
  // planes to rows, and back.
  void (*to_rows)(const T* planes, const VolumeRows&, int64_t begin, int64_t end, A* rows);
  void (*from_rows)(const A* rows, const VolumeRows&, int64_t begin, int64_t end, T* planes);

  int64_t (*packed_size)(const Shape&);
  // Packs the weights of taps [begin, end), which are numbered over all groups.
  void (*pack_weight)(const Shape&, const T* weight, int64_t begin, int64_t end, A* packed);
  int64_t (*forward_scratch_bytes)(const Shape&);
  // Output pixels [begin, end), numbered over the whole batch.
  void (*forward)(const Shape&, const ConvNdForward<A>&, int64_t begin, int64_t end,
                  std::byte* scratch);

  int64_t (*range_packed_size)(const Shape&, const ChannelRange&);
  void (*pack_range)(const Shape&, const T* weight, const ChannelRange&, A* packed);
  int64_t (*backward_scratch_bytes)(const Shape&, const ConvNdBackward<A>&, const ChannelRange&);
  // Images [begin, end), in order.
  void (*backward)(const Shape&, const ConvNdBackward<A>&, const ChannelRange&, int64_t begin,
                   int64_t end, std::byte* scratch);
};

#define MMDCN_DECLARE_KERNELS(capability) \
  namespace capability {                  \
  template <int R, typename T>            \
  ConvNdKernel<R, T> deform_conv_nd();    \
  }
MMDCN_DECLARE_KERNELS(portable)
MMDCN_DECLARE_KERNELS(avx2)
MMDCN_DECLARE_KERNELS(avx512)
MMDCN_DECLARE_KERNELS(avx512_bf16)
MMDCN_DECLARE_KERNELS(avx512_amx)
#undef MMDCN_DECLARE_KERNELS

}  // namespace mmdcn
