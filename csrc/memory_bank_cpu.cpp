// The memory bank's rows in and out. A bank of millions of rows lies in no cache, so that what counts is to ask for
// rows ahead of their turn.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "apply.h"
#include "gather.h"

namespace spectral_kernels {
namespace {

constexpr int64_t kAhead = 8;

/// Fetches a row that will be read or written.
void prefetch_row(const RowSink& sink, int64_t row, int64_t bytes) {
  const char* const from = static_cast<const char*>(sink.row(row));
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 1);
}

template <class T>
bool is_finite(const T* x, int64_t d) {
  return std::all_of(x, x + d, [](T value) { return std::isfinite(value); });
}

/// Stores unit rows of z at `indices`, a later row over an earlier one: rows that are inactive stay as they are, rows
/// of length up to 1e-12 make theirs unseen. `updated` holds the step of each row's last update, -1 where unseen.
/// Returns by how many the seen rows have grown; throws before anything is written where z holds NaN or Inf.
int64_t memory_bank_update(const Tensor& embeddings, const Tensor& updated_, const Tensor& active_,
                           const Tensor& indices_, const Tensor& rows, int64_t step) {
  const Tensor z = dense_rows(rows), indices = checked_indices(indices_, embeddings.size(0));
  const int64_t n = z.size(0), d = z.size(1);
  const int64_t* const index = data_of<int64_t>(indices);
  const bool* const active = data_of<bool>(active_);
  int64_t* const updated = data_of<int64_t>(updated_);
  const RowSink sink = sink_of(embeddings, 0);
  const int64_t bytes = d * element_bytes(sink.element);
  int64_t grown = 0;
  const auto store = [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>();
    const int64_t width = padded_width<T>(d);
    Buffer<T> unit(n * width), inverse_norms(n);
    const ReadResult result =
        kernel.read(rows_of(z, true), 0, n, nullptr, unit.data(), plain_rows<T>(width), inverse_norms.data());
    if (result.bad >= 0 && checks_enabled()) throw_bad_row("z", 1, 0, result.bad);
    for (int64_t i = 0; i < n; ++i) {
      if (i + kAhead < n) prefetch_row(sink, index[i + kAhead], bytes);
      const int64_t row = index[i];
      if (!active[row]) continue;
      const T* const x = unit.data() + i * width;
      // no longer than NORM_FLOOR of ops/_rows.py: unseen. A row that is not finite has no norm either; with checks off
      // it is stored, for all to see
      const bool seen = (inverse_norms[i] > 0 && inverse_norms[i] < T(1e12)) || (result.bad >= 0 && !is_finite(x, d));
      grown += static_cast<int64_t>(seen) - static_cast<int64_t>(updated[row] >= 0);
      updated[row] = seen ? step : -1;
      if (seen) {
        kernel.write(x, width, 1, d, sink.row(row), sink.element, sink.stride);
      } else {
        std::memset(sink.row(row), 0, static_cast<size_t>(bytes));
      }
    }
  };
  if (z.scalar_type() == ScalarType::Double || embeddings.scalar_type() == ScalarType::Double) {
    store(double{});
  } else {
    store(float{});
  }
  return grown;
}

/// Rows `indices` of the bank, copied.
Tensor memory_bank_gather(const Tensor& embeddings, const Tensor& indices_) {
  const Tensor indices = checked_indices(indices_, embeddings.size(0));
  const int64_t n = indices.size(0), d = embeddings.size(1);
  const Tensor out = make_tensor({n, d}, embeddings.scalar_type());
  const RowSink from = sink_of(embeddings, 0), to = sink_of(out, 0);
  const int64_t bytes = d * element_bytes(from.element), *const index = data_of<int64_t>(indices);
  // a share that is worth a thread's waking up
  const int64_t share = std::max<int64_t>(1, (int64_t{1} << 20) / bytes);
  parallel_tasks(ceil_div(n, share), [&](int64_t task) {
    const int64_t end = std::min(n, (task + 1) * share);
    for (int64_t i = task * share; i < end; ++i) {
      if (i + kAhead < end) prefetch_row(from, index[i + kAhead], bytes);
      std::memcpy(to.row(i), from.row(index[i]), static_cast<size_t>(bytes));
    }
  });
  return out;
}

}  // namespace
}  // namespace spectral_kernels

STABLE_TORCH_LIBRARY_IMPL(spectral_kernels_cpp, CPU, m) {
  m.impl("memory_bank_update", TORCH_BOX(&spectral_kernels::memory_bank_update));
  m.impl("memory_bank_gather", TORCH_BOX(&spectral_kernels::memory_bank_gather));
}
