// The schema of every operator.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(mmdcn, m) {
  // `offset` and `mask` are float64 beside float64 features and float32 beside all others.
  // On CUDA torch's settings count as they are when the operator runs: see cuda_settings below.
  // `allow_tf32` lets float32 be multiplied in TF32 whatever they say, and `matmul_tf32` says that
  // torch's own products of matrices do that.
  m.def(
      "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, int[2] stride, "
      "int[2] padding, int[2] dilation, Tensor? mask, *, bool allow_tf32=False, "
      "bool matmul_tf32=False) -> Tensor");
  // `output_mask` says which gradients are wanted, of input, offset, weight and mask; the others
  // come back as tensors of no elements. `deterministic` asks for the same bits in every run, which
  // costs time where the device adds in no fixed order otherwise.
  m.def(
      "deform_conv2d_backward(Tensor grad_output, Tensor input, Tensor offset, Tensor weight, "
      "int[2] stride, int[2] padding, int[2] dilation, Tensor? mask, bool[4] output_mask, *, "
      "bool allow_tf32=False, bool matmul_tf32=False, bool deterministic=False) -> "
      "(Tensor grad_input, Tensor grad_offset, Tensor grad_weight, Tensor grad_mask)");
  // The same over the number of dimensions that the kernels are compiled for, which is three.
  m.def(
      "deform_conv_nd(Tensor input, Tensor offset, Tensor weight, Tensor? bias, int[] stride, "
      "int[] padding, int[] dilation, Tensor? mask, *, bool allow_tf32=False, "
      "bool matmul_tf32=False) -> Tensor");
  m.def(
      "deform_conv_nd_backward(Tensor grad_output, Tensor input, Tensor offset, Tensor weight, "
      "int[] stride, int[] padding, int[] dilation, Tensor? mask, bool[4] output_mask, *, "
      "bool allow_tf32=False, bool matmul_tf32=False, bool deterministic=False) -> "
      "(Tensor grad_input, Tensor grad_offset, Tensor grad_weight, Tensor grad_mask)");
  // `rois` and `offset` are float64 beside float64 features and float32 beside all others. Where
  // position_sensitive, the input's channels are ordered by bin, then by output channel.
  m.def(
      "deform_roi_pool(Tensor input, Tensor rois, Tensor? offset, int[2] output_size, "
      "float spatial_scale, int sampling_ratio, float gamma, bool position_sensitive) -> Tensor");
  // `output_mask` says which gradients are wanted, of input and offset.
  m.def(
      "deform_roi_pool_backward(Tensor grad_output, Tensor input, Tensor rois, Tensor? offset, "
      "int[2] output_size, float spatial_scale, int sampling_ratio, float gamma, "
      "bool position_sensitive, bool[2] output_mask) -> (Tensor grad_input, Tensor grad_offset)");
  // `input` is (N, H, W, C), `offset` (N, Ho, Wo, groups, 2 taps) and `mask` (N, Ho, Wo, groups,
  // taps), the last two float64 beside float64 features and float32 beside all others.
  m.def(
      "deform_aggregate(Tensor input, Tensor offset, Tensor mask, int[2] kernel_size, "
      "int[2] stride, int[2] padding, int[2] dilation, float offset_scale, bool remove_center) -> "
      "Tensor");
  // `output_mask` says which gradients are wanted, of input, offset and mask.
  m.def(
      "deform_aggregate_backward(Tensor grad_output, Tensor input, Tensor offset, Tensor mask, "
      "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, float offset_scale, "
      "bool remove_center, bool[3] output_mask) -> "
      "(Tensor grad_input, Tensor grad_offset, Tensor grad_mask)");
  // The instruction set that the CPU kernels use.
  m.def("cpu_capability() -> str");
  // What torch's settings say: whether float32 may be multiplied in TF32 in convolutions, and in
  // products of matrices; whether cuDNN may be called, and must add in the same order in every run.
  // Implemented in Python (mmdcn/ops/_products.py), as nothing of torch's that is stable tells.
  m.def("cuda_settings() -> (bool tf32, bool matmul_tf32, bool cudnn, bool deterministic)");
  // Which of torch's operators computes a matrix product of a convolution on a CUDA device, where
  // the CUDA library is loaded: see cuda/deform_conv/product.h for the names. If torch refuses the
  // call for some tensors, that is an error; but where it `may_be_replaced`, matmul computes the
  // product, and is what is in force from then on.
  m.def("cuda_product(int device, str product, str arithmetic) -> str");
  m.def(
      "set_cuda_product(int device, str product, str arithmetic, str call, *, "
      "bool may_be_replaced=False) -> ()");
  // Says that this has happened, and why. Implemented in Python, as cuda_settings is.
  m.def("cuda_product_replaced(int device, str product, str arithmetic, str call, str why) -> ()");
  // Bytes of a convolution's columns that are worked on at a time, on all CUDA devices, in place of
  // what their caches suggest; these count again if it is 0.
  m.def("set_cuda_chunk(int bytes) -> ()");
}
