// The location of deform_aggregate's samples: those of some output pixels and one group at a time,
// in vectorised loops.
#pragma once

#include <algorithm>

#include "../arena.h"
#include "../row_corners.h"
#include "../rows.h"
#include "kernel.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

// The most samples that are located together.
constexpr int kMostSamples = 192;

// Samples of one group that are located together, pixel by pixel: all taps of some consecutive
// output pixels or, where a kernel has too many taps for that, some taps of one.
struct Batch {
  int64_t pixel, pixels;  // the first, numbered over all images, and how many
  int64_t tap, taps;

  int64_t count() const { return pixels * taps; }
};

// The most pixels of a batch.
inline int64_t batch_pixels(const DeformAggregateShape& shape) {
  return std::max<int64_t>(kMostSamples / shape.taps(), 1);
}

// Calls `function(batch)` for the batches of output pixels [begin, end).
template <typename F>
inline void for_batches(const DeformAggregateShape& shape, int64_t begin, int64_t end,
                        const F& function) {
  const int64_t taps = shape.taps(), most = batch_pixels(shape);
  for (int64_t pixel = begin; pixel < end; pixel += most) {
    for (int64_t tap = 0; tap < taps; tap += kMostSamples) {
      function(Batch{pixel, std::min(most, end - pixel), tap,
                     std::min<int64_t>(kMostSamples, taps - tap)});
    }
  }
}

template <typename A>
class Locator {
 public:
  Locator(const DeformAggregateShape& shape, Arena& arena)
      : shape_(shape),
        samples_(arena.take<Samples<A, kMostSamples>>(1)),
        arrays_(arena.take<Arrays>(1)) {}

  // Sets what a batch's samples of all groups have in common: their positions without offsets.
  void start(const Batch& batch) {
    if (batch.tap != first_tap_) set_taps(batch);
    const AggregateAxis &y = shape_.y, &x = shape_.x;
    const int64_t row = batch.pixel / x.out_size;
    int64_t at_y = row % y.out_size, at_x = batch.pixel - row * x.out_size;
    for (int64_t j = 0; j < batch.pixels; ++j) {
      const A origin_y = static_cast<A>(y.origin(at_y)), origin_x = static_cast<A>(x.origin(at_x));
      std::fill_n(arrays_->origin_y + j * batch.taps, batch.taps, origin_y);
      std::fill_n(arrays_->origin_x + j * batch.taps, batch.taps, origin_x);
      if (++at_x < x.out_size) continue;
      at_x = 0;
      if (++at_y == y.out_size) at_y = 0;
    }
  }

  // Locates the batch's samples of one group. `offset` and `mask` point to the group's of the first
  // pixel.
  const Samples<A, kMostSamples>& locate(const Batch& batch, const A* offset, int64_t offset_stride,
                                         const A* mask, int64_t mask_stride) const {
    Samples<A, kMostSamples>& samples = *samples_;
    const int64_t taps = batch.taps, count = batch.count();
    for (int64_t j = 0; j < batch.pixels; ++j) {
      const A* offsets = offset + j * offset_stride + 2 * batch.tap;
      copy_few(offsets, 2 * taps, arrays_->offset + 2 * j * taps);
      copy_few(mask + j * mask_stride + batch.tap, taps, samples.modulation + j * taps);
    }
    const A scale = static_cast<A>(shape_.offset_scale);
    const int64_t height = shape_.y.size, width = shape_.x.size;
    const Arrays& of = *arrays_;
#pragma GCC ivdep
    for (int64_t s = 0; s < count; ++s) {
      const A x = of.origin_x[s] + scale * (of.tap_x[s] + of.offset[2 * s]);
      const A y = of.origin_y[s] + scale * (of.tap_y[s] + of.offset[2 * s + 1]);
      const bool there = samples.locate(s, y, x, height, width);
      samples.modulation[s] = there ? samples.modulation[s] : A(0);
    }
    return samples;
  }

 private:
  // Of each sample of a batch: p0, p_k and its offset.
  struct Arrays {
    A origin_y[kMostSamples], origin_x[kMostSamples];
    A tap_y[kMostSamples], tap_x[kMostSamples];
    A offset[2 * kMostSamples];
  };

  // Sets p_k of the batch's taps, for as many pixels as a batch may have.
  void set_taps(const Batch& batch) {
    for (int64_t k = 0; k < batch.taps; ++k) {
      const int64_t full = shape_.full_tap(batch.tap + k);
      const A y = static_cast<A>(shape_.y.relative(full % shape_.y.kernel));
      const A x = static_cast<A>(shape_.x.relative(full / shape_.y.kernel));
      for (int64_t j = 0; j < batch_pixels(shape_); ++j) {
        arrays_->tap_y[j * batch.taps + k] = y;
        arrays_->tap_x[j * batch.taps + k] = x;
      }
    }
    first_tap_ = batch.tap;
  }

  const DeformAggregateShape& shape_;
  Samples<A, kMostSamples>* const samples_;
  Arrays* const arrays_;
  int64_t first_tap_ = -1;  // of the taps that are set
};

}  // namespace
}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
