// The interface of deform_roi_pool's CPU kernels. They are compiled once for each instruction set;
// operator.cpp chooses one, owns all memory and runs the threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../deform_roi_pool_shape.h"
#include "../channel_block.h"
#include "../simd.h"

namespace mmdcn {

// Tensors of both passes. Images and output gradients are channels-last; blocks of output channels
// lie inside one offset group.
template <typename T>
struct RoIPoolTensors {
  using acc_t = accumulator_t<T>;
  const T* input;        // (N, H, W, C)
  const acc_t* rois;     // (R, 5), of images that exist
  const acc_t* offset;   // (R, deform_groups, x and y, bins), or null
  T* output;             // (R, Co, bins)
  const T* grad_output;  // (R, bins, Co)
  acc_t* grad_input;     // (N, H, W, C), added to; or null
  acc_t* grad_offset;    // as offset, the sums over the block's channels; or null
};

template <typename T>
struct RoIPoolKernel {
  int64_t (*scratch_bytes)(const DeformRoIPoolShape&, int64_t channels);
  // Pools a block's channels of RoIs [begin, end).
  void (*forward)(const DeformRoIPoolShape&, const RoIPoolTensors<T>&, const ChannelBlock&,
                  int64_t begin, int64_t end, std::byte* scratch);
  // The gradients of a block's channels, summed over the RoIs of one image in order.
  void (*backward)(const DeformRoIPoolShape&, const RoIPoolTensors<T>&, const ChannelBlock&,
                   int64_t image, std::byte* scratch);
};

#define MMDCN_DECLARE_KERNELS(capability) \
  namespace capability {                  \
  template <typename T>                   \
  RoIPoolKernel<T> deform_roi_pool();     \
  }
MMDCN_DECLARE_KERNELS(portable)
MMDCN_DECLARE_KERNELS(avx2)
MMDCN_DECLARE_KERNELS(avx512)
MMDCN_DECLARE_KERNELS(avx512_bf16)
MMDCN_DECLARE_KERNELS(avx512_amx)
#undef MMDCN_DECLARE_KERNELS

}  // namespace mmdcn
