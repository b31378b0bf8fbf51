// Order-2 effective rank of one batch and its gradient, serially: the operators over many batches run one to a thread.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "apply.h"
#include "gram.h"

namespace spectral_kernels {

/// R2 = T^2 / E with E = a F + b T^2 + c Q, and its derivatives by T = sum |x|^2, F = |X^T X|_F^2 and Q = sum |x|^4.
struct Rank2 {
  double value = 0, by_trace = 0, by_frobenius = 0, by_quartic = 0;
};

struct RankOptions {
  bool center, normalize, unbiased;
};

inline Rank2 rank2(double t, double f, double q, bool zero, int64_t rows, const RankOptions& options) {
  const double n = static_cast<double>(rows);
  double a = 1, b = 0, c = 0;
  if (options.unbiased && !options.center) {
    a = n / (n - 1);
    c = -a;
  } else if (options.unbiased) {
    const double common = (n - 1) / (n * (n - 2) * (n - 3));
    a = common * (n - 1) * (n - 2);
    b = common;
    c = -common * n * (n - 1);
  }
  if (zero) return {};
  const double e = a * f + b * t * t + c * q;
  if (!(e > 0)) return {std::numeric_limits<double>::infinity(), 0, 0, 0};
  const double by_e = -(t / e) * (t / e);
  return {t / e * t, 2 * t / e + 2 * b * t * by_e, a * by_e, c * by_e};
}

/// Sum of |x|^4 over the centred rows of a batch.
template <class T>
double quartic_sum(const BatchRows& batch, const T* shift) {
  const Kernels<T>& kernel = kernels<T>();
  const int64_t width = padded_width<T>(batch.view.d), run = std::min<int64_t>(batch.n, 32);
  Buffer<T> rows(run * width);
  Buffer<double> squares(run);
  double sum = 0;
  for (int64_t i = 0; i < batch.n; i += run) {
    const int64_t count = std::min(run, batch.n - i);
    kernel.read(batch.view, i, count, shift, rows.data(), plain_rows<T>(width), nullptr);
    kernel.row_squares(rows.data(), plain_rows<T>(width), count, batch.view.d, squares.data());
    for (int64_t r = 0; r < count; ++r) sum += squares[r] * squares[r];
  }
  return sum;
}

/// R2 of one batch.
template <class T>
Rank2 batch_rank2(const BatchRows& batch, Gram<T>& gram, const RankOptions& options) {
  gram.compute(batch);
  double q = 0;
  if (options.unbiased && gram.wide()) {
    for (int64_t i = 0; i < gram.size(); ++i) {
      const double square = gram.upper()[i * gram.stride() + i];
      q += square * square;
    }
  } else if (options.unbiased) {
    q = quartic_sum<T>(batch, gram.shift());
  }
  return rank2(gram.trace(), frobenius(gram.upper(), gram.stride(), gram.size(), 0, gram.size()), q, gram.zero(),
               batch.n, options);
}

/// Rows of the gradient of one batch on the (d, d) side: dx = x B + 4 q |x|^2 x minus its mean, B = 2 t I + 4 f M.
template <class T, class Entry>
Buffer<T> tall_factor(int64_t d, const Rank2& rank, double grad, const Entry& upper) {
  Buffer<T> right(d * padded_width<T>(d));
  to_panels<T>(d, d, right.data(), [&](int64_t i, int64_t j) {
    const double moment = upper(std::min(i, j), std::max(i, j));
    return grad * (4 * rank.by_frobenius * moment + (i == j ? 2 * rank.by_trace : 0));
  });
  return right;
}

/// Mean of the rows of the gradient above, from the sums over the shifted rows.
template <class T>
Buffer<T> tall_offset(const BatchRows& batch, const T* shift, const double* columns, const T* right, double quartic) {
  const Kernels<T>& kernel = kernels<T>();
  const int64_t d = batch.view.d, n = batch.n;
  std::vector<double> mean(columns, columns + d), offset(static_cast<size_t>(d));
  for (double& value : mean) value /= static_cast<double>(n);
  add_product(mean, right, offset.data());
  if (quartic != 0) {
    const int64_t width = padded_width<T>(d), run = std::min<int64_t>(n, 32);
    Buffer<T> rows(run * width);
    Buffer<double> weights(run);
    for (int64_t i = 0; i < n; i += run) {
      const int64_t count = std::min(run, n - i);
      kernel.read(batch.view, i, count, shift, rows.data(), plain_rows<T>(width), nullptr);
      kernel.row_squares(rows.data(), plain_rows<T>(width), count, d, weights.data());
      for (int64_t r = 0; r < count; ++r) weights[r] *= quartic / static_cast<double>(n);
      kernel.weighted_sum(rows.data(), plain_rows<T>(width), count, d, weights.data(), offset.data());
    }
  }
  return padded_copy<T>(offset);
}

/// Gradient of one batch on its (n, n) side: dx = A x minus its mean, A = 2 t I + 4 f X X^T + 4 q diag |x|^2.
template <class T>
void wide_backward(const BatchRows& batch, Gram<T>& gram, const Rank2& rank, double grad, const RowSink& sink) {
  const Kernels<T>& kernel = kernels<T>();
  const int64_t n = batch.n, d = batch.view.d, width = gram.width(), padded = round_up(n, kernel.rows);
  const int64_t stride = gram.stride();
  Buffer<T> left(padded * n), right(n * width), dx(padded * width), centred(n * width), inverse_norms(n);
  std::vector<double> means(static_cast<size_t>(n)), offset(static_cast<size_t>(d));
  left.zero();
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const double product = gram.upper()[std::min(i, j) * stride + std::max(i, j)];
      double entry = 4 * rank.by_frobenius * product;
      if (i == j) entry += 2 * rank.by_trace + 4 * rank.by_quartic * product;
      left[i * n + j] = static_cast<T>(grad * entry);
      means[static_cast<size_t>(j)] += grad * entry / static_cast<double>(n);
    }
  }
  to_panels<T>(n, d, right.data(), [&](int64_t i, int64_t j) { return gram.rows()[i * width + j]; });
  kernel.multiply(left.data(), n, padded, right.data(), n * kernel.panel, n, d, dx.data(), width, false);
  if (gram.shift() != nullptr) {
    kernel.weighted_sum(gram.rows(), plain_rows<T>(width), n, d, means.data(), offset.data());
    kernel.subtract(dx.data(), width, n, d, padded_copy<T>(offset).data());
  }
  if (batch.view.normalize) {
    kernel.read(batch.view, 0, n, gram.shift(), centred.data(), plain_rows<T>(width), inverse_norms.data());
    kernel.tangent(dx.data(), width, centred.data(), width, gram.shift(), n, d, inverse_norms.data());
  }
  kernel.write(dx.data(), width, n, d, sink.data, sink.element, sink.stride);
}

