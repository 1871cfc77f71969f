// The samples of the backward pass as rows of channels, which are read from the corners' rows and
// added to those of the gradient.
#pragma once

#include <algorithm>

#include "backward_tile.h"
#include "corners.h"
#include "windows.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

// The addresses and weights of one sample, for the channels of one block and offset group. Pointers
// to what is not wanted are not set.
template <typename S, typename A>
struct RowSample {
  const S* corner[4];
  A* grad_corner[4];
  A weight[4];  // G(q, p) Δm
  const A* grad_column;
  A* column;
};

// Adds to the gradient of the input, samples the column again, and computes
// Σ_c grad_column[c] X(q)[c] for each corner q in `dots`, whose lanes the caller adds up.
template <bool wants_input, bool wants_column, bool wants_dots, typename S, typename A>
inline void scatter(const RowSample<S, A>& sample, int64_t count, register_t<A> (&dots)[4]) {
  const A* grad_column = sample.grad_column;
  A* column = sample.column;
  register_t<A> sums[4] = {};
  int64_t c = 0;
  for (; c + kLanes<A> <= count; c += kLanes<A>) {
    const register_t<A> gradient = load_register(grad_column + c);
    register_t<A> blended = {};
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      if constexpr (wants_column || wants_dots) {
        const register_t<A> value = load_register(sample.corner[q] + c);
        if constexpr (wants_column) blended += sample.weight[q] * value;
        if constexpr (wants_dots) sums[q] += value * gradient;
      }
      if constexpr (wants_input) {
        A* target = sample.grad_corner[q] + c;
        store_register(target, load_register(target) + sample.weight[q] * gradient);
      }
    }
    if constexpr (wants_column) store_register(column + c, blended);
  }
  for (; c < count; ++c) {
    A blended = 0;
    for (int q = 0; q < 4; ++q) {
      const A value = load(sample.corner[q] + c);
      blended += sample.weight[q] * value;
      sums[q][0] += value * grad_column[c];
      if constexpr (wants_input) sample.grad_corner[q][c] += sample.weight[q] * grad_column[c];
    }
    if constexpr (wants_column) column[c] = blended;
  }
  for (int q = 0; q < 4; ++q) dots[q] = sums[q];
}

template <typename T, typename A = accumulator_t<T>>
class RowScatter {
 public:
  static constexpr Sampling kSampling = Sampling::kRows;

  // `dots` is the memory of SampleGradients.
  RowScatter(const TileAtWork<T>& work, int64_t channels, A* dots, Arena& arena)
      : work_(work),
        call_(work.call),
        shape_(call_.shape),
        tensors_(call_.tensors),
        windows_(call_.windows),
        plane_(shape_.height * shape_.width),
        dots_(dots),
        columns_(arena.take<A>(kBackwardTile * work.column_stride)),
        read_(arena.take<Addresses>(1)),
        added_(arena.take<Addresses>(1)),
        weights_(arena.take<Weights>(1)),
        zeros_(arena.take<A>(channels)),
        sinks_(arena.take<A>(4 * channels)),
        strays_(arena.take<A>(4 * channels)),
        grad_strays_(arena.take<A>(4 * channels)) {}

  void start() const {
    fill_zero(zeros_, call_.channels());
    fill_zero(sinks_, 4 * call_.channels());
  }

  // PlaneScatter has work here.
  void start_tap() const {}
  void prefetch(int64_t, int64_t) const {}

  // Reads and scatters the samples of one tap and offset group, for channels [begin, end) of the
  // block.
  void scatter_samples(int64_t begin, int64_t end) const {
    const bool column = tensors_.grad_weight;
    if (tensors_.grad_input && call_.wants_sampling()) {
      column ? scatter_with<true, true, true>(begin, end)
             : scatter_with<true, false, true>(begin, end);
    } else if (tensors_.grad_input) {
      column ? scatter_with<true, true, false>(begin, end)
             : scatter_with<true, false, false>(begin, end);
    } else if (call_.wants_sampling()) {
      column ? scatter_with<false, true, true>(begin, end)
             : scatter_with<false, false, true>(begin, end);
    } else {
      scatter_with<false, true, false>(begin, end);
    }
  }

  void add_weight_gradient(int64_t tap) const {
    work_.template add_weight_gradient<Order::kColumns>(tap, columns_, work_.column_stride);
  }

 private:
  using Addresses = CornerAddresses<kBackwardTile>;
  struct Weights {
    A of[4][kBackwardTile];  // G(q, p) Δm
  };

  // Scatters sample number i, for `count` channels of the block from number `channel` on. Corners
  // outside the windows are read from the planes, and added to those of the gradient.
  template <bool wants_input, bool wants_column, bool wants_dots>
  __attribute__((noinline)) void stray(int64_t i, int64_t channel, int64_t count,
                                       RowSample<A, A>& sample, register_t<A> (&dots)[4]) const {
    Corners<A, 2> corners;
    if (!corners_of(shape_, *work_.samples, i, corners)) {
      if (wants_column) fill_zero(sample.column, count);
      return;
    }
    bool far[4] = {};
    for (int q = 0; q < 4; ++q) {
      const int64_t y = work_.samples->low_y[i] + (q >> 1);
      const int64_t x = work_.samples->low_x[i] + (q & 1);
      const bool exists = corners.position[q] >= 0;
      if (exists && !windows_.input.has(y, x)) {
        A* values = strays_ + q * count;
        const T* source = call_.planes() + channel * plane_ + corners.position[q];
        for (int64_t c = 0; c < count; ++c) values[c] = load(source + c * plane_);
        sample.corner[q] = values;
      }
      if (wants_input && exists && !windows_.grad_input.has(y, x)) {
        sample.grad_corner[q] = grad_strays_ + q * count;
        fill_zero(sample.grad_corner[q], count);
        far[q] = true;
      }
    }
    scatter<wants_input, wants_column, wants_dots>(sample, count, dots);
    for (int q = 0; q < 4; ++q) {
      if (!far[q]) continue;
      T* target = call_.grad_planes() + channel * plane_ + corners.position[q];
      for (int64_t c = 0; c < count; ++c) {
        store(target + c * plane_, load(target + c * plane_) + sample.grad_corner[q][c]);
      }
    }
  }

