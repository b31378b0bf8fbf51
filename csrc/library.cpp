// Schemas of the C++ operators. Each operator's file registers its own CPU implementation; the few operators without a
// tensor argument are registered here.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "common.h"

namespace spectral_kernels {
namespace {

/// Threads that took part in one parallel_for over `n` slices: 1 when the extension was built without OpenMP.
int64_t parallel_threads(int64_t n) {
  if (n < 1) throw std::runtime_error("spectral_kernels: n = " + std::to_string(n) + " must be at least 1");
  std::vector<std::thread::id> seen(static_cast<size_t>(n));
  std::atomic<int64_t> arrived{0};
  parallel_tasks(n, [&](int64_t i) {
    seen[static_cast<size_t>(i)] = std::this_thread::get_id();
    // a slice that ended at once would let one thread do everything without any being at fault
    arrived.fetch_add(1);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(2);
    while (arrived.load() < n && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
  });
  int64_t distinct = 0;
  for (size_t i = 0; i < seen.size(); ++i) {
    bool first = true;
    for (size_t j = 0; j < i; ++j) first = first && seen[j] != seen[i];
    distinct += first;
  }
  return distinct;
}

std::string cpu_path_name() {
  switch (cpu_path()) {
    case CpuPath::kAvx512:
      return "avx512";
    case CpuPath::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

void set_checks(bool on) { set_checks_enabled(on); }

}  // namespace
}  // namespace spectral_kernels

STABLE_TORCH_LIBRARY(spectral_kernels_cpp, m) {
  m.def("parallel_threads(int n) -> int");
  m.def("cpu_path() -> str");
  m.def("set_checks(bool on) -> ()");
  m.def("covariance(Tensor z, bool center, bool normalize, int correction, str precision) -> Tensor");
  m.def(
      "covariance_backward(Tensor grad, Tensor z, bool center, bool normalize, int correction, str precision)"
      " -> Tensor");
  m.def("covariance_mean(Tensor z, bool center, bool normalize, int correction) -> (Tensor, Tensor)");
  m.def("spectrum(Tensor z, bool center, bool normalize) -> Tensor");
  m.def("batch_spectrum(Tensor pool, Tensor indices, bool center, bool normalize) -> Tensor");
  m.def("effective_rank2(Tensor z, bool center, bool normalize, bool unbiased) -> Tensor");
  m.def("effective_rank2_backward(Tensor grad, Tensor z, bool center, bool normalize, bool unbiased) -> Tensor");
  m.def("batch_effective_rank2(Tensor pool, Tensor indices, bool center, bool normalize) -> Tensor");
  m.def(
      "batch_effective_rank2_backward(Tensor grad, Tensor pool, Tensor indices, bool center, bool normalize)"
      " -> Tensor");
  m.def("whiten_apply(Tensor z, Tensor mean, Tensor matrix, bool lower) -> Tensor");
  m.def(
      "whiten_apply_backward(Tensor grad, Tensor z, Tensor grad_mean, Tensor mean, Tensor matrix, Tensor outer,"
      " Tensor offset) -> Tensor");
  m.def(
      "whiten_cholesky_backward(Tensor grad, Tensor y, Tensor z, Tensor grad_mean, Tensor y_mean, Tensor mean,"
      " Tensor matrix, Tensor inner, Tensor scale) -> Tensor");
  m.def(
      "cross_moment(Tensor left, Tensor right, Tensor? shift, bool center, bool upper)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "info_nce(Tensor query, Tensor key, Tensor? queue, float temperature, Tensor? mask, Tensor? groups,"
      " Tensor? queue_groups, str precision) -> (Tensor, Tensor)");
  m.def(
      "info_nce_backward(Tensor grad, Tensor query, Tensor key, Tensor? queue, Tensor loss, Tensor lse,"
      " float temperature, Tensor? mask, Tensor? groups, Tensor? queue_groups, str precision, bool queue_gradient,"
      " bool temperature_gradient) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("nt_xent(Tensor z0, Tensor z1, float temperature, Tensor? groups, str precision) -> (Tensor, Tensor)");
  m.def(
      "nt_xent_backward(Tensor grad, Tensor z0, Tensor z1, Tensor loss, Tensor lse, float temperature,"
      " Tensor? groups, str precision, bool temperature_gradient) -> (Tensor, Tensor, Tensor)");
  m.def(
      "info_nce_grad_norms(Tensor query, Tensor key, Tensor? queue, float temperature, str loss, str precision)"
      " -> Tensor");
  m.def(
      "greedy_select(Tensor pool, Tensor start, Tensor? draws, Tensor? valid, Tensor seed, int k,"
      " str objective, bool normalize) -> (Tensor, Tensor, Tensor)");
  m.def(
      "memory_bank_update(Tensor(a!) embeddings, Tensor(b!) updated, Tensor active, Tensor indices, Tensor z, int step)"
      " -> int");
  m.def("memory_bank_gather(Tensor embeddings, Tensor indices) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(spectral_kernels_cpp, CompositeExplicitAutograd, m) {
  m.impl("parallel_threads", TORCH_BOX(&spectral_kernels::parallel_threads));
  m.impl("cpu_path", TORCH_BOX(&spectral_kernels::cpu_path_name));
  m.impl("set_checks", TORCH_BOX(&spectral_kernels::set_checks));
}
