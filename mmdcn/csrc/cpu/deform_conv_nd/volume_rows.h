// Where the channels of an image's positions are in memory, as rows.
#pragma once

#include <cstdint>

#include "../../deform_conv_nd_shape.h"

namespace mmdcn {

// Positions of a line of an image follow one another, and so do lines, planes and images, each so
// many elements behind the one before it.
//
// Where there is a border, the positions around a volume are in memory too, where they are zero or
// take gradients that nobody reads: a sample has all its corners, and needs only the address of the
// first. One element of border is both behind a line and before the next, and likewise for planes.
struct VolumeRows {
  int64_t positions, height, width;
  int64_t begin;  // elements before the first position of an image
  int64_t pixel, line, plane, image;

  // Without borders.
  VolumeRows(int64_t channels, int64_t count)
      : positions(count),
        height(1),
        width(count),
        begin(0),
        pixel(channels),
        line(count * channels),
        plane(line),
        image(line) {}

  // The input of a convolution, with borders. From the beginning of an image on, there is a sample
  // whose corners all lie in the border.
  explicit VolumeRows(const DeformConvNdShape<3>& shape)
      : positions(shape.positions()),
        height(shape.size[1]),
        width(shape.size[2]),
        pixel(shape.channels),
        line((width + 1) * pixel),
        plane((height + 1) * line) {
    begin = plane + line + 2 * pixel;
    image = begin + (shape.size[0] + 1) * plane;
  }

  // The first channel of a position.
  int64_t at(int64_t number, int64_t position) const {
    const int64_t y = position / width, z = y / height;
    return number * image + begin + z * plane + (y - z * height) * line +
           (position - y * width) * pixel;
  }

  // Calls function(first, elements) for all elements of a batch that belong to no position.
  template <typename F>
  void for_borders(int64_t batch, const F& function) const {
    if (begin == 0) return;
    const int64_t depth = (image - begin) / plane - 1;
    for (int64_t start = 0; start < batch * image; start += image) {
      function(start, begin);
      for (int64_t z = 0; z < depth; ++z) {
        const int64_t first = start + begin + z * plane;
        for (int64_t y = 0; y < height; ++y) function(first + y * line + width * pixel, pixel);
        function(first + height * line, line);
      }
      function(start + begin + depth * plane, plane);
    }
  }
};

}  // namespace mmdcn
