// Greedy selection by the whole chip. The rules are those of ops/greedy/reference.py, and so are the picks: products of
// rows are summed in double.
//
// The entries that may be picked, the pool's rows or all draws, are spread over the CTAs, whose shared memory holds as
// many of their rows as it can for the whole selection. A step: the first warp of every CTA finds the best score of its
// candidates and the lowest row that ties with it, tells both to all in one message of 16 bytes, waits for those of all
// others and decides, as all do alike; it reads the pick's row; then all warps add (x_j·u)² to the scores of their
// entries, u = x for order 2 and u = Ax/√(1 + q) for the log-determinant, where the rows of the d x d matrix A are
// spread over the CTAs too. Messages carry the number of their round, so nothing is fenced within the loop. They lie in
// two sets of slots in turn: whoever writes round r + 2 has read round r + 1 of all, who had then read round r.
#pragma once

#include "greedy_messages_cuda.h"

namespace spectral_kernels::device {

template <class T, bool kLogdet>
struct GreedyGrid {
  static constexpr double kRidge = 1e-3, kNormFloor = 1e-12;
  static constexpr int kWide = 16 / sizeof(T);  // elements of a load

  struct alignas(16) Pack {
    T x[kWide];
  };
  struct alignas(16) Pair {
    double x[2];
  };

  /// What the first warp tells its CTA of a step.
  struct Told {
    double squares, frobenius;
    int row;
  };

  /// A row (-1: none is left), and where it lies: its entry and the CTA that knows its overlap, or -1, in the pool
  /// only.
  struct Pick {
    int row;
    int64_t entry;
    int owner;
  };

  SPECTRAL_KERNELS_DEVICE GreedyGrid(const GreedyArguments<T>& arguments, const GreedyPlan& plan, unsigned char* shared,
                                     unsigned char* scratch, int threads)
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
        product(reinterpret_cast<double*>(shared + plan.product)),
        inverse(reinterpret_cast<double*>(shared + plan.inverse)),
        overlaps(reinterpret_cast<double*>(shared + plan.overlap)),
        gained(reinterpret_cast<double*>(shared + plan.gained)),
        square(reinterpret_cast<double*>(shared + plan.square)),
        keys(reinterpret_cast<uint64_t*>(shared + plan.key)),
        rows(reinterpret_cast<int*>(shared + plan.row)),
        stamps(reinterpret_cast<int*>(shared + plan.stamp)),
        values(reinterpret_cast<T*>(shared + plan.values)),
        counter(reinterpret_cast<unsigned*>(scratch + plan.counters + static_cast<size_t>(128 * group))),
        messages(plan, scratch, group, member),
        products(reinterpret_cast<Mail*>(scratch + plan.products) +
                 static_cast<int64_t>(group) * 2 * kGreedyReplicas * arguments.d),
        all_taken(scratch + plan.taken),
        copies(reinterpret_cast<T*>(scratch + plan.rows) + group * plan.entries * plan.stride),
        picked(reinterpret_cast<int*>(scratch + plan.picked) + static_cast<int64_t>(group) * arguments.k) {}

  SPECTRAL_KERNELS_DEVICE void run() {
    for (int batch = group; batch < in.b; batch += at.groups) {
      select(batch);
      // the rows of this pool may still be read
      if (batch + at.groups < in.b) group_barrier();
    }
  }

 private:
  SPECTRAL_KERNELS_DEVICE void select(int64_t batch) {
    pool = in.pool + batch * in.n * in.d;
    draws = in.draws == nullptr ? nullptr : in.draws + batch * in.k * in.m;
    valid = in.valid == nullptr ? nullptr : in.valid + batch * in.n;
    taken = all_taken + batch * in.n;
    squares = frobenius = 0;
    seen_from = unseen_from = 0;
    count = static_cast<int>((at.entries - member + at.members - 1) / at.members);
    read_entries();
    group_barrier();
    double gain = 0;
    int step = 0;
    const auto write = [&](int to, int row) {
      const double rank = frobenius > 0 ? squares * squares / frobenius : 0;
      in.indices[batch * in.k + to] = row;
      in.ranks[batch * in.k + to] = static_cast<T>(rank);
      in.objectives[batch * in.k + to] = static_cast<T>(kLogdet ? gain : rank);
    };
    for (; step < in.k; ++step) {
      if (warp == 0) tell(step == 0 ? first_of_start(in.start + batch * in.starts) : choose(step), step);
      barrier();
      const int row = told->row;
      if (row < 0) break;
      squares = told->squares;
      frobenius = told->frobenius;
      double scale = 0;
      if constexpr (kLogdet) {
        const double q = update_inverse();
        scale = 1 / (1 + q);
        gain += std::log1p(q);
      }
      // in the warp that has the least to do
      if (member == 0 && thread == threads - kWarp) write(step, row);
      if (step + 1 < in.k) {
        if (at.listed && !at.by_draw) stamp(step + 1);
        update(step + 1, row, scale);
      }
      barrier();
    }
    // no row is left
    for (int to = step + thread; member == 0 && to < in.k; to += threads) write(to, -1);
  }

