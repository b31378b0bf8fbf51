// Greedy selection on the CPU as an operator of torch: arguments, batches of pools, and how wide the dot products are.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common.h"
#include "gather.h"
#include "greedy_builder.h"

namespace spectral_kernels {

namespace avx512 {
template <typename T>
const GreedyKernels<T>& kernels();
}
namespace avx2 {
template <typename T>
const GreedyKernels<T>& kernels();
}
namespace baseline {
template <typename T>
const GreedyKernels<T>& kernels();
}

template <typename T>
const GreedyKernels<T>& greedy_kernels() {
#ifdef SPECTRAL_KERNELS_X86
  switch (cpu_path()) {
    case CpuPath::kAvx512:
      return avx512::kernels<T>();
    case CpuPath::kAvx2:
      return avx2::kernels<T>();
    default:
      break;
  }
#endif
  return baseline::kernels<T>();
}

namespace {

RowType row_type(const Tensor& pool) {
  switch (pool.scalar_type()) {
    case ScalarType::Double:
      return RowType::kDouble;
    case ScalarType::Float:
      return RowType::kFloat;
    case ScalarType::BFloat16:
      return RowType::kBFloat16;
    default:
      return RowType::kHalf;
  }
}

struct Arguments {
  const Tensor& pool;
  const Tensor& start;
  const std::optional<Tensor>& draws;
  const std::optional<Tensor>& valid;
  const Tensor& seed;
  Options options;
};

// One selection's picks, and its traces as V.
template <typename V>
struct Output {
  int64_t* indices;
  V *ranks, *objectives;
  int64_t *bad_row, *long_row;
};

// T is what dot products are taken in. Returns whether it was wide enough.
template <typename T, typename V>
bool build(const Source& source, const Options& options, const int64_t* start, int64_t starts, const int64_t* draws,
           int64_t m, int64_t seed, Output<V>& output) {
  Builder<T> builder(source, options, start, starts, draws, m, seed, output.indices);
  if (!builder.run()) return false;
  *output.bad_row = builder.bad_row();
  *output.long_row = builder.long_row();
  const Picked<T>& picked = builder.picked();
  std::copy(picked.ranks.begin(), picked.ranks.end(), output.ranks);
  std::copy(picked.objectives.begin(), picked.objectives.end(), output.objectives);
  return true;
}

// V is the type of the traces, and of the dot products where it tells the rows apart.
template <typename V>
void select(const Arguments& a, Tensor& indices, Tensor& ranks, Tensor& objectives) {
  const Tensor& pool = a.pool;
  const int64_t batches = pool.size(0), n = pool.size(1), k = a.options.k;
  const int64_t m = a.draws ? a.draws->size(2) : 0, starts = a.start.size(1);
  const RowType type = row_type(pool);
  const int64_t element = type == RowType::kDouble ? 8 : type == RowType::kFloat ? 4 : 2;
  std::vector<int64_t> bad(batches, -1), too_long(batches, -1);
  fork_join(batches, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const char* data = static_cast<const char*>(pool.data_ptr()) + b * pool.stride(0) * element;
      const bool* valid = a.valid ? static_cast<const bool*>(a.valid->data_ptr()) + b * n : nullptr;
      const int64_t* draws = a.draws ? static_cast<const int64_t*>(a.draws->data_ptr()) + b * k * m : nullptr;
      const int64_t* start = static_cast<const int64_t*>(a.start.data_ptr()) + b * starts;
      const Source source{data, type, element, pool.stride(1), n, pool.size(2), valid};
      Output<V> output{static_cast<int64_t*>(indices.data_ptr()) + b * k, static_cast<V*>(ranks.data_ptr()) + b * k,
                       static_cast<V*>(objectives.data_ptr()) + b * k, &bad[b], &too_long[b]};
      const int64_t seed = static_cast<const int64_t*>(a.seed.data_ptr())[b];
      const auto builds = [&](auto zero, const Source& from) {
        return build<decltype(zero)>(from, a.options, start, starts, draws, m, seed, output);
      };
      if (builds(V{}, source) || (!std::is_same_v<V, double> && builds(double{}, source))) continue;
      builds(double{}, source.in_range());
    }
  });
  for (int64_t b = 0; b < batches; ++b) {
    if (bad[b] >= 0) throw_bad_row("pool", batches, b, bad[b]);
    if (too_long[b] >= 0) {
      throw std::runtime_error("spectral_kernels: pool " + (batches > 1 ? "batch " + std::to_string(b) + " " : "") +
                               "row " + std::to_string(too_long[b]) +
                               " is too long for the log-determinant: float64 does not resolve what it adds; "
                               "normalise the rows");
    }
  }
}

/// Rows that a mask (b, N) leaves of the pool of which it leaves the fewest.
int64_t fewest_left(const Tensor& valid) {
  const bool* mask = static_cast<const bool*>(valid.const_data_ptr());
  const int64_t n = valid.size(1);
  int64_t fewest = n;
  for (int64_t b = 0; b < valid.size(0); ++b)
    fewest = std::min<int64_t>(fewest, std::count(mask + b * n, mask + (b + 1) * n, true));
  return fewest;
}

std::tuple<Tensor, Tensor, Tensor> greedy_select(const Tensor& pool_, const Tensor& start_, std::optional<Tensor> draws,
                                                 std::optional<Tensor> valid, const Tensor& seed_, int64_t k,
                                                 std::string objective, bool normalize) {
  const Tensor pool = pool_.stride(2) == 1 ? pool_ : torch::stable::contiguous(pool_);
  const int64_t n = pool.size(1);
  const Tensor start = checked_indices(start_, n, "start");
  if (draws) draws = checked_indices(*draws, n, "draws");
  if (valid) {
    valid = torch::stable::contiguous(*valid);
    const int64_t left = fewest_left(*valid);
    if (left < k) {
      throw std::runtime_error("spectral_kernels: valid leaves " + std::to_string(left) + " rows, but " +
                               std::to_string(k) + " are to be picked");
    }
  }
  const Tensor seed = torch::stable::contiguous(seed_);
  const Arguments arguments{pool, start, draws, valid, seed, {k, !draws, objective == "logdet", normalize}};
  const bool wide = pool.scalar_type() == ScalarType::Double;
  const ScalarType values = wide ? ScalarType::Double : ScalarType::Float;
  Tensor indices = torch::stable::new_empty(pool, {pool.size(0), k}, ScalarType::Long);
  Tensor ranks = torch::stable::new_empty(pool, {pool.size(0), k}, values);
  Tensor objectives = torch::stable::new_empty(pool, {pool.size(0), k}, values);
  if (wide) {
    select<double>(arguments, indices, ranks, objectives);
  } else {
    select<float>(arguments, indices, ranks, objectives);
  }
  return {indices, ranks, objectives};
}

}  // namespace
}  // namespace spectral_kernels

STABLE_TORCH_LIBRARY_IMPL(spectral_kernels_cpp, CPU, m) {
  m.impl("greedy_select", TORCH_BOX(&spectral_kernels::greedy_select));
}
