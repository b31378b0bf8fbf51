// The steps of greedy selection on the CPU. The rules are those of spectral_kernels/ops/greedy/reference.py.
//
// Scores are sums over the picks of (x_j . w_i)^2 with w_i = x_i (effective rank), or w_i = A x_i / sqrt(1 + q_i)
// (log-determinant, which maximises q_j = |x_j|^2 / ridge - score). They only grow. So with all rows as candidates the
// scores are brought up to date once per kGreedyBlock picks, and in between only the rows whose stale score is below
// the best are: the picks are those of the plain method, most of the products run as one matrix product. Dot products
// are taken in the pool's accumulation type; where two scores are closer than its rounding they are redone in float64,
// so that the picks are those of float64 scores. docs/ops/greedy.md tells the rest.
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
#include "greedy_state.h"
#include "team.h"

namespace spectral_kernels {

// features from which on sorting the draws costs less than bringing all of them up to date
constexpr int64_t kSortedFrom = 64;
// multiply-adds in a chunk that threads share out: some 5 us
constexpr int64_t kChunkWork = 250'000;

struct Candidate {
  int64_t row, slot;
  double score;
};

// A slot that a step brought up to date.
struct Looked {
  int64_t slot;
  double score = 0, cost = 0, error = 0;
};

// A slot that it may bring up to date, and what it costs at least.
struct Waiting {
  int64_t slot;
  double bound = 0;

  bool operator<(const Waiting& other) const { return bound < other.bound; }
};

// The slots of one selection: rows, their scores, and which are left.
template <typename T>
class Builder {
 public:
  Builder(const Source& source, const Options& options, const int64_t* start, int64_t starts, const int64_t* draws,
          int64_t m, int64_t seed, int64_t* indices)
      : source_(source),
        options_(options),
        start_(start),
        starts_(starts),
        draws_(draws),
        m_(m),
        keys_(source.n, seed),
        kernels_(greedy_kernels<T>()),
        picked_(options, source.d, indices),
        preference_(picked_),
        lazy_(options.all_rows && (options.normalize || options.logdet)),
        team_(5 * options.k + 4) {}

  const Picked<T>& picked() const { return picked_; }

  // Whether the picks are sure: where rounding leaves too many rows as good as the best, or products overflow or
  // vanish, T is too narrow.
  bool run() {
    team_.run([this] {
      if (options_.all_rows) {
        prepare_all();
      } else {
        prepare_drawn();
      }
      while (going_on() && picked_.steps < options_.k) step();
      if (going_on()) picked_.finish(team_);
    });
    return sure();
  }

  // The first row that holds NaN or Inf, or -1.
  int64_t bad_row() const { return bad_row_; }
  // A row too long for the log-determinant, or -1.
  int64_t long_row() const { return long_row_; }

 private:
  bool going_on() const { return bad_row_ < 0 && long_row_ < 0 && sure(); }
  bool sure() const {
    // a quarter of the products that the plain method would take
    const int64_t products = (options_.all_rows ? source_.n : m_ * options_.k / 2) * options_.k;
    return !out_of_range_ && redone_ <= products / 4;
  }

  // Looks whether T holds products with a row, and their squares are in float64's range.
  void check_range(const Rows<T>& rows, int64_t slot, int64_t row) {
    if (options_.normalize || source_.scaled || !rows.seen[slot] || !source_.allows(row)) return;
    const bool wide = std::is_same_v<T, double>;
    // the log-determinant is of the rows at their own scale
    if (options_.logdet && rows.squares[slot] > kLongestSquare && long_row_ < 0 && checks_enabled()) long_row_ = row;
    // float rows are in float64's range
    if (wide && (options_.logdet || source_.type != RowType::kDouble)) return;
    const double most = wide ? 0x1p240 : 1e30;
    out_of_range_ |= !(rows.squares[slot] > 1 / most && rows.squares[slot] < most);
  }

  static int64_t chunk_of(int64_t work) { return std::max<int64_t>(1, kChunkWork / work); }

