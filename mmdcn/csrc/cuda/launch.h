// How the registration files say what to launch, and where. No PyTorch and no CUDA header.
#pragma once

namespace mmdcn::cuda {

// dtype of features, weights and their gradients. Coordinates, modulations, their gradients, all
// workspaces and all arithmetic are double for kFloat64 and float for the others.
enum class Precision { kFloat64, kFloat32, kFloat16, kBFloat16 };

// Where to launch: a cudaStream_t and the device it belongs to, which becomes the current one.
struct Stream {
  int device;
  void* handle;
};

}  // namespace mmdcn::cuda