  // --- entries
  // --------------------------------------------------------------------------------------------------------

  SPECTRAL_KERNELS_DEVICE int64_t entry_of(int own) const { return static_cast<int64_t>(own) * at.members + member; }

  /// The first of this CTA's entries from `entry` on.
  SPECTRAL_KERNELS_DEVICE int own_from(int64_t entry) const {
    return static_cast<int>((entry - member + at.members - 1) / at.members);
  }

  /// Place of a pool row among this CTA's, -1 when it is another's, or none.
  SPECTRAL_KERNELS_DEVICE int own_row(int64_t row) const {
    return row >= 0 && row < in.n && row % at.members == member ? static_cast<int>(row / at.members) : -1;
  }

  SPECTRAL_KERNELS_DEVICE bool is_valid(int64_t row) const {
    return row >= 0 && row < in.n && (valid == nullptr || valid[row]);
  }

  SPECTRAL_KERNELS_DEVICE T normalised(T x, double length) const {
    return in.normalize ? static_cast<T>(static_cast<double>(x) / length) : x;
  }

  /// The CTA's rows, normalised on request and rounded to T, zeros in what pads them: to global memory, where others
  /// find a pick, and to shared memory. An overlap below zero marks an entry that is never picked.
  SPECTRAL_KERNELS_DEVICE void read_entries() {
    const int kept_from = at.own - at.kept, part = lane % kGreedyLanes;
    for (int base = 0; base < count; base += threads / kGreedyLanes) {
      const int own = base + thread / kGreedyLanes;
      const bool has = own < count;
      const int64_t entry = entry_of(has ? own : 0);
      const int64_t row = has ? at.by_draw ? draws[entry] : entry : -1;
      const bool usable = is_valid(row);
      const T* const from = pool + (usable ? row : 0) * in.d;
      double sum = 0, largest = 0;
      if (usable) {
        SPECTRAL_KERNELS_UNROLL_BY(4)
        for (int i = part; i < in.d; i += kGreedyLanes) {
          const double x = static_cast<double>(from[i]);
          sum += x * x;
          largest = larger(largest, std::fabs(x));
        }
      }
      sum = lanes_sum(sum);
      SPECTRAL_KERNELS_UNROLL
      for (int mask = kGreedyLanes / 2; mask > 0; mask /= 2) largest = larger(largest, shuffle_xor(largest, mask));
      if (!has) continue;
      const double length = larger(std::sqrt(sum), kNormFloor);
      T* const copy = copies + entry * at.stride;
      T* const kept = own < kept_from ? nullptr : values + static_cast<int64_t>(own - kept_from) * at.stride;
      SPECTRAL_KERNELS_UNROLL_BY(4)
      for (int i = part; i < at.stride; i += kGreedyLanes) {
        const T x = usable && i < in.d ? normalised(from[i], length) : T(0);
        copy[i] = x;
        if (kept != nullptr) kept[i] = x;
      }
      if (part == 0) {
        overlaps[own] = largest > 0 ? 0 : -1;
        if (kLogdet) gained[own] = 0;
        if (!in.normalize) square[own] = sum;
        if (at.by_draw) rows[own] = static_cast<int>(usable ? row : -1);
        if (at.listed && !at.by_draw) stamps[own] = 0;
      }
    }
    for (int i = thread; i < at.slices * at.stride; i += threads) {
      inverse[i] = i / at.stride * at.members + member == i % at.stride ? 1 / kRidge : 0;
    }
  }

  /// Marks this CTA's rows among the draws of a step.
  SPECTRAL_KERNELS_DEVICE void stamp(int step) {
    for (int i = thread; i < in.m; i += threads) {
      const int own = own_row(draws[static_cast<int64_t>(step) * in.m + i]);
      if (own >= 0) stamps[own] = step;
    }
  }

