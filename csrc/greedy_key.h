// Keys of rows: a random order of a pool's rows that nobody sorts or keeps. As `row_keys` of ops/_selection.py.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SPECTRAL_KERNELS_KEY __host__ __device__ inline
#else
#define SPECTRAL_KERNELS_KEY inline
#endif

namespace spectral_kernels {

/// Takes the rows of a pool of n to their keys and back; both lie below `size`, and keys of no row lie among them.
struct RowKeys {
  static constexpr int kRounds = 5, kStep = 10, kSeedBits = 62;
  static constexpr uint64_t kFactor = 0x9e3779b1, kInverse = 0xcfa4a56b0e8b2f51;  // modulo 2^64

  uint64_t seed, mask;
  int bits, half;

  SPECTRAL_KERNELS_KEY RowKeys(int64_t n, int64_t drawn) : seed(static_cast<uint64_t>(drawn)), bits(10) {
    while (int64_t{1} << bits < n) ++bits;
    mask = (uint64_t{1} << bits) - 1;
    half = (bits + 1) / 2;
  }

  SPECTRAL_KERNELS_KEY int64_t size() const { return int64_t{1} << bits; }

  SPECTRAL_KERNELS_KEY int64_t of(int64_t row) const {
    uint64_t key = static_cast<uint64_t>(row);
    for (int step = 0; step < kRounds; ++step) {
      key = (key ^ (seed >> kStep * step & mask)) * kFactor & mask;
      key ^= key >> half;
    }
    return static_cast<int64_t>(key ^ (seed >> (kSeedBits - bits) & mask));
  }

  SPECTRAL_KERNELS_KEY int64_t row(int64_t key_of_row) const {
    uint64_t key = static_cast<uint64_t>(key_of_row) ^ (seed >> (kSeedBits - bits) & mask);
    for (int step = kRounds - 1; step >= 0; --step) {
      key ^= key >> half;
      key = (key * kInverse & mask) ^ (seed >> kStep * step & mask);
    }
    return static_cast<int64_t>(key);
  }
};

}  // namespace spectral_kernels

#undef SPECTRAL_KERNELS_KEY
