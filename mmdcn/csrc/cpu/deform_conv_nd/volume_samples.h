// The samples of deform_conv_nd in three dimensions: those of one tap and one offset group at
// consecutive output pixels are located together, in vectorised loops.
//
// A sample of a volume is the sum of two samples of planes, one before it and one behind it, which
// are weighted by their distance. So rows of channels are read, and their gradients added, as in
// two dimensions.
#pragma once

#include <algorithm>

#include "../../deform_conv_nd_shape.h"
#include "../arena.h"
#include "../matmul.h"
#include "../row_gradients.h"
#include "volume_rows.h"

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

// The most output pixels whose samples are located together.
constexpr int kMostPixels = 8 * kBlockRows;
// Samples of planes: first those before the samples of all pixels, then those behind them.
constexpr int kMostSamples = 2 * kMostPixels;

// The elements that belong to one tap and one offset group, from an output pixel on.
struct SampleElements {
  int64_t offset, mask;

  SampleElements(const DeformConvNdShape<3>& shape, int64_t image, int64_t pixel, int64_t group,
                 int64_t tap) {
    const int64_t sample = image * shape.samples() + group * shape.taps() + tap;
    mask = sample * shape.pixels() + pixel;
    offset = sample * 3 * shape.pixels() + pixel;
  }
};

// An element of an array that may be missing.
template <typename A>
inline A* element(A* array, int64_t index) {
  return array ? array + index : nullptr;
}

template <typename A>
class VolumeSamples {
 public:
  using Shape = DeformConvNdShape<3>;

  VolumeSamples(const Shape& shape, Arena& arena)
      : shape_(shape),
        planar_(arena.take<Samples<A, kMostSamples>>(1)),
        arrays_(arena.take<Arrays>(1)),
        gradients_(arena.take<ThreeGradients<A, kMostSamples>>(1)) {}

  int64_t pixels() const { return pixels_; }
  // The samples of planes.
  int64_t count() const { return 2 * pixels_; }

