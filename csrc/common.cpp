#include "common.h"

#include <cstdlib>

namespace spectral_kernels {
namespace {

std::atomic<bool> checks{true};

CpuPath widest_path() {
#if defined(SPECTRAL_KERNELS_X86)
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("fma");
  if (fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return CpuPath::kAvx512;
  }
  if (fma && __builtin_cpu_supports("avx2")) return CpuPath::kAvx2;
#endif
  return CpuPath::kBaseline;
}

CpuPath choose_path() {
  const CpuPath widest = widest_path();
  const char* const asked = std::getenv("SPECTRAL_KERNELS_CPU_PATH");
  if (asked == nullptr || *asked == '\0') return widest;
  const std::string name = asked;
  CpuPath path;
  if (name == "avx512") {
    path = CpuPath::kAvx512;
  } else if (name == "avx2") {
    path = CpuPath::kAvx2;
  } else if (name == "baseline") {
    path = CpuPath::kBaseline;
  } else {
    throw std::runtime_error("spectral_kernels: SPECTRAL_KERNELS_CPU_PATH = '" + name +
                             "' must be avx512, avx2 or baseline");
  }
  if (path > widest) {
    throw std::runtime_error("spectral_kernels: SPECTRAL_KERNELS_CPU_PATH = '" + name + "' is not on this processor");
  }
  return path;
}

}  // namespace

CpuPath cpu_path() {
  static const CpuPath path = choose_path();
  return path;
}

bool checks_enabled() { return checks.load(std::memory_order_relaxed); }

void set_checks_enabled(bool on) { checks.store(on); }

void throw_bad_row(const char* argument, int64_t batches, int64_t batch, int64_t row) {
  std::string message = "spectral_kernels: " + std::string(argument);
  if (batches > 1) message += " batch " + std::to_string(batch);
  throw std::runtime_error(message + " row " + std::to_string(row) + " holds NaN or Inf");
}

}  // namespace spectral_kernels
