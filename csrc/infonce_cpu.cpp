// InfoNCE and NT-Xent with their gradients, in blocks of similarities: the matrix of all of them is never stored. The
// rules are those of spectral_kernels/ops/infonce/reference.py.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "apply.h"
#include "strip_gradient.h"
#include "unit_rows.h"

namespace spectral_kernels {
namespace {

/// Loss and log-partition of every anchor; positive(i) is the unit row that anchor i should find.
template <class T, class Positive>
std::tuple<Tensor, Tensor> losses(const UnitRows<T>& anchors, const UnitRows<T>& others, double temperature,
                                  const Negatives& negatives, const Positive& positive, ScalarType type) {
  const int64_t n = anchors.n;
  const Tensor loss = make_tensor({n}, type), lse = make_tensor({n}, type);
  struct Scratch {
    Buffer<T> similarity, peak;
    Buffer<double> sum;
  };
  const double inverse = 1 / temperature;
  parallel_tasks(
      ceil_div(n, kAnchors),
      [&] { return Scratch{Buffer<T>(kAnchors * kOthers), Buffer<T>(kAnchors), Buffer<double>(kAnchors)}; },
      [&](int64_t task, Scratch& scratch) {
        const int64_t row = task * kAnchors, rows = std::min(kAnchors, n - row);
        std::fill_n(scratch.peak.data(), kAnchors, -std::numeric_limits<T>::infinity());
        scratch.sum.zero();
        for (int64_t column = 0; column < others.n; column += kOthers) {
          const LogitBlock<T> block =
              logits<T>(anchors, row, rows, others, column, std::min(kOthers, others.n - column),
                        static_cast<T>(inverse), negatives, scratch.similarity.data(), kOthers);
          kernels<T>().logsumexp(block, scratch.peak.data(), scratch.sum.data());
        }
        for (int64_t r = 0; r < rows; ++r) {
          const double a = product(anchors.row(row + r), positive(row + r), anchors.d) * inverse;
          const double negative = static_cast<double>(scratch.peak[r]) + std::log(scratch.sum[r]);
          const double value = scratch.sum[r] > 0 ? softplus(negative - a) : 0;
          data_of<T>(loss)[row + r] = static_cast<T>(value);
          data_of<T>(lse)[row + r] = static_cast<T>(a + value);
        }
      });
  return {loss, lse};
}

/// Rows of a gradient on unit rows, through the normalisation, to `out`.
template <class T>
void write_gradient(T* gradient, const UnitRows<T>& rows, int64_t first, int64_t count, const Tensor& out,
                    int64_t out_row) {
  const Kernels<T>& kernel = kernels<T>();
  const RowSink sink = sink_of(out, 0);
  kernel.tangent(gradient, rows.width, rows.row(first), rows.width, nullptr, count, rows.d,
                 rows.inverse_norms.data() + first);
  kernel.write(gradient, rows.width, count, rows.d, sink.row(out_row), sink.element, sink.stride);
}

/// Adds weight * row.
template <class T>
void add_row(T* to, T weight, const T* row, int64_t width) {
  for (int64_t j = 0; j < width; ++j) to[j] += weight * row[j];
}

using MaybeTensor = std::optional<Tensor>;

/// What a caller leaves out of the negatives; the copies that it reads live as long.
struct LeftOut {
  MaybeTensor mask, groups, other_groups;

  LeftOut(const MaybeTensor& mask_, const MaybeTensor& groups_, const MaybeTensor& other_groups_) : mask(mask_) {
    if (groups_) groups.emplace(torch::stable::contiguous(*groups_));
    if (groups_) other_groups.emplace(torch::stable::contiguous(other_groups_ ? *other_groups_ : *groups_));
  }

