// The slots of greedy selection on the CPU: which rows of the pool it may pick, read once, and which of them are left.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "common.h"
#include "greedy_state.h"
#include "team.h"

namespace spectral_kernels {

// multiply-adds in a chunk that threads share out: some 5 us
constexpr int64_t kChunkWork = 250'000;

inline int64_t chunk_of(int64_t work) { return std::max<int64_t>(1, kChunkWork / work); }

// With all rows as candidates a row's slot is its number, else rows have slots in the order of their first draw.
template <typename T>
struct Slots {
  const Source& source;
  const Options& options;
  const int64_t* draws;  // (k, m) rows, where not all are candidates
  const int64_t m;       // draws a step
  int64_t count = 0;
  Rows<T> rows;
  std::vector<double> absent;  // infinity for slots that are not to be had, else 0
  int64_t bad_row = -1;        // the first that holds NaN or Inf, or -1
  int64_t long_row = -1;       // one too long for the log-determinant, or -1
  bool out_of_range = false;   // whether products overflow or vanish

  Slots(const Source& source_, const Options& options_, const int64_t* draws_, int64_t m_, Team& team)
      : source(source_), options(options_), draws(draws_), m(m_), team_(team) {}

  void prepare() {
    if (options.all_rows) {
      count = source.n;
    } else {
      place_drawn();
    }
    rows.resize(count, source.d);
    rows.squares.resize(room());
    absent.assign(room(), kInfinity);
    read_rows();
  }

  int64_t chunks() const { return (count + kGreedyChunk - 1) / kGreedyChunk; }
  // Slots in whole chunks, of which the last may have some without a row.
  int64_t room() const { return chunks() * kGreedyChunk; }
  bool left(int64_t slot) const { return absent[slot] == 0; }

  // The slot of a row, -1 where it is never drawn.
  int64_t slot_of(int64_t row) {
    if (options.all_rows) return row;
    return slot_of_row_.empty() ? entry_of(row).slot : slot_of_row_[row];
  }
  int64_t row_of(int64_t slot) const { return options.all_rows ? slot : row_of_slot_[slot]; }
  // Slots of the m rows that a step draws.
  const int64_t* drawn_by(int64_t step) const { return slot_of_draw_.data() + step * m; }

  // Looks whether T holds products with a row, and their squares are in float64's range.
  void check_range(const Rows<T>& of, int64_t slot, int64_t row) {
    if (options.normalize || source.scaled || !of.seen[slot] || !source.allows(row)) return;
    const bool wide = std::is_same_v<T, double>;
    // the log-determinant is of the rows at their own scale
    if (options.logdet && of.squares[slot] > kLongestSquare && long_row < 0 && checks_enabled()) long_row = row;
    // float rows are in float64's range
    if (wide && (options.logdet || source.type != RowType::kDouble)) return;
    const double most = wide ? 0x1p240 : 1e30;
    out_of_range |= !(of.squares[slot] > 1 / most && of.squares[slot] < most);
  }

 private:
  struct Entry {
    int64_t row = -1;
    int32_t slot = -1;
  };

  // Finds the rows that are drawn.
  void place_drawn() {
    const int64_t k = options.k;
    int bits = 4;
    while ((int64_t{1} << bits) < 2 * k * m) ++bits;
    shift_ = 64 - bits;
    // a small pool has an entry a row
    const bool small = source.n <= int64_t{1} << bits;
    if (small) {
      slot_of_row_.assign(source.n, -1);
    } else {
      table_.assign(int64_t{1} << bits, {});
    }
    slot_of_draw_.resize(k * m);
    row_of_slot_.reserve(std::min(source.n, k * m));
    for (int64_t i = m; i < k * m; ++i) {
      Entry* const entry = small ? nullptr : &entry_of(draws[i]);
      int32_t& slot = small ? slot_of_row_[draws[i]] : entry->slot;
      if (slot < 0) {
        if (entry != nullptr) entry->row = draws[i];
        slot = static_cast<int32_t>(row_of_slot_.size());
        row_of_slot_.push_back(draws[i]);
      }
      slot_of_draw_[i] = slot;
    }
    count = row_of_slot_.size();
  }

  void read_rows() {
    BadRow bad;
    // reading a row costs as much as some products with it
    team_.for_each(count, chunk_of(8 * source.d), [&](int64_t begin, int64_t end) {
      constexpr int64_t ahead = 8;
      for (int64_t slot = begin; slot < end; ++slot) {
        const int64_t row = row_of(slot);
        if (slot + ahead < end) source.prefetch(row_of(slot + ahead));
        if (!rows.read(source, row, slot, options.normalize)) bad.report(row);
      }
    });
    if (checks_enabled()) bad_row = bad.row();
    for (int64_t slot = 0; slot < count; ++slot) check_range(rows, slot, row_of(slot));
    for (int64_t slot = 0; slot < count; ++slot) {
      absent[slot] = rows.seen[slot] && source.allows(row_of(slot)) ? 0 : kInfinity;
    }
  }

  // Where the table has a row, or would have it.
  Entry& entry_of(int64_t row) {
    const int64_t mask = static_cast<int64_t>(table_.size()) - 1;
    int64_t at = static_cast<int64_t>(static_cast<uint64_t>(row) * 0x9e3779b97f4a7c15u >> shift_);
    while (table_[at].row >= 0 && table_[at].row != row) at = (at + 1) & mask;
    return table_[at];
  }

  Team& team_;
  std::vector<int32_t> slot_of_row_;
  std::vector<Entry> table_;
  int shift_ = 0;
  std::vector<int64_t> row_of_slot_, slot_of_draw_;
};

}  // namespace spectral_kernels