  // Chooses the output pixels [pixel, pixel + count) of an image.
  void start(int64_t pixel, int64_t count) {
    pixels_ = count;
    int64_t at[3];
    for (int d = 2; d >= 0; --d) {
      at[d] = pixel % shape_.out_size[d];
      pixel /= shape_.out_size[d];
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int d = 0; d < 3; ++d) {
        arrays_->origin[d][i] = static_cast<A>(shape_.axis[d].base(at[d], 0));
      }
      for (int d = 2; d >= 0 && ++at[d] == shape_.out_size[d]; --d) at[d] = 0;
    }
  }

  // Locates the pixels' samples of one tap, given the offsets, (3, pixels), and the modulations of
  // one offset group from the first of the pixels on. `mask` may be null.
  void locate(int64_t tap, const A* offset, const A* mask) {
    A step[3];
    for (int d = 2; d >= 0; --d) {
      step[d] = static_cast<A>(tap % shape_.kernel[d] * shape_.axis[d].dilation);
      tap /= shape_.kernel[d];
    }
    Arrays& of = *arrays_;
    const int64_t pixels = pixels_, stride = shape_.pixels();
    if (mask) {
      std::copy_n(mask, pixels, of.modulation);
    } else {
      std::fill_n(of.modulation, pixels, A(1));
    }
    Samples<A, kMostSamples>& planar = *planar_;
    const int64_t depth = shape_.size[0], height = shape_.size[1], width = shape_.size[2];
    // Several loops, as one would have too many conditions to be vectorised.
#pragma GCC ivdep
    for (int64_t i = 0; i < pixels; ++i) {
      const A z = of.origin[0][i] + step[0] + offset[i];
      const bool reached = reaches(z, depth);
      int32_t low;
      split(reached ? z : A(0), low, of.fraction[i]);
      of.low_z[i] = reached ? low : planar.kNowhere;
    }
#pragma GCC ivdep
    for (int64_t i = 0; i < pixels; ++i) {
      const A y = of.origin[1][i] + step[1] + offset[stride + i];
      const A x = of.origin[2][i] + step[2] + offset[2 * stride + i];
      planar.locate(i, y, x, height, width);
      of.low_z[i] = planar.low_y[i] != planar.kNowhere ? of.low_z[i] : planar.kNowhere;
      of.modulation[i] = of.low_z[i] != planar.kNowhere ? of.modulation[i] : A(0);
    }
  }

  // Sets the addresses of the samples' first corners in an image with borders, from its first
  // channel that is sampled on.
  template <typename S>
  void set_first_corners(const VolumeRows& rows, S* image, uintptr_t* first) const {
    const int64_t size = sizeof(S);
    const int64_t pixel = rows.pixel * size, line = rows.line * size, plane = rows.plane * size;
    const uintptr_t nowhere = reinterpret_cast<uintptr_t>(image);
    const uintptr_t begin = nowhere + rows.begin * size;
    const Arrays& of = *arrays_;
    const Samples<A, kMostSamples>& planar = *planar_;
#pragma GCC ivdep
    for (int64_t i = 0; i < pixels_; ++i) {
      const int64_t z = of.low_z[i], y = planar.low_y[i], x = planar.low_x[i];
      const uintptr_t there = begin + z * plane + y * line + x * pixel;
      first[i] = z != planar.kNowhere ? there : nowhere;
    }
  }

  // The same of all corners, as those of samples of planes.
  template <typename S>
  void set_corners(const VolumeRows& rows, S* image,
                   CornerAddresses<kMostSamples>& addresses) const {
    const int64_t size = sizeof(S), pixels = pixels_;
    const int64_t pixel = rows.pixel * size, line = rows.line * size, plane = rows.plane * size;
    uintptr_t first[kMostPixels];
    set_first_corners(rows, image, first);
    for (int64_t high = 0; high < 2; ++high) {
      for (int64_t i = 0; i < pixels; ++i) {
        const uintptr_t corner = first[i] + high * plane;
        addresses.corner[0][high * pixels + i] = corner;
        addresses.corner[1][high * pixels + i] = corner + pixel;
        addresses.corner[2][high * pixels + i] = corner + line;
        addresses.corner[3][high * pixels + i] = corner + line + pixel;
      }
    }
  }

  // Sets the weights of the corners times the modulation. Those of corner number q begin at of(q).
  template <typename F>
  void set_weights(const F& of) const {
    const Arrays& from = *arrays_;
    const Samples<A, kMostSamples>& planar = *planar_;
    for (int high = 0; high < 2; ++high) {
      A *weight_0 = of(4 * high), *weight_1 = of(4 * high + 1);
      A *weight_2 = of(4 * high + 2), *weight_3 = of(4 * high + 3);
      const int64_t pixels = pixels_;
#pragma GCC ivdep
      for (int64_t i = 0; i < pixels; ++i) {
        const A low_x = planar.weight_x(0, i), high_x = planar.weight_x(1, i);
        const A modulation = from.modulation[i] * weight_along(from.fraction[i], high);
        const A low_y = modulation * planar.weight_y(0, i);
        const A high_y = modulation * planar.weight_y(1, i);
        weight_0[i] = low_y * low_x;
        weight_1[i] = low_y * high_x;
        weight_2[i] = high_y * low_x;
        weight_3[i] = high_y * high_x;
      }
    }
  }
  // The same as weights of samples of planes.
  void set_weights(A (&weight)[4][kMostSamples]) const {
    set_weights([&](int q) { return weight[q & 3] + (q >> 2) * pixels_; });
  }

  // Stores the gradients of the samples' offsets, (3, pixels), and of their modulations, from the
  // dot products at their corners. Either target may be null.
  void store_gradients(const SampleDots<A, kMostSamples>& dots, A* grad_offset,
                       A* grad_mask) const {
    set_planes();
    set_sample_gradients(shape_.size[1], shape_.size[2], *planar_, count(), dots, *gradients_);
    const Arrays& of = *arrays_;
    const auto& planar = gradients_->of;
    const int64_t pixels = pixels_, stride = shape_.pixels();
    for (int64_t i = 0; grad_offset && i < pixels; ++i) {
      const A before = planar[2][i], behind = planar[2][pixels + i];
      grad_offset[i] = of.modulation[i] * (slope_along<A>(0) * before + slope_along<A>(1) * behind);
      grad_offset[stride + i] = planar[0][i] + planar[0][pixels + i];
      grad_offset[2 * stride + i] = planar[1][i] + planar[1][pixels + i];
    }
    for (int64_t i = 0; grad_mask && i < pixels; ++i) {
      grad_mask[i] = weight_along(of.fraction[i], 0) * planar[2][i] +
                     weight_along(of.fraction[i], 1) * planar[2][pixels + i];
    }
  }

 private:
  struct Arrays {
    A origin[3][kMostPixels];    // of the first tap, without its offset
    A fraction[kMostPixels];     // of the coordinate across planes
    A modulation[kMostPixels];   // 0 of a sample that contributes nothing
    int32_t low_z[kMostPixels];  // kNowhere of a sample that contributes nothing
  };

  // Sets the samples of planes: those behind the pixels' samples, and then those before them.
  void set_planes() const {
    Samples<A, kMostSamples>& planar = *planar_;
    std::copy_n(planar.low_x, pixels_, planar.low_x + pixels_);
    std::copy_n(planar.fraction_y, pixels_, planar.fraction_y + pixels_);
    std::copy_n(planar.fraction_x, pixels_, planar.fraction_x + pixels_);
    set_plane(1, pixels_);
    set_plane(0, 0);
  }
  void set_plane(int high, int64_t first) const {
    const Arrays& of = *arrays_;
    Samples<A, kMostSamples>& planar = *planar_;
    const int32_t depth = static_cast<int32_t>(shape_.size[0]);
#pragma GCC ivdep
    for (int64_t i = 0; i < pixels_; ++i) {
      const bool there = exists(of.low_z[i] + high, depth);
      const A modulation = of.modulation[i] * weight_along(of.fraction[i], high);
      planar.low_y[first + i] = there ? planar.low_y[i] : planar.kNowhere;
      planar.modulation[first + i] = there ? modulation : A(0);
    }
  }

  const Shape& shape_;
  Samples<A, kMostSamples>* const planar_;
  Arrays* const arrays_;
  ThreeGradients<A, kMostSamples>* const gradients_;
  int64_t pixels_ = 0;
};

}  // namespace
}  // namespace MMDCN_CPU_CAPABILITY
}  // namespace mmdcn
