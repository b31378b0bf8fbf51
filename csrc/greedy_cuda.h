// Greedy selection by the whole chip. The rules are those of ops/greedy/reference.py, and so are the picks: products of
// rows are summed in double.
//
// The entries that may be picked, the pool's rows or all draws, are spread over the CTAs, whose shared memory holds as
// many of their rows as it can for the whole selection. A step: the first warp of every CTA finds the best score of its
// candidates and the first row that ties with it, tells both to all in one message of 16 bytes, waits for those of all
// others and decides, as all do alike; it reads the pick's row; then all warps add (x_j·u)² to the scores of their
// entries, u = x for order 2 and u = Ax/√(1 + q) for the log-determinant, where the rows of the d x d matrix A are
// spread over the CTAs too. Messages carry the number of their round, so nothing is fenced within the loop. They lie in
// two sets of slots in turn: whoever writes round r + 2 has read round r + 1 of all, who had then read round r.
#pragma once

#include "greedy_pick_cuda.h"

namespace spectral_kernels::device {

template <class T, bool kLogdet>
class GreedyGrid : public GreedyPicker<T> {
 public:
  using Share = GreedyShare<T>;
  using Picker = GreedyPicker<T>;
  using Pack = typename Share::Pack;
  using Pair = typename Share::Pair;
  using Share::at;
  using Share::in;
  using Share::kWide;
  // elements that the lanes of a row load at a time, and in flight
  static constexpr int kStep = kGreedyLanes * kWide, kBlock = 4 * kStep;

  SPECTRAL_KERNELS_DEVICE GreedyGrid(const GreedyArguments<T>& arguments, const GreedyPlan& plan, unsigned char* shared,
                                     unsigned char* scratch, int threads)
      : Picker(arguments, plan, shared, scratch, threads),
        product(reinterpret_cast<double*>(shared + plan.product)),
        inverse(reinterpret_cast<double*>(shared + plan.inverse)) {}

  SPECTRAL_KERNELS_DEVICE void run() {
    for (int batch = this->group; batch < in.b; batch += at.groups) {
      select(batch);
      // the rows of this pool may still be read
      if (batch + at.groups < in.b) group_barrier();
    }
  }

 private:
  SPECTRAL_KERNELS_DEVICE void select(int64_t batch) {
    Picker::open(batch);
    if constexpr (kLogdet) {
      for (int i = this->thread; i < at.slices * at.stride; i += this->threads) {
        inverse[i] = i / at.stride * at.members + this->member == i % at.stride ? 1 / kGreedyRidge : 0;
      }
    }
    group_barrier();
    double gain = 0;
    int step = 0;
    const auto write = [&](int to, int row) {
      const double rank = this->frobenius > 0 ? this->squares * this->squares / this->frobenius : 0;
      in.indices[batch * in.k + to] = row;
      in.ranks[batch * in.k + to] = static_cast<T>(rank);
      in.objectives[batch * in.k + to] = static_cast<T>(kLogdet ? gain : rank);
    };
    for (; step < in.k; ++step) {
      if (this->warp == 0) Picker::pick(step, in.start + batch * in.starts);
      barrier();
      const int row = this->told->row;
      if (row < 0) break;
      this->squares = this->told->squares;
      this->frobenius = this->told->frobenius;
      double scale = 0;
      if constexpr (kLogdet) {
        const double q = update_inverse(), noise = this->told->square / kGreedyRidge * kGreedyNoise;
        if (this->member == 0 && this->thread == 0 && in.words != nullptr && !in.normalize &&
            noise > kGreedyLeastNoise && q < noise) {
          note(in.words + kGreedyLong, batch << 32 | row);
        }
        scale = 1 / (1 + q);
        gain += std::log1p(q);
      }
      // in the warp that has the least to do
      if (this->member == 0 && this->thread == this->threads - kWarp) write(step, row);
      if (step + 1 < in.k) {
        if (at.listed && !at.by_draw) stamp(step + 1);
        const int from = at.by_draw ? this->own_from_step(step + 1) : 0;
        update(from, smaller(this->kept_from, this->count), row, scale,
               this->copies + static_cast<int64_t>(this->member) * at.stride,
               static_cast<int64_t>(at.members) * at.stride);
        update(larger(from, this->kept_from), this->count, row, scale,
               this->values - static_cast<int64_t>(this->kept_from) * at.stride, at.stride);
      }
      barrier();
    }
    // no row is left
    if (step < in.k && this->member == 0 && this->thread == 0 && in.words != nullptr) {
      note(in.words + kGreedyMask, batch << 32 | step);
    }
    for (int to = step + this->thread; this->member == 0 && to < in.k; to += this->threads) write(to, -1);
  }

  /// Marks this CTA's rows among the draws of a step.
  SPECTRAL_KERNELS_DEVICE void stamp(int step) const {
    for (int i = this->thread; i < in.m; i += this->threads) {
      const int64_t row = this->draws[static_cast<int64_t>(step) * in.m + i];
      if (row < 0 || row >= in.n) continue;
      const unsigned members = static_cast<unsigned>(at.members), own = static_cast<unsigned>(row) / members;
      if (this->entry_of(static_cast<int>(own)) == row) lower_to(this->stamps + own, this->stamp_of(step, i));
    }
  }

