// Sums of outer products over rows, sum (x - s)(x - s)^T, for one matrix or many: what covariance, spectrum, effective
// rank and whitening are made of.
//
// Half the work: only tiles on or above the diagonal are computed. Rows are read once, normalised and shifted into
// panels that stay in the second-level cache; products run in T for at most kFoldRows rows and are then added up in
// double. The shift s keeps rows with a mean large against their spread from cancelling.
#pragma once

#include <algorithm>

#include "rows.h"

namespace spectral_kernels {

// Rows added up in T before they are folded into double.
constexpr int64_t kFoldRows = 2048;
// Wider matrices are cut into tiles of the result instead of runs of rows.
constexpr int64_t kNarrow = 256;

/// What one pass leaves: the upper triangle (d rows of `stride`, entry (i, j) for i <= j) and sums over the shifted
/// rows.
struct Moments {
  double* upper;
  double* columns;
  double squares;  // before the shift
};

/// Elements of a tile that holds all of a narrow matrix.
template <class T>
int64_t tile_size(int64_t d) {
  return round_up(d, kernels<T>().rows) * padded_width<T>(d);
}

template <class T>
struct ScatterScratch {
  Buffer<T> panels, tile;

  /// Panels of the rows that are read at a time, and a tile.
  explicit ScatterScratch(int64_t d, int64_t rows)
      : panels(std::min(rows, kReadRows) * padded_width<T>(d)), tile(tile_size<T>(d)) {}
};

/// Rows that lie together, as memory to fetch; nothing where they are gathered or far apart.
inline Ahead rows_ahead(const RowView& view, int64_t begin, int64_t count) {
  if (view.index != nullptr || count <= 0 || view.stride > 2 * view.d) return {nullptr, 0};
  const int64_t bytes = element_bytes(view.element);
  return {static_cast<const char*>(view.data) + begin * view.stride * bytes,
          ((count - 1) * view.stride + view.d) * bytes};
}

/// At most kFoldRows rows [begin, end) of a view, in panels of std::min(n, kReadRows) rows: fills the tile, adds to
/// moments.columns and squares, and fetches on up to row `last`. report(row) hears of rows with NaN or Inf.
template <class T, class Report>
void scatter_tile(const RowView& view, int64_t n, int64_t begin, int64_t end, int64_t last, const T* shift,
                  Buffer<T>& panels, T* tile, Moments& moments, const Report& report) {
  const Kernels<T>& kernel = kernels<T>();
  const Block block = panels_of<T>(std::min(n, kReadRows));
  for (int64_t i = begin; i < end; i += kReadRows) {
    const int64_t count = std::min(kReadRows, end - i);
    // few rows at a time: their sums find them in the first-level cache
    constexpr int64_t few = 32;
    for (int64_t r = 0; r < count; r += few) {
      const int64_t taken = std::min(few, count - r);
      T* const to = panels.data() + r * block.row;
      const ReadResult result = kernel.read(view, i + r, taken, shift, to, block, nullptr);
      if (result.bad >= 0) report(result.bad);
      moments.squares += result.squares;
      if (moments.columns != nullptr) kernel.column_sums(to, block, taken, view.d, moments.columns);
    }
    kernel.scatter(panels.data(), block.group, count, 0, view.d, 0, view.d, tile, padded_width<T>(view.d), i > begin,
                   rows_ahead(view, i + count, std::min(kReadRows, last - i - count)));
  }
}

/// Rows [begin, end) of a view: fills moments.upper, adds to the other two.
template <class T, class Report>
void scatter_rows(const RowView& view, int64_t n, int64_t begin, int64_t end, const T* shift,
                  ScatterScratch<T>& scratch, Moments& moments, int64_t stride, const Report& report) {
  for (int64_t fold = begin; fold < end; fold += kFoldRows) {
    scatter_tile<T>(view, n, fold, std::min(fold + kFoldRows, end), end, shift, scratch.panels, scratch.tile.data(),
                    moments, report);
    kernels<T>().fold(scratch.tile.data(), padded_width<T>(view.d), 0, view.d, 0, view.d, moments.upper, stride,
                      fold > begin);
  }
}

/// Runs of rows that one matrix (n, d) is cut into: by work, at most 32, never by the number of threads.
inline int64_t row_runs(int64_t n, int64_t d) {
  const double work = static_cast<double>(n) * static_cast<double>(d) * static_cast<double>(d);
  return std::clamp<int64_t>(static_cast<int64_t>(work / 16e6), 1, std::min<int64_t>(32, ceil_div(n, kReadRows)));
}

/// Scatter of every batch of a tensor (b, n, d).
template <class T>
class ScatterAll {
 public:
  /// `first` of `batches`: where z lies in the argument that error messages speak of.
  ScatterAll(const Tensor& z, bool center, bool normalize, const char* argument, int64_t first, int64_t batches)
      : z_(z),
        b_(z.size(0)),
        n_(z.size(1)),
        d_(z.size(2)),
        stride_(padded_width<T>(z.size(2))),
        center_(center),
        normalize_(normalize),
        argument_(argument),
        first_(first),
        batches_(batches) {}

