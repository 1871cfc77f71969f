// The CPU kernels of deform_aggregate. Compiled once for each instruction set, with
// MMDCN_CPU_CAPABILITY naming the namespace.
//
// For each output pixel and group, the corners of some taps' samples are located side by side; then
// the pixels where they exist are added up, as vectors of channels.
#include "kernel.h"

#include "../arena.h"
#include "../channel_rows.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

// Taps that are located side by side; their corners fit into WeightedRows.
constexpr int kSideBySide = 16;
static_assert(4 * kSideBySide <= kMostRows, "too many corners");

// p_k of all taps.
template <typename A>
struct Taps {
  A *y, *x;

  Taps(const DeformAggregateShape& shape, Arena& arena)
      : y(arena.take<A>(shape.taps())), x(arena.take<A>(shape.taps())) {}

  void fill(const DeformAggregateShape& shape) const {
    for (int64_t tap = 0; tap < shape.taps(); ++tap) {
      const int64_t full = shape.full_tap(tap);
      y[tap] = static_cast<A>(shape.y.relative(full % shape.y.kernel));
      x[tap] = static_cast<A>(shape.x.relative(full / shape.y.kernel));
    }
  }
};

// Scratch memory of one thread.
template <typename A>
struct Scratch {
  Taps<A> taps;
  A* row;  // the channels of a group: sums, or gradients of them

  Scratch(const DeformAggregateShape& shape, Arena& arena)
      : taps(shape, arena), row(arena.take<A>(shape.group_channels())) {}
};

// Samples of some taps of one output pixel and group.
template <typename A>
struct Samples : CornerArrays<A, kSideBySide> {
  int32_t there[4][kSideBySide];  // whether corners exist, in the order of Corners

  // Locates taps [first, first + count) of output position (out_y, out_x).
  void locate_taps(const DeformAggregateShape& shape, const Taps<A>& taps, int64_t out_y,
                   int64_t out_x, const A* offset, int64_t first, int64_t count) {
    const A scale = static_cast<A>(shape.offset_scale);
    const A origin_y = static_cast<A>(shape.y.origin(out_y));
    const A origin_x = static_cast<A>(shape.x.origin(out_x));
    A y[kSideBySide], x[kSideBySide];
    for (int64_t k = 0; k < count; ++k) {
      x[k] = origin_x + scale * (taps.x[first + k] + offset[2 * (first + k)]);
      y[k] = origin_y + scale * (taps.y[first + k] + offset[2 * (first + k) + 1]);
    }
    for (int64_t k = count; k < kSideBySide; ++k) x[k] = y[k] = A(-1);
    const int32_t height = static_cast<int32_t>(shape.y.size);
    const int32_t width = static_cast<int32_t>(shape.x.size);
#pragma GCC ivdep
    for (int k = 0; k < kSideBySide; ++k) {
      this->locate(k, y[k], x[k], shape.y.size, shape.x.size);
      for (int q = 0; q < 4; ++q) there[q][k] = this->exists(q, k, height, width);
    }
  }

  // The number of the pixel that corner number q of sample number k is.
  int64_t pixel(const DeformAggregateShape& shape, int q, int64_t k) const {
    return (this->low_y[k] + int64_t(q >> 1)) * shape.x.size + this->low_x[k] + (q & 1);
  }

  // Lists the pixels that samples [0, count) read, with their weights times the modulations.
  void list(const DeformAggregateShape& shape, const A* modulation, int64_t count,
            WeightedRows<A>& rows) const {
    rows.count = 0;
    for (int64_t k = 0; k < count; ++k) {
      for (int q = 0; q < 4; ++q) {
        if (!there[q][k]) continue;
        rows.add(pixel(shape, q, k) * shape.channels, modulation[k] * this->weight(q, k));
      }
    }
  }
};

template <typename T, typename A = accumulator_t<T>>
void forward(const DeformAggregateShape& shape, const AggregateTensors<T>& tensors, int64_t begin,
             int64_t end, std::byte* memory) {
  Arena arena(memory);
  const Scratch<A> scratch(shape, arena);
  const Taps<A>& taps = scratch.taps;
  taps.fill(shape);
  const int64_t channels = shape.group_channels(), count = shape.taps();
  A* sum = scratch.row;
  Samples<A> samples;
  WeightedRows<A> rows;
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const int64_t row = pixel / shape.x.out_size, image = row / shape.y.out_size;
    const int64_t out_y = row - image * shape.y.out_size, out_x = pixel - row * shape.x.out_size;
    const T* source = tensors.input + image * shape.y.size * shape.x.size * shape.channels;
    const A* offset = tensors.offset + pixel * tensors.offset_layout.pixel_stride;
    const A* mask = tensors.mask + pixel * tensors.mask_layout.pixel_stride;
    T* target = tensors.output + pixel * shape.channels;
    for (int64_t group = 0; group < shape.groups; ++group) {
      std::memset(sum, 0, channels * sizeof(A));
      for (int64_t first = 0; first < count; first += kSideBySide) {
        const int64_t some = count - first < kSideBySide ? count - first : kSideBySide;
        samples.locate_taps(shape, taps, out_y, out_x, offset, first, some);
        samples.list(shape, mask + first, some, rows);
        add_rows(source, rows, channels, sum);
      }
      for (int64_t c = 0; c < channels; ++c) store(target + c, sum[c]);
      source += channels;
      target += channels;
      offset += tensors.offset_layout.group_stride;
      mask += tensors.mask_layout.group_stride;
    }
  }
}

