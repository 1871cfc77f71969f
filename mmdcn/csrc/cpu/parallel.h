// The parallel loop of the CPU operators.
//
// It is torch's, on as many threads as torch has. A sanitized build (MMDCN_SANITIZE in setup.py)
// has threads of its own, as ThreadSanitizer does not see how those of OpenMP, which are torch's,
// wait for one another; and there it divides all work, however little, so that the races of large
// problems show in small ones.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#ifdef MMDCN_SANITIZED
#include <algorithm>
#include <exception>
#include <thread>
#include <vector>
#endif

namespace mmdcn {
namespace {

inline int64_t thread_count() { return torch::stable::get_num_threads(); }

// Calls `function(first, last)` for ranges that make up [begin, end), side by side. One is of
// `least` or more, but for the last. Of the exceptions that it throws, one comes out.
#ifdef MMDCN_SANITIZED
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t /* least */, const F& function) {
  const int64_t ranges = std::min(thread_count(), end - begin);
  if (ranges < 1) return;
  const auto border = [&](int64_t i) { return begin + (end - begin) * i / ranges; };
  std::vector<std::exception_ptr> thrown(ranges);
  const auto run = [&](int64_t i) {
    try {
      function(border(i), border(i + 1));
    } catch (...) {
      thrown[i] = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < ranges; ++i) threads.emplace_back(run, i);
  run(0);
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& exception : thrown) {
    if (exception) std::rethrow_exception(exception);
  }
}
#else
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t least, const F& function) {
  torch::stable::parallel_for(begin, end, least, function);
}
#endif

}  // namespace
}  // namespace mmdcn