  // ---- rows ----

  void prepare_all() {
    slots_ = source_.n;
    allocate();
    read_rows([](int64_t slot) { return slot; });
    for (int64_t i = 0; i < slots_; ++i) absent_[i] = rows_.seen[i] && source_.allows(i) ? 0 : kInfinity;
    if (!lazy_) return;
    lowest_.resize(chunks());
    bound_.resize(chunks() * kGreedyChunk);
    within_.resize(slots_);
    refresh_bounds(0, chunks());
  }

  // Rows get slots in the order of their first draw.
  void prepare_drawn() {
    const int64_t k = options_.k;
    int bits = 4;
    while ((int64_t{1} << bits) < 2 * k * m_) ++bits;
    shift_ = 64 - bits;
    // a small pool has an entry a row
    const bool small = source_.n <= int64_t{1} << bits;
    if (small) {
      slot_of_row_.assign(source_.n, -1);
    } else {
      table_.assign(int64_t{1} << bits, {});
    }
    slot_of_draw_.resize(k * m_);
    row_of_slot_.reserve(std::min(source_.n, k * m_));
    for (int64_t i = m_; i < k * m_; ++i) {
      Entry* const entry = small ? nullptr : &entry_of(draws_[i]);
      int32_t& slot = small ? slot_of_row_[draws_[i]] : entry->slot;
      if (slot < 0) {
        if (entry != nullptr) entry->row = draws_[i];
        slot = static_cast<int32_t>(row_of_slot_.size());
        row_of_slot_.push_back(draws_[i]);
      }
      slot_of_draw_[i] = slot;
    }
    slots_ = row_of_slot_.size();
    allocate();
    upto_.resize(slots_);
    drawn_at_.assign(slots_, -1);
    read_rows([this](int64_t slot) { return row_of_slot_[slot]; });
    for (int64_t i = 0; i < slots_; ++i) {
      absent_[i] = rows_.seen[i] && source_.allows(row_of_slot_[i]) ? 0 : kInfinity;
    }
    spare_.resize(1, source_.d);
  }

  void allocate() {
    rows_.resize(slots_, source_.d);
    // whole chunks, of which the last may have slots without a row
    const int64_t room = chunks() * kGreedyChunk;
    for (std::vector<double>* values : {&score_, &exact_score_, &exact_weight_}) values->assign(room, 0.0);
    rows_.squares.resize(room);
    absent_.assign(room, kInfinity);
    exact_picks_.assign(slots_, 0);
  }

  int64_t chunks() const { return (slots_ + kGreedyChunk - 1) / kGreedyChunk; }
  bool left(int64_t slot) const { return absent_[slot] == 0; }

  template <typename RowOf>
  void read_rows(RowOf row_of) {
    BadRow bad;
    // reading a row costs as much as some products with it
    team_.for_each(slots_, chunk_of(8 * source_.d), [&](int64_t begin, int64_t end) {
      constexpr int64_t ahead = 8;
      for (int64_t slot = begin; slot < end; ++slot) {
        const int64_t row = row_of(slot);
        if (slot + ahead < end) source_.prefetch(row_of(slot + ahead));
        if (!rows_.read(source_, row, slot, options_.normalize)) bad.report(row);
      }
    });
    if (checks_enabled()) bad_row_ = bad.row();
    for (int64_t slot = 0; slot < slots_; ++slot) check_range(rows_, slot, row_of(slot));
  }

  struct Entry {
    int64_t row = -1;
    int32_t slot = -1;
  };

  // Where the table has a row, or would have it.
  Entry& entry_of(int64_t row) {
    const int64_t mask = static_cast<int64_t>(table_.size()) - 1;
    int64_t at = static_cast<int64_t>(static_cast<uint64_t>(row) * 0x9e3779b97f4a7c15u >> shift_);
    while (table_[at].row >= 0 && table_[at].row != row) at = (at + 1) & mask;
    return table_[at];
  }

