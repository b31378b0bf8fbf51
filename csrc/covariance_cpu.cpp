// Covariance and second moment, with normalisation and centring fused, and their gradient.

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "apply.h"
#include "scatter.h"

namespace spectral_kernels {
namespace {

std::tuple<Tensor, Tensor> covariance_mean(const Tensor& rows, bool center, bool normalize, int64_t correction) {
  const Tensor z = dense_rows(rows);
  const int64_t b = z.size(0), n = z.size(1), d = z.size(2);
  const Tensor out = make_tensor({b, d, d}, accumulation_type(z)), mean = make_tensor({b, d}, accumulation_type(z));
  in_accumulation_type(z, [&](auto zero) {
    using T = decltype(zero);
    ScatterAll<T> scatter(z, center, normalize, "z", 0, b);
    scatter.run([&](int64_t batch, const Moments& moments, const T* shift, int64_t begin, int64_t end) {
      kernels<T>().write_symmetric(moments.upper, scatter.stride(), moments.columns, 1 / static_cast<double>(n),
                                   1 / static_cast<double>(n - correction), d, begin, end,
                                   data_of<T>(out) + batch * d * d);
      for (int64_t j = begin; j < end; ++j) {
        data_of<T>(mean)[batch * d + j] =
            shift == nullptr
                ? T(0)
                : static_cast<T>(static_cast<double>(shift[j]) + moments.columns[j] / static_cast<double>(n));
      }
    });
  });
  return {out, mean};
}

Tensor covariance(const Tensor& z, bool center, bool normalize, int64_t correction, const std::string& precision) {
  return std::get<0>(covariance_mean(z, center, normalize, correction));
}

Tensor covariance_backward(const Tensor& grad_, const Tensor& rows, bool center, bool normalize, int64_t correction,
                           const std::string& precision) {
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
