// The inner loops of greedy selection, compiled once per instruction set and chosen at run time.
#pragma once

#include <cstdint>

namespace spectral_kernels {

// Picks are gathered into blocks: scores of all rows are brought up to date once per block (a matrix product that runs
// at the rate of the FMA units) instead of once per pick (a matrix-vector product that waits for memory).
constexpr int64_t kGreedyBlock = 16;
// Rows that one call of `block` scores.
constexpr int64_t kGreedyRows = 8;

enum class RowType { kDouble, kFloat, kBFloat16, kHalf };

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
  // Copies a row, on request divided by max(its norm, 1e-12) and rounded to float; returns the squared norm before (NaN
  // or Inf if the row holds any).
  double (*pack)(const void* source, RowType type, int64_t d, bool normalize, bool round, T* row);
};

template <typename T>
const GreedyKernels<T>& greedy_kernels();

}  // namespace spectral_kernels
