// What the passes of deformable convolution share on CUDA: output pixels, their sampling points,
// and the staging of sampled columns and output gradients in shared memory.
//
// A "column" is one summand of an output element: column tap * group_channels + channel of a group
// holds the input sampled for that tap in that channel. The matrix of all columns (what im2col
// would write to memory) only ever exists as tiles in shared memory.
#pragma once

#include "../../integers.h"
#include "../../sampling.h"
#include "../context.h"
#include "../tile.h"
#include "kernels.h"

namespace mmdcn::cuda {

// An output position; `batch` is negative in a tile's part beyond the last one.
struct Pixel {
  int64_t batch, y, x;

  MMDCN_BLOCK bool exists() const { return batch >= 0; }
  MMDCN_BLOCK int64_t position(const DeformConv2dProblem& problem) const {
    return y * problem.shape.out_width + x;
  }
};

// Finds one output position, numbered over the whole batch.
MMDCN_BLOCK Pixel find_pixel(const DeformConv2dProblem& problem, int64_t number) {
  const int64_t row = divide(number, problem.shape.out_width);
  const int64_t batch = divide(row, problem.shape.out_height);
  return {batch, row - batch * problem.shape.out_height, number - row * problem.shape.out_width};
}

// Finds output positions [first, end).
template <typename Ctx, int kPixels>
MMDCN_BLOCK void find_pixels(const Ctx& ctx, const DeformConv2dProblem& problem, int64_t first,
                             int64_t end, Pixel (&pixels)[kPixels]) {
  for (int i = ctx.thread(); i < kPixels; i += Ctx::kThreads) {
    pixels[i] = first + i < end ? find_pixel(problem, first + i) : Pixel{-1, 0, 0};
  }
}

// Number of a sampling point's channel in the mask: points are stored by image, offset group, tap.
MMDCN_BLOCK int64_t point_channel(const DeformConv2dProblem& problem, const Pixel& pixel,
                                  int64_t group, int64_t tap) {
  return (pixel.batch * problem.shape.deform_groups + group) * problem.taps + tap;
}

// Where the mask and its gradient have a sampling point.
MMDCN_BLOCK int64_t mask_index(const DeformConv2dProblem& problem, const Pixel& pixel,
                               int64_t group, int64_t tap) {
  return point_channel(problem, pixel, group, tap) * problem.pixels + pixel.position(problem);
}

// Where the offset and its gradient have y of a sampling point; x is problem.pixels further.
MMDCN_BLOCK int64_t offset_index(const DeformConv2dProblem& problem, const Pixel& pixel,
                                 int64_t group, int64_t tap) {
  return 2 * point_channel(problem, pixel, group, tap) * problem.pixels + pixel.position(problem);
}

// Where one output pixel samples the input for one tap and one offset group. Kept while a thread
// walks the channels, and moved when tap or offset group change.
template <typename acc_t, typename index_t = int64_t>
struct SamplingPoint {
  int64_t tap;                         // -1: nowhere yet
  int64_t first_channel, end_channel;  // of the offset group
  bool inside;                         // otherwise `corners` is not filled
  acc_t modulation;
  Corners<acc_t, 2, index_t> corners;  // after move_to(), positions in elements of the input

  MMDCN_BLOCK void reset() { tap = -1; }

  MMDCN_BLOCK void move_to(const DeformConv2dProblem& problem, const acc_t* offset,
                           const acc_t* mask, const Pixel& pixel, int64_t new_tap,
                           int64_t channel) {
    if (tap == new_tap && first_channel <= channel && channel < end_channel) return;
    const int64_t group = divide(channel, problem.deform_group_channels);
    tap = new_tap;
    first_channel = group * problem.deform_group_channels;
    end_channel = first_channel + problem.deform_group_channels;
    const int64_t tap_y = divide(tap, problem.shape.kernel_width);
    locate(problem, offset, mask, pixel, group, tap, tap_y,
           tap - tap_y * problem.shape.kernel_width);
    if (inside) {
      MMDCN_UNROLL
      for (int q = 0; q < corners.kCount; ++q) corners.position[q] *= problem.input.position;
    }
  }

  // Finds the point of a tap, also given as its row and column in the kernel, and an offset group;
  // its corners' positions are those of pixels.
  MMDCN_BLOCK void locate(const DeformConv2dProblem& problem, const acc_t* offset,
                          const acc_t* mask, const Pixel& pixel, int64_t group, int64_t at_tap,
                          int64_t tap_y, int64_t tap_x) {
    const DeformConv2dShape& shape = problem.shape;
    const int64_t at = offset_index(problem, pixel, group, at_tap);
    const acc_t p[2] = {
        static_cast<acc_t>(shape.y.base(pixel.y, tap_y)) + offset[at],
        static_cast<acc_t>(shape.x.base(pixel.x, tap_x)) + offset[at + problem.pixels]};
    modulation = mask ? mask[mask_index(problem, pixel, group, at_tap)] : acc_t(1);
    const index_t size[2] = {static_cast<index_t>(shape.height), static_cast<index_t>(shape.width)};
    inside = corners.locate(p, size);
  }