  /// Calls finish(batch, moments, shift, row_begin, row_end) until every row of the upper triangle of every batch has
  /// been handed out; calls run in parallel. moments.columns are sums over the shifted rows; shift is null without
  /// centring. Throws where a row holds NaN or Inf.
  template <class Finish>
  void run(const Finish& finish) {
    if (d_ > kNarrow) {
      for (int64_t batch = 0; batch < b_; ++batch) wide(batch, finish);
    } else if (row_runs(n_, d_) == 1) {
      small(finish);
    } else {
      for (int64_t batch = 0; batch < b_; ++batch) tall(batch, finish);
    }
    raise();
  }

  int64_t stride() const { return stride_; }

 private:
  RowView view(int64_t batch) const { return rows_of(z_, normalize_, batch); }

  void report(int64_t batch, int64_t row) { bad_.report((first_ + batch) * n_ + row); }

  void raise() const {
    if (checks_enabled()) bad_.raise(argument_, batches_, n_);
  }

  /// A task for each batch, which reads its rows twice.
  template <class Finish>
  void small(const Finish& finish) {
    struct Scratch {
      ScatterScratch<T> rows;
      Buffer<double> upper, columns;
      Buffer<T> shift;
    };
    const int64_t group = std::max<int64_t>(1, static_cast<int64_t>(1e6 / static_cast<double>(n_ * d_ * d_)));
    parallel_tasks(
        ceil_div(b_, group),
        [&] {
          return Scratch{ScatterScratch<T>(d_, n_), Buffer<double>(d_ * stride_), Buffer<double>(d_),
                         Buffer<T>(stride_)};
        },
        [&](int64_t task, Scratch& scratch) {
          for (int64_t batch = task * group; batch < std::min(b_, (task + 1) * group); ++batch) {
            T* const shift = center_ ? scratch.shift.data() : nullptr;
            if (center_) mean_shift<T>(view(batch), n_, shift, nullptr, nullptr, 0);
            scratch.columns.zero();
            Moments moments{scratch.upper.data(), center_ ? scratch.columns.data() : nullptr, 0};
            scatter_rows<T>(view(batch), n_, 0, n_, shift, scratch.rows, moments, stride_,
                            [&](int64_t row) { report(batch, row); });
            finish(batch, moments, static_cast<const T*>(shift), int64_t{0}, d_);
          }
        });
  }

  /// Whether the shift was so far from the mean that subtracting the difference cancels: then it is moved there.
  bool move_shift(const Moments& moments, T* shift) const {
    bool far = false;
    for (int64_t j = 0; j < d_; ++j) {
      const double total = moments.upper[j * stride_ + j];
      far = far || moments.columns[j] * moments.columns[j] > 0.75 * total * static_cast<double>(n_);
    }
    if (!far) return false;
    for (int64_t j = 0; j < d_; ++j) {
      shift[j] = static_cast<T>(static_cast<double>(shift[j]) + moments.columns[j] / static_cast<double>(n_));
    }
    return true;
  }

  /// Hands out rows in slices of about equal area of the triangle.
  template <class Finish>
  void finish_rows(int64_t batch, const Moments& moments, const T* shift, const Finish& finish) {
    const int64_t slices = std::min<int64_t>(ceil_div(d_ * d_, 65536), 16);
    parallel_tasks(
        slices, [&](int64_t slice) { finish(batch, moments, shift, d_ * slice / slices, d_ * (slice + 1) / slices); });
  }

