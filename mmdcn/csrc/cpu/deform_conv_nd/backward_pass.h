// The backward pass of deform_conv_nd: that of some images, for a range of channels.
#pragma once

#include "../rows.h"
#include "packed_weights.h"
#include "volume_samples.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

// The most output pixels that are gone through tap by tap: their gradients stay in the second-level
// cache, and a tap's weights and sums are read once for all of them.
constexpr int64_t kBlockPixels = 8 * kMostPixels;

template <typename A>
class BackwardPass {
 public:
  BackwardPass(const DeformConvNdShape<3>& shape, const ConvNdBackward<A>& tensors,
               const ChannelRange& range, Arena& arena)
      : shape_(shape),
        tensors_(tensors),
        range_(range),
        rows_(shape),
        width_(range.end - range.begin),
        row_(width_ + kLanes<A>),
        sum_row_(padded<A>(shape.group_out_channels())),
        samples_(shape, arena),
        read_(arena.take<WeightedCorners<A, kMostSamples>>(1)),
        added_(arena.take<CornerAddresses<kMostSamples>>(1)),
        dots_(arena.take<SampleDots<A, kMostSamples>>(1)),
        gradients_(arena.take<A>(kMostPixels * row_)),
        columns_(arena.take<A>(kMostPixels * row_)),
        sums_(arena.take<A>(tensors.grad_weight ? shape.taps() * width_ * sum_row_ : 0)),
        row_of_(arena.take<int64_t>(kMostSamples)) {}

  void run(int64_t begin, int64_t end) {
    if (wants_weight()) fill_zero(sums_, shape_.taps() * width_ * sum_row_);
    for (int64_t image = begin; image < end; ++image) run_image(image);
    if (wants_weight()) store_weight();
  }

 private:
  // Consecutive output pixels of one image.
  struct Tile {
    int64_t image, pixel, count;
  };

  bool wants_sampling() const { return tensors_.grad_offset || tensors_.grad_mask; }
  bool wants_weight() const { return tensors_.grad_weight != nullptr; }
  bool wants_data() const { return tensors_.grad_input || wants_sampling(); }

  void run_image(int64_t image) {
    const int64_t pixels = shape_.pixels();
    for (int64_t block = 0; block < pixels; block += kBlockPixels) {
      const int64_t end = smaller(block + kBlockPixels, pixels);
      const A* weight = tensors_.weight;
      for (int64_t tap = 0; tap < shape_.taps(); ++tap) {
        const A* next = weight;
        for (int64_t pixel = block; pixel < end; pixel += kMostPixels) {
          const Tile tile = {image, pixel, smaller(kMostPixels, end - pixel)};
          next = run_tile(tile, tap, weight);
        }
        weight = next;
      }
    }
  }

  // The samples of one tap. Returns where the weights of the next tap are.
  const A* run_tile(const Tile& tile, int64_t tap, const A* weight) {
    if (tile.count != samples_.pixels()) {
      for (int64_t i = 0; i < 2 * tile.count; ++i) row_of_[i] = i % tile.count * row_;
    }
    samples_.start(tile.pixel, tile.count);
    if (wants_data()) weight = multiply_tap(tile, weight);
    for_groups(range_, shape_.deform_group_channels(),
               [&](int64_t group, int64_t begin, int64_t end) {
                 run_samples(tile, tap, group, begin, end);
               });
    if (wants_weight()) add_weight(tile, tap);
    return weight;
  }

  const A* grad_output_of(const Tile& tile) const {
    return tensors_.grad_output + (tile.image * shape_.pixels() + tile.pixel) * shape_.out_channels;
  }

  // The gradients of a tap's columns.
  const A* multiply_tap(const Tile& tile, const A* weight) const {
    const int64_t outs = shape_.group_out_channels();
    const A* grad_output = grad_output_of(tile);
    for_groups(range_, shape_.group_channels(), [&](int64_t group, int64_t begin, int64_t end) {
      multiply<Order::kRows, Into::kSet>(tile.count, end - begin, outs, grad_output + group * outs,
                                         shape_.out_channels, packed(weight, outs),
                                         gradients_ + begin - range_.begin, row_);
      weight += mmdcn::packed_size<A>(outs, end - begin);
    });
    return weight;
  }

