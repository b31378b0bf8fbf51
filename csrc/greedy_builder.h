// The steps of greedy selection on the CPU: which row each picks. The rules are those of
// spectral_kernels/ops/greedy/reference.py.
//
// With all rows as candidates the scores are brought up to date once per kGreedyBlock picks, and in between only the
// rows whose stale score is below the best are: the picks are those of the plain method, most of the products run as
// one matrix product. Dot products are taken in the pool's accumulation type; where two scores are closer than its
// rounding they are redone in float64, so that the picks are those of float64 scores. docs/ops/greedy.md has more.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "common.h"
#include "greedy_kernels.h"
#include "greedy_key.h"
#include "greedy_scores.h"
#include "greedy_slots.h"
#include "greedy_state.h"
#include "team.h"

namespace spectral_kernels {

// features from which on sorting the draws costs less than bringing all of them up to date
constexpr int64_t kSortedFrom = 64;

// A slot that a step may bring up to date, and what it costs at least.
struct Waiting {
  int64_t slot;
  double bound = 0;

  bool operator<(const Waiting& other) const { return bound < other.bound; }
};

// One selection, a step at a time.
template <typename T>
class Builder {
 public:
  Builder(const Source& source, const Options& options, const int64_t* start, int64_t starts, const int64_t* draws,
          int64_t m, int64_t seed, int64_t* indices)
      : source_(source),
        options_(options),
        start_(start),
        starts_(starts),
        keys_(source.n, seed),
        picked_(options, source.d, indices),
        team_(5 * options.k + 4),
        slots_(source, options, draws, m, team_),
        scores_(slots_, picked_, team_) {}

  const Picked<T>& picked() const { return picked_; }

  // Whether the picks are sure: where rounding leaves too many rows as good as the best, or products overflow or
  // vanish, T is too narrow.
  bool run() {
    team_.run([this] {
      slots_.prepare();
      scores_.prepare();
      if (scores_.lazy()) within_.resize(slots_.count);
      if (!options_.all_rows) {
        drawn_at_.assign(slots_.count, -1);
        spare_.resize(1, source_.d);
      }
      while (going_on() && picked_.steps < options_.k) step();
      if (going_on()) picked_.finish(team_);
    });
    return sure();
  }

  // The first row that holds NaN or Inf, or -1.
  int64_t bad_row() const { return slots_.bad_row; }
  // A row too long for the log-determinant, or -1.
  int64_t long_row() const { return slots_.long_row; }

 private:
  bool going_on() const { return slots_.bad_row < 0 && slots_.long_row < 0 && sure(); }
  bool sure() const {
    // a quarter of the products that the plain method would take
    const int64_t products = (options_.all_rows ? source_.n : slots_.m * options_.k / 2) * options_.k;
    return !slots_.out_of_range && scores_.redone() <= products / 4;
  }

  // ---- steps ----

  void step() {
    if (picked_.steps == 0) {
      for (int64_t i = 0; i < starts_ && going_on(); ++i) {
        if (take_row(start_[i], true)) return;
      }
      return take_left();
    }
    limit_ = kInfinity;
    std::swap(looked_, before_);
    looked_.clear();
    const Candidate best = scores_.lazy() ? best_lazily() : options_.all_rows ? best_of_all() : best_of_draws();
    if (best.slot < 0) return take_left();
    take_slot(best.slot, best.row, best.score);
  }

  // The seen row left of the lowest key, else the row left of the lowest.
  void take_left() {
    if (!take_next(next_seen_, true)) take_next(next_unseen_, false);
  }

  bool take_next(int64_t& key, bool seen) {
    constexpr int64_t together = 16;
    for (int64_t count; going_on() && key < keys_.size(); key += count) {
      count = std::min(together, keys_.size() - key);
      int64_t rows[together];
      for (int64_t i = 0; i < count; ++i) {
        rows[i] = keys_.row(key + i);
        if (rows[i] < source_.n && !options_.all_rows) source_.prefetch(rows[i]);
      }
      for (int64_t i = 0; i < count && going_on(); ++i) {
        if (rows[i] >= source_.n || !take_row(rows[i], seen)) continue;
        key += i + 1;
        return true;
      }
    }
    return false;
  }

