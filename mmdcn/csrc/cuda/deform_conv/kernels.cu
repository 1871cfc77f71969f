// Kernels and launches of deformable convolution: the block programs, bound to the GPU.
#include <algorithm>

#include "../elementwise.h"
#include "../operator.cuh"
#include "fixed_point.h"
#include "gather.h"
#include "scatter.h"

namespace mmdcn::cuda {
namespace {

template <int V, int R, typename scalar_t, typename acc_t, typename column_t>
MMDCN_KERNEL_OF(R == 2 ? 4 : 2)
gather_kernel(const ConvProblem<R> problem, const PixelRange range, const scalar_t* input,
              const acc_t* offset, const acc_t* mask, column_t* columns, const int samples) {
  extern __shared__ uint4 memory[];
  gather_block<V>(DeviceContext{}, problem, range, input, offset, mask, columns,
                  reinterpret_cast<ColumnSample<acc_t, R>*>(memory), samples);
}

template <int V, typename Sum, int R, typename scalar_t, typename acc_t>
MMDCN_KERNEL_OF(R == 2 && V == 4 ? 3 : 2)
scatter_kernel(const ConvProblem<R> problem, const PixelRange range, const scalar_t* grad_columns,
               const scalar_t* input, const acc_t* offset, const acc_t* mask,
               const GradInput grad_input, acc_t* grad_offset, acc_t* grad_mask) {
  __shared__ ScatterStorage<acc_t, R> storage;
  scatter_block<V>(DeviceContext{}, problem, range, grad_columns, input, offset, mask,
                   Sum(problem, grad_input), grad_offset, grad_mask, storage);
}

template <int R, typename scalar_t, typename acc_t>
MMDCN_KERNEL magnitudes_kernel(const ConvProblem<R> problem, const scalar_t* grad_output,
                               const scalar_t* weight, const acc_t* mask, int32_t* magnitudes) {
  __shared__ MagnitudeStorage storage;
  magnitudes_block(DeviceContext{}, problem, grad_output, weight, mask, magnitudes, storage);
}

template <int R, typename acc_t>
MMDCN_KERNEL from_fixed_kernel(const ConvProblem<R> problem, const GradInput grad_input,
                               acc_t* sum) {
  from_fixed_block(DeviceContext{}, problem, grad_input, sum);
}

template <typename acc_t>
MMDCN_KERNEL accumulate_kernel(int64_t elements, const acc_t* values, acc_t* sum) {
  accumulate_block(DeviceContext{}, elements, values, sum);
}

template <int V, typename scalar_t, typename acc_t>
MMDCN_KERNEL add_bias_kernel(int64_t elements, int64_t channels, int64_t inner,
                             const scalar_t* bias, scalar_t* output) {
  add_bias_block<V, acc_t>(DeviceContext{}, elements, channels, inner, bias, output);
}

template <typename from_t, typename to_t>
__global__ void __launch_bounds__(DeviceContext::kThreads, sizeof(from_t) == 8 ? 2 : 4)
    transpose_kernel(const Transposition sizes, const from_t* from, to_t* to) {
  __shared__ TransposeStorage<to_t> storage;
  transpose_block(DeviceContext{}, sizes, from, to, storage);
}

// Blocks for work on so many elements, by threads that stride over them.
int64_t blocks_over(int64_t elements) {
  // A large GPU of today, filled.
  constexpr int64_t kMostBlocks = 1024;
  return std::min(kMostBlocks, tiles(elements, DeviceContext::kThreads));
}

// The samples that a gathering block locates together: fewer where there would not be two blocks
// for each multiprocessor.
int samples_of_a_block(int64_t all, int64_t vectors, int device) {
  int samples = gather_samples(vectors);
  const int64_t blocks = 2 * device_attribute(device, cudaDevAttrMultiProcessorCount);
  while (samples > kLeastGatherSamples && tiles(all, samples) < blocks) samples /= 2;
  return samples;
}

}  // namespace

int64_t chunk_bytes(int device) {
  constexpr int64_t kLeast = INT64_C(16) << 20, kMost = INT64_C(96) << 20;
  const int64_t cache = device_attribute(device, cudaDevAttrL2CacheSize);
  return std::clamp(2 * cache, kLeast, kMost);
}

int64_t copy_bytes() { return INT64_C(16) << 20; }

template <int R>
void gather(Precision precision, const ConvProblem<R>& problem, const PixelRange& range,
            const void* input, const void* offset, const void* mask, void* columns, bool wide,
            const Stream& stream) {
  const int64_t all = samples_of(problem, range);
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    const auto run = [&](auto vector, auto column) {
      using column_t = typename decltype(column)::type;
      const int samples =
          samples_of_a_block(all, problem.deform_group_channels / vector(), stream.device);
      launch_with_memory(gather_kernel<vector(), R, scalar_t, acc_t, column_t>, tiles(all, samples),
                         samples * sizeof(ColumnSample<acc_t, R>), stream, problem, range,
                         static_cast<const scalar_t*>(input), static_cast<const acc_t*>(offset),
                         static_cast<const acc_t*>(mask), static_cast<column_t*>(columns), samples);
    };
    constexpr int kVector = 16 / sizeof(scalar_t);
    const bool whole = problem.divides_into(kVector);
    if constexpr (sizeof(scalar_t) < sizeof(float)) {
      if (wide) return whole ? run(Int<kVector>{}, acc) : run(Int<1>{}, acc);
    }
    whole ? run(Int<kVector>{}, scalar) : run(Int<1>{}, scalar);
  });
}

