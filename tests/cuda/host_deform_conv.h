// The launches of mmdcn/csrc/cuda/deform_conv/kernels.cu, on the host.
#pragma once

#include "../../mmdcn/csrc/cuda/deform_conv/gather.h"
#include "../../mmdcn/csrc/cuda/deform_conv/scatter.h"
#include "../../mmdcn/csrc/cuda/elementwise.h"
#include "../../mmdcn/csrc/cuda/transpose.h"
#include "host_context.h"

namespace mmdcn::cuda {

template <typename Ctx, int R, typename scalar_t, typename acc_t>
struct HostDeformConv {
  using Problem = ConvProblem<R>;

  template <int V, typename column_t>
  static void gather(const Problem& problem, const PixelRange& range, const scalar_t* input,
                     const acc_t* offset, const acc_t* mask, column_t* columns) {
    const int64_t elements = range.count * problem.row;
    poison(columns, elements);
    struct Storage {
      ColumnSample<acc_t, R> sample[kMostGatherSamples];
    };
    const int samples = gather_samples(divide(problem.deform_group_channels, V));
    run_blocks<Ctx, Storage>(kFewBlocks, [&](const Ctx& ctx, Storage& storage) {
      gather_block<V>(ctx, problem, range, input, offset, mask, columns, storage.sample, samples);
    });
    expect_stored(columns, elements);
  }

  template <int V, typename Sum>
  static void scatter(const Problem& problem, const PixelRange& range, const scalar_t* grad_columns,
                      const scalar_t* input, const acc_t* offset, const acc_t* mask,
                      const GradInput& grad_input, acc_t* grad_offset, acc_t* grad_mask) {
    const auto each_result = [&](const auto& visit) {
      if (grad_offset) each_pixel(problem, range, R, grad_offset, visit);
      if (grad_mask) each_pixel(problem, range, 1, grad_mask, visit);
    };
    each_result([](acc_t* element) { poison(element, 1); });
    using Storage = ScatterStorage<acc_t, R>;
    run_blocks<Ctx, Storage>(kFewBlocks, [&](const Ctx& ctx, Storage& storage) {
      scatter_block<V>(ctx, problem, range, grad_columns, input, offset, mask,
                       Sum(problem, grad_input), grad_offset, grad_mask, storage);
    });
    each_result([](const acc_t* element) { expect_stored(element, 1); });
  }

  static void find_magnitudes(const Problem& problem, const scalar_t* grad_output,
                              const scalar_t* weight, const acc_t* mask, int32_t* largest) {
    run_blocks<Ctx, MagnitudeStorage>(kFewBlocks, [&](const Ctx& ctx, MagnitudeStorage& storage) {
      magnitudes_block(ctx, problem, grad_output, weight, mask, largest, storage);
    });
  }

  static void from_fixed(const Problem& problem, const GradInput& grad_input, acc_t* sum) {
    const int64_t elements = problem.shape.batch * problem.positions * problem.shape.channels;
    poison(sum, elements);
    run_blocks<Ctx, NoStorage>(kFewBlocks, [&](const Ctx& ctx, NoStorage&) {
      from_fixed_block(ctx, problem, grad_input, sum);
    });
    expect_stored(sum, elements);
  }

 private:
  // Visits the elements that belong to pixels of the range, of a tensor (images, samples *
  // coordinates, pixels).
  template <typename Visit>
  static void each_pixel(const Problem& problem, const PixelRange& range, int coordinates,
                         acc_t* tensor, const Visit& visit) {
    const int64_t planes = problem.samples * coordinates;
    for (int64_t i = range.first; i < range.first + range.count; ++i) {
      const int64_t image = i / problem.pixels, pixel = i % problem.pixels;
      for (int64_t plane = 0; plane < planes; ++plane) {
        visit(tensor + (image * planes + plane) * problem.pixels + pixel);
      }
    }
  }
};

// Transposes, and checks that each element that it should write was written once.
template <typename Ctx, typename from_t, typename to_t>
void host_transpose(const Transposition& sizes, const from_t* from, to_t* to) {
  const auto each_row = [&](const auto& visit) {
    for (int64_t matrix = 0; matrix < sizes.count; ++matrix) {
      for (int64_t row = 0; row < sizes.columns; ++row) {
        visit(to + matrix * sizes.matrix_stride + row * sizes.row_stride, sizes.rows);
      }
    }
  };
  each_row([](to_t* row, int64_t elements) { poison(row, elements); });
  using Storage = TransposeStorage<to_t>;
  run_blocks<Ctx, Storage>(kFewBlocks, [&](const Ctx& ctx, Storage& storage) {
    transpose_block(ctx, sizes, from, to, storage);
  });
  each_row([](const to_t* row, int64_t elements) { expect_stored(row, elements); });
}

}  // namespace mmdcn::cuda
