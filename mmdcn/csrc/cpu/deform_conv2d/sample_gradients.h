// The gradients of offsets and modulations in the backward pass: their computation from the
// products of columns and corners, and their way to the tensors.
#pragma once

#include <algorithm>

#include "backward_tile.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

// The gradients of y, x and the modulation, from the dot product at each corner.
template <typename A>
inline void sample_gradients(const A (&dots)[4], A fraction_y, A fraction_x, A modulation,
                             A (&gradient)[3]) {
  const A low_y = weight_along(fraction_y, 0), low_x = weight_along(fraction_x, 0);
  const A upper = low_x * dots[0] + fraction_x * dots[1];
  const A lower = low_x * dots[2] + fraction_x * dots[3];
  gradient[0] = modulation * (lower - upper);
  gradient[1] = modulation * (low_y * (dots[1] - dots[0]) + fraction_y * (dots[3] - dots[2]));
  gradient[2] = low_y * upper + fraction_y * lower;
}

template <typename T, typename A = accumulator_t<T>>
class SampleGradients {
 public:
  A* const dots;  // 4 × pixels: Σ_c grad_column[c] X(q)[c] for each corner q

  SampleGradients(const TileAtWork<T>& work, int64_t channels, Arena& arena)
      : dots(arena.take<A>(4 * kBackwardTile)),
        work_(work),
        shape_(work.call.shape),
        tensors_(work.call.tensors),
        block_(work.call.block),
        gradients_(arena.take<A>(3 * kBackwardTile)) {
    const int64_t owned = channels / shape_.deform_group_channels() * shape_.taps() * kBackwardTile;
    staged_offset_ = arena.take<A>(tensors_.grad_offset.in_planes() ? 0 : 2 * owned);
    staged_mask_ = arena.take<A>(tensors_.grad_mask.in_planes() ? 0 : owned);
  }

  // Computes the gradients of one tap and offset group from the dots, and stores them to `aside`,
  // if that is not null, or to the tensors: directly if these lie in planes, otherwise to the
  // staged rows.
  void store(int64_t d, int64_t tap, A* aside) const {
    set_gradients();
    if (aside) {
      for (int k = 0; k < 3; ++k) {
        const A* source = gradients_ + k * kBackwardTile;
        std::copy(source, source + work_.tile->count, aside + k * kBackwardTile);
      }
      return;
    }
    const int64_t row = d * shape_.taps() + tap;
    const int64_t skipped = first_owned(shape_, block_) * shape_.taps();
    store_row(tensors_.grad_offset, 2 * row, 0, staged_offset_, 2 * skipped);
    store_row(tensors_.grad_offset, 2 * row + 1, 1, staged_offset_, 2 * skipped);
    store_row(tensors_.grad_mask, row, 2, staged_mask_, skipped);
  }

  // Stores the staged rows, once they have the gradients of all taps.
  void store_staged() const {
    store_staged(tensors_.grad_offset, staged_offset_, 2);
    store_staged(tensors_.grad_mask, staged_mask_, 1);
  }

 private:
  void set_gradients() const {
    const BackwardSamples<A>& samples = *work_.samples;
    const int32_t height = static_cast<int32_t>(shape_.height);
    const int32_t width = static_cast<int32_t>(shape_.width);
    const A* const dots_of = dots;
    A* const gradients = gradients_;
    const int64_t count = work_.tile->count;
    for (int64_t i = 0; i < count; ++i) {
      // The dots of a corner that does not exist are those of whatever stands in for it.
      const int32_t top = samples.row_exists(0, i, height);
      const int32_t low = samples.row_exists(1, i, height);
      const int32_t first = samples.column_exists(0, i, width);
      const int32_t last = samples.column_exists(1, i, width);
      const A dot[4] = {(top & first) != 0 ? dots_of[i] : A(0),
                        (top & last) != 0 ? dots_of[kBackwardTile + i] : A(0),
                        (low & first) != 0 ? dots_of[2 * kBackwardTile + i] : A(0),
                        (low & last) != 0 ? dots_of[3 * kBackwardTile + i] : A(0)};
      A gradient[3];
      sample_gradients(dot, samples.fraction_y[i], samples.fraction_x[i], samples.modulation[i],
                       gradient);
      gradients[i] = gradient[0];
      gradients[kBackwardTile + i] = gradient[1];
      gradients[2 * kBackwardTile + i] = gradient[2];
    }
  }

  // Stores one channel of a tensor of gradients, from row number `from` of gradients_. The staged
  // rows begin with channel number `first_staged`.
  void store_row(const SamplingGradients<A>& target, int64_t channel, int64_t from, A* staged,
                 int64_t first_staged) const {
    if (target.data == nullptr) return;
    const A* source = gradients_ + from * kBackwardTile;
    if (!target.in_planes()) {
      std::copy(source, source + work_.tile->count,
                staged + (channel - first_staged) * kBackwardTile);
      return;
    }
    for (int64_t r = 0; r < work_.tile->runs; ++r) {
      const auto& run = work_.tile->run[r];
      std::copy(source + run.first, source + run.first + run.count, target.at(channel, run.pixel));
    }
  }

  // Stores the staged rows of a tensor of gradients, of which each sample has `per_sample`.
  void store_staged(const SamplingGradients<A>& target, const A* staged, int64_t per_sample) const {
    const int64_t begin = first_owned(shape_, block_), owned = last_owned(shape_, block_) - begin;
    const int64_t rows = per_sample * shape_.taps();
    if (target.data == nullptr || target.in_planes() || owned < 1) return;
    for (int64_t r = 0; r < work_.tile->runs; ++r) {
      const auto& run = work_.tile->run[r];
      transpose<A>(staged + run.first, kBackwardTile, owned * rows, run.count,
                   target.at(begin * rows, run.pixel), target.pixel_stride);
    }
  }

  const TileAtWork<T>& work_;
  const DeformConv2dShape& shape_;
  const BackwardTensors<T>& tensors_;
  const ChannelBlock& block_;
  A* const gradients_;  // 3 × pixels: of y, x and the modulation
  A* staged_offset_;    // channels × pixels, for a tensor whose channels are contiguous
  A* staged_mask_;      // likewise
};

}  // namespace
}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
