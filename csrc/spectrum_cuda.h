// Eigenvalues of positive semidefinite matrices, values only, one CTA to a matrix: Householder reduction to tridiagonal
// form, then multisection by Sturm counts (Parlett, The Symmetric Eigenvalue Problem, chapters 3 and 7). Up to 128 rows
// the matrix stays in registers, beyond that in global memory. Every warp works out what all need to know from the same
// numbers in the same order, so that a step costs two barriers and no broadcast.
#pragma once

#include "device.h"

namespace spectral_kernels::device {

/// Of tridiagonal matrices of norm 1: a pivot below `floor` stands for -floor; after `block` steps of the recurrence,
/// each of which may lose a factor `floor`, it is scaled; eigenvalues are found to `resolution`.
template <class T>
struct Sturm;

template <>
struct Sturm<float> {
  static constexpr float floor = 0x1p-30f, resolution = 0x1p-26f;
  static constexpr int block = 4;
};

template <>
struct Sturm<double> {
  static constexpr double floor = 0x1p-60, resolution = 0x1p-55;
  static constexpr int block = 8;
};

constexpr int kPad = 8;  // a whole block of the recurrence may be read

/// Eigenvalues below x, from the signs of the leading minors. `square[i]` is the square left of `diagonal[i]`.
template <class T>
SPECTRAL_KERNELS_DEVICE int count_below(const T* diagonal, const T* square, int d, T x) {
  T before = 0, value = 1;
  int count = 0;
  for (int i = 0; i < d; i += Sturm<T>::block) {
    SPECTRAL_KERNELS_UNROLL
    for (int j = 0; j < Sturm<T>::block; ++j) {
      T next = (diagonal[i + j] - x) * value - square[i + j] * before;
      const T least = Sturm<T>::floor * value;
      next = std::fabs(next) < std::fabs(least) ? -least : next;
      count += (next < 0) != (value < 0);
      before = value;
      value = next;
    }
    const T scale = inverse_power_of_two(value);
    before *= scale;
    value *= scale;
  }
  return count;
}

/// Writes the eigenvalues, descending, or only the first. The tridiagonal matrix is scaled to norm in [1/2, 1) and
/// padded with 2 on the diagonal; `scale` takes its eigenvalues back. `counts` has two places a warp. A matrix that
/// holds NaN or Inf has `poison` NaN, else 0.
template <class T, int kThreads>
SPECTRAL_KERNELS_DEVICE void multisection(const T* diagonal, const T* square, int d, T scale, T poison, bool largest,
                                          int* counts, T* values) {
  constexpr int kWarps = kThreads / kWarp;
  const int thread = thread_index();
  if (largest) {
    T low = 0, width = 1;
    for (int round = 0; width > Sturm<T>::resolution; round ^= 1) {
      const T part = width / (kThreads + 1);
      const bool above = count_below(diagonal, square, d, low + part * static_cast<T>(thread + 1)) < d;
      const int votes = count_bits(ballot(above));
      if (lane_index() == 0) counts[round * kWarps + warp_index()] = votes;
      barrier();
      int places = 0;
      for (int warp = 0; warp < kWarps; ++warp) places += counts[round * kWarps + warp];
      low += part * static_cast<T>(places);
      width = part;
    }
    if (thread == 0) values[0] = (low > 0 ? (low + width / 2) * scale : T(0)) + poison;
    return;
  }
  int points = 1;
  while (points < kWarp && 2 * points * d <= kThreads) points *= 2;
  const unsigned group_lanes = points == kWarp ? 0xffffffffu : (1u << points) - 1;
  const int group = thread / points, point = thread % points, first_lane = lane_index() - point;
  for (int first = 0; first < d; first += kThreads / points) {
    const int index = first + group;  // ascending
    T low = 0, width = 1;
    while (width > Sturm<T>::resolution) {
      const T part = width / static_cast<T>(points + 1);
      const bool above = count_below(diagonal, square, d, low + part * static_cast<T>(point + 1)) <= index;
      const unsigned votes = ballot(above) >> first_lane & group_lanes;
      low += part * static_cast<T>(count_bits(votes));
      width = part;
    }
    // below the resolution is 0
    if (point == 0 && index < d) values[d - 1 - index] = (low > 0 ? (low + width / 2) * scale : T(0)) + poison;
  }
}

/// Norm bound of the tridiagonal matrix, scaling and padding; returns what takes eigenvalues back to this scale.
template <class T, int kThreads>
SPECTRAL_KERNELS_DEVICE T scale_tridiagonal(T* diagonal, T* off_diagonal, int d) {
  const int thread = thread_index();
  T bound = 0;
  for (int i = lane_index(); i < d; i += kWarp) {
    const T left = i > 0 ? std::fabs(off_diagonal[i]) : T(0);
    const T right = i + 1 < d ? std::fabs(off_diagonal[i + 1]) : T(0);
    bound = larger(bound, std::fabs(diagonal[i]) + left + right);
  }
  bound = warp_max(bound);
  const T scale = bound > 0 ? inverse_power_of_two(bound) / 2 : T(1);
  barrier();
  for (int i = thread; i < d + kPad; i += kThreads) {
    const T off = i > 0 && i < d ? off_diagonal[i] * scale : T(0);
    diagonal[i] = i < d ? diagonal[i] * scale : T(2);
    off_diagonal[i] = off * off;
  }
  barrier();
  return 1 / scale;
}

/// A Householder reflection I - tau u uᵀ that takes (alpha, tail) to (beta, 0): u = (1, tail * scale), rest = ‖tail‖².
template <class T>
struct Reflection {
  T tau = 0, beta, scale = 0;

