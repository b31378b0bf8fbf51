// Norms of InfoNCE's gradient on its unit anchors, in blocks of similarities. The rules are those of
// spectral_kernels/ops/infonce/reference.py.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "unit_rows.h"

namespace spectral_kernels {
namespace {

/// |m - own|^2 (w / temperature)^2 for every anchor: m the softmax mean of its negatives, w the softmax mass on them,
/// own(i) the positive of anchor i. Other and own rows count from one origin, which leaves softmax and norms as they
/// are and keeps the differences of rows that lie close together.
template <class T, class Own>
Tensor grad_norms(const UnitRows<T>& anchors, const UnitRows<T>& others, double temperature, const Negatives& negatives,
                  const Own& own, ScalarType type) {
  const Kernels<T>& kernel = kernels<T>();
  const int64_t n = anchors.n, d = anchors.d, width = anchors.width;
  const Tensor out = make_tensor({n}, type);
  struct Scratch {
    Buffer<T> similarity, peak, rescale, sum;
    Buffer<double> mass;
  };
  const double inverse = 1 / temperature;
  parallel_tasks(
      ceil_div(n, kAnchors),
      [&] {
        return Scratch{Buffer<T>(kAnchors * kOthers), Buffer<T>(kAnchors), Buffer<T>(kAnchors),
                       Buffer<T>(kAnchors * width), Buffer<double>(kAnchors)};
      },
      [&](int64_t task, Scratch& scratch) {
        const int64_t row = task * kAnchors, rows = std::min(kAnchors, n - row);
        std::fill_n(scratch.peak.data(), kAnchors, -std::numeric_limits<T>::infinity());
        scratch.mass.zero();
        for (int64_t column = 0; column < others.n; column += kOthers) {
          const int64_t columns = std::min(kOthers, others.n - column);
          const LogitBlock<T> block = logits<T>(anchors, row, rows, others, column, columns, static_cast<T>(inverse),
                                                negatives, scratch.similarity.data(), kOthers);
          kernel.flash_weights(block, scratch.peak.data(), scratch.mass.data(), scratch.rescale.data());
          for (int64_t r = 0; column > 0 && r < rows; ++r) {
            const T by = scratch.rescale[r];
            if (by == 1) continue;
            for (int64_t j = 0; j < width; ++j) scratch.sum[r * width + j] *= by;
          }
          kernel.multiply(scratch.similarity.data(), kOthers, round_up(rows, kernel.rows), others.block(column),
                          kOthers * kernel.panel, columns, d, scratch.sum.data(), width, column > 0);
        }
        for (int64_t r = 0; r < rows; ++r) {
          const T* const positive = own(row + r);
          const double a = product(anchors.row(row + r), positive, d) * inverse;
          const double negative = static_cast<double>(scratch.peak[r]) + std::log(scratch.mass[r]);
          const double weight = -std::expm1(-softplus(negative - a)) * inverse;
          double squares = 0;
          const double share = 1 / scratch.mass[r];
          for (int64_t j = 0; j < d; ++j) {
            const double mean = static_cast<double>(scratch.sum[r * width + j]) * share;
            squares += (mean - static_cast<double>(positive[j])) * (mean - static_cast<double>(positive[j]));
          }
          data_of<T>(out)[row + r] = static_cast<T>(weight * weight * squares);
        }
      });
  return out;
}

Tensor info_nce_grad_norms(const Tensor& query_, const Tensor& key_, const std::optional<Tensor>& queue_,
                           double temperature, const std::string& loss, const std::string& /*precision*/) {
  const Tensor query = dense_rows(query_), key = dense_rows(key_);
  const bool views = loss == "nt_xent";
  const int64_t n = query.size(0);
  return in_accumulation_type(query, [&](auto zero) {
    using T = decltype(zero);
    const ScalarType type = accumulation_type(query);
    BadRow bad_query, bad_key, bad_queue;
    const auto check = [&](int64_t queued) {
      if (!checks_enabled()) return;
      bad_query.raise("query", 1, n);
      bad_key.raise("key", 1, n);
      bad_queue.raise("queue", 1, queued);
    };
    const Tensor negatives = queue_ ? dense_rows(*queue_) : key;
    const std::vector<double> origin = exact_mean<T>(rows_of(negatives, true), negatives.size(0));
    if (views) {
      const UnitRows<T> anchors({query, key}, {false, false}, {&bad_query, &bad_key});
      const UnitRows<T> others({query, key}, {true, true}, {&bad_query, &bad_key}, origin.data());
      check(1);
      return grad_norms<T>(
          anchors, others, temperature, {{0, n}, 2 * n}, [&](int64_t i) { return others.row((i + n) % (2 * n)); },
          type);
    }
    const UnitRows<T> anchors({query}, {false, false}, {&bad_query});
    const UnitRows<T> keys({key}, {!queue_, !queue_}, {&bad_key}, origin.data());
    const auto own = [&](int64_t i) { return keys.row(i); };
    if (!queue_) {
      check(1);
      return grad_norms<T>(anchors, keys, temperature, {{0, -1}, n}, own, type);
    }
    const UnitRows<T> queue({negatives}, {true, true}, {&bad_queue}, origin.data());
    check(queue.n);
    return grad_norms<T>(anchors, queue, temperature, {{-1, -1}, n}, own, type);
  });
}

}  // namespace
}  // namespace spectral_kernels

STABLE_TORCH_LIBRARY_IMPL(spectral_kernels_cpp, CPU, m) {
  m.impl("info_nce_grad_norms", TORCH_BOX(&spectral_kernels::info_nce_grad_norms));
}
