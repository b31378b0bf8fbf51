// Greedy selection by a cluster of 16 CTAs: the rows lie in their shared memory for the whole selection, and what a
// step must know of the others goes through distributed shared memory. The rules are those of ops/greedy/reference.py,
// and so are the picks: products of rows are summed in double.
//
// A step: every CTA finds the best score of its rows; all read the best of all; every CTA finds its lowest row that
// ties with it; all read the lowest, and its row from the CTA that has it; every CTA adds (x_j·u)² to the scores of its
// rows, u = x for order 2 and u = Ax/√(1 + q) for the log-determinant. The d x d matrices of the latter are spread over
// the CTAs by rows.
#pragma once

#include <cfloat>

#include "device.h"

namespace spectral_kernels::device {

constexpr int kGreedyCluster = 16, kGreedyThreads = 512, kGreedyWarps = kGreedyThreads / kWarp;
constexpr size_t kGreedySharedLimit = 227 * 1024;

template <class T>
struct GreedyArguments {
  const T* pool;         // (b, n, d)
  const int64_t* start;  // (b, starts)
  const int64_t* draws;  // (b, k, draws_per_step), or none
  const bool* valid;     // (b, n), or none
  int64_t* indices;      // (b, k), as those that follow; -1 where no row was left
  T* ranks;
  T* objectives;
  int n, d, k, starts, draws_per_step;
  bool all_rows, logdet, window, normalize;
  double low, high;
};

/// What a CTA of the cluster shows to the others.
struct GreedyPublished {
  double best, overlap, square, quadratic;
  int key;
};

/// Parts of a CTA's shared memory, in bytes from its start.
struct GreedyLayout {
  int rows, stride, slices;  // pool rows of a CTA, length of a row with its padding, matrix rows of a CTA
  size_t published, scratch, vector, chosen, part, overlap, square, inverse, moment, values, free, bytes;

  template <class T>
  static constexpr SPECTRAL_KERNELS_HOST_DEVICE GreedyLayout make(int n, int d, bool logdet) {
    GreedyLayout at{};
    at.rows = (n + kGreedyCluster - 1) / kGreedyCluster;
    at.stride = (d + 3) / 4 * 4;
    at.slices = logdet ? (d + kGreedyCluster - 1) / kGreedyCluster : 0;
    const size_t stride = static_cast<size_t>(at.stride), rows = static_cast<size_t>(at.rows),
                 slices = static_cast<size_t>(at.slices);
    at.scratch = 64;
    at.vector = at.scratch + sizeof(double) * kGreedyWarps;
    at.chosen = at.vector + sizeof(double) * stride;
    at.inverse = at.chosen + (logdet ? sizeof(double) * stride : 0);
    at.moment = at.inverse + sizeof(double) * slices * stride;
    at.values = at.moment + sizeof(double) * slices * stride;
    at.part = at.values + sizeof(T) * rows * stride;
    at.overlap = at.part + sizeof(double) * slices;
    at.square = at.overlap + sizeof(double) * rows;
    at.free = at.square + sizeof(double) * rows;
    at.bytes = at.free + rows;
    return at;
  }
};

template <class T>
struct GreedyCluster {
  static constexpr double kTie = 1e-6, kTieFloor = 1e-12, kRidge = 1e-3, kNormFloor = 1e-12;
  static constexpr unsigned char kTaken = 0, kUnseen = 1, kSeen = 2;
  static constexpr int kNone = INT32_MAX;
  static constexpr int kLanes = 8;  // that share a row's product

  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Four {
    T x[4];
  };

