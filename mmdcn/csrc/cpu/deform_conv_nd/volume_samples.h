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

namespace mmdcn {
namespace MMDCN_CPU_CAPABILITY {
namespace {

// The most output pixels whose samples are located together.
constexpr int kMostPixels = 8 * kBlockRows;
// Samples of planes: first those before the samples of all pixels, then those behind them.
constexpr int kMostSamples = 2 * kMostPixels;

// The distance of each sample's plane from the first plane.
struct PlaneDistances {
  const int32_t* plane;
  int64_t plane_bytes;

  int64_t operator()(int64_t i) const { return plane[i] * plane_bytes; }
};

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
      of.low[i] = reached ? low : planar.kNowhere;
    }
#pragma GCC ivdep
    for (int64_t i = 0; i < pixels; ++i) {
      const A y = of.origin[1][i] + step[1] + offset[stride + i];
      const A x = of.origin[2][i] + step[2] + offset[2 * stride + i];
      planar.locate(i, y, x, height, width);
      const A modulation = of.low[i] != planar.kNowhere ? of.modulation[i] : A(0);
      of.modulation[i] = planar.low_y[i] != planar.kNowhere ? modulation : A(0);
    }
    std::copy_n(planar.low_x, pixels, planar.low_x + pixels);
    std::copy_n(planar.fraction_y, pixels, planar.fraction_y + pixels);
    std::copy_n(planar.fraction_x, pixels, planar.fraction_x + pixels);
    place(1, pixels);
    place(0, 0);
  }

  // Sets the addresses of the corners' channels from `channel` on in one image, (positions, C).
  // Corner number q of a plane that does not exist is at `nowhere` + q · nowhere_stride.
  template <typename S>
  void set_corners(S* image, int64_t channel, const std::remove_const_t<S>* nowhere,
                   int64_t nowhere_stride, CornerAddresses<kMostSamples>& addresses) const {
    const int64_t height = shape_.size[1], width = shape_.size[2];
    const auto first_plane = whole_image(image, height, width, shape_.channels);
    const int64_t plane_bytes = height * width * shape_.channels * sizeof(S);
    mmdcn::set_corners<S>(height, width, first_plane, channel, *planar_, count(), nowhere,
                          nowhere_stride, addresses, PlaneDistances{arrays_->plane, plane_bytes});
  }

  void set_weights(A (&weight)[4][kMostSamples]) const {
    mmdcn::set_weights(*planar_, count(), weight);
  }

  // Stores the gradients of the samples' offsets, (3, pixels), and of their modulations, from the
  // dot products at their corners. Either target may be null.
  void store_gradients(const SampleDots<A, kMostSamples>& dots, A* grad_offset,
                       A* grad_mask) const {
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
    A origin[3][kMostPixels];   // of the first tap, without its offset
    A fraction[kMostPixels];    // of the coordinate across planes
    A modulation[kMostPixels];  // 0 of a sample that contributes nothing
    int32_t low[kMostPixels];   // the plane before; kNowhere of one that no plane reaches
    int32_t plane[kMostSamples];
  };

  // Sets the samples, from number `first` on, of the planes before (0) or behind (1) the pixels'.
  void place(int high, int64_t first) {
    Arrays& of = *arrays_;
    Samples<A, kMostSamples>& planar = *planar_;
    const int32_t depth = static_cast<int32_t>(shape_.size[0]);
#pragma GCC ivdep
    for (int64_t i = 0; i < pixels_; ++i) {
      const int32_t plane = of.low[i] + high;
      const bool there = exists(plane, depth);
      const A modulation = of.modulation[i] * weight_along(of.fraction[i], high);
      planar.low_y[first + i] = there ? planar.low_y[i] : planar.kNowhere;
      planar.modulation[first + i] = there ? modulation : A(0);
      of.plane[first + i] = there ? plane : 0;
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
