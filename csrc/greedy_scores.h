// The scores of greedy selection on the CPU: what the picks so far make of each slot, and bounds on what they cost.
//
// Scores are sums over the picks of (x_j . w_i)^2 with w_i = x_i (effective rank), or w_i = A x_i / sqrt(1 + q_i)
// (log-determinant, which maximises q_j = |x_j|^2 / ridge - score). They only grow, so that a stale score is a bound.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "greedy_kernels.h"
#include "greedy_slots.h"
#include "greedy_state.h"
#include "team.h"

namespace spectral_kernels {

struct Candidate {
  int64_t row, slot;
  double score;
};

// A slot that a step brought up to date.
struct Looked {
  int64_t slot;
  double score = 0, cost = 0, error = 0;
};

template <typename T>
class Scores {
 public:
  Scores(const Slots<T>& slots, const Picked<T>& picked, Team& team)
      : slots_(slots),
        options_(slots.options),
        rows_(slots.rows),
        kernels_(greedy_kernels<T>()),
        picked_(picked),
        preference_(picked),
        lazy_(options_.all_rows && (options_.normalize || options_.logdet)),
        team_(team) {}

  void prepare() {
    for (std::vector<double>* values : {&score_, &exact_score_, &exact_weight_}) values->assign(slots_.room(), 0.0);
    exact_picks_.assign(slots_.count, 0);
    if (!options_.all_rows) upto_.resize(slots_.count);
    if (!lazy_) return;
    lowest_.resize(slots_.chunks());
    bound_.resize(slots_.room());
    refresh_bounds(0, slots_.chunks());
  }

  // Whether stale scores are bounds.
  bool lazy() const { return lazy_; }
  // Whether all scores are brought up to date after every pick.
  bool eager() const { return eager_; }
  // Products that were redone in float64.
  int64_t redone() const { return redone_; }

  // ---- what a slot costs ----

  double cost(int64_t slot, double score) const { return preference_.cost(score, rows_.squares[slot]); }
  double error(int64_t slot, double score) const {
    return preference_.error(score, rows_.squares[slot], exact_score_[slot], exact_weight_[slot]);
  }
  static double highest(double cost, double error) {
    return cost + error + Preference<T>::tie(std::fabs(cost) + error);
  }

  // ---- single slots ----

  // Up to the last full block, or to the last pick where rows are updated each step.
  double last_score(int64_t slot) const { return score_[slot]; }

  // Whether score_ lacks the picks of the block that is being filled.
  bool stale() const { return !(options_.all_rows && eager_) && picked_.in_block() != 0; }

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

  double current_score(int64_t slot) {
    // a slot that is drawn no more is not kept up to date
    if (!options_.all_rows) return exact_score(rows_.row(slot));
    Looked looked{slot};
    score_rows(&looked, 1);
    return looked.score;
  }

  double exact_score(const T* x) { return picked_.exact_score(x, 0, 0, work_); }

  // Scores of `near` in float64, each from the pick on that it was last exact for. What rounding had added is taken out
  // of the slot's score, so that only later picks add more.
  void redo(std::vector<Candidate>& near) {
    int64_t products = 0;
    for (const Candidate& candidate : near) products += picked_.steps - exact_picks_[candidate.slot];
    redone_ += products;
    const int64_t count = near.size();
    // in float64, from memory
    team_.for_each(count, chunk_of(16 * rows_.d * (products / count + 1)), [&](int64_t begin, int64_t end) {
      std::vector<double> work;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t slot = near[i].slot;
        exact_score_[slot] = picked_.exact_score(rows_.row(slot), exact_picks_[slot], exact_score_[slot], work);
        exact_weight_[slot] = picked_.weights[picked_.steps];
        exact_picks_[slot] = picked_.steps;
        score_[slot] += exact_score_[slot] - near[i].score;
        near[i].score = exact_score_[slot];
      }
    });
    if (!lazy_) return;
    for (const Candidate& candidate : near) {
      bound_[candidate.slot] = cost(candidate.slot, candidate.score);
      refresh_chunk(candidate.slot / kGreedyChunk);
    }
  }

