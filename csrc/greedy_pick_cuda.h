// A step's pick in greedy selection (greedy_cuda.h), by the first warp of every CTA, all of them alike.
#pragma once

#include "greedy_share_cuda.h"

namespace spectral_kernels::device {

template <class T>
class GreedyPicker : public GreedyShare<T> {
 public:
  using Share = GreedyShare<T>;
  using Pack = typename Share::Pack;
  using Pair = typename Share::Pair;

  using Share::at;
  using Share::in;
  using Share::lane;

  enum class Kind { kNotFinite, kUnseen, kSeen };

  SPECTRAL_KERNELS_DEVICE GreedyPicker(const GreedyArguments<T>& arguments, const GreedyPlan& plan,
                                       unsigned char* shared, unsigned char* scratch, int threads)
      : Share(arguments, plan, shared, scratch, threads), messages(plan, scratch, Share::group, Share::member) {}

  SPECTRAL_KERNELS_DEVICE void open(int64_t batch) {
    Share::open(batch);
    seen_from = unseen_from = 0, last = -1;
  }

  /// Decides, and tells the CTA: the pick's row to its `vector`, and the sums that it adds to.
  SPECTRAL_KERNELS_DEVICE void pick(int step, const int64_t* start) {
    Pick pick = step == 0 ? first_of_start(start) : choose(step);
    if (pick.row < 0) pick.row = first_left();
    double square = 0, overlap = 0;
    if (pick.entry >= 0) {
      read_entry(pick, square, overlap);
    } else if (pick.row >= 0) {
      read_row(pick.row, step, square, overlap);
    }
    last = pick.row;
    if (lane != 0) return;
    // by all CTAs alike, so that each finds its own
    if (pick.row >= 0) picked()[step] = pick.row;
    *this->told = {square, this->squares + square, this->frobenius + 2 * overlap + square * square, pick.row};
  }

 private:
  /// A row (-1: none), its entry (-1: it lies in the pool only) and the CTA that knows its overlap.
  struct Pick {
    int row = -1, entry = -1, owner = -1;
  };

  /// The picks of the pool at hand.
  SPECTRAL_KERNELS_DEVICE int* picked() const {
    return reinterpret_cast<int*>(this->scratch + at.picked) + static_cast<int64_t>(this->group) * in.k;
  }

  /// The best of the step's candidates.
  SPECTRAL_KERNELS_DEVICE Pick choose(int step) {
    const int from = at.by_draw ? this->own_from_step(step) : 0,
              to = at.by_draw ? this->own_from_step(step + 1) : this->count;
    uint64_t best = 0;
    SPECTRAL_KERNELS_UNROLL_BY(4)
    for (int own = from + lane; own < to; own += kWarp) {
      if (is_candidate(own, step)) best = larger(best, this->keys[own]);
    }
    best = largest_key(best);
    uint64_t top = 0, edge = edge_of(best);
    GreedyMessages::Agreed agreed;
    // a second round when the first leaves doubt
    SPECTRAL_KERNELS_UNROLL_BY(1)
    for (int again = 0; again < 2; ++again) {
      messages.exchange(offer(from, to, step, best, edge));
      if (again == 0) {
        // by all CTAs alike; not before all others have decided on it too
        if (lane == 0) this->taken[last] = 1;
        top = messages.best();
        if (top == 0) return {};
        edge = edge_of(top);
      }
      agreed = messages.agree(top, edge);
      if (!agreed.doubt) break;
    }
    if (agreed.owner == kGreedyNone) return {};
    const int row = static_cast<int>(at.listed ? agreed.name : this->order.row(agreed.name));
    return {row, at.by_draw ? step * in.m + static_cast<int>(agreed.place) : row, static_cast<int>(agreed.owner)};
  }

  SPECTRAL_KERNELS_DEVICE bool is_candidate(int own, int step) const {
    return !at.listed || at.by_draw || place_of(own, step) < static_cast<uint32_t>(in.m);
  }

  /// Of a candidate in the step's draws; of a row that is none it is in.m or more.
  SPECTRAL_KERNELS_DEVICE uint32_t place_of(int own, int step) const {
    return static_cast<uint32_t>(at.by_draw ? this->entry_of(own) - step * in.m
                                            : this->stamps[own] - this->stamp_of(step, 0));
  }

  /// The first row of this CTA, by place or else by key, whose score's key is not below `edge`.
  SPECTRAL_KERNELS_DEVICE GreedyOffer offer(int from, int to, int step, uint64_t best, uint64_t edge) const {
    uint32_t first = kGreedyNone, own = kGreedyNone;
    if (best != 0 && best >= edge) {
      SPECTRAL_KERNELS_UNROLL_BY(4)
      for (int i = from + lane; i < to; i += kWarp) {
        if (!is_candidate(i, step) || this->keys[i] < edge) continue;
        const uint32_t its = at.listed ? place_of(i, step) : static_cast<uint32_t>(this->order.of(this->entry_of(i)));
        if (its < first) first = its, own = static_cast<uint32_t>(i);
      }
      const uint32_t lowest = warp_min(first);
      own = warp_min(first == lowest ? own : kGreedyNone);
      first = lowest;
    }
    if (own == kGreedyNone) return {0, 0, 0, 0, false};
    const int row = at.by_draw ? this->rows[own] : this->entry_of(static_cast<int>(own));
    return {best, at.listed ? static_cast<uint32_t>(row) : first, at.listed ? first : 0u, this->overlaps[own],
            this->keys[own] == best};
  }