  /// One batch in runs of rows, each with sums of its own, which are then added in order.
  template <class Finish>
  void tall(int64_t batch, const Finish& finish) {
    const int64_t runs = row_runs(n_, d_), area = d_ * stride_, tile = tile_size<T>(d_);
    // sums of short runs are left in T, which is half the memory to go through
    const bool shorts = ceil_div(n_, runs) <= kFoldRows;
    Buffer<T> tiles(shorts ? runs * tile : 0);
    Buffer<double> upper(shorts ? area : runs * area), columns(runs * d_), squares(runs);
    Buffer<T> shift(stride_);
    if (center_) sampled_shift<T>(view(batch), n_, shift.data());
    T* const by = center_ ? shift.data() : nullptr;
    Moments moments{upper.data(), center_ ? columns.data() : nullptr, 0};
    for (int pass = 0; pass < 2; ++pass) {
      columns.zero();
      parallel_tasks(
          runs, [&] { return ScatterScratch<T>(d_, n_); },
          [&](int64_t run, ScatterScratch<T>& scratch) {
            const int64_t begin = n_ * run / runs, end = n_ * (run + 1) / runs;
            const auto bad = [&](int64_t row) { report(batch, row); };
            Moments part{upper.data() + (shorts ? 0 : run * area), center_ ? columns.data() + run * d_ : nullptr, 0};
            if (shorts) {
              scatter_tile<T>(view(batch), n_, begin, end, end, by, scratch.panels, tiles.data() + run * tile, part,
                              bad);
            } else {
              scatter_rows<T>(view(batch), n_, begin, end, by, scratch, part, stride_, bad);
            }
            squares[run] = part.squares;
          });
      raise();
      moments.squares = 0;
      for (int64_t run = 0; run < runs; ++run) {
        moments.squares += squares[run];
        if (run == 0) continue;
        for (int64_t j = 0; j < d_; ++j) columns[j] += columns[run * d_ + j];
      }
      const int64_t slices = std::min<int64_t>(16, ceil_div(area * runs, 131072));
      parallel_tasks(slices, [&](int64_t slice) {
        const int64_t i0 = d_ * slice / slices, i1 = d_ * (slice + 1) / slices;
        double* const to = upper.data() + i0 * stride_;
        for (int64_t run = shorts ? 0 : 1; run < runs; ++run) {
          if (shorts) {
            kernels<T>().fold(tiles.data() + run * tile + i0 * stride_, stride_, i0, i1, 0, d_, to, stride_, run > 0);
          } else {
            kernels<double>().fold(to + run * area, stride_, i0, i1, 0, d_, to, stride_, true);
          }
        }
      });
      if (pass == 1 || !center_ || !move_shift(moments, shift.data())) break;
    }
    finish_rows(batch, moments, by, finish);
  }

  /// One wide batch: blocks of rows are read into shared panels, then tiles of the result are updated from them.
  template <class Finish>
  void wide(int64_t batch, const Finish& finish) {
    const Kernels<T>& kernel = kernels<T>();
    const int64_t tiles = ceil_div(d_, kTile), rows = std::min(n_, kFoldRows);
    Buffer<double> upper(d_ * stride_), columns(d_);
    Buffer<T> shift(stride_), panels(rows * stride_);
    const int64_t pieces = ceil_div(rows, kReadRows);
    Buffer<double> piece_columns(pieces * d_), piece_squares(pieces);
    const Block block = panels_of<T>(rows);
    if (center_) sampled_shift<T>(view(batch), n_, shift.data());
    T* const by = center_ ? shift.data() : nullptr;
    Moments moments{upper.data(), center_ ? columns.data() : nullptr, 0};
    for (int pass = 0; pass < 2; ++pass) {
      columns.zero();
      moments.squares = 0;
      for (int64_t begin = 0; begin < n_; begin += rows) {
        const int64_t end = std::min(begin + rows, n_);
        piece_columns.zero();
        parallel_tasks(ceil_div(end - begin, kReadRows), [&](int64_t piece) {
          const int64_t first = begin + piece * kReadRows, count = std::min(kReadRows, end - first);
          T* const to = panels.data() + piece * kReadRows * block.row;
          const ReadResult result = kernel.read(view(batch), first, count, by, to, block, nullptr);
          if (result.bad >= 0) report(batch, result.bad);
          piece_squares[piece] = result.squares;
          if (center_) kernel.column_sums(to, block, count, d_, piece_columns.data() + piece * d_);
        });
        raise();
        for (int64_t piece = 0; piece < ceil_div(end - begin, kReadRows); ++piece) {
          moments.squares += piece_squares[piece];
          for (int64_t j = 0; j < d_; ++j) columns[j] += piece_columns[piece * d_ + j];
        }
        parallel_tasks(
            tiles * (tiles + 1) / 2, [&] { return Buffer<T>(kTile * kTile); },
            [&](int64_t task, Buffer<T>& tile) {
              int64_t column = 0, first = 0;
              while (first + column + 1 <= task) first += ++column;
              const int64_t i0 = (task - first) * kTile, j0 = column * kTile;
              const int64_t i1 = std::min(i0 + kTile, d_), j1 = std::min(j0 + kTile, d_);
              for (int64_t row = 0; row < end - begin; row += kReadRows) {
                kernel.scatter(panels.data() + row * block.row, block.group, std::min(kReadRows, end - begin - row), i0,
                               i1, j0, j1, tile.data(), kTile, row > 0, Ahead{nullptr, 0});
              }
              kernel.fold(tile.data(), kTile, i0, i1, j0, j1, upper.data() + i0 * stride_ + j0, stride_, begin > 0);
            });
      }
      if (pass == 1 || !center_ || !move_shift(moments, shift.data())) break;
    }
    finish_rows(batch, moments, by, finish);
  }

  static constexpr int64_t kTile = 256;

  const Tensor& z_;
  const int64_t b_, n_, d_, stride_;
  const bool center_, normalize_;
  const char* const argument_;
  const int64_t first_, batches_;
  BadRow bad_;
};

}  // namespace spectral_kernels