  SPECTRAL_KERNELS_DEVICE GreedyCluster(const GreedyArguments<T>& arguments, unsigned char* memory)
      : in(arguments),
        at(GreedyLayout::make<T>(arguments.n, arguments.d, arguments.logdet)),
        published(reinterpret_cast<GreedyPublished*>(memory)),
        scratch(reinterpret_cast<double*>(memory + at.scratch)),
        vector(reinterpret_cast<double*>(memory + at.vector)),
        chosen(reinterpret_cast<double*>(memory + at.chosen)),
        part(reinterpret_cast<double*>(memory + at.part)),
        overlap(reinterpret_cast<double*>(memory + at.overlap)),
        square(reinterpret_cast<double*>(memory + at.square)),
        inverse(reinterpret_cast<double*>(memory + at.inverse)),
        moment(reinterpret_cast<double*>(memory + at.moment)),
        values(reinterpret_cast<T*>(memory + at.values)),
        free(memory + at.free),
        thread(thread_index()),
        lane(lane_index()),
        warp(warp_index()),
        rank(cluster_rank()),
        first(rank * at.rows),
        rows(smaller(larger(arguments.n - first, 0), at.rows)) {}

  SPECTRAL_KERNELS_DEVICE void run() {
    const int64_t batch = block_index() / kGreedyCluster;
    read_rows(batch);
    const int64_t* const start = in.start + batch * in.starts;
    const int64_t* const draws =
        in.draws == nullptr ? nullptr : in.draws + batch * static_cast<int64_t>(in.k) * in.draws_per_step;
    double gain = 0, effective_rank = 0;
    cluster_barrier();
    for (int step = 0; step < in.k; ++step) {
      const bool below = !in.window || effective_rank < in.low * (1 - kTie);
      const bool inside = !below && effective_rank <= in.high * (1 + kTie);
      const double sign = below ? 1 : -1;
      const bool by_place = step == 0 || inside, listed = by_place || !in.all_rows;
      const int64_t* const list = step == 0 ? start : draws + static_cast<int64_t>(step) * in.draws_per_step;
      const int count = !listed ? rows : step == 0 ? in.starts : in.draws_per_step;
      double best = -INFINITY;
      for (int i = thread; i < count; i += kGreedyThreads) {
        const int row = listed ? own_row(list[i]) : i;
        if (row < 0 || free[row] != kSeen) continue;
        best = larger(best, by_place ? -static_cast<double>(i) : score(row, sign));
      }
      best = best_of_all(best);
      int key = kNone;
      if (best == -INFINITY) {
        for (int row = thread; row < rows; row += kGreedyThreads) {
          // rows that were seen go before all others
          if (free[row] != kTaken) key = smaller(key, first + row + (free[row] == kSeen ? 0 : in.n));
        }
      } else {
        const double least = by_place ? best : best - kTie * std::fabs(best) - kTieFloor;
        for (int i = thread; i < count; i += kGreedyThreads) {
          const int row = listed ? own_row(list[i]) : i;
          if (row < 0 || free[row] != kSeen) continue;
          if ((by_place ? -static_cast<double>(i) : score(row, sign)) >= least) key = smaller(key, first + row);
        }
      }
      key = lowest_of_all(key);
      if (key == kNone) {
        if (rank == 0 && thread == 0) leave_out(batch, step, effective_rank, in.logdet ? gain : effective_rank);
        break;
      }
      const int pick = key < in.n ? key : key - in.n, owner = pick / at.rows, row = pick - owner * at.rows;
      const GreedyPublished* const told = at_rank(published, owner);
      const double its_square = told->square;
      double its_overlap = told->overlap;
      const T* const picked = at_rank(values, owner) + static_cast<int64_t>(row) * at.stride;
      double* const x = in.logdet ? chosen : vector;
      for (int i = thread; i < at.stride; i += kGreedyThreads) x[i] = static_cast<double>(picked[i]);
      if (owner == rank && thread == 0) free[row] = kTaken;
      barrier();
      if (in.logdet) gain += std::log1p(update_matrices(its_overlap));
      frobenius += 2 * its_overlap + its_square * its_square;
      squares += its_square;
      effective_rank = frobenius > 0 ? squares * squares / frobenius : 0;
      if (rank == 0 && thread == 0) {
        const int64_t out = batch * in.k + step;
        in.indices[out] = pick;
        in.ranks[out] = static_cast<T>(effective_rank);
        in.objectives[out] = static_cast<T>(in.logdet ? gain : effective_rank);
      }
      update_overlaps();
      barrier();
    }
    // no CTA leaves while another may read its memory
    cluster_barrier();
  }

