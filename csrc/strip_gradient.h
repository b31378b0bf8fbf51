// The gradient of InfoNCE on anchors and others, a strip of anchors at a time.
#pragma once

#include <algorithm>

#include "unit_rows.h"

namespace spectral_kernels {

/// Gradients of a strip of anchors on themselves and, added up, on the others. The strip's softmax weights are worked
/// out once and used by both products.
template <class T>
class StripGradient {
 public:
  StripGradient(const UnitRows<T>& anchors, const UnitRows<T>& others, T inverse_temperature,
                const Negatives& negatives, bool others_too)
      : u_(anchors),
        v_(others),
        inverse_(inverse_temperature),
        negatives_(negatives),
        stride_(padded_width<T>(others.n)),
        strip_(std::clamp<int64_t>((int64_t{1} << 22) / stride_ / kAnchors * kAnchors, kAnchors, 512)),
        others_too_(others_too),
        weights_(strip_ * stride_),
        panels_(strip_ * anchors.width),
        dothers_(others_too ? round_up(others.n, kOthers) * others.width : 0) {
    dothers_.zero();
  }

  /// each(row, count, gradient): the gradient on the unit anchors, kAnchors at a time.
  template <class Each>
  void run(const T* weight, const T* lse, const Each& each) {
    for (int64_t row = 0; row < u_.n; row += strip_) {
      const int64_t rows = std::min(strip_, u_.n - row);
      anchors(row, rows, weight, lse, each);
      if (others_too_) others(rows);
    }
  }

  T* dothers() { return dothers_.data(); }

 private:
  template <class Each>
  void anchors(int64_t row, int64_t rows, const T* weight, const T* lse, const Each& each) {
    const Kernels<T>& kernel = kernels<T>();
    parallel_tasks(
        ceil_div(rows, kAnchors), [&] { return Buffer<T>(kAnchors * u_.width); },
        [&](int64_t task, Buffer<T>& sum) {
          const int64_t first = task * kAnchors, count = std::min(kAnchors, rows - first);
          for (int64_t column = 0; column < v_.n; column += kOthers) {
            const int64_t columns = std::min(kOthers, v_.n - column);
            T* const weights = weights_.data() + first * stride_ + column;
            const LogitBlock<T> block =
                logits<T>(u_, row + first, count, v_, column, columns, inverse_, negatives_, weights, stride_);
            kernel.softmax(block, weight + row + first, lse + row + first, nullptr, nullptr);
            kernel.multiply(weights, stride_, round_up(count, kernel.rows), v_.block(column), kOthers * kernel.panel,
                            columns, u_.d, sum.data(), u_.width, column > 0);
          }
          // the anchors as the other product's right operand
          for (int64_t j = 0; j < u_.width; j += kernel.panel) {
            for (int64_t i = 0; i < count; ++i) {
              std::copy_n(u_.row(row + first + i) + j, kernel.panel,
                          panels_.data() + j * strip_ + (first + i) * kernel.panel);
            }
          }
          each(row + first, count, sum.data());
        });
  }

  void others(int64_t rows) {
    const Kernels<T>& kernel = kernels<T>();
    parallel_tasks(ceil_div(v_.n, kAnchors), [&](int64_t task) {
      const int64_t first = task * kAnchors, count = std::min(kAnchors, v_.n - first);
      kernel.multiply_transposed(weights_.data() + first, stride_, rows, round_up(count, kernel.rows), panels_.data(),
                                 strip_ * kernel.panel, u_.d, dothers_.data() + first * v_.width, v_.width, true);
    });
  }

  const UnitRows<T>&u_, &v_;
  const T inverse_;
  const Negatives negatives_;
  const int64_t stride_, strip_;
  const bool others_too_;
  Buffer<T> weights_, panels_, dothers_;
};

}  // namespace spectral_kernels
