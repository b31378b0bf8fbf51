// The whitening matrix W = L⁻¹ of a shrunk covariance LLᵀ (docs/theory.md §4), one CTA to a matrix, in float64 in
// shared memory.
//
// Rows of [C | I] are eliminated in panels of 16. The columns of C that a panel is done with are those that the inverse
// begins to fill, so both share one square. Of C only what is on and right of the diagonal is kept.
#pragma once

#include "device.h"

namespace spectral_kernels::device {

constexpr int kPanel = 16, kWhiteningThreads = 512, kLargestWhitening = 128;

/// The matrix, its rows padded, and whether it is singular.
constexpr size_t whitening_shared_bytes(int d) {
  const size_t side = static_cast<size_t>((d + kPanel - 1) / kPanel * kPanel);
  return sizeof(double) * (side * (side + 2) + 1);
}

template <class T>
struct WhiteningArguments {
  T* covariance;  // (b, d, d), set to 0 where it is rounding noise
  const T* mean;  // (b, d)
  T* matrix;      // (b, d, d)
  int* singular;  // (b,)
  int d;
  double shrinkage;
  double negligible;  // a trace of at most this share of that of the second moment is rounding noise
  double least;       // a pivot of at most this share of the largest tells a singular matrix
};

template <class T>
class WhiteningMatrix {
 public:
  SPECTRAL_KERNELS_DEVICE WhiteningMatrix(const WhiteningArguments<T>& given, unsigned char* memory)
      : given_(given),
        d_(given.d),
        side_((given.d + kPanel - 1) / kPanel * kPanel),
        stride_(side_ + 2),
        a_(reinterpret_cast<double*>(memory)),
        verdict_(a_ + side_ * stride_) {}

  SPECTRAL_KERNELS_DEVICE void run() {
    load();
    double smallest = INFINITY, largest = 0;
    for (int p = 0; p < side_; p += kPanel) {
      barrier();
      if (warp_index() == 0) eliminate_block(p, smallest, largest);
      barrier();
      multiply_panel(p);
      barrier();
      eliminate_below(p);
    }
    // NaN after a negative pivot
    const bool singular = !(smallest > given_.least * largest && largest < INFINITY);
    if (thread_index() == 0) {
      *verdict_ = singular;
      given_.singular[block_index()] = singular;
    }
    barrier();
    store(*verdict_ != 0);
  }

 private:
  static constexpr int kWarps = kWhiteningThreads / kWarp, kTile = 4;

  SPECTRAL_KERNELS_DEVICE int64_t place(int i, int j) const {
    return (static_cast<int64_t>(block_index()) * d_ + i) * d_ + j;
  }

  /// Reads and shrinks the covariance; the identity where there is no spread.
  SPECTRAL_KERNELS_DEVICE void load() {
    double spread = 0, squares = 0;
    for (int i = lane_index(); i < d_; i += kWarp) {
      const double mean = given_.mean[static_cast<int64_t>(block_index()) * d_ + i];
      spread += given_.covariance[place(i, i)];
      squares += mean * mean;
    }
    spread = warp_sum(spread);
    const bool noise = spread < INFINITY && spread <= given_.negligible * (spread + warp_sum(squares));
    const double level = given_.shrinkage * spread / d_;
    barrier();  // all have read the diagonal
    for (int i = warp_index(); i < side_; i += kWarps) {
      for (int j = lane_index(); j < side_; j += kWarp) {
        double value = i == j;
        if (i < d_ && j < d_ && !noise) {
          value = (1 - given_.shrinkage) * given_.covariance[place(i, j)] + (i == j ? level : 0);
        }
        a_[i * stride_ + j] = value;
        if (noise && i < d_ && j < d_) given_.covariance[place(i, j)] = 0;
      }
    }
  }