  SPECTRAL_KERNELS_DEVICE Reflection(T alpha, T rest) : beta(alpha) {
    if (rest > 0) {
      const T norm = std::sqrt(alpha * alpha + rest);
      beta = alpha > 0 ? -norm : norm;
      tau = (beta - alpha) / beta;
      scale = 1 / (alpha - beta);
    }
  }
};

/// Largest entry and 0 or NaN over the CTA; `scratch` has two places a warp.
template <class T, int kWarps>
SPECTRAL_KERNELS_DEVICE void block_level(T& level, T& poison, T* scratch) {
  level = warp_max(level);
  poison = warp_sum(poison);
  if (lane_index() == 0) {
    scratch[warp_index()] = level;
    scratch[kWarps + warp_index()] = poison;
  }
  barrier();
  for (int warp = 0; warp < kWarps; ++warp) {
    level = larger(level, scratch[warp]);
    poison = warp == 0 ? scratch[kWarps] : poison + scratch[kWarps + warp];
  }
  // matrices are scaled to entries of at most 2
  level = level > 0 && poison == 0 ? level : T(1);
}

/// Entries near the end of the exponents' range are out of reach of inverse_power_of_two.
template <class T>
SPECTRAL_KERNELS_DEVICE T entry_scale(T level) {
  const T least = sizeof(T) == 4 ? T(0x1p-120) : T(0x1p-1000), most = 1 / least;
  return inverse_power_of_two(smaller(larger(level, least), most));
}

template <class T, int kSize, int kWarps>
struct SmallSpectrum {
  static constexpr int kThreads = kWarps * kWarp, kRows = kSize / kWarps, kColumns = kSize / kWarp;
  static_assert(kSize % kWarps == 0 && kWarp % kWarps == 0 && (kRows == 4 || kRows == 8));

  struct Shared {
    T column[kSize], product[kSize], diagonal[kSize + kPad], off_diagonal[kSize + kPad], scratch[2 * kWarps];
    int counts[2 * kWarps];
  };

