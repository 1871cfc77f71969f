// The CUDA operators, registration and all, for CPU tensors: namespace mmdcn_host.
//
// The registration files and the kernels are compiled from their own source. Only what it takes to
// have a GPU is replaced: the launches run blocks on the host, there is no device to switch to, and
// the dispatch key is the CPU's. How much memory a call takes at a time is for the tests to say.
#include <malloc.h>

#include "../../mmdcn/csrc/cuda/deform_aggregate/kernels.h"
#include "../../mmdcn/csrc/cuda/deform_conv/kernels.h"
#include "../../mmdcn/csrc/cuda/deform_roi_pool/kernels.h"
#include "../../mmdcn/csrc/cuda/device.h"
#include "../../mmdcn/csrc/cuda/views.h"
#include "../../mmdcn/csrc/deform_aggregate_tensors.h"
#include "../../mmdcn/csrc/deform_conv_nd_tensors.h"
#include "../../mmdcn/csrc/deform_roi_pool_tensors.h"
#include "host_deform_aggregate.h"
#include "host_deform_conv.h"
#include "host_deform_roi_pool.h"
#include "host_device.h"

namespace mmdcn::cuda {

static int64_t chunk_bytes_wanted, copy_bytes_wanted;
int64_t chunk_bytes(int) { return chunk_bytes_wanted; }
int64_t copy_bytes() { return copy_bytes_wanted; }

using One = HostContext<1, 1>;

// Fails where columns that torch allocated hold less than the range: what lies behind them may be
// anybody's.
template <int R>
void expect_room(const ConvProblem<R>& problem, const PixelRange& range, const void* columns,
                 size_t element_size) {
  if (malloc_usable_size(const_cast<void*>(columns)) < range.count * problem.row * element_size) {
    throw std::runtime_error("columns have no memory for their pixels");
  }
}

template <int R>
void gather(Precision precision, const ConvProblem<R>& problem, const PixelRange& range,
            const void* input, const void* offset, const void* mask, void* columns, bool wide,
            const Stream&) {
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    const auto run = [&](auto* function, auto column) {
      using column_t = typename decltype(column)::type;
      expect_room(problem, range, columns, sizeof(column_t));
      function(problem, range, static_cast<const scalar_t*>(input),
               static_cast<const acc_t*>(offset), static_cast<const acc_t*>(mask),
               static_cast<column_t*>(columns));
    };
    using Host = HostDeformConv<One, R, scalar_t, acc_t>;
    constexpr int kVector = 16 / sizeof(scalar_t);
    const bool whole = problem.divides_into(kVector);
    if (wide) {
      return whole ? run(&Host::template gather<kVector, acc_t>, acc)
                   : run(&Host::template gather<1, acc_t>, acc);
    }
    whole ? run(&Host::template gather<kVector, scalar_t>, scalar)
          : run(&Host::template gather<1, scalar_t>, scalar);
  });
}

template <int R>
void scatter(Precision precision, const ConvProblem<R>& problem, const PixelRange& range,
             const void* grad_columns, const void* input, const void* offset, const void* mask,
             const GradInput& grad_input, void* grad_offset, void* grad_mask, const Stream&) {
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    expect_room(problem, range, grad_columns, sizeof(scalar_t));
    const auto run = [&](auto* function) {
      function(problem, range, static_cast<const scalar_t*>(grad_columns),
               static_cast<const scalar_t*>(input), static_cast<const acc_t*>(offset),
               static_cast<const acc_t*>(mask), grad_input, static_cast<acc_t*>(grad_offset),
               static_cast<acc_t*>(grad_mask));
    };
    using Host = HostDeformConv<One, R, scalar_t, acc_t>;
    if (grad_input.fixed) return run(&Host::template scatter<1, FixedSum<acc_t>>);
    using Sum = FloatingSum<acc_t>;
    problem.divides_into(4) ? run(&Host::template scatter<4, Sum>)
                            : run(&Host::template scatter<1, Sum>);
  });
}

template <int R>
void find_magnitudes(Precision precision, const ConvProblem<R>& problem, const void* grad_output,
                     const void* weight, const void* mask, int32_t* magnitudes, const Stream&) {
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    HostDeformConv<One, R, scalar_t, acc_t>::find_magnitudes(
        problem, static_cast<const scalar_t*>(grad_output), static_cast<const scalar_t*>(weight),
        static_cast<const acc_t*>(mask), magnitudes);
  });
}

template <int R>
void from_fixed(Precision precision, const ConvProblem<R>& problem, const GradInput& grad_input,
                void* sum, const Stream&) {
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    HostDeformConv<One, R, scalar_t, acc_t>::from_fixed(problem, grad_input,
                                                        static_cast<acc_t*>(sum));
  });
}

void accumulate(Precision precision, int64_t elements, const void* values, void* sum,
                const Stream&) {
  dispatch(precision, [&](auto, auto acc) {
    using acc_t = typename decltype(acc)::type;
    run_blocks<One, NoStorage>(kFewBlocks, [&](const One& ctx, NoStorage&) {
      accumulate_block(ctx, elements, static_cast<const acc_t*>(values), static_cast<acc_t*>(sum));
    });
  });
}

