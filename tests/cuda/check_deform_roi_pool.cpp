// The kernels of deform_roi_pool under the host's sanitizers: see check.h.
#include <limits>
#include <type_traits>

#include "check.h"
#include "host_deform_roi_pool.h"

namespace mmdcn::cuda {
namespace {

DeformRoIPoolShape draw_shape(Draw& draw, bool has_offset) {
  DeformRoIPoolShape shape = {};
  shape.batch = draw.between(1, 3);
  shape.height = draw.between(0, 9);
  shape.width = draw.between(1, 9);
  shape.rois = draw.between(1, 6);
  shape.out_height = draw.between(1, 4);
  shape.out_width = draw.between(1, 4);
  shape.out_channels = draw.one_of({1, 2, 6, 17, 40, 70});
  shape.deform_groups = has_offset ? draw.divisor(shape.out_channels) : 1;
  shape.position_sensitive = draw.between(0, 1) > 0;
  shape.channels = shape.out_channels * (shape.position_sensitive ? shape.bins() : 1);
  shape.sampling_ratio = draw.one_of({-1, 0, 1, 2, 5, 20});
  shape.spatial_scale = 0.5;
  shape.gamma = 0.3;
  return shape;
}

template <typename T>
struct Results {
  std::vector<T> output, grad_input, grad_offset;
};

struct Check {
  template <typename Several, typename T>
  static bool agrees(unsigned seed) {
    Draw draw(seed);
    const bool has_offset = draw.between(0, 1) > 0;
    const DeformRoIPoolShape shape = draw_shape(draw, has_offset);
    std::vector<T> input =
        draw.normal<T>(shape.batch * shape.channels * shape.height * shape.width, 1);
    std::vector<T> rois = draw.normal<T>(5 * shape.rois, 10), offset;
    for (int64_t r = 0; r < shape.rois; ++r) rois[5 * r] = draw.between(0, shape.batch - 1);
    if (has_offset) {
      offset = draw.normal<T>(2 * shape.rois * shape.deform_groups * shape.bins(), 2);
    }
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    for (const T value : {T(NAN), kInfinity, -kInfinity, T(1e30), T(-1e30), T(1e10), T(-3e3)}) {
      if (draw.between(0, 9) == 0) {
        rois[5 * draw.between(0, shape.rois - 1) + draw.between(1, 4)] = value;
      }
      if (!offset.empty()) offset[draw.between(0, offset.size() - 1)] = value;
    }
    const std::vector<T> grad_output =
        draw.normal<T>(shape.rois * shape.out_channels * shape.bins(), 1);
    const bool to_input = draw.between(0, 3) > 0;
    const bool to_offset = !offset.empty() && draw.between(0, 3) > 0;

    const auto run_with = [&](auto context, auto vector) {
      using Kernels = HostRoIPool<typename decltype(context)::type, decltype(vector)::value, T, T>;
      Results<T> out;
      out.output.resize(grad_output.size());
      out.grad_input.resize(to_input ? input.size() : 0);
      out.grad_offset.resize(to_offset ? offset.size() : 0);
      Kernels::forward(shape, data(input), data(rois), data(offset), data(out.output));
      Kernels::backward(shape, data(grad_output), data(input), data(rois), data(offset),
                        data(out.grad_input), data(out.grad_offset));
      return out;
    };
    const bool vectors = shape.deform_group_channels() % 2 == 0 && draw.between(0, 3) > 0;
    const auto run = [&](auto context) {
      return vectors ? run_with(context, std::integral_constant<int, 2>{})
                     : run_with(context, std::integral_constant<int, 1>{});
    };
    const Results<T> one = run(Type<HostContext<1, 1>>{}), several = run(Type<Several>{});
    const bool failed = differ("output", one.output, several.output) ||
                        differ("grad_input", one.grad_input, several.grad_input, T(1e-2)) ||
                        differ("grad_offset", one.grad_offset, several.grad_offset, T(1e-2));
    if (failed) std::printf("seed %u\n", seed);
    return !failed;
  }
};

}  // namespace
}  // namespace mmdcn::cuda

int main(int argc, char** argv) { return mmdcn::cuda::check_all<mmdcn::cuda::Check>(argc, argv); }