  // Sets the corners and weights of sample number i. Returns whether a corner is missing.
  template <bool wants_input, typename V>
  __attribute__((always_inline)) bool set_sample(int64_t i, RowSample<V, A>& sample) const {
    bool missing = read_->missing[i];
    for (int q = 0; q < 4; ++q) {
      sample.corner[q] = reinterpret_cast<const V*>(read_->corner[q][i]);
      sample.weight[q] = weights_->of[q][i];
      if (!wants_input) continue;
      sample.grad_corner[q] = reinterpret_cast<A*>(added_->corner[q][i]);
    }
    if (wants_input) missing = missing || added_->missing[i];
    return missing;
  }

  // Scatters the samples of a tile, for channels [begin, end) of the block, which are one offset
  // group's. `row_channel` is the index of the block's first channel in a pixel of `rows`.
  template <bool wants_input, bool wants_column, bool wants_dots, typename S>
  void scatter_rows(const RowWindow<S>& rows, const RowWindow<A>& grad_rows, int64_t row_channel,
                    int64_t begin, int64_t end) const {
    using V = std::remove_const_t<S>;
    const BackwardSamples<A>& samples = *work_.samples;
    const int64_t stride = work_.column_stride, count = end - begin;
    const int64_t pixels = work_.tile->count;
    set_corners<S>(shape_, rows, row_channel + begin, samples, pixels,
                   reinterpret_cast<const V*>(zeros_), 0, *read_);
    if (wants_input) {
      set_corners<A>(shape_, grad_rows, begin, samples, pixels, sinks_, count, *added_);
    }
    set_weights(samples, pixels, weights_->of);
    constexpr int64_t lanes = kLanes<A>;
    register_t<A> dots[4][lanes] = {};
    for (int64_t first = 0; first < pixels; first += lanes) {
      const int64_t some = std::min(lanes, pixels - first);
      for (int64_t k = 0; k < some; ++k) {
        const int64_t i = first + k;
        RowSample<V, A> sample;
        sample.grad_column = work_.grad_columns + i * stride + begin;
        sample.column = columns_ + i * stride + begin;
        const bool missing = set_sample<wants_input>(i, sample);
        register_t<A> sums[4] = {};
        // Corners can only be missing in windows, which are of type A.
        if (std::is_same_v<V, A> && missing) {
          if constexpr (std::is_same_v<V, A>) {
            stray<wants_input, wants_column, wants_dots>(i, begin, count, sample, sums);
          }
        } else {
          scatter<wants_input, wants_column, wants_dots>(sample, count, sums);
        }
        if constexpr (wants_dots) {
          for (int q = 0; q < 4; ++q) dots[q][k] = sums[q];
        }
      }
      if constexpr (wants_dots) {
        for (int q = 0; q < 4; ++q) {
          store_register(dots_ + q * kBackwardTile + first, sums_of<A>(dots[q]));
        }
      }
    }
  }

  template <bool wants_input, bool wants_column, bool wants_dots>
  void scatter_with(int64_t begin, int64_t end) const {
    if (tensors_.input_layout.channels_last()) {
      const RowWindow<const T> rows = whole_image(shape_, tensors_.input);
      if constexpr (std::is_same_v<T, A>) {
        // The gradient has the layout of the input, and is added to in place.
        RowWindow<A> grad_rows = {};
        if (wants_input) {
          grad_rows = {call_.grad_planes(), rows.pixel_stride, rows.row_stride,
                       rows.capacity,       rows.begin,        rows.end,
                       rows.left,           rows.right,        rows.origin};
        }
        return scatter_rows<wants_input, wants_column, wants_dots>(rows, grad_rows,
                                                                   call_.block.begin, begin, end);
      }
      return scatter_rows<wants_input, wants_column, wants_dots>(rows, windows_.grad_input,
                                                                 call_.block.begin, begin, end);
    }
    scatter_rows<wants_input, wants_column, wants_dots>(windows_.input, windows_.grad_input, 0,
                                                        begin, end);
  }

  const TileAtWork<T>& work_;
  const BlockCall<T>& call_;
  const DeformConv2dShape& shape_;
  const BackwardTensors<T>& tensors_;
  BlockWindows<T>& windows_;
  const int64_t plane_;  // elements of a channel
  A* const dots_;
  A* const columns_;        // pixels × channels of the block
  Addresses* const read_;   // of the corners
  Addresses* const added_;  // of the corners' gradients
  Weights* const weights_;
  A* const zeros_;        // stands in for the channels of corners that do not exist
  A* const sinks_;        // 4 × channels: stands in for their gradients, never read
  A* const strays_;       // 4 × channels: corners outside the window
  A* const grad_strays_;  // 4 × channels: their gradients
};

}  // namespace
}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