  // ---- after a pick ----

  void update() {
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

  // From now on no score is stale.
  void keep_up() {
    if (picked_.in_block() != 0) update_by_block(picked_.full_blocks());
    eager_ = true;
  }

  // ---- bounds ----

  // The slot of the lowest, -1 where none is left.
  int64_t lowest_bound() const { return kernels_.lowest(bound_.data(), lowest_.data(), slots_.chunks()); }
  // Writes the slots whose bound is at most `limit`; returns how many they are.
  int64_t within(double limit, int64_t* slots) const {
    return kernels_.within(bound_.data(), lowest_.data(), slots_.chunks(), limit, slots);
  }

  double bound(int64_t slot) const { return bound_[slot]; }
  // To be followed by refresh_chunk.
  void set_bound(int64_t slot, double value) { bound_[slot] = value; }

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

 private:
  void refresh_bounds(int64_t begin, int64_t end) {
    const GreedyBounds of{options_.logdet ? 1 / kRidge : 0,
                          picked_.weights[picked_.steps],
                          preference_.share,
                          score_.data(),
                          rows_.squares.data(),
                          exact_score_.data(),
                          exact_weight_.data(),
                          slots_.absent.data()};
    kernels_.bounds(of, begin, end, bound_.data(), lowest_.data());
  }

  // body(begin, end) over all slots in whole chunks, and then their bounds; `work` is a slot's.
  template <typename Body>
  void for_each_chunk(int64_t work, const Body& body) {
    team_.for_each(slots_.chunks(), chunk_of(work * kGreedyChunk), [&](int64_t first, int64_t last) {
      body(first * kGreedyChunk, std::min(last * kGreedyChunk, slots_.count));
      if (lazy_) refresh_bounds(first, last);
    });
  }

  void update_by_newest() {
    const T* const w = picked_.newest.data();
    // a product that waits for memory
    for_each_chunk(rows_.d * 8, [&](int64_t begin, int64_t end) {
      kernels_.single(rows_.row(begin), end - begin, w, rows_.d, score_.data() + begin);
    });
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

  // The rows that the next block of steps looks at, each from the picks that it was last brought up to: a row is
  // fetched for the blocks that draw it, not for every block.
  void update_drawn() {
    const int64_t now = picked_.full_blocks();
    const int64_t* const begin = slots_.drawn_by(picked_.steps);
    const int64_t* const end = slots_.drawn_by(std::min(picked_.steps + kGreedyBlock, options_.k));
    behind_.resize(now);
    groups_.clear();
    for (std::vector<int64_t>& slots : behind_) slots.clear();
    for (const int64_t* drawn = begin; drawn < end; ++drawn) {
      const int64_t slot = *drawn;
      if (upto_[slot] == now || !slots_.left(slot)) continue;
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

  const Slots<T>& slots_;
  const Options& options_;
  const Rows<T>& rows_;
  const GreedyKernels<T>& kernels_;
  const Picked<T>& picked_;
  Preference<T> preference_;
  const bool lazy_;
  bool eager_ = true;
  Team& team_;

  int64_t redone_ = 0;
  std::vector<double> score_;
  std::vector<double> bound_, lowest_;  // stale costs, and the lowest of each chunk
  // the scores in float64 when they were last redone_, and the picks and their weight then
  std::vector<double> exact_score_, exact_weight_;
  std::vector<int64_t> exact_picks_;
  std::vector<double> work_;

  // of candidates that are drawn
  std::vector<int64_t> upto_;                        // full blocks of picks in score_
  std::vector<std::vector<int64_t>> behind_;         // slots to be brought up to date, by upto_
  std::vector<std::pair<int64_t, int64_t>> groups_;  // upto_, first slot of behind_[upto_]
};

}  // namespace spectral_kernels
