// A CTA's share of greedy selection (greedy_cuda.h): its entries, and where they lie.
#pragma once

#include "greedy_messages_cuda.h"

namespace spectral_kernels::device {

constexpr double kGreedyRidge = 1e-3;
// of |x|²/ridge: q below it is rounding; worth an error from the least on. And the longest |x|² whose square is held
constexpr double kGreedyNoise = 0x1p-46, kGreedyLeastNoise = 1e-6, kGreedyLongest = 0x1p490;
// from the first error word to those of a mask of too few and of rows too long for the log-determinant
constexpr int kGreedyMask = 2, kGreedyLong = 4;

template <class T>
struct GreedyShare {
  static constexpr int kWide = 16 / sizeof(T);  // elements of a load

  struct alignas(16) Pack {
    T x[kWide];
  };
  struct alignas(16) Pair {
    double x[2];
  };

  /// What the first warp tells its CTA of a step.
  struct Told {
    double square, squares, frobenius;  // of the pick, and the sums with it
    int row;
  };

  SPECTRAL_KERNELS_DEVICE GreedyShare(const GreedyArguments<T>& arguments, const GreedyPlan& plan,
                                      unsigned char* shared, unsigned char* scratch, int threads)
      : in(arguments),
        at(plan),
        threads(threads),
        thread(thread_index()),
        lane(lane_index()),
        warp(warp_index()),
        group(block_index() / plan.members),
        member(block_index() % plan.members),
        told(reinterpret_cast<Told*>(shared)),
        vector(reinterpret_cast<double*>(shared + plan.vector)),
        overlaps(reinterpret_cast<double*>(shared + plan.overlap)),
        gained(reinterpret_cast<double*>(shared + plan.gained)),
        square(reinterpret_cast<double*>(shared + plan.square)),
        keys(reinterpret_cast<uint64_t*>(shared + plan.key)),
        rows(reinterpret_cast<int*>(shared + plan.row)),
        stamps(reinterpret_cast<int*>(shared + plan.stamp)),
        values(reinterpret_cast<T*>(shared + plan.values)),
        kept_from(plan.own - plan.kept),
        copies(reinterpret_cast<T*>(scratch + plan.rows) + group * plan.entries * plan.stride),
        scratch(scratch),
        order(arguments.n, 0) {}

  SPECTRAL_KERNELS_DEVICE void open(int64_t batch) {
    pool = in.pool + batch * in.n * in.d;
    draws = in.draws == nullptr ? nullptr : in.draws + batch * in.k * in.m;
    valid = in.valid == nullptr ? nullptr : in.valid + batch * in.n;
    taken = scratch + at.taken + batch * in.n;
    order = RowKeys(in.n, in.seed[batch]);
    count = own_from(static_cast<int>(at.entries));
    squares = frobenius = 0;
    read_entries(batch);
  }

  SPECTRAL_KERNELS_DEVICE int entry_of(int own) const { return own * at.members + member; }

  /// The first of this CTA's entries from `entry` on.
  SPECTRAL_KERNELS_DEVICE int own_from(int entry) const { return (entry - member + at.members - 1) / at.members; }

  SPECTRAL_KERNELS_DEVICE int own_from_step(int step) const { return smaller(own_from(step * in.m), count); }

  /// Later steps have lower ones, as have earlier draws of a step.
  SPECTRAL_KERNELS_DEVICE int stamp_of(int step, int place) const { return (in.k - step) * in.m + place; }

  SPECTRAL_KERNELS_DEVICE bool is_valid(int64_t row) const {
    return row >= 0 && row < in.n && (valid == nullptr || valid[row]);
  }

  /// What a pass over a row says of it. Squares of doubles may overflow or vanish: the row is measured by `unit` then,
  /// its largest element.
  struct Measure {
    double square, unit, length;
    bool any, finite, fits;  // fits: finite, and not too long for the log-determinant

    SPECTRAL_KERNELS_DEVICE bool seen(bool normalize) const {
      constexpr double floor = 1e-12;
      return normalize ? any && unit * length > floor : any;
    }
  };

