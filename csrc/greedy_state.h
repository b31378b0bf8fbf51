// What greedy selection knows while it picks: the pool, the rows it has read, the picks so far, and which row it
// prefers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "common.h"
#include "greedy_kernels.h"

namespace spectral_kernels {

constexpr double kTie = 1e-6;
constexpr double kTieFloor = 1e-12;
constexpr double kRidge = 1e-3;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

enum class Step { kFirst, kRandom, kRaise, kLower };

struct Options {
  int64_t k;
  bool all_rows, logdet, normalize;
  std::optional<std::pair<double, double>> window;
};

// One pool as the caller passed it.
struct Source {
  const char* data;
  RowType type;
  int64_t element, stride, n, d;
  const bool* valid;

  const void* row(int64_t i) const { return data + i * stride * element; }
  bool allows(int64_t i) const { return valid == nullptr || valid[i]; }
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
    const double norm2 = greedy_kernels<T>().pack(source.row(from), source.type, d, normalize,
                                                  normalize && source.type != RowType::kDouble, values.data() + to * d);
    seen[to] = norm2 > 0;
    squares[to] = normalize ? static_cast<double>(seen[to]) : norm2;
    return std::isfinite(norm2);
  }
};

// What has been picked so far, and the traces.
template <typename T>
struct Picked {
  const Options& options;
  int64_t d, steps = 0;
  double trace = 0, frobenius = 0, gain = 0;
  std::vector<T> rows;        // (k, d) picks
  std::vector<T> directions;  // (k, d) w of the log-determinant
  std::vector<T> columns;     // (blocks, d, kGreedyBlock) all w, zero beyond the last
  std::vector<double> ranks, objectives;
  int64_t* indices;

  Picked(const Options& options_, int64_t d_, int64_t* indices_)
      : options(options_),
        d(d_),
        rows(options_.k * d_),
        columns((options_.k + kGreedyBlock - 1) / kGreedyBlock * kGreedyBlock * d_),
        ranks(options_.k),
        objectives(options_.k),
        indices(indices_) {
    if (options.logdet) directions.resize(options.k * d);
  }

  int64_t in_block() const { return steps % kGreedyBlock; }
  int64_t full_blocks() const { return steps / kGreedyBlock; }
  const T* block(int64_t i) const { return columns.data() + i * d * kGreedyBlock; }
  const T* newest() const { return rows.data() + (steps - 1) * d; }
  const T* newest_direction() const { return directions.data() + (steps - 1) * d; }

  // Sum over the picks of (x . pick)^2, in float64.
  double exact_score(const T* x, int64_t from = 0) const {
    double sum = 0;
    for (int64_t i = from; i < steps; ++i) {
      const double dot = greedy_kernels<T>().dot(x, rows.data() + i * d, d);
      sum += dot * dot;
    }
    return sum;
  }

  void add(int64_t index, const T* x, double square, double score) {
    if (options.logdet) score = exact_score(x);
    frobenius += 2 * score + square * square;
    trace += square;
    std::copy(x, x + d, rows.begin() + steps * d);
    T* column = columns.data() + full_blocks() * d * kGreedyBlock + in_block();
    if (options.logdet) {
      add_direction(x, column);
    } else {
      for (int64_t j = 0; j < d; ++j) column[j * kGreedyBlock] = x[j];
    }
    indices[steps] = index;
    ranks[steps] = rank();
    objectives[steps] = options.logdet ? gain : rank();
    ++steps;
  }

  double rank() const { return frobenius > 0 ? trace * trace / frobenius : 0.0; }

  Step next() const {
    if (steps == 0) return Step::kFirst;
    // an edge is met within the tie tolerance, or rounding would decide where the rank sits on it
    if (!options.window || rank() < options.window->first * (1 - kTie)) return Step::kRaise;
    return rank() <= options.window->second * (1 + kTie) ? Step::kRandom : Step::kLower;
  }

 private:
  // A x = x / ridge - sum_i w_i (w_i . x): Sherman and Morrison, without a d x d matrix.
  void add_direction(const T* x, T* column) {
    const GreedyKernels<T>& kernels = greedy_kernels<T>();
    T* v = directions.data() + steps * d;
    for (int64_t j = 0; j < d; ++j) v[j] = static_cast<T>(x[j] / kRidge);
    for (int64_t i = 0; i < steps; ++i) {
      const T* w = directions.data() + i * d;
      kernels.axpy(-kernels.dot(w, x, d), w, v, d);
    }
    const double q = std::max(kernels.dot(v, x, d), 0.0);
    gain += std::log1p(q);
    const double scale = 1 / std::sqrt(1 + q);
    for (int64_t j = 0; j < d; ++j) {
      v[j] = static_cast<T>(v[j] * scale);
      column[j * kGreedyBlock] = v[j];
    }
  }
};

// The order in which rows are preferred, and how surely.
template <typename T>
struct Preference {
  const Picked<T>& picked;
  double dot_error;  // of a dot product of unit rows in T

  explicit Preference(const Picked<T>& p)
      : picked(p), dot_error((p.d + 8) * static_cast<double>(std::numeric_limits<T>::epsilon()) / 2) {}

  // What a step that raises the objective minimises.
  double cost(double score, double square) const {
    if (picked.options.logdet) return score - square / kRidge;
    if (picked.options.normalize) return score;
    const double trace = picked.trace + square;
    return -trace * trace / (picked.frobenius + 2 * score + square * square);
  }

  // Bound on the rounding of cost(score), by Cauchy and Schwarz over the picks; the log-determinant promises none.
  double error(double score, double square) const {
    if (picked.options.logdet) return 0;
    const double scale = square * picked.trace;
    const double of_score = 2 * dot_error * std::sqrt(score * scale) + dot_error * dot_error * scale;
    if (picked.options.normalize) return of_score;
    const double f = picked.frobenius + 2 * score + square * square;
    return 2 * of_score / f * -cost(score, square);
  }

  static double tie(double cost) { return kTie * std::fabs(cost) + kTieFloor; }
};

}  // namespace spectral_kernels