  /// After the pick `gone`, for entries from `from` on, which lie at base + entry·pitch: overlap_j += (x_j·x)², by
  /// log-determinant also q_j −= (x_j·v)²·scale, and the scores.
  SPECTRAL_KERNELS_DEVICE void update(int from, int to, int gone, double scale, const T* base, int64_t pitch) const {
    const int part = this->lane % kGreedyLanes;
    for (int first = from; first < to; first += this->threads / kGreedyLanes) {
      const int own = first + this->thread / kGreedyLanes;
      const T* const x = base + smaller(own, to - 1) * pitch;
      // a sum for every place in a load: their chains run beside one another
      double sums[kWide] = {}, more[kWide] = {};
      int i = 0;
      SPECTRAL_KERNELS_UNROLL_BY(1)
      for (; i + kBlock <= at.stride; i += kBlock) {
        SPECTRAL_KERNELS_UNROLL
        for (int j = 0; j < kBlock; j += kStep) add_products(x, i + j, sums, more);
      }
      for (; i + part * kWide < at.stride; i += kStep) add_products(x, i, sums, more);
      const double along = Share::lanes_sum(total(sums));
      const double across = kLogdet ? Share::lanes_sum(total(more)) : 0;
      if (part != 0 || own >= to) continue;
      const double before = this->overlaps[own];
      const bool dead = before < 0 || (at.by_draw ? this->rows[own] : this->entry_of(own)) == gone;
      const double overlap = dead ? -1 : before + along * along;
      this->overlaps[own] = overlap;
      if constexpr (kLogdet) this->gained[own] += across * across * scale;
      this->keys[own] = dead ? 0 : key_of(score(own, overlap));
    }
  }

  /// Those of a lane, with the elements of a row from `from` on, a multiple of kStep.
  SPECTRAL_KERNELS_DEVICE void add_products(const T* x, int from, double (&sums)[kWide], double (&more)[kWide]) const {
    const int part = this->lane % kGreedyLanes, half = at.stride / 2;
    const Pack pack = *reinterpret_cast<const Pack*>(x + from + part * kWide);
    // slot() of these elements
    const int place = from / kWide * 2 + part * 2;
    SPECTRAL_KERNELS_UNROLL
    for (int j = 0; j < kWide; j += 2) {
      const Pair pair = *reinterpret_cast<const Pair*>(this->vector + place + j / 2 * half);
      const double one = static_cast<double>(pack.x[j]), two = static_cast<double>(pack.x[j + 1]);
      sums[j] += one * pair.x[0];
      sums[j + 1] += two * pair.x[1];
      if constexpr (kLogdet) {
        const Pair other = *reinterpret_cast<const Pair*>(product + place + j / 2 * half);
        more[j] += one * other.x[0];
        more[j + 1] += two * other.x[1];
      }
    }
  }

  SPECTRAL_KERNELS_DEVICE static double total(const double (&sums)[kWide]) {
    if constexpr (kWide == 2) return sums[0] + sums[1];
    return sums[0] + sums[1] + (sums[2] + sums[3]);
  }

  SPECTRAL_KERNELS_DEVICE double score(int own, double overlap) const {
    const double square = in.normalize ? 1 : this->square[own];
    if constexpr (kLogdet) return larger(square / kGreedyRidge - this->gained[own], 0.0);
    if (in.normalize) return -overlap;
    const double sum = this->squares + square, after = this->frobenius + 2 * overlap + square * square;
    return sum * sum / (after > 0 ? after : 1);
  }

  /// Log-determinant: v = Ax to `product`, and A − vvᵀ/(1 + q). Returns q = xᵀAx.
  SPECTRAL_KERNELS_DEVICE double update_inverse() {
    ++round;
    Mail* const boxes = reinterpret_cast<Mail*>(this->scratch + at.products) +
                        static_cast<int64_t>(this->group * 2 + round % 2) * kGreedyReplicas * in.d;
    const int warps = this->threads / kWarp;
    for (int i = this->warp; i < at.slices; i += warps) {
      const int row = i * at.members + this->member;
      double sum = 0;
      for (int j = this->lane; j < in.d; j += kWarp) sum += inverse[i * at.stride + j] * this->vector[this->slot(j)];
      sum = warp_sum(sum);
      if (row < in.d && this->lane < kGreedyReplicas) {
        send(boxes + this->lane * in.d + row, {__builtin_bit_cast(uint64_t, sum), 0, round});
      }
    }
    const Mail* const box = boxes + this->member % kGreedyReplicas * in.d;
    for (int i = this->thread; i < at.stride; i += this->threads) {
      double sum = 0;
      if (i < in.d) {
        Mail got = receive(box + i);
        while (got.tag != round) {
          spin();
          got = receive(box + i);
        }
        sum = __builtin_bit_cast(double, got.value);
      }
      product[this->slot(i)] = sum;
    }
    barrier();
    double q = 0;
    for (int i = this->lane; i < at.stride; i += kWarp) q += this->vector[this->slot(i)] * product[this->slot(i)];
    q = larger(warp_sum(q), 0.0);
    for (int i = this->warp; i < at.slices; i += warps) {
      const int row = i * at.members + this->member;
      if (row >= in.d) continue;
      const double factor = product[this->slot(row)] / (1 + q);
      for (int j = this->lane; j < in.d; j += kWarp) inverse[i * at.stride + j] -= factor * product[this->slot(j)];
    }
    return q;
  }

  /// All CTAs of the pool, and what they wrote before.
  SPECTRAL_KERNELS_DEVICE void group_barrier() {
    barrier();
    if (this->thread == 0) {
      auto* const counter = reinterpret_cast<unsigned*>(this->scratch + at.counters + 128 * this->group);
      passes += static_cast<unsigned>(at.members);
      arrive(counter);
      // the count may wrap around
      while (static_cast<int>(arrived(counter) - passes) < 0) spin();
    }
    barrier();
  }

  double *const product, *const inverse;
  unsigned round = 0, passes = 0;
};

}  // namespace spectral_kernels::device