  bool is_taken(int64_t row) const {
    return std::find(picked_.indices, picked_.indices + picked_.steps, row) != picked_.indices + picked_.steps;
  }

  // Takes a row of the pool whether it has a slot or not, unless it is taken, masked out, or (`seen`) zero.
  bool take_row(int64_t row, bool seen) {
    if (!source_.allows(row) || is_taken(row)) return false;
    const int64_t slot = slots_.slot_of(row);
    if (slot >= 0) {
      if (seen && !slots_.rows.seen[slot]) return false;
      take_slot(slot, row, scores_.current_score(slot));
      return true;
    }
    if (!spare_.read(source_, row, 0, options_.normalize) && checks_enabled()) {
      slots_.bad_row = row;
      return false;
    }
    if (seen && !spare_.seen[0]) return false;
    slots_.check_range(spare_, 0, row);
    if (!going_on()) return false;
    commit(row, spare_.row(0), spare_.squares[0], scores_.exact_score(spare_.row(0)));
    return true;
  }

  void take_slot(int64_t slot, int64_t row, double score) {
    slots_.absent[slot] = kInfinity;
    if (scores_.lazy()) {
      scores_.set_bound(slot, kInfinity);
      scores_.refresh_chunk(slot / kGreedyChunk);
    }
    commit(row, slots_.rows.row(slot), slots_.rows.squares[slot], score);
  }

  void commit(int64_t row, const T* x, double square, double score) {
    picked_.add(row, x, square, score);
    if (!picked_.resolved && checks_enabled()) slots_.long_row = row;
    scores_.update();
  }

  // ---- choosing ----

  Candidate best_of_all() {
    for (int64_t slot = 0; slot < slots_.count; ++slot) {
      if (slots_.left(slot)) looked_.push_back({slot, scores_.last_score(slot)});
    }
    judge(0);
    return resolve();
  }

  Candidate best_of_draws() {
    const int64_t* slots = slots_.drawn_by(picked_.steps);
    waiting_.clear();
    for (int64_t c = 0; c < slots_.m; ++c) {
      if (!slots_.left(slots[c]) || drawn_at_[slots[c]] >= picked_.steps * slots_.m) continue;
      drawn_at_[slots[c]] = picked_.steps * slots_.m + c;
      waiting_.push_back({slots[c]});
    }
    const int64_t count = waiting_.size();
    const bool ordered = options_.normalize || options_.logdet;
    if (!ordered || !scores_.stale() || count <= kGreedyRows || slots_.rows.d < kSortedFrom) {
      look(count);
      return resolve();
    }
    // draws whose stale scores keep them above the best are not brought up to date
    for (Waiting& draw : waiting_)
      draw.bound = scores_.cost(draw.slot, scores_.last_score(draw.slot)) -
                   scores_.error(draw.slot, scores_.last_score(draw.slot));
    std::nth_element(waiting_.begin(), waiting_.begin() + kGreedyRows, waiting_.end());
    look(kGreedyRows);
    int64_t kept = 0;
    for (int64_t i = kGreedyRows; i < count; ++i) {
      if (waiting_[i].bound > limit_) continue;
      waiting_[kept++] = waiting_[i];
      if (kept < kGreedyRows) continue;
      look(kept);
      kept = 0;
    }
    look(kept);
    return resolve();
  }

  // Brings up to date the rows whose stale cost could still be the best.
  Candidate best_lazily() {
    const int64_t lowest = scores_.lowest_bound();
    if (lowest < 0) return {-1, -1, 0};
    // first the row of the lowest bound, and the best that the last step left: a low limit spares many others
    waiting_.assign(1, {lowest, -kInfinity});
    for (const Looked& last : before_) {
      if (slots_.left(last.slot) && last.slot != lowest) waiting_.push_back({last.slot, scores_.bound(last.slot)});
    }
    const int64_t group = std::min<int64_t>(kGreedyRows, waiting_.size());
    std::nth_element(waiting_.begin(), waiting_.begin() + group - 1, waiting_.end());
    look(group);
    for (const Looked& looked : looked_) scores_.set_bound(looked.slot, kInfinity);
    // a limit that overflows must not let slots in that have no row
    const double limit = std::min(limit_, std::numeric_limits<double>::max());
    const int64_t count = scores_.within(limit, within_.data());
    waiting_.resize(std::max(count, group));
    for (int64_t i = 0; i < count; ++i) waiting_[i].slot = within_[i];
    look(count);
    for (const Looked& looked : looked_) scores_.set_bound(looked.slot, looked.cost - looked.error);
    for (const Looked& looked : looked_) scores_.refresh_chunk(looked.slot / kGreedyChunk);
    const Candidate best = resolve();
    if (!scores_.eager()) stop_waiting_where_it_costs();
    return best;
  }

