// The sizes of one deformable RoI pooling and the samples of its bins, for every device.
//
// A bin averages a grid of evenly spaced samples. The bilinear kernel is a product of one factor
// for each dimension, and so is its average over the grid: a bin's value is
//
//   sum_y sum_x w(y) w(x) X(y, x)
//
// where w(y) is the average weight of row y over the bin's samples along that dimension. So the
// samples are located along each dimension by itself, and a bin reads every pixel once, however
// many of its samples have it as a corner.
#pragma once

#include <cstdint>
#include <limits>

#include "sampling.h"

namespace mmdcn {

// Samples of a bin along one dimension, at most: every integer up to here is a float.
constexpr int64_t kMostBinSamples = INT64_C(1) << 24;

struct DeformRoIPoolShape {
  int64_t batch, channels, height, width;
  int64_t rois, out_channels, out_height, out_width;
  int64_t deform_groups;   // consecutive output channels that share offsets; 1 without offsets
  int64_t sampling_ratio;  // samples of a bin along each dimension; below 1, one for each pixel
  double spatial_scale, gamma;
  // Whether each bin has input channels of its own: those of bin b begin at b * out_channels.
  bool position_sensitive;

  MMDCN_HOST_DEVICE int64_t bins() const { return out_height * out_width; }
  MMDCN_HOST_DEVICE int64_t pixels() const { return height * width; }
  MMDCN_HOST_DEVICE int64_t deform_group_channels() const { return out_channels / deform_groups; }
  // The input channel that a bin's first output channel is pooled from.
  MMDCN_HOST_DEVICE int64_t first_channel(int64_t bin) const {
    return position_sensitive ? bin * out_channels : 0;
  }
};

// A pixel along one dimension, a row or a column, and its weight in a bin's average.
template <typename coord_t>
struct BinPixel {
  int64_t position;
  coord_t weight;
  coord_t slope;  // derivative of the weight with respect to the bin's position, in pixels
};

// The samples of one bin along one dimension.
template <typename coord_t>
struct BinSamples {
  static constexpr coord_t kLargest = std::numeric_limits<coord_t>::max();
  static constexpr coord_t kEpsilon = std::numeric_limits<coord_t>::epsilon();

  coord_t start, length;  // of the bin, in pixels of the features
  int64_t count;          // samples, in the middle of as many equal intervals of the bin
  int64_t size;           // pixels of the features

  // The coordinate of sample number i.
  MMDCN_HOST_DEVICE coord_t at(int64_t i) const {
    return start + (static_cast<coord_t>(i) + coord_t(0.5)) * length / static_cast<coord_t>(count);
  }

  // Finds a range [begin, end) that has all samples that reach the features and few others, as a
  // bin may have millions of samples outside.
  MMDCN_HOST_DEVICE void reaching(int64_t& begin, int64_t& end) const {
    begin = 0;
    end = count;
    if (count <= 8) return;
    const coord_t step = length / static_cast<coord_t>(count);
    const coord_t farthest = magnitude(start) + magnitude(length) + static_cast<coord_t>(size);
    if (!(farthest <= kLargest)) {
      end = 0;  // No sample is finite.
      return;
    }
    if (!(step > coord_t(1e-6) || step < coord_t(-1e-6))) return;
    // A bound on the rounding errors, in steps from sample to sample.
    const coord_t slack = 2 + 8 * kEpsilon * farthest / magnitude(step);
    const coord_t first = (coord_t(-1) - start) / step;
    const coord_t last = (static_cast<coord_t>(size) - start) / step;
    begin = whole((step > 0 ? first : last) - slack);
    end = whole((step > 0 ? last : first) + slack);
  }

  // Calls visit(position, weight, slope) for the corners of sample number i.
  template <typename Visit>
  MMDCN_HOST_DEVICE void visit_pixels(int64_t i, const Visit& visit) const {
    Corners<coord_t, 1> corners;
    if (!corners.locate_with_border({at(i)}, {size})) return;
    for (int q = 0; q < corners.kCount; ++q) {
      if (corners.position[q] < 0) continue;
      visit(corners.position[q], corners.weight[q] / static_cast<coord_t>(count),
            corners.weight_gradient[0][q] / static_cast<coord_t>(count));
    }
  }