  Negatives beside(int64_t skip, int64_t other_skip, int64_t period) const {
    Negatives negatives{{skip, other_skip}, period};
    if (mask) {
      negatives.mask = data_of<bool>(*mask);
      negatives.mask_row = mask->stride(0);
      negatives.mask_column = mask->stride(1);
    }
    if (groups) {
      negatives.row_groups = data_of<int64_t>(*groups);
      negatives.column_groups = data_of<int64_t>(*other_groups);
      negatives.grouped = other_groups->size(0);
    }
    return negatives;
  }
};

std::tuple<Tensor, Tensor> info_nce(const Tensor& query_, const Tensor& key_, const MaybeTensor& queue_,
                                    double temperature, const MaybeTensor& mask, const MaybeTensor& groups,
                                    const MaybeTensor& queue_groups, const std::string& /*precision*/) {
  const Tensor query = dense_rows(query_), key = dense_rows(key_);
  return in_accumulation_type(query, [&](auto zero) {
    using T = decltype(zero);
    BadRow bad_query, bad_key, bad_queue;
    const int64_t n = query.size(0);
    const UnitRows<T> u({query}, {false, false}, {&bad_query}), v({key}, {false, !queue_}, {&bad_key});
    std::optional<UnitRows<T>> queue;
    if (queue_)
      queue.emplace(std::vector<Tensor>{dense_rows(*queue_)}, typename UnitRows<T>::Layouts{false, true},
                    std::vector<BadRow*>{&bad_queue});
    if (checks_enabled()) {
      bad_query.raise("query", 1, n);
      bad_key.raise("key", 1, v.n);
      if (queue) bad_queue.raise("queue", 1, queue->n);
    }
    const LeftOut left_out(mask, groups, queue_groups);
    return losses<T>(
        u, queue ? *queue : v, temperature, left_out.beside(queue ? -1 : 0, -1, n), [&](int64_t i) { return v.row(i); },
        accumulation_type(query));
  });
}

/// grad / temperature, and the same times the softmax mass on the negatives.
template <class T>
std::array<Buffer<T>, 2> anchor_weights(const Tensor& grad, const Tensor& loss, double temperature) {
  const int64_t n = grad.size(0), padded = padded_width<T>(n);
  std::array weights{Buffer<T>(padded), Buffer<T>(padded)};
  for (int64_t i = 0; i < padded; ++i) {
    const double scale = i < n ? static_cast<double>(data_of<T>(grad)[i]) / temperature : 0;
    weights[0][i] = static_cast<T>(scale);
    weights[1][i] = i < n ? static_cast<T>(scale * -std::expm1(-static_cast<double>(data_of<T>(loss)[i]))) : T(0);
  }
  return weights;
}

/// Into `along` (n,), where it has rows: u . gradient of anchors [row, row + count), of which the temperature's
/// gradient is a sum.
template <class T>
void write_along(const UnitRows<T>& u, const T* gradient, int64_t row, int64_t count, const Tensor& along) {
  if (along.size(0) == 0) return;
  for (int64_t r = 0; r < count; ++r)
    data_of<T>(along)[row + r] = static_cast<T>(product(u.row(row + r), gradient + r * u.width, u.d));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_backward(
    const Tensor& grad_, const Tensor& query_, const Tensor& key_, const MaybeTensor& queue_, const Tensor& loss_,
    const Tensor& lse_, double temperature, const MaybeTensor& mask, const MaybeTensor& groups,
    const MaybeTensor& queue_groups, const std::string& /*precision*/, bool queue_gradient, bool temperature_gradient) {
  const Tensor query = dense_rows(query_), key = dense_rows(key_), grad = torch::stable::contiguous(grad_);
  const Tensor loss = torch::stable::contiguous(loss_), lse = torch::stable::contiguous(lse_);
  const int64_t n = query.size(0), keys = key.size(0), d = query.size(1);
  const Tensor dquery = make_tensor({n, d}, query.scalar_type()), dkey = make_tensor({keys, d}, key.scalar_type());
  const Tensor along = make_tensor({temperature_gradient ? n : 0}, accumulation_type(query));
  const LeftOut left_out(mask, groups, queue_groups);
  const Tensor dqueue = make_tensor({queue_ && queue_gradient ? queue_->size(0) : 0, d},
                                    queue_ ? queue_->scalar_type() : query.scalar_type());
  in_accumulation_type(query, [&](auto zero) {
    using T = decltype(zero);
    BadRow bad;
    const UnitRows<T> u({query}, {false, false}, {&bad}), v({key}, {!queue_, !queue_}, {&bad});
    std::optional<UnitRows<T>> queue;
    if (queue_)
      queue.emplace(std::vector<Tensor>{dense_rows(*queue_)}, typename UnitRows<T>::Layouts{true, true},
                    std::vector<BadRow*>{&bad});
    const UnitRows<T>& others = queue ? *queue : v;
    const auto weights = anchor_weights<T>(grad, loss, temperature);
    StripGradient<T> strips(u, others, static_cast<T>(1 / temperature), left_out.beside(queue ? -1 : 0, -1, n),
                            !queue || queue_gradient);
    strips.run(weights[0].data(), data_of<T>(lse), [&](int64_t row, int64_t count, T* gradient) {
      for (int64_t r = 0; r < count; ++r)
        add_row(gradient + r * u.width, -weights[1][row + r], v.row(row + r), u.width);
      write_along(u, gradient, row, count, along);
      write_gradient(gradient, u, row, count, dquery, row);
    });
    parallel_tasks(
        ceil_div(keys, kAnchors), [&] { return Buffer<T>(kAnchors * v.width); },
        [&](int64_t task, Buffer<T>& gradient) {
          const int64_t row = task * kAnchors, count = std::min(kAnchors, keys - row);
          gradient.zero();
          if (!queue) std::copy_n(strips.dothers() + row * v.width, count * v.width, gradient.data());
          for (int64_t r = 0; r < std::min(count, n - row); ++r) {
            add_row(gradient.data() + r * v.width, -weights[1][row + r], u.row(row + r), v.width);
          }
          write_gradient(gradient.data(), v, row, count, dkey, row);
        });
    if (!queue || !queue_gradient) return;
    parallel_tasks(ceil_div(queue->n, kAnchors), [&](int64_t task) {
      const int64_t row = task * kAnchors, count = std::min(kAnchors, queue->n - row);
      write_gradient(strips.dothers() + row * queue->width, *queue, row, count, dqueue, row);
    });
  });
  return {dquery, dkey, dqueue, along};
}

/// The group of each of the 2B views.
MaybeTensor of_both_views(const MaybeTensor& groups_) {
  if (!groups_) return std::nullopt;
  const Tensor groups = torch::stable::contiguous(*groups_);
  const int64_t b = groups.size(0);
  const Tensor both = make_tensor({2 * b}, ScalarType::Long);
  for (const int64_t first : {int64_t{0}, b}) std::copy_n(data_of<int64_t>(groups), b, data_of<int64_t>(both) + first);
  return both;
}

std::tuple<Tensor, Tensor> nt_xent(const Tensor& z0_, const Tensor& z1_, double temperature, const MaybeTensor& groups,
                                   const std::string& /*precision*/) {
  const Tensor z0 = dense_rows(z0_), z1 = dense_rows(z1_);
  const LeftOut left_out(std::nullopt, of_both_views(groups), std::nullopt);
  return in_accumulation_type(z0, [&](auto zero) {
    using T = decltype(zero);
    const int64_t b = z0.size(0);
    BadRow bad0, bad1;
    const UnitRows<T> x({z0, z1}, {false, true}, {&bad0, &bad1});
    if (checks_enabled()) {
      bad0.raise("z0", 1, b);
      bad1.raise("z1", 1, b);
    }
    return losses<T>(
        x, x, temperature, left_out.beside(0, b, 2 * b), [&](int64_t i) { return x.row((i + b) % (2 * b)); },
        accumulation_type(z0));
  });
}

/// Similarities are symmetric here: the weight of a pair in both its anchors' losses is summed first, and one product
/// gives the gradient.
std::tuple<Tensor, Tensor, Tensor> nt_xent_backward(const Tensor& grad_, const Tensor& z0_, const Tensor& z1_,
                                                    const Tensor& loss_, const Tensor& lse_, double temperature,
                                                    const MaybeTensor& groups, const std::string& /*precision*/,
                                                    bool temperature_gradient) {
  const Tensor z0 = dense_rows(z0_), z1 = dense_rows(z1_), grad = torch::stable::contiguous(grad_);
  const Tensor loss = torch::stable::contiguous(loss_), lse = torch::stable::contiguous(lse_);
  const int64_t b = z0.size(0), n = 2 * b, d = z0.size(1);
  const Tensor d0 = make_tensor({b, d}, z0.scalar_type()), d1 = make_tensor({b, d}, z1.scalar_type());
  const Tensor along = make_tensor({temperature_gradient ? n : 0}, accumulation_type(z0));
  const LeftOut left_out(std::nullopt, of_both_views(groups), std::nullopt);
  in_accumulation_type(z0, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>();
    BadRow bad;
    const UnitRows<T> x({z0, z1}, {true, true}, {&bad, &bad});
    const auto weights = anchor_weights<T>(grad, loss, temperature);
    const Negatives negatives = left_out.beside(0, b, n);
    Buffer<T> log(padded_width<T>(n));
    log.zero();
    std::copy_n(data_of<T>(lse), n, log.data());
    struct Scratch {
      Buffer<T> similarity, sum;
    };
    parallel_tasks(
        ceil_div(n, kAnchors), [&] { return Scratch{Buffer<T>(kAnchors * kOthers), Buffer<T>(kAnchors * x.width)}; },
        [&](int64_t task, Scratch& scratch) {
          const int64_t row = task * kAnchors, rows = std::min(kAnchors, n - row);
          for (int64_t column = 0; column < n; column += kOthers) {
            const int64_t columns = std::min(kOthers, n - column);
            const LogitBlock<T> block = logits<T>(x, row, rows, x, column, columns, static_cast<T>(1 / temperature),
                                                  negatives, scratch.similarity.data(), kOthers);
            kernel.softmax(block, weights[0].data() + row, log.data() + row, weights[0].data() + column,
                           log.data() + column);
            kernel.multiply(scratch.similarity.data(), kOthers, round_up(rows, kernel.rows), x.block(column),
                            kOthers * kernel.panel, columns, d, scratch.sum.data(), x.width, column > 0);
          }
          for (int64_t r = 0; r < rows; ++r) {
            const int64_t other = (row + r + b) % n;
            add_row(scratch.sum.data() + r * x.width, -(weights[1][row + r] + weights[1][other]), x.row(other),
                    x.width);
          }
          write_along(x, scratch.sum.data(), row, rows, along);
          // the views' tensors meet somewhere inside a block
          const int64_t split = std::clamp<int64_t>(b - row, 0, rows);
          if (split > 0) write_gradient(scratch.sum.data(), x, row, split, d0, row);
          if (split < rows) {
            write_gradient(scratch.sum.data() + split * x.width, x, row + split, rows - split, d1, row + split - b);
          }
        });
  });
  return {d0, d1, along};
}

}  // namespace
}  // namespace spectral_kernels

STABLE_TORCH_LIBRARY_IMPL(spectral_kernels_cpp, CPU, m) {
  m.impl("info_nce", TORCH_BOX(&spectral_kernels::info_nce));
  m.impl("info_nce_backward", TORCH_BOX(&spectral_kernels::info_nce_backward));
  m.impl("nt_xent", TORCH_BOX(&spectral_kernels::nt_xent));
  m.impl("nt_xent_backward", TORCH_BOX(&spectral_kernels::nt_xent_backward));
}
