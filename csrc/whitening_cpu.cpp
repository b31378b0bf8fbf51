// The products of whitening: y = (z - mean) W^T, the sum of outer products its gradient needs, and the gradient itself.
// Covariance and mean are covariance_mean's; the d x d factorisation is torch's (spectral_kernels/ops/whitening/cpp.py,
// which says what the two matrices of the gradient are).

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
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

/// What a run of rows adds to the sums below.
struct CrossSums {
  Buffer<double> moment, left, right;

  explicit CrossSums(int64_t d) : moment(d * d), left(d), right(d) {
    left.zero();
    right.zero();
  }
};

/// Sums over rows [begin, end): of left (right - shift)^T (with `upper`, the entries on and above the diagonal), of
/// left and of right - shift.
template <class T>
void cross_rows(const RowView& left, const RowView& right, const T* shift, int64_t begin, int64_t end, bool upper,
                CrossSums& sums) {
  const Kernels<T>& kernel = kernels<T>();
  const int64_t d = left.d, width = padded_width<T>(d), run = std::min(end - begin, kReadRows);
  const int64_t padded = round_up(d, kernel.rows);
  const Block plain = plain_rows<T>(width), panels = panels_of<T>(run);
  Buffer<T> a(run * width), b(run * width), sum(padded * width);
  for (int64_t fold = begin; fold < end; fold += kFoldRows) {
    for (int64_t i = fold; i < std::min(fold + kFoldRows, end); i += run) {
      const int64_t count = std::min(run, std::min(fold + kFoldRows, end) - i);
      kernel.read(left, i, count, nullptr, a.data(), plain, nullptr);
      kernel.read(right, i, count, shift, b.data(), panels, nullptr);
      kernel.column_sums(a.data(), plain, count, d, sums.left.data());
      kernel.column_sums(b.data(), panels, count, d, sums.right.data());
      for (int64_t j = 0; j < d; j += kernel.panel) {
        kernel.multiply_transposed(a.data(), width, count, upper ? std::min(padded, j + kernel.panel) : padded,
                                   b.data() + j / kernel.panel * panels.group, panels.group,
                                   std::min(kernel.panel, d - j), sum.data() + j, width, i > fold);
      }
    }
    const bool add = fold > begin;
    for (int64_t i = 0; i < d; ++i) {
      double* const to = sums.moment.data() + i * d;
      const T* const from = sum.data() + i * width;
      for (int64_t j = upper ? i : 0; j < d; ++j) to[j] = (add ? to[j] : 0) + static_cast<double>(from[j]);
    }
  }
}

/// Sum of left (right - shift)^T over the rows, less the means of both with `center`, and these means: zeros without.
/// With `upper`, zeros below the diagonal.
std::tuple<Tensor, Tensor, Tensor> cross_moment(const Tensor& left_, const Tensor& right_,
                                                const std::optional<Tensor>& shift_, bool center, bool upper) {
  const Tensor left = dense_rows(left_), right = dense_rows(right_);
  const int64_t b = left.size(0), n = left.size(1), d = left.size(2);
  const Tensor out = make_tensor({b, d, d}, accumulation_type(left));
  const Tensor left_mean = make_tensor({b, d}, accumulation_type(left));
  const Tensor right_mean = make_tensor({b, d}, accumulation_type(left));
  in_accumulation_type(left, [&](auto zero) {
    using T = decltype(zero);
    // wide sums take memory for every run
    const int64_t runs = std::min<int64_t>(row_runs(n, d), std::max<int64_t>(4, (int64_t{1} << 21) / (d * d)));
    for (int64_t batch = 0; batch < b; ++batch) {
      Buffer<T> shift;
      if (shift_) shift = padded_row<T>(torch::stable::contiguous(*shift_), batch);
      std::vector<CrossSums> parts;
      for (int64_t run = 0; run < runs; ++run) parts.emplace_back(d);
      parallel_tasks(runs, [&](int64_t run) {
        cross_rows<T>(rows_of(left, false, batch), rows_of(right, false, batch), shift.data(), n * run / runs,
                      n * (run + 1) / runs, upper, parts[static_cast<size_t>(run)]);
      });
      CrossSums& all = parts[0];
      for (int64_t run = 1; run < runs; ++run) {
        const CrossSums& part = parts[static_cast<size_t>(run)];
        for (int64_t j = 0; j < d; ++j) {
          all.left[j] += part.left[j];
          all.right[j] += part.right[j];
        }
      }
      for (int64_t j = 0; j < d; ++j) {
        data_of<T>(left_mean)[batch * d + j] = center ? static_cast<T>(all.left[j] / static_cast<double>(n)) : T(0);
        data_of<T>(right_mean)[batch * d + j] = center ? static_cast<T>(all.right[j] / static_cast<double>(n)) : T(0);
      }
      T* const to = data_of<T>(out) + batch * d * d;
      for (int64_t i = 0; i < d; ++i) {
        const double mean = center ? all.left[i] / static_cast<double>(n) : 0;
        double* const sum = all.moment.data() + i * d;
        const int64_t first = upper ? i : 0;
        for (int64_t run = 1; run < runs; ++run) {
          const double* const part = parts[static_cast<size_t>(run)].moment.data() + i * d;
          for (int64_t j = first; j < d; ++j) sum[j] += part[j];
        }
        for (int64_t j = 0; j < first; ++j) to[i * d + j] = T(0);
        for (int64_t j = first; j < d; ++j) to[i * d + j] = static_cast<T>(sum[j] - mean * all.right[j]);
      }
    }
  });
  return {out, left_mean, right_mean};
}

