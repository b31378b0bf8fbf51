// Order-2 effective rank, (tr M)^2 / |M|_F^2, of batches or of many candidate batches of one pool, and gradients. The
// rules are those of spectral_kernels/ops/effective_rank/reference.py.

#include <torch/csrc/stable/library.h>

#include <vector>

#include "rank2.h"

namespace spectral_kernels {
namespace {

/// R2 of one batch too large for one thread: d <= n, the moment matrix kept for a gradient.
template <class T>
class LargeRank2 {
 public:
  LargeRank2(const Tensor& z, int64_t batch, const RankOptions& options)
      : z_(torch::stable::narrow(const_cast<Tensor&>(z), 0, batch, 1)),
        n_(z.size(1)),
        d_(z.size(2)),
        options_(options),
        moment_(d_ * d_),
        columns_(d_),
        shift_(padded_width<T>(d_)) {
    std::vector<double> squares(static_cast<size_t>(d_));
    double total = 0;
    ScatterAll<T> scatter(z_, options.center, options.normalize, "z", batch, z.size(0));
    scatter.run([&](int64_t, const Moments& moments, const T* shift, int64_t begin, int64_t end) {
      if (begin == 0) total = moments.squares;
      for (int64_t i = begin; i < end; ++i) {
        columns_[i] = options.center ? moments.columns[i] : 0;
        if (options.center) shift_[i] = shift[i];
        for (int64_t j = i; j < d_; ++j) {
          moment_[i * d_ + j] = moments.upper[i * scatter.stride() + j];
          if (options.center) moment_[i * d_ + j] -= moments.columns[i] * moments.columns[j] / static_cast<double>(n_);
        }
        squares[static_cast<size_t>(i)] = frobenius(moment_.data(), d_, d_, i, i + 1);
      }
    });
    for (int64_t j = d_; j < shift_.size(); ++j) shift_[j] = 0;
    double t = 0, f = 0, q = 0;
    for (int64_t i = 0; i < d_; ++i) {
      t += moment_[i * d_ + i];
      f += squares[static_cast<size_t>(i)];
    }
    if (options.center) settle_shift();
    if (options.unbiased) q = quartic();
    rank_ = rank2(t, f, q, total == 0 || t <= negligible_share<T>() * total, n_, options);
    wide_enough_ = spectral_kernels::wide_enough<T>(total, t, n_);
  }

  bool wide_enough() const { return wide_enough_; }

  const Rank2& rank() const { return rank_; }

  void backward(double grad, const RowSink& sink) const {
    const Buffer<T> right = tall_factor<T>(d_, rank_, grad, [&](int64_t i, int64_t j) { return moment_[i * d_ + j]; });
    Apply<T> apply{{{rows(), shift(), right.data()}}, nullptr, 4 * rank_.by_quartic * grad};
    Buffer<T> offset;
    if (options_.center) {
      offset = tall_offset<T>({rows(), n_, nullptr, 0}, shift(), columns_.data(), right.data(), apply.quartic);
      apply.offset = offset.data();
    }
    apply.all(n_, sink);
  }

 private:
  RowView rows() const { return rows_of(z_, options_.normalize); }
  const T* shift() const { return options_.center ? shift_.data() : nullptr; }

  /// Moves the shift onto the mean, which the powers of row norms need.
  void settle_shift() {
    for (int64_t j = 0; j < d_; ++j) {
      const double mean = static_cast<double>(shift_[j]) + columns_[j] / static_cast<double>(n_);
      shift_[j] = static_cast<T>(mean);
      columns_[j] = (mean - static_cast<double>(shift_[j])) * static_cast<double>(n_);
    }
  }

  double quartic() const {
    const int64_t runs = ceil_div(n_, 1024);
    std::vector<double> sums(static_cast<size_t>(runs));
    parallel_tasks(runs, [&](int64_t run) {
      RowView view = rows();
      view.data = static_cast<const char*>(view.data) + run * 1024 * view.stride * element_bytes(view.element);
      sums[static_cast<size_t>(run)] =
          quartic_sum<T>({view, std::min<int64_t>(1024, n_ - run * 1024), nullptr, 0}, shift());
    });
    double sum = 0;
    for (const double part : sums) sum += part;
    return sum;
  }

