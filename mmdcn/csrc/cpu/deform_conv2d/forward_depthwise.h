// The forward pass of depthwise convolutions: the samples of a pixel are read from rows of
// channels, multiplied by the weights of their channels, and summed over the taps in registers.
#pragma once

#include <algorithm>
#include <cstddef>

#include "../arena.h"
#include "../row_sums.h"
#include "corners.h"
#include "depthwise_weights.h"
#include "forward_shares.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

inline int64_t one_block(const DeformConv2dShape&, int64_t /* threads */) { return 1; }
inline int64_t one_slice(const DeformConv2dShape&) { return 1; }

template <typename T, typename A = accumulator_t<T>>
int64_t depthwise_bytes(const DeformConv2dShape& shape) {
  return shape.taps() * shape.channels * static_cast<int64_t>(sizeof(A));
}

template <typename T, typename A = accumulator_t<T>>
void pack_depthwise_weight(const DeformConv2dShape& shape, const T* weight,
                           const WeightLayout& layout, int64_t begin, int64_t end,
                           std::byte* packed) {
  if (begin == end) return;
  pack_depthwise(weight, layout, shape.taps(), shape.channels, reinterpret_cast<A*>(packed));
}

// The pass of one thread. Samples are read from rows of channels, either of the image itself, where
// S = T, or of a window on it, where S = A.
template <typename T, typename S, typename A = accumulator_t<T>>
class DepthwisePass {
 public:
  DepthwisePass(const DeformConv2dShape& shape, const ForwardTensors<T>& tensors, Arena& arena)
      : shape_(shape),
        tensors_(tensors),
        plan_(plan_forward<A>(shape)),
        per_image_(tiles_of_image(shape, plan_, kForwardTile)),
        direct_(tensors.input_layout.channels_last()),
        in_rows_(tensors.output_layout.channels_last()),
        row_(row_stride<A>(shape.channels)),
        tile_(arena.take<ForwardTile>(1)),
        corners_(arena.take<TapCorners>(shape.taps() * shape.deform_groups)),
        zeros_(arena.take<S>(shape.deform_group_channels())),
        strays_(arena.take<A>(direct_ ? 0 : 4 * shape.taps() * shape.deform_group_channels())),
        sums_(arena.take<A>(in_rows_ ? 0 : kForwardTile * row_)),
        sampling_memory_(arena.take<A>(
            staged_size<kForwardTile>(shape, tensors.offset, tensors.mask, shape.deform_groups))),
        window_memory_(arena.take<A>(
            direct_ ? 0 : window_size<A>(shape.channels, plan_.rows, plan_.columns))) {}

  // `begin` and `end` count shares of tiles.
  void run(int64_t begin, int64_t end) {
    fill_zero(zeros_, shape_.deform_group_channels());
    const int64_t first = begin / kShares;
    for (int64_t number = first; number * kShares < end; ++number) {
      const Image<T> image(shape_, tensors_, number / per_image_);
      set_tile(shape_, plan_, number % per_image_, *tile_);
      if (!direct_) {
        if (number == first || number % per_image_ == 0) {
          window_ = empty_window(window_memory_, shape_.channels, plan_.rows, plan_.columns);
        }
        roll_input(shape_, forward_range(shape_, plan_, *tile_), image.input, shape_.channels,
                   window_);
      }
      crop(*tile_, (begin - number * kShares) * kSharePixels,
           (end - number * kShares) * kSharePixels);
      run_tile(image);
    }
  }

 private:
  // The samples of one tap and offset group.
  struct TapCorners : WeightedCorners<A, kForwardTile> {
    ForwardSamples<A> samples;
  };

  void run_tile(const Image<T>& image) {
    const SamplingRows<A> sampling = sampling_rows(shape_, *tile_, image.offset, image.mask, 0,
                                                   shape_.deform_groups, sampling_memory_);
    missing_ = false;
    for (int64_t tap = 0; tap < shape_.taps(); ++tap) {
      for (int64_t d = 0; d < shape_.deform_groups; ++d) find_corners(image, sampling, tap, d);
    }
    for (int64_t r = 0; r < tile_->runs; ++r) {
      const auto& run = tile_->run[r];
      for (int64_t i = run.first; i < run.first + run.count; ++i) {
        if (in_rows_) {
          const int64_t pixel = run.pixel + i - run.first;
          sum_pixel(image, i, image.output + pixel * tensors_.output_layout.pixel_stride);
        } else {
          sum_pixel(image, i, sums_ + i * row_);
        }
      }
      if (in_rows_) continue;
      transpose<A>(sums_ + run.first * row_, row_, run.count, shape_.channels,
                   image.output + run.pixel, tensors_.output_layout.channel_stride);
    }
  }