  /// One warp: rows of [C | I] within a block on the diagonal, a column a lane; leaves the block's inverse factor.
  SPECTRAL_KERNELS_DEVICE void eliminate_block(int p, double& smallest, double& largest) {
    const int lane = lane_index();
    double column[kPanel];
    SPECTRAL_KERNELS_UNROLL
    for (int i = 0; i < kPanel; ++i) {
      column[i] = lane < kPanel ? a_[(p + i) * stride_ + p + lane] : static_cast<double>(i == lane - kPanel);
    }
    SPECTRAL_KERNELS_UNROLL
    for (int k = 0; k < kPanel; ++k) {
      const double pivot = shuffle(column[k], k);
      if (p + k < d_) {
        smallest = smaller(smallest, pivot);
        largest = larger(largest, pivot);
      }
      column[k] *= 1 / std::sqrt(pivot);
      SPECTRAL_KERNELS_UNROLL
      for (int i = k + 1; i < kPanel; ++i) column[i] -= shuffle(column[k], i) * column[k];
    }
    if (lane >= kPanel) {
      SPECTRAL_KERNELS_UNROLL
      for (int i = 0; i < kPanel; ++i) a_[(p + i) * stride_ + p + lane - kPanel] = column[i];
    }
  }

  /// The panel's rows of the inverse so far, and of C right of the block, times the block's inverse factor.
  SPECTRAL_KERNELS_DEVICE void multiply_panel(int p) {
    const double* const factor = a_ + p * stride_ + p;
    for (int j = thread_index(); j < side_; j += kWhiteningThreads) {
      if (j >= p && j < p + kPanel) continue;
      double x[kPanel];
      SPECTRAL_KERNELS_UNROLL
      for (int i = 0; i < kPanel; ++i) x[i] = a_[(p + i) * stride_ + j];
      SPECTRAL_KERNELS_UNROLL
      for (int i = 0; i < kPanel; ++i) {
        double sum = 0;
        SPECTRAL_KERNELS_UNROLL
        for (int k = 0; k <= i; ++k) sum += factor[i * stride_ + k] * x[k];
        a_[(p + i) * stride_ + j] = sum;
      }
    }
  }

  /// Takes the panel out of the rows below: a 4 x 4 tile a thread.
  SPECTRAL_KERNELS_DEVICE void eliminate_below(int p) {
    const int first = p + kPanel, across = side_ / kTile, tiles = (side_ - first) / kTile * across;
    const double* const panel = a_ + p * stride_;
    for (int tile = thread_index(); tile < tiles; tile += kWhiteningThreads) {
      const int i = first + kTile * (tile / across), j = kTile * (tile % across);
      if (j >= first && j < i) continue;  // left of C's diagonal
      const bool begins = j >= p && j < first;
      double sum[kTile][kTile];
      SPECTRAL_KERNELS_UNROLL
      for (int r = 0; r < kTile; ++r) {
        SPECTRAL_KERNELS_UNROLL
        for (int c = 0; c < kTile; ++c) sum[r][c] = begins ? 0 : a_[(i + r) * stride_ + j + c];
      }
      for (int k = 0; k < kPanel; ++k) {
        const double* const row = panel + k * stride_;
        SPECTRAL_KERNELS_UNROLL
        for (int r = 0; r < kTile; ++r) {
          SPECTRAL_KERNELS_UNROLL
          for (int c = 0; c < kTile; ++c) sum[r][c] -= row[i + r] * row[j + c];
        }
      }
      SPECTRAL_KERNELS_UNROLL
      for (int r = 0; r < kTile; ++r) {
        SPECTRAL_KERNELS_UNROLL
        for (int c = 0; c < kTile; ++c) a_[(i + r) * stride_ + j + c] = sum[r][c];
      }
    }
  }

  SPECTRAL_KERNELS_DEVICE void store(bool singular) {
    for (int i = warp_index(); i < d_; i += kWarps) {
      for (int j = lane_index(); j < d_; j += kWarp) {
        const double value = j <= i ? a_[i * stride_ + j] : 0;
        given_.matrix[place(i, j)] = static_cast<T>(singular ? NAN : value);
      }
    }
  }

  const WhiteningArguments<T>& given_;
  int d_, side_, stride_;
  double *a_, *verdict_;
};

}  // namespace spectral_kernels::device
