// The gradients of samples that are rows of channels: those of the corners, which are added up in
// memory, and those of coordinates and modulations, from dot products over the channels.
#pragma once

#include "row_corners.h"

namespace mmdcn {
namespace {

// What a sample is for.
enum class Column {
  kNone,       // nothing but its gradients
  kStored,     // the modulated sample itself is stored, as a row of columns
  kAdded,      // likewise, added to what is stored there
  kDepthwise,  // each of its channels has a weight, whose gradient is added up
};

// Samples whose gradients are computed together, for some channels of one offset group. Arrays have
// an element for each sample, and those of corners `quantity` elements from corner to corner.
// Pointers to what is not wanted are not set. S is the type of the corners, L that of the columns.
template <typename S, typename A, typename L = A>
struct RowSamples {
  const uintptr_t* corner;       // addresses of S
  const uintptr_t* grad_corner;  // addresses of A
  const A* weight;               // G(q, p) Δm
  int64_t quantity;
  // The gradient of sample number i begins at gradient + row[i]. Where channels have weights, it is
  // that of the weighted sample.
  const A* gradient;
  const int64_t* row;
  L* column;            // of kStored and kAdded, which begins at column + row[i]
  const A* tap_weight;  // of Column::kDepthwise, of each channel
  A* grad_tap_weight;   // likewise, added to
  A* dots;              // Σ_c gradient[c] X(q)[c] for each corner q
};

// Stores the first `count` elements of a register. A whole one is stored at once: a copy of a size
// that the compiler does not know would wait for the register to reach the cache.
template <typename A>
inline void store_some(A* target, register_t<A> value, int64_t count) {
  if (count == kLanes<A>) {
    store_register(target, value);
  } else {
    std::memcpy(target, &value, count * sizeof(A));
  }
}

// The corners of one sample of RowSamples.
template <typename S, typename A>
struct RowCorners {
  const S* corner[4];
  A* grad_corner[4];
  A weight[4];
  int64_t row;  // of its gradient and its column
};

// The gradients of one sample, in the register of channels from number `c` on; see scatter().
template <bool wants_input, Column kind, bool wants_dots, typename S, typename A, typename L>
__attribute__((always_inline)) inline void scatter_register(const RowSamples<S, A, L>& at,
                                                            const RowCorners<S, A>& sample,
                                                            int64_t c, register_t<A> (&sums)[4]) {
  constexpr bool depthwise = kind == Column::kDepthwise, blends = kind != Column::kNone;
  const register_t<A> outer = load_register(at.gradient + sample.row + c);
  register_t<A> gradient = outer, blended = {};
  if constexpr (depthwise) gradient *= load_register(at.tap_weight + c);
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    if constexpr (blends || wants_dots) {
      const register_t<A> value = load_register(sample.corner[q] + c);
      if constexpr (blends) blended += sample.weight[q] * value;
      if constexpr (wants_dots) sums[q] += value * gradient;
    }
    if constexpr (wants_input) {
      A* target = sample.grad_corner[q] + c;
      store_register(target, load_register(target) + sample.weight[q] * gradient);
    }
  }
  if constexpr (kind == Column::kStored || kind == Column::kAdded) {
    L* target = at.column + sample.row + c;
    if constexpr (kind == Column::kAdded) blended += load_register(target);
    store_register(target, blended);
  }
  if constexpr (depthwise) {
    A* target = at.grad_tap_weight + c;
    store_register(target, load_register(target) + outer * blended);
  }
}

// The same in one channel.
template <bool wants_input, Column kind, bool wants_dots, typename S, typename A, typename L>
inline void scatter_channel(const RowSamples<S, A, L>& at, const RowCorners<S, A>& sample,
                            int64_t c, register_t<A> (&sums)[4]) {
  constexpr bool depthwise = kind == Column::kDepthwise, blends = kind != Column::kNone;
  const A outer = at.gradient[sample.row + c],
          gradient = depthwise ? outer * at.tap_weight[c] : outer;
  A blended = 0;
  for (int q = 0; q < 4; ++q) {
    if constexpr (blends || wants_dots) {
      const A value = load(sample.corner[q] + c);
      blended += sample.weight[q] * value;
      sums[q][0] += value * gradient;
    }
    if constexpr (wants_input) sample.grad_corner[q][c] += sample.weight[q] * gradient;
  }
  if constexpr (kind == Column::kStored || kind == Column::kAdded) {
    L* target = at.column + sample.row + c;
    if constexpr (kind == Column::kAdded) blended += load(target);
    store(target, blended);
  }
  if constexpr (depthwise) at.grad_tap_weight[c] += outer * blended;
}

// The gradients of one sample, for `count` channels, which are those of `kRegisters` registers
// unless that is 0.
template <int kRegisters, bool wants_input, Column kind, bool wants_dots, typename S, typename A,
          typename L>
__attribute__((always_inline)) inline void scatter_one(const RowSamples<S, A, L>& at, int64_t i,
                                                       int64_t count, register_t<A> (&sums)[4]) {
  RowCorners<S, A> sample;
  sample.row = at.row[i];
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    sample.corner[q] = reinterpret_cast<const S*>(at.corner[q * at.quantity + i]);
    if (wants_input)
      sample.grad_corner[q] = reinterpret_cast<A*>(at.grad_corner[q * at.quantity + i]);
    sample.weight[q] = at.weight[q * at.quantity + i];
    sums[q] = register_t<A>{};
  }
  constexpr int64_t lanes = kLanes<A>;
  if constexpr (kRegisters > 0) {
#pragma GCC unroll 8
    for (int j = 0; j < kRegisters; ++j) {
      scatter_register<wants_input, kind, wants_dots>(at, sample, j * lanes, sums);
    }
  } else {
    int64_t c = 0;
    for (; c + lanes <= count; c += lanes) {
      scatter_register<wants_input, kind, wants_dots>(at, sample, c, sums);
    }
    for (; c < count; ++c) scatter_channel<wants_input, kind, wants_dots>(at, sample, c, sums);
  }
}