  // The slot of a row, -1 where it is never drawn.
  int64_t slot_of(int64_t row) { return slot_of_row_.empty() ? entry_of(row).slot : slot_of_row_[row]; }

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
    const Candidate best = lazy_ ? best_lazily() : options_.all_rows ? best_of_all() : best_of_draws();
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
    const int64_t slot = options_.all_rows ? row : slot_of(row);
    if (slot >= 0) {
      if (seen && !rows_.seen[slot]) return false;
      take_slot(slot, row, current_score(slot));
      return true;
    }
    if (!spare_.read(source_, row, 0, options_.normalize) && checks_enabled()) {
      bad_row_ = row;
      return false;
    }
    if (seen && !spare_.seen[0]) return false;
    check_range(spare_, 0, row);
    if (!going_on()) return false;
    commit(row, spare_.row(0), spare_.squares[0], picked_.exact_score(spare_.row(0), 0, 0, work_));
    return true;
  }

  void take_slot(int64_t slot, int64_t row, double score) {
    absent_[slot] = kInfinity;
    if (lazy_) {
      bound_[slot] = kInfinity;
      refresh_chunk(slot / kGreedyChunk);
    }
    commit(row, rows_.row(slot), rows_.squares[slot], score);
  }

  void commit(int64_t row, const T* x, double square, double score) {
    picked_.add(row, x, square, score);
    if (!picked_.resolved && checks_enabled()) long_row_ = row;
    if (options_.all_rows && eager_) {
      update_by_newest();
    } else if (picked_.in_block() == 0) {
      if (options_.all_rows) {
        update_by_block(picked_.full_blocks() - 1);
      } else {
        update_drawn();
      }
    }
    // before that, stale scores are all 0 and hold nothing back
    if (lazy_ && picked_.steps == kGreedyBlock) eager_ = false;
  }

  // ---- scores ----

  void score_rows(Looked* looked, int64_t count) const {
    const T* pointers[kGreedyRows];
    double sums[kGreedyRows];
    for (int64_t first = 0; first < count; first += kGreedyRows) {
      for (int64_t i = 0; i < kGreedyRows; ++i) {
        const int64_t slot = looked[std::min(first + i, count - 1)].slot;
        pointers[i] = rows_.row(slot);
        sums[i] = score_[slot];
      }
      if (stale()) kernels_.block(pointers, picked_.block(picked_.full_blocks()), 1, rows_.d, sums);
      for (int64_t i = 0; i < std::min(kGreedyRows, count - first); ++i) looked[first + i].score = sums[i];
    }
  }

  // Whether score_ lacks the picks of the block that is being filled.
  bool stale() const { return !(options_.all_rows && eager_) && picked_.in_block() != 0; }

  double current_score(int64_t slot) {
    // a slot that is drawn no more is not kept up to date
    if (!options_.all_rows) return picked_.exact_score(rows_.row(slot), 0, 0, work_);
    Looked looked{slot};
    score_rows(&looked, 1);
    return looked.score;
  }

