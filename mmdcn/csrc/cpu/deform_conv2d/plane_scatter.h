// The samples of the backward pass for offset groups of few channels, which are read from the
// planes and added to those of the gradient one channel at a time. Loops that are vectorised over
// the pixels of the tile are kept apart from those that cannot be.
#pragma once

#include "../row_gradients.h"
#include "backward_tile.h"
#include "corners.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

template <typename T, typename A = accumulator_t<T>>
class PlaneScatter {
 public:
  static constexpr Sampling kSampling = Sampling::kPlanes;

  // `dots` is the memory of SampleGradients.
  PlaneScatter(const TileAtWork<T, A>& work, int64_t channels, SampleDots<A, kBackwardTile>* dots,
               Arena& arena)
      : work_(work),
        call_(work.call),
        tensors_(call_.tensors),
        dots_(dots),
        corners_(arena.take<PlanarCorners>(1)),
        grad_columns_(arena.take<A>(channels * kBackwardTile)),
        columns_(arena.take<A>(channels * kBackwardTile)) {}

  void start() const {}

  void start_tile() const { work_.load_gradients(); }

  // Transposes the gradients of the tap's columns.
  void start_tap() const {
    transpose<A>(work_.grad_columns, work_.column_stride, work_.tile->count, call_.channels(),
                 grad_columns_, kBackwardTile);
  }

  // Prefetches the offsets of the offset group after group number d.
  void prefetch(int64_t d, int64_t tap) const {
    prefetch_sampling(*work_.tile, work_.sampling, work_.sampling.row(call_.shape, d + 1, tap));
  }

  // Reads and scatters the samples of one tap and offset group, for channels [begin, end) of the
  // block.
  void scatter_samples(int64_t /* tap */, int64_t begin, int64_t end) const {
    const BackwardSamples<A>& samples = *work_.samples;
    const int64_t count = work_.tile->count;
    const BlockWindows<T>& windows = call_.windows;
    const ImageLayout layout = tensors_.input_layout;
    const bool in_window = windows.grad_input.capacity > 0;
    A* grad_base = nullptr;
    if (tensors_.grad_input) {
      if constexpr (std::is_same_v<T, A>) grad_base = call_.grad_planes();
      if (in_window) grad_base = windows.grad_input.data;
    }
    const int64_t grad_pixel = in_window ? windows.grad_input.pixel_stride : layout.pixel_stride;
    const int64_t grad_channel = in_window ? 1 : layout.channel_stride;
    set_planar_corners(call_.shape, samples, count, layout.pixel_stride, corners_->read,
                       corners_->weight);
    if (grad_pixel != layout.pixel_stride) {
      set_planar_corners(call_.shape, samples, count, grad_pixel, corners_->added,
                         corners_->weight);
    }
    const auto& added = grad_pixel != layout.pixel_stride ? corners_->added : corners_->read;
    if (call_.wants_sampling()) fill_zero(dots_->of[0], 4 * kBackwardTile);
    for (int64_t c = begin; c < end; ++c) {
      const T* source = call_.planes() + c * layout.channel_stride;
      const A* grad = grad_columns_ + c * kBackwardTile;
      for (int64_t i = 0; i < count; ++i) {
        for (int q = 0; q < 4; ++q) corners_->value[q][i] = load(source + corners_->read[q][i]);
      }
      if (tensors_.grad_weight) blend(columns_ + c * kBackwardTile);
      if (call_.wants_sampling()) add_dots(grad);
      if (grad_base) add_to_plane(grad, added, grad_base + c * grad_channel);
    }
  }

  void add_weight_gradient(int64_t tap) const {
    work_.template add_weight_gradient<Order::kRows>(tap, columns_, kBackwardTile);
  }

 private:
  // The corners of one offset group's samples, and their values in one channel.
  struct PlanarCorners {
    int64_t read[4][kBackwardTile], added[4][kBackwardTile];
    A weight[4][kBackwardTile], value[4][kBackwardTile];
  };

  void blend(A* column) const {
    const auto& weight = corners_->weight;
    const auto& value = corners_->value;
    const BackwardSamples<A>& samples = *work_.samples;
    const int64_t count = work_.tile->count;
    for (int64_t i = 0; i < count; ++i) {
      const A blended = weight[0][i] * value[0][i] + weight[1][i] * value[1][i] +
                        weight[2][i] * value[2][i] + weight[3][i] * value[3][i];
      // Not 0 · value, which is NaN for an infinite value.
      column[i] = samples.low_y[i] == samples.kNowhere ? A(0) : blended;
    }
  }

  void add_dots(const A* grad) const {
    const int64_t count = work_.tile->count;
    for (int q = 0; q < 4; ++q) {
      A* dots = dots_->of[q];
      for (int64_t i = 0; i < count; ++i) dots[i] += corners_->value[q][i] * grad[i];
    }
  }

  void add_to_plane(const A* grad, const int64_t (&added)[4][kBackwardTile], A* target) const {
    const BackwardSamples<A>& samples = *work_.samples;
    const int64_t count = work_.tile->count;
    for (int64_t i = 0; i < count; ++i) {
      if (samples.low_y[i] == samples.kNowhere) continue;
      for (int q = 0; q < 4; ++q) target[added[q][i]] += corners_->weight[q][i] * grad[i];
    }
  }

  const TileAtWork<T, A>& work_;
  const BlockCall<T>& call_;
  const BackwardTensors<T>& tensors_;
  SampleDots<A, kBackwardTile>* const dots_;
  PlanarCorners* const corners_;
  A* const grad_columns_;  // channels × pixels
  A* const columns_;       // channels × pixels
};

}  // namespace
}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
