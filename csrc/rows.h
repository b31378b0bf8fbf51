// Tensors as the kernels see them: views of their rows, and what a pass over rows keeps.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "common.h"
#include "kernels.h"

namespace spectral_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Element element_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return Element::kDouble;
    case ScalarType::Float:
      return Element::kFloat;
    case ScalarType::Half:
      return Element::kHalf;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    default:
      throw std::runtime_error("spectral_kernels: rows must be float64, float32, float16 or bfloat16");
  }
}

inline int64_t element_bytes(Element element) {
  return element == Element::kDouble ? 8 : element == Element::kFloat ? 4 : 2;
}

/// The tensor itself when its last dimension lies densely, else a contiguous copy.
inline Tensor dense_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

/// Rows of a (n, d) tensor with dense rows, or of one batch of a (b, n, d) one.
inline RowView rows_of(const Tensor& tensor, bool normalize, int64_t batch = 0) {
  const int64_t last = tensor.dim() - 1;
  const Element element = element_of(tensor);
  const char* data = static_cast<const char*>(tensor.const_data_ptr());
  if (last == 2) data += batch * tensor.stride(0) * element_bytes(element);
  return {data, element, tensor.stride(last - 1), nullptr, tensor.size(last), normalize};
}

/// float64 for float64 rows, else float32.
inline ScalarType accumulation_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

/// Throws for results that the accumulation type of the rows cannot hold.
[[noreturn]] inline void throw_beyond(const Tensor& z) {
  const bool wide = z.scalar_type() == ScalarType::Double;
  throw std::runtime_error(std::string("spectral_kernels: z has variances beyond ") + (wide ? "float64" : "float32") +
                           "; scale its rows" + (wide ? "" : ", or give float64"));
}

inline Tensor make_tensor(std::initializer_list<int64_t> shape, ScalarType type) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), type);
}

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

/// `T` says float or double by its type: body(T{}) in the accumulation type of the rows.
template <class Body>
auto in_accumulation_type(const Tensor& tensor, const Body& body) {
  return tensor.scalar_type() == ScalarType::Double ? body(double{}) : body(float{});
}

template <class T>
int64_t padded_width(int64_t d) {
  return round_up(d, kernels<T>().panel);
}

/// Rows read at a time.
constexpr int64_t kReadRows = 128;

template <class T>
Block panels_of(int64_t rows) {
  return {kernels<T>().panel, rows * kernels<T>().panel};
}

template <class T>
Block plain_rows(int64_t stride) {
  return {stride, kernels<T>().panel};
}

/// Sums over rows, in double whatever T is.
struct RowSums {
  std::vector<double> columns;  // of the shifted rows
  double squares = 0;           // of the norms, before the shift
};

/// Sums over `count` rows: begin, begin + step, ... Bad rows go to `bad`, numbered from `offset`.
template <class T>
RowSums sum_rows(const RowView& view, int64_t begin, int64_t step, int64_t count, const T* shift, BadRow* bad,
                 int64_t offset) {
  const Kernels<T>& kernel = kernels<T>();
  RowSums sums{std::vector<double>(static_cast<size_t>(view.d)), 0};
  const int64_t width = padded_width<T>(view.d), run = step == 1 ? std::min<int64_t>(count, 32) : 1;
  Buffer<T> rows(run * width);
  for (int64_t i = 0; i < count; i += run) {
    const int64_t taken = std::min(run, count - i);
    const ReadResult result =
        kernel.read(view, begin + i * step, taken, shift, rows.data(), plain_rows<T>(width), nullptr);
    if (result.bad >= 0 && bad != nullptr) bad->report(offset + result.bad);
    sums.squares += result.squares;
    kernel.column_sums(rows.data(), plain_rows<T>(width), taken, view.d, sums.columns.data());
  }
  return sums;
}

/// The mean of the rows as a shift in T, padded with zeros; `squares`, when given, receives the sum of squared norms.
template <class T>
void mean_shift(const RowView& view, int64_t n, T* shift, double* squares, BadRow* bad, int64_t offset) {
  const RowSums sums = sum_rows<T>(view, 0, 1, n, nullptr, bad, offset);
  const int64_t width = padded_width<T>(view.d);
  for (int64_t j = 0; j < width; ++j) {
    shift[j] = j < view.d ? static_cast<T>(sums.columns[static_cast<size_t>(j)] / static_cast<double>(n)) : T(0);
  }
  if (squares != nullptr) *squares = sums.squares;
}

/// Mean of a sample of the rows: near enough to the mean that nothing cancels, for a small part of a pass.
template <class T>
void sampled_shift(const RowView& view, int64_t n, T* shift) {
  const int64_t sample = std::min<int64_t>(n, 16), step = n / sample;
  const RowSums sums = sum_rows<T>(view, 0, step, sample, nullptr, nullptr, 0);
  const int64_t width = padded_width<T>(view.d);
  for (int64_t j = 0; j < width; ++j) {
    const double mean = j < view.d ? sums.columns[static_cast<size_t>(j)] / static_cast<double>(sample) : 0;
    // a NaN or Inf row is reported by the pass that reads all rows
    shift[j] = std::isfinite(mean) ? static_cast<T>(mean) : T(0);
  }
}

/// Mean of the rows to the rounding of their spread, not of the mean itself.
template <class T>
std::vector<double> exact_mean(const RowView& view, int64_t n, BadRow* bad = nullptr, int64_t offset = 0) {
  Buffer<T> shift(padded_width<T>(view.d));
  sampled_shift<T>(view, n, shift.data());
  const int64_t runs = std::clamp<int64_t>(n * view.d / (int64_t{1} << 18), 1, 32);
  std::vector<RowSums> sums(static_cast<size_t>(runs));
  parallel_tasks(runs, [&](int64_t run) {
    const int64_t begin = n * run / runs, end = n * (run + 1) / runs;
    sums[static_cast<size_t>(run)] = sum_rows<T>(view, begin, 1, end - begin, shift.data(), bad, offset);
  });
  std::vector<double> mean(static_cast<size_t>(view.d));
  for (size_t j = 0; j < mean.size(); ++j) {
    double sum = 0;
    for (const RowSums& part : sums) sum += part.columns[j];
    mean[j] = static_cast<double>(shift[static_cast<int64_t>(j)]) + sum / static_cast<double>(n);
  }
  return mean;
}

}  // namespace spectral_kernels
