// Moment matrix of one batch, on the smaller side: (d, d) sums over rows, or (n, n) products of rows when n < d.
// Serial: the operators over many batches run one batch to a thread.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "gather.h"
#include "scatter.h"

namespace spectral_kernels {

/// tr C counts as rounding noise of tr M when it is below this share of it: identical rows have no covariance.
template <class T>
double negligible_share() {
  const double eps = sizeof(T) == 4 ? 0x1p-23 : 0x1p-52;
  return (32 * eps) * (32 * eps);
}

/// Whether T was wide enough for moments of n rows: `total` is the sum of their squared norms, `spread` that of the
/// centred rows (or `total`). Else squares over- or underflow, or nearly equal rows differ by T's rounding.
template <class T>
bool wide_enough(double total, double spread, int64_t n) {
  if (sizeof(T) == 8 || total == 0) return true;
  const double square = total / static_cast<double>(n);
  return square > 0x1p-80 && square < 0x1p80 && spread > 1e-7 * total;
}

template <class T>
class Gram {
 public:
  Gram(int64_t n, int64_t d, bool center)
      : n_(n),
        d_(d),
        size_(std::min(n, d)),
        stride_(padded_width<T>(size_)),
        width_(padded_width<T>(d)),
        center_(center),
        scratch_(n < d ? 1 : d, n < d ? 1 : n),
        upper_(size_ * stride_),
        shift_(center ? width_ : 0),
        columns_(d) {
    if (!wide()) return;
    rows_ = Buffer<T>(round_up(n_, kernels<T>().rows) * width_);
    rows_.zero();
    panels_ = Buffer<T>(stride_ * d_);
    tile_ = Buffer<T>(round_up(n_, kernels<T>().rows) * stride_);
  }

  bool wide() const { return n_ < d_; }
  int64_t size() const { return size_; }
  int64_t stride() const { return stride_; }
  /// Entry (i, j), i <= j, of sum x x^T or, when wide, of the products of rows; of the centred rows on request.
  double* upper() { return upper_.data(); }
  double trace() const { return trace_; }
  /// No spread at all, up to rounding.
  bool zero() const { return zero_; }
  bool wide_enough() const { return spectral_kernels::wide_enough<T>(total_, trace_, n_); }
  const T* shift() const { return center_ ? shift_.data() : nullptr; }
  /// Sums over the shifted rows: what the rounding of the shift left of the mean, times n.
  const double* columns() const { return columns_.data(); }
  /// The shifted rows, of width `width`, when wide.
  const T* rows() const { return rows_.data(); }
  int64_t width() const { return width_; }

  void compute(const BatchRows& batch) {
    columns_.zero();
    if (center_) mean_shift<T>(batch.view, n_, shift_.data(), nullptr, nullptr, 0);
    if (wide()) {
      total_ = products(batch);
    } else {
      Moments moments{upper_.data(), center_ ? columns_.data() : nullptr, 0};
      total_ = sums(batch, moments);
    }
    trace_ = 0;
    for (int64_t i = 0; i < size_; ++i) trace_ += upper_[i * stride_ + i];
    zero_ = total_ == 0 || trace_ <= negligible_share<T>() * total_;
  }

 private:
  double sums(const BatchRows& batch, Moments& moments) {
    scatter_rows<T>(batch.view, n_, 0, n_, shift(), scratch_, moments, stride_,
                    [&](int64_t row) { batch.report(row); });
    if (center_) {
      for (int64_t i = 0; i < d_; ++i) {
        const double share = columns_[i] / static_cast<double>(n_);
        for (int64_t j = i; j < d_; ++j) upper_[i * stride_ + j] -= share * columns_[j];
      }
    }
    return moments.squares;
  }

  double products(const BatchRows& batch) {
    const Kernels<T>& kernel = kernels<T>();
    const Block block = plain_rows<T>(width_);
    const ReadResult result = kernel.read(batch.view, 0, n_, shift(), rows_.data(), block, nullptr);
    batch.report(result.bad);
    kernel.column_sums(rows_.data(), block, n_, d_, columns_.data());
    const int64_t group = d_ * kernel.panel;
    kernel.transpose(rows_.data(), width_, n_, d_, panels_.data(), group);
    for (int64_t fold = 0; fold < d_; fold += kFoldRows) {
      const int64_t end = std::min(fold + kFoldRows, d_);
      for (int64_t p = fold; p < end; p += kReadRows) {
        kernel.scatter(panels_.data() + p * kernel.panel, group, std::min(kReadRows, end - p), 0, n_, 0, n_,
                       tile_.data(), stride_, p != fold, Ahead{nullptr, 0});
      }
      kernel.fold(tile_.data(), stride_, 0, n_, 0, n_, upper_.data(), stride_, fold > 0);
    }
    if (center_) center_products();
    return result.squares;
  }

  /// Takes what the rounding of the shift left of the mean out of the products: both means of each entry.
  void center_products() {
    std::vector<double> means(static_cast<size_t>(n_));
    double mean = 0;
    for (int64_t i = 0; i < n_; ++i) {
      for (int64_t j = 0; j < n_; ++j) {
        means[static_cast<size_t>(i)] += upper_[std::min(i, j) * stride_ + std::max(i, j)] / static_cast<double>(n_);
      }
      mean += means[static_cast<size_t>(i)] / static_cast<double>(n_);
    }
    for (int64_t i = 0; i < n_; ++i) {
      const double own = means[static_cast<size_t>(i)] - mean;
      for (int64_t j = i; j < n_; ++j) upper_[i * stride_ + j] -= own + means[static_cast<size_t>(j)];
    }
  }

  const int64_t n_, d_, size_, stride_, width_;
  const bool center_;
  ScatterScratch<T> scratch_;
  Buffer<double> upper_;
  Buffer<T> shift_;
  Buffer<double> columns_;
  Buffer<T> rows_, panels_, tile_;
  double total_ = 0, trace_ = 0;
  bool zero_ = false;
};

/// Sum of the squares of all entries of a symmetric matrix given by rows [begin, end) of its upper triangle.
inline double frobenius(const double* upper, int64_t stride, int64_t size, int64_t begin, int64_t end) {
  double diagonal = 0, rest = 0;
  for (int64_t i = begin; i < end; ++i) {
    const double* const row = upper + i * stride;
    diagonal += row[i] * row[i];
    // four sums: one would wait for each addition
    double sums[4] = {};
    int64_t j = i + 1;
    for (; j + 4 <= size; j += 4) {
      for (int s = 0; s < 4; ++s) sums[s] += row[j + s] * row[j + s];
    }
    for (; j < size; ++j) sums[0] += row[j] * row[j];
    rest += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  return diagonal + 2 * rest;
}

}  // namespace spectral_kernels
