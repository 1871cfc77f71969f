// The CUDA kernels' source under the host's sanitizers, which see every access out of bounds, every
// undefined conversion and, between the threads of a block, every missing barrier.
//
//   host_check KERNELS FIRST_SEED PROBLEMS THREADS
//
// draws problems, in buffers of exactly the right size, and runs KERNELS (simple or tensor_core) on
// them, on blocks of one thread and on blocks of THREADS: 4, or 256 as on the GPU. Both must agree:
// to the bit, but for what is added atomically in floating point.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "draw.h"
#include "host_kernels.h"

namespace mmdcn::cuda {
namespace {

enum class Family { kSimple, kTensorCore };

DeformConv2dProblem draw_problem(Draw& draw, Family family) {
  DeformConv2dShape shape = {};
  shape.batch = draw.between(1, 3);
  if (family == Family::kSimple) {
    shape.channels = draw.one_of({1, 2, 3, 4, 6, 12, 17, 40, 70, 130});
    shape.groups = draw.divisor(shape.channels);
    shape.deform_groups = draw.divisor(shape.channels);
    const std::vector<int64_t> few = {1, 2}, some = {1, 5, 67};
    shape.out_channels = shape.groups * draw.one_of(shape.groups < 8 ? some : few);
  } else {
    shape.groups = draw.between(1, 2);
    shape.deform_groups = draw.between(1, 2);
    shape.channels = 32 * shape.groups * shape.deform_groups;
    shape.out_channels = shape.groups * draw.one_of({8, 72});
  }
  shape.height = draw.between(1, 9);
  shape.width = draw.between(1, 9);
  shape.kernel_height = draw.between(1, 3);
  shape.kernel_width = draw.between(1, 3);
  shape.y = {draw.between(1, 2), draw.between(2, 4), draw.between(1, 2)};
  shape.x = {draw.between(1, 2), draw.between(2, 4), draw.between(1, 2)};
  const auto out_size = [](int64_t size, int64_t kernel, const GridAxis& axis) {
    return (size + 2 * axis.padding - axis.dilation * (kernel - 1) - 1) / axis.stride + 1;
  };
  shape.out_height = out_size(shape.height, shape.kernel_height, shape.y);
  shape.out_width = out_size(shape.width, shape.kernel_width, shape.x);
  const auto layout = [&](int64_t channels, int64_t positions) {
    return family == Family::kTensorCore || draw.between(0, 1)
               ? channels_last_layout(channels, positions)
               : contiguous_layout(channels, positions);
  };
  return {shape, layout(shape.channels, shape.height * shape.width),
          layout(shape.out_channels, shape.pixels())};
}

template <typename T, typename acc_t>
struct Results {
  std::vector<T> output, planes, grad_weight;  // the output channels last and not
  std::vector<acc_t> sum, fixed_sum, grad_offset, grad_mask, workspace;
};

template <typename T, typename acc_t>
struct Inputs {
  std::vector<T> input, weight, bias, grad_output;
  std::vector<acc_t> offset, mask;
  bool to_input, to_offset, to_mask;
  int64_t splits;
};

template <typename T>
T* data(std::vector<T>& values) {
  return values.empty() ? nullptr : values.data();
}
template <typename T>
const T* data(const std::vector<T>& values) {
  return values.empty() ? nullptr : values.data();
}

template <Family kFamily, typename Ctx, typename T, typename acc_t>
Results<T, acc_t> run(const DeformConv2dProblem& problem, const Inputs<T, acc_t>& in) {
  using Kernels = HostKernels<Ctx, T, acc_t>;
  constexpr bool kTensorCore = kFamily == Family::kTensorCore;
  Results<T, acc_t> out;
  out.output.resize(in.grad_output.size());
  out.planes.resize(kTensorCore ? in.grad_output.size() : 0);
  out.sum.resize(in.to_input ? in.input.size() : 0);
  out.fixed_sum.resize(out.sum.size());
  out.grad_offset.resize(in.to_offset ? in.offset.size() : 0);
  out.grad_mask.resize(in.to_mask ? in.mask.size() : 0);
  out.workspace.resize(in.splits * in.weight.size());
  out.grad_weight.resize(in.weight.size());
  const auto forward = [&](const DeformConv2dProblem& to, std::vector<T>& output) {
    const auto function = [] {
      if constexpr (kTensorCore) {
        return &Kernels::template tensor_forward<64, 64>;
      } else {
        return &Kernels::forward;
      }
    }();
    function(to, data(in.input), data(in.offset), data(in.mask), data(in.weight), data(in.bias),
             data(output));
  };
  forward(problem, out.output);
  if (kTensorCore) {
    const DeformConv2dShape& shape = problem.shape;
    forward({shape, problem.input, contiguous_layout(shape.out_channels, problem.pixels)},
            out.planes);
  }
  const auto backward_data = [&](const GradInput& grad_input) {
    const auto function = [] {
      if constexpr (kTensorCore) {
        return &Kernels::tensor_backward_data;
      } else {
        return &Kernels::backward_data;
      }
    }();
    function(problem, data(in.grad_output), data(in.input), data(in.offset), data(in.mask),
             data(in.weight), grad_input, data(out.grad_offset), data(out.grad_mask));
  };
  GradInput grad_input;
  grad_input.sum = data(out.sum);
  backward_data(grad_input);
  if (in.to_input) {
    std::vector<int64_t> fixed(in.input.size());
    std::vector<int32_t> magnitudes(3);
    Kernels::magnitudes(problem, data(in.grad_output), data(in.weight), data(in.mask),
                        data(magnitudes));
    grad_input = {nullptr, data(fixed), data(magnitudes)};
    backward_data(grad_input);
    Kernels::from_fixed(problem, grad_input, data(out.fixed_sum));
  }
  for (const bool accumulate : {false, true}) {
    const auto function = [] {
      if constexpr (kTensorCore) {
        return &Kernels::tensor_backward_weight;
      } else {
        return &Kernels::backward_weight;
      }
    }();
    function(problem, data(in.grad_output), data(in.input), data(in.offset), data(in.mask),
             in.splits, accumulate, data(out.workspace));
  }
  Kernels::sum_splits(problem, in.splits, data(out.workspace), data(out.grad_weight));
  return out;
}

template <typename T>
bool differ(const char* name, const std::vector<T>& one, const std::vector<T>& several,
            double tolerance = 0) {
  for (size_t i = 0; i < one.size(); ++i) {
    const double a = static_cast<double>(one[i]), b = static_cast<double>(several[i]);
    if (!(std::abs(a - b) <= tolerance)) {
      std::printf("%s[%zu]: %g on one thread, %g on several\n", name, i, a, b);
      return true;
    }
  }
  return false;
}

template <Family kFamily, typename Several, typename T>
bool check(unsigned seed) {
  using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;
  Draw draw(seed);
  const DeformConv2dProblem problem = draw_problem(draw, kFamily);
  const int64_t points = problem.all_pixels * problem.shape.deform_groups * problem.taps;
  const auto normal = [&](int64_t elements) {
    const std::vector<acc_t> values = draw.normal<acc_t>(elements, 1);
    return std::vector<T>(values.begin(), values.end());
  };
  Inputs<T, acc_t> in;
  in.input = normal(problem.shape.batch * problem.input.batch);
  in.offset = draw.normal<acc_t>(2 * points, 2);
  constexpr acc_t kInfinity = std::numeric_limits<acc_t>::infinity();
  for (const acc_t value :
       {acc_t(NAN), kInfinity, -kInfinity, acc_t(1e30), acc_t(-1e30), acc_t(1e10), acc_t(-1e10)}) {
    in.offset[draw.between(0, 2 * points - 1)] = value;
  }
  if (draw.between(0, 1)) in.mask = draw.normal<acc_t>(points, 1);
  in.weight = normal(problem.shape.out_channels * problem.columns);
  if (draw.between(0, 1)) in.bias = normal(problem.shape.out_channels);
  in.grad_output = normal(problem.all_pixels * problem.shape.out_channels);
  in.to_input = draw.between(0, 3) > 0;
  in.to_offset = draw.between(0, 3) > 0;
  in.to_mask = !in.mask.empty() && draw.between(0, 3) > 0;
  in.splits = draw.between(1, 4);

  const auto one = run<kFamily, HostContext<1, 1>>(problem, in);
  const auto several = run<kFamily, Several>(problem, in);
  const bool failed = differ("output", one.output, several.output) ||
                      differ("output, not channels last", one.planes, several.planes) ||
                      differ("grad_input", one.sum, several.sum, 1e-2) ||
                      differ("grad_input", one.sum, one.fixed_sum, 1e-2) ||
                      differ("grad_input, fixed-point", one.fixed_sum, several.fixed_sum) ||
                      differ("grad_offset", one.grad_offset, several.grad_offset) ||
                      differ("grad_mask", one.grad_mask, several.grad_mask) ||
                      differ("grad_weight", one.grad_weight, several.grad_weight);
  if (failed) std::printf("seed %u\n", seed);
  return !failed;
}

template <Family kFamily, typename Several>
bool check_all(unsigned first, unsigned problems) {
  bool passed = true;
  for (unsigned seed = first; seed < first + problems; ++seed) {
    passed = check<kFamily, Several, float>(seed) && passed;
    if constexpr (kFamily == Family::kSimple) {
      passed = check<kFamily, Several, double>(seed) && passed;
    }
  }
  return passed;
}

template <Family kFamily>
bool check_all(unsigned first, unsigned problems, int threads) {
  return threads == 4 ? check_all<kFamily, HostContext<2, 2>>(first, problems)
                      : check_all<kFamily, HostContext<16, 16>>(first, problems);
}

}  // namespace
}  // namespace mmdcn::cuda

int main(int argc, char** argv) {
  using namespace mmdcn::cuda;
  const std::string kernels = argc == 5 ? argv[1] : "";
  const int threads = argc == 5 ? std::atoi(argv[4]) : 0;
  if ((kernels != "simple" && kernels != "tensor_core") || (threads != 4 && threads != 256)) {
    std::fprintf(stderr,
                 "usage: host_check simple|tensor_core FIRST_SEED PROBLEMS THREADS, THREADS being "
                 "4 or 256\n");
    return 2;
  }
  const unsigned first = std::atoi(argv[2]), problems = std::atoi(argv[3]);
  const bool passed = kernels == "simple"
                          ? check_all<Family::kSimple>(first, problems, threads)
                          : check_all<Family::kTensorCore>(first, problems, threads);
  std::printf("%u problems: %s\n", problems, passed ? "passed" : "FAILED");
  return passed ? 0 : 1;
}