  // Adds a tap's columns times the gradients of the output to the gradients of its weights.
  void add_weight(const Tile& tile, int64_t tap) const {
    const int64_t outs = shape_.group_out_channels();
    const A* grad_output = grad_output_of(tile);
    for_groups(range_, shape_.group_channels(), [&](int64_t group, int64_t begin, int64_t end) {
      const int64_t column = begin - range_.begin;
      multiply<Order::kColumns, Into::kAdd>(
          end - begin, outs, tile.count, columns_ + column, row_,
          row_major(grad_output + group * outs, shape_.out_channels),
          sums_ + (tap * width_ + column) * sum_row_, sum_row_);
    });
  }

  // Samples channels [begin, end), which are of one offset group, into the columns, adds their
  // gradients to those of the input, and stores those of the offsets and the modulations.
  void run_samples(const Tile& tile, int64_t tap, int64_t group, int64_t begin, int64_t end) {
    const SampleElements at(shape_, tile.image, tile.pixel, group, tap);
    const int64_t start = tile.image * rows_.image + begin;
    samples_.locate(tap, tensors_.offset + at.offset, element(tensors_.mask, at.mask));
    samples_.set_corners(rows_, tensors_.input + start, read_->at);
    samples_.set_weights(read_->weight);
    if (tensors_.grad_input) {
      samples_.set_corners(rows_, tensors_.grad_input + start, *added_);
    }
    const bool input = tensors_.grad_input != nullptr, sampling = wants_sampling();
    if (input && sampling) scatter_planes<true, true>(begin, end);
    if (input && !sampling) scatter_planes<true, false>(begin, end);
    if (!input && sampling) scatter_planes<false, true>(begin, end);
    if (!input && !sampling) scatter_planes<false, false>(begin, end);
    if (!sampling) return;
    samples_.store_gradients(*dots_, element(tensors_.grad_offset, at.offset),
                             element(tensors_.grad_mask, at.mask));
  }

  template <bool wants_input, bool wants_dots>
  void scatter_planes(int64_t begin, int64_t end) const {
    RowSamples<A, A> rows = {};
    rows.corner = read_->at.corner[0];
    rows.grad_corner = added_->corner[0];
    rows.weight = read_->weight[0];
    rows.quantity = kMostSamples;
    rows.gradient = gradients_ + begin - range_.begin;
    rows.row = row_of_;
    rows.column = columns_ + begin - range_.begin;
    rows.dots = dots_->of[0];
    const int64_t pixels = samples_.pixels(), channels = end - begin;
    if (wants_weight()) {
      scatter<wants_input, Column::kStored, wants_dots>(rows, 0, pixels, channels);
      scatter<wants_input, Column::kAdded, wants_dots>(rows, pixels, 2 * pixels, channels);
    } else {
      scatter<wants_input, Column::kNone, wants_dots>(rows, 0, 2 * pixels, channels);
    }
  }

  void store_weight() const {
    const int64_t channels = shape_.group_channels(), outs = shape_.group_out_channels();
    const int64_t taps = shape_.taps();
    for (int64_t c = range_.begin; c < range_.end; ++c) {
      const int64_t group = c / channels, channel = c - group * channels;
      for (int64_t o = 0; o < outs; ++o) {
        A* target = tensors_.grad_weight + ((group * outs + o) * channels + channel) * taps;
        const A* sums = sums_ + (c - range_.begin) * sum_row_ + o;
        for (int64_t tap = 0; tap < taps; ++tap) target[tap] = sums[tap * width_ * sum_row_];
      }
    }
  }

  const DeformConvNdShape<3>& shape_;
  const ConvNdBackward<A>& tensors_;
  const ChannelRange& range_;
  const VolumeRows rows_;  // of the input and its gradient
  const int64_t width_;    // channels of the range
  const int64_t row_;      // elements from row to row of columns, which are padded by a register
  const int64_t sum_row_;  // elements from row to row of sums_
  VolumeSamples<A> samples_;
  WeightedCorners<A, kMostSamples>* const read_;
  CornerAddresses<kMostSamples>* const added_;  // of the corners' gradients
  SampleDots<A, kMostSamples>* const dots_;
  A* const gradients_;     // of columns, pixels × row_
  A* const columns_;       // pixels × row_
  A* const sums_;          // the gradients of weights, taps × channels × sum_row_
  int64_t* const row_of_;  // of each sample of a plane, the first element in its row of columns
};

}  // namespace
}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
