// The samples of the backward pass as rows of channels, which are read from the corners' rows and
// added to those of the gradient.
#pragma once

#include <algorithm>

#include "../row_gradients.h"
#include "backward_tile.h"
#include "corners.h"
#include "windows.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

// L is the type of what products multiply.
template <typename T, typename L>
class RowScatter {
 public:
  using A = accumulator_t<T>;
  static constexpr Sampling kSampling = Sampling::kRows;

  // `dots` is the memory of SampleGradients.
  RowScatter(const TileAtWork<T, L>& work, int64_t channels, SampleDots<A, kBackwardTile>* dots,
             Arena& arena)
      : work_(work),
        call_(work.call),
        shape_(call_.shape),
        tensors_(call_.tensors),
        windows_(call_.windows),
        plane_(shape_.height * shape_.width),
        dots_(dots),
        columns_(arena.take<L>(is_depthwise(shape_) ? 0 : kBackwardTile * work.column_stride)),
        read_(arena.take<WeightedCorners<A, kBackwardTile>>(1)),
        added_(arena.take<Addresses>(1)),
        zeros_(arena.take<A>(channels)),
        sinks_(arena.take<A>(4 * channels)),
        strays_(arena.take<A>(4 * channels)),
        grad_strays_(arena.take<A>(4 * channels)),
        unwanted_(arena.take<A>(is_depthwise(shape_) ? channels : 0)),
        rows_(arena.take<int64_t>(kBackwardTile)) {}

  void start() const {
    fill_zero(zeros_, call_.channels());
    fill_zero(sinks_, 4 * call_.channels());
    if (is_depthwise(shape_)) fill_zero(unwanted_, call_.channels());
    const int64_t stride = is_depthwise(shape_) ? work_.grad_stride : work_.column_stride;
    for (int64_t i = 0; i < kBackwardTile; ++i) rows_[i] = i * stride;
  }

  // Reads the gradients of the tile's outputs. Depthwise convolutions, which have no product to
  // read them for, find those of channels-last outputs where they are.
  void start_tile() const {
    if (!in_place()) return work_.load_gradients();
    const BackwardTile& tile = *work_.tile;
    for (int64_t r = 0; r < tile.runs; ++r) {
      const auto& run = tile.run[r];
      for (int64_t i = 0; i < run.count; ++i) {
        rows_[run.first + i] = (run.pixel + i) * tensors_.output_layout.pixel_stride;
      }
    }
  }

  // PlaneScatter has work here.
  void start_tap() const {}
  void prefetch(int64_t, int64_t) const {}

  // Reads and scatters the samples of one tap and offset group, for channels [begin, end) of the
  // block.
  void scatter_samples(int64_t tap, int64_t begin, int64_t end) const {
    const Share share = {tap * call_.channels(), begin, end};
    if constexpr (std::is_same_v<L, A>) {
      if (is_depthwise(shape_)) {
        // Rarely less than all is wanted, and little time would be saved.
        return tensors_.grad_input ? scatter_with<true, Column::kDepthwise, true>(share)
                                   : scatter_with<false, Column::kDepthwise, true>(share);
      }
    }
    if (tensors_.grad_weight) {
      scatter_as<Column::kStored>(share);
    } else {
      scatter_as<Column::kNone>(share);
    }
  }

  void add_weight_gradient(int64_t tap) const {
    if (is_depthwise(shape_)) return;  // Its gradient has been added by scatter().
    work_.template add_weight_gradient<Order::kColumns>(tap, columns_, work_.column_stride);
  }

 private:
  using Addresses = CornerAddresses<kBackwardTile>;
  // What is scattered together: channels [begin, end) of the block, for one tap, whose row in a
  // depthwise weight begins at `tap_row`.
  struct Share {
    int64_t tap_row, begin, end;
  };

  // Whether the gradients of the outputs are read where they are.
  bool in_place() const {
    return std::is_same_v<T, A> && is_depthwise(shape_) && tensors_.output_layout.channels_last();
  }

  template <Column kind>
  void scatter_as(const Share& share) const {
    if (tensors_.grad_input && call_.wants_sampling()) {
      scatter_with<true, kind, true>(share);
    } else if (tensors_.grad_input) {
      scatter_with<true, kind, false>(share);
    } else if (call_.wants_sampling()) {
      scatter_with<false, kind, true>(share);
    } else if constexpr (kind == Column::kStored) {
      scatter_with<false, kind, false>(share);
    }
  }

  // Scatters sample number i, for `count` channels of the block from number `channel` on. Corners
  // outside the windows are read from the planes, and added to those of the gradient.
  template <bool wants_input, Column kind, bool wants_dots>
  __attribute__((noinline)) void stray(const RowSamples<A, A, L>& samples, int64_t i,
                                       int64_t channel, int64_t count) const {
    read_strays(shape_, *work_.samples, i, windows_.input, call_.planes() + channel * plane_, count,
                strays_, read_->at);
    Corners<A, 2> corners;
    const bool there = corners_of(shape_, *work_.samples, i, corners);
    bool far[4] = {};
    for (int q = 0; wants_input && there && q < 4; ++q) {
      const int64_t y = work_.samples->low_y[i] + (q >> 1);
      const int64_t x = work_.samples->low_x[i] + (q & 1);
      if (corners.position[q] < 0 || windows_.grad_input.has(y, x)) continue;
      A* values = grad_strays_ + q * count;
      fill_zero(values, count);
      added_->corner[q][i] = reinterpret_cast<uintptr_t>(values);
      far[q] = true;
    }
    scatter<wants_input, kind, wants_dots>(samples, i, i + 1, count);
    for (int q = 0; q < 4; ++q) {
      if (!far[q]) continue;
      const A* values = grad_strays_ + q * count;
      T* target = call_.grad_planes() + channel * plane_ + corners.position[q];
      for (int64_t c = 0; c < count; ++c) {
        store(target + c * plane_, load(target + c * plane_) + values[c]);
      }
    }
  }

