// Weighted sums of rows of channels, and their gradients, for operators that do without a matrix
// product: they find the pixels that they read and their weights, and sum here.
#pragma once

#include "simd.h"

namespace mmdcn {
namespace {

// The most rows that are added up before the sum is stored.
constexpr int64_t kMostRows = 64;

// Rows of channels inside a channels-last image, with their weights.
template <typename A>
struct WeightedRows {
  int64_t count = 0;
  int64_t position[kMostRows];  // of each row's first channel, in elements
  A weight[kMostRows];

  void add(int64_t first_channel, A row_weight) {
    position[count] = first_channel;
    weight[count++] = row_weight;
  }
};

// The sum of a register's elements, always added in the same order.
template <typename A>
inline A sum_of_lanes(register_t<A> value) {
  A lane[kLanes<A>];
  store_register(lane, value);
#pragma GCC unroll 4
  for (int half = kLanes<A> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

// add_rows() for the channels of kRegisters registers.
template <int kRegisters, typename T, typename A>
inline void add_rows_at(const T* image, const WeightedRows<A>& rows, A* target) {
  constexpr int64_t lanes = kLanes<A>;
  register_t<A> sum[kRegisters];
#pragma GCC unroll 4
  for (int k = 0; k < kRegisters; ++k) sum[k] = load_register(target + k * lanes);
  for (int64_t i = 0; i < rows.count; ++i) {
    const T* row = image + rows.position[i];
#pragma GCC unroll 4
    for (int k = 0; k < kRegisters; ++k) {
      sum[k] += rows.weight[i] * load_register(row + k * lanes);
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < kRegisters; ++k) store_register(target + k * lanes, sum[k]);
}

// target[c] += sum_i weight_i * row_i[c], for `channels` channels.
template <typename T, typename A>
inline void add_rows(const T* image, const WeightedRows<A>& rows, int64_t channels, A* target) {
  constexpr int64_t lanes = kLanes<A>;
  int64_t c = 0;
  for (; c + 4 * lanes <= channels; c += 4 * lanes) add_rows_at<4>(image + c, rows, target + c);
  for (; c + lanes <= channels; c += lanes) add_rows_at<1>(image + c, rows, target + c);
  for (; c < channels; ++c) {
    A sum = target[c];
    for (int64_t i = 0; i < rows.count; ++i) {
      sum += rows.weight[i] * load(image + rows.position[i] + c);
    }
    target[c] = sum;
  }
}

// The gradients of add_rows(), given the gradient `grad` of its target. Adds those of the rows to
// grad_image, unless that is null, and stores those of the weights, sum_c grad[c] row_i[c], if
// wants_weights. Several of the rows may be the same one.
template <bool wants_weights, typename T, typename A>
inline void add_rows_backward(const T* image, const WeightedRows<A>& rows, int64_t channels,
                              const A* grad, A* grad_image, A* grad_weight) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t whole = channels / lanes * lanes;
  for (int64_t first = 0; first < rows.count; first += 4) {
    const int64_t some = rows.count - first < 4 ? rows.count - first : 4;
    register_t<A> products[4] = {};
    A sums[4] = {};
    for (int64_t k = 0; k < some; ++k) {
      const int64_t position = rows.position[first + k];
      const A weight = rows.weight[first + k];
      for (int64_t c = 0; c < whole; c += lanes) {
        const register_t<A> gradient = load_register(grad + c);
        if constexpr (wants_weights) {
          products[k] += gradient * load_register(image + position + c);
        }
        if (grad_image) {
          A* target = grad_image + position + c;
          store_register(target, load_register(target) + weight * gradient);
        }
      }
    }
    if constexpr (wants_weights) {
      for (int k = 0; k < 4; ++k) sums[k] = sum_of_lanes<A>(products[k]);
    }
    for (int64_t k = 0; k < some; ++k) {
      const int64_t position = rows.position[first + k];
      for (int64_t c = whole; c < channels; ++c) {
        if constexpr (wants_weights) sums[k] += grad[c] * load(image + position + c);
        if (grad_image) grad_image[position + c] += rows.weight[first + k] * grad[c];
      }
      if constexpr (wants_weights) grad_weight[first + k] = sums[k];
    }
  }
}

}  // namespace
}  // namespace mmdcn
