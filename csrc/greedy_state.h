// What greedy selection knows while it picks: the pool, the rows it has read, the picks so far, and which row it
// prefers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "common.h"
#include "greedy_kernels.h"
#include "kernels.h"
#include "team.h"

namespace spectral_kernels {

constexpr double kTie = 1e-6;
constexpr double kTieFloor = 1e-12;
constexpr double kRidge = 1e-3;
constexpr double kNormFloor = 1e-12;
// of |x|^2 / ridge: q below it is rounding; worth an error from the least on. And the longest |x|^2 whose square is
// held
constexpr double kNoise = 0x1p-46, kLeastNoise = 1e-6, kLongestSquare = 0x1p490;
// of the longest row: float64 holds no square of the square of a shorter one
constexpr int kNegligible = -250;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Options {
  int64_t k;
  bool all_rows, logdet, normalize;
};

// One pool as the caller passed it.
struct Source {
  const char* data;
  RowType type;
  int64_t element, stride, n, d;
  const bool* valid;
  // float64 rows are read as x · 2^-exponent where this says so, and as zeros where they are negligible then
  bool scaled = false;
  int exponent = 0;

  const void* row(int64_t i) const { return data + i * stride * element; }
  bool allows(int64_t i) const { return valid == nullptr || valid[i]; }
  // So that the longest row that may be picked has length near 1 (`in_range` of reference.py).
  Source in_range() const {
    double largest = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double size = allows(i) ? largest_of(static_cast<const double*>(row(i))) : 0;
      if (std::isfinite(size)) largest = std::max(largest, size);
    }
    Source source = *this;
    source.scaled = true;
    std::frexp(largest, &source.exponent);
    return source;
  }
  double largest_of(const double* x) const {
    return std::transform_reduce(
        x, x + d, 0.0, [](double a, double b) { return a > b ? a : b; }, [](double v) { return std::fabs(v); });
  }
  std::vector<double> scaled_row(int64_t i) const {
    const double* const x = static_cast<const double*>(row(i));
    std::vector<double> row(x, x + d);
    const bool finite = std::isfinite(largest_of(x));
    for (double& value : row) value = std::ldexp(value, -exponent);
    const bool negligible = largest_of(row.data()) <= std::ldexp(1.0, kNegligible);
    if (negligible || (finite && !allows(i))) std::fill(row.begin(), row.end(), 0.0);
    return row;
  }
  // Rows of a large pool lie where no hardware looks ahead.
  void prefetch(int64_t i) const {
    const char* const from = static_cast<const char*>(row(i));
    for (int64_t at = 0; at < d * element; at += 64) __builtin_prefetch(from + at);
  }
};

// Rows read into the accumulation type, with what the method needs to know of each.
template <typename T>
struct Rows {
  int64_t d = 0;
  Buffer<T> values;             // megabytes that need no zeros
  std::vector<double> squares;  // |x|^2 as the method counts it
  std::vector<uint8_t> seen;

  void resize(int64_t n, int64_t features) {
    d = features;
    values = Buffer<T>(n * d);
    squares.resize(n);
    seen.resize(n);
  }
  const T* row(int64_t i) const { return values.data() + i * d; }

  // Returns false when the row holds NaN or Inf.
  bool read(const Source& source, int64_t from, int64_t to, bool normalize) {
    std::vector<double> scaled;
    if (source.scaled) scaled = source.scaled_row(from);
    const PackedRow packed =
        greedy_kernels<T>().pack(source.scaled ? scaled.data() : source.row(from), source.type, d, normalize,
                                 normalize && source.type != RowType::kDouble, values.data() + to * d);
    seen[to] = normalize ? std::sqrt(packed.squares) > kNormFloor : packed.any;
    squares[to] = normalize ? static_cast<double>(packed.any) : packed.squares;
    return packed.finite;
  }
};

// What has been picked so far, and the traces.
template <typename T>
struct Picked {
  const Options& options;
  int64_t d, steps = 0;
  double trace = 0, frobenius = 0, gain = 0;
  bool resolved = true;            // whether no q was all rounding
  std::vector<T> rows;             // (k, d) picks
  std::vector<double> directions;  // (k, d) w of the log-determinant
  std::vector<T> columns;          // (blocks, d, kGreedyBlock) all w, zero beyond the last
  std::vector<T> newest;           // (d) the last w
  std::vector<double> weights;     // (k + 1) sum of |w|^2 of the first i picks
  std::vector<double> squares, ranks, objectives;
  int64_t* indices;

  Picked(const Options& options_, int64_t d_, int64_t* indices_)
      : options(options_),
        d(d_),
        rows(options_.k * d_),
        columns((options_.k + kGreedyBlock - 1) / kGreedyBlock * kGreedyBlock * d_),
        newest(d_),
        weights(options_.k + 1),
        squares(options_.k),
        ranks(options_.k),
        objectives(options_.k),
        indices(indices_),
        products_(options_.k) {
    if (!options.logdet) return;
    directions.resize(options.k * d);
    stride_ = (d + 15) / 16 * 16 + 8;  // an odd number of cache lines
    for (std::vector<double>* row : {&wide_, &last_, &half_, &product_}) row->resize(stride_);
    if (d > options.k) return;
    inverse_ = Buffer<double>(d * stride_);
    inverse_.zero();
    for (int64_t j = 0; j < d; ++j) inverse_[j * stride_ + j] = 1 / kRidge;
  }

  int64_t in_block() const { return steps % kGreedyBlock; }
  int64_t full_blocks() const { return steps / kGreedyBlock; }
  const T* block(int64_t i) const { return columns.data() + i * d * kGreedyBlock; }

