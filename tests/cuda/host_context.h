// Blocks of the CUDA kernels on the host: see mmdcn/csrc/cuda/context.h.
//
// A block has kRows x kColumns threads, of the operating system where there is more than one. What
// GPU memory checkers look for is made visible: shared memory starts poisoned, so that reading what
// no thread wrote gives NaN, and every element of a result must be stored exactly once.
// Asynchronous copies poison their target when they are asked for and are made when they are waited
// for, so that it shows if somebody still reads the target, or already does.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../../mmdcn/csrc/cuda/context.h"
#include "../../mmdcn/csrc/cuda/deform_conv2d/tensor_core_tile.h"

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

// A number as tensor cores take it: float in TF32, with 10 bits of significand, rounded as
// cvt.rna.tf32.f32 does.
template <typename T>
float as_multiplied(T value) {
  return static_cast<float>(value);
}
inline float as_multiplied(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
  bits = finite ? (bits + 0x1000u) & ~0x1FFFu : bits;
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
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
    const std::lock_guard<std::mutex> lock(atomic());
    *address += value;
  }
  void atomic_add(float* address, const float (&values)[4]) const {
    require_alignment(address, 16);
    const std::lock_guard<std::mutex> lock(atomic());
    for (int i = 0; i < 4; ++i) address[i] += values[i];
  }
  void atomic_max(int32_t* address, int32_t value) const {
    const std::lock_guard<std::mutex> lock(atomic());
    *address = std::max(*address, value);
  }

  template <typename T>
  void store(T* address, T value) const {
    if (!is_poison(*address)) ++rewritten;
    *address = value;
  }
  template <typename T, int kLength>
  void store(T* address, const Vector<T, kLength>& vector) const {
    require_alignment(address, sizeof(vector));
    T values[kLength];
    std::memcpy(static_cast<void*>(values), &vector, sizeof(vector));
    for (int i = 0; i < kLength; ++i) store(address + i, values[i]);
  }

  template <typename T, typename V>
  void load(const T* address, V& vector) const {
    require_alignment(address, sizeof(V));
    std::memcpy(&vector, address, sizeof(V));
  }

  template <typename T, int kLength>
  void load_shared(const T* address, Vector<T, kLength>& vector) const {
    load(address, vector);
  }
  template <typename T, int kLength>
  void store_shared(T* address, const Vector<T, kLength>& vector) const {
    require_alignment(address, sizeof(vector));
    std::memcpy(static_cast<void*>(address), &vector, sizeof(vector));
  }

  template <typename T, int kLength>
  void unpack(const Vector<T, kLength>& vector, float (&values)[kLength]) const {
    T elements[kLength];
    std::memcpy(static_cast<void*>(elements), &vector, sizeof(vector));
    for (int i = 0; i < kLength; ++i) values[i] = static_cast<float>(elements[i]);
  }
  template <typename T, int kLength>
  void pack(const float (&values)[kLength], Vector<T, kLength>& vector) const {
    T elements[kLength];
    for (int i = 0; i < kLength; ++i) elements[i] = static_cast<T>(values[i]);
    std::memcpy(&vector, elements, sizeof(vector));
  }

  template <typename T>
  void copy_async(T* shared, const T* global, bool exists) const {
    require_alignment(shared, 16);
    require_alignment(global, 16);
    std::memset(static_cast<void*>(shared), kPoison, 16);
    copies_.push_back({shared, exists ? global : nullptr});
  }
  void commit() const {
    groups_.push_back(copies_.size());
    pending_.insert(pending_.end(), copies_.begin(), copies_.end());
    copies_.clear();
  }
  template <int kPending>
  void wait() const {
    for (; groups_.size() > kPending; groups_.pop_front()) {
      for (size_t i = 0; i < groups_.front(); ++i, pending_.pop_front()) pending_.front().make();
    }
  }

  template <int kM, int kN>
  class TensorProduct {
    static constexpr int kHeight = kM / kRows_, kWidth = kN / kColumns_;
    float value_[kHeight][kWidth];

   public:
    void clear() {
      for (auto& row : value_) std::fill(row, row + kWidth, 0.0f);
    }

    template <typename T, Lines kLeftLines, Lines kRightLines>
    void add(const HostContext& ctx, const Operand<T, kM, kLeftLines>& left,
             const Operand<T, kN, kRightLines>& right, int part) {
      constexpr int kLength = kStep<T> / kParts;
      const int row = ctx.thread() / kColumns_ * kHeight,
                column = ctx.thread() % kColumns_ * kWidth;
      for (int k = part * kLength; k < (part + 1) * kLength; ++k) {
        float a[kHeight], b[kWidth];
        for (int i = 0; i < kHeight; ++i) a[i] = as_multiplied(left.at(row + i, k));
        for (int j = 0; j < kWidth; ++j) b[j] = as_multiplied(right.at(column + j, k));
        for (int i = 0; i < kHeight; ++i) {
          for (int j = 0; j < kWidth; ++j) value_[i][j] += a[i] * b[j];
        }
      }
    }

    template <typename Visit>
    void for_each(const HostContext& ctx, const Visit& visit) const {
      const int row = ctx.thread() / kColumns_ * kHeight,
                column = ctx.thread() % kColumns_ * kWidth;
      for (int i = 0; i < kHeight; ++i) {
        for (int j = 0; j < kWidth; j += 2) {
          const float pair[2] = {value_[i][j], value_[i][j + 1]};
          visit(row + i, column + j, pair);
        }
      }
    }
  };

 private:
  // 16 bytes, or zeros.
  struct Copy {
    void* to;
    const void* from;

    void make() const {
      if (from) {
        std::memcpy(to, from, 16);
      } else {
        std::memset(to, 0, 16);
      }
    }
  };

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
  int64_t block_, blocks_;
  pthread_barrier_t* barrier_;
  mutable std::vector<Copy> copies_;   // of the group that is open
  mutable std::deque<Copy> pending_;   // of closed groups
  mutable std::deque<size_t> groups_;  // their sizes
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
