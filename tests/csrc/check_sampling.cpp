// Compares CornerArrays of sampling.h with Corners, bit by bit: prints what differs, and fails.
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>

#include "../../mmdcn/csrc/sampling.h"

namespace {

constexpr int kSamples = 64;
int failures = 0;

template <typename coord_t>
void expect_same(coord_t actual, coord_t expected, const char* what, coord_t y, coord_t x, int q) {
  if (std::memcmp(&actual, &expected, sizeof(coord_t)) == 0) return;
  std::printf("%s of corner %d at (%.17g, %.17g): %.17g, not %.17g\n", what, q, double(y),
              double(x), double(actual), double(expected));
  ++failures;
}

template <typename coord_t>
void check(const coord_t (&y)[kSamples], const coord_t (&x)[kSamples], int64_t height,
           int64_t width) {
  mmdcn::CornerArrays<coord_t, kSamples> arrays;
  bool there[kSamples];
  for (int i = 0; i < kSamples; ++i) there[i] = arrays.locate(i, y[i], x[i], height, width);
  for (int i = 0; i < kSamples; ++i) {
    mmdcn::Corners<coord_t, 2> corners;
    const bool located = corners.locate({y[i], x[i]}, {height, width});
    expect_same<coord_t>(there[i], located, "contribution", y[i], x[i], -1);
    for (int q = 0; q < 4; ++q) {
      const bool exists = arrays.exists(q, i, int32_t(height), int32_t(width));
      expect_same<coord_t>(exists, located && corners.position[q] >= 0, "existence", y[i], x[i], q);
      if (!exists || !located) continue;
      const int64_t position = (arrays.low_y[i] + (q >> 1)) * width + arrays.low_x[i] + (q & 1);
      expect_same<coord_t>(coord_t(position), coord_t(corners.position[q]), "position", y[i], x[i],
                           q);
      expect_same(arrays.weight(q, i), corners.weight[q], "weight", y[i], x[i], q);
      expect_same(arrays.slope_y(q, i), corners.weight_gradient[0][q], "slope_y", y[i], x[i], q);
      expect_same(arrays.slope_x(q, i), corners.weight_gradient[1][q], "slope_x", y[i], x[i], q);
    }
  }
}

template <typename coord_t>
void check_all(int64_t height, int64_t width) {
  std::mt19937 generator(static_cast<unsigned>(height * 100 + width));
  using Limits = std::numeric_limits<coord_t>;
  const coord_t special[] = {Limits::quiet_NaN(), Limits::infinity(), -Limits::infinity(),
                             Limits::max(),       Limits::lowest(),   coord_t(-1),
                             -Limits::epsilon(),  coord_t(3e9),       coord_t(-1e-30)};
  for (int round = 0; round < 200; ++round) {
    coord_t y[kSamples], x[kSamples];
    for (int i = 0; i < kSamples; ++i) {
      const auto draw = [&](int64_t size) {
        const auto kind = generator() % 8;
        if (kind == 0) return special[generator() % 9];
        const coord_t p = std::uniform_real_distribution<coord_t>(-2, coord_t(size + 1))(generator);
        return kind == 1 ? coord_t(int64_t(p)) : p;
      };
      y[i] = draw(height);
      x[i] = draw(width);
    }
    check(y, x, height, width);
  }
}

}  // namespace

int main() {
  for (int64_t height : {1, 2, 7}) {
    for (int64_t width : {1, 5}) {
      check_all<float>(height, width);
      check_all<double>(height, width);
    }
  }
  return failures > 0;
}
