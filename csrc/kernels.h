// The inner loops of the dense operators, compiled once for each instruction set (kernels_*.cpp) and chosen at run
// time.
#pragma once

#include <cstdint>

namespace spectral_kernels {

enum class Element { kDouble, kFloat, kHalf, kBFloat16 };

/// Rows as the caller holds them: row i starts at element (index == nullptr ? i : index[i]) * stride.
struct RowView {
  const void* data;
  Element element;
  int64_t stride;
  const int64_t* index;
  int64_t d;
  bool normalize;  // divide each by its norm, but for zero rows
};

/// Where a block of rows lies: element (i, j) at i * row + (j / panel) * group + j % panel, with panel =
/// Kernels::panel. Plain rows have group = panel; panels, which the matrix products read, have row = panel.
struct Block {
  int64_t row;
  int64_t group;
};

struct ReadResult {
  int64_t bad;     // first row with NaN or Inf, counted from the start of the view, or -1
  double squares;  // sum of the squared norms of the rows as read, before the shift
};

/// Memory that the next call will read: the products leave the memory bus idle, and reading rows waits for it.
struct Ahead {
  const char* data;
  int64_t bytes;
};

/// Which others are negatives of an anchor: all but (row + skip[0]) and (row + skip[1]) modulo `period`, where `skip`
/// is not -1, those that `mask` (rows, columns) says, and those of the anchor's group.
struct Negatives {
  int64_t skip[2];
  int64_t period;
  const bool* mask = nullptr;
  int64_t mask_row = 0, mask_column = 0;
  const int64_t* row_groups = nullptr;
  const int64_t* column_groups = nullptr;
  int64_t grouped = 0;  // columns from here on have no group
};

/// How the logits of a block of anchors against a block of others are read.
template <class T>
struct LogitBlock {
  T* similarity;  // (rows, columns padded to whole panels) u . v, without the 1 / temperature; overwritten
  int64_t stride;
  int64_t rows, columns;
  int64_t first_row, first_column;  // of the whole problem
  T inverse_temperature;
  Negatives negatives;
};

template <class T>
struct Kernels {
  int64_t panel;  // columns of a panel
  int64_t rows;   // rows that a matrix product takes at a time: its blocks are padded to a multiple of it

  /// Reads rows [begin, begin + count) of a view, normalises, subtracts `shift` (d values padded with zeros to a
  /// multiple of panel, or nullptr) and pads with zeros to that multiple. `inverse_norms`, when given, receives 1 /
  /// norm, or 0 for rows that count as zero.
  ReadResult (*read)(const RowView& view, int64_t begin, int64_t count, const T* shift, T* out, Block block,
                     T* inverse_norms);
  /// sums[j] += sum over rows of element j.
  void (*column_sums)(const T* rows, Block block, int64_t count, int64_t d, double* sums);
  /// squares[i] = squared norm of row i.
  void (*row_squares)(const T* rows, Block block, int64_t count, int64_t d, double* squares);
  /// out[j] += sum over rows of weights[i] * element j.
  void (*weighted_sum)(const T* rows, Block block, int64_t count, int64_t d, const double* weights, double* out);
  /// Panels of the transpose: element (j, i) of the result, for `count` rows of width d that lie plainly.
  void (*transpose)(const T* rows, int64_t stride, int64_t count, int64_t d, T* out, int64_t group);