  void find_corners(const Image<T>& image, const SamplingRows<A>& sampling, int64_t tap,
                    int64_t d) {
    TapCorners& corners = corners_[tap * shape_.deform_groups + d];
    const int64_t channel = d * shape_.deform_group_channels(), count = tile_->count;
    locate_samples(shape_, *tile_, sampling, d, tap, corners.samples);
    set_weights(corners.samples, count, corners.weight);
    if constexpr (std::is_same_v<S, A>) {
      if (!direct_) {
        missing_ |= set_corners<A>(shape_.height, shape_.width, window_, channel, corners.samples,
                                   count, zeros_, 0, corners.at);
        return;
      }
    }
    if constexpr (std::is_same_v<S, T>) {
      const auto rows = whole_image(image.input, shape_.height, shape_.width, shape_.channels);
      set_corners<const T>(shape_.height, shape_.width, rows, channel, corners.samples, count,
                           zeros_, 0, corners.at);
    }
  }

  // Sums the samples of pixel number i of the tile.
  template <typename L>
  void sum_pixel(const Image<T>& image, int64_t i, L* target) const {
    const int64_t channels = shape_.deform_group_channels();
    constexpr int64_t address = sizeof(uintptr_t), element = sizeof(A);
    const int64_t stride = shape_.deform_groups * static_cast<int64_t>(sizeof(TapCorners));
    for (int64_t d = 0; d < shape_.deform_groups; ++d) {
      if (missing_) replace_missing(image, i, d);
      const PixelSamples<A> samples = {&corners_[d].at.corner[0][i],
                                       &corners_[d].weight[0][i],
                                       kForwardTile,
                                       stride / address,
                                       stride / element,
                                       shape_.taps()};
      const TapWeights<A> weights = {reinterpret_cast<const A*>(tensors_.weight) + d * channels,
                                     shape_.channels};
      sum_samples<S, A>(samples, weights, channels,
                        tensors_.bias ? tensors_.bias + d * channels : nullptr,
                        target + d * channels);
    }
  }

  // Reads the corners of a pixel that are not in the window from the planes.
  __attribute__((noinline)) void replace_missing(const Image<T>& image, int64_t i,
                                                 int64_t d) const {
    const int64_t channels = shape_.deform_group_channels(), plane = shape_.height * shape_.width;
    for (int64_t tap = 0; tap < shape_.taps(); ++tap) {
      TapCorners& corners = corners_[tap * shape_.deform_groups + d];
      if (!corners.at.missing[i]) continue;
      read_strays(shape_, corners.samples, i, window_, image.input + d * channels * plane, channels,
                  strays_ + 4 * tap * channels, corners.at);
    }
  }

  const DeformConv2dShape& shape_;
  const ForwardTensors<T>& tensors_;
  const WindowPlan plan_;
  const int64_t per_image_;  // tiles of an image
  const bool direct_;        // whether samples are read from the image itself
  const bool in_rows_;       // whether the output is channels-last
  const int64_t row_;        // elements of a row of sums
  ForwardTile* const tile_;
  TapCorners* const corners_;  // of each tap and offset group
  S* const zeros_;             // stands in for the channels of corners that do not exist
  A* const strays_;            // channels of the corners of one pixel that are not in the window
  A* const sums_;              // of the tile, pixels × channels, for outputs in planes
  A* const sampling_memory_;
  A* const window_memory_;
  RowWindow<A> window_ = {};
  bool missing_ = false;  // whether any corner of the tile is not in the window
};

// Calls `function` with a value of the type S of DepthwisePass for this layout.
template <typename T, typename F>
inline void with_row_type(ImageLayout layout, const F& function) {
  layout.channels_last() ? function(T{}) : function(accumulator_t<T>{});
}

template <typename T>
int64_t depthwise_scratch_bytes(const DeformConv2dShape& shape, const ForwardTensors<T>& tensors) {
  Arena arena(nullptr);
  with_row_type<T>(tensors.input_layout,
                   [&](auto s) { DepthwisePass<T, decltype(s)>(shape, tensors, arena); });
  return arena.used();
}

template <typename T>
void run_depthwise(const DeformConv2dShape& shape, const ForwardTensors<T>& tensors, int64_t begin,
                   int64_t end, std::byte* memory) {
  Arena arena(memory);
  with_row_type<T>(tensors.input_layout, [&](auto s) {
    DepthwisePass<T, decltype(s)>(shape, tensors, arena).run(begin, end);
  });
}

}  // namespace
}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
