// The CUDA kernels' source under the host's sanitizers, which see every access out of bounds, every
// undefined conversion and, between the threads of a block, every missing barrier.
//
//   host_check FIRST_SEED PROBLEMS THREADS
//
// draws problems, in buffers of exactly the right size, and runs them on blocks of one thread and
// on blocks of THREADS: 4, or 256 as on the GPU. Both must agree: to the bit, but for what is added
// atomically.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "host_kernels.h"

namespace mmdcn::cuda {
namespace {

class Draw {
 public:
  explicit Draw(unsigned seed) : engine_(seed) {}

  int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine_);
  }
  int64_t one_of(const std::vector<int64_t>& values) {
    return values[between(0, values.size() - 1)];
  }
  int64_t divisor(int64_t number) {
    std::vector<int64_t> divisors;
    for (int64_t d = 1; d <= number; ++d) {
      if (number % d == 0) divisors.push_back(d);
    }
    return one_of(divisors);
  }
  template <typename T>
  std::vector<T> normal(int64_t elements, T spread) {
    std::vector<T> values(elements);
    std::normal_distribution<T> distribution(0, spread);
    for (T& value : values) value = distribution(engine_);
    return values;
  }

 private:
  std::mt19937 engine_;
};

DeformConv2dProblem draw_problem(Draw& draw) {
  DeformConv2dShape shape = {};
  shape.batch = draw.between(1, 3);
  shape.channels = draw.one_of({1, 2, 3, 4, 6, 12, 17, 40, 70, 130});
  shape.groups = draw.divisor(shape.channels);
  shape.deform_groups = draw.divisor(shape.channels);
  shape.out_channels = shape.groups * draw.one_of(shape.groups < 8 ? std::vector<int64_t>{1, 5, 67}
                                                                   : std::vector<int64_t>{1, 2});
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
    return draw.between(0, 1) ? channels_last_layout(channels, positions)
                              : contiguous_layout(channels, positions);
  };
  return {shape, layout(shape.channels, shape.height * shape.width),
          layout(shape.out_channels, shape.pixels())};
}

template <typename T>
struct Results {
  std::vector<T> output, grad_input, grad_offset, grad_mask, workspace, grad_weight;
};

template <typename T>
struct Inputs {
  std::vector<T> input, offset, mask, weight, bias, grad_output;
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

template <typename Ctx, typename T>
Results<T> run(const DeformConv2dProblem& problem, const Inputs<T>& in) {
  using Kernels = HostKernels<Ctx, T, T>;
  Results<T> out;
  out.output.resize(in.grad_output.size());
  out.grad_input.resize(in.to_input ? in.input.size() : 0);
  out.grad_offset.resize(in.to_offset ? in.offset.size() : 0);
  out.grad_mask.resize(in.to_mask ? in.mask.size() : 0);
  out.workspace.resize(in.splits * in.weight.size());
  out.grad_weight.resize(in.weight.size());
  Kernels::forward(problem, data(in.input), data(in.offset), data(in.mask), data(in.weight),
                   data(in.bias), data(out.output));
  Kernels::backward_data(problem, data(in.grad_output), data(in.input), data(in.offset),
                         data(in.mask), data(in.weight), data(out.grad_input),
                         data(out.grad_offset), data(out.grad_mask));
  Kernels::backward_weight(problem, data(in.grad_output), data(in.input), data(in.offset),
                           data(in.mask), in.splits, data(out.workspace), data(out.grad_weight));
  return out;
}

template <typename T>
bool differ(const char* name, const std::vector<T>& one, const std::vector<T>& several,
            T tolerance = 0) {
  for (size_t i = 0; i < one.size(); ++i) {
    if (!(std::abs(one[i] - several[i]) <= tolerance)) {
      std::printf("%s[%zu]: %g on one thread, %g on several\n", name, i,
                  static_cast<double>(one[i]), static_cast<double>(several[i]));
      return true;
    }
  }
  return false;
}

template <typename Several, typename T>
bool check(unsigned seed) {
  Draw draw(seed);
  const DeformConv2dProblem problem = draw_problem(draw);
  const int64_t points = problem.all_pixels * problem.shape.deform_groups * problem.taps;
  Inputs<T> in;
  in.input = draw.normal<T>(
      problem.shape.batch * problem.shape.channels * problem.shape.height * problem.shape.width, 1);
  in.offset = draw.normal<T>(2 * points, 2);
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  for (const T value : {T(NAN), kInfinity, -kInfinity, T(1e30), T(-1e30), T(1e10), T(-1e10)}) {
    in.offset[draw.between(0, 2 * points - 1)] = value;
  }
  if (draw.between(0, 1)) in.mask = draw.normal<T>(points, 1);
  in.weight = draw.normal<T>(problem.shape.out_channels * problem.columns, 1);
  if (draw.between(0, 1)) in.bias = draw.normal<T>(problem.shape.out_channels, 1);
  in.grad_output = draw.normal<T>(problem.all_pixels * problem.shape.out_channels, 1);
  in.to_input = draw.between(0, 3) > 0;
  in.to_offset = draw.between(0, 3) > 0;
  in.to_mask = !in.mask.empty() && draw.between(0, 3) > 0;
  in.splits = draw.between(1, 4);

  const Results<T> one = run<HostContext<1, 1>>(problem, in);
  const Results<T> several = run<Several>(problem, in);
  const bool failed = differ("output", one.output, several.output) ||
                      differ("grad_input", one.grad_input, several.grad_input, T(1e-2)) ||
                      differ("grad_offset", one.grad_offset, several.grad_offset) ||
                      differ("grad_mask", one.grad_mask, several.grad_mask) ||
                      differ("grad_weight", one.grad_weight, several.grad_weight);
  if (failed) std::printf("seed %u\n", seed);
  return !failed;
}

template <typename Several>
bool check_all(unsigned first, unsigned problems) {
  bool passed = true;
  for (unsigned seed = first; seed < first + problems; ++seed) {
    passed = check<Several, float>(seed) && passed;
    passed = check<Several, double>(seed) && passed;
  }
  return passed;
}

}  // namespace
}  // namespace mmdcn::cuda

int main(int argc, char** argv) {
  using namespace mmdcn::cuda;
  const int threads = argc == 4 ? std::atoi(argv[3]) : 0;
  if (threads != 4 && threads != 256) {
    std::fprintf(stderr, "usage: host_check FIRST_SEED PROBLEMS THREADS, THREADS being 4 or 256\n");
    return 2;
  }
  const unsigned first = std::atoi(argv[1]), problems = std::atoi(argv[2]);
  const bool passed = threads == 4 ? check_all<HostContext<2, 2>>(first, problems)
                                   : check_all<HostContext<16, 16>>(first, problems);
  std::printf("%u problems: %s\n", problems, passed ? "passed" : "FAILED");
  return passed ? 0 : 1;
}