  /// Thread (warp, lane) holds entries (warp + kWarps r, lane + 32 c).
  static SPECTRAL_KERNELS_DEVICE void run(const T* matrices, T* values, int d, bool largest, unsigned char* memory) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int lane = lane_index(), warp = warp_index();
    const T* const matrix = matrices + static_cast<int64_t>(block_index()) * d * d;
    T a[kRows][kColumns];
    T level = 0, poison = 0;
    SPECTRAL_KERNELS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      SPECTRAL_KERNELS_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        const int i = warp + kWarps * r, j = lane + kWarp * c;
        a[r][c] = i < d && j < d ? matrix[i * d + j] : T(0);
        level = larger(level, std::fabs(a[r][c]));
        poison += a[r][c] - a[r][c];
      }
    }
    block_level<T, kWarps>(level, poison, shared.scratch);
    const T scale = entry_scale(level);
    SPECTRAL_KERNELS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      SPECTRAL_KERNELS_UNROLL
      for (int c = 0; c < kColumns; ++c) a[r][c] *= scale;
    }
    for (int k = 0; k < d; ++k) {
      // row k is column k
      SPECTRAL_KERNELS_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (warp + kWarps * r == k) {
          SPECTRAL_KERNELS_UNROLL
          for (int c = 0; c < kColumns; ++c) shared.column[lane + kWarp * c] = a[r][c];
        }
      }
      barrier();
      if (thread_index() == 0) shared.diagonal[k] = shared.column[k];
      if (k + 1 == d) break;
      T u[kColumns], rest = 0;
      SPECTRAL_KERNELS_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        u[c] = lane + kWarp * c > k + 1 ? shared.column[lane + kWarp * c] : T(0);
        rest += u[c] * u[c];
      }
      const Reflection<T> reflection(shared.column[k + 1], warp_sum(rest));
      if (thread_index() == 0) shared.off_diagonal[k + 1] = reflection.beta;
      T product[kRows];
      SPECTRAL_KERNELS_UNROLL
      for (int c = 0; c < kColumns; ++c) u[c] = lane + kWarp * c == k + 1 ? T(1) : u[c] * reflection.scale;
      SPECTRAL_KERNELS_UNROLL
      for (int r = 0; r < kRows; ++r) {
        product[r] = 0;
        SPECTRAL_KERNELS_UNROLL
        for (int c = 0; c < kColumns; ++c) product[r] += a[r][c] * u[c];
      }
      // sums over the lanes of all rows at a time: while more than one is left, half of the lanes give theirs away
      SPECTRAL_KERNELS_UNROLL
      for (int mask = kWarp / 2, left = kRows; mask > 0; mask /= 2) {
        if (left > 1) {
          left /= 2;
          SPECTRAL_KERNELS_UNROLL
          for (int r = 0; r < kRows / 2; ++r) {
            if (r < left) {
              const bool upper = (lane & mask) != 0;
              const T keep = upper ? product[r + left] : product[r], give = upper ? product[r] : product[r + left];
              product[r] = keep + shuffle_xor(give, mask);
            }
          }
        } else {
          product[0] += shuffle_xor(product[0], mask);
        }
      }
      constexpr int kLanesPerRow = kWarp / kRows;
      if (lane % kLanesPerRow == 0) {
        const int row = warp + kWarps * (lane / kLanesPerRow);
        shared.product[row] = row > k ? product[0] : T(0);
      }
      barrier();
      T w[kColumns], dot = 0;
      SPECTRAL_KERNELS_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        w[c] = shared.product[lane + kWarp * c];
        dot += w[c] * u[c];
      }
      const T half = T(0.5) * reflection.tau * reflection.tau * warp_sum(dot);
      SPECTRAL_KERNELS_UNROLL
      for (int c = 0; c < kColumns; ++c) w[c] = reflection.tau * w[c] - half * u[c];
      SPECTRAL_KERNELS_UNROLL
      for (int r = 0; r < kRows; ++r) {
        // row warp + kWarps r is column lane + 32 c of this lane
        const int c_of_row = r * kWarps / kWarp, lane_of_row = warp + kWarps * (r % (kWarp / kWarps));
        const T u_row = shuffle(u[c_of_row], lane_of_row), w_row = shuffle(w[c_of_row], lane_of_row);
        SPECTRAL_KERNELS_UNROLL
        for (int c = 0; c < kColumns; ++c) a[r][c] -= u_row * w[c] + w_row * u[c];
      }
    }
    barrier();
    const T back = scale_tridiagonal<T, kThreads>(shared.diagonal, shared.off_diagonal, d) / scale;
    multisection<T, kThreads>(shared.diagonal, shared.off_diagonal, d, back, poison, largest, shared.counts,
                              values + static_cast<int64_t>(block_index()) * (largest ? 1 : d));
  }
};

template <class T, int kWarps>
struct LargeSpectrum {
  static constexpr int kThreads = kWarps * kWarp;

  static constexpr size_t shared_bytes(int d) {
    return sizeof(T) * (7 * (static_cast<size_t>(d) + kPad) + 2 * kWarps) + sizeof(int) * 2 * kWarps;
  }