  /// tile(i, j) = (`add`: +=) sum over `count` rows x of x[i] x[j], for the columns i in [i0, i1), j in [j0, j1) with
  /// i <= j; entries with i > j are undefined. i0 and j0 are multiples of panel; tile holds whole panels and a multiple
  /// of `rows` rows. Fetches `ahead` meanwhile.
  void (*scatter)(const T* panels, int64_t group, int64_t count, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
                  T* tile, int64_t stride, bool add, Ahead ahead);
  /// total = (`add`: +=) tile, over the entries with i <= j.
  void (*fold)(const T* tile, int64_t stride, int64_t i0, int64_t i1, int64_t j0, int64_t j1, double* total,
               int64_t total_stride, bool add);
  /// Rows [begin, end) of a symmetric matrix (d, d) and their mirror image, from its upper triangle: out(i, j) =
  /// (upper(i, j) - columns[i] columns[j] share) scale, no diagonal below 0. columns may be null.
  void (*write_symmetric)(const double* upper, int64_t stride, const double* columns, double share, double scale,
                          int64_t d, int64_t begin, int64_t end, T* out);
  /// c (m, n) = (`add`: +=) a (m, k) b (k, n), b in panels. m is padded to a multiple of `rows` in a and c, n to whole
  /// panels in c.
  void (*multiply)(const T* a, int64_t a_stride, int64_t m, const T* b, int64_t group, int64_t k, int64_t n, T* c,
                   int64_t c_stride, bool add);
  /// c (m, n) = (`add`: +=) a^T (m, k) b (k, n), a (k, m) with m padded to a multiple of `rows`.
  void (*multiply_transposed)(const T* a, int64_t a_stride, int64_t k, int64_t m, const T* b, int64_t group, int64_t n,
                              T* c, int64_t c_stride, bool add);

  /// Through the normalisation: row = (row - unit (unit . row)) * inverse_norm, with unit = centred + shift (or
  /// centred).
  void (*tangent)(T* rows, int64_t stride, const T* centred, int64_t centred_stride, const T* shift, int64_t count,
                  int64_t d, const T* inverse_norms);
  /// rows += scale other, both plain, of `count` rows and `stride`.
  void (*add_scaled)(T* rows, const T* other, int64_t stride, int64_t count, T scale);
  /// row -= offset (d values padded to whole panels).
  void (*subtract)(T* rows, int64_t stride, int64_t count, int64_t d, const T* offset);
  /// Writes plain rows in the element type of `out`.
  void (*write)(const T* rows, int64_t stride, int64_t count, int64_t d, void* out, Element element,
                int64_t out_stride);

  /// Running log-sum-exp of the negatives: for each row r of the block, peak[r] and sum[r] with
  /// sum = sum of exp(logit - peak), updated by this block.
  void (*logsumexp)(const LogitBlock<T>& block, T* peak, double* sum);
  /// In place: similarity -> row_weight[r] exp(logit - row_log[r]) (+ column_weight[c] exp(logit - column_log[c]) when
  /// column_log is given), 0 where the pair is no negative.
  void (*softmax)(const LogitBlock<T>& block, const T* row_weight, const T* row_log, const T* column_weight,
                  const T* column_log);
  /// In place: similarity -> exp(logit - peak[r]), 0 where the pair is no negative, with peak and sum brought up to
  /// date as by logsumexp; rescale[r] is what sums of earlier weights are to be multiplied by.
  void (*flash_weights)(const LogitBlock<T>& block, T* peak, double* sum, T* rescale);
};

struct EigenKernels {
  int64_t lanes;  // matrices whose eigenvalues are found together

  /// Householder: symmetric a (d, d) given by its upper triangle, with rows of `stride` (a multiple of 8, zero beyond
  /// d), destroyed, to the diagonal and off-diagonal[i] = entry (i, i + 1) of a similar tridiagonal matrix. `work`
  /// holds 4 * stride values.
  void (*tridiagonalize)(double* a, int64_t stride, int64_t d, double* diagonal, double* off_diagonal, double* work);
  /// a -= v w^T + w v^T, then product = a u, in one pass over a symmetric (d, d) given by its upper triangle, with
  /// blocks of 8 on the diagonal that hold both halves; rows of a, v, w, u and product hold `stride` values, zero
  /// beyond d.
  void (*update_multiply)(double* a, int64_t stride, int64_t d, const double* v, const double* w, const double* u,
                          double* product);
  /// Eigenvalues of `lanes` tridiagonal matrices, interleaved: diagonal[i * lanes + lane], and off_diagonal likewise,
  /// which is destroyed; the eigenvalues replace the diagonal, in no order. False when an iteration did not converge.
  bool (*tridiagonal_values)(double* diagonal, double* off_diagonal, int64_t d);
};

/// Kernels of the path that cpu_path() takes.
template <class T>
const Kernels<T>& kernels();
const EigenKernels& eigen_kernels();

}  // namespace spectral_kernels