  Tensor z_;
  const int64_t n_, d_;
  const RankOptions options_;
  Buffer<double> moment_, columns_;
  Buffer<T> shift_;
  Rank2 rank_;
  bool wide_enough_;
};

/// use(rank) with the R2 of one large batch: where T is too narrow, in double.
template <class T, class Use>
void with_large_rank2(const Tensor& z, int64_t batch, const RankOptions& options, bool gradient, const Use& use) {
  const LargeRank2<T> rank(z, batch, options);
  if (rank.wide_enough() && !(gradient && gradient_cancels<T>(rank.rank()))) return use(rank);
  use(LargeRank2<double>(z, batch, options));
}

/// Whether one batch is work for all threads.
bool is_large(const Tensor& z) {
  return z.size(2) <= z.size(1) && (z.size(2) > kNarrow || row_runs(z.size(1), z.size(2)) > 1);
}

Tensor effective_rank2(const Tensor& rows, bool center, bool normalize, bool unbiased) {
  const Tensor z = dense_rows(rows);
  const int64_t b = z.size(0), n = z.size(1), d = z.size(2);
  const RankOptions options{center, normalize, unbiased};
  const Tensor out = make_tensor({b}, accumulation_type(z));
  in_accumulation_type(z, [&](auto zero) {
    using T = decltype(zero);
    T* const values = data_of<T>(out);
    if (is_large(z)) {
      for (int64_t i = 0; i < b; ++i) {
        with_large_rank2<T>(z, i, options, false,
                            [&](const auto& rank) { values[i] = static_cast<T>(rank.rank().value); });
      }
      return;
    }
    BadRow bad;
    parallel_tasks(
        b, [&] { return Gram<T>(n, d, center); },
        [&](int64_t i, Gram<T>& gram) {
          values[i] = static_cast<T>(batch_value<T>(batch_of_tensor(z, normalize, i, &bad), gram, options));
        });
    if (checks_enabled()) bad.raise("z", b, n);
  });
  return out;
}

Tensor effective_rank2_backward(const Tensor& grad_, const Tensor& rows, bool center, bool normalize, bool unbiased) {
  const Tensor z = dense_rows(rows), grad = torch::stable::contiguous(grad_);
  const int64_t b = z.size(0), n = z.size(1), d = z.size(2);
  const RankOptions options{center, normalize, unbiased};
  const Tensor out = make_tensor({b, n, d}, z.scalar_type());
  in_accumulation_type(z, [&](auto zero) {
    using T = decltype(zero);
    const T* const g = data_of<T>(grad);
    if (is_large(z)) {
      for (int64_t i = 0; i < b; ++i) {
        with_large_rank2<T>(z, i, options, true,
                            [&](const auto& rank) { rank.backward(static_cast<double>(g[i]), sink_of(out, i)); });
      }
      return;
    }
    parallel_tasks(
        b, [&] { return Gram<T>(n, d, center); },
        [&](int64_t i, Gram<T>& gram) {
          batch_backward<T>(batch_of_tensor(z, normalize, i, nullptr), gram, options, static_cast<double>(g[i]),
                            sink_of(out, i));
        });
  });
  return out;
}

Tensor batch_effective_rank2(const Tensor& rows, const Tensor& indices_, bool center, bool normalize) {
  const Tensor pool = dense_rows(rows), indices = checked_indices(indices_, rows.size(0));
  const int64_t c = indices.size(0), n = indices.size(1);
  const RankOptions options{center, normalize, false};
  const Tensor out = make_tensor({c}, accumulation_type(pool));
  in_accumulation_type(pool, [&](auto zero) {
    using T = decltype(zero);
    BadRow bad;
    parallel_tasks(
        c, [&] { return Gram<T>(n, pool.size(1), center); },
        [&](int64_t i, Gram<T>& gram) {
          const BatchRows batch = batch_of_pool(pool, indices, normalize, i, &bad);
          data_of<T>(out)[i] = static_cast<T>(batch_value<T>(batch, gram, options));
        });
    if (checks_enabled()) bad.raise("pool", 1, pool.size(0));
  });
  return out;
}

Tensor batch_effective_rank2_backward(const Tensor& grad_, const Tensor& rows, const Tensor& indices_, bool center,
                                      bool normalize) {
  const Tensor pool = dense_rows(rows), indices = checked_indices(indices_, rows.size(0));
  const Tensor grad = torch::stable::contiguous(grad_);
  const int64_t c = indices.size(0), n = indices.size(1), rows_in_pool = pool.size(0), d = pool.size(1);
  const RankOptions options{center, normalize, false};
  const Tensor out = make_tensor({rows_in_pool, d}, pool.scalar_type());
  in_accumulation_type(pool, [&](auto zero) {
    using T = decltype(zero);
    constexpr Element element = sizeof(T) == 8 ? Element::kDouble : Element::kFloat;
    // a row may be in many batches: its gradients are written apart and then added in order
    Buffer<T> gathered(c * n * d);
    parallel_tasks(
        c, [&] { return Gram<T>(n, d, center); },
        [&](int64_t i, Gram<T>& gram) {
          const BatchRows batch = batch_of_pool(pool, indices, normalize, i, nullptr);
          batch_backward<T>(batch, gram, options, static_cast<double>(data_of<T>(grad)[i]),
                            RowSink{gathered.data() + i * n * d, element, d});
        });
    const Appearances found(data_of<int64_t>(indices), c * n, rows_in_pool);
    const RowSink sink = sink_of(out, 0);
    constexpr int64_t run = 512;
    parallel_tasks(
        ceil_div(rows_in_pool, run), [&] { return Buffer<T>(padded_width<T>(d)); },
        [&](int64_t task, Buffer<T>& sum) {
          for (int64_t r = task * run; r < std::min(rows_in_pool, (task + 1) * run); ++r) {
            sum.zero();
            for (int64_t p = found.starts[static_cast<size_t>(r)]; p < found.starts[static_cast<size_t>(r) + 1]; ++p) {
              const T* const from = gathered.data() + found.places[static_cast<size_t>(p)] * d;
              for (int64_t j = 0; j < d; ++j) sum[j] += from[j];
            }
            kernels<T>().write(sum.data(), d, 1, d, sink.row(r), sink.element, sink.stride);
          }
        });
  });
  return out;
}

}  // namespace
}  // namespace spectral_kernels

STABLE_TORCH_LIBRARY_IMPL(spectral_kernels_cpp, CPU, m) {
  m.impl("effective_rank2", TORCH_BOX(&spectral_kernels::effective_rank2));
  m.impl("effective_rank2_backward", TORCH_BOX(&spectral_kernels::effective_rank2_backward));
  m.impl("batch_effective_rank2", TORCH_BOX(&spectral_kernels::batch_effective_rank2));
  m.impl("batch_effective_rank2_backward", TORCH_BOX(&spectral_kernels::batch_effective_rank2_backward));
}