void transpose(Precision precision, const Transposition& sizes, bool from_sums, const void* from,
               void* to, const Stream&) {
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    const auto run = [&](auto type) {
      using from_t = typename decltype(type)::type;
      host_transpose<One>(sizes, static_cast<const from_t*>(from), static_cast<scalar_t*>(to));
    };
    from_sums ? run(acc) : run(scalar);
  });
}

void add_bias(Precision precision, int64_t elements, int64_t channels, int64_t inner,
              const void* bias, void* output, const Stream&) {
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    const auto run = [&](auto vector) {
      run_blocks<One, NoStorage>(kFewBlocks, [&](const One& ctx, NoStorage&) {
        add_bias_block<vector(), acc_t>(ctx, elements, channels, inner,
                                        static_cast<const scalar_t*>(bias),
                                        static_cast<scalar_t*>(output));
      });
    };
    constexpr int kVector = 16 / sizeof(scalar_t);
    adds_bias_to_vectors(kVector, channels, inner) ? run(std::integral_constant<int, kVector>{})
                                                   : run(std::integral_constant<int, 1>{});
  });
}

void roi_pool_forward(Precision precision, const DeformRoIPoolShape& shape, const void* input,
                      const void* rois, const void* offset, void* output, const Stream&) {
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    const auto run = [&](auto* function) {
      function(shape, static_cast<const scalar_t*>(input), static_cast<const acc_t*>(rois),
               static_cast<const acc_t*>(offset), static_cast<scalar_t*>(output));
    };
    constexpr int kVector = roi_pool_vector(sizeof(scalar_t));
    shape.deform_group_channels() % kVector == 0
        ? run(&HostRoIPool<One, kVector, scalar_t, acc_t>::forward)
        : run(&HostRoIPool<One, 1, scalar_t, acc_t>::forward);
  });
}

void roi_pool_backward(Precision precision, const DeformRoIPoolShape& shape,
                       const void* grad_output, const void* input, const void* rois,
                       const void* offset, void* grad_input, void* grad_offset, const Stream&) {
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    const auto run = [&](auto* function) {
      function(shape, static_cast<const scalar_t*>(grad_output),
               static_cast<const scalar_t*>(input), static_cast<const acc_t*>(rois),
               static_cast<const acc_t*>(offset), static_cast<acc_t*>(grad_input),
               static_cast<acc_t*>(grad_offset));
    };
    constexpr int kVector = roi_pool_vector(sizeof(scalar_t));
    shape.deform_group_channels() % kVector == 0
        ? run(&HostRoIPool<One, kVector, scalar_t, acc_t>::backward)
        : run(&HostRoIPool<One, 1, scalar_t, acc_t>::backward);
  });
}

void aggregate_forward(Precision precision, const AggregateProblem& problem, const void* input,
                       const void* offset, const void* mask, void* output, const Stream&) {
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    const auto run = [&](auto* function) {
      function(problem, static_cast<const scalar_t*>(input), static_cast<const acc_t*>(offset),
               static_cast<const acc_t*>(mask), static_cast<scalar_t*>(output));
    };
    constexpr int kVector = aggregate_vector(sizeof(scalar_t));
    problem.shape.group_channels() % kVector == 0
        ? run(&HostAggregate<One, kVector, scalar_t, acc_t>::forward)
        : run(&HostAggregate<One, 1, scalar_t, acc_t>::forward);
  });
}

void aggregate_backward(Precision precision, const AggregateProblem& problem,
                        const void* grad_output, const void* input, const void* offset,
                        const void* mask, void* grad_input, void* grad_offset, void* grad_mask,
                        const Stream&) {
  dispatch(precision, [&](auto scalar, auto acc) {
    using scalar_t = typename decltype(scalar)::type;
    using acc_t = typename decltype(acc)::type;
    const auto run = [&](auto* function) {
      function(problem, static_cast<const scalar_t*>(grad_output),
               static_cast<const scalar_t*>(input), static_cast<const acc_t*>(offset),
               static_cast<const acc_t*>(mask), static_cast<acc_t*>(grad_input),
               static_cast<acc_t*>(grad_offset), static_cast<acc_t*>(grad_mask));
    };
    constexpr int kVector = aggregate_vector(sizeof(scalar_t));
    problem.shape.group_channels() % kVector == 0
        ? run(&HostAggregate<One, kVector, scalar_t, acc_t>::backward)
        : run(&HostAggregate<One, 1, scalar_t, acc_t>::backward);
  });
}

}  // namespace mmdcn::cuda

extern "C" __attribute__((visibility("default"))) void mmdcn_host_set_memory(int64_t chunk_bytes,
                                                                             int64_t copy_bytes) {
  mmdcn::cuda::chunk_bytes_wanted = chunk_bytes;
  mmdcn::cuda::copy_bytes_wanted = copy_bytes;
}

// Every header but the products' is included by now: what follows renames the dispatch key and the
// operators' namespace in the registration itself, and nothing else.
namespace mmdcn_host {
using namespace mmdcn;
namespace cuda {
using namespace mmdcn::cuda;
}
}  // namespace mmdcn_host
#define mmdcn mmdcn_host
#define CUDA CPU
#include "../../mmdcn/csrc/cuda/deform_aggregate/operator.cpp"
#include "../../mmdcn/csrc/cuda/deform_conv/operator.cpp"
#include "../../mmdcn/csrc/cuda/deform_conv/product.cpp"
#include "../../mmdcn/csrc/cuda/deform_roi_pool/operator.cpp"
