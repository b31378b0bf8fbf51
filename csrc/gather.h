// Batches of rows as the operators over a pool take them: indices checked, rows named by their place in the pool.
#pragma once

#include "rows.h"

namespace spectral_kernels {

/// One batch: n rows of a view, and where a bad one is reported.
struct BatchRows {
  RowView view;
  int64_t n;
  BadRow* bad;
  int64_t offset;  // of the batch's first row in the argument, where rows are not gathered

  /// `row` counts from the start of the view.
  void report(int64_t row) const {
    if (row >= 0 && bad != nullptr) bad->report(view.index == nullptr ? offset + row : view.index[row]);
  }
};

/// Indices into a pool of N rows, contiguous; `name` is what the caller knows them by.
inline Tensor checked_indices(const Tensor& indices, int64_t rows, const std::string& name = "indices") {
  if (indices.scalar_type() != ScalarType::Long)
    throw std::runtime_error("spectral_kernels: " + name + " must be int64");
  const Tensor dense = torch::stable::contiguous(indices);
  const int64_t* const index = static_cast<const int64_t*>(dense.const_data_ptr());
  for (int64_t i = 0; i < dense.numel(); ++i) {
    if (index[i] < 0 || index[i] >= rows) {
      throw std::runtime_error("spectral_kernels: " + name + " holds " + std::to_string(index[i]) + ", outside [0, " +
                               std::to_string(rows) + ")");
    }
  }
  return dense;
}

inline BatchRows batch_of_pool(const Tensor& pool, const Tensor& indices, bool normalize, int64_t batch, BadRow* bad) {
  const int64_t n = indices.size(1);
  RowView view = rows_of(pool, normalize);
  view.index = static_cast<const int64_t*>(indices.const_data_ptr()) + batch * n;
  return {view, n, bad, 0};
}

inline BatchRows batch_of_tensor(const Tensor& z, bool normalize, int64_t batch, BadRow* bad) {
  return {rows_of(z, normalize, batch), z.size(1), bad, batch * z.size(1)};
}

/// Where each row of the pool appears among the indices, in order: places[starts[row]] up to places[starts[row + 1]].
struct Appearances {
  std::vector<int64_t> starts, places;

  Appearances(const int64_t* index, int64_t count, int64_t rows)
      : starts(static_cast<size_t>(rows) + 1), places(static_cast<size_t>(count)) {
    for (int64_t i = 0; i < count; ++i) ++starts[static_cast<size_t>(index[i]) + 1];
    for (size_t r = 1; r < starts.size(); ++r) starts[r] += starts[r - 1];
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t i = 0; i < count; ++i) places[static_cast<size_t>(next[static_cast<size_t>(index[i])]++)] = i;
  }
};

}  // namespace spectral_kernels
