// Layouts, precisions and streams, the arguments of every operator's launches, without a header of
// PyTorch's or CUDA's.
#pragma once

#include <cstdint>

#include "../host_device.h"

namespace mmdcn::cuda {

// Strides, in elements, of a dense 4-D tensor whose two spatial dimensions are flattened into
// positions: contiguous (NCHW) has position = 1, channels last (NHWC) has channel = 1.
struct Layout {
  int64_t batch, channel, position;

  MMDCN_HOST_DEVICE int64_t index(int64_t image, int64_t at_channel, int64_t at_position) const {
    return image * batch + at_channel * channel + at_position * position;
  }
};

inline Layout contiguous_layout(int64_t channels, int64_t positions) {
  return {channels * positions, positions, 1};
}

inline Layout channels_last_layout(int64_t channels, int64_t positions) {
  return {channels * positions, 1, channels};
}

// dtype of input, weight, bias, output and their gradients. Offset, mask, their gradients, all
// workspaces and all arithmetic are double for kFloat64 and float for the others.
enum class Precision { kFloat64, kFloat32, kFloat16, kBFloat16 };

// Where to launch: a cudaStream_t and the device it belongs to, which becomes the current one.
struct Stream {
  int device;
  void* handle;
};

}  // namespace mmdcn::cuda