/// Whether little is left of the two terms of the gradient, as of a collapsed batch.
template <class T>
bool gradient_cancels(const Rank2& rank) {
  return sizeof(T) == 4 && rank.value < 1.01;
}

/// R2 of one batch: where T is too narrow, in double.
template <class T>
double batch_value(const BatchRows& batch, Gram<T>& gram, const RankOptions& options) {
  const Rank2 rank = batch_rank2<T>(batch, gram, options);
  if (gram.wide_enough()) return rank.value;
  Gram<double> wider(batch.n, batch.view.d, options.center);
  return batch_rank2<double>(batch, wider, options).value;
}

/// Gradient of one batch on its rows, serially.
template <class T>
void batch_backward(const BatchRows& batch, Gram<T>& gram, const RankOptions& options, double grad,
                    const RowSink& sink) {
  const Rank2 rank = batch_rank2<T>(batch, gram, options);
  if (!gram.wide_enough() || gradient_cancels<T>(rank)) {
    Gram<double> wider(batch.n, batch.view.d, options.center);
    return batch_backward<double>(batch, wider, options, grad, sink);
  }
  if (gram.wide()) {
    wide_backward<T>(batch, gram, rank, grad, sink);
    return;
  }
  const int64_t d = batch.view.d, run = Apply<T>::run_length(d);
  const Buffer<T> right =
      tall_factor<T>(d, rank, grad, [&](int64_t i, int64_t j) { return gram.upper()[i * gram.stride() + j]; });
  Apply<T> apply{{{batch.view, gram.shift(), right.data()}}, nullptr, 4 * rank.by_quartic * grad};
  Buffer<T> offset;
  if (options.center) {
    offset = tall_offset<T>(batch, gram.shift(), gram.columns(), right.data(), apply.quartic);
    apply.offset = offset.data();
  }
  typename Apply<T>::Scratch scratch(run, apply.width());
  for (int64_t i = 0; i < batch.n; i += run) apply.rows(i, std::min(i + run, batch.n), scratch, sink, nullptr, 0);
}

}  // namespace spectral_kernels
