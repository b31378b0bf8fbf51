// What every operator shares: the instruction set taken at run time, the NaN/Inf switch, tasks, scratch memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "fork.h"

namespace spectral_kernels {

enum class CpuPath { kBaseline, kAvx2, kAvx512 };

/// Widest instruction set that build and processor have; SPECTRAL_KERNELS_CPU_PATH may ask for a narrower one.
CpuPath cpu_path();

bool checks_enabled();
void set_checks_enabled(bool on);

/// Throws "<argument> row <i> holds NaN or Inf", with the batch named where there is more than one.
[[noreturn]] void throw_bad_row(const char* argument, int64_t batches, int64_t batch, int64_t row);

/// Lowest row reported to hold NaN or Inf, over all threads.
class BadRow {
 public:
  void report(int64_t row) {
    int64_t seen = row_.load();
    while (row < seen && !row_.compare_exchange_weak(seen, row)) {
    }
  }
  /// The lowest row reported, -1 when none was.
  int64_t row() const { return row_.load() == kNone ? -1 : row_.load(); }
  /// Throws when a row was reported; rows of a batched argument are numbered through, `rows` to a batch.
  void raise(const char* argument, int64_t batches, int64_t rows) const {
    const int64_t row = row_.load();
    if (row != kNone) throw_bad_row(argument, batches, row / rows, row % rows);
  }

 private:
  static constexpr int64_t kNone = INT64_MAX;
  std::atomic<int64_t> row_{kNone};
};

/// Runs task(i, scratch) for i in [0, n), in parallel unless n is 1, with scratch = make_scratch() once for each thread
/// that takes part. Tasks are cut by shape alone and never look at the thread that runs them, so that results are the
/// same for any number of threads; threads take them as they come free, so that a busy neighbour costs little.
template <class MakeScratch, class Task>
void parallel_tasks(int64_t n, const MakeScratch& make_scratch, const Task& task) {
  std::atomic<int64_t> next{0};
  const auto share = [&](int64_t, int64_t) {
    int64_t i = next.fetch_add(1);
    if (i >= n) return;
    auto scratch = make_scratch();
    for (; i < n; i = next.fetch_add(1)) task(i, scratch);
  };
  const int64_t threads = n <= 1 ? 1 : static_cast<int64_t>(torch::stable::get_num_threads());
  if (threads <= 1) {
    share(0, 1);
  } else {
    fork_join(threads < n ? threads : n, share);
  }
}

/// Runs task(i) as above.
template <class Task>
void parallel_tasks(int64_t n, const Task& task) {
  parallel_tasks(n, [] { return 0; }, [&](int64_t i, int) { task(i); });
}

/// Uninitialised memory aligned to a cache line.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size)
      : size_(size),
        data_(static_cast<T*>(::operator new(sizeof(T) * static_cast<size_t>(size > 0 ? size : 1), kAlign))) {}
  Buffer(Buffer&& other) noexcept : size_(std::exchange(other.size_, 0)), data_(std::exchange(other.data_, nullptr)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(size_, other.size_);
    std::swap(data_, other.data_);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (data_ != nullptr) ::operator delete(data_, kAlign);
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return size_; }
  void zero() {
    for (int64_t i = 0; i < size_; ++i) data_[i] = T(0);
  }

 private:
  static constexpr std::align_val_t kAlign{64};
  int64_t size_ = 0;
  T* data_ = nullptr;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace spectral_kernels
