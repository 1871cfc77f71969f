// What the passes of deformable convolution over R dimensions share on CUDA: the output pixels that
// a block works on, and where they sample the input for one tap and one offset group.
#pragma once

#include "../../integers.h"
#include "../../sampling.h"
#include "../context.h"
#include "kernels.h"

namespace mmdcn::cuda {

// An output pixel; `image` is negative in a tile's part beyond the last one.
struct NdPixel {
  int64_t image, position;

  MMDCN_BLOCK bool exists() const { return image >= 0; }
};

// Where a modulated sample reads: positions of an image, or -1, and their weights.
template <typename acc_t, int R>
struct NdSample {
  static constexpr int kCount = 1 << R;

  int64_t position[kCount];
  acc_t weight[kCount];

  // Of a channel that starts at `channel`.
  template <typename scalar_t>
  MMDCN_BLOCK acc_t of(const scalar_t* channel) const {
    acc_t sum = 0;
    MMDCN_UNROLL
    for (int q = 0; q < kCount; ++q) {
      if (position[q] >= 0) sum += weight[q] * static_cast<acc_t>(channel[position[q]]);
    }
    return sum;
  }
};

template <int R>
MMDCN_BLOCK int64_t all_pixels(const ConvNdProblem<R>& problem) {
  return problem.shape.batch * problem.shape.pixels();
}

// Finds output pixels from `first` on, numbered over the whole batch.
template <typename Ctx, int R, int kPixels>
MMDCN_BLOCK void find_pixels(const Ctx& ctx, const ConvNdProblem<R>& problem, int64_t first,
                             NdPixel (&pixels)[kPixels]) {
  for (int i = ctx.thread(); i < kPixels; i += Ctx::kThreads) {
    pixels[i] = {-1, 0};
    if (first + i >= all_pixels(problem)) continue;
    pixels[i].image = divide(first + i, problem.shape.pixels());
    pixels[i].position = first + i - pixels[i].image * problem.shape.pixels();
  }
}

// Where the mask has sample number `sample` of a pixel; the offset has R times as many channels.
template <int R>
MMDCN_BLOCK int64_t sample_index(const ConvNdProblem<R>& problem, const NdPixel& pixel,
                                 int64_t sample) {
  return (pixel.image * problem.shape.samples() + sample) * problem.shape.pixels() + pixel.position;
}

// Locates sample number `sample` of a pixel. Returns false where it reaches nothing.
template <int R, typename acc_t>
MMDCN_BLOCK bool locate(const ConvNdProblem<R>& problem, const NdPixel& pixel, int64_t sample,
                        const acc_t* offset, Corners<acc_t, R>& corners) {
  const int64_t image = pixel.image * problem.shape.samples() * R * problem.shape.pixels();
  return pixel.exists() && problem.shape.locate(pixel.position, sample, offset + image, corners);
}

// Locates sample number `sample` of all pixels.
template <typename Ctx, int R, typename acc_t, int kPixels>
MMDCN_BLOCK void find_samples(const Ctx& ctx, const ConvNdProblem<R>& problem,
                              const NdPixel (&pixels)[kPixels], int64_t sample, const acc_t* offset,
                              const acc_t* mask, NdSample<acc_t, R> (&samples)[kPixels]) {
  for (int i = ctx.thread(); i < kPixels; i += Ctx::kThreads) {
    Corners<acc_t, R> corners;
    const bool inside = locate(problem, pixels[i], sample, offset, corners);
    const acc_t modulation =
        inside && mask ? mask[sample_index(problem, pixels[i], sample)] : acc_t(1);
    MMDCN_UNROLL
    for (int q = 0; q < corners.kCount; ++q) {
      samples[i].position[q] = inside ? corners.position[q] : -1;
      samples[i].weight[q] = inside ? modulation * corners.weight[q] : acc_t(0);
    }
  }
}

// The first element of a channel of a pixel's image.
template <int R, typename scalar_t>
MMDCN_BLOCK const scalar_t* channel_of(const ConvNdProblem<R>& problem, const scalar_t* input,
                                       const NdPixel& pixel, int64_t channel) {
  return input + (pixel.image * problem.shape.channels + channel) * problem.shape.positions();
}

// Where the output has a channel of a pixel.
template <int R>
MMDCN_BLOCK int64_t output_index(const ConvNdProblem<R>& problem, const NdPixel& pixel,
                                 int64_t channel) {
  return (pixel.image * problem.shape.out_channels + channel) * problem.shape.pixels() +
         pixel.position;
}

// Where the weight has an output channel, counted over all groups, and a tap of an input channel,
// counted over all groups likewise.
template <int R>
MMDCN_BLOCK int64_t weight_index(const ConvNdProblem<R>& problem, int64_t out, int64_t channel,
                                 int64_t tap) {
  const int64_t channels = problem.shape.group_channels();
  const int64_t own = channel - divide(channel, channels) * channels;
  return (out * channels + own) * problem.shape.taps() + tap;
}

}  // namespace mmdcn::cuda
