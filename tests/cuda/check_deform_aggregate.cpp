// The kernels of deform_aggregate under the host's sanitizers: see check.h.
#include <limits>
#include <type_traits>

#include "check.h"
#include "host_deform_aggregate.h"

namespace mmdcn::cuda {
namespace {

AggregateAxis draw_axis(Draw& draw, bool odd) {
  AggregateAxis axis = {};
  axis.kernel = odd ? draw.one_of({1, 3, 5}) : draw.between(1, 5);
  axis.grid = {draw.between(1, 2), draw.between(2, 4), draw.between(1, 2)};
  axis.size = draw.between(1, 9) + (axis.kernel > 3 ? 4 : 0);
  axis.out_size = (axis.size + 2 * axis.grid.padding - axis.grid.dilation * (axis.kernel - 1) - 1) /
                      axis.grid.stride +
                  1;
  return axis;
}

AggregateProblem draw_problem(Draw& draw) {
  DeformAggregateShape shape = {};
  shape.batch = draw.between(1, 3);
  shape.channels = draw.one_of({1, 2, 6, 17, 40, 70});
  shape.groups = draw.divisor(shape.channels);
  shape.remove_center = draw.between(0, 1) > 0;
  shape.y = draw_axis(draw, shape.remove_center);
  shape.x = draw_axis(draw, shape.remove_center);
  if (shape.taps() == 0) shape.remove_center = false;
  shape.offset_scale = draw.between(0, 1) ? 1.0 : 0.7;
  const int64_t taps = shape.taps();
  // Apart, or packed one after the other as DCNv4 has them.
  if (draw.between(0, 1))
    return {shape, {2 * taps * shape.groups, 2 * taps}, {taps * shape.groups, taps}};
  return {shape, {3 * taps * shape.groups, 3 * taps}, {3 * taps * shape.groups, 3 * taps}};
}

template <typename T>
struct Results {
  std::vector<T> output, grad_input, grad_offset, grad_mask;
};

struct Check {
  template <typename Several, typename T>
  static bool agrees(unsigned seed) {
    Draw draw(seed);
    const AggregateProblem problem = draw_problem(draw);
    const DeformAggregateShape& shape = problem.shape;
    const int64_t pixels = shape.batch * shape.pixels();
    const int64_t samples = pixels * shape.groups * shape.taps();
    const std::vector<T> input =
        draw.normal<T>(shape.batch * shape.y.size * shape.x.size * shape.channels, 1);
    std::vector<T> offset = draw.normal<T>(pixels * problem.offset.pixel_stride, 2);
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    for (const T value : {T(NAN), kInfinity, -kInfinity, T(1e30), T(-1e30), T(1e10), T(-1e10)}) {
      offset[draw.between(0, offset.size() - 1)] = value;
    }
    const bool packed = problem.mask.pixel_stride == problem.offset.pixel_stride;
    const std::vector<T> apart = draw.normal<T>(packed ? 0 : samples, 1);
    // Packed modulations are at the end of each group's channels.
    const std::vector<T> whole = draw.normal<T>(packed ? offset.size() : 0, 1);
    const T* mask = packed ? whole.data() + 2 * shape.taps() : apart.data();
    const std::vector<T> grad_output = draw.normal<T>(pixels * shape.channels, 1);
    const bool to_input = draw.between(0, 3) > 0, to_offset = draw.between(0, 3) > 0;
    const bool to_mask = draw.between(0, 3) > 0;

    const auto run_with = [&](auto context, auto vector) {
      using Kernels =
          HostAggregate<typename decltype(context)::type, decltype(vector)::value, T, T>;
      Results<T> out;
      out.output.resize(grad_output.size());
      out.grad_input.resize(to_input ? input.size() : 0);
      out.grad_offset.resize(to_offset ? 2 * samples : 0);
      out.grad_mask.resize(to_mask ? samples : 0);
      Kernels::forward(problem, data(input), data(offset), mask, data(out.output));
      Kernels::backward(problem, data(grad_output), data(input), data(offset), mask,
                        data(out.grad_input), data(out.grad_offset), data(out.grad_mask));
      return out;
    };
    const bool vectors = shape.group_channels() % 2 == 0 && draw.between(0, 3) > 0;
    const auto run = [&](auto context) {
      return vectors ? run_with(context, std::integral_constant<int, 2>{})
                     : run_with(context, std::integral_constant<int, 1>{});
    };
    const Results<T> one = run(Type<HostContext<1, 1>>{}), several = run(Type<Several>{});
    const bool failed = differ("output", one.output, several.output) ||
                        differ("grad_input", one.grad_input, several.grad_input, T(1e-2)) ||
                        differ("grad_offset", one.grad_offset, several.grad_offset, T(1e-2)) ||
                        differ("grad_mask", one.grad_mask, several.grad_mask, T(1e-2));
    if (failed) std::printf("seed %u\n", seed);
    return !failed;
  }
};

}  // namespace
}  // namespace mmdcn::cuda

int main(int argc, char** argv) { return mmdcn::cuda::check_all<mmdcn::cuda::Check>(argc, argv); }
