// Loops shared with whatever threads happen to be free.
//
// An algorithm of many short loops (0.1 ms) between serial steps cannot afford a fork and join for each: on a busy
// machine every join waits for a thread that is not running, milliseconds at a time. Here one fork serves the whole
// algorithm. The main thread publishes loops; helpers claim chunks of them while they are there. The main thread claims
// chunks too and waits only for chunks that a helper has begun, so a helper that never runs costs nothing.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>

#include "fork.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace spectral_kernels {

class Team {
 public:
  /// Room for `loops` shared loops; later ones run on the main thread alone.
  explicit Team(int64_t loops) : capacity_(loops), loops_(new Loop[static_cast<size_t>(loops)]) {}

  /// Runs main(), with the other threads of the pool helping in its `for_each` calls.
  template <class Main>
  void run(const Main& main) {
    fork_join(torch::stable::get_num_threads(), [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        if (thread != 0) {
          help();
          continue;
        }
        const Stop stop{stopped_};
        main();
      }
    });
  }

  /// body(begin, end) over chunks of [0, n). Results must not depend on which chunk a thread gets.
  template <class Body>
  void for_each(int64_t n, int64_t chunk, const Body& body) {
    if (n <= chunk || published_.load(std::memory_order_relaxed) == capacity_) {
      if (n > 0) body(int64_t{0}, n);
      return;
    }
    const int64_t mine = published_.load(std::memory_order_relaxed);
    Loop& loop = loops_[mine];
    loop.body = std::cref(body);
    loop.n = n;
    loop.chunk = chunk;
    published_.store(mine + 1, std::memory_order_release);
    work(loop);
    for (int64_t spins = 0; loop.done.load(std::memory_order_acquire) < n;) wait(spins);
  }

 private:
  struct Loop {
    std::function<void(int64_t, int64_t)> body;
    int64_t n = 0, chunk = 1;
    std::atomic<int64_t> next{0}, done{0};
  };

  struct Stop {
    std::atomic<bool>& stopped;
    ~Stop() { stopped.store(true, std::memory_order_release); }
  };

  // Now and then gives the processor up: the thread waited for may have been put onto this one.
  static void wait(int64_t& spins) {
    if (++spins % 256 == 0) {
      std::this_thread::yield();
      return;
    }
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  static void work(Loop& loop) {
    for (;;) {
      const int64_t begin = loop.next.fetch_add(loop.chunk, std::memory_order_relaxed);
      if (begin >= loop.n) return;
      const int64_t end = begin + loop.chunk < loop.n ? begin + loop.chunk : loop.n;
      loop.body(begin, end);
      loop.done.fetch_add(end - begin, std::memory_order_release);
    }
  }

  void help() {
    for (int64_t at = 0, spins = 0;;) {
      if (at < published_.load(std::memory_order_acquire)) {
        work(loops_[at++]);
        spins = 0;
      } else if (stopped_.load(std::memory_order_acquire)) {
        return;
      } else {
        wait(spins);
      }
    }
  }

  const int64_t capacity_;
  std::unique_ptr<Loop[]> loops_;
  std::atomic<int64_t> published_{0};
  std::atomic<bool> stopped_{false};
};

}  // namespace spectral_kernels