  // Lists the pixels that samples [begin, end) read, each once with its total weight, and returns
  // how many there are: at most 2 (end - begin), and at most `size`.
  MMDCN_HOST_DEVICE int64_t list_pixels(int64_t begin, int64_t end, BinPixel<coord_t>* list) const {
    int64_t pixels = 0;
    for (int64_t i = begin; i < end; ++i) {
      visit_pixels(i, [&](int64_t position, coord_t weight, coord_t slope) {
        // Neighbouring samples have neighbouring corners, so a pixel that is listed already is
        // among the last three.
        const int64_t oldest = pixels > 3 ? pixels - 3 : 0;
        for (int64_t k = pixels; k-- > oldest;) {
          if (list[k].position != position) continue;
          list[k].weight += weight;
          list[k].slope += slope;
          return;
        }
        list[pixels++] = {position, weight, slope};
      });
    }
    return pixels;
  }

 private:
  MMDCN_HOST_DEVICE static coord_t magnitude(coord_t value) { return value < 0 ? -value : value; }
  // `number` as an integer between 0 and the number of samples; 0 for NaN.
  MMDCN_HOST_DEVICE int64_t whole(coord_t number) const {
    if (!(number > 0)) return 0;
    return number < static_cast<coord_t>(count) ? static_cast<int64_t>(number) : count;
  }
};

// The number of the image that a RoI, (image, x1, y1, x2, y2), is on; -1 if there is no such image.
template <typename coord_t>
MMDCN_HOST_DEVICE int64_t image_of_roi(const DeformRoIPoolShape& shape, const coord_t* roi) {
  // The comparisons are false for NaN.
  const bool there = roi[0] >= 0 && roi[0] < static_cast<coord_t>(shape.batch);
  return there ? static_cast<int64_t>(roi[0]) : -1;
}

// A RoI along one dimension of the features: 0 is y, 1 is x.
template <typename coord_t>
struct RoISide {
  coord_t start, length;  // in pixels of the features
  coord_t reach;          // pixels of the features that an offset of 1 moves a bin by
  int64_t bins, size;     // bins of the RoI, pixels of the features

  // The box is in pixels of the image, of which a pixel of the features covers 1 / spatial_scale.
  // A coordinate of the features is 0 in the middle of pixel 0, hence the halves.
  MMDCN_HOST_DEVICE RoISide(const DeformRoIPoolShape& shape, const coord_t* roi, int d) {
    const coord_t scale = static_cast<coord_t>(shape.spatial_scale);
    start = roi[2 - d] * scale - coord_t(0.5);
    length = roi[4 - d] * scale - coord_t(0.5) - start;
    reach = static_cast<coord_t>(shape.gamma) * length;
    bins = d == 0 ? shape.out_height : shape.out_width;
    size = d == 0 ? shape.height : shape.width;
  }

  // The samples of bin number `index`, moved by `offset`.
  MMDCN_HOST_DEVICE BinSamples<coord_t> bin(int64_t sampling_ratio, int64_t index,
                                            coord_t offset) const {
    const coord_t bin_length = length / static_cast<coord_t>(bins);
    const coord_t bin_start = start + reach * offset + static_cast<coord_t>(index) * bin_length;
    int64_t count = sampling_ratio;
    if (sampling_ratio < 1) {
      // One for each pixel, and none in a box that is empty, inverted or not a number.
      constexpr coord_t most = static_cast<coord_t>(kMostBinSamples);
      const coord_t pixels = bin_length > 0 ? bin_length < most ? bin_length : most : coord_t(0);
      count = static_cast<int64_t>(pixels);
      count += static_cast<coord_t>(count) < pixels ? 1 : 0;
    }
    return {bin_start, bin_length, count, size};
  }
};

// The index of the offset of a bin along dimension d, for one offset group. x is stored before y.
MMDCN_HOST_DEVICE int64_t roi_offset_index(const DeformRoIPoolShape& shape, int64_t roi,
                                           int64_t group, int d, int64_t bin) {
  return ((roi * shape.deform_groups + group) * 2 + 1 - d) * shape.bins() + bin;
}

}  // namespace mmdcn
