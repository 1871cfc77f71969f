// The CUDA operators, registration and all, for CPU tensors: namespace mmdcn_host.
//
// The registration files and the kernels are compiled from their own source. Only what it takes to
// have a GPU is replaced: the launches run blocks on the host, there is no device to switch to, and
// the dispatch key is the CPU's. Which kernels run is for the tests to say.
#include "../../mmdcn/csrc/deform_conv2d_tensors.h"
#include "host_device.h"
#include "host_kernels.h"

namespace mmdcn::cuda {
namespace {

template <typename scalar_t, typename acc_t>
using OneThread = HostKernels<HostContext<1, 1>, scalar_t, acc_t>;

}  // namespace

// What the environment would have chosen.
static Kernels wanted_kernels = Kernels::kSimple;
static int tensor_core_launches = 0;  // since they were chosen
Kernels chosen_kernels() { return wanted_kernels; }
bool has_tensor_cores(int) { return true; }

// So little that calls on several images take them one, two or three at a time.
int64_t deform_conv2d_workspace_bytes() { return 100'000; }

void deform_conv2d_forward(Kernels kernels, Precision precision, const DeformConv2dProblem& problem,
                           const void* input, const void* offset, const void* mask,
                           const void* weight, const void* bias, void* output, const Stream&) {
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    const auto run = [&](auto* function) {
      function(problem, static_cast<const scalar_t*>(input), static_cast<const acc_t*>(offset),
               static_cast<const acc_t*>(mask), static_cast<const scalar_t*>(weight),
               static_cast<const scalar_t*>(bias), static_cast<scalar_t*>(output));
    };
    if constexpr (std::is_same_v<acc_t, float>) {
      if (kernels == Kernels::kTensorCore) {
        ++tensor_core_launches;
        // Every size of tiles that there is.
        using Host = OneThread<scalar_t, acc_t>;
        if (problem.group_out_channels > 128) {
          return run(&Host::template tensor_forward<128, 256>);
        } else if (problem.group_out_channels > 64) {
          return run(&Host::template tensor_forward<128, 128>);
        }
        return run(&Host::template tensor_forward<64, 64>);
      }
    }
    run(&OneThread<scalar_t, acc_t>::forward);
  });
}

void deform_conv2d_magnitudes(Precision precision, const DeformConv2dProblem& problem,
                              const void* grad_output, const void* weight, const void* mask,
                              int32_t* magnitudes, const Stream&) {
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    OneThread<scalar_t, acc_t>::magnitudes(problem, static_cast<const scalar_t*>(grad_output),
                                           static_cast<const scalar_t*>(weight),
                                           static_cast<const acc_t*>(mask), magnitudes);
  });
}

void deform_conv2d_backward_data(Kernels kernels, Precision precision,
                                 const DeformConv2dProblem& problem, const void* grad_output,
                                 const void* input, const void* offset, const void* mask,
                                 const void* weight, const GradInput& grad_input, void* grad_offset,
                                 void* grad_mask, const Stream&) {
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    const auto run = [&](auto* function) {
      function(problem, static_cast<const scalar_t*>(grad_output),
               static_cast<const scalar_t*>(input), static_cast<const acc_t*>(offset),
               static_cast<const acc_t*>(mask), static_cast<const scalar_t*>(weight), grad_input,
               static_cast<acc_t*>(grad_offset), static_cast<acc_t*>(grad_mask));
    };
    if constexpr (std::is_same_v<acc_t, float>) {
      if (kernels == Kernels::kTensorCore) {
        ++tensor_core_launches;
        return run(&OneThread<scalar_t, acc_t>::tensor_backward_data);
      }
    }
    run(&OneThread<scalar_t, acc_t>::backward_data);
  });
}

void deform_conv2d_from_fixed(Precision precision, const DeformConv2dProblem& problem,
                              const GradInput& grad_input, void* sum, const Stream&) {
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    OneThread<scalar_t, acc_t>::from_fixed(problem, grad_input, static_cast<acc_t*>(sum));
  });
}

int64_t deform_conv2d_weight_splits(Kernels, Precision, const DeformConv2dProblem& problem) {
  // More than the GPU would take for problems this small, and not always evenly divided.
  return 1 + problem.all_pixels % 4;
}

void deform_conv2d_backward_weight(Kernels kernels, Precision precision,
                                   const DeformConv2dProblem& problem, const void* grad_output,
                                   const void* input, const void* offset, const void* mask,
                                   int64_t splits, bool accumulate, void* workspace,
                                   const Stream&) {
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    const auto run = [&](auto* function) {
      function(problem, static_cast<const scalar_t*>(grad_output),
               static_cast<const scalar_t*>(input), static_cast<const acc_t*>(offset),
               static_cast<const acc_t*>(mask), splits, accumulate, static_cast<acc_t*>(workspace));
    };
    if constexpr (std::is_same_v<acc_t, float>) {
      if (kernels == Kernels::kTensorCore) {
        ++tensor_core_launches;
        return run(&OneThread<scalar_t, acc_t>::tensor_backward_weight);
      }
    }
    run(&OneThread<scalar_t, acc_t>::backward_weight);
  });
}

void deform_conv2d_sum_splits(Precision precision, const DeformConv2dProblem& problem,
                              int64_t splits, const void* workspace, void* grad_weight,
                              const Stream&) {
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    OneThread<scalar_t, acc_t>::sum_splits(problem, splits, static_cast<const acc_t*>(workspace),
                                           static_cast<scalar_t*>(grad_weight));
  });
}

}  // namespace mmdcn::cuda

extern "C" __attribute__((visibility("default"))) void mmdcn_host_use_tensor_cores(int use) {
  using namespace mmdcn::cuda;
  wanted_kernels = use ? Kernels::kTensorCore : Kernels::kSimple;
  tensor_core_launches = 0;
}

extern "C" __attribute__((visibility("default"))) int mmdcn_host_tensor_core_launches() {
  return mmdcn::cuda::tensor_core_launches;
}

// Every header is included by now: what follows renames the dispatch key and the operators'
// namespace in the registration itself, and nothing else.
namespace mmdcn_host {
using namespace mmdcn;
namespace cuda {
using namespace mmdcn::cuda;
mmdcn::cuda::Kernels kernels_of_environment();
}  // namespace cuda
}  // namespace mmdcn_host
#define mmdcn mmdcn_host
#define CUDA CPU
#include "../../mmdcn/csrc/cuda/deform_conv2d/operator.cpp"
// The choice that the environment makes; here only cuda_kernels() tells it.
#define chosen_kernels kernels_of_environment
#include "../../mmdcn/csrc/cuda/deform_conv2d/choice.cpp"
