// Blocks of the CUDA kernels on the host: see mmdcn/csrc/cuda/context.h.
//
// A block has one thread, or several of the operating system's. What GPU memory checkers look for
// is made visible: shared memory starts poisoned, so that reading what no thread wrote gives NaN,
// and every element of a result must be stored exactly once.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../../mmdcn/csrc/cuda/vector.h"

namespace mmdcn::cuda {

// Fewer blocks than there is work for, so that blocks stride over it.
constexpr int64_t kFewBlocks = 3;

constexpr unsigned char kPoison = 0xFF;

// Stores to an element that had been stored before.
inline std::atomic<int64_t> rewritten{0};

template <typename T>
bool is_poison(const T& value) {
  unsigned char bytes[sizeof(T)];
  std::memcpy(bytes, &value, sizeof(T));
  for (const unsigned char byte : bytes) {
    if (byte != kPoison) return false;
  }
  return true;
}

// Checks that every element of a result was stored once since it was poisoned.
template <typename T>
void expect_stored(const T* data, int64_t elements) {
  if (rewritten.exchange(0) != 0) throw std::runtime_error("an element was stored twice");
  for (int64_t i = 0; i < elements; ++i) {
    if (is_poison(data[i])) throw std::runtime_error("an element was never stored");
  }
}

template <typename T>
void poison(T* data, int64_t elements) {
  std::memset(static_cast<void*>(data), kPoison, elements * sizeof(T));
}

constexpr int kMostExchanged = 8;

// What the threads of a block share beside their storage.
struct HostBlock {
  int64_t number, blocks;
  pthread_barrier_t barrier;
  std::vector<double> exchange;  // kMostExchanged values of each thread
};

template <int kThreads_, int kLanes_>
class HostContext {
 public:
  static constexpr int kThreads = kThreads_;
  static constexpr int kLanes = kLanes_;

  HostContext(int thread, HostBlock* shared) : thread_(thread), shared_(shared) {}

  int thread() const { return thread_; }
  int64_t block() const { return shared_->number; }
  int64_t blocks() const { return shared_->blocks; }
  void sync() const {
    if (kThreads > 1) pthread_barrier_wait(&shared_->barrier);
  }

  // In the order in which the GPU's lanes add up.
  template <typename T, int N>
  void sum_lanes(T (&values)[N], int lanes) const {
    if (lanes == 1) return;
    const int first = thread_ / lanes * lanes;
    std::copy(values, values + N, &shared_->exchange[thread_ * kMostExchanged]);
    sync();
    for (int i = 0; i < N; ++i) {
      T sums[kLanes];
      for (int lane = 0; lane < lanes; ++lane) {
        sums[lane] = static_cast<T>(shared_->exchange[(first + lane) * kMostExchanged + i]);
      }
      for (int other = lanes / 2; other > 0; other /= 2) {
        T before[kLanes];
        std::copy(sums, sums + lanes, before);
        for (int lane = 0; lane < lanes; ++lane) sums[lane] = before[lane] + before[lane ^ other];
      }
      values[i] = sums[thread_ - first];
    }
    sync();
  }

  template <typename T, int N>
  void load(const T* address, Vector<T, N>& vector) const {
    require_alignment(address, sizeof(vector));
    std::memcpy(static_cast<void*>(&vector), address, sizeof(vector));
  }

  template <typename T>
  void store(T* address, T value) const {
    if (!is_poison(*address)) ++rewritten;
    *address = value;
  }
  template <typename T, int N>
  void store(T* address, const Vector<T, N>& vector) const {
    require_alignment(address, sizeof(vector));
    for (int i = 0; i < N; ++i) store(address + i, vector.value[i]);
  }

  template <typename T>
  void atomic_add(T* address, T value) const {
    const std::lock_guard<std::mutex> lock(atomic());
    *address += value;
  }
  template <typename T, int N>
  void atomic_add(T* address, const T (&values)[N]) const {
    require_alignment(address, sizeof(values));
    const std::lock_guard<std::mutex> lock(atomic());
    for (int i = 0; i < N; ++i) address[i] += values[i];
  }
  void atomic_max(int32_t* address, int32_t value) const {
    const std::lock_guard<std::mutex> lock(atomic());
    *address = std::max(*address, value);
  }

 private:
  static std::mutex& atomic() {
    static std::mutex mutex;
    return mutex;
  }
  static void require_alignment(const void* address, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
      throw std::runtime_error("an address is not aligned");
    }
  }

  int thread_;
  HostBlock* shared_;
};

struct NoStorage {};

// Runs program(context, storage) for every thread of every block, one block after the other.
template <typename Ctx, typename Storage, typename Program>
void run_blocks(int64_t blocks, const Program& program) {
  const auto storage = std::make_unique<Storage>();
  for (int64_t block = 0; block < blocks; ++block) {
    std::memset(static_cast<void*>(storage.get()), kPoison, sizeof(Storage));
    HostBlock shared = {block, blocks, {}, std::vector<double>(Ctx::kThreads * kMostExchanged)};
    if (Ctx::kThreads == 1) {
      program(Ctx(0, &shared), *storage);
      continue;
    }
    pthread_barrier_init(&shared.barrier, nullptr, Ctx::kThreads);
    std::vector<std::thread> threads;
    for (int thread = 0; thread < Ctx::kThreads; ++thread) {
      threads.emplace_back([&, thread] { program(Ctx(thread, &shared), *storage); });
    }
    for (std::thread& thread : threads) thread.join();
    pthread_barrier_destroy(&shared.barrier);
  }
}

}  // namespace mmdcn::cuda