/// (grad - its mean) W + (z - mean) outer - offset, outer symmetric.
Tensor whiten_apply_backward(const Tensor& grad_, const Tensor& z_, const Tensor& grad_mean_, const Tensor& mean_,
                             const Tensor& matrix_, const Tensor& outer_, const Tensor& offset_) {
  const Tensor grad = dense_rows(grad_), z = dense_rows(z_);
  const Tensor grad_mean = torch::stable::contiguous(grad_mean_), mean = torch::stable::contiguous(mean_);
  const Tensor matrix = torch::stable::contiguous(matrix_), outer = torch::stable::contiguous(outer_);
  const Tensor offset = torch::stable::contiguous(offset_);
  const int64_t b = z.size(0), n = z.size(1), d = z.size(2);
  const Tensor out = make_tensor({b, n, d}, z.scalar_type());
  in_accumulation_type(z, [&](auto zero) {
    using T = decltype(zero);
    Buffer<T> right(d * padded_width<T>(d)), second(d * padded_width<T>(d));
    for (int64_t batch = 0; batch < b; ++batch) {
      const T *const w = data_of<T>(matrix) + batch * d * d, *const c = data_of<T>(outer) + batch * d * d;
      to_panels<T>(d, d, right.data(), [&](int64_t i, int64_t j) { return w[i * d + j]; });
      to_panels<T>(d, d, second.data(), [&](int64_t i, int64_t j) { return c[i * d + j]; });
      const Buffer<T> grad_shift = padded_row<T>(grad_mean, batch), shift = padded_row<T>(mean, batch);
      const Buffer<T> left = padded_row<T>(offset, batch);
      const Apply<T> apply{{{rows_of(grad, false, batch), grad_shift.data(), right.data()},
                            {rows_of(z, false, batch), shift.data(), second.data()}},
                           left.data()};
      apply.all(n, sink_of(out, batch));
    }
  });
  return out;
}

/// ((grad - its mean) + (y - its mean) inner) W + scale (z - mean), W lower triangular.
Tensor whiten_cholesky_backward(const Tensor& grad_, const Tensor& y_, const Tensor& z_, const Tensor& grad_mean_,
                                const Tensor& y_mean_, const Tensor& mean_, const Tensor& matrix_, const Tensor& inner_,
                                const Tensor& scale_) {
  const Tensor grad = dense_rows(grad_), y = dense_rows(y_), z = dense_rows(z_);
  const Tensor grad_mean = torch::stable::contiguous(grad_mean_), y_mean = torch::stable::contiguous(y_mean_);
  const Tensor mean = torch::stable::contiguous(mean_), matrix = torch::stable::contiguous(matrix_);
  const Tensor inner = torch::stable::contiguous(inner_), scale = torch::stable::contiguous(scale_);
  const int64_t b = z.size(0), n = z.size(1), d = z.size(2);
  const Tensor out = make_tensor({b, n, d}, z.scalar_type());
  in_accumulation_type(z, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>();
    const int64_t width = padded_width<T>(d), run = Apply<T>::run_length(d);
    const Block block = plain_rows<T>(width);
    Buffer<T> right(d * width), middle(d * width);
    struct Scratch {
      Buffer<T> rows, sum, product;

      explicit Scratch(int64_t size) : rows(size), sum(size), product(size) {
        // a product takes whole groups of rows
        rows.zero();
        sum.zero();
      }
    };
    for (int64_t batch = 0; batch < b; ++batch) {
      const T* const w = data_of<T>(matrix) + batch * d * d;
      const T* const a = data_of<T>(inner) + batch * d * d;
      to_panels<T>(d, d, right.data(), [&](int64_t i, int64_t j) { return w[i * d + j]; });
      to_panels<T>(d, d, middle.data(), [&](int64_t i, int64_t j) { return a[i * d + j]; });
      const RowView g = rows_of(grad, false, batch), whitened = rows_of(y, false, batch), x = rows_of(z, false, batch);
      const Buffer<T> g_shift = padded_row<T>(grad_mean, batch), y_shift = padded_row<T>(y_mean, batch);
      const Buffer<T> x_shift = padded_row<T>(mean, batch);
      const Term<T> last{g, nullptr, right.data(), Triangle::kLower};
      const RowSink sink = sink_of(out, batch);
      parallel_tasks(
          ceil_div(n, run), [&] { return Scratch(run * width); },
          [&](int64_t task, Scratch& scratch) {
            const int64_t begin = task * run, count = std::min(run, n - begin), rows = round_up(count, kernel.rows);
            kernel.read(whitened, begin, count, y_shift.data(), scratch.rows.data(), block, nullptr);
            kernel.read(g, begin, count, g_shift.data(), scratch.sum.data(), block, nullptr);
            kernel.multiply(scratch.rows.data(), width, rows, middle.data(), d * kernel.panel, d, d, scratch.sum.data(),
                            width, true);
            last.multiply(scratch.sum.data(), rows, width, scratch.product.data(), false);
            kernel.read(x, begin, count, x_shift.data(), scratch.rows.data(), block, nullptr);
            kernel.add_scaled(scratch.product.data(), scratch.rows.data(), width, count, data_of<T>(scale)[batch]);
            kernel.write(scratch.product.data(), width, count, d, sink.row(begin), sink.element, sink.stride);
          });
    }
  });
  return out;
}

}  // namespace
}  // namespace spectral_kernels

STABLE_TORCH_LIBRARY_IMPL(spectral_kernels_cpp, CPU, m) {
  m.impl("whiten_apply", TORCH_BOX(&spectral_kernels::whiten_apply));
  m.impl("whiten_apply_backward", TORCH_BOX(&spectral_kernels::whiten_apply_backward));
  m.impl("whiten_cholesky_backward", TORCH_BOX(&spectral_kernels::whiten_cholesky_backward));
  m.impl("cross_moment", TORCH_BOX(&spectral_kernels::cross_moment));
}
