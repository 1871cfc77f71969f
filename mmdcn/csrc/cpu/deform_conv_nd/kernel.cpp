// The CPU kernels of deform_conv_nd. Compiled once for each instruction set, with
// MMDCN_CPU_CAPABILITY naming the namespace.
#include "kernel.h"

#include "../transpose.h"
#include "backward_pass.h"
#include "forward_pass.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

// The most positions that are transposed together: they stay in the first-level cache.
constexpr int64_t kTransposed = 64;

// ------------------------------------------------------------------------------ images as rows

template <typename T, typename A = accumulator_t<T>>
void to_rows(const T* planes, const VolumeRows& at, int64_t begin, int64_t end, A* rows) {
  const int64_t channels = at.pixel, positions = at.positions;
  for_positions(at, begin, end, kTransposed, [&](int64_t image, int64_t first, int64_t count) {
    transpose<A>(planes + image * channels * positions + first, positions, channels, count,
                 rows + at.at(image, first), channels);
  });
}

template <typename T, typename A = accumulator_t<T>>
void from_rows(const A* rows, const VolumeRows& at, int64_t begin, int64_t end, T* planes) {
  const int64_t channels = at.pixel, positions = at.positions;
  for_positions(at, begin, end, kTransposed, [&](int64_t image, int64_t first, int64_t count) {
    transpose<A>(rows + at.at(image, first), channels, count, channels,
                 planes + image * channels * positions + first, positions);
  });
}

// ------------------------------------------------------------------------------ forward

template <int R, typename A>
int64_t forward_scratch_bytes(const DeformConvNdShape<R>& shape) {
  Arena arena(nullptr);
  const ConvNdForward<A> tensors = {};
  ForwardPass<A>(shape, tensors, arena);
  return arena.used();
}

template <int R, typename A>
void forward(const DeformConvNdShape<R>& shape, const ConvNdForward<A>& tensors, int64_t begin,
             int64_t end, std::byte* memory) {
  Arena arena(memory);
  ForwardPass<A>(shape, tensors, arena).run(begin, end);
}

// ------------------------------------------------------------------------------ backward

template <int R, typename A>
int64_t backward_scratch_bytes(const DeformConvNdShape<R>& shape, const ConvNdBackward<A>& tensors,
                               const ChannelRange& range) {
  Arena arena(nullptr);
  BackwardPass<A>(shape, tensors, range, arena);
  return arena.used();
}

template <int R, typename A>
void backward(const DeformConvNdShape<R>& shape, const ConvNdBackward<A>& tensors,
              const ChannelRange& range, int64_t begin, int64_t end, std::byte* memory) {
  Arena arena(memory);
  BackwardPass<A>(shape, tensors, range, arena).run(begin, end);
}

}  // namespace

template <int R, typename T>
ConvNdKernel<R, T> deform_conv_nd() {
  using A = accumulator_t<T>;
  ConvNdKernel<R, T> kernel = {};
  kernel.to_rows = &to_rows<T>;
  kernel.from_rows = &from_rows<T>;
  kernel.packed_size = &packed_size<R, A>;
  kernel.pack_weight = &pack_weight<R, T>;
  kernel.forward_scratch_bytes = &forward_scratch_bytes<R, A>;
  kernel.forward = &forward<R, A>;
  kernel.range_packed_size = &range_packed_size<R, A>;
  kernel.pack_range = &pack_range<R, T>;
  kernel.backward_scratch_bytes = &backward_scratch_bytes<R, A>;
  kernel.backward = &backward<R, A>;
  return kernel;
}

template ConvNdKernel<3, double> deform_conv_nd<3, double>();
template ConvNdKernel<3, float> deform_conv_nd<3, float>();
template ConvNdKernel<3, Half> deform_conv_nd<3, Half>();
template ConvNdKernel<3, BFloat16> deform_conv_nd<3, BFloat16>();

}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