  // `score` of the picks before `from` and (x . w)^2 of each from there on, in float64; `work` is room for them. One is
  // added after the other, so that duplicates have the same score whenever they were last redone.
  double exact_score(const T* x, int64_t from, double score, std::vector<double>& work) const {
    work.resize(options.k + d);
    double* const products = work.data();
    if (options.logdet) {
      double* const wide = std::copy(x, x + d, products + options.k) - d;
      greedy_kernels<double>().project(directions.data() + from * d, steps - from, wide, d, products);
    } else {
      greedy_kernels<T>().project(rows.data() + from * d, steps - from, x, d, products);
    }
    for (int64_t i = 0; i < steps - from; ++i) score += products[i] * products[i];
    return score;
  }

  void add(int64_t index, const T* x, double square, double score) {
    std::copy(x, x + d, rows.begin() + steps * d);
    squares[steps] = square;
    weights[steps + 1] = weights[steps];
    if (options.logdet) {
      weights[steps + 1] += add_direction(x, square);
    } else {
      weights[steps + 1] += square;
      std::copy(x, x + d, newest.begin());
    }
    T* const column = columns.data() + full_blocks() * d * kGreedyBlock + in_block();
    for (int64_t j = 0; j < d; ++j) column[j * kGreedyBlock] = newest[j];
    indices[steps] = index;
    if (!options.logdet) count(steps, score);
    objectives[steps] = options.logdet ? gain : ranks[steps];
    ++steps;
  }

  // The ranks of picks by log-determinant, which no step asks for.
  void finish(Team& team) {
    if (!options.logdet) return;
    std::vector<double> scores(steps);
    team.for_each(steps, 16, [&](int64_t begin, int64_t end) {
      std::vector<double> products(steps);
      for (int64_t i = begin; i < end; ++i) scores[i] = rank_score(i, products);
    });
    for (int64_t i = 0; i < steps; ++i) count(i, scores[i]);
  }

 private:
  // Sum over the picks before `step` of (its row . theirs)^2.
  double rank_score(int64_t step, std::vector<double>& products) const {
    std::fill_n(products.begin(), step, 0.0);
    greedy_kernels<T>().single(rows.data(), step, rows.data() + step * d, d, products.data());
    double sum = 0;
    for (int64_t i = 0; i < step; ++i) sum += products[i];
    return sum;
  }

  void count(int64_t step, double score) {
    frobenius += 2 * score + squares[step] * squares[step];
    trace += squares[step];
    ranks[step] = frobenius > 0 ? trace * trace / frobenius : 0.0;
  }

  // w = A x / sqrt(1 + x A x). In float64, as what is left of |x|^2 / ridge is a small difference. Returns |w|^2.
  double add_direction(const T* x, double square) {
    const GreedyKernels<double>& kernels = greedy_kernels<double>();
    std::copy(x, x + d, wide_.begin());
    if (inverse_.size() > 0) {
      eigen_kernels().update_multiply(inverse_.data(), stride_, d, half_.data(), last_.data(), wide_.data(),
                                      product_.data());
    } else {
      // A x = x / ridge - sum_i w_i (w_i . x)
      for (int64_t j = 0; j < d; ++j) product_[j] = wide_[j] / kRidge;
      kernels.project(directions.data(), steps, wide_.data(), d, products_.data());
      kernels.combine(directions.data(), steps, products_.data(), product_.data(), d);
    }
    double q;
    kernels.project(product_.data(), 1, wide_.data(), d, &q);
    q = std::max(q, 0.0);
    const double noise = options.normalize ? 0 : square / kRidge * kNoise;
    resolved &= !(noise > kLeastNoise && q < noise);
    gain += std::log1p(q);
    const double scale = 1 / std::sqrt(1 + q);
    for (int64_t j = 0; j < d; ++j) {
      last_[j] = product_[j] * scale;
      half_[j] = 0.5 * last_[j];
      directions[steps * d + j] = last_[j];
      newest[j] = static_cast<T>(last_[j]);
    }
    double weight;
    kernels.project(last_.data(), 1, last_.data(), d, &weight);
    return weight;
  }

  int64_t stride_ = 0;
  // of the log-determinant: A but for the last pick, where it is smaller than the picks' directions, else empty
  Buffer<double> inverse_;
  std::vector<double> last_, half_, product_;  // the last w, half of it, A x
  std::vector<double> products_, wide_;
};

// The order in which rows are preferred, and how surely.
template <typename T>
struct Preference {
  const Picked<T>& picked;
  double share;

  explicit Preference(const Picked<T>& p) : picked(p), share(dot_error<T>(p.d)) {}

  // What a step minimises.
  double cost(double score, double square) const {
    if (picked.options.logdet) return score - square / kRidge;
    if (picked.options.normalize) return score;
    const double trace = picked.trace + square;
    return -trace * trace / (picked.frobenius + 2 * score + square * square);
  }

  // Bound on the rounding of cost(score): by Cauchy and Schwarz over the picks since the score was last exact.
  double error(double score, double square, double exact_score, double exact_weight) const {
    const double scale = square * (picked.weights[picked.steps] - exact_weight);
    const double grown = std::max(score - exact_score, 0.0);
    const double of_score = 2 * share * std::sqrt(grown * scale) + share * share * scale;
    if (picked.options.logdet || picked.options.normalize) return of_score;
    const double f = picked.frobenius + 2 * score + square * square;
    return 2 * of_score / f * -cost(score, square);
  }

  static double tie(double cost) { return kTie * std::fabs(cost) + kTieFloor; }
};

}  // namespace spectral_kernels
