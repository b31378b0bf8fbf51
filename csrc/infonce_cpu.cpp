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

namespace spectral_kernels {
namespace {

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

/// Which others are negatives: all but (row + skip) modulo period.
struct Negatives {
  int64_t skip[2];
  int64_t period;
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
  return {
      similarity,      stride, rows, columns, row, column, inverse_temperature, {negatives.skip[0], negatives.skip[1]},
      negatives.period};
}

template <class T>
double product(const T* a, const T* b, int64_t d) {
  double sum = 0;
  for (int64_t j = 0; j < d; ++j) sum += static_cast<double>(a[j]) * static_cast<double>(b[j]);
  return sum;
}

/// log(1 + e^x)
double softplus(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

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

std::tuple<Tensor, Tensor> info_nce(const Tensor& query_, const Tensor& key_, const std::optional<Tensor>& queue_,
                                    double temperature, const std::string& precision) {
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
      bad_key.raise("key", 1, n);
      if (queue) bad_queue.raise("queue", 1, queue->n);
    }
    const Negatives negatives{{queue ? -1 : 0, -1}, n};
    return losses<T>(
        u, queue ? *queue : v, temperature, negatives, [&](int64_t i) { return v.row(i); }, accumulation_type(query));
  });
}

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
      if (others_too_) others(row, rows);
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

  void others(int64_t row, int64_t rows) {
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

std::tuple<Tensor, Tensor, Tensor> info_nce_backward(const Tensor& grad_, const Tensor& query_, const Tensor& key_,
                                                     const std::optional<Tensor>& queue_, const Tensor& loss_,
                                                     const Tensor& lse_, double temperature,
                                                     const std::string& precision, bool queue_gradient) {
  const Tensor query = dense_rows(query_), key = dense_rows(key_), grad = torch::stable::contiguous(grad_);
  const Tensor loss = torch::stable::contiguous(loss_), lse = torch::stable::contiguous(lse_);
  const int64_t n = query.size(0), d = query.size(1);
  const Tensor dquery = make_tensor({n, d}, query.scalar_type()), dkey = make_tensor({n, d}, key.scalar_type());
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
    StripGradient<T> strips(u, others, static_cast<T>(1 / temperature), {{queue ? -1 : 0, -1}, n},
                            !queue || queue_gradient);
    strips.run(weights[0].data(), data_of<T>(lse), [&](int64_t row, int64_t count, T* gradient) {
      for (int64_t r = 0; r < count; ++r)
        add_row(gradient + r * u.width, -weights[1][row + r], v.row(row + r), u.width);
      write_gradient(gradient, u, row, count, dquery, row);
    });
    parallel_tasks(
        ceil_div(n, kAnchors), [&] { return Buffer<T>(kAnchors * v.width); },
        [&](int64_t task, Buffer<T>& gradient) {
          const int64_t row = task * kAnchors, count = std::min(kAnchors, n - row);
          gradient.zero();
          if (!queue) std::copy_n(strips.dothers() + row * v.width, count * v.width, gradient.data());
          for (int64_t r = 0; r < count; ++r) {
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
  return {dquery, dkey, dqueue};
}

std::tuple<Tensor, Tensor> nt_xent(const Tensor& z0_, const Tensor& z1_, double temperature,
                                   const std::string& precision) {
  const Tensor z0 = dense_rows(z0_), z1 = dense_rows(z1_);
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
        x, x, temperature, {{0, b}, 2 * b}, [&](int64_t i) { return x.row((i + b) % (2 * b)); }, accumulation_type(z0));
  });
}

/// Similarities are symmetric here: the weight of a pair in both its anchors' losses is summed first, and one product
/// gives the gradient.
std::tuple<Tensor, Tensor> nt_xent_backward(const Tensor& grad_, const Tensor& z0_, const Tensor& z1_,
                                            const Tensor& loss_, const Tensor& lse_, double temperature,
                                            const std::string& precision) {
  const Tensor z0 = dense_rows(z0_), z1 = dense_rows(z1_), grad = torch::stable::contiguous(grad_);
  const Tensor loss = torch::stable::contiguous(loss_), lse = torch::stable::contiguous(lse_);
  const int64_t b = z0.size(0), n = 2 * b, d = z0.size(1);
  const Tensor d0 = make_tensor({b, d}, z0.scalar_type()), d1 = make_tensor({b, d}, z1.scalar_type());
  in_accumulation_type(z0, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernel = kernels<T>();
    BadRow bad;
    const UnitRows<T> x({z0, z1}, {true, true}, {&bad, &bad});
    const auto weights = anchor_weights<T>(grad, loss, temperature);
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
                                                  {{0, b}, n}, scratch.similarity.data(), kOthers);
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
          // the views' tensors meet somewhere inside a block
          const int64_t split = std::clamp<int64_t>(b - row, 0, rows);
          if (split > 0) write_gradient(scratch.sum.data(), x, row, split, d0, row);
          if (split < rows) {
            write_gradient(scratch.sum.data() + split * x.width, x, row + split, rows - split, d1, row + split - b);
          }
        });
  });
  return {d0, d1};
}

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
                           double temperature, const std::string& loss, const std::string& precision) {
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
  m.impl("info_nce", TORCH_BOX(&spectral_kernels::info_nce));
  m.impl("info_nce_backward", TORCH_BOX(&spectral_kernels::info_nce_backward));
  m.impl("nt_xent", TORCH_BOX(&spectral_kernels::nt_xent));
  m.impl("nt_xent_backward", TORCH_BOX(&spectral_kernels::nt_xent_backward));
  m.impl("info_nce_grad_norms", TORCH_BOX(&spectral_kernels::info_nce_grad_norms));
}
