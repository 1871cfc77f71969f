// Blocks of the CUDA kernels on the host: see mmdcn/csrc/cuda/context.h.
//
// A block has kRows x kColumns threads, of the operating system where there is more than one. What
// GPU memory checkers look for is made visible: shared memory starts poisoned, so that reading what
// no thread wrote gives NaN, and every element of a result must be stored exactly once.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../../mmdcn/csrc/cuda/context.h"

namespace mmdcn::cuda {

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

// Poisons a result, and checks when it goes away that every element was stored once.
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

template <int kRows_, int kColumns_>
class HostContext {
 public:
  static constexpr int kRows = kRows_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kThreads = kRows * kColumns;

  HostContext(int thread, int64_t block, int64_t blocks, pthread_barrier_t* barrier)
      : thread_(thread), block_(block), blocks_(blocks), barrier_(barrier) {}

  int thread() const { return thread_; }
  int64_t block() const { return block_; }
  int64_t blocks() const { return blocks_; }
  void sync() const {
    if (kThreads > 1) pthread_barrier_wait(barrier_);
  }

  template <typename T>
  void atomic_add(T* address, T value) const {
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    *address += value;
  }

  template <typename T>
  void store(T* address, T value) const {
    if (!is_poison(*address)) ++rewritten;
    *address = value;
  }

 private:
  int thread_;
  int64_t block_, blocks_;
  pthread_barrier_t* barrier_;
};

// Runs program(context, storage) for every thread of every block, one block after the other.
template <typename Ctx, typename Storage, typename Program>
void run_blocks(int64_t blocks, const Program& program) {
  const auto storage = std::make_unique<Storage>();
  for (int64_t block = 0; block < blocks; ++block) {
    std::memset(static_cast<void*>(storage.get()), kPoison, sizeof(Storage));
    if (Ctx::kThreads == 1) {
      program(Ctx(0, block, blocks, nullptr), *storage);
      continue;
    }
    pthread_barrier_t barrier;
    pthread_barrier_init(&barrier, nullptr, Ctx::kThreads);
    std::vector<std::thread> threads;
    for (int thread = 0; thread < Ctx::kThreads; ++thread) {
      threads.emplace_back(
          [&, thread] { program(Ctx(thread, block, blocks, &barrier), *storage); });
    }
    for (std::thread& thread : threads) thread.join();
    pthread_barrier_destroy(&barrier);
  }
}

}  // namespace mmdcn::cuda
