// The CPU kernels of deform_roi_pool. Compiled once for each instruction set, with
// MMDCN_CPU_CAPABILITY naming the namespace.
//
// For each bin, the rows and the columns of the features that its samples read are listed with
// their weights; then the rows of channels of the pixels where these cross are added up.
#include "kernel.h"

#include "../arena.h"
#include "../channel_rows.h"
#include "../transpose.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

// Scratch memory of one thread.
template <typename A>
struct Scratch {
  BinPixel<A>* rows;     // (H)
  BinPixel<A>* columns;  // (W)
  A* values;             // (bins, channels of the block)

  Scratch(const DeformRoIPoolShape& shape, int64_t channels, Arena& arena)
      : rows(arena.take<BinPixel<A>>(shape.height)),
        columns(arena.take<BinPixel<A>>(shape.width)),
        values(arena.take<A>(shape.bins() * channels)) {}
};

// Lists the rows and columns of each bin of RoI number r in `scratch`, and calls
// visit(bin, rows, columns), with how many there are, for the bins that reach the features.
template <typename T, typename A, typename Visit>
inline void for_each_bin(const DeformRoIPoolShape& shape, const RoIPoolTensors<T>& tensors,
                         int64_t group, int64_t r, const Scratch<A>& scratch, const Visit& visit) {
  const RoISide<A> side[2] = {{shape, tensors.rois + 5 * r, 0}, {shape, tensors.rois + 5 * r, 1}};
  const auto list = [&](int d, int64_t index, int64_t bin, BinPixel<A>* pixels) {
    const A offset =
        tensors.offset ? tensors.offset[roi_offset_index(shape, r, group, d, bin)] : A(0);
    const BinSamples<A> samples = side[d].bin(shape.sampling_ratio, index, offset);
    int64_t begin, end;
    samples.reaching(begin, end);
    return samples.list_pixels(begin, end, pixels);
  };
  int64_t rows = 0;
  for (int64_t bin = 0; bin < shape.bins(); ++bin) {
    const int64_t x = bin % shape.out_width;
    // Without offsets, bins side by side have the same rows.
    if (tensors.offset || x == 0) rows = list(0, bin / shape.out_width, bin, scratch.rows);
    if (rows == 0) continue;
    const int64_t columns = list(1, x, bin, scratch.columns);
    if (columns > 0) visit(bin, rows, columns);
  }
}

// Calls visit(position, row, column) for each pixel where listed rows and columns cross.
template <typename A, typename Visit>
inline void for_each_crossing(const DeformRoIPoolShape& shape, const Scratch<A>& scratch,
                              int64_t rows, int64_t columns, const Visit& visit) {
  for (int64_t y = 0; y < rows; ++y) {
    for (int64_t x = 0; x < columns; ++x) {
      const BinPixel<A>& row = scratch.rows[y];
      const BinPixel<A>& column = scratch.columns[x];
      visit((row.position * shape.width + column.position) * shape.channels, row, column);
    }
  }
}

template <typename T, typename A = accumulator_t<T>>
void forward(const DeformRoIPoolShape& shape, const RoIPoolTensors<T>& tensors,
             const ChannelBlock& block, int64_t begin, int64_t end, std::byte* memory) {
  const int64_t count = block.end - block.begin;
  Arena arena(memory);
  const Scratch<A> scratch(shape, count, arena);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t number = image_of_roi(shape, tensors.rois + 5 * r);
    const T* image = tensors.input + number * shape.pixels() * shape.channels + block.begin;
    std::memset(scratch.values, 0, shape.bins() * count * sizeof(A));
    for_each_bin(shape, tensors, block.group, r, scratch,
                 [&](int64_t bin, int64_t rows, int64_t columns) {
                   const T* source = image + shape.first_channel(bin);
                   A* target = scratch.values + bin * count;
                   WeightedRows<A> pixels;
                   for_each_crossing(
                       shape, scratch, rows, columns,
                       [&](int64_t position, const BinPixel<A>& row, const BinPixel<A>& column) {
                         pixels.add(position, row.weight * column.weight);
                         if (pixels.count < kMostRows) return;
                         add_rows(source, pixels, count, target);
                         pixels.count = 0;
                       });
                   add_rows(source, pixels, count, target);
                 });
    transpose<A>(scratch.values, count, shape.bins(), count,
                 tensors.output + (r * shape.out_channels + block.begin) * shape.bins(),
                 shape.bins());
  }
}

