// Fractional sampling of a feature map: equations (3) and (4) of the design,
//
//   X(p)    = sum_q G(q, p) X(q)                         over integer positions q that exist
//   G(q, p) = prod_d max(0, 1 - |q_d - p_d|)
//
// and the derivative of X(p) with respect to p. Every deformable operator on every device samples
// through this header, so that the CPU tests exercise the mathematics the GPU runs.
//
// In each dimension only floor(p) and floor(p) + 1 have a non-zero weight, so a sample of rank R
// reads 2^R corners. Corner number q has bit d set when it lies on the high side of dimension d,
// counted from the innermost (x is bit 0, y is bit 1).
#pragma once

#include <cstdint>

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
    for (int d = 0; d < R; ++d) {
      if (!reaches(p[d], size[d])) return false;
    }
    index_t low[R];
    coord_t fraction[R];
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
      bool exists = true;
      index_t flat = 0;
      coord_t g = 1;
      for (int d = 0; d < R; ++d) {
        const int high = (q >> (R - 1 - d)) & 1;
        const index_t index = low[d] + high;
        exists = exists && index >= 0 && index < size[d];
        flat = flat * size[d] + index;
        g *= high ? fraction[d] : coord_t(1) - fraction[d];
      }
      position[q] = exists ? flat : -1;
      weight[q] = exists ? g : coord_t(0);
      for (int d = 0; d < R; ++d) {
        coord_t slope = 1;
        for (int e = 0; e < R; ++e) {
          const int high = (q >> (R - 1 - e)) & 1;
          if (e == d) {
            slope *= high ? coord_t(1) : coord_t(-1);
          } else {
            slope *= high ? fraction[e] : coord_t(1) - fraction[e];
          }
        }
        weight_gradient[d][q] = exists ? slope : coord_t(0);
      }
    }
  }
};

}  // namespace mmdcn
