// The gradients of offsets and modulations in the backward pass: their computation from the
// products of columns and corners, and their way to the tensors.
#pragma once

#include <algorithm>

#include "../row_gradients.h"
#include "backward_tile.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

template <typename T, typename A = accumulator_t<T>>
class SampleGradients {
 public:
  SampleDots<A, kBackwardTile>* const dots;

  SampleGradients(const SampledTile<T>& work, int64_t channels, Arena& arena)
      : dots(arena.take<SampleDots<A, kBackwardTile>>(1)),
        work_(work),
        shape_(work.call.shape),
        tensors_(work.call.tensors),
        block_(work.call.block),
        gradients_(arena.take<Gradients>(1)) {
    const int64_t owned = channels / shape_.deform_group_channels() * shape_.taps() * kBackwardTile;
    staged_offset_ = arena.take<A>(tensors_.grad_offset.in_planes() ? 0 : 2 * owned);
    staged_mask_ = arena.take<A>(tensors_.grad_mask.in_planes() ? 0 : owned);
  }

  // Computes the gradients of one tap and offset group from the dots, and stores them to `aside`,
  // if that is not null, or to the tensors: directly if these lie in planes, otherwise to the
  // staged rows.
  void store(int64_t d, int64_t tap, A* aside) const {
    set_sample_gradients(shape_.height, shape_.width, *work_.samples, work_.tile->count, *dots,
                         *gradients_);
    if (aside) {
      for (int k = 0; k < 3; ++k) {
        const A* source = gradients_->of[k];
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
  using Gradients = ThreeGradients<A, kBackwardTile>;

  // Stores one channel of a tensor of gradients, from row number `from` of gradients_. The staged
  // rows begin with channel number `first_staged`.
  void store_row(const SamplingGradients<A>& target, int64_t channel, int64_t from, A* staged,
                 int64_t first_staged) const {
    if (target.data == nullptr) return;
    const A* source = gradients_->of[from];
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

  const SampledTile<T>& work_;
  const DeformConv2dShape& shape_;
  const BackwardTensors<T>& tensors_;
  const ChannelBlock& block_;
  Gradients* const gradients_;
  A* staged_offset_;  // channels × pixels, for a tensor whose channels are contiguous
  A* staged_mask_;    // likewise
};

}  // namespace
}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