  /// Overwrites the matrices. The rank-two update of a step is applied as the next one reads the matrix.
  static SPECTRAL_KERNELS_DEVICE void run(T* matrices, T* values, int d, bool largest, unsigned char* memory) {
    const int stride = d + kPad, thread = thread_index(), lane = lane_index(), warp = warp_index();
    T* const diagonal = reinterpret_cast<T*>(memory);
    T* const off_diagonal = diagonal + stride;
    T* const raw = off_diagonal + stride;
    T* const product = raw + stride;
    T* const w = product + stride;
    T *v = w + stride, *u = v + stride;
    T* const scratch = u + stride;
    int* const counts = reinterpret_cast<int*>(scratch + 2 * kWarps);
    T* const matrix = matrices + static_cast<int64_t>(block_index()) * d * d;
    T level = 0, poison = 0;
    for (int i = thread; i < d * d; i += kThreads) {
      level = larger(level, std::fabs(matrix[i]));
      poison += matrix[i] - matrix[i];
    }
    block_level<T, kWarps>(level, poison, scratch);
    const T scale = entry_scale(level);
    for (int i = thread; i < d * d; i += kThreads) matrix[i] *= scale;
    for (int i = thread; i < d; i += kThreads) v[i] = w[i] = 0;
    barrier();
    for (int k = 0; k < d; ++k) {
      const T v_k = v[k], w_k = w[k];
      for (int j = k + thread; j < d; j += kThreads) raw[j] = matrix[k * d + j] - (v_k * w[j] + w_k * v[j]);
      barrier();
      if (thread == 0) diagonal[k] = raw[k];
      if (k + 1 == d) break;
      T rest = 0;
      for (int j = k + 2 + lane; j < d; j += kWarp) rest += raw[j] * raw[j];
      const Reflection<T> reflection(raw[k + 1], warp_sum(rest));
      if (thread == 0) off_diagonal[k + 1] = reflection.beta;
      for (int j = thread; j < d; j += kThreads) {
        u[j] = j > k + 1 ? raw[j] * reflection.scale : static_cast<T>(j == k + 1);
      }
      barrier();
      for (int i = k + 1 + warp; i < d; i += kWarps) {
        const T v_i = v[i], w_i = w[i];
        T* const row = matrix + static_cast<int64_t>(i) * d;
        T sum = 0;
        // from a whole line of the cache
        for (int j = (k + 1) / kWarp * kWarp + lane; j < d; j += kWarp) {
          const T x = row[j] - (v_i * w[j] + w_i * v[j]);
          row[j] = x;
          sum += x * u[j];
        }
        sum = warp_sum(sum);
        if (lane == 0) product[i] = sum;
      }
      barrier();
      T dot = 0;
      for (int j = k + 1 + lane; j < d; j += kWarp) dot += product[j] * u[j];
      const T half = T(0.5) * reflection.tau * reflection.tau * warp_sum(dot);
      for (int j = thread; j < d; j += kThreads) w[j] = j > k ? reflection.tau * product[j] - half * u[j] : T(0);
      T* const spare = v;
      v = u;
      u = spare;
      barrier();
    }
    barrier();
    const T back = scale_tridiagonal<T, kThreads>(diagonal, off_diagonal, d) / scale;
    multisection<T, kThreads>(diagonal, off_diagonal, d, back, poison, largest, counts,
                              values + static_cast<int64_t>(block_index()) * (largest ? 1 : d));
  }
};

// What is shipped: the matrix size up to which each runs, and its warps.
template <class T>
struct SpectrumShapes;

template <>
struct SpectrumShapes<float> {
  using Size32 = SmallSpectrum<float, 32, 8>;
  using Size64 = SmallSpectrum<float, 64, 16>;
  using Size128 = SmallSpectrum<float, 128, 32>;
  using Large = LargeSpectrum<float, 32>;
};

template <>
struct SpectrumShapes<double> {
  using Size32 = SmallSpectrum<double, 32, 8>;
  using Size64 = SmallSpectrum<double, 64, 16>;
  using Size128 = SmallSpectrum<double, 128, 16>;
  using Large = LargeSpectrum<double, 32>;
};

constexpr int kLargestSpectrum = 1024;

}  // namespace spectral_kernels::device