// Adds the gradients of one bin, whose rows and columns are listed in `scratch`, to that of the
// image from element number `start` on. `slope` gets the sum of the products of grad_output with
// the derivatives of the bin's average along y and x; it is zero before, and stays so where no
// gradient of the offsets is wanted.
template <typename T, typename A>
inline void bin_backward(const DeformRoIPoolShape& shape, const RoIPoolTensors<T>& tensors,
                         const Scratch<A>& scratch, int64_t rows, int64_t columns, int64_t start,
                         int64_t channels, const A* grad, A (&slope)[2]) {
  const T* source = tensors.input + start;
  A* grad_source = tensors.grad_input ? tensors.grad_input + start : nullptr;
  WeightedRows<A> pixels;
  A pixel_slope[2][kMostRows];
  const auto flush = [&] {
    if (!tensors.grad_offset) {
      add_rows_backward<false>(source, pixels, channels, grad, grad_source,
                               static_cast<A*>(nullptr));
    } else {
      A grad_weight[kMostRows];
      add_rows_backward<true>(source, pixels, channels, grad, grad_source, grad_weight);
      for (int64_t i = 0; i < pixels.count; ++i) {
        for (int d = 0; d < 2; ++d) slope[d] += pixel_slope[d][i] * grad_weight[i];
      }
    }
    pixels.count = 0;
  };
  for_each_crossing(shape, scratch, rows, columns,
                    [&](int64_t position, const BinPixel<A>& row, const BinPixel<A>& column) {
                      pixel_slope[0][pixels.count] = row.slope * column.weight;
                      pixel_slope[1][pixels.count] = row.weight * column.slope;
                      pixels.add(position, row.weight * column.weight);
                      if (pixels.count == kMostRows) flush();
                    });
  flush();
}

template <typename T, typename A = accumulator_t<T>>
void backward(const DeformRoIPoolShape& shape, const RoIPoolTensors<T>& tensors,
              const ChannelBlock& block, int64_t image, std::byte* memory) {
  const int64_t count = block.end - block.begin;
  Arena arena(memory);
  const Scratch<A> scratch(shape, count, arena);
  const int64_t first = image * shape.pixels() * shape.channels + block.begin;
  for (int64_t r = 0; r < shape.rois; ++r) {
    if (image_of_roi(shape, tensors.rois + 5 * r) != image) continue;
    // The loop below leaves out bins that do not reach the features.
    for (int64_t bin = 0; tensors.grad_offset && bin < shape.bins(); ++bin) {
      for (int d = 0; d < 2; ++d) {
        tensors.grad_offset[roi_offset_index(shape, r, block.group, d, bin)] = 0;
      }
    }
    for_each_bin(
        shape, tensors, block.group, r, scratch, [&](int64_t bin, int64_t rows, int64_t columns) {
          const T* grad_bin =
              tensors.grad_output + (r * shape.bins() + bin) * shape.out_channels + block.begin;
          A* grad = scratch.values;
          for (int64_t c = 0; c < count; ++c) grad[c] = load(grad_bin + c);
          A slope[2] = {};
          bin_backward(shape, tensors, scratch, rows, columns, first + shape.first_channel(bin),
                       count, grad, slope);
          for (int d = 0; tensors.grad_offset && d < 2; ++d) {
            tensors.grad_offset[roi_offset_index(shape, r, block.group, d, bin)] =
                RoISide<A>(shape, tensors.rois + 5 * r, d).reach * slope[d];
          }
        });
  }
}

template <typename T, typename A = accumulator_t<T>>
int64_t scratch_bytes(const DeformRoIPoolShape& shape, int64_t channels) {
  Arena arena(nullptr);
  Scratch<A>(shape, channels, arena);
  return arena.used();
}

}  // namespace

template <typename T>
RoIPoolKernel<T> deform_roi_pool() {
  RoIPoolKernel<T> kernel = {};
  kernel.scratch_bytes = &scratch_bytes<T>;
  kernel.forward = &forward<T>;
  kernel.backward = &backward<T>;
  return kernel;
}

template RoIPoolKernel<double> deform_roi_pool<double>();
template RoIPoolKernel<float> deform_roi_pool<float>();
template RoIPoolKernel<Half> deform_roi_pool<Half>();
template RoIPoolKernel<BFloat16> deform_roi_pool<BFloat16>();

}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
