// The interface of deform_aggregate's CPU kernels. They are compiled once for each instruction set;
// operator.cpp chooses one, owns all memory and runs the threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../deform_aggregate_shape.h"
#include "../channel_block.h"
#include "../simd.h"

namespace mmdcn {

// Tensors of both passes; all are channels-last.
template <typename T>
struct AggregateTensors {
  using acc_t = accumulator_t<T>;
  const T* input;       // (N, H, W, C)
  const acc_t* offset;  // (N, Ho, Wo, G, taps, x and y) in the layout below
  const acc_t* mask;    // (N, Ho, Wo, G, taps) in the layout below
  AggregateLayout offset_layout, mask_layout;
  T* output;             // (N, Ho, Wo, C)
  const T* grad_output;  // (N, Ho, Wo, C)
  acc_t* grad_input;     // (N, H, W, C), added to; or null
  // The sums over a block's channels, (blocks of a group, N, Ho, Wo, G, taps, 2) and (blocks of a
  // group, N, Ho, Wo, G, taps); or null.
  acc_t* grad_offset;
  acc_t* grad_mask;
};

// The blocks of all groups, of which each has as many.
struct ChannelBlocks {
  const ChannelBlock* of;
  int64_t of_group;  // blocks of one group
};

// Rows [first, last) of the input.
struct RowRange {
  int64_t first, last;
};

// A strip of an image: some output pixels, and as large a share of the input's rows, whose
// gradients are added up in place by whoever works on the strip. What its samples add to other rows
// is summed in an image apart, so that threads on different strips never write to the same place.
template <typename A>
struct ImageStrip {
  int64_t image;
  int64_t begin, end;  // output pixels, numbered over the whole batch
  RowRange own;
  // (H, W, C), or null if all rows are the strip's own; set in the rows that are reached.
  A* beyond;
  RowRange* reached;  // for each block: its own rows, and those that its samples have reached
};

template <typename T>
struct AggregateKernel {
  using acc_t = accumulator_t<T>;
  int64_t (*scratch_bytes)(const DeformAggregateShape&);
  // All channels of output pixels [begin, end), numbered over the whole batch.
  void (*forward)(const DeformAggregateShape&, const AggregateTensors<T>&, int64_t begin,
                  int64_t end, std::byte* scratch);
  // The gradients of the channels of blocks [begin, end), summed over the strip's output pixels in
  // order.
  void (*backward)(const DeformAggregateShape&, const AggregateTensors<T>&, const ChannelBlocks&,
                   int64_t begin, int64_t end, const ImageStrip<acc_t>&, std::byte* scratch);
};

#define MMDCN_DECLARE_KERNELS(capability) \
  namespace capability {                  \
  template <typename T>                   \
  AggregateKernel<T> deform_aggregate();  \
  }
MMDCN_DECLARE_KERNELS(portable)
MMDCN_DECLARE_KERNELS(avx2)
MMDCN_DECLARE_KERNELS(avx512)
MMDCN_DECLARE_KERNELS(avx512_bf16)
MMDCN_DECLARE_KERNELS(avx512_amx)
#undef MMDCN_DECLARE_KERNELS

}  // namespace mmdcn
