// Fractional sampling of a feature map: equations (3) and (4) of the design,
//
//   X(p)    = sum_q G(q, p) X(q)                         over integer positions q that exist
//   G(q, p) = prod_d max(0, 1 - |q_d - p_d|)
//
// and the derivative of X(p) with respect to p. Every deformable operator on every device samples
// through this header, so that the CPU tests exercise the mathematics the GPU runs: sample by
// sample with Corners, or many side by side with CornerArrays.
//
// In each dimension only floor(p) and floor(p) + 1 have a non-zero weight, so a sample of rank R
// reads 2^R corners. Corner number q has bit d set when it lies on the high side of dimension d,
// counted from the innermost (x is bit 0, y is bit 1).
#pragma once

#include <cstdint>
#include <type_traits>

#include "host_device.h"

namespace mmdcn {

// How the regular grid of one convolution maps an output position and a tap to the input.
struct GridAxis {
  int64_t stride, padding, dilation;

  // Coordinate of tap `tap` of output position `position`, before its offset.
  MMDCN_HOST_DEVICE int64_t base(int64_t position, int64_t tap) const {
    return position * stride - padding + tap * dilation;
  }
};

// Whether a sample with this coordinate can contribute: it is finite and lies inside (-1, size).
// The comparison is made in floating point and is false for NaN, so that no coordinate that an
// integer cannot hold is ever converted to one.
template <typename coord_t>
MMDCN_HOST_DEVICE bool reaches(coord_t p, int64_t size) {
  return p > coord_t(-1) && p < coord_t(size);
}

// floor(p) and what is left of p, for a coordinate that reaches.
template <typename coord_t, typename index_t>
MMDCN_HOST_DEVICE void split(coord_t p, index_t& low, coord_t& fraction) {
  // Without a library call: truncation rounds towards zero, and p is above -1.
  low = static_cast<index_t>(p + coord_t(1)) - 1;
  // p + 1 may round up to the next integer, just below it; step back so that fraction >= 0.
  low -= coord_t(low) > p ? 1 : 0;
  fraction = p - coord_t(low);
}

// The border rule along one dimension: whether a position exists. It is a single comparison, as
// negative numbers become large ones.
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

  // Fills the corners of point p in a feature map of the given size. Returns false, with nothing
  // filled, when the sample contributes nothing.
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

  // The same in a feature map whose border goes on for one more pixel on every side, as RoI pooling
  // has it: a point in [-1, size] is moved to the nearest one in [0, size - 1], and does not move
  // with p where that is another one, or the last pixel.
  MMDCN_HOST_DEVICE bool locate_with_border(const coord_t (&p)[R], const int64_t (&size)[R]) {
    int64_t low[R];
    coord_t fraction[R];
    bool held[R];
    for (int d = 0; d < R; ++d) {
      // False for NaN.
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

  // Fills the corners of the point low + fraction.
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

// The corners of N samples in two dimensions, one array for each quantity: loops over samples that
// use these functions are vectorised. Corners are numbered as above.
template <typename coord_t, int N>
struct CornerArrays {
  static constexpr int32_t kNowhere = -2;  // neither this row nor the next exists

  int32_t low_y[N], low_x[N];  // floor of the coordinates; low_y is kNowhere of what adds nothing
  coord_t fraction_y[N], fraction_x[N];

  // Locates sample number i at (p_y, p_x). Returns whether it contributes anything.
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

  // Whether the rows, or columns, on the low or high side of sample number i exist.
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

  // The factors of G(q, p), which is their product, and its derivatives with respect to y and x.
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