  // Scatters the samples of a tile. `row_channel` is the index of the block's first channel in a
  // pixel of `rows`.
  template <bool wants_input, Column kind, bool wants_dots, typename S>
  void scatter_rows(const RowWindow<S>& rows, const RowWindow<A>& grad_rows, int64_t row_channel,
                    const Share& share) const {
    using V = std::remove_const_t<S>;
    const BackwardSamples<A>& located = *work_.samples;
    const int64_t begin = share.begin, count = share.end - begin, pixels = work_.tile->count;
    bool missing = set_corners<S>(shape_.height, shape_.width, rows, row_channel + begin, located,
                                  pixels, reinterpret_cast<const V*>(zeros_), 0, read_->at);
    const bool moved = wants_input && std::is_same_v<V, A> && alike(rows, grad_rows);
    if (moved) {
      const uintptr_t from = reinterpret_cast<uintptr_t>(rows.data + row_channel);
      const uintptr_t shift = reinterpret_cast<uintptr_t>(grad_rows.data) - from;
      move_corners(read_->at, pixels, zeros_, sinks_, count, *added_,
                   [=](uintptr_t corner) { return corner + shift; });
    } else if (wants_input) {
      missing |= set_corners<A>(shape_.height, shape_.width, grad_rows, begin, located, pixels,
                                sinks_, count, *added_);
    }
    set_weights(located, pixels, read_->weight);
    const RowSamples<V, A, L> samples = samples_of<V, kind>(share);
    // Corners can only be missing in windows, which are of type A; in windows that are alike, the
    // same ones are.
    const bool apart = wants_input && !moved;
    if constexpr (std::is_same_v<V, A>) {
      for (int64_t i = 0, first = 0; missing && i <= pixels; ++i) {
        const bool last = i == pixels;
        if (!last && !read_->at.missing[i] && !(apart && added_->missing[i])) continue;
        if (first < i) scatter<wants_input, kind, wants_dots>(samples, first, i, count);
        if (!last) stray<wants_input, kind, wants_dots>(samples, i, begin, count);
        first = i + 1;
      }
      if (missing) return;
    }
    scatter<wants_input, kind, wants_dots>(samples, 0, pixels, count);
  }

  // The samples of a tile, for the channels of `share`, which are one offset group's.
  template <typename V, Column kind>
  RowSamples<V, A, L> samples_of(const Share& share) const {
    RowSamples<V, A, L> samples = {};
    samples.corner = read_->at.corner[0];
    samples.grad_corner = added_->corner[0];
    samples.weight = read_->weight[0];
    samples.quantity = kBackwardTile;
    samples.row = rows_;
    samples.dots = dots_->of[0];
    if constexpr (kind == Column::kDepthwise) {
      samples.gradient = work_.gradients + share.begin;
      if constexpr (std::is_same_v<T, A>) {
        if (in_place()) samples.gradient = tensors_.grad_output + call_.block.begin + share.begin;
      }
      samples.tap_weight = tensors_.weight + share.tap_row + share.begin;
      samples.grad_tap_weight =
          tensors_.grad_weight ? tensors_.grad_weight + share.tap_row + share.begin : unwanted_;
    } else {
      samples.gradient = work_.grad_columns + share.begin;
      samples.column = columns_ + share.begin;
    }
    return samples;
  }

  template <bool wants_input, Column kind, bool wants_dots>
  void scatter_with(const Share& share) const {
    if (tensors_.input_layout.channels_last()) {
      const RowWindow<const T> rows =
          whole_image(tensors_.input, shape_.height, shape_.width, shape_.channels);
      if constexpr (std::is_same_v<T, A>) {
        // The gradient has the layout of the input, and is added to in place.
        RowWindow<A> grad_rows = {};
        if (wants_input) {
          grad_rows = {call_.grad_planes(), rows.pixel_stride, rows.row_stride,
                       rows.capacity,       rows.begin,        rows.end,
                       rows.left,           rows.right,        rows.origin};
        }
        return scatter_rows<wants_input, kind, wants_dots>(rows, grad_rows, call_.block.begin,
                                                           share);
      }
      return scatter_rows<wants_input, kind, wants_dots>(rows, windows_.grad_input,
                                                         call_.block.begin, share);
    }
    scatter_rows<wants_input, kind, wants_dots>(windows_.input, windows_.grad_input, 0, share);
  }

  const TileAtWork<T, L>& work_;
  const BlockCall<T>& call_;
  const DeformConv2dShape& shape_;
  const BackwardTensors<T>& tensors_;
  BlockWindows<T>& windows_;
  const int64_t plane_;  // elements of a channel
  SampleDots<A, kBackwardTile>* const dots_;
  L* const columns_;  // pixels × channels of the block
  WeightedCorners<A, kBackwardTile>* const read_;
  Addresses* const added_;  // of the corners' gradients
  A* const zeros_;          // stands in for the channels of corners that do not exist
  A* const sinks_;          // 4 × channels: stands in for their gradients, never read
  A* const strays_;         // 4 × channels: corners outside the window
  A* const grad_strays_;    // 4 × channels: their gradients
  A* const unwanted_;       // stands in for the gradient of a depthwise weight, never read
  int64_t* const rows_;     // of each pixel, the first element of its gradients
};

}  // namespace
}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
