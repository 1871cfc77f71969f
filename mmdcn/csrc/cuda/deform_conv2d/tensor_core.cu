// Kernels and launches of deformable convolution on tensor cores: the block programs, bound to the
// GPU.
#include "../launch.h"
#include "tensor_core.h"
#include "tensor_core_backward_data.h"
#include "tensor_core_backward_weight.h"
#include "tensor_core_context.h"
#include "tensor_core_forward.h"

namespace mmdcn::cuda {
namespace {

// Where GPUs without these tensor cores are built for, kernels are empty, and never launched.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kTensorCores = false;
#else
constexpr bool kTensorCores = true;
#endif

// Shared memory that every GPU of compute capability 8.0 or newer has for a block.
constexpr size_t kLargestStorage = 99 * 1024;

template <typename T, int kPixels, int kOut>
__global__ void __launch_bounds__(TensorCoreContext::kThreads, kOut > 128 ? 1 : 2)
    tensor_forward_kernel(const DeformConv2dProblem problem, const T* input, const float* offset,
                          const float* mask, const T* weight, const T* bias, T* output) {
  using Storage = TensorForwardStorage<T, kPixels, kOut>;
  static_assert(sizeof(Storage) <= kLargestStorage, "too much shared memory");
  extern __shared__ __align__(128) unsigned char memory[];
  if constexpr (kTensorCores) {
    tensor_forward_block(TensorCoreContext{}, problem, input, offset, mask, weight, bias, output,
                         *reinterpret_cast<Storage*>(memory));
  }
}

template <typename T, typename Sum>
__global__ void __launch_bounds__(TensorCoreContext::kThreads, 2)
    tensor_backward_data_kernel(const DeformConv2dProblem problem, const T* grad_output,
                                const T* input, const float* offset, const float* mask,
                                const T* weight, const GradInput grad_input, float* grad_offset,
                                float* grad_mask) {
  __shared__ TensorBackwardDataStorage<T> storage;
  if constexpr (kTensorCores) {
    tensor_backward_data_block(TensorCoreContext{}, problem, grad_output, input, offset, mask,
                               weight, Sum(problem, grad_input), grad_offset, grad_mask, storage);
  }
}

template <typename T>
__global__ void __launch_bounds__(TensorCoreContext::kThreads, 2)
    tensor_backward_weight_kernel(const DeformConv2dProblem problem, const T* grad_output,
                                  const T* input, const float* offset, const float* mask,
                                  int64_t splits, bool accumulate, float* workspace) {
  __shared__ TensorBackwardWeightStorage<T> storage;
  if constexpr (kTensorCores) {
    tensor_backward_weight_block(TensorCoreContext{}, problem, grad_output, input, offset, mask,
                                 splits, accumulate, workspace, storage);
  }
}

// Calls run(Type<T>) for the type of the operands.
template <typename Run>
void dispatch(Precision precision, const Run& run) {
  switch (precision) {
    case Precision::kFloat32:
      return run(Type<float>{});
    case Precision::kFloat16:
      return run(Type<__half>{});
    case Precision::kBFloat16:
      return run(Type<__nv_bfloat16>{});
    case Precision::kFloat64:
      throw std::runtime_error("mmdcn: the kernels for tensor cores have no float64");
  }
}

int64_t forward_tiles(const DeformConv2dProblem& problem, int pixels, int outs) {
  return tiles(problem.all_pixels, pixels) * problem.shape.groups *
         tiles(problem.group_out_channels, outs);
}

}  // namespace

bool has_tensor_cores(int device) {
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return major >= 8;
}

void tensor_forward(Precision precision, const DeformConv2dProblem& problem, const void* input,
                    const float* offset, const float* mask, const void* weight, const void* bias,
                    void* output, const Stream& stream) {
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, stream.device));
  dispatch(precision, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto run = [&](auto kernel, int pixels, int outs, size_t storage) {
      launch(kernel, forward_tiles(problem, pixels, outs), storage, stream, problem,
             static_cast<const T*>(input), offset, mask, static_cast<const T*>(weight),
             static_cast<const T*>(bias), static_cast<T*>(output));
    };
    // The larger a tile, the less often weights are read and samples gathered; but there must be
    // one for each multiprocessor. The order of summation is the same in all.
    if (problem.group_out_channels > 128 && forward_tiles(problem, 128, 256) >= multiprocessors) {
      run(tensor_forward_kernel<T, 128, 256>, 128, 256, sizeof(TensorForwardStorage<T, 128, 256>));
    } else if (problem.group_out_channels > 64 &&
               forward_tiles(problem, 128, 128) >= multiprocessors) {
      run(tensor_forward_kernel<T, 128, 128>, 128, 128, sizeof(TensorForwardStorage<T, 128, 128>));
    } else {
      run(tensor_forward_kernel<T, 64, 64>, 64, 64, sizeof(TensorForwardStorage<T, 64, 64>));
    }
  });
}

void tensor_backward_data(Precision precision, const DeformConv2dProblem& problem,
                          const void* grad_output, const void* input, const float* offset,
                          const float* mask, const void* weight, const GradInput& grad_input,
                          float* grad_offset, float* grad_mask, const Stream& stream) {
  const int64_t blocks =
      tiles(problem.all_pixels, kDataPixels) * problem.taps * problem.shape.deform_groups;
  dispatch(precision, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto kernel = grad_input.fixed ? tensor_backward_data_kernel<T, FixedSum<float>>
                                         : tensor_backward_data_kernel<T, FloatingSum<float>>;
    launch(kernel, blocks, 0, stream, problem, static_cast<const T*>(grad_output),
           static_cast<const T*>(input), offset, mask, static_cast<const T*>(weight), grad_input,
           grad_offset, grad_mask);
  });
}

namespace {

int64_t weight_tiles(const DeformConv2dProblem& problem) {
  const int64_t run = std::min(problem.group_channels, problem.deform_group_channels);
  return problem.shape.channels / run * tiles(run, kWeightChannels) * problem.taps *
         tiles(problem.group_out_channels, kWeightOut);
}

}  // namespace

int64_t tensor_weight_splits(Precision precision, const DeformConv2dProblem& problem) {
  // Two blocks for each multiprocessor of the largest GPUs of today, which have 132; the same on
  // all of them, so that results do not depend on the machine. A part is worth several steps.
  constexpr int64_t kBlocks = 264;
  const int64_t shortest = 8 * (precision == Precision::kFloat32 ? kStep<float> : kStep<__half>);
  return std::max<int64_t>(
      1, std::min(kBlocks / weight_tiles(problem), tiles(problem.all_pixels, shortest)));
}

void tensor_backward_weight(Precision precision, const DeformConv2dProblem& problem,
                            const void* grad_output, const void* input, const float* offset,
                            const float* mask, int64_t splits, bool accumulate, float* workspace,
                            const Stream& stream) {
  dispatch(precision, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(tensor_backward_weight_kernel<T>, splits * weight_tiles(problem), 0, stream, problem,
           static_cast<const T*>(grad_output), static_cast<const T*>(input), offset, mask, splits,
           accumulate, workspace);
  });
}

}  // namespace mmdcn::cuda
