// One fork and join: torch's threads, or, under ThreadSanitizer, threads of our own. GCC's OpenMP runtime, whose
// threads torch's are, is not built for that sanitizer: it would call every barrier a race.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#if defined(__SANITIZE_THREAD__)
#include <algorithm>
#include <exception>
#include <thread>
#include <vector>
#endif

namespace spectral_kernels {

/// body(begin, end) over [0, n), cut for as many threads as torch may use. What a body throws is thrown on.
template <class Body>
void fork_join(int64_t n, const Body& body) {
#if defined(__SANITIZE_THREAD__)
  const int64_t parts = std::min<int64_t>(n, static_cast<int64_t>(torch::stable::get_num_threads()));
  std::vector<std::exception_ptr> errors(static_cast<size_t>(parts));
  std::vector<std::thread> threads;
  for (int64_t part = 0; part < parts; ++part) {
    threads.emplace_back([&, part] {
      try {
        body(n * part / parts, n * (part + 1) / parts);
      } catch (...) {
        errors[static_cast<size_t>(part)] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
#else
  torch::stable::parallel_for(0, n, 1, body);
#endif
}

}  // namespace spectral_kernels
