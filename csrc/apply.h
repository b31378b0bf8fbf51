// Products of rows with a d x d matrix, written back as rows: y = (x - s) B - o, with the gradient of the normalisation
// fused where rows are normalised. What the backward passes and the application of a whitening matrix are made of.
#pragma once

#include <algorithm>
#include <vector>

#include "rows.h"

namespace spectral_kernels {

/// Matrix (k, n) given by entry(i, j) as panels, padded with zeros.
template <class T, class Entry>
void to_panels(int64_t k, int64_t n, T* out, const Entry& entry) {
  const int64_t panel = kernels<T>().panel;
  for (int64_t j0 = 0; j0 < n; j0 += panel) {
    T* const to = out + j0 * k;
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j < panel; ++j) to[i * panel + j] = j0 + j < n ? static_cast<T>(entry(i, j0 + j)) : T(0);
    }
  }
}

/// Which entries of a matrix may be other than zero.
enum class Triangle { kWhole, kLower, kUpper };

/// One term (x - shift) right of the product.
template <class T>
struct Term {
  RowView view;
  const T* shift = nullptr;  // padded, or null
  const T* right = nullptr;  // panels (d, d)
  Triangle triangle = Triangle::kWhole;

  /// c = (`add`: +=) a right for `m` padded rows of `width`; zeros of a triangle are left out, panel by panel.
  void multiply(const T* a, int64_t m, int64_t width, T* c, bool add) const {
    const Kernels<T>& kernel = kernels<T>();
    const int64_t d = view.d, panel = kernel.panel;
    if (triangle == Triangle::kWhole) {
      kernel.multiply(a, width, m, right, d * panel, d, d, c, width, add);
      return;
    }
    for (int64_t j = 0; j < d; j += panel) {
      const int64_t begin = triangle == Triangle::kLower ? j : 0;
      const int64_t end = triangle == Triangle::kLower ? d : std::min(d, j + panel);
      kernel.multiply(a + begin, width, m, right + j * d + begin * panel, d * panel, end - begin,
                      std::min(panel, d - j), c + j, width, add);
    }
  }
};

/// Where rows are written.
struct RowSink {
  void* data;
  Element element;
  int64_t stride;

  void* row(int64_t i) const { return static_cast<char*>(data) + i * stride * element_bytes(element); }
};

inline RowSink sink_of(const Tensor& tensor, int64_t batch) {
  const RowView view = rows_of(tensor, false, batch);
  return {const_cast<void*>(view.data), view.element, view.stride};
}

template <class T>
struct Apply {
  std::vector<Term<T>> terms;
  const T* offset = nullptr;  // padded, or null
  double quartic = 0;         // adds quartic |x|^2 x, with x the shifted row of the first term

  int64_t width() const { return padded_width<T>(terms[0].view.d); }

  struct Scratch {
    Buffer<T> rows, sum, inverse_norms;
    Buffer<double> squares;

    Scratch(int64_t run, int64_t width) : rows(run * width), sum(run * width), inverse_norms(run), squares(run) {
      // a product takes whole groups of rows
      rows.zero();
    }
  };

  static int64_t run_length(int64_t d) { return d <= 256 ? 128 : 256; }

  /// Rows [begin, end), at most run_length of them.
  void rows(int64_t begin, int64_t end, Scratch& scratch, const RowSink& sink, BadRow* bad, int64_t bad_offset) const {
    const Kernels<T>& kernel = kernels<T>();
    const int64_t d = terms[0].view.d, w = width(), count = end - begin, padded = round_up(count, kernel.rows);
    const Block block = plain_rows<T>(w);
    // the first term last: its rows are then at hand for the tangent
    for (size_t t = terms.size(); t-- > 0;) {
      const Term<T>& term = terms[t];
      const ReadResult result =
          kernel.read(term.view, begin, count, term.shift, scratch.rows.data(), block, scratch.inverse_norms.data());
      if (result.bad >= 0 && bad != nullptr) bad->report(bad_offset + result.bad);
      term.multiply(scratch.rows.data(), padded, w, scratch.sum.data(), t + 1 < terms.size());
    }
    if (quartic != 0) {
      kernel.row_squares(scratch.rows.data(), block, count, d, scratch.squares.data());
      for (int64_t i = 0; i < count; ++i) {
        const T weight = static_cast<T>(quartic * scratch.squares[i]);
        for (int64_t j = 0; j < d; ++j) scratch.sum[i * w + j] += weight * scratch.rows[i * w + j];
      }
    }
    if (offset != nullptr) kernel.subtract(scratch.sum.data(), w, count, d, offset);
    if (terms[0].view.normalize) {
      kernel.tangent(scratch.sum.data(), w, scratch.rows.data(), w, terms[0].shift, count, d,
                     scratch.inverse_norms.data());
    }
    kernel.write(scratch.sum.data(), w, count, d, sink.row(begin), sink.element, sink.stride);
  }

  /// All `n` rows, in parallel.
  void all(int64_t n, const RowSink& sink, BadRow* bad = nullptr, int64_t bad_offset = 0) const {
    const int64_t run = run_length(terms[0].view.d);
    parallel_tasks(
        ceil_div(n, run), [&] { return Scratch(run, width()); },
        [&](int64_t task, Scratch& scratch) {
          rows(task * run, std::min(n, (task + 1) * run), scratch, sink, bad, bad_offset);
        });
  }
};

/// A mean as a shift in T, padded, and what rounding left of it: mean = shift + rest.
template <class T>
struct Shift {
  Buffer<T> shift;
  std::vector<double> rest;

  explicit Shift(const std::vector<double>& mean)
      : shift(padded_width<T>(static_cast<int64_t>(mean.size()))), rest(mean.size()) {
    shift.zero();
    for (size_t j = 0; j < mean.size(); ++j) {
      shift[static_cast<int64_t>(j)] = static_cast<T>(mean[j]);
      rest[j] = mean[j] - static_cast<double>(shift[static_cast<int64_t>(j)]);
    }
  }
};

/// offset += row B for a row in double and B in panels; a padded offset.
template <class T>
void add_product(const std::vector<double>& row, const T* right, double* offset) {
  const int64_t d = static_cast<int64_t>(row.size()), panel = kernels<T>().panel;
  for (int64_t j = 0; j < d; ++j) {
    const T* const column = right + j / panel * d * panel + j % panel;
    for (int64_t i = 0; i < d; ++i) offset[j] += row[static_cast<size_t>(i)] * static_cast<double>(column[i * panel]);
  }
}

/// Copies an offset in double to one in T, padded with zeros.
template <class T>
Buffer<T> padded_copy(const std::vector<double>& values) {
  Buffer<T> out(padded_width<T>(static_cast<int64_t>(values.size())));
  out.zero();
  for (size_t j = 0; j < values.size(); ++j) out[static_cast<int64_t>(j)] = static_cast<T>(values[j]);
  return out;
}

}  // namespace spectral_kernels
