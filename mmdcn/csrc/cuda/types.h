// Precisions and streams, the arguments of every operator's launches, without a header of
// PyTorch's or CUDA's.
#pragma once

#include <cstdint>

namespace mmdcn::cuda {

// dtype of input, weight, bias, output and their gradients. Offset, mask, their gradients, all
// workspaces and all arithmetic are double for kFloat64 and float for the others.
enum class Precision { kFloat64, kFloat32, kFloat16, kBFloat16 };

// Where to launch: a cudaStream_t and the device it belongs to, which becomes the current one.
struct Stream {
  int device;
  void* handle;
};

}  // namespace mmdcn::cuda