  void update_by_block(int64_t block) {
    for_each_chunk(rows_.d * kGreedyBlock, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin; first < end; first += kGreedyRows) {
        int64_t slots[kGreedyRows];
        const int64_t count = std::min(kGreedyRows, end - first);
        for (int64_t i = 0; i < count; ++i) slots[i] = first + i;
        add_blocks(slots, count, block, block + 1);
      }
    });
  }

  // body(begin, end) over all slots in whole chunks, and then their bounds; `work` is a slot's.
  template <typename Body>
  void for_each_chunk(int64_t work, const Body& body) {
    team_.for_each(chunks(), chunk_of(work * kGreedyChunk), [&](int64_t first, int64_t last) {
      body(first * kGreedyChunk, std::min(last * kGreedyChunk, slots_));
      if (lazy_) refresh_bounds(first, last);
    });
  }

  // The rows that the next block of steps looks at, each from the picks that it was last brought up to: a row is
  // fetched for the blocks that draw it, not for every block.
  void update_drawn() {
    const int64_t now = picked_.full_blocks();
    const int64_t begin = picked_.steps * m_, end = std::min(picked_.steps + kGreedyBlock, options_.k) * m_;
    behind_.resize(now);
    groups_.clear();
    for (std::vector<int64_t>& slots : behind_) slots.clear();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t slot = slot_of_draw_[i];
      if (upto_[slot] == now || !left(slot)) continue;
      behind_[upto_[slot]].push_back(slot);
      upto_[slot] = now;
    }
    for (int64_t from = 0; from < now; ++from) {
      for (int64_t i = 0; i < static_cast<int64_t>(behind_[from].size()); i += kGreedyRows)
        groups_.push_back({from, i});
    }
    team_.for_each(groups_.size(), chunk_of(rows_.d * kGreedyBlock * kGreedyRows * now), [&](int64_t a, int64_t b) {
      for (int64_t group = a; group < b; ++group) {
        const auto [from, first] = groups_[group];
        const std::vector<int64_t>& slots = behind_[from];
        add_blocks(slots.data() + first, std::min<int64_t>(kGreedyRows, slots.size() - first), from, now);
      }
    });
  }

  // Adds blocks [from, to) of the picks to the scores of at most kGreedyRows slots.
  void add_blocks(const int64_t* slots, int64_t count, int64_t from, int64_t to) {
    const T* pointers[kGreedyRows];
    double sums[kGreedyRows];
    for (int64_t i = 0; i < kGreedyRows; ++i) {
      const int64_t slot = slots[std::min(i, count - 1)];
      pointers[i] = rows_.row(slot);
      sums[i] = score_[slot];
    }
    kernels_.block(pointers, picked_.block(from), to - from, rows_.d, sums);
    for (int64_t i = 0; i < count; ++i) score_[slots[i]] = sums[i];
  }

  void update_by_newest() {
    const T* const w = picked_.newest.data();
    // a product that waits for memory
    for_each_chunk(rows_.d * 8, [&](int64_t begin, int64_t end) {
      kernels_.single(rows_.row(begin), end - begin, w, rows_.d, score_.data() + begin);
    });
  }

  // ---- choosing ----

  Candidate best_of_all() {
    for (int64_t slot = 0; slot < slots_; ++slot) {
      if (left(slot)) looked_.push_back({slot, score_[slot]});
    }
    judge(0);
    return resolve();
  }

  Candidate best_of_draws() {
    const int64_t* slots = slot_of_draw_.data() + picked_.steps * m_;
    waiting_.clear();
    for (int64_t c = 0; c < m_; ++c) {
      if (!left(slots[c]) || drawn_at_[slots[c]] >= picked_.steps * m_) continue;
      drawn_at_[slots[c]] = picked_.steps * m_ + c;
      waiting_.push_back({slots[c]});
    }
    const int64_t count = waiting_.size();
    const bool ordered = options_.normalize || options_.logdet;
    if (!ordered || !stale() || count <= kGreedyRows || rows_.d < kSortedFrom) {
      look(count);
      return resolve();
    }
    // draws whose stale scores keep them above the best are not brought up to date
    for (Waiting& draw : waiting_)
      draw.bound = cost(draw.slot, score_[draw.slot]) - error(draw.slot, score_[draw.slot]);
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
    const int64_t lowest = kernels_.lowest(bound_.data(), lowest_.data(), chunks());
    if (lowest < 0) return {-1, -1, 0};
    // first the row of the lowest bound, and the best that the last step left: a low limit spares many others
    waiting_.assign(1, {lowest, -kInfinity});
    for (const Looked& last : before_) {
      if (left(last.slot) && last.slot != lowest) waiting_.push_back({last.slot, bound_[last.slot]});
    }
    const int64_t group = std::min<int64_t>(kGreedyRows, waiting_.size());
    std::nth_element(waiting_.begin(), waiting_.begin() + group - 1, waiting_.end());
    look(group);
    for (const Looked& looked : looked_) bound_[looked.slot] = kInfinity;
    // a limit that overflows must not let slots in that have no row
    const double limit = std::min(limit_, std::numeric_limits<double>::max());
    const int64_t count = kernels_.within(bound_.data(), lowest_.data(), chunks(), limit, within_.data());
    waiting_.resize(std::max(count, group));
    for (int64_t i = 0; i < count; ++i) waiting_[i].slot = within_[i];
    look(count);
    for (const Looked& looked : looked_) bound_[looked.slot] = looked.cost - looked.error;
    for (const Looked& looked : looked_) refresh_chunk(looked.slot / kGreedyChunk);
    const Candidate best = resolve();
    if (!eager_) stop_waiting_where_it_costs();
    return best;
  }

  // Rows that are much alike are all looked at in every step. Then it costs less to bring them all up to date.
  void stop_waiting_where_it_costs() {
    looked_at_ += looked_.size();
    if (looked_at_ < slots_ * (picked_.steps + kGreedyBlock) / 8) return;
    if (picked_.in_block() != 0) update_by_block(picked_.full_blocks());
    eager_ = true;
  }

  // Brings the first `count` slots that wait up to date.
  void look(int64_t count) {
    const int64_t before = looked_.size();
    for (int64_t i = 0; i < count; ++i) looked_.push_back({waiting_[i].slot});
    // groups of rows that lie far apart: each waits for memory some 0.5 us
    const int64_t groups = (count + kGreedyRows - 1) / kGreedyRows;
    team_.for_each(groups, 3, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kGreedyRows, last = std::min(end * kGreedyRows, count);
      score_rows(looked_.data() + before + first, last - first);
    });
    judge(before);
  }

  // Costs of the slots looked at from the given one on, and what another may cost at most to tie with the best.
  void judge(int64_t from) {
    for (size_t i = from; i < looked_.size(); ++i) {
      Looked& looked = looked_[i];
      looked.cost = cost(looked.slot, looked.score);
      looked.error = error(looked.slot, looked.score);
      if (!std::isfinite(looked.cost - looked.error)) {
        out_of_range_ = true;
        looked.cost = kInfinity;
        looked.error = 0;
      }
      limit_ = std::min(limit_, highest(looked.cost, looked.error));
    }
  }

  double cost(int64_t slot, double score) const { return preference_.cost(score, rows_.squares[slot]); }
  double error(int64_t slot, double score) const {
    return preference_.error(score, rows_.squares[slot], exact_score_[slot], exact_weight_[slot]);
  }
  static double highest(double cost, double error) {
    return cost + error + Preference<T>::tie(std::fabs(cost) + error);
  }

  void refresh_bounds(int64_t begin, int64_t end) {
    const GreedyBounds of{options_.logdet ? 1 / kRidge : 0,
                          picked_.weights[picked_.steps],
                          preference_.share,
                          score_.data(),
                          rows_.squares.data(),
                          exact_score_.data(),
                          exact_weight_.data(),
                          absent_.data()};
    kernels_.bounds(of, begin, end, bound_.data(), lowest_.data());
  }

  void refresh_chunk(int64_t chunk) {
    // four minima: one would wait for each comparison
    static_assert(kGreedyChunk % 4 == 0);
    const double* const bounds = bound_.data() + chunk * kGreedyChunk;
    double least[4] = {bounds[0], bounds[1], bounds[2], bounds[3]};
    for (int64_t i = 4; i < kGreedyChunk; i += 4) {
      for (int64_t l = 0; l < 4; ++l) least[l] = std::min(least[l], bounds[i + l]);
    }
    lowest_[chunk] = std::min(std::min(least[0], least[1]), std::min(least[2], least[3]));
  }

  int64_t row_of(int64_t slot) const { return options_.all_rows ? slot : row_of_slot_[slot]; }

  // Of the rows that tie with the best, the least goes first.
  int64_t order_of(int64_t slot) const { return options_.all_rows ? keys_.of(slot) : drawn_at_[slot]; }

  // The first row among looked_ that ties with the best; scores that rounding cannot tell apart are redone exactly.
  Candidate resolve() {
    near_.clear();
    for (const Looked& looked : looked_) {
      if (looked.cost - looked.error <= limit_) near_.push_back({row_of(looked.slot), looked.slot, looked.score});
    }
    if (near_.empty()) return {-1, -1, 0};
    if (near_.size() == 1) return near_[0];
    if constexpr (!std::is_same_v<T, double>) redo();
    double limit = kInfinity;
    for (const Candidate& near : near_) limit = std::min(limit, highest(cost(near.slot, near.score), 0));
    const Candidate* best = nullptr;
    int64_t first = std::numeric_limits<int64_t>::max();
    for (const Candidate& near : near_) {
      if (cost(near.slot, near.score) > limit) continue;
      const int64_t order = order_of(near.slot);
      if (order < first) best = &near;
      first = std::min(first, order);
    }
    return *best;
  }

  // Scores of near_ in float64, each from the pick on that it was last exact for. What rounding had added is taken out
  // of the slot's score, so that only later picks add more.
  void redo() {
    int64_t products = 0;
    for (const Candidate& near : near_) products += picked_.steps - exact_picks_[near.slot];
    redone_ += products;
    const int64_t count = near_.size();
    // in float64, from memory
    team_.for_each(count, chunk_of(16 * rows_.d * (products / count + 1)), [&](int64_t begin, int64_t end) {
      std::vector<double> work;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t slot = near_[i].slot;
        exact_score_[slot] = picked_.exact_score(rows_.row(slot), exact_picks_[slot], exact_score_[slot], work);
        exact_weight_[slot] = picked_.weights[picked_.steps];
        exact_picks_[slot] = picked_.steps;
        score_[slot] += exact_score_[slot] - near_[i].score;
        near_[i].score = exact_score_[slot];
      }
    });
    if (!lazy_) return;
    for (const Candidate& near : near_) {
      bound_[near.slot] = cost(near.slot, near.score);
      refresh_chunk(near.slot / kGreedyChunk);
    }
  }

  const Source& source_;
  const Options& options_;
  const int64_t* start_;
  const int64_t starts_;
  const int64_t* draws_;
  const int64_t m_;
  const RowKeys keys_;
  const GreedyKernels<T>& kernels_;
  Picked<T> picked_;
  Preference<T> preference_;
  const bool lazy_;    // whether stale scores are bounds
  bool eager_ = true;  // whether all scores are brought up to date after every pick
  Team team_;

  int64_t slots_ = 0, bad_row_ = -1, long_row_ = -1, next_seen_ = 0, next_unseen_ = 0;
  int64_t looked_at_ = 0;
  int64_t redone_ = 0;  // products that were redone in float64
  bool out_of_range_ = false;
  Rows<T> rows_, spare_;
  std::vector<double> score_;   // up to the last full block, or to the last pick where rows are updated each step
  std::vector<double> absent_;  // infinity for slots that are not to be had, else 0
  // the scores in float64 when they were last redone, and the picks and their weight then
  std::vector<double> exact_score_, exact_weight_;
  std::vector<int64_t> exact_picks_;

  std::vector<int32_t> slot_of_row_;
  std::vector<Entry> table_;
  int shift_ = 0;
  std::vector<int64_t> row_of_slot_, slot_of_draw_;
  std::vector<int64_t> upto_;                        // full blocks of picks in score_
  std::vector<int64_t> drawn_at_;                    // a slot's first draw in the last step that drew it
  std::vector<std::vector<int64_t>> behind_;         // slots to be brought up to date, by upto_
  std::vector<std::pair<int64_t, int64_t>> groups_;  // upto_, first slot of behind_[upto_]

  std::vector<double> bound_, lowest_;  // stale costs, and the lowest of each chunk
  std::vector<int64_t> within_;
  std::vector<Waiting> waiting_;
  // of this step and the last
  std::vector<Looked> looked_, before_;
  double limit_ = kInfinity;  // the most that can tie with its best
  std::vector<Candidate> near_;
  std::vector<double> work_;
};

}  // namespace spectral_kernels
