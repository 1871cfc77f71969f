// Random problems for the programs that run kernels on the host.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

namespace mmdcn::cuda {
namespace {

class Draw {
 public:
  explicit Draw(unsigned seed) : engine_(seed) {}

  int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine_);
  }
  int64_t one_of(const std::vector<int64_t>& values) {
    return values[between(0, values.size() - 1)];
  }
  int64_t divisor(int64_t number) {
    std::vector<int64_t> divisors;
    for (int64_t d = 1; d <= number; ++d) {
      if (number % d == 0) divisors.push_back(d);
    }
    return one_of(divisors);
  }
  template <typename T>
  std::vector<T> normal(int64_t elements, T spread) {
    std::vector<T> values(elements);
    std::normal_distribution<T> distribution(0, spread);
    for (T& value : values) value = distribution(engine_);
    return values;
  }

 private:
  std::mt19937 engine_;
};

}  // namespace
}  // namespace mmdcn::cuda
