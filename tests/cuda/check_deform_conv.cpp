// The kernels of deformable convolution under the host's sanitizers: see check.h.
#include <algorithm>
#include <limits>

#include "../../mmdcn/csrc/cuda/deform_conv/chunks.h"
#include "check.h"
#include "host_deform_conv.h"

namespace mmdcn::cuda {
namespace {

template <int R>
DeformConvNdShape<R> draw_shape(Draw& draw) {
  DeformConvNdShape<R> shape = {};
  shape.batch = draw.between(1, 3);
  shape.channels = draw.one_of({1, 2, 6, 12, 16, 40, 64});
  shape.groups = draw.divisor(shape.channels);
  shape.deform_groups = draw.divisor(shape.channels);
  shape.out_channels = shape.groups * draw.between(1, 3);
  for (int d = 0; d < R; ++d) {
    shape.kernel[d] = draw.between(1, R == 2 ? 3 : 2);
    shape.axis[d] = {draw.between(1, 2), draw.between(0, 2), draw.between(1, 2)};
    const GridAxis& axis = shape.axis[d];
    const int64_t reach = axis.dilation * (shape.kernel[d] - 1) + 1;
    shape.size[d] = std::max<int64_t>(reach - 2 * axis.padding, 1) + draw.between(0, 3);
    shape.out_size[d] = (shape.size[d] + 2 * axis.padding - reach) / axis.stride + 1;
  }
  return shape;
}

template <typename T>
struct Inputs {
  std::vector<T> input, offset, mask, weight, grad_output;
  bool to_input, to_offset, to_mask;
};

template <typename T, int R>
Inputs<T> draw_inputs(Draw& draw, const ConvProblem<R>& problem) {
  const DeformConvNdShape<R>& shape = problem.shape;
  const int64_t pixels = shape.batch * problem.pixels, samples = pixels * problem.samples;
  Inputs<T> in;
  in.input = draw.normal<T>(shape.batch * problem.positions * shape.channels, 1);
  in.offset = draw.normal<T>(R * samples, 2);
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  for (const T value : {T(NAN), kInfinity, -kInfinity, T(1e30), T(-1e30), T(1e10), T(-1e10)}) {
    in.offset[draw.between(0, in.offset.size() - 1)] = value;
  }
  in.mask = draw.normal<T>(draw.between(0, 1) ? samples : 0, 1);
  in.weight = draw.normal<T>(shape.out_channels * problem.columns, 1);
  in.grad_output = draw.normal<T>(pixels * shape.out_channels, 1);
  in.to_input = draw.between(0, 3) > 0;
  in.to_offset = draw.between(0, 3) > 0;
  in.to_mask = !in.mask.empty() && draw.between(0, 3) > 0;
  return in;
}

template <typename T>
struct Results {
  std::vector<T> columns, sum, from_fixed, grad_offset, grad_mask;
};

template <typename Ctx, int V, int R, typename T>
Results<T> run(const ConvProblem<R>& problem, const PixelRange& range, const Inputs<T>& in) {
  using Kernels = HostDeformConv<Ctx, R, T, T>;
  Results<T> out;
  out.columns.resize(range.count * problem.row);
  out.sum.resize(in.to_input ? in.input.size() : 0);
  out.from_fixed.resize(in.input.size());
  out.grad_offset.resize(in.to_offset ? in.offset.size() : 0);
  out.grad_mask.resize(in.to_mask ? in.mask.size() : 0);
  Kernels::template gather<V>(problem, range, data(in.input), data(in.offset), data(in.mask),
                              data(out.columns));
  // The columns themselves are as good a gradient as any.
  GradInput sum, fixed;
  sum.sum = data(out.sum);
  Kernels::template scatter<V, FloatingSum<T>>(problem, range, data(out.columns), data(in.input),
                                               data(in.offset), data(in.mask), sum,
                                               data(out.grad_offset), data(out.grad_mask));

  std::vector<int32_t> magnitudes(kMagnitudes);
  std::vector<int64_t> units(in.input.size());
  fixed.fixed = data(units);
  fixed.magnitudes = data(magnitudes);
  Kernels::find_magnitudes(problem, data(in.grad_output), data(in.weight), data(in.mask),
                           fixed.magnitudes);
  const std::vector<T> small(out.columns.size(), T(1e-3));
  Kernels::template scatter<1, FixedSum<T>>(problem, range, data(small), data(in.input),
                                            data(in.offset), data(in.mask), fixed, nullptr,
                                            nullptr);
  Kernels::from_fixed(problem, fixed, data(out.from_fixed));
  return out;
}

// Whether chunks cover a batch, each pixel once and in order, with no more pixels than allowed;
// each is gathered to memory of just its size.
template <typename T, int R>
bool covers(Draw& draw, const ConvProblem<R>& problem, const Inputs<T>& in) {
  const int64_t pixels = problem.shape.batch * problem.pixels, most = draw.between(0, pixels + 2);
  int64_t next = 0;
  bool right = true;
  Chunks(problem.shape.batch, problem.pixels, most).for_each([&](const Chunk& chunk) {
    const PixelRange range = chunk.range(problem.pixels);
    right = right && range.first == next && range.count > 0 &&
            range.count <= std::max<int64_t>(most, 1) && range.first + range.count <= pixels;
    if (!right) return;
    next += range.count;
    std::vector<T> columns(range.count * problem.row);
    HostDeformConv<HostContext<1, 1>, R, T, T>::template gather<1>(
        problem, range, data(in.input), data(in.offset), data(in.mask), data(columns));
  });
  right = right && next == pixels;
  if (!right) std::printf("chunks of at most %ld pixels\n", static_cast<long>(most));
  return right;
}

// Whether matrices are transposed, with gaps between the rows of the result or without.
template <typename Several>
bool transposes(Draw& draw) {
  const int64_t count = draw.between(1, 2), rows = draw.between(1, 150);
  const int64_t columns = draw.between(1, 150), row_stride = rows + draw.between(0, 5);
  const Transposition sizes(count, rows, columns, row_stride, row_stride * columns);
  const std::vector<double> from = draw.normal<double>(count * rows * columns, 1);
  std::vector<float> one(count * row_stride * columns), several(one.size());
  host_transpose<HostContext<1, 1>>(sizes, data(from), data(one));
  host_transpose<Several>(sizes, data(from), data(several));
  bool right = one == several;
  for (int64_t i = 0; i < count * rows * columns; ++i) {
    const int64_t row = i / columns % rows, column = i % columns;
    const int64_t place = (i / (rows * columns) * columns + column) * row_stride + row;
    right = right && one[place] == static_cast<float>(from[i]);
  }
  if (!right) std::printf("transposition\n");
  return right;
}

// Whether numbers of any size are divided as they should be.
bool divides(Draw& draw) {
  constexpr int64_t kNumbers[] = {0, 1, INT64_C(0x7FFFFFFF), INT64_C(0x80000000), INT64_C(1) << 40};
  const int64_t divisor = draw.between(1, 1 << draw.between(0, 30)) << draw.between(0, 8);
  const Divisor by(divisor);
  const int64_t near = divisor * draw.between(0, 1 << 20);
  bool right = true;
  for (const int64_t number : kNumbers) right = right && by.divide(number) == number / divisor;
  for (int64_t number = near > 0 ? near - 1 : 0; number <= near + 1; ++number) {
    right = right && by.divide(number) == number / divisor;
  }
  if (!right) std::printf("divisor %ld\n", static_cast<long>(divisor));
  return right;
}

struct Check {
  template <typename Several, typename T>
  static bool agrees(unsigned seed) {
    const bool plane = agrees_over<2, Several, T>(seed);
    const bool volume = agrees_over<3, Several, T>(seed);
    Draw draw(seed);
    return plane && volume && transposes<Several>(draw) && divides(draw);
  }