  /// By kLanes lanes together, each with a `part` of its own; of no elements unless `there`.
  template <int kLanes>
  SPECTRAL_KERNELS_DEVICE Measure measure(const T* row, int part, bool there = true) const {
    const int d = there ? in.d : 0;
    // `poison` is NaN if an element is NaN or Inf
    double sum = 0, largest = 0, poison = 0;
    SPECTRAL_KERNELS_UNROLL_BY(4)
    for (int i = part; i < d; i += kLanes) {
      const double x = static_cast<double>(row[i]);
      sum += x * x;
      poison += x - x;
      largest = larger(largest, std::fabs(x));
    }
    SPECTRAL_KERNELS_UNROLL
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {
      sum += shuffle_xor(sum, mask);
      poison += shuffle_xor(poison, mask);
      largest = larger(largest, shuffle_xor(largest, mask));
    }
    const bool held = in.normalize || !in.logdet || !(sum > kGreedyLongest);
    Measure found{sum, 1, 1, largest > 0, poison == 0, poison == 0 && held};
    if (sizeof(T) == sizeof(double) && in.normalize) {
      if (found.any) found.unit = largest;
      sum = 0;
      for (int i = part; i < d; i += kLanes) {
        const double x = static_cast<double>(row[i]) / found.unit;
        sum += x * x;
      }
      SPECTRAL_KERNELS_UNROLL
      for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    }
    if (found.any) found.length = std::sqrt(sum);
    return found;
  }

  SPECTRAL_KERNELS_DEVICE T normalised(T x, const Measure& by) const {
    if (!in.normalize) return x;
    const double scaled = sizeof(T) == sizeof(double) ? static_cast<double>(x) / by.unit : static_cast<double>(x);
    return static_cast<T>(scaled / by.length);
  }

  /// Where a vector in shared memory holds an element: what a lane multiplies with one load of a row lies in pieces of
  /// 16 bytes, each beside those of the lane's neighbours.
  SPECTRAL_KERNELS_DEVICE int slot(int i) const {
    return kWide == 2 ? i : i % kWide / 2 * (at.stride / 2) + i / kWide * 2 + i % 2;
  }

  /// Sum over the lanes that share a row, the same bits in each.
  SPECTRAL_KERNELS_DEVICE static double lanes_sum(double sum) {
    SPECTRAL_KERNELS_UNROLL
    for (int mask = kGreedyLanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    return sum;
  }

  const GreedyArguments<T>& in;
  const GreedyPlan& at;
  const int threads, thread, lane, warp, group, member;
  Told* const told;
  double *const vector, *const overlaps, *const gained, *const square;
  uint64_t* const keys;            // of the scores, 0 for what is never picked
  int *const rows, *const stamps;  // stamps: `stamp_of` a row's first draw in the last step that drew it
  T* const values;
  const int kept_from;
  T* const copies;
  unsigned char* const scratch;
  // of the pool at hand
  RowKeys order;
  const T* pool = nullptr;
  const int64_t* draws = nullptr;
  const bool* valid = nullptr;
  unsigned char* taken = nullptr;
  int count = 0;
  double squares = 0, frobenius = 0;

 private:
  /// The CTA's rows, normalised on request and rounded to T, zeros in what pads them: to global memory, where others
  /// find a pick, and to shared memory. An overlap below zero marks an entry that is never picked, such as one with NaN
  /// or Inf: in a sum it would make every score NaN.
  SPECTRAL_KERNELS_DEVICE void read_entries(int64_t batch) {
    const int part = lane % kGreedyLanes;
    for (int base = 0; base < count; base += threads / kGreedyLanes) {
      const int own = base + thread / kGreedyLanes;
      const bool has = own < count;
      const int entry = entry_of(has ? own : 0);
      const int64_t row = has ? at.by_draw ? draws[entry] : entry : -1;
      const bool usable = is_valid(row);
      const T* const from = pool + (usable ? row : 0) * in.d;
      const Measure measured = this->template measure<kGreedyLanes>(from, part, usable);
      if (!has) continue;
      T* const copy = copies + static_cast<int64_t>(entry) * at.stride;
      T* const kept = own < kept_from ? nullptr : values + static_cast<int64_t>(own - kept_from) * at.stride;
      SPECTRAL_KERNELS_UNROLL_BY(4)
      for (int i = part; i < at.stride; i += kGreedyLanes) {
        const T x = usable && measured.fits && i < in.d ? normalised(from[i], measured) : T(0);
        copy[i] = x;
        if (kept != nullptr) kept[i] = x;
      }
      if (part == 0) {
        if (!measured.fits && in.words != nullptr) {
          note(in.words + (measured.finite ? kGreedyLong : 0), batch << 32 | row);
        }
        overlaps[own] = measured.fits && measured.seen(in.normalize) ? 0 : -1;
        if (in.logdet) gained[own] = 0;
        if (!in.normalize) square[own] = measured.fits ? measured.square : 0;
        if (at.by_draw) rows[own] = static_cast<int>(usable ? row : -1);
        if (at.listed && !at.by_draw) stamps[own] = INT32_MAX;
      }
    }
  }
};

}  // namespace spectral_kernels::device
