// Eigenvalues of the second moment or covariance of batches, in double whatever the rows are: products of rows,
// reduction to tridiagonal form one matrix to a thread, then the eigenvalues of as many matrices at a time as fit into
// vectors.

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <functional>
#include <limits>
#include <vector>

#include "gram.h"

namespace spectral_kernels {
namespace {

// Larger matrices go to LAPACK through torch: its blocked reduction then outweighs the batching here.
constexpr int64_t kLargestOwn = 384;

/// Matrices reduced to tridiagonal form, interleaved in groups as the eigenvalue kernel takes them, with their scales.
class Tridiagonals {
 public:
  Tridiagonals(int64_t count, int64_t size)
      : count_(count),
        size_(size),
        lanes_(eigen_kernels().lanes),
        diagonal_(ceil_div(count, lanes_) * lanes_ * size),
        off_diagonal_(ceil_div(count, lanes_) * lanes_ * size),
        scale_(static_cast<size_t>(count)) {
    diagonal_.zero();
    off_diagonal_.zero();
  }

  struct Scratch {
    Buffer<double> full, diagonal, off_diagonal, work;

    Scratch(int64_t size) : full(size * row(size)), diagonal(size), off_diagonal(size), work(4 * row(size)) {}
    // an odd number of cache lines, so that a column's entries do not fall on few sets of the cache
    static int64_t row(int64_t size) { return (ceil_div(size, 8) | 1) * 8; }
  };

  /// Matrix `index` from its upper triangle, times `factor`.
  void reduce(int64_t index, const double* upper, int64_t stride, double factor, Scratch& scratch) {
    const int64_t row = Scratch::row(size_);
    double trace = 0;
    for (int64_t i = 0; i < size_; ++i) trace += upper[i * stride + i];
    if (!(trace > 0)) return;
    // of trace 1, so that no square over- or underflows
    scale_[static_cast<size_t>(index)] = trace * factor;
    const double inverse = 1 / trace;
    double* const full = scratch.full.data();
    for (int64_t i = 0; i < size_; ++i) {
      for (int64_t j = i; j < size_; ++j) full[i * row + j] = upper[i * stride + j] * inverse;
      for (int64_t j = size_; j < row; ++j) full[i * row + j] = 0;
    }
    eigen_kernels().tridiagonalize(full, row, size_, scratch.diagonal.data(), scratch.off_diagonal.data(),
                                   scratch.work.data());
    const int64_t base = index / lanes_ * lanes_ * size_ + index % lanes_;
    for (int64_t i = 0; i < size_; ++i) diagonal_[base + i * lanes_] = scratch.diagonal[i];
    for (int64_t i = 0; i + 1 < size_; ++i) off_diagonal_[base + i * lanes_] = scratch.off_diagonal[i];
  }

  /// emit(index, values): eigenvalues of each matrix, descending.
  template <class Emit>
  void values(const Emit& emit) {
    std::atomic<bool> converged{true};
    parallel_tasks(ceil_div(count_, lanes_), [&](int64_t group) {
      double* const diagonal = diagonal_.data() + group * lanes_ * size_;
      if (!eigen_kernels().tridiagonal_values(diagonal, off_diagonal_.data() + group * lanes_ * size_, size_)) {
        converged = false;
      }
      std::vector<double> sorted(static_cast<size_t>(size_));
      for (int64_t lane = 0; lane < std::min(lanes_, count_ - group * lanes_); ++lane) {
        const int64_t index = group * lanes_ + lane;
        for (int64_t i = 0; i < size_; ++i) {
          sorted[static_cast<size_t>(i)] =
              std::max(0.0, diagonal[i * lanes_ + lane] * scale_[static_cast<size_t>(index)]);
        }
        std::sort(sorted.begin(), sorted.end(), std::greater<>());
        emit(index, sorted);
      }
    });
    if (!converged) throw std::runtime_error("spectral_kernels: the eigenvalue iteration did not converge");
  }

 private:
  const int64_t count_, size_, lanes_;
  Buffer<double> diagonal_, off_diagonal_;
  std::vector<double> scale_;
};

/// Eigenvalues of one large matrix given by its upper triangle, ascending, by torch.
std::vector<double> eigenvalues_by_torch(const double* upper, int64_t stride, int64_t size) {
  const Tensor full = make_tensor({size, size}, ScalarType::Double);
  double* const to = data_of<double>(full);
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t j = i; j < size; ++j) to[j * size + i] = upper[i * stride + j];
  }
  std::array<StableIValue, 2> stack{torch::stable::detail::from(full), torch::stable::detail::from(std::string("L"))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linalg_eigvalsh", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor values = torch::stable::detail::to<Tensor>(stack[0]);
  return {data_of<double>(values), data_of<double>(values) + size};
}

/// Spectra as they are found, descending, not below 0, zeros beyond the smaller side; and whether the largest value of
/// one is infinite in the result's type, or no normal number.
struct Spectra {
  Tensor values;
  std::atomic<bool> beyond{false};

  explicit Spectra(int64_t count, int64_t d, ScalarType type) : values(make_tensor({count, d}, type)) {}

