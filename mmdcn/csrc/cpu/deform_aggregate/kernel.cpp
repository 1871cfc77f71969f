// The CPU kernels of deform_aggregate. Compiled once for each instruction set, with
// MMDCN_CPU_CAPABILITY naming the namespace.
//
// For each output pixel and group, the samples of some taps are located in a vectorised loop; then
// the rows of channels of their corners are added up.
#include "kernel.h"

#include "../arena.h"
#include "../channel_rows.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

// Taps that are located in one loop; their corners fit into WeightedRows.
constexpr int kTapChunk = 16;
static_assert(4 * kTapChunk <= kMostRows, "too many corners");

// p_k of all taps, along y and x.
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
  A* row;  // a group's channels of one output pixel, or of its gradient

  Scratch(const DeformAggregateShape& shape, Arena& arena)
      : taps(shape, arena), row(arena.take<A>(shape.group_channels())) {}
};

// Samples of some taps of one output pixel and group.
template <typename A>
struct TapSamples : CornerArrays<A, kTapChunk> {
  int32_t there[4][kTapChunk];  // whether a corner exists, numbered as in sampling.h

  // Locates taps [first, first + count) of output position (out_y, out_x).
  void locate_taps(const DeformAggregateShape& shape, const Taps<A>& taps, int64_t out_y,
                   int64_t out_x, const A* offset, int64_t first, int64_t count) {
    const A scale = static_cast<A>(shape.offset_scale);
    const A origin_y = static_cast<A>(shape.y.origin(out_y));
    const A origin_x = static_cast<A>(shape.x.origin(out_x));
    A y[kTapChunk], x[kTapChunk];
    for (int64_t k = 0; k < count; ++k) {
      x[k] = origin_x + scale * (taps.x[first + k] + offset[2 * (first + k)]);
      y[k] = origin_y + scale * (taps.y[first + k] + offset[2 * (first + k) + 1]);
    }
    // The loop below has a constant length; what fills it up contributes nothing.
    for (int64_t k = count; k < kTapChunk; ++k) x[k] = y[k] = A(-1);
    const int32_t height = static_cast<int32_t>(shape.y.size);
    const int32_t width = static_cast<int32_t>(shape.x.size);
#pragma GCC ivdep
    for (int k = 0; k < kTapChunk; ++k) {
      this->locate(k, y[k], x[k], shape.y.size, shape.x.size);
      for (int q = 0; q < 4; ++q) there[q][k] = this->exists(q, k, height, width);
    }
  }

  // The number of the pixel that is corner number q of sample number k.
  int64_t pixel(const DeformAggregateShape& shape, int q, int64_t k) const {
    return (this->low_y[k] + int64_t(q >> 1)) * shape.x.size + this->low_x[k] + (q & 1);
  }

  // Lists the corners of samples [0, count), with their weights times the modulations.
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
  TapSamples<A> samples;
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
      for (int64_t first = 0; first < count; first += kTapChunk) {
        const int64_t some = count - first < kTapChunk ? count - first : kTapChunk;
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

// Stores the gradients of the offsets and modulations of `count` samples, which begin with sample
// number `first` in the tensors. `product` has Σ_c grad[c] X(q)[c] for each corner that exists.
template <typename T, typename A = accumulator_t<T>>
inline void store_sample_gradients(const DeformAggregateShape& shape,
                                   const AggregateTensors<T>& tensors, const TapSamples<A>& samples,
                                   const A* modulations, int64_t count, const A* product,
                                   int64_t first) {
  const A scale = static_cast<A>(shape.offset_scale);
  for (int64_t k = 0; k < count; ++k) {
    A grad_y = 0, grad_x = 0, grad_modulation = 0;
    // Without corners the gradients are zero, even if the modulation is not finite.
    A modulation = 0;
    for (int q = 0; q < 4; ++q) {
      if (!samples.there[q][k]) continue;
      const A gradient = *product++;
      modulation = modulations[k];
      grad_y += samples.slope_y(q, k) * gradient;
      grad_x += samples.slope_x(q, k) * gradient;
      grad_modulation += samples.weight(q, k) * gradient;
    }
    if (tensors.grad_offset) {
      tensors.grad_offset[2 * (first + k)] = scale * modulation * grad_x;
      tensors.grad_offset[2 * (first + k) + 1] = scale * modulation * grad_y;
    }
    if (tensors.grad_mask) tensors.grad_mask[first + k] = grad_modulation;
  }
}

template <typename T, typename A = accumulator_t<T>>
void backward(const DeformAggregateShape& shape, const AggregateTensors<T>& tensors,
              const ChannelBlock& block, int64_t image, std::byte* memory) {
  Arena arena(memory);
  const Scratch<A> scratch(shape, arena);
  const Taps<A>& taps = scratch.taps;
  taps.fill(shape);
  const int64_t channels = block.end - block.begin, count = shape.taps();
  const bool wants_sampling = tensors.grad_offset || tensors.grad_mask;
  A* grad = scratch.row;
  const int64_t start = image * shape.y.size * shape.x.size * shape.channels + block.begin;
  const T* source = tensors.input + start;
  A* grad_source = tensors.grad_input ? tensors.grad_input + start : nullptr;
  TapSamples<A> samples;
  WeightedRows<A> rows;
  A grad_weight[kMostRows] = {};
  for (int64_t i = 0; i < shape.pixels(); ++i) {
    const int64_t pixel = image * shape.pixels() + i;
    const int64_t out_y = i / shape.x.out_size, out_x = i - out_y * shape.x.out_size;
    const A* offset = tensors.offset + pixel * tensors.offset_layout.pixel_stride +
                      block.group * tensors.offset_layout.group_stride;
    const A* mask = tensors.mask + pixel * tensors.mask_layout.pixel_stride +
                    block.group * tensors.mask_layout.group_stride;
    const int64_t first_sample = (pixel * shape.groups + block.group) * count;
    const T* grad_pixel = tensors.grad_output + pixel * shape.channels + block.begin;
    for (int64_t c = 0; c < channels; ++c) grad[c] = load(grad_pixel + c);

    for (int64_t first = 0; first < count; first += kTapChunk) {
      const int64_t some = count - first < kTapChunk ? count - first : kTapChunk;
      samples.locate_taps(shape, taps, out_y, out_x, offset, first, some);
      samples.list(shape, mask + first, some, rows);
      if (!wants_sampling) {
        add_rows_backward<false>(source, rows, channels, grad, grad_source, grad_weight);
        continue;
      }
      add_rows_backward<true>(source, rows, channels, grad, grad_source, grad_weight);
      store_sample_gradients(shape, tensors, samples, mask + first, some, grad_weight,
                             first_sample + first);
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
