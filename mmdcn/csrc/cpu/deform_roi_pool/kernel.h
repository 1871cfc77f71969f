// What the CPU kernels of deform_roi_pool are given and give. The kernels are compiled once for
// each instruction set; operator.cpp chooses one, owns all memory and runs the threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../deform_roi_pool_shape.h"
#include "../simd.h"

namespace mmdcn {

// Output channels of one offset group that are pooled together.
struct RoIPoolChannels {
  int64_t group, begin, end;
};

// Tensors of both passes; images and output gradients are channels-last.
template <typename T>
struct RoIPoolTensors {
  using acc_t = accumulator_t<T>;
  const T* input;        // (N, H, W, C)
  const acc_t* rois;     // (R, 5), their images in range
  const acc_t* offset;   // (R, deform_groups, x and y, bins), or null
  T* output;             // (R, Co, bins)
  const T* grad_output;  // (R, bins, Co)
  acc_t* grad_input;     // (N, H, W, C), added to; or null
  acc_t* grad_offset;    // as offset: what these channels contribute; or null
};

template <typename T>
struct RoIPoolKernel {
  int64_t (*scratch_bytes)(const DeformRoIPoolShape&, int64_t channels);
  // Pools RoIs [begin, end).
  void (*forward)(const DeformRoIPoolShape&, const RoIPoolTensors<T>&, const RoIPoolChannels&,
                  int64_t begin, int64_t end, std::byte* scratch);
  // The gradients of all RoIs of one image, in their order.
  void (*backward)(const DeformRoIPoolShape&, const RoIPoolTensors<T>&, const RoIPoolChannels&,
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
#undef MMDCN_DECLARE_KERNELS

}  // namespace mmdcn
