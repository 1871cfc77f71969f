// Fractional sampling of a feature map: equations (3) and (4) of mmdcn/ops/reference.py,
//
//   X(p)    = sum_q G(q, p) X(q)                         over integer positions q that exist
//   G(q, p) = prod_d max(0, 1 - |q_d - p_d|)
//
// and the derivative of X(p) with respect to p. Every deformable operator on every device samples
// through this header, so that the CPU tests exercise the mathematics the GPU runs: Corners has one
// sample, CornerArrays has the samples of a loop that is vectorised.
//
// RoI pooling uses Corners on the CPU too, in one dimension, and by a border rule of its own,
// locate_with_border(). The average over a bin's grid of samples is a product of one factor for
// each dimension (see deform_roi_pool_shape.h), so a bin locates a few samples along each dimension
// and merges their corners into one list. There is no long loop over samples that could be
// vectorised; the kernels are vectorised over channels instead.
//
// In each dimension only floor(p) and floor(p) + 1 can have a non-zero weight, so a sample over R
// dimensions reads 2^R corners. Corner number q has bit d set when it lies on the high side of
// dimension d, counted from the innermost (x is bit 0, y is bit 1).
#pragma once

#include <cstdint>
#include <type_traits>

#include "host_device.h"

namespace mmdcn {

// The regular grid of a convolution along one dimension: where on the input the taps of an output
// position are without offsets.
struct GridAxis {
  int64_t stride, padding, dilation;

  // The coordinate of tap `tap` of output position `position`, before its offset is added.
  MMDCN_HOST_DEVICE int64_t base(int64_t position, int64_t tap) const {
    return position * stride - padding + tap * dilation;
  }
};

// Whether a sample with this coordinate can contribute: it is finite and lies inside (-1, size).
// The comparison is made in floating point and is false for NaN, so no coordinate that an integer
// cannot hold is ever converted to one.
template <typename coord_t>
MMDCN_HOST_DEVICE bool reaches(coord_t p, int64_t size) {
  return p > coord_t(-1) && p < coord_t(size);
}

// Splits a coordinate for which reaches() holds into its floor and its fraction.
template <typename coord_t, typename index_t>
MMDCN_HOST_DEVICE void split(coord_t p, index_t& low, coord_t& fraction) {
  // Without a library call: truncation rounds towards zero, and p is above -1.
  low = static_cast<index_t>(p + coord_t(1)) - 1;
  // p + 1 may round up to the next integer, just below it; step back so that fraction >= 0.
  low -= coord_t(low) > p ? 1 : 0;
  fraction = p - coord_t(low);
}

// The border rule along one dimension: whether a position exists. One comparison does, as negative
// numbers are large ones when they are taken for unsigned.
template <typename index_t>
MMDCN_HOST_DEVICE bool exists(index_t position, index_t size) {
  using unsigned_t = std::make_unsigned_t<index_t>;
  return static_cast<unsigned_t>(position) < static_cast<unsigned_t>(size);
}

// The factor of G(q, p) along one dimension, for the corner on its low or high side, and the
// derivative of the factor with respect to the coordinate.
template <typename coord_t>
MMDCN_HOST_DEVICE coord_t weight_along(coord_t fraction, int high) {
  return high ? fraction : coord_t(1) - fraction;
}
template <typename coord_t>
MMDCN_HOST_DEVICE coord_t slope_along(int high) {
  return high ? coord_t(1) : coord_t(-1);
}

// The derivative of G(q, p) along dimension d, for corner number q.
template <typename coord_t, int R>
MMDCN_HOST_DEVICE coord_t slope_of_corner(const coord_t (&fraction)[R], int d, int q) {
  coord_t slope = 1;
  for (int e = 0; e < R; ++e) {
    const int high = (q >> (R - 1 - e)) & 1;
    slope *= e == d ? slope_along<coord_t>(high) : weight_along(fraction[e], high);
  }
  return slope;
}

// The corners of one sample: their flat positions in the feature map, their weights G(q, p), and
// the derivatives of those weights with respect to each coordinate. Positions are counted in
// index_t, which must hold the number of them.
template <typename coord_t, int R, typename index_t = int64_t>
struct Corners {
  static constexpr int kCount = 1 << R;

  index_t position[kCount];            // q, flattened row-major; -1 where q does not exist
  coord_t weight[kCount];              // G(q, p); 0 where q does not exist
  coord_t weight_gradient[R][kCount];  // dG(q, p) / dp_d, outermost dimension first; 0 likewise

  // Fills the corners of the sample at p in a feature map of the given size. Returns false, with
  // nothing filled, when the sample contributes nothing.
  MMDCN_HOST_DEVICE bool locate(const coord_t (&p)[R], const index_t (&size)[R]) {
    coord_t fraction[R];
    return locate(p, size, fraction);
  }
  // The same, which also tells what is left of the point's coordinates.
  MMDCN_HOST_DEVICE bool locate(const coord_t (&p)[R], const index_t (&size)[R],
                                coord_t (&fraction)[R]) {
    for (int d = 0; d < R; ++d) {
      if (!reaches(p[d], size[d])) return false;
    }
    index_t low[R];
    for (int d = 0; d < R; ++d) split(p[d], low[d], fraction[d]);
    fill(low, fraction, size);
    return true;
  }