  /// The first of `start` that is valid and seen.
  SPECTRAL_KERNELS_DEVICE Pick first_of_start(const int64_t* start) const {
    for (int i = 0; i < in.starts; ++i) {
      const int64_t row = start[i];
      if (this->is_valid(row) && ballot(lane == 0 && kind_of(row) == Kind::kSeen) != 0)
        return {static_cast<int>(row), -1, -1};
    }
    return {};
  }

  SPECTRAL_KERNELS_DEVICE Kind kind_of(int64_t row) const {
    const auto measured = this->template measure<1>(this->pool + row * in.d, 0);
    return !measured.fits ? Kind::kNotFinite : measured.seen(in.normalize) ? Kind::kSeen : Kind::kUnseen;
  }

  /// The seen row left of the lowest key, else the row left of the lowest, else -1. Every CTA looks for itself, from
  /// where it found the last one.
  SPECTRAL_KERNELS_DEVICE int first_left() {
    warp_barrier();
    const int row = first_left_from(seen_from, true);
    return row >= 0 ? row : first_left_from(unseen_from, false);
  }

  SPECTRAL_KERNELS_DEVICE int first_left_from(int64_t& first, bool seen) const {
    for (; first < this->order.size(); first += kWarp) {
      const int64_t row = this->order.row(first + lane);
      const Kind kind = this->is_valid(row) && this->taken[row] == 0 ? kind_of(row) : Kind::kNotFinite;
      const unsigned found = ballot(kind == Kind::kSeen || (!seen && kind == Kind::kUnseen));
      if (found == 0) continue;
      first += lowest_bit(found);
      return static_cast<int>(this->order.row(first));
    }
    return -1;
  }

  SPECTRAL_KERNELS_DEVICE void read_entry(const Pick& pick, double& square, double& overlap) const {
    // both are on their way together
    const Mail detail = messages.ask_detail(pick.owner);
    const T* const from = this->copies + static_cast<int64_t>(pick.entry) * at.stride;
    double sum = 0;
    for (int i = lane * Share::kWide; i < at.stride; i += kWarp * Share::kWide) {
      const Pack pack = *reinterpret_cast<const Pack*>(from + i);
      SPECTRAL_KERNELS_UNROLL
      for (int j = 0; j < Share::kWide; j += 2) {
        const Pair pair{{static_cast<double>(pack.x[j]), static_cast<double>(pack.x[j + 1])}};
        *reinterpret_cast<Pair*>(this->vector + this->slot(i + j)) = pair;
        if (!in.normalize) sum += pair.x[0] * pair.x[0] + pair.x[1] * pair.x[1];
      }
    }
    // whoever has a score was seen
    square = in.normalize ? 1 : warp_sum(sum);
    overlap = messages.detail(pick.owner, detail);
  }

  /// Of a row that no step has scored.
  SPECTRAL_KERNELS_DEVICE void read_row(int row, int step, double& square, double& overlap) const {
    const auto measured = measure_row(row);
    for (int i = lane; i < at.stride; i += kWarp)
      this->vector[this->slot(i)] = i < in.d ? element(row, i, measured) : 0;
    square = in.normalize ? (measured.any ? 1 : 0) : measured.square;
    for (int before = 0; measured.any && before < step; ++before) overlap += squared_product(picked()[before]);
  }

  SPECTRAL_KERNELS_DEVICE typename Share::Measure measure_row(int64_t row) const {
    return this->template measure<kWarp>(this->pool + row * in.d, lane);
  }

  SPECTRAL_KERNELS_DEVICE double element(int64_t row, int i, const typename Share::Measure& by) const {
    return static_cast<double>(this->normalised(this->pool[row * in.d + i], by));
  }

  /// Of a row of the pool with the one in `vector`, of which each lane reads what it wrote.
  SPECTRAL_KERNELS_DEVICE double squared_product(int64_t row) const {
    const auto measured = measure_row(row);
    double sum = 0;
    for (int i = lane; i < in.d; i += kWarp) sum += element(row, i, measured) * this->vector[this->slot(i)];
    sum = warp_sum(sum);
    return sum * sum;
  }

  GreedyMessages messages;
  // the pick before, and where to look for rows that are left
  int last = -1;
  int64_t seen_from = 0, unseen_from = 0;
};

}  // namespace spectral_kernels::device