  template <int R, typename Several, typename T>
  static bool agrees_over(unsigned seed) {
    Draw draw(seed);
    const ConvProblem<R> problem(draw_shape<R>(draw));
    const Inputs<T> in = draw_inputs<T>(draw, problem);
    const int64_t pixels = problem.shape.batch * problem.pixels,
                  first = draw.between(0, pixels - 1);
    const PixelRange range = {first, draw.between(1, pixels - first)};
    const bool whole = problem.divides_into(4) && draw.between(0, 3) > 0;
    using One = HostContext<1, 1>;
    const Results<T> one =
        whole ? run<One, 4>(problem, range, in) : run<One, 1>(problem, range, in);
    const Results<T> several =
        whole ? run<Several, 4>(problem, range, in) : run<Several, 1>(problem, range, in);
    // Lanes add up what one thread adds one after the other.
    const bool failed = differ("columns", one.columns, several.columns) ||
                        differ("sum", one.sum, several.sum, T(1e-2)) ||
                        differ("from_fixed", one.from_fixed, several.from_fixed) ||
                        differ("grad_offset", one.grad_offset, several.grad_offset, T(1e-2)) ||
                        differ("grad_mask", one.grad_mask, several.grad_mask, T(1e-2)) ||
                        !covers<T>(draw, problem, in);
    if (failed) std::printf("seed %u, %d dimensions\n", seed, R);
    return !failed;
  }
};

}  // namespace
}  // namespace mmdcn::cuda

int main(int argc, char** argv) { return mmdcn::cuda::check_all<mmdcn::cuda::Check>(argc, argv); }