// scatter() for channels as scatter_one() has them. Not inlined, so that the compiler has all
// registers for the addresses.
template <int kRegisters, bool wants_input, Column kind, bool wants_dots, typename S, typename A,
          typename L>
__attribute__((noinline)) void scatter_samples(const RowSamples<S, A, L>& samples, int64_t begin,
                                               int64_t end, int64_t count) {
  constexpr int64_t lanes = kLanes<A>;
  // A copy, as the compiler would otherwise read the pointers again after each store.
  const RowSamples<S, A, L> at = samples;
  register_t<A> pairs[4][lanes / 2] = {};
  for (int64_t first = begin; first < end; first += lanes) {
    const int64_t some = end - first < lanes ? end - first : lanes;
    register_t<A> last[4] = {};
    for (int64_t k = 0; k < some; ++k) {
      register_t<A> sums[4];
      scatter_one<kRegisters, wants_input, kind, wants_dots>(at, first + k, count, sums);
      for (int q = 0; wants_dots && q < 4; ++q) {
        if (k % 2 == 1) pairs[q][k / 2] = fold<A>(last[q], sums[q]);
        last[q] = sums[q];
      }
    }
    for (int q = 0; wants_dots && q < 4; ++q) {
      if (some % 2 == 1) pairs[q][some / 2] = fold<A>(last[q], register_t<A>{});
      store_some(at.dots + q * at.quantity + first, sums_of<A>(pairs[q]), some);
    }
  }
}

// For samples [begin, end) and `count` channels: adds to the gradients of their corners, and
// computes the rest of RowSamples.
template <bool wants_input, Column kind, bool wants_dots, typename S, typename A, typename L>
inline void scatter(const RowSamples<S, A, L>& samples, int64_t begin, int64_t end, int64_t count) {
  constexpr int64_t lanes = kLanes<A>;
  if (count == lanes) {
    scatter_samples<1, wants_input, kind, wants_dots>(samples, begin, end, count);
  } else if (count == 2 * lanes) {
    scatter_samples<2, wants_input, kind, wants_dots>(samples, begin, end, count);
  } else if (count == 4 * lanes) {
    scatter_samples<4, wants_input, kind, wants_dots>(samples, begin, end, count);
  } else if (count == 8 * lanes) {
    scatter_samples<8, wants_input, kind, wants_dots>(samples, begin, end, count);
  } else {
    scatter_samples<0, wants_input, kind, wants_dots>(samples, begin, end, count);
  }
}

// The gradients of y, x and the modulation, from the dot product at each corner.
template <typename A>
inline void sample_gradients(const A (&dots)[4], A fraction_y, A fraction_x, A modulation,
                             A (&gradient)[3]) {
  const A low_y = weight_along(fraction_y, 0), low_x = weight_along(fraction_x, 0);
  const A upper = low_x * dots[0] + fraction_x * dots[1];
  const A lower = low_x * dots[2] + fraction_x * dots[3];
  gradient[0] = modulation * (lower - upper);
  gradient[1] = modulation * (low_y * (dots[1] - dots[0]) + fraction_y * (dots[3] - dots[2]));
  gradient[2] = low_y * upper + fraction_y * lower;
}

// Σ_c gradient[c] X(q)[c] of some samples, for each corner q.
template <typename A, int kMost>
struct SampleDots {
  A of[4][kMost];
};
// The gradients of y, x and the modulation of some samples.
template <typename A, int kMost>
struct ThreeGradients {
  A of[3][kMost];
};

// The same for the first `count` samples in an image of this size.
template <typename A, int kMost>
inline void set_sample_gradients(int64_t image_height, int64_t image_width,
                                 const Samples<A, kMost>& samples, int64_t count,
                                 const SampleDots<A, kMost>& dots,
                                 ThreeGradients<A, kMost>& gradients) {
  const int32_t height = static_cast<int32_t>(image_height);
  const int32_t width = static_cast<int32_t>(image_width);
  for (int64_t i = 0; i < count; ++i) {
    // The dots of a corner that does not exist are those of whatever stands in for it.
    const int32_t top = samples.row_exists(0, i, height);
    const int32_t low = samples.row_exists(1, i, height);
    const int32_t first = samples.column_exists(0, i, width);
    const int32_t last = samples.column_exists(1, i, width);
    const A dot[4] = {
        (top & first) != 0 ? dots.of[0][i] : A(0), (top & last) != 0 ? dots.of[1][i] : A(0),
        (low & first) != 0 ? dots.of[2][i] : A(0), (low & last) != 0 ? dots.of[3][i] : A(0)};
    A gradient[3];
    sample_gradients(dot, samples.fraction_y[i], samples.fraction_x[i], samples.modulation[i],
                     gradient);
    for (int k = 0; k < 3; ++k) gradients.of[k][i] = gradient[k];
  }
}

}  // namespace
}  // namespace mmdcn
