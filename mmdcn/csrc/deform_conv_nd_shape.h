// The sizes of one deformable convolution over R dimensions, and the positions of its samples on
// the input, for every device. Two dimensions have tuned kernels and deform_conv2d_shape.h.
#pragma once

#include <cstdint>

#include "sampling.h"

namespace mmdcn {

// Arrays have one element for each dimension, outermost first; positions and taps are numbered in
// row-major order.
template <int R>
struct DeformConvNdShape {
  int64_t batch, channels, out_channels;
  int64_t groups, deform_groups;
  int64_t size[R], out_size[R], kernel[R];
  GridAxis axis[R];

  MMDCN_HOST_DEVICE static int64_t product(const int64_t (&sizes)[R]) {
    int64_t total = 1;
    for (int d = 0; d < R; ++d) total *= sizes[d];
    return total;
  }
  MMDCN_HOST_DEVICE int64_t positions() const { return product(size); }   // of an input image
  MMDCN_HOST_DEVICE int64_t pixels() const { return product(out_size); }  // of an output image
  MMDCN_HOST_DEVICE int64_t taps() const { return product(kernel); }
  MMDCN_HOST_DEVICE int64_t group_channels() const { return channels / groups; }
  MMDCN_HOST_DEVICE int64_t group_out_channels() const { return out_channels / groups; }
  MMDCN_HOST_DEVICE int64_t deform_group_channels() const { return channels / deform_groups; }
  // Samples of one output pixel, which are the channels of the mask.
  MMDCN_HOST_DEVICE int64_t samples() const { return deform_groups * taps(); }

  // Locates sample number `sample`, of one tap for one offset group, at output pixel number `pixel`
  // of an image whose offsets, (samples, R, pixels), are given. Returns whether it contributes.
  template <typename coord_t>
  MMDCN_HOST_DEVICE bool locate(int64_t pixel, int64_t sample, const coord_t* offset,
                                Corners<coord_t, R>& corners) const {
    const int64_t stride = pixels();
    const coord_t* delta = offset + sample * R * stride + pixel;
    int64_t tap = sample % taps();
    coord_t p[R];
    for (int d = R - 1; d >= 0; --d) {
      const int64_t position = pixel % out_size[d];
      p[d] = static_cast<coord_t>(axis[d].base(position, tap % kernel[d])) + delta[d * stride];
      pixel /= out_size[d];
      tap /= kernel[d];
    }
    return corners.locate(p, size);
  }
};

}  // namespace mmdcn
