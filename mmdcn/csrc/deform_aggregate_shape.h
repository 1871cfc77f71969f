// The sizes of one grouped deformable aggregation, the operator of DCNv3 and DCNv4, and the
// positions of its taps on the input, for every device:
//
//   Y(p0) = sum_k m_k X(p0 + s (p_k + dp_k))
//
// in each channel of a group, with the group's own modulations m_k and offsets dp_k, and offset
// scale s. p0 is the input position under the middle of the kernel.
#pragma once

#include <cstdint>

#include "sampling.h"

namespace mmdcn {

// The kernel along one dimension.
struct AggregateAxis {
  int64_t size, out_size;  // of the input and the output
  int64_t kernel;
  GridAxis grid;

  MMDCN_HOST_DEVICE int64_t middle() const { return grid.dilation * (kernel - 1) / 2; }
  // p0 of an output position.
  MMDCN_HOST_DEVICE int64_t origin(int64_t position) const {
    return grid.base(position, 0) + middle();
  }
  // p_k of tap number `tap` along this dimension.
  MMDCN_HOST_DEVICE int64_t relative(int64_t tap) const { return tap * grid.dilation - middle(); }
};

struct DeformAggregateShape {
  int64_t batch, channels, groups;
  AggregateAxis y, x;
  double offset_scale;
  bool remove_center;  // whether the tap in the middle is left out

  MMDCN_HOST_DEVICE int64_t pixels() const { return y.out_size * x.out_size; }
  MMDCN_HOST_DEVICE int64_t group_channels() const { return channels / groups; }
  MMDCN_HOST_DEVICE int64_t taps() const { return y.kernel * x.kernel - (remove_center ? 1 : 0); }
  // The tap's number in the whole kernel, the middle one included. Taps are numbered column by
  // column, each from its top.
  MMDCN_HOST_DEVICE int64_t full_tap(int64_t tap) const {
    return tap + (remove_center && tap >= y.kernel * x.kernel / 2 ? 1 : 0);
  }
};

// Strides, in elements, of the offsets or of the modulations; the taps of a group are contiguous.
struct AggregateLayout {
  int64_t pixel_stride, group_stride;
};

}  // namespace mmdcn
