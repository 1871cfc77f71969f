// The schema of every operator.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(mmdcn, m) {
  // `offset` and `mask` are float64 beside float64 features and float32 beside all others.
  m.def(
      "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, int[2] stride, "
      "int[2] padding, int[2] dilation, Tensor? mask) -> Tensor");
  // `output_mask` says which gradients are wanted, of input, offset, weight and mask; the others
  // come back as tensors of no elements.
  m.def(
      "deform_conv2d_backward(Tensor grad_output, Tensor input, Tensor offset, Tensor weight, "
      "int[2] stride, int[2] padding, int[2] dilation, Tensor? mask, bool[4] output_mask) -> "
      "(Tensor grad_input, Tensor grad_offset, Tensor grad_weight, Tensor grad_mask)");
  // The instruction set that the CPU kernels use.
  m.def("cpu_capability() -> str");
}