  // The same with the border rule of RoI pooling, whose feature maps go on for one more pixel on
  // every side: a coordinate in [-1, size] is clamped to [0, size - 1]. The derivative with respect
  // to a coordinate that is clamped, or lies on the last pixel, is zero.
  MMDCN_HOST_DEVICE bool locate_with_border(const coord_t (&p)[R], const int64_t (&size)[R]) {
    int64_t low[R];
    coord_t fraction[R];
    bool held[R];
    for (int d = 0; d < R; ++d) {
      // The comparisons are false for NaN.
      if (!(p[d] >= coord_t(-1) && p[d] <= coord_t(size[d])) || size[d] < 1) return false;
      const coord_t last = coord_t(size[d] - 1);
      held[d] = p[d] < coord_t(0) || p[d] >= last;
      split(p[d] < coord_t(0) ? coord_t(0) : p[d] < last ? p[d] : last, low[d], fraction[d]);
    }
    fill(low, fraction, size);
    for (int d = 0; d < R; ++d) {
      for (int q = 0; q < kCount; ++q) {
        if (held[d]) weight_gradient[d][q] = coord_t(0);
      }
    }
    return true;
  }

  // Fills the corners of the sample at low + fraction.
  MMDCN_HOST_DEVICE void fill(const index_t (&low)[R], const coord_t (&fraction)[R],
                              const index_t (&size)[R]) {
    for (int q = 0; q < kCount; ++q) {
      bool all = true;  // whether q exists along all dimensions
      index_t flat = 0;
      coord_t g = 1;
      for (int d = 0; d < R; ++d) {
        const int high = (q >> (R - 1 - d)) & 1;
        const index_t index = low[d] + high;
        all = all && exists(index, size[d]);
        flat = flat * size[d] + index;
        g *= weight_along(fraction[d], high);
      }
      position[q] = all ? flat : -1;
      weight[q] = all ? g : coord_t(0);
      for (int d = 0; d < R; ++d) {
        weight_gradient[d][q] = all ? slope_of_corner(fraction, d, q) : coord_t(0);
      }
    }
  }
};

// The corners of N samples in two dimensions, one array for each quantity, so that loops over the
// samples that call these functions are vectorised. Corners are numbered as above.
template <typename coord_t, int N>
struct CornerArrays {
  static constexpr int32_t kNowhere = -2;  // a row that does not exist, nor does the next

  int32_t low_y[N], low_x[N];  // floors of the coordinates; of a sample that contributes nothing,
                               // low_y is kNowhere
  coord_t fraction_y[N], fraction_x[N];

  // Locates sample number i at (p_y, p_x). Returns whether it contributes.
  MMDCN_HOST_DEVICE bool locate(int64_t i, coord_t p_y, coord_t p_x, int64_t height,
                                int64_t width) {
    const bool there = reaches(p_y, height) & reaches(p_x, width);
    int32_t y, x;
    split(there ? p_y : coord_t(0), y, fraction_y[i]);
    split(there ? p_x : coord_t(0), x, fraction_x[i]);
    low_y[i] = there ? y : kNowhere;
    low_x[i] = x;
    return there;
  }

  // Whether the row, or the column, on the low or high side of sample number i exists.
  MMDCN_HOST_DEVICE bool row_exists(int high, int64_t i, int32_t height) const {
    return mmdcn::exists(low_y[i] + high, height);
  }
  MMDCN_HOST_DEVICE bool column_exists(int high, int64_t i, int32_t width) const {
    return mmdcn::exists(low_x[i] + high, width);
  }
  // Whether corner number q of sample number i exists.
  MMDCN_HOST_DEVICE bool exists(int q, int64_t i, int32_t height, int32_t width) const {
    return row_exists(q >> 1, i, height) & column_exists(q & 1, i, width);
  }

  // The factors of G(q, p), their product, and its derivatives with respect to y and x.
  MMDCN_HOST_DEVICE coord_t weight_y(int high, int64_t i) const {
    return weight_along(fraction_y[i], high);
  }
  MMDCN_HOST_DEVICE coord_t weight_x(int high, int64_t i) const {
    return weight_along(fraction_x[i], high);
  }
  MMDCN_HOST_DEVICE coord_t weight(int q, int64_t i) const {
    return weight_y(q >> 1, i) * weight_x(q & 1, i);
  }
  MMDCN_HOST_DEVICE coord_t slope_y(int q, int64_t i) const {
    return slope_along<coord_t>(q >> 1) * weight_x(q & 1, i);
  }
  MMDCN_HOST_DEVICE coord_t slope_x(int q, int64_t i) const {
    return slope_along<coord_t>(q & 1) * weight_y(q >> 1, i);
  }
};

}  // namespace mmdcn
