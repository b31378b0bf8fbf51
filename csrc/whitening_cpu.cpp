// The products of whitening: y = (z - mean) W^T, the sum of outer products its gradient needs, and the gradient itself.
// Covariance and mean are covariance_mean's; the d x d factorisation is torch's (spectral_kernels/ops/whitening).

#include <torch/csrc/stable/library.h>

#include <vector>

#include "apply.h"
#include "scatter.h"

namespace spectral_kernels {
namespace {

template <class T>
Buffer<T> padded_row(const Tensor& rows, int64_t batch) {
  const int64_t d = rows.size(1);
  const T* const from = data_of<T>(rows) + batch * d;
  return padded_copy<T>(std::vector<double>(from, from + d));
}

/// `lower`: the matrix is lower triangular.
Tensor whiten_apply(const Tensor& rows, const Tensor& mean_, const Tensor& matrix_, bool lower) {
  const Tensor z = dense_rows(rows), mean = torch::stable::contiguous(mean_),
               matrix = torch::stable::contiguous(matrix_);
  const int64_t b = z.size(0), n = z.size(1), d = z.size(2);
  const Tensor out = make_tensor({b, n, d}, z.scalar_type());
  BadRow bad;
  in_accumulation_type(z, [&](auto zero) {
    using T = decltype(zero);
    Buffer<T> right(d * padded_width<T>(d));
    for (int64_t batch = 0; batch < b; ++batch) {
      const T* const w = data_of<T>(matrix) + batch * d * d;
      const Buffer<T> shift = padded_row<T>(mean, batch);
      to_panels<T>(d, d, right.data(), [&](int64_t i, int64_t j) { return w[j * d + i]; });
      const Triangle triangle = lower ? Triangle::kUpper : Triangle::kWhole;
      const Apply<T> apply{{{rows_of(z, false, batch), shift.data(), right.data(), triangle}}};
      apply.all(n, sink_of(out, batch), &bad, batch * n);
    }
  });
  if (checks_enabled()) bad.raise("z", b, n);
  return out;
}

/// Sum over rows [begin, end) of left (right - shift)^T, added to `total` (d, d).
template <class T>
void cross_rows(const RowView& left, const RowView& right, const T* shift, int64_t begin, int64_t end, double* total) {
  const Kernels<T>& kernel = kernels<T>();
  const int64_t d = left.d, width = padded_width<T>(d), run = std::min(end - begin, kReadRows);
  const Block plain = plain_rows<T>(width), panels = panels_of<T>(run);
  Buffer<T> a(run * width), b(run * width), sum(round_up(d, kernel.rows) * width);
  sum.zero();
  for (int64_t fold = begin; fold < end; fold += kFoldRows) {
    for (int64_t i = fold; i < std::min(fold + kFoldRows, end); i += run) {
      const int64_t count = std::min(run, std::min(fold + kFoldRows, end) - i);
      kernel.read(left, i, count, nullptr, a.data(), plain, nullptr);
      kernel.read(right, i, count, shift, b.data(), panels, nullptr);
      kernel.multiply_transposed(a.data(), width, count, round_up(d, kernel.rows), b.data(), panels.group, d,
                                 sum.data(), width);
    }
    for (int64_t i = 0; i < d; ++i) {
      for (int64_t j = 0; j < d; ++j) total[i * d + j] += static_cast<double>(sum[i * width + j]);
    }
    sum.zero();
  }
}

Tensor cross_moment(const Tensor& left_, const Tensor& rows, const Tensor& mean_) {
  const Tensor left = dense_rows(left_), z = dense_rows(rows), mean = torch::stable::contiguous(mean_);
  const int64_t b = z.size(0), n = z.size(1), d = z.size(2);
  const Tensor out = make_tensor({b, d, d}, accumulation_type(z));
  in_accumulation_type(z, [&](auto zero) {
    using T = decltype(zero);
    // wide sums take memory for every run
    const int64_t runs = std::min<int64_t>(row_runs(n, d), std::max<int64_t>(4, (int64_t{1} << 21) / (d * d)));
    Buffer<double> totals(runs * d * d);
    for (int64_t batch = 0; batch < b; ++batch) {
      const Buffer<T> shift = padded_row<T>(mean, batch);
      parallel_tasks(runs, [&](int64_t run) {
        double* const total = totals.data() + run * d * d;
        std::fill_n(total, d * d, 0.0);
        cross_rows<T>(rows_of(left, false, batch), rows_of(z, false, batch), shift.data(), n * run / runs,
                      n * (run + 1) / runs, total);
      });
      T* const to = data_of<T>(out) + batch * d * d;
      for (int64_t i = 0; i < d * d; ++i) {
        double sum = 0;
        for (int64_t run = 0; run < runs; ++run) sum += totals[run * d * d + i];
        to[i] = static_cast<T>(sum);
      }
    }
  });
  return out;
}

Tensor whiten_apply_backward(const Tensor& grad_, const Tensor& rows, const Tensor& mean_, const Tensor& matrix_,
                             const Tensor& dcovariance_, bool center, bool lower) {
  const Tensor grad = dense_rows(grad_), z = dense_rows(rows), mean = torch::stable::contiguous(mean_);
  const Tensor matrix = torch::stable::contiguous(matrix_), dcovariance = torch::stable::contiguous(dcovariance_);
  const int64_t b = z.size(0), n = z.size(1), d = z.size(2);
  const Tensor out = make_tensor({b, n, d}, z.scalar_type());
  in_accumulation_type(z, [&](auto zero) {
    using T = decltype(zero);
    Buffer<T> right(d * padded_width<T>(d)), second(d * padded_width<T>(d));
    const T scale = T(2) / static_cast<T>(n);
    for (int64_t batch = 0; batch < b; ++batch) {
      const T *const w = data_of<T>(matrix) + batch * d * d, *const c = data_of<T>(dcovariance) + batch * d * d;
      const RowView gradient = rows_of(grad, false, batch);
      const Buffer<T> shift = padded_row<T>(mean, batch);
      to_panels<T>(d, d, right.data(), [&](int64_t i, int64_t j) { return w[i * d + j]; });
      to_panels<T>(d, d, second.data(), [&](int64_t i, int64_t j) { return scale * c[i * d + j]; });
      // the result has no mean: the first term's is taken out of its rows, the second's is what rounding left in `mean`
      Buffer<T> gradient_mean, offset;
      if (center) {
        gradient_mean = padded_copy<T>(exact_mean<T>(gradient, n));
        std::vector<double> rest = exact_mean<T>(rows_of(z, false, batch), n), left(static_cast<size_t>(d));
        for (int64_t j = 0; j < d; ++j) rest[static_cast<size_t>(j)] -= static_cast<double>(shift[j]);
        add_product(rest, second.data(), left.data());
        offset = padded_copy<T>(left);
      }
      const Triangle triangle = lower ? Triangle::kLower : Triangle::kWhole;
      const Apply<T> apply{{{gradient, center ? gradient_mean.data() : nullptr, right.data(), triangle},
                            {rows_of(z, false, batch), shift.data(), second.data()}},
                           center ? offset.data() : nullptr};
      apply.all(n, sink_of(out, batch));
    }
  });
  return out;
}

}  // namespace
}  // namespace spectral_kernels

STABLE_TORCH_LIBRARY_IMPL(spectral_kernels_cpp, CPU, m) {
  m.impl("whiten_apply", TORCH_BOX(&spectral_kernels::whiten_apply));
  m.impl("whiten_apply_backward", TORCH_BOX(&spectral_kernels::whiten_apply_backward));
  m.impl("cross_moment", TORCH_BOX(&spectral_kernels::cross_moment));
}
