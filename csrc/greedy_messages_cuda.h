// What the CTAs of greedy selection (greedy_cuda.h) tell one another in a round, and how all decide alike from it.
#pragma once

#include "greedy_plan_cuda.h"

namespace spectral_kernels::device {

constexpr uint32_t kGreedyNone = UINT32_MAX;
constexpr double kGreedyTie = 1e-6, kGreedyTieFloor = 1e-12;

/// Doubles as integers of the same order, none of them 0.
SPECTRAL_KERNELS_DEVICE uint64_t key_of(double score) {
  const uint64_t bits = __builtin_bit_cast(uint64_t, score);
  return bits ^ (bits >> 63 != 0 ? ~uint64_t{0} : uint64_t{1} << 63);
}

/// The lowest key that ties with a best one.
SPECTRAL_KERNELS_DEVICE uint64_t edge_of(uint64_t best) {
  const double score = __builtin_bit_cast(double, best ^ (best >> 63 != 0 ? uint64_t{1} << 63 : ~uint64_t{0}));
  return key_of(score - kGreedyTie * std::fabs(score) - kGreedyTieFloor);
}

SPECTRAL_KERNELS_DEVICE uint64_t largest_key(uint64_t key) {
  const uint32_t high = static_cast<uint32_t>(key >> 32), top = warp_max(high);
  return static_cast<uint64_t>(top) << 32 | warp_max(high == top ? static_cast<uint32_t>(key) : 0u);
}

/// What a CTA offers: its best key (0: nothing); of the rows that tie with it the first by place in the step's draws,
/// or where there are none by the key of the row (greedy_key.h), which is its name then; its overlap, and whether it is
/// a best row itself.
struct GreedyOffer {
  uint64_t key;
  uint32_t name, place;
  double overlap;
  bool exact;
};

/// Used by one warp of every CTA, all lanes of it together.
class GreedyMessages {
 public:
  /// The offer that all agree on, its name and place, and the CTA that made it; `owner` is kGreedyNone when none did.
  struct Agreed {
    uint32_t name, place, owner;
    bool doubt;
  };

  SPECTRAL_KERNELS_DEVICE GreedyMessages(const GreedyPlan& plan, unsigned char* scratch, int group, int member)
      : members_(plan.members), by_place_(plan.listed), lane_(lane_index()) {
    const auto mail = reinterpret_cast<Mail*>(scratch + plan.mail) + group * 2 * kBoxes * members_;
    sent_ = pinned(mail + lane_ * members_ + member);
    box_ = pinned(mail + member % kGreedyReplicas * members_ + lane_);
    details_ = mail + kGreedyReplicas * members_;
  }

  /// A round: every CTA offers, and reads what all others offer.
  SPECTRAL_KERNELS_DEVICE void exchange(const GreedyOffer& offer) {
    ++round_;
    if (lane_ < kBoxes) {
      const bool copies = lane_ < kGreedyReplicas;
      send(sent_ + turn(), {copies ? offer.key : __builtin_bit_cast(uint64_t, offer.overlap),
                            offer.name << 1 | (offer.exact ? 1u : 0u), offer.place << 16 | (round_ & 0xffffu)});
    }
    const Mail* const box = pinned(box_ + turn());
    SPECTRAL_KERNELS_UNROLL
    for (int i = 0; i < kMails; ++i) got_[i] = {0, 0, lane_ + i * kWarp < members_ ? ~round_ : round_};
    bool missing = true;
    while (missing) {
      missing = false;
      SPECTRAL_KERNELS_UNROLL
      for (int i = 0; i < kMails; ++i) {
        if (!is_new(got_[i])) got_[i] = receive(box + i * kWarp);
      }
      SPECTRAL_KERNELS_UNROLL
      for (int i = 0; i < kMails; ++i) missing = missing || !is_new(got_[i]);
      if (missing) spin();
    }
  }

  /// The best key of all.
  SPECTRAL_KERNELS_DEVICE uint64_t best() const {
    uint64_t key = 0;
    SPECTRAL_KERNELS_UNROLL
    for (int i = 0; i < kMails; ++i) key = larger(key, got_[i].value);
    return largest_key(key);
  }

  /// The first of the offers whose key is not below `edge`, which ties with the best key of all. In doubt when a CTA's
  /// best ties but what it offers may not.
  SPECTRAL_KERNELS_DEVICE Agreed agree(uint64_t best, uint64_t edge) const {
    Agreed own{kGreedyNone, 0, kGreedyNone, false};
    uint32_t first = kGreedyNone;
    SPECTRAL_KERNELS_UNROLL
    for (int i = 0; i < kMails; ++i) {
      const uint32_t name = got_[i].note >> 1, place = got_[i].tag >> 16, order = by_place_ ? place : name;
      const bool ties = got_[i].value >= edge;
      own.doubt |= ties & (got_[i].value != best) & (got_[i].note % 2 == 0);
      if (ties & (order < first)) {
        first = order;
        own.name = name;
        own.owner = static_cast<uint32_t>(lane_ + i * kWarp);
      }
    }
    const uint32_t order = warp_min(first), owner = warp_min(first == order ? own.owner : kGreedyNone);
    return {shuffle(own.name, static_cast<int>(owner % kWarp)), order, owner, ballot(own.doubt) != 0};
  }

  /// Overlap of the row that a CTA offered in this round: asked for first, then waited for.
  SPECTRAL_KERNELS_DEVICE Mail ask_detail(int owner) const { return receive(details_ + turn() + owner); }

  SPECTRAL_KERNELS_DEVICE double detail(int owner, Mail got) const {
    while (!is_new(got)) {
      spin();
      got = receive(details_ + turn() + owner);
    }
    return __builtin_bit_cast(double, got.value);
  }

 private:
  static constexpr int kMails = kGreedyMembers / kWarp;  // that a lane reads
  static constexpr int kBoxes = kGreedyReplicas + 1;     // the last holds the overlaps

  SPECTRAL_KERNELS_DEVICE int turn() const { return static_cast<int>(round_ % 2) * kBoxes * members_; }

  SPECTRAL_KERNELS_DEVICE bool is_new(const Mail& mail) const { return ((mail.tag ^ round_) & 0xffffu) == 0; }

  const int members_;
  const bool by_place_;
  const int lane_;
  Mail *sent_, *box_, *details_;  // of the first turn
  unsigned round_ = 0;
  Mail got_[kMails];
};

}  // namespace spectral_kernels::device