 private:
  /// The mask, or rows that are not finite, left fewer than k rows: what the picks came to stands for the steps that
  /// miss.
  SPECTRAL_KERNELS_DEVICE void leave_out(int64_t batch, int step, double effective_rank, double objective) {
    for (int64_t out = batch * in.k + step; out < (batch + 1) * in.k; ++out) {
      in.indices[out] = -1;
      in.ranks[out] = static_cast<T>(effective_rank);
      in.objectives[out] = static_cast<T>(objective);
    }
  }

  /// The CTA's rows, normalised on request and rounded to T, a warp to a row; zeros in what pads them. A row that holds
  /// NaN or Inf is none to be picked: in a sum it would make every row's score NaN.
  SPECTRAL_KERNELS_DEVICE void read_rows(int64_t batch) {
    for (int row = warp; row < rows; row += kGreedyWarps) {
      const T* const from = in.pool + (batch * in.n + first + row) * in.d;
      T* const to = values + static_cast<int64_t>(row) * at.stride;
      double sum = 0, largest = 0;
      bool finite = true;
      for (int i = lane; i < in.d; i += kWarp) {
        const double x = static_cast<double>(from[i]);
        sum += x * x;
        largest = larger(largest, std::fabs(x));
        finite = finite && std::fabs(x) < INFINITY;
      }
      sum = warp_sum(sum);
      const bool seen = ballot(largest > 0) != 0, whole = ballot(!finite) == 0;
      const double length = larger(std::sqrt(sum), kNormFloor);
      for (int i = lane; i < at.stride; i += kWarp) {
        const T x = i < in.d && whole ? from[i] : T(0);
        to[i] = in.normalize ? static_cast<T>(static_cast<double>(x) / length) : x;
      }
      if (lane == 0) {
        const bool left = whole && (in.valid == nullptr || in.valid[batch * in.n + first + row]);
        free[row] = !left ? kTaken : seen ? kSeen : kUnseen;
        overlap[row] = 0;
        square[row] = !whole ? 0 : in.normalize ? static_cast<double>(seen) : sum;
      }
    }
    for (int i = thread; i < at.slices * at.stride; i += kGreedyThreads) {
      const int matrix_row = rank * at.slices + i / at.stride;
      inverse[i] = matrix_row == i % at.stride ? 1 / kRidge : 0;
      moment[i] = 0;
    }
  }

  /// Place of a pool row in this CTA, -1 when another has it.
  SPECTRAL_KERNELS_DEVICE int own_row(int64_t row) const {
    return row >= first && row < first + rows ? static_cast<int>(row) - first : -1;
  }

  SPECTRAL_KERNELS_DEVICE double score(int row, double sign) const {
    double value;
    if (in.logdet) {
      value = larger(square[row] / kRidge - overlap[row], 0.0);
    } else if (in.normalize) {
      value = -overlap[row];
    } else {
      const double sum = squares + square[row], after = frobenius + 2 * overlap[row] + square[row] * square[row];
      value = sum * sum / (after > 0 ? after : 1);
    }
    // never NaN or Inf, or lanes would disagree on the best and part at the next barrier
    return smaller(larger(value * sign, -DBL_MAX), DBL_MAX);
  }

  SPECTRAL_KERNELS_DEVICE double best_of_all(double best) {
    best = warp_max(best);
    if (lane == 0) scratch[warp] = best;
    barrier();
    if (warp == 0) {
      best = warp_max(lane < kGreedyWarps ? scratch[lane] : -INFINITY);
      if (lane == 0) published->best = best;
    }
    cluster_barrier();
    return warp_max(lane < kGreedyCluster ? at_rank(published, lane)->best : -INFINITY);
  }

