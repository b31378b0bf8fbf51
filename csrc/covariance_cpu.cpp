// Covariance and second moment, with normalisation and centring fused, and their gradient.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <string>
#include <tuple>
#include <type_traits>

#include "apply.h"
#include "gram.h"

namespace spectral_kernels {
namespace {

/// Covariances and means as V of sums in T. Returns whether T was wide enough for all of them; `beyond` whether V was
/// not: the largest variance of a batch is infinite, or no normal number.
template <class T, class V>
bool covariance_into(const Tensor& z, bool center, bool normalize, int64_t correction, V* out, V* mean,
                     std::atomic<bool>& beyond) {
  const int64_t n = z.size(1), d = z.size(2);
  const double share = 1 / static_cast<double>(n), scale = 1 / static_cast<double>(n - correction);
  std::atomic<bool> wide{true};
  ScatterAll<T> scatter(z, center, normalize, "z", 0, z.size(0));
  scatter.run([&](int64_t batch, const Moments& moments, const T* shift, int64_t begin, int64_t end) {
    V* const matrix = out + batch * d * d;
    const auto entry = [&](int64_t i, int64_t j) {
      const double sum = moments.upper[i * scatter.stride() + j];
      return moments.columns == nullptr ? sum : sum - moments.columns[i] * moments.columns[j] * share;
    };
    if (begin == 0) {
      double spread = 0, largest = 0;
      for (int64_t j = 0; j < d; ++j) {
        spread += entry(j, j);
        largest = std::max(largest, scale * entry(j, j));
      }
      using Limits = std::numeric_limits<V>;
      const bool some = spread > negligible_share<double>() * moments.squares;
      if (some && (largest > Limits::max() || largest < Limits::min())) beyond = true;
      if (!wide_enough<T>(moments.squares, spread, n)) wide = false;
    }
    if constexpr (std::is_same_v<T, V>) {
      kernels<T>().write_symmetric(moments.upper, scatter.stride(), moments.columns, share, scale, d, begin, end,
                                   matrix);
    } else {
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t j = i; j < d; ++j) {
          const double value = scale * entry(i, j);
          matrix[i * d + j] = matrix[j * d + i] = static_cast<V>(i == j ? std::max(value, 0.0) : value);
        }
      }
    }
    for (int64_t j = begin; j < end; ++j) {
      mean[batch * d + j] =
          shift == nullptr ? V(0) : static_cast<V>(static_cast<double>(shift[j]) + moments.columns[j] * share);
    }
  });
  return wide;
}

struct CovarianceMean {
  Tensor covariance, mean;
  bool beyond;
};

CovarianceMean covariance_and_mean(const Tensor& rows, bool center, bool normalize, int64_t correction) {
  const Tensor z = dense_rows(rows);
  const int64_t b = z.size(0), d = z.size(2);
  const Tensor out = make_tensor({b, d, d}, accumulation_type(z)), mean = make_tensor({b, d}, accumulation_type(z));
  std::atomic<bool> beyond{false};
  in_accumulation_type(z, [&](auto zero) {
    using T = decltype(zero);
    if (covariance_into<T>(z, center, normalize, correction, data_of<T>(out), data_of<T>(mean), beyond)) return;
    beyond = false;
    covariance_into<double>(z, center, normalize, correction, data_of<T>(out), data_of<T>(mean), beyond);
  });
  return {out, mean, beyond};
}

std::tuple<Tensor, Tensor> covariance_mean(const Tensor& z, bool center, bool normalize, int64_t correction) {
  const CovarianceMean found = covariance_and_mean(z, center, normalize, correction);
  return {found.covariance, found.mean};
}

Tensor covariance(const Tensor& z, bool center, bool normalize, int64_t correction, const std::string& /*precision*/) {
  const CovarianceMean found = covariance_and_mean(z, center, normalize, correction);
  if (found.beyond) throw_beyond(z);
  return found.covariance;
}

Tensor covariance_backward(const Tensor& grad_, const Tensor& rows, bool center, bool normalize, int64_t correction,
                           const std::string& /*precision*/) {
  const Tensor z = dense_rows(rows), grad = torch::stable::contiguous(grad_);
  const int64_t b = z.size(0), n = z.size(1), d = z.size(2);
  const Tensor out = make_tensor({b, n, d}, z.scalar_type());
  in_accumulation_type(z, [&](auto zero) {
    using T = decltype(zero);
    Buffer<T> right(d * padded_width<T>(d));
    for (int64_t batch = 0; batch < b; ++batch) {
      const RowView view = rows_of(z, normalize, batch);
      const T* const g = data_of<T>(grad) + batch * d * d;
      const T scale = T(1) / static_cast<T>(n - correction);
      to_panels<T>(d, d, right.data(), [&](int64_t i, int64_t j) { return (g[i * d + j] + g[j * d + i]) * scale; });
      Apply<T> apply{{{view, nullptr, right.data()}}};
      if (!center) {
        apply.all(n, sink_of(out, batch));
        continue;
      }
      const Shift<T> shift(exact_mean<T>(view, n));
      std::vector<double> left(static_cast<size_t>(d));
      add_product(shift.rest, right.data(), left.data());
      const Buffer<T> offset = padded_copy<T>(left);
      apply.terms[0].shift = shift.shift.data();
      apply.offset = offset.data();
      apply.all(n, sink_of(out, batch));
    }
  });
  return out;
}

}  // namespace
}  // namespace spectral_kernels

STABLE_TORCH_LIBRARY_IMPL(spectral_kernels_cpp, CPU, m) {
  m.impl("covariance", TORCH_BOX(&spectral_kernels::covariance));
  m.impl("covariance_backward", TORCH_BOX(&spectral_kernels::covariance_backward));
  m.impl("covariance_mean", TORCH_BOX(&spectral_kernels::covariance_mean));
}
