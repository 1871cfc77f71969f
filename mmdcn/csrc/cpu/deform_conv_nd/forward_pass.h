// The forward pass of deform_conv_nd: that of consecutive output pixels.
//
// Tile by tile, and some taps at a time, samples are blended into columns, which have a row for
// each pixel, and the columns are multiplied by the weights.
#pragma once

#include "packed_weights.h"
#include "volume_blending.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

// The size that the columns of a step have at most, unless those of one register block of pixels
// and one tap take more.
constexpr int64_t kColumnBytes = 256 << 10;

// Calls function(image, first, count) for the positions of each image within [begin, end), at most
// `chunk` of a line at a time.
template <typename F>
inline void for_positions(const VolumeRows& rows, int64_t begin, int64_t end, int64_t chunk,
                          const F& function) {
  for (int64_t at = begin; at < end;) {
    const int64_t image = at / rows.positions, first = at - image * rows.positions;
    const int64_t left = rows.width - first % rows.width;
    const int64_t count = smaller(smaller(chunk, left), end - at);
    function(image, first, count);
    at += count;
  }
}

// The output pixels of a tile, and the taps of a step.
template <typename A>
struct ForwardSizes {
  int64_t pixels, taps;
  // Elements of a row of products. Those of each group are padded to whole registers, and those of
  // the next group are written over the padding.
  int64_t product_row;

  explicit ForwardSizes(const DeformConvNdShape<3>& shape)
      : product_row(shape.out_channels + kLanes<A>) {
    const int64_t tap_bytes = shape.channels * static_cast<int64_t>(sizeof(A));
    // A step that adds to the products of the one before would add to what is written over padding.
    const bool divides = shape.groups == 1 || shape.group_out_channels() % kLanes<A> == 0;
    taps = divides ? std::clamp<int64_t>(kColumnBytes / (tap_bytes * kMostPixels), 1, shape.taps())
                   : shape.taps();
    const int64_t steps = (shape.taps() + taps - 1) / taps;
    taps = (shape.taps() + steps - 1) / steps;
    const int64_t blocks = smaller(kColumnBytes / (tap_bytes * taps), kMostPixels) / kBlockRows;
    pixels = std::max<int64_t>(blocks, 1) * kBlockRows;
  }
};

template <typename A>
class ForwardPass {
 public:
  ForwardPass(const DeformConvNdShape<3>& shape, const ConvNdForward<A>& tensors, Arena& arena)
      : shape_(shape),
        tensors_(tensors),
        sizes_(shape),
        rows_(shape),
        samples_(shape, arena),
        first_(arena.take<uintptr_t>(kMostPixels)),
        weight_(arena.take<A>(8 * kMostPixels)),
        columns_(arena.take<A>(sizes_.pixels * sizes_.taps * shape.channels)),
        product_(arena.take<A>(sizes_.pixels * sizes_.product_row)) {}

  // Output pixels [begin, end), numbered over the whole batch.
  void run(int64_t begin, int64_t end) {
    for (int64_t pixel = begin; pixel < end; pixel += sizes_.pixels) {
      const int64_t count = smaller(sizes_.pixels, end - pixel);
      for (int64_t tap = 0; tap < shape_.taps(); tap += sizes_.taps) {
        const Step step = {pixel, count, tap, smaller(sizes_.taps, shape_.taps() - tap)};
        sample(step);
        if (tap == 0) {
          multiply_step<Into::kSet>(step);
        } else {
          multiply_step<Into::kAdd>(step);
        }
      }
      store(pixel, count);
    }
  }

 private:
  // Output pixels and taps.
  struct Step {
    int64_t pixel, count;
    int64_t tap, taps;
  };

  // Blends the samples of a step into columns.
  void sample(const Step& step) {
    const VolumeRows outputs(shape_.out_channels, shape_.pixels());
    const int64_t row = step.taps * shape_.channels;
    A* columns = columns_;
    for_positions(outputs, step.pixel, step.pixel + step.count, kMostPixels,
                  [&](int64_t image, int64_t pixel, int64_t count) {
                    samples_.start(pixel, count);
                    for (int64_t tap = 0; tap < step.taps; ++tap) {
                      sample_tap(image, pixel, step.tap + tap, columns + tap * shape_.channels,
                                 row);
                    }
                    columns += count * row;
                  });
  }

  void sample_tap(int64_t image, int64_t pixel, int64_t tap, A* columns, int64_t row) {
    const A* input = tensors_.input + image * rows_.image;
    const int64_t channels = shape_.deform_group_channels();
    for (int64_t group = 0; group < shape_.deform_groups; ++group) {
      const SampleElements at(shape_, image, pixel, group, tap);
      samples_.locate(tap, tensors_.offset + at.offset, element(tensors_.mask, at.mask));
      samples_.set_first_corners(rows_, input + group * channels, first_);
      samples_.set_weights([&](int q) { return weight_ + q * kMostPixels; });
      const VolumeBlends<A> blends = {first_, weight_, {rows_.pixel, rows_.line, rows_.plane}};
      blend(blends, samples_.pixels(), channels, columns + group * channels, row);
    }
  }

  template <Into into>
  void multiply_step(const Step& step) const {
    const int64_t channels = shape_.group_channels(), outs = shape_.group_out_channels();
    const int64_t weights = tap_packed_size<3, A>(shape_);
    const Depth depth = {channels, step.taps, shape_.channels, weights};
    NoWork none;
    for (int64_t group = 0; group < shape_.groups; ++group) {
      const A* weight = tensors_.weight + (group * shape_.taps() + step.tap) * weights;
      multiply<Order::kRows, into>(step.count, outs, depth, columns_ + group * channels,
                                   step.taps * shape_.channels, packed(weight, channels),
                                   product_ + group * outs, sizes_.product_row, none);
    }
  }

  // Stores the products of a tile, with the bias.
  void store(int64_t pixel, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      A* output = tensors_.output + (pixel + i) * shape_.out_channels;
      const A* product = product_ + i * sizes_.product_row;
      for (int64_t o = 0; o < shape_.out_channels; ++o) {
        output[o] = product[o] + (tensors_.bias ? tensors_.bias[o] : A(0));
      }
    }
  }

  const DeformConvNdShape<3>& shape_;
  const ConvNdForward<A>& tensors_;
  const ForwardSizes<A> sizes_;
  const VolumeRows rows_;
  VolumeSamples<A> samples_;
  uintptr_t* const first_;  // the samples' first corners, of one tap and offset group
  A* const weight_;         // 8 × kMostPixels: of all corners
  A* const columns_;        // of a step, pixels × taps × channels
  A* const product_;        // pixels × product_row
};

}  // namespace
}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
