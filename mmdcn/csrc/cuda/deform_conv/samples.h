// The samples that a block of threads works on, located once for all channels that share them.
//
// A sample is one tap of one output pixel for one offset group. A block locates kPixels
// neighbouring pixels times a few samples of each, with one thread for each, so that offsets, which
// are contiguous over pixels, are read in whole lines. Then groups of lanes work on the channels of
// one sample each, with neighbouring lanes on neighbouring vectors of channels.
#pragma once

#include "../sample.h"
#include "problem.h"

namespace mmdcn::cuda {

constexpr int kLog2Pixels = 5;
constexpr int kPixels = 1 << kLog2Pixels;

// Samples are numbered (block of kPixels pixels, sample of a pixel, pixel): their number.
template <int R>
MMDCN_HOST_DEVICE int64_t samples_of(const ConvProblem<R>& problem, const PixelRange& range) {
  return divide_up(range.count, kPixels) * problem.samples * kPixels;
}

// Which sample one is.
template <int R>
struct SampleIndex {
  int64_t image, pixel;  // of the image
  int64_t sample;        // of the pixel
  int64_t column;        // of the pixel's first one, counted from the range's first pixel
  bool exists;           // false beyond the range's last pixel

  MMDCN_BLOCK SampleIndex(const ConvProblem<R>& problem, const PixelRange& range, int64_t number) {
    const int64_t line = number >> kLog2Pixels;
    const int64_t tile = problem.by_samples.divide_small(line);
    sample = line - tile * problem.samples;
    const int64_t in_range = tile * kPixels + (number & (kPixels - 1));
    exists = in_range < range.count;
    const int64_t in_batch = exists ? range.first + in_range : range.first;
    image = problem.by_pixels.divide(in_batch);
    pixel = in_batch - image * problem.pixels;
    column = in_range * problem.row;
  }

  // Of the mask, (images, samples, pixels), and of the first coordinate's offset.
  MMDCN_BLOCK int64_t mask_index(const ConvProblem<R>& problem) const {
    return image * problem.mask_image + sample * problem.pixels + pixel;
  }
  MMDCN_BLOCK int64_t offset_index(const ConvProblem<R>& problem) const {
    return image * problem.offset_image + sample * R * problem.pixels + pixel;
  }

  // The same of their gradients, whose images follow each other.
  MMDCN_BLOCK int64_t grad_mask_index(const ConvProblem<R>& problem) const {
    return (image * problem.samples + sample) * problem.pixels + pixel;
  }
  MMDCN_BLOCK int64_t grad_offset_index(const ConvProblem<R>& problem) const {
    return (image * problem.samples + sample) * R * problem.pixels + pixel;
  }
};

// A sample, located, and where its columns are.
template <typename acc_t, int R>
struct ColumnSample : Sample<acc_t, R> {
  int64_t column;   // elements of the columns before its first channel, if groups == 1
  int64_t channel;  // first of the offset group
  bool exists;      // false beyond the range's last pixel

  // Elements of the columns before the channel number `c` of the offset group.
  MMDCN_BLOCK int64_t column_of(const ConvProblem<R>& problem, int64_t c) const {
    if (problem.shape.groups == 1) return column + c;
    const int64_t group = divide(channel + c, problem.group_channels);
    return column + c + group * (problem.columns - problem.group_channels);
  }
};

// Locates a sample. `fraction` is what is left of its coordinates between pixels.
template <int R, typename acc_t>
MMDCN_BLOCK void locate(const ConvProblem<R>& problem, const SampleIndex<R>& index,
                        const acc_t* offset, const acc_t* mask, ColumnSample<acc_t, R>& sample,
                        acc_t (&fraction)[R]) {
  const int64_t deform_group = problem.by_taps.divide_small(index.sample);
  const int64_t tap = index.sample - deform_group * problem.taps;
  sample.exists = index.exists;
  sample.channel = deform_group * problem.deform_group_channels;
  sample.column = index.column + tap * problem.group_channels + sample.channel;
  sample.reach_nothing();
  if (!index.exists) return;

  const acc_t* delta = offset + index.offset_index(problem);
  acc_t p[R];
  int64_t pixel = index.pixel, rest = tap;
  MMDCN_UNROLL
  for (int d = R - 1; d >= 0; --d) {
    const int64_t next_pixel = problem.by_out_size[d].divide(pixel);
    const int64_t next_rest = problem.by_kernel[d].divide_small(rest);
    const int64_t base = problem.shape.axis[d].base(pixel - next_pixel * problem.shape.out_size[d],
                                                    rest - next_rest * problem.shape.kernel[d]);
    p[d] = static_cast<acc_t>(base) + delta[d * problem.pixels];
    pixel = next_pixel;
    rest = next_rest;
  }
  // Now, as the index that it is read by would be kept in registers.
  sample.modulation = mask ? mask[index.mask_index(problem)] : acc_t(1);
  const int64_t channels = problem.shape.channels;
  const int64_t start = index.image * problem.positions * channels + sample.channel;
  if (sample.locate(p, problem.shape.size, start, channels, fraction)) return;
  // What a sample that reaches nothing is multiplied by may be anything.
  sample.modulation = 0;
}

}  // namespace mmdcn::cuda
