// The CPU kernels of deform_roi_pool. Compiled once for each instruction set, with
// MMDCN_CPU_CAPABILITY naming the namespace.
//
// For each bin, the rows and the columns of the features that its points are next to are listed
// with their weights; then the pixels where these cross are added up, as vectors of channels.
#include "kernel.h"

#include "../arena.h"
#include "../channel_rows.h"
#include "../transpose.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

// Memory of one thread.
template <typename A>
struct Scratch {
  BinPixel<A>* rows;     // (H)
  BinPixel<A>* columns;  // (W)
  A* values;             // (bins, channels)

  Scratch(const DeformRoIPoolShape& shape, int64_t channels, Arena& arena)
      : rows(arena.take<BinPixel<A>>(shape.height)),
        columns(arena.take<BinPixel<A>>(shape.width)),
        values(arena.take<A>(shape.bins() * channels)) {}
};

// Calls visit(bin, rows, columns), with the numbers of listed rows and columns, for each bin of RoI
// number r that reaches the features.
template <typename T, typename A, typename Visit>
inline void for_each_bin(const DeformRoIPoolShape& shape, const RoIPoolTensors<T>& tensors,
                         int64_t group, int64_t r, const Scratch<A>& scratch, const Visit& visit) {
  const RoISide<A> side[2] = {{shape, tensors.rois + 5 * r, 0}, {shape, tensors.rois + 5 * r, 1}};
  const auto list = [&](int d, int64_t index, int64_t bin, BinPixel<A>* pixels) {
    const A offset =
        tensors.offset ? tensors.offset[roi_offset_index(shape, r, group, d, bin)] : A(0);
    const BinPoints<A> points = side[d].bin(shape.sampling_ratio, index, offset);
    int64_t begin, end;
    points.reaching(begin, end);
    return points.list_pixels(begin, end, pixels);
  };
  int64_t rows = 0;
  for (int64_t bin = 0; bin < shape.bins(); ++bin) {
    const int64_t x = bin % shape.out_width;
    // Without offsets, the bins side by side have their rows in common.
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
             const RoIPoolChannels& channels, int64_t begin, int64_t end, std::byte* memory) {
  const int64_t count = channels.end - channels.begin;
  Arena arena(memory);
  const Scratch<A> scratch(shape, count, arena);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t number = image_of_roi(shape, tensors.rois + 5 * r);
    const T* image = tensors.input + number * shape.pixels() * shape.channels + channels.begin;
    std::memset(scratch.values, 0, shape.bins() * count * sizeof(A));
    for_each_bin(shape, tensors, channels.group, r, scratch,
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
                 tensors.output + (r * shape.out_channels + channels.begin) * shape.bins(),
                 shape.bins());
  }
}

template <typename T, typename A = accumulator_t<T>>
void backward(const DeformRoIPoolShape& shape, const RoIPoolTensors<T>& tensors,
              const RoIPoolChannels& channels, int64_t image, std::byte* memory) {
  const int64_t count = channels.end - channels.begin;
  Arena arena(memory);
  const Scratch<A> scratch(shape, count, arena);
  const int64_t first = image * shape.pixels() * shape.channels + channels.begin;
  for (int64_t r = 0; r < shape.rois; ++r) {
    if (image_of_roi(shape, tensors.rois + 5 * r) != image) continue;
    for (int64_t bin = 0; tensors.grad_offset && bin < shape.bins(); ++bin) {
      for (int d = 0; d < 2; ++d) {
        tensors.grad_offset[roi_offset_index(shape, r, channels.group, d, bin)] = 0;
      }
    }
    for_each_bin(
        shape, tensors, channels.group, r, scratch,
        [&](int64_t bin, int64_t rows, int64_t columns) {
          const T* grad_bin =
              tensors.grad_output + (r * shape.bins() + bin) * shape.out_channels + channels.begin;
          A* grad = scratch.values;
          for (int64_t c = 0; c < count; ++c) grad[c] = load(grad_bin + c);

          const int64_t start = first + shape.first_channel(bin);
          const T* source = tensors.input + start;
          A* grad_source = tensors.grad_input ? tensors.grad_input + start : nullptr;
          WeightedRows<A> pixels;
          A slope[2][kMostRows], moved[2] = {};
          const auto flush = [&] {
            if (!tensors.grad_offset) {
              add_rows_backward<false>(source, pixels, count, grad, grad_source,
                                       static_cast<A*>(nullptr));
            } else {
              A grad_weight[kMostRows];
              add_rows_backward<true>(source, pixels, count, grad, grad_source, grad_weight);
              for (int64_t i = 0; i < pixels.count; ++i) {
                for (int d = 0; d < 2; ++d) moved[d] += slope[d][i] * grad_weight[i];
              }
            }
            pixels.count = 0;
          };
          for_each_crossing(
              shape, scratch, rows, columns,
              [&](int64_t position, const BinPixel<A>& row, const BinPixel<A>& column) {
                slope[0][pixels.count] = row.slope * column.weight;
                slope[1][pixels.count] = row.weight * column.slope;
                pixels.add(position, row.weight * column.weight);
                if (pixels.count == kMostRows) flush();
              });
          flush();
          for (int d = 0; tensors.grad_offset && d < 2; ++d) {
            tensors.grad_offset[roi_offset_index(shape, r, channels.group, d, bin)] =
                RoISide<A>(shape, tensors.rois + 5 * r, d).reach * moved[d];
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
