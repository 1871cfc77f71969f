// The kernels of deform_conv_nd under the host's sanitizers: see check.h.
#include <algorithm>
#include <limits>

#include "check.h"
#include "host_conv_nd.h"

namespace mmdcn::cuda {
namespace {

constexpr int R = 3;

DeformConvNdShape<R> draw_shape(Draw& draw) {
  DeformConvNdShape<R> shape = {};
  shape.batch = draw.between(1, 3);
  shape.channels = draw.one_of({1, 2, 6, 12, 40});
  shape.groups = draw.divisor(shape.channels);
  shape.deform_groups = draw.divisor(shape.channels);
  shape.out_channels = shape.groups * draw.one_of({1, 2, shape.groups < 3 ? 70 : 3});
  for (int d = 0; d < R; ++d) {
    shape.kernel[d] = draw.between(1, 2);
    shape.axis[d] = {draw.between(1, 2), draw.between(0, 2), draw.between(1, 2)};
    const GridAxis& axis = shape.axis[d];
    const int64_t reach = axis.dilation * (shape.kernel[d] - 1) + 1;
    shape.size[d] = std::max<int64_t>(reach - 2 * axis.padding, 1) + draw.between(0, 3);
    shape.out_size[d] = (shape.size[d] + 2 * axis.padding - reach) / axis.stride + 1;
  }
  return shape;
}

template <typename T>
struct Results {
  std::vector<T> output, grad_input, grad_offset, grad_mask, grad_weight;
};

struct Check {
  template <typename Several, typename T>
  static bool agrees(unsigned seed) {
    Draw draw(seed);
    const ConvNdProblem<R> problem(draw_shape(draw));
    const DeformConvNdShape<R>& shape = problem.shape;
    const int64_t samples = all_pixels(problem) * shape.samples();
    const std::vector<T> input =
        draw.normal<T>(shape.batch * shape.positions() * shape.channels, 1);
    std::vector<T> offset = draw.normal<T>(R * samples, 2);
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    for (const T value : {T(NAN), kInfinity, -kInfinity, T(1e30), T(-1e30), T(1e10), T(-1e10)}) {
      offset[draw.between(0, offset.size() - 1)] = value;
    }
    const std::vector<T> mask = draw.normal<T>(draw.between(0, 1) ? samples : 0, 1);
    const std::vector<T> weight =
        draw.normal<T>(shape.out_channels * shape.group_channels() * shape.taps(), 1);
    const std::vector<T> bias = draw.normal<T>(draw.between(0, 1) ? shape.out_channels : 0, 1);
    const std::vector<T> grad_output = draw.normal<T>(all_pixels(problem) * shape.out_channels, 1);
    const bool to_input = draw.between(0, 3) > 0, to_offset = draw.between(0, 3) > 0;
    const bool to_mask = !mask.empty() && draw.between(0, 3) > 0;

    const auto run = [&](auto context) {
      using Kernels = HostConvNd<typename decltype(context)::type, R, T, T>;
      Results<T> out;
      out.output.resize(grad_output.size());
      out.grad_input.resize(to_input ? input.size() : 0);
      out.grad_offset.resize(to_offset ? offset.size() : 0);
      out.grad_mask.resize(to_mask ? samples : 0);
      out.grad_weight.resize(weight.size());
      Kernels::forward(problem, data(input), data(offset), data(mask), data(weight), data(bias),
                       data(out.output));
      Kernels::backward_data(problem, data(grad_output), data(input), data(offset), data(mask),
                             data(weight), data(out.grad_input), data(out.grad_offset),
                             data(out.grad_mask));
      Kernels::backward_weight(problem, data(grad_output), data(input), data(offset), data(mask),
                               data(out.grad_weight));
      return out;
    };
    const Results<T> one = run(Type<HostContext<1, 1>>{}), several = run(Type<Several>{});
    const bool failed = differ("output", one.output, several.output) ||
                        differ("grad_input", one.grad_input, several.grad_input, T(1e-2)) ||
                        differ("grad_offset", one.grad_offset, several.grad_offset) ||
                        differ("grad_mask", one.grad_mask, several.grad_mask) ||
                        differ("grad_weight", one.grad_weight, several.grad_weight);
    if (failed) std::printf("seed %u\n", seed);
    return !failed;
  }
};

}  // namespace
}  // namespace mmdcn::cuda

int main(int argc, char** argv) { return mmdcn::cuda::check_all<mmdcn::cuda::Check>(argc, argv); }