  // Rows that are much alike are all looked at in every step. Then it costs less to bring them all up to date.
  void stop_waiting_where_it_costs() {
    looked_at_ += looked_.size();
    if (looked_at_ < slots_.count * (picked_.steps + kGreedyBlock) / 8) return;
    scores_.keep_up();
  }

  // Brings the first `count` slots that wait up to date.
  void look(int64_t count) {
    const int64_t before = looked_.size();
    for (int64_t i = 0; i < count; ++i) looked_.push_back({waiting_[i].slot});
    // groups of rows that lie far apart: each waits for memory some 0.5 us
    const int64_t groups = (count + kGreedyRows - 1) / kGreedyRows;
    team_.for_each(groups, 3, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kGreedyRows, last = std::min(end * kGreedyRows, count);
      scores_.score_rows(looked_.data() + before + first, last - first);
    });
    judge(before);
  }

  // Costs of the slots looked at from the given one on, and what another may cost at most to tie with the best.
  void judge(int64_t from) {
    for (size_t i = from; i < looked_.size(); ++i) {
      Looked& looked = looked_[i];
      looked.cost = scores_.cost(looked.slot, looked.score);
      looked.error = scores_.error(looked.slot, looked.score);
      if (!std::isfinite(looked.cost - looked.error)) {
        slots_.out_of_range = true;
        looked.cost = kInfinity;
        looked.error = 0;
      }
      limit_ = std::min(limit_, scores_.highest(looked.cost, looked.error));
    }
  }

  // Of the rows that tie with the best, the least goes first.
  int64_t order_of(int64_t slot) const { return options_.all_rows ? keys_.of(slot) : drawn_at_[slot]; }

  // The first row among looked_ that ties with the best; scores that rounding cannot tell apart are redone exactly.
  Candidate resolve() {
    near_.clear();
    for (const Looked& looked : looked_) {
      if (looked.cost - looked.error <= limit_)
        near_.push_back({slots_.row_of(looked.slot), looked.slot, looked.score});
    }
    if (near_.empty()) return {-1, -1, 0};
    if (near_.size() == 1) return near_[0];
    if constexpr (!std::is_same_v<T, double>) scores_.redo(near_);
    double limit = kInfinity;
    for (const Candidate& near : near_)
      limit = std::min(limit, scores_.highest(scores_.cost(near.slot, near.score), 0));
    const Candidate* best = nullptr;
    int64_t first = std::numeric_limits<int64_t>::max();
    for (const Candidate& near : near_) {
      if (scores_.cost(near.slot, near.score) > limit) continue;
      const int64_t order = order_of(near.slot);
      if (order < first) best = &near;
      first = std::min(first, order);
    }
    return *best;
  }

  const Source& source_;
  const Options& options_;
  const int64_t* start_;
  const int64_t starts_;
  const RowKeys keys_;
  Picked<T> picked_;
  Team team_;
  Slots<T> slots_;
  Scores<T> scores_;
  Rows<T> spare_;  // one, of a row without a slot

  int64_t next_seen_ = 0, next_unseen_ = 0;
  int64_t looked_at_ = 0;
  std::vector<int64_t> drawn_at_;  // a slot's first draw in the last step that drew it
  std::vector<int64_t> within_;
  std::vector<Waiting> waiting_;
  // of this step and the last
  std::vector<Looked> looked_, before_;
  double limit_ = kInfinity;  // the most that can tie with its best
  std::vector<Candidate> near_;
};

}  // namespace spectral_kernels