template <int R>
void scatter(Precision precision, const ConvProblem<R>& problem, const PixelRange& range,
             const void* grad_columns, const void* input, const void* offset, const void* mask,
             const GradInput& grad_input, void* grad_offset, void* grad_mask,
             const Stream& stream) {
  const int64_t blocks = tiles(samples_of(problem, range), kScatterSamples);
  const bool adds_vectors = !grad_input.sum || adds_vectors_at_once(stream.device);
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    const auto run = [&](auto kernel) {
      launch(kernel, blocks, stream, problem, range, static_cast<const scalar_t*>(grad_columns),
             static_cast<const scalar_t*>(input), static_cast<const acc_t*>(offset),
             static_cast<const acc_t*>(mask), grad_input, static_cast<acc_t*>(grad_offset),
             static_cast<acc_t*>(grad_mask));
    };
    if (grad_input.fixed) return run(scatter_kernel<1, FixedSum<acc_t>, R, scalar_t, acc_t>);
    using Sum = FloatingSum<acc_t>;
    if constexpr (sizeof(scalar_t) <= sizeof(float)) {
      if (adds_vectors && problem.divides_into(4)) {
        return run(scatter_kernel<4, Sum, R, scalar_t, acc_t>);
      }
    }
    run(scatter_kernel<1, Sum, R, scalar_t, acc_t>);
  });
}

template <int R>
void find_magnitudes(Precision precision, const ConvProblem<R>& problem, const void* grad_output,
                     const void* weight, const void* mask, int32_t* magnitudes,
                     const Stream& stream) {
  const int64_t elements =
      std::max(problem.shape.batch * problem.pixels * problem.shape.out_channels,
               problem.shape.out_channels * problem.columns);
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    launch(magnitudes_kernel<R, scalar_t, acc_t>, blocks_over(elements), stream, problem,
           static_cast<const scalar_t*>(grad_output), static_cast<const scalar_t*>(weight),
           static_cast<const acc_t*>(mask), magnitudes);
  });
}

template <int R>
void from_fixed(Precision precision, const ConvProblem<R>& problem, const GradInput& grad_input,
                void* sum, const Stream& stream) {
  const int64_t elements = problem.shape.batch * problem.positions * problem.shape.channels;
  dispatch(precision, [&](auto, auto acc) {
    using acc_t = typename decltype(acc)::type;
    launch(from_fixed_kernel<R, acc_t>, blocks_over(elements), stream, problem, grad_input,
           static_cast<acc_t*>(sum));
  });
}

void accumulate(Precision precision, int64_t elements, const void* values, void* sum,
                const Stream& stream) {
  dispatch(precision, [&](auto, auto acc) {
    using acc_t = typename decltype(acc)::type;
    launch(accumulate_kernel<acc_t>, blocks_over(elements), stream, elements,
           static_cast<const acc_t*>(values), static_cast<acc_t*>(sum));
  });
}

void transpose(Precision precision, const Transposition& sizes, bool from_sums, const void* from,
               void* to, const Stream& stream) {
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    const auto run = [&](auto type) {
      using from_t = typename decltype(type)::type;
      launch(transpose_kernel<from_t, scalar_t>, tiles_of(sizes), stream, sizes,
             static_cast<const from_t*>(from), static_cast<scalar_t*>(to));
    };
    from_sums ? run(acc) : run(scalar);
  });
}

void add_bias(Precision precision, int64_t elements, int64_t channels, int64_t inner,
              const void* bias, void* output, const Stream& stream) {
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    constexpr int kVector = 16 / sizeof(scalar_t);
    const auto run = [&](auto kernel, int vector) {
      launch(kernel, blocks_over(elements / vector), stream, elements, channels, inner,
             static_cast<const scalar_t*>(bias), static_cast<scalar_t*>(output));
    };
    adds_bias_to_vectors(kVector, channels, inner)
        ? run(add_bias_kernel<kVector, scalar_t, acc_t>, kVector)
        : run(add_bias_kernel<1, scalar_t, acc_t>, 1);
  });
}

#define MMDCN_INSTANTIATE(R)                                                                      \
  template void gather<R>(Precision, const ConvProblem<R>&, const PixelRange&, const void*,       \
                          const void*, const void*, void*, bool, const Stream&);                  \
  template void scatter<R>(Precision, const ConvProblem<R>&, const PixelRange&, const void*,      \
                           const void*, const void*, const void*, const GradInput&, void*, void*, \
                           const Stream&);                                                        \
  template void find_magnitudes<R>(Precision, const ConvProblem<R>&, const void*, const void*,    \
                                   const void*, int32_t*, const Stream&);                         \
  template void from_fixed<R>(Precision, const ConvProblem<R>&, const GradInput&, void*,          \
                              const Stream&);
MMDCN_INSTANTIATE(2)
MMDCN_INSTANTIATE(3)

}  // namespace mmdcn::cuda