  /// Sum over the lanes that share a row, the same bits in each.
  SPECTRAL_KERNELS_DEVICE double lanes_sum(double sum) const {
    SPECTRAL_KERNELS_UNROLL
    for (int mask = kGreedyLanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    return sum;
  }

  /// Where `vector` and `product` hold an element: what a lane multiplies with one load of a row lies in 16-byte
  /// pieces, a piece beside those of its neighbours.
  SPECTRAL_KERNELS_DEVICE int slot(int i) const {
    return kWide == 2 ? i : i % kWide / 2 * (at.stride / 2) + i / kWide * 2 + i % 2;
  }

  /// After the pick `gone`: overlap_j += (x_j·x)², by log-determinant also q_j −= (x_j·v)²·scale, and the scores of the
  /// entries that may be picked in `step` or later.
  SPECTRAL_KERNELS_DEVICE void update(int step, int gone, double scale) {
    const int kept_from = at.own - at.kept;
    const int from = at.by_draw ? smaller(own_from(static_cast<int64_t>(step) * in.m), count) : 0;
    update_part(from, smaller(kept_from, count), gone, scale, copies + static_cast<int64_t>(member) * at.stride,
                static_cast<int64_t>(at.members) * at.stride);
    update_part(larger(from, kept_from), count, gone, scale, values - static_cast<int64_t>(kept_from) * at.stride,
                at.stride);
  }

  SPECTRAL_KERNELS_DEVICE void update_part(int from, int to, int gone, double scale, const T* base, int64_t pitch) {
    const int part = lane % kGreedyLanes, gone_own = at.by_draw ? -1 : own_row(gone);
    for (int first = from; first < to; first += threads / kGreedyLanes) {
      const int own = first + thread / kGreedyLanes;
      const T* const x = base + smaller(own, to - 1) * pitch;
      // a sum for every place in a load: their chains run beside one another
      double sums[kWide] = {}, more[kWide] = {};
      SPECTRAL_KERNELS_UNROLL_BY(4)
      for (int i = part * kWide; i < at.stride; i += kGreedyLanes * kWide) {
        const Pack pack = *reinterpret_cast<const Pack*>(x + i);
        SPECTRAL_KERNELS_UNROLL
        for (int j = 0; j < kWide; j += 2) {
          const Pair pair = *reinterpret_cast<const Pair*>(vector + slot(i + j));
          const double one = static_cast<double>(pack.x[j]), two = static_cast<double>(pack.x[j + 1]);
          sums[j] += one * pair.x[0];
          sums[j + 1] += two * pair.x[1];
          if constexpr (kLogdet) {
            const Pair other = *reinterpret_cast<const Pair*>(product + slot(i + j));
            more[j] += one * other.x[0];
            more[j + 1] += two * other.x[1];
          }
        }
      }
      const double along = lanes_sum(total(sums));
      const double across = kLogdet ? lanes_sum(total(more)) : 0;
      if (part != 0 || own >= to) continue;
      const double before = overlaps[own];
      const bool dead = before < 0 || (at.by_draw ? rows[own] == gone : own == gone_own);
      const double overlap = dead ? -1 : before + along * along;
      overlaps[own] = overlap;
      if constexpr (kLogdet) gained[own] += across * across * scale;
      keys[own] = dead ? 0 : key_of(score(own, overlap));
    }
  }

  SPECTRAL_KERNELS_DEVICE static double total(const double (&sums)[kWide]) {
    if constexpr (kWide == 2) return sums[0] + sums[1];
    return sums[0] + sums[1] + (sums[2] + sums[3]);
  }

  SPECTRAL_KERNELS_DEVICE double score(int own, double overlap) const {
    const double its_square = in.normalize ? 1 : square[own];
    if constexpr (kLogdet) return larger(its_square / kRidge - gained[own], 0.0);
    if (in.normalize) return -overlap;
    const double sum = squares + its_square, after = frobenius + 2 * overlap + its_square * its_square;
    return sum * sum / (after > 0 ? after : 1);
  }

  // --- the first warp: the pick --------------------------------------------------------------------------------------

  /// The best of the step's candidates, and when there is none the lowest seen row that is left, else the lowest row.
  SPECTRAL_KERNELS_DEVICE Pick choose(int step) {
    const int64_t first = static_cast<int64_t>(step) * in.m;
    const int from = at.by_draw ? own_from(first) : 0, to = at.by_draw ? smaller(own_from(first + in.m), count) : count;
    uint64_t best = 0;
    SPECTRAL_KERNELS_UNROLL_BY(4)
    for (int own = from + lane; own < to; own += kWarp) {
      if (is_candidate(own, step)) best = larger(best, keys[own]);
    }
    best = largest_key(best);
    messages.exchange(offer(from, to, step, best, edge_of(best)));
    // by all CTAs alike, so that each finds its own; not before all others have decided on it too
    if (lane == 0) taken[last] = 1;
    const uint64_t top = messages.best();
    if (top == 0) return lowest_left();
    const uint64_t edge = edge_of(top);
    if (messages.in_doubt(top, edge)) messages.exchange(offer(from, to, step, best, edge));
    const GreedyMessages::Agreed agreed = messages.lowest(edge);
    if (agreed.row == kGreedyNone) return lowest_left();
    const int row = static_cast<int>(agreed.row);
    return {row, at.by_draw ? first + agreed.place : row, static_cast<int>(agreed.owner)};
  }

  SPECTRAL_KERNELS_DEVICE bool is_candidate(int own, int step) const {
    return !at.listed || at.by_draw || stamps[own] == step;
  }

  /// The lowest row of this CTA whose key is not below `edge`.
  SPECTRAL_KERNELS_DEVICE GreedyOffer offer(int from, int to, int step, uint64_t best, uint64_t edge) const {
    uint32_t row = kGreedyNone, own = kGreedyNone;
    if (best != 0 && best >= edge) {
      SPECTRAL_KERNELS_UNROLL_BY(4)
      for (int i = from + lane; i < to; i += kWarp) {
        if (!is_candidate(i, step) || keys[i] < edge) continue;
        const uint32_t its_row = static_cast<uint32_t>(at.by_draw ? rows[i] : i);
        if (its_row < row) row = its_row, own = static_cast<uint32_t>(i);
      }
      const uint32_t lowest = warp_min(row);
      own = warp_min(row == lowest ? own : kGreedyNone);
    }
    if (own == kGreedyNone) return {0, 0, 0, 0, false};
    const int64_t entry = entry_of(static_cast<int>(own));
    return {best, static_cast<uint32_t>(at.by_draw ? rows[own] : entry),
            at.by_draw ? static_cast<uint32_t>(entry - static_cast<int64_t>(step) * in.m) : 0u, overlaps[own],
            keys[own] == best};
  }

  /// The first of `start` that is valid and seen, else the lowest row that is.
  SPECTRAL_KERNELS_DEVICE Pick first_of_start(const int64_t* start) {
    for (int i = 0; i < in.starts; ++i) {
      const int64_t row = start[i];
      if (is_valid(row) && ballot(lane == 0 && is_seen(row)) != 0) return {static_cast<int>(row), -1, -1};
    }
    return lowest_left();
  }

  SPECTRAL_KERNELS_DEVICE bool is_seen(int64_t row) const {
    for (int i = 0; i < in.d; ++i) {
      if (pool[row * in.d + i] != T(0)) return true;
    }
    return false;
  }

  /// Every CTA looks for itself, from where it found the last one.
  SPECTRAL_KERNELS_DEVICE Pick lowest_left() {
    warp_barrier();
    int row = lowest_left_from(seen_from, true);
    if (row < 0) row = lowest_left_from(unseen_from, false);
    return {row, -1, -1};
  }

  SPECTRAL_KERNELS_DEVICE int lowest_left_from(int& first, bool seen) const {
    for (; first < in.n; first += kWarp) {
      const int row = first + lane;
      const unsigned found = ballot(is_valid(row) && taken[row] == 0 && (!seen || is_seen(row)));
      if (found == 0) continue;
      first += lowest_bit(found);
      return first;
    }
    return -1;
  }

  /// The pick to the whole CTA: its row to `vector`, and the sums that it adds to.
  SPECTRAL_KERNELS_DEVICE void tell(const Pick& pick, int step) {
    double its_square = 0, overlap = 0;
    if (pick.entry >= 0) {
      // both are on their way together
      const Mail detail = messages.ask_detail(pick.owner);
      const T* const from = copies + pick.entry * at.stride;
      for (int i = lane * kWide; i < at.stride; i += kWarp * kWide) {
        const Pack pack = *reinterpret_cast<const Pack*>(from + i);
        SPECTRAL_KERNELS_UNROLL
        for (int j = 0; j < kWide; j += 2) {
          const Pair pair{{static_cast<double>(pack.x[j]), static_cast<double>(pack.x[j + 1])}};
          *reinterpret_cast<Pair*>(vector + slot(i + j)) = pair;
          its_square += pair.x[0] * pair.x[0] + pair.x[1] * pair.x[1];
        }
      }
      its_square = in.normalize ? 1 : warp_sum(its_square);
      overlap = messages.detail(pick.owner, detail);
    } else if (pick.row >= 0) {
      bool seen;
      const double length = measure(pick.row, its_square, seen);
      for (int i = lane; i < at.stride; i += kWarp) {
        vector[slot(i)] = i < in.d ? element(pick.row, i, length) : 0;
      }
      if (in.normalize) its_square = seen ? 1 : 0;
      for (int before = 0; seen && before < step; ++before) overlap += squared_product(picked[before]);
    }
    last = pick.row;
    if (lane == 0) {
      if (pick.row >= 0) picked[step] = pick.row;
      *told = {squares + its_square, frobenius + 2 * overlap + its_square * its_square, pick.row};
    }
  }

  /// Length of a row of the pool.
  SPECTRAL_KERNELS_DEVICE double measure(int64_t row, double& its_square, bool& seen) const {
    double sum = 0;
    bool any = false;
    for (int i = lane; i < in.d; i += kWarp) {
      const double x = static_cast<double>(pool[row * in.d + i]);
      sum += x * x;
      any = any || x != 0;
    }
    its_square = warp_sum(sum);
    seen = ballot(any) != 0;
    return larger(std::sqrt(its_square), kNormFloor);
  }

  SPECTRAL_KERNELS_DEVICE double element(int64_t row, int i, double length) const {
    return static_cast<double>(normalised(pool[row * in.d + i], length));
  }

  /// Of a row of the pool with the one in `vector`, of which each lane reads what it wrote.
  SPECTRAL_KERNELS_DEVICE double squared_product(int64_t row) const {
    double sum = 0;
    bool seen;
    const double length = measure(row, sum, seen);
    sum = 0;
    for (int i = lane; i < in.d; i += kWarp) sum += element(row, i, length) * vector[slot(i)];
    sum = warp_sum(sum);
    return sum * sum;
  }

  // --- all warps
  // ------------------------------------------------------------------------------------------------------

  /// Log-determinant: v = Ax to `product`, and A − vvᵀ/(1 + q). Returns q = xᵀAx.
  SPECTRAL_KERNELS_DEVICE double update_inverse() {
    ++round;
    Mail* const boxes = products + static_cast<int64_t>(round % 2) * kGreedyReplicas * in.d;
    const int warps = threads / kWarp;
    for (int i = warp; i < at.slices; i += warps) {
      const int row = i * at.members + member;
      double sum = 0;
      for (int j = lane; j < in.d; j += kWarp) sum += inverse[i * at.stride + j] * vector[slot(j)];
      sum = warp_sum(sum);
      if (row < in.d && lane < kGreedyReplicas) {
        send(boxes + lane * in.d + row, {__builtin_bit_cast(uint64_t, sum), 0, round});
      }
    }
    const Mail* const box = boxes + member % kGreedyReplicas * in.d;
    for (int i = thread; i < at.stride; i += threads) {
      double sum = 0;
      if (i < in.d) {
        Mail got = receive(box + i);
        while (got.tag != round) {
          spin();
          got = receive(box + i);
        }
        sum = __builtin_bit_cast(double, got.value);
      }
      product[slot(i)] = sum;
    }
    barrier();
    double q = 0;
    for (int i = lane; i < at.stride; i += kWarp) q += vector[slot(i)] * product[slot(i)];
    q = larger(warp_sum(q), 0.0);
    for (int i = warp; i < at.slices; i += warps) {
      const int row = i * at.members + member;
      if (row >= in.d) continue;
      const double factor = product[slot(row)] / (1 + q);
      for (int j = lane; j < in.d; j += kWarp) inverse[i * at.stride + j] -= factor * product[slot(j)];
    }
    return q;
  }

  /// All CTAs of the pool, and what they wrote before.
  SPECTRAL_KERNELS_DEVICE void group_barrier() {
    barrier();
    if (thread == 0) {
      passes += static_cast<unsigned>(at.members);
      arrive(counter);
      // the count may wrap around
      while (static_cast<int>(arrived(counter) - passes) < 0) spin();
    }
    barrier();
  }

  const GreedyArguments<T>& in;
  const GreedyPlan& at;
  const int threads, thread, lane, warp, group, member;
  Told* const told;
  double *const vector, *const product, *const inverse, *const overlaps, *const gained, *const square;
  uint64_t* const keys;
  int *const rows, *const stamps;
  T* const values;
  unsigned* const counter;
  GreedyMessages messages;
  Mail* const products;
  unsigned char* const all_taken;
  T* const copies;
  int* const picked;
  // of the pool at hand
  const T* pool = nullptr;
  const int64_t* draws = nullptr;
  const bool* valid = nullptr;
  unsigned char* taken = nullptr;
  int count = 0, last = -1, seen_from = 0, unseen_from = 0;
  double squares = 0, frobenius = 0;
  // of all pools
  unsigned round = 0, passes = 0;
};

}  // namespace spectral_kernels::device