  /// The lowest key; the CTA that has it tells what all must know of its row.
  SPECTRAL_KERNELS_DEVICE int lowest_of_all(int key) {
    key = warp_min(key);
    if (lane == 0) scratch[warp] = key;
    barrier();
    if (warp == 0) {
      key = warp_min(lane < kGreedyWarps ? static_cast<int>(scratch[lane]) : kNone);
      if (lane == 0) {
        published->key = key;
        if (key != kNone) {
          const int row = (key < in.n ? key : key - in.n) - first;
          published->overlap = overlap[row];
          published->square = square[row];
        }
      }
    }
    cluster_barrier();
    return warp_min(lane < kGreedyCluster ? at_rank(published, lane)->key : kNone);
  }

  /// Σ left[i] right[i] over the row, in every lane.
  SPECTRAL_KERNELS_DEVICE double warp_product(const double* left, const double* right) const {
    double sum = 0;
    for (int i = lane; i < in.d; i += kWarp) sum += left[i] * right[i];
    return warp_sum(sum);
  }

  /// Log-determinant: from x in `chosen`, u in `vector` and A − uuᵀ, the second moment of the picks and x's product
  /// with it. Returns q = xᵀAx.
  SPECTRAL_KERNELS_DEVICE double update_matrices(double& its_overlap) {
    for (int i = warp; i < at.slices; i += kGreedyWarps) {
      const double product = warp_product(inverse + i * at.stride, chosen);
      if (lane == 0) part[i] = product;
    }
    if (warp == 0) {
      double quadratic = 0;
      for (int i = 0; i < at.slices; ++i) {
        const int matrix_row = rank * at.slices + i;
        const double product = warp_product(moment + i * at.stride, chosen);
        if (matrix_row < in.d) quadratic += chosen[matrix_row] * product;
      }
      if (lane == 0) published->quadratic = quadratic;
    }
    cluster_barrier();
    for (int i = thread; i < at.stride; i += kGreedyThreads) {
      vector[i] = i < in.d ? at_rank(part, i / at.slices)[i % at.slices] : 0.0;
    }
    its_overlap = 0;
    for (int other = 0; other < kGreedyCluster; ++other) its_overlap += at_rank(published, other)->quadratic;
    barrier();
    const double q = larger(warp_product(vector, chosen), 0.0), scale = 1 / std::sqrt(1 + q);
    barrier();
    for (int i = thread; i < at.stride; i += kGreedyThreads) vector[i] *= scale;
    barrier();
    for (int i = thread; i < at.slices * at.stride; i += kGreedyThreads) {
      const int matrix_row = rank * at.slices + i / at.stride, column = i % at.stride;
      if (matrix_row < in.d) {
        inverse[i] -= vector[matrix_row] * vector[column];
        moment[i] += chosen[matrix_row] * chosen[column];
      }
    }
    return q;
  }

  /// overlap_j += (x_j·u)², eight lanes to a row.
  SPECTRAL_KERNELS_DEVICE void update_overlaps() {
    constexpr int kAtATime = kGreedyThreads / kLanes;
    for (int base = 0; base < rows; base += kAtATime) {
      const int row = base + thread / kLanes;
      const T* const x = values + static_cast<int64_t>(row < rows ? row : 0) * at.stride;
      double sum = 0;
      for (int i = 4 * (lane % kLanes); i < at.stride; i += 4 * kLanes) {
        const Four four = *reinterpret_cast<const Four*>(x + i);
        SPECTRAL_KERNELS_UNROLL
        for (int j = 0; j < 4; ++j) sum += static_cast<double>(four.x[j]) * vector[i + j];
      }
      SPECTRAL_KERNELS_UNROLL
      for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
      if (lane % kLanes == 0 && row < rows) overlap[row] += sum * sum;
    }
  }

  const GreedyArguments<T>& in;
  const GreedyLayout at;
  GreedyPublished* const published;
  double *const scratch, *const vector, *const chosen, *const part, *const overlap, *const square, *const inverse,
                                                                                                       *const moment;
  T* const values;
  unsigned char* const free;
  const int thread, lane, warp, rank, first, rows;
  double squares = 0, frobenius = 0;
};

}  // namespace spectral_kernels::device
