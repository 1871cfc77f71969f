// The sizes of one deformable convolution, for every device.
#pragma once

#include <cstdint>

#include "sampling.h"

namespace mmdcn {

struct DeformConv2dShape {
  int64_t batch, channels, height, width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t groups, deform_groups;
  GridAxis y, x;

  MMDCN_HOST_DEVICE int64_t taps() const { return kernel_height * kernel_width; }
  MMDCN_HOST_DEVICE int64_t pixels() const { return out_height * out_width; }
  MMDCN_HOST_DEVICE int64_t group_channels() const { return channels / groups; }
  MMDCN_HOST_DEVICE int64_t group_out_channels() const { return out_channels / groups; }
  MMDCN_HOST_DEVICE int64_t deform_group_channels() const { return channels / deform_groups; }
};

}  // namespace mmdcn