  void write(int64_t batch, const std::vector<double>& descending) {
    const int64_t d = values.size(1), size = static_cast<int64_t>(descending.size());
    in_accumulation_type(values, [&](auto zero) {
      using T = decltype(zero);
      using Limits = std::numeric_limits<T>;
      T* const to = data_of<T>(values) + batch * d;
      for (int64_t j = 0; j < d; ++j) to[j] = j < size ? static_cast<T>(descending[static_cast<size_t>(j)]) : T(0);
      if (descending[0] > Limits::max() || (descending[0] > 0 && descending[0] < Limits::min())) beyond = true;
    });
  }
};

void write_large(const double* upper, int64_t stride, int64_t size, double factor, bool zero, Spectra& out,
                 int64_t batch) {
  std::vector<double> values(static_cast<size_t>(size));
  if (!zero) values = eigenvalues_by_torch(upper, stride, size);
  std::reverse(values.begin(), values.end());
  for (double& value : values) value = std::max(0.0, value * factor);
  out.write(batch, values);
}

/// Spectra of `count` batches of n rows of width d; rows_of_batch(i) gives each.
template <class RowsOfBatch>
void spectra(int64_t count, int64_t n, int64_t d, bool center, const RowsOfBatch& rows_of_batch, Spectra& out) {
  const double factor = 1 / static_cast<double>(n);
  const int64_t size = std::min(n, d);
  if (size > kLargestOwn) {
    Gram<double> gram(n, d, center);
    for (int64_t i = 0; i < count; ++i) {
      gram.compute(rows_of_batch(i));
      write_large(gram.upper(), gram.stride(), size, factor, gram.zero(), out, i);
    }
    return;
  }
  struct Scratch {
    Gram<double> gram;
    Tridiagonals::Scratch matrix;
  };
  Tridiagonals matrices(count, size);
  parallel_tasks(
      count, [&] { return Scratch{Gram<double>(n, d, center), Tridiagonals::Scratch(size)}; },
      [&](int64_t i, Scratch& scratch) {
        Gram<double>& gram = scratch.gram;
        gram.compute(rows_of_batch(i));
        if (!gram.zero()) matrices.reduce(i, gram.upper(), gram.stride(), factor, scratch.matrix);
      });
  matrices.values([&](int64_t i, const std::vector<double>& values) { out.write(i, values); });
}

/// Spectrum of one batch whose products are work for all threads.
void large_spectrum(const Tensor& z, int64_t batch, bool center, bool normalize, Spectra& out) {
  const int64_t n = z.size(1), d = z.size(2);
  const Tensor one = torch::stable::narrow(const_cast<Tensor&>(z), 0, batch, 1);
  Buffer<double> moment(d * d);
  double total = 0, trace = 0;
  ScatterAll<double> scatter(one, center, normalize, "z", batch, z.size(0));
  scatter.run([&](int64_t, const Moments& moments, const double*, int64_t begin, int64_t end) {
    if (begin == 0) total = moments.squares;
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = i; j < d; ++j) {
        double value = moments.upper[i * scatter.stride() + j];
        if (center) value -= moments.columns[i] * moments.columns[j] / static_cast<double>(n);
        moment[i * d + j] = value;
      }
    }
  });
  for (int64_t i = 0; i < d; ++i) trace += moment[i * d + i];
  const bool zero = total == 0 || trace <= negligible_share<double>() * total;
  const double factor = 1 / static_cast<double>(n);
  if (d > kLargestOwn) {
    write_large(moment.data(), d, d, factor, zero, out, batch);
    return;
  }
  Tridiagonals matrices(1, d);
  Tridiagonals::Scratch scratch(d);
  if (!zero) matrices.reduce(0, moment.data(), d, factor, scratch);
  matrices.values([&](int64_t, const std::vector<double>& values) { out.write(batch, values); });
}

Tensor spectrum(const Tensor& rows, bool center, bool normalize) {
  const Tensor z = dense_rows(rows);
  const int64_t b = z.size(0), n = z.size(1), d = z.size(2);
  Spectra out(b, d, accumulation_type(z));
  if (d <= n && (d > kNarrow || (b < 4 && row_runs(n, d) > 1))) {
    for (int64_t i = 0; i < b; ++i) large_spectrum(z, i, center, normalize, out);
    if (out.beyond) throw_beyond(z);
    return out.values;
  }
  BadRow bad;
  spectra(b, n, d, center, [&](int64_t i) { return batch_of_tensor(z, normalize, i, &bad); }, out);
  if (checks_enabled()) bad.raise("z", b, n);
  if (out.beyond) throw_beyond(z);
  return out.values;
}

Tensor batch_spectrum(const Tensor& rows, const Tensor& indices_, bool center, bool normalize) {
  const Tensor pool = dense_rows(rows), indices = checked_indices(indices_, rows.size(0));
  const int64_t c = indices.size(0), n = indices.size(1), d = pool.size(1);
  Spectra out(c, d, accumulation_type(pool));
  BadRow bad;
  spectra(c, n, d, center, [&](int64_t i) { return batch_of_pool(pool, indices, normalize, i, &bad); }, out);
  if (checks_enabled()) bad.raise("pool", 1, pool.size(0));
  if (out.beyond) throw_beyond(pool);
  return out.values;
}

}  // namespace
}  // namespace spectral_kernels

STABLE_TORCH_LIBRARY_IMPL(spectral_kernels_cpp, CPU, m) {
  m.impl("spectrum", TORCH_BOX(&spectral_kernels::spectrum));
  m.impl("batch_spectrum", TORCH_BOX(&spectral_kernels::batch_spectrum));
}
