// What the programs share that run kernels under the host's sanitizers: check_*.cpp. They see
// every access out of bounds, every undefined conversion and, between the threads of a block, every
// missing barrier.
//
//   check FIRST_SEED PROBLEMS THREADS
//
// draws problems, in buffers of exactly the right size, and runs them on blocks of one thread and
// on blocks of THREADS: 4, or 256 as on the GPU. Both must agree: to the bit, but for what is added
// atomically.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "draw.h"
#include "host_context.h"

namespace mmdcn::cuda {
namespace {

template <typename T>
T* data(std::vector<T>& values) {
  return values.empty() ? nullptr : values.data();
}
template <typename T>
const T* data(const std::vector<T>& values) {
  return values.empty() ? nullptr : values.data();
}

template <typename T>
bool differ(const char* name, const std::vector<T>& one, const std::vector<T>& several,
            T tolerance = 0) {
  for (size_t i = 0; i < one.size(); ++i) {
    if (!(std::abs(one[i] - several[i]) <= tolerance)) {
      std::printf("%s[%zu]: %g on one thread, %g on several\n", name, i,
                  static_cast<double>(one[i]), static_cast<double>(several[i]));
      return true;
    }
  }
  return false;
}

template <typename T>
struct Type {
  using type = T;
};

// Whether all problems agree; Check::agrees<Several, T>(seed) draws one and compares.
template <typename Check, typename Several>
bool all_agree(unsigned first, unsigned problems) {
  bool passed = true;
  for (unsigned seed = first; seed < first + problems; ++seed) {
    passed = Check::template agrees<Several, float>(seed) && passed;
    passed = Check::template agrees<Several, double>(seed) && passed;
  }
  return passed;
}

// The program's main().
template <typename Check>
int check_all(int argc, char** argv) {
  const int threads = argc == 4 ? std::atoi(argv[3]) : 0;
  if (threads != 4 && threads != 256) {
    std::fprintf(stderr, "usage: check FIRST_SEED PROBLEMS THREADS, THREADS being 4 or 256\n");
    return 2;
  }
  const unsigned first = std::atoi(argv[1]), problems = std::atoi(argv[2]);
  const bool passed = threads == 4 ? all_agree<Check, HostContext<4, 4>>(first, problems)
                                   : all_agree<Check, HostContext<256, 32>>(first, problems);
  std::printf("%u problems: %s\n", problems, passed ? "passed" : "FAILED");
  return passed ? 0 : 1;
}

}  // namespace
}  // namespace mmdcn::cuda
