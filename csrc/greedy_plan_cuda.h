// How greedy selection spreads over the chip, and where things lie in memory: decided by the host, read by the kernel
// (greedy_cuda.h).
#pragma once

#include <algorithm>

#include "device.h"
#include "greedy_key.h"

namespace spectral_kernels::device {

// lanes that share a row's product; copies of every message, lest all CTAs read the same memory; most CTAs of a pool;
// rows that a CTA has before another one helps it
constexpr int kGreedyLanes = 8, kGreedyReplicas = 8, kGreedyMembers = 192, kGreedyRows = 32;
// a step's draws are numbered in 16 bits, all draws in 31
constexpr int kGreedyDraws = 1 << 16;

template <class T>
struct GreedyArguments {
  const T* pool;         // (b, n, d)
  const int64_t* start;  // (b, starts)
  const int64_t* draws;  // (b, k, m), or none: every row is a candidate
  const bool* valid;     // (b, n), or none
  const int64_t* seed;   // (b), of the keys of rows
  int64_t* indices;      // (b, k), as those that follow; -1 where no row was left
  T* ranks;
  T* objectives;
  int64_t* words;  // where rows that are not finite and masks of too few are noted (errors.py), or none
  int b, n, d, k, starts, m;
  bool logdet, normalize;
};

/// Parts of a memory: each begins at a multiple of 128 bytes.
struct GreedyParts {
  size_t bytes = 0;

  size_t add(size_t more) {
    const size_t at = bytes;
    bytes += (more + 127) / 128 * 128;
    return at;
  }
};

/// Offsets are in bytes.
struct GreedyPlan {
  int groups, members;   // pools that are selected from at a time, and CTAs of each
  bool by_draw, listed;  // entries are draws, not rows; a step's candidates are its draws, not all
  int64_t entries;       // of a pool; entry e belongs to CTA e % members
  int own, kept;         // most entries of a CTA, and how many rows (those of its last entries) its shared memory holds
  int stride, slices;    // length of a padded row; rows of the d x d matrix of a CTA
  // shared memory
  size_t vector, product, inverse, overlap, gained, square, key, row, stamp, values, shared;
  // global memory; what lies before `rows` must be zero
  size_t counters, mail, products, taken, rows, picked, scratch;

  /// For `sms` multiprocessors of `limit` bytes of shared memory each; none that fits leaves `members` 0.
  template <class T>
  static GreedyPlan make(const GreedyArguments<T>& in, int sms, size_t limit) {
    GreedyPlan plan{};
    const int64_t draws = in.draws == nullptr ? 0 : static_cast<int64_t>(in.k) * in.m;
    plan.listed = in.draws != nullptr;
    // draws die with their step: half of them matter on average
    plan.by_draw = plan.listed && draws / 2 < in.n;
    plan.entries = plan.by_draw ? draws : in.n;
    const auto shares = [](int64_t all, int64_t each) { return (all + each - 1) / each; };
    const int64_t wanted =
        std::max(shares(plan.entries, kGreedyRows), in.logdet ? shares(in.d, kGreedyRows / 2) : int64_t{1});
    plan.groups = std::min(in.b, sms);
    plan.members = static_cast<int>(std::min<int64_t>(std::min(sms / plan.groups, kGreedyMembers), wanted));
    plan.own = static_cast<int>(shares(plan.entries, plan.members));
    plan.stride = (in.d + 3) / 4 * 4;
    plan.slices = in.logdet ? static_cast<int>(shares(in.d, plan.members)) : 0;
    const size_t doubles = sizeof(double) * static_cast<size_t>(plan.stride), own = static_cast<size_t>(plan.own);
    GreedyParts shared{128};
    plan.vector = shared.add(doubles);
    plan.product = shared.add(in.logdet ? doubles : 0);
    plan.inverse = shared.add(doubles * static_cast<size_t>(plan.slices));
    plan.overlap = shared.add(sizeof(double) * own);
    plan.gained = shared.add(in.logdet ? sizeof(double) * own : 0);
    plan.square = shared.add(in.normalize ? 0 : sizeof(double) * own);
    plan.key = shared.add(sizeof(uint64_t) * own);
    plan.row = shared.add(plan.by_draw ? sizeof(int) * own : 0);
    plan.stamp = shared.add(plan.listed && !plan.by_draw ? sizeof(int) * own : 0);
    plan.values = shared.bytes;
    if (shared.bytes > limit || in.m >= kGreedyDraws || draws > INT32_MAX - kGreedyDraws) {
      plan.members = 0;
      return plan;
    }
    const size_t row_bytes = sizeof(T) * static_cast<size_t>(plan.stride);
    plan.kept = static_cast<int>(std::min((limit - shared.bytes) / row_bytes, own));
    plan.shared = shared.bytes + row_bytes * static_cast<size_t>(plan.kept);

    const size_t groups = static_cast<size_t>(plan.groups), members = static_cast<size_t>(plan.members),
                 k = static_cast<size_t>(in.k);
    GreedyParts global;
    plan.counters = global.add(128 * groups);
    plan.mail = global.add(groups * 2 * (kGreedyReplicas + 1) * members * sizeof(Mail));
    plan.products = global.add(in.logdet ? groups * 2 * kGreedyReplicas * static_cast<size_t>(in.d) * sizeof(Mail) : 0);
    plan.taken = global.add(static_cast<size_t>(in.b) * static_cast<size_t>(in.n));
    plan.rows = global.add(groups * static_cast<size_t>(plan.entries) * row_bytes);
    plan.picked = global.add(groups * k * sizeof(int));
    plan.scratch = global.bytes;
    return plan;
  }
};

}  // namespace spectral_kernels::device