template <typename T, typename A = accumulator_t<T>>
void backward(const DeformAggregateShape& shape, const AggregateTensors<T>& tensors,
              const AggregateChannels& part, int64_t image, std::byte* memory) {
  Arena arena(memory);
  const Scratch<A> scratch(shape, arena);
  const Taps<A>& taps = scratch.taps;
  taps.fill(shape);
  const int64_t channels = part.end - part.begin, count = shape.taps();
  const A scale = static_cast<A>(shape.offset_scale);
  A* grad = scratch.row;
  const int64_t start = image * shape.y.size * shape.x.size * shape.channels + part.begin;
  const T* source = tensors.input + start;
  A* grad_source = tensors.grad_input ? tensors.grad_input + start : nullptr;
  Samples<A> samples;
  WeightedRows<A> rows;
  A grad_weight[kMostRows] = {};
  for (int64_t i = 0; i < shape.pixels(); ++i) {
    const int64_t pixel = image * shape.pixels() + i;
    const int64_t out_y = i / shape.x.out_size, out_x = i - out_y * shape.x.out_size;
    const A* offset = tensors.offset + pixel * tensors.offset_layout.pixel_stride +
                      part.group * tensors.offset_layout.group_stride;
    const A* mask = tensors.mask + pixel * tensors.mask_layout.pixel_stride +
                    part.group * tensors.mask_layout.group_stride;
    const int64_t first_tap = (pixel * shape.groups + part.group) * count;
    const T* grad_pixel = tensors.grad_output + pixel * shape.channels + part.begin;
    for (int64_t c = 0; c < channels; ++c) grad[c] = load(grad_pixel + c);

    for (int64_t first = 0; first < count; first += kSideBySide) {
      const int64_t some = count - first < kSideBySide ? count - first : kSideBySide;
      samples.locate_taps(shape, taps, out_y, out_x, offset, first, some);
      samples.list(shape, mask + first, some, rows);
      if (!tensors.grad_offset && !tensors.grad_mask) {
        add_rows_backward<false>(source, rows, channels, grad, grad_source, grad_weight);
        continue;
      }
      add_rows_backward<true>(source, rows, channels, grad, grad_source, grad_weight);
      const A* corner = grad_weight;
      for (int64_t k = 0; k < some; ++k) {
        A moved_y = 0, moved_x = 0, scaled = 0;
        A modulation = 0;  // Whatever it is does not matter to a sample of nothing.
        for (int q = 0; q < 4; ++q) {
          if (!samples.there[q][k]) continue;
          const A gradient = *corner++;
          modulation = mask[first + k];
          moved_y += samples.slope_y(q, k) * gradient;
          moved_x += samples.slope_x(q, k) * gradient;
          scaled += samples.weight(q, k) * gradient;
        }
        const int64_t tap = first_tap + first + k;
        if (tensors.grad_offset) {
          tensors.grad_offset[2 * tap] = scale * modulation * moved_x;
          tensors.grad_offset[2 * tap + 1] = scale * modulation * moved_y;
        }
        if (tensors.grad_mask) tensors.grad_mask[tap] = scaled;
      }
    }
  }
}

template <typename T, typename A = accumulator_t<T>>
int64_t scratch_bytes(const DeformAggregateShape& shape) {
  Arena arena(nullptr);
  Scratch<A>(shape, arena);
  return arena.used();
}

}  // namespace

template <typename T>
AggregateKernel<T> deform_aggregate() {
  AggregateKernel<T> kernel = {};
  kernel.scratch_bytes = &scratch_bytes<T>;
  kernel.forward = &forward<T>;
  kernel.backward = &backward<T>;
  return kernel;
}

template AggregateKernel<double> deform_aggregate<double>();
template AggregateKernel<float> deform_aggregate<float>();
template AggregateKernel<Half> deform_aggregate<Half>();
template AggregateKernel<BFloat16> deform_aggregate<BFloat16>();

}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
