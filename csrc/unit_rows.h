// Unit rows and blocks of their similarities, as InfoNCE's losses and gradient norms read them.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "rows.h"

namespace spectral_kernels {

// Anchors of a block, and others: the block's similarities stay in the second-level cache.
constexpr int64_t kAnchors = 64;
constexpr int64_t kOthers = 512;

/// Unit rows, as rows to multiply from the left, as panels to multiply with from the right, and transposed as panels.
template <class T>
struct UnitRows {
  int64_t n, d, width;
  Buffer<T> plain, inverse_norms, panels, transposed;

  struct Layouts {
    bool panels, transposed;
  };

  /// The rows of several tensors, one after the other, less `origin` (d values, or nullptr): subtracted before
  /// rounding, so that rows keep their differences.
  UnitRows(const std::vector<Tensor>& tensors, Layouts layouts, const std::vector<BadRow*>& bad,
           const double* origin = nullptr)
      : n(0), d(tensors[0].size(1)), width(padded_width<T>(d)) {
    const Kernels<T>& kernel = kernels<T>();
    for (const Tensor& tensor : tensors) n += tensor.size(0);
    plain = Buffer<T>(round_up(n, kAnchors) * width);
    inverse_norms = Buffer<T>(n);
    if (layouts.panels) panels = Buffer<T>(round_up(n, kOthers) * width);
    if (layouts.transposed) transposed = Buffer<T>(padded_width<T>(n) * d);
    std::fill(plain.data() + n * width, plain.data() + plain.size(), T(0));
    int64_t first = 0;
    for (size_t t = 0; t < tensors.size(); ++t) {
      const RowView view = rows_of(tensors[t], true);
      const int64_t rows = tensors[t].size(0), start = first;
      parallel_tasks(ceil_div(rows, kOthers), [&](int64_t task) {
        const int64_t begin = task * kOthers, count = std::min(kOthers, rows - begin);
        T* const to = plain.data() + (start + begin) * width;
        const ReadResult result = origin == nullptr ? kernel.read(view, begin, count, nullptr, to, plain_rows<T>(width),
                                                                  inverse_norms.data() + start + begin)
                                                    : read_differences(view, begin, count, origin, to);
        if (result.bad >= 0) bad[t]->report(result.bad);
      });
      first += rows;
    }
    const int64_t group = group_of_transposed();
    parallel_tasks(ceil_div(n, kOthers), [&](int64_t task) {
      const int64_t begin = task * kOthers, count = std::min(kOthers, n - begin);
      const T* const rows = plain.data() + begin * width;
      if (layouts.panels) {
        T* const to = panels.data() + begin * width;
        for (int64_t j = 0; j < width; j += kernel.panel) {
          for (int64_t i = 0; i < count; ++i) {
            std::copy_n(rows + i * width + j, kernel.panel, to + j * kOthers + i * kernel.panel);
          }
        }
      }
      if (layouts.transposed) {
        kernel.transpose(rows, width, count, d, transposed.data() + begin / kernel.panel * group, group);
      }
    });
  }

  int64_t group_of_transposed() const { return d * kernels<T>().panel; }
  const T* row(int64_t i) const { return plain.data() + i * width; }
  /// Panels of rows [begin, begin + kOthers), begin a multiple of kOthers; their group is kOthers * panel.
  const T* block(int64_t begin) const { return panels.data() + begin * width; }

 private:
  /// Rows less an origin, padded with zeros.
  ReadResult read_differences(const RowView& view, int64_t begin, int64_t count, const double* origin, T* to) const {
    const int64_t wide = padded_width<double>(d);
    Buffer<double> rows(count * wide);
    const ReadResult result =
        kernels<double>().read(view, begin, count, nullptr, rows.data(), plain_rows<double>(wide), nullptr);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < d; ++j) to[i * width + j] = static_cast<T>(rows[i * wide + j] - origin[j]);
      std::fill(to + i * width + d, to + (i + 1) * width, T(0));
    }
    return result;
  }
};

/// similarity (kAnchors, columns) of anchors from `row` with others from `column`, and its description.
template <class T>
LogitBlock<T> logits(const UnitRows<T>& anchors, int64_t row, int64_t rows, const UnitRows<T>& others, int64_t column,
                     int64_t columns, T inverse_temperature, const Negatives& negatives, T* similarity,
                     int64_t stride) {
  const Kernels<T>& kernel = kernels<T>();
  const int64_t group = others.group_of_transposed();
  kernel.multiply(anchors.row(row), anchors.width, round_up(rows, kernel.rows),
                  others.transposed.data() + column / kernel.panel * group, group, anchors.d, columns, similarity,
                  stride, false);
  return {similarity, stride, rows, columns, row, column, inverse_temperature, negatives};
}

template <class T>
double product(const T* a, const T* b, int64_t d) {
  double sum = 0;
  for (int64_t j = 0; j < d; ++j) sum += static_cast<double>(a[j]) * static_cast<double>(b[j]);
  return sum;
}

/// log(1 + e^x)
inline double softplus(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

}  // namespace spectral_kernels
