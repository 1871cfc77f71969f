// The CPU forward kernel of deform_conv2d, equations (2)-(4) of mmdcn/ops/reference.py. Compiled
// once for each instruction set, with MMDCN_CPU_CAPABILITY naming the namespace.
//
// For a tile of output pixels and some taps at a time, the input is sampled into `columns`
// (pixels × taps × C), which are multiplied by the taps' packed weights into the tile of the
// output; all of it stays in the second-level cache. Channels are sampled as vectors, from
// channels-last rows, between the steps of the multiplication for the taps before, which hides most
// of the time that sampling takes. If offset groups have few channels, these are sampled one by
// one, for all pixels of the tile. Depthwise convolutions have no product to multiply.
#include "forward_depthwise.h"
#include "forward_planes.h"
#include "forward_rows.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

template <Sampling sampling, typename T>
ForwardKernel<T> forward_kernel() {
  ForwardKernel<T> kernel = {};
  kernel.out_blocks = &out_blocks<sampling, T>;
  kernel.pack_slices = &pack_slices<T>;
  kernel.packed_bytes = &packed_bytes<sampling, T>;
  kernel.pack_weight = &pack_weight<sampling, T>;
  if constexpr (sampling == Sampling::kPlanes) {
    kernel.shares = &plane_shares<T>;
    kernel.scratch_bytes = &plane_scratch_bytes<T>;
    kernel.run = &run_planes<T>;
  } else {
    kernel.shares = &row_shares<T>;
    kernel.scratch_bytes = &row_scratch_bytes<T>;
    kernel.run = &run_rows<T>;
  }
  return kernel;
}

template <typename T>
ForwardKernel<T> depthwise_kernel() {
  ForwardKernel<T> kernel = {};
  kernel.out_blocks = &one_block;
  kernel.pack_slices = &one_slice;
  kernel.packed_bytes = &depthwise_bytes<T>;
  kernel.pack_weight = &pack_depthwise_weight<T>;
  kernel.shares = &row_shares<T>;
  kernel.scratch_bytes = &depthwise_scratch_bytes<T>;
  kernel.run = &run_depthwise<T>;
  return kernel;
}

}  // namespace

template <typename T>
ForwardKernel<T> deform_conv2d_forward(const DeformConv2dShape& shape) {
  if (is_depthwise(shape)) return depthwise_kernel<T>();
  return shape.deform_group_channels() <= kPlanarChannels ? forward_kernel<Sampling::kPlanes, T>()
                                                          : forward_kernel<Sampling::kRows, T>();
}

template ForwardKernel<double> deform_conv2d_forward<double>(const DeformConv2dShape&);
template ForwardKernel<float> deform_conv2d_forward<float>(const DeformConv2dShape&);
template ForwardKernel<Half> deform_conv2d_forward<Half>(const DeformConv2dShape&);
template ForwardKernel<BFloat16> deform_conv2d_forward<BFloat16>(const DeformConv2dShape&);

}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
