// The inner loops of greedy selection, compiled once per instruction set and chosen at run time.
#pragma once

#include <cstdint>
#include <limits>

namespace spectral_kernels {

// Picks are gathered into blocks: scores of all rows are brought up to date once per block (a matrix product that runs
// at the rate of the FMA units) instead of once per pick (a matrix-vector product that waits for memory).
constexpr int64_t kGreedyBlock = 16;
// Rows that one call of `block` scores.
constexpr int64_t kGreedyRows = 8;
// Products that `block` adds up one after the other: sums of sums round less.
constexpr int64_t kGreedyRun = 16;

// What rounding does to a dot product of `block` or `single`, as a share of the product of the norms; one of the
// factors may have been rounded to T.
template <typename T>
double dot_error(int64_t d) {
  const int64_t roundings = kGreedyRun + (d + kGreedyRun - 1) / kGreedyRun + 2;
  return static_cast<double>(roundings) * std::numeric_limits<T>::epsilon() / 2;
}

// Rows whose lowest bound is kept, so that a step does not read the bounds of all.
constexpr int64_t kGreedyChunk = 16;

// Bounds on costs score - square * per_square, below what rounding makes of the scores (Preference::error).
struct GreedyBounds {
  double per_square, weight, share;
  const double *scores, *squares, *exact_scores, *exact_weights;
  const double* absent;  // infinity for rows that are not to be had, else 0
};

enum class RowType { kDouble, kFloat, kBFloat16, kHalf };

/// A row before it is normalised: its squared norm, whether it is other than zero, and whether all of it is finite.
struct PackedRow {
  double squares;
  bool any, finite;
};

template <typename T>
struct GreedyKernels {
  // sums[i] += sum over the columns c of (rows[i] . columns[:, c])^2, for kGreedyRows rows; columns is (blocks, d,
  // kGreedyBlock).
  void (*block)(const T* const* rows, const T* columns, int64_t blocks, int64_t d, double* sums);
  // scores[i] += (rows[i] . v)^2 for n contiguous rows of d.
  void (*single)(const T* rows, int64_t n, const T* v, int64_t d, double* scores);
  // products[i] = row i . x for n contiguous rows of d, with float64 products and sums.
  void (*project)(const T* rows, int64_t n, const T* x, int64_t d, double* products);
  // y -= sum over i of weights[i] row i, in float64.
  void (*combine)(const T* rows, int64_t n, const double* weights, double* y, int64_t d);
  // Copies a row, on request divided by its norm, whatever that is, and rounded to float.
  PackedRow (*pack)(const void* source, RowType type, int64_t d, bool normalize, bool round, T* row);
  // Bounds of the rows of chunks [begin, end), and the lowest of each chunk.
  void (*bounds)(const GreedyBounds& of, int64_t begin, int64_t end, double* bounds, double* lowest);
  // A row of the lowest bound, -1 where all are infinite.
  int64_t (*lowest)(const double* bounds, const double* lowest, int64_t chunks);
  // Writes the rows whose bound is at most `limit`; returns how many they are.
  int64_t (*within)(const double* bounds, const double* lowest, int64_t chunks, double limit, int64_t* rows);
};

template <typename T>
const GreedyKernels<T>& greedy_kernels();

}  // namespace spectral_kernels