  // X(p) in the channel that starts at `channel`, not modulated.
  template <typename scalar_t>
  MMDCN_BLOCK acc_t sample(const scalar_t* channel) const {
    acc_t sum = 0;
    if (inside) {
      MMDCN_UNROLL
      for (int q = 0; q < corners.kCount; ++q) {
        const int64_t position = corners.position[q];
        if (position >= 0) sum += corners.weight[q] * static_cast<acc_t>(channel[position]);
      }
    }
    return sum;
  }
};

// Work items of a block that sample, shared out evenly over its threads: one each on the GPU.
constexpr int kItems = 256;

// Division of kPixels pixels times some columns or channels into work items: each keeps to one
// pixel and walks one part of the rest. Consecutive items lie side by side in memory: neighbouring
// pixels, or neighbouring channels where channels are last.
template <typename Ctx, int kPixels>
struct PixelItems {
  static constexpr int kParts = kItems / kPixels;
  static constexpr int kPerThread = kItems / Ctx::kThreads;
  static_assert(kParts * kPixels == kItems && kPerThread * Ctx::kThreads == kItems, "uneven");

  int pixel, part;

  // The i-th item of this thread, i < kPerThread.
  MMDCN_BLOCK static PixelItems item(const Ctx& ctx, int i, const Layout& layout) {
    const int item = ctx.thread() + i * Ctx::kThreads;
    if (layout.channel == 1) return {item / kParts, item % kParts};
    return {item % kPixels, item / kPixels};
  }
};

// Samples tiles of kColumns columns by kPixels pixels, for a walk over columns, pixels, or both.
template <typename Ctx, typename scalar_t, typename acc_t, int kColumns, int kPixels>
class ColumnGather {
  using Items = PixelItems<Ctx, kPixels>;
  static constexpr int kSteps = kColumns / Items::kParts;
  static_assert(kSteps * Items::kParts == kColumns, "uneven");

  SamplingPoint<acc_t> points_[Items::kPerThread];

 public:
  // Must be called first, and whenever the pixels have changed.
  MMDCN_BLOCK void new_pixels() {
    for (SamplingPoint<acc_t>& point : points_) point.reset();
  }

  // Columns from first_column on, of group `group`, modulated; zeros beyond the last column and for
  // pixels that do not exist. Column i of pixel j goes to tile[i * kColumnStride +
  // j * kPixelStride].
  template <int kColumnStride, int kPixelStride>
  MMDCN_BLOCK void gather(const Ctx& ctx, const DeformConv2dProblem& problem, const scalar_t* input,
                          const acc_t* offset, const acc_t* mask, const Pixel (&pixels)[kPixels],
                          int64_t group, int64_t first_column, acc_t* tile) {
    const int64_t channels = problem.group_channels;
    MMDCN_UNROLL
    for (int i = 0; i < Items::kPerThread; ++i) {
      const Items item = Items::item(ctx, i, problem.input);
      const Pixel& pixel = pixels[item.pixel];
      // Neighbouring columns of one item share their sampling point most often; with channels last
      // they are left to the neighbouring threads, for the sake of coalesced loads.
      const bool interleave = problem.input.channel == 1;
      const int step = interleave ? Items::kParts : 1;
      int local = interleave ? item.part : item.part * kSteps;
      int64_t tap = divide(first_column + local, channels);
      int64_t channel = first_column + local - tap * channels;
      for (int s = 0; s < kSteps; ++s) {
        acc_t column = 0;
        if (pixel.exists() && tap < problem.taps) {
          const int64_t in_channel = group * channels + channel;
          points_[i].move_to(problem, offset, mask, pixel, tap, in_channel);
          column = points_[i].modulation *
                   points_[i].sample(input + problem.input.index(pixel.batch, in_channel, 0));
        }
        tile[local * kColumnStride + item.pixel * kPixelStride] = column;
        local += step;
        for (channel += step; channel >= channels; channel -= channels) ++tap;
      }
    }
  }
};

// Loads channels [first_channel, end_channel) of an output gradient, at most kChannels, for kPixels
// pixels; zeros where either does not exist. Channel i of pixel j goes to
// tile[i * kChannelStride + j * kPixelStride].
template <int kChannels, int kChannelStride, int kPixelStride, typename Ctx, typename scalar_t,
          typename acc_t, int kPixels>
MMDCN_BLOCK void load_grad_output(const Ctx& ctx, const DeformConv2dProblem& problem,
                                  const scalar_t* grad_output, const Pixel (&pixels)[kPixels],
                                  int64_t first_channel, int64_t end_channel, acc_t* tile) {
  const bool channels_last = problem.output.channel == 1;
  for (int i = ctx.thread(); i < kChannels * kPixels; i += Ctx::kThreads) {
    const int channel = channels_last ? i % kChannels : i / kPixels;
    const int j = channels_last ? i / kChannels : i % kPixels;
    const Pixel& pixel = pixels[j];
    acc_t value = 0;
    if (pixel.exists() && first_channel + channel < end_channel) {
      value = static_cast<acc_t>(grad_output[problem.output.index(
          pixel.batch, first_channel + channel, pixel.position(problem))]);
    }
    tile[channel * kChannelStride + j * kPixelStride] = value;
  }
}

}  // namespace mmdcn::cuda
