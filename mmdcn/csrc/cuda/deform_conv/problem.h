// The sizes of a deformable convolution as its CUDA kernels use them, over two or three dimensions.
#pragma once

#include "../../deform_conv_nd_shape.h"
#include "../../integers.h"
#include "../types.h"

namespace mmdcn::cuda {

// Output pixels are numbered over the images of the batch. Features are channels last, (batch,
// positions, channels), and so are columns: (pixels, groups, taps, group_channels). What follows
// from the shape is worked out once, here, so that no thread has to divide for it.
template <int R>
struct ConvProblem {
  DeformConvNdShape<R> shape;

  int64_t taps, samples;             // of an output pixel: its samples are deform_groups * taps
  int64_t positions, pixels;         // of an input image and of an output image
  int64_t group_channels;            // input channels of one group
  int64_t group_out_channels;        // and its output channels
  int64_t deform_group_channels;     // input channels that share their samples
  int64_t columns;                   // summands of an output element: taps * group_channels
  int64_t row;                       // elements of the columns of one pixel: groups * columns
  int64_t offset_image, mask_image;  // elements from an image's offsets, or mask, to the next one's
  Divisor by_samples, by_taps, by_pixels;
  Divisor by_out_size[R], by_kernel[R];

  explicit ConvProblem(const DeformConvNdShape<R>& shape)
      : shape(shape),
        taps(shape.taps()),
        samples(shape.samples()),
        positions(shape.positions()),
        pixels(shape.pixels()),
        group_channels(shape.group_channels()),
        group_out_channels(shape.group_out_channels()),
        deform_group_channels(shape.deform_group_channels()),
        columns(taps * group_channels),
        row(shape.groups * columns),
        offset_image(samples * R * pixels),
        mask_image(samples * pixels),
        by_samples(samples),
        by_taps(taps),
        by_pixels(pixels) {
    for (int d = 0; d < R; ++d) {
      by_out_size[d] = Divisor(shape.out_size[d]);
      by_kernel[d] = Divisor(shape.kernel[d]);
    }
  }

  // Whether vectors of this many channels never reach across the border of a group or offset group.
  bool divides_into(int64_t vector) const {
    return group_channels % vector == 0 && deform_group_channels % vector == 0;
  }
};

// Some output pixels: `count` from number `first` on.
struct PixelRange {
  int64_t first, count;
};

}  // namespace mmdcn::cuda
