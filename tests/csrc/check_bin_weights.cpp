// Compares the weights and slopes of a bin's pixels in RoI pooling, which are products of one
// factor for each dimension, with the average of Corners over the bin's grid of samples: prints
// what differs, and fails.
#include <cmath>
#include <cstdio>
#include <limits>
#include <map>
#include <random>
#include <vector>

#include "../../mmdcn/csrc/deform_roi_pool_shape.h"

namespace {

using mmdcn::BinPixel;
using mmdcn::BinSamples;

int failures = 0;

struct Pixel {
  double weight = 0, slope_y = 0, slope_x = 0;
};
using Pixels = std::map<int64_t, Pixel>;  // by their position in the feature map

Pixels average_of_samples(const BinSamples<double>& y, const BinSamples<double>& x) {
  Pixels pixels;
  const double count = double(y.count) * double(x.count);
  for (int64_t i = 0; i < y.count; ++i) {
    for (int64_t j = 0; j < x.count; ++j) {
      mmdcn::Corners<double, 2> corners;
      if (!corners.locate_with_border({y.at(i), x.at(j)}, {y.size, x.size})) continue;
      for (int q = 0; q < corners.kCount; ++q) {
        if (corners.position[q] < 0) continue;
        Pixel& pixel = pixels[corners.position[q]];
        pixel.weight += corners.weight[q] / count;
        pixel.slope_y += corners.weight_gradient[0][q] / count;
        pixel.slope_x += corners.weight_gradient[1][q] / count;
      }
    }
  }
  return pixels;
}

std::vector<BinPixel<double>> listed(const BinSamples<double>& samples) {
  std::vector<BinPixel<double>> list(samples.size);
  int64_t begin, end;
  samples.reaching(begin, end);
  list.resize(samples.list_pixels(begin, end, list.data()));
  return list;
}

Pixels products(const BinSamples<double>& y, const BinSamples<double>& x) {
  Pixels pixels;
  for (const auto& row : listed(y)) {
    for (const auto& column : listed(x)) {
      const int64_t position = row.position * x.size + column.position;
      if (pixels.count(position)) {
        std::printf("pixel %ld is listed twice\n", long(position));
        ++failures;
      }
      pixels[position] = {row.weight * column.weight, row.slope * column.weight,
                          row.weight * column.slope};
    }
  }
  return pixels;
}

void expect_same(const BinSamples<double>& y, const BinSamples<double>& x) {
  const Pixels expected = average_of_samples(y, x), actual = products(y, x);
  const auto close = [](double a, double b) { return std::abs(a - b) <= 1e-12; };
  bool same = actual.size() == expected.size();
  for (const auto& [position, pixel] : expected) {
    const auto found = actual.find(position);
    same = same && found != actual.end() && close(found->second.weight, pixel.weight) &&
           close(found->second.slope_y, pixel.slope_y) &&
           close(found->second.slope_x, pixel.slope_x);
  }
  if (same) return;
  std::printf("bin from (%.17g, %.17g), length (%.17g, %.17g), %ld x %ld samples\n", y.start,
              x.start, y.length, x.length, long(y.count), long(x.count));
  ++failures;
}

}  // namespace

int main() {
  std::mt19937 generator(0);
  using Limits = std::numeric_limits<double>;
  const double special[] = {Limits::quiet_NaN(), Limits::infinity(), Limits::max(), -1, 0, 7};
  const auto draw = [&](double low, double high) {
    if (generator() % 8 == 0) return special[generator() % 6];
    return std::uniform_real_distribution<double>(low, high)(generator);
  };
  for (int round = 0; round < 2000; ++round) {
    const auto bin = [&]() -> BinSamples<double> {
      const int64_t size = 1 + generator() % 9, count = generator() % 12;
      return {draw(-4, double(size) + 3), draw(-3, double(size) + 3), count, size};
    };
    const BinSamples<double> y = bin(), x = bin();
    expect_same(y, x);
  }
  return failures > 0;
}
