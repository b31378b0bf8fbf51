// What the bodies of CUDA kernels are written with: threads, barriers, exchange within a warp and between CTAs. nvcc
// maps it to the machine; any other compiler to the emulation (emulation.h), which the tests run the very same bodies
// on.
#pragma once

#include <cmath>
#include <cstdint>

namespace spectral_kernels::device {

/// What a CTA tells others through global memory. It arrives whole: its tag says that the rest has arrived too, and so
/// no fence is needed.
struct alignas(16) Mail {
  uint64_t value;
  uint32_t note, tag;
};

}  // namespace spectral_kernels::device

#if defined(__CUDACC__)

#define SPECTRAL_KERNELS_DEVICE __device__ __forceinline__
#define SPECTRAL_KERNELS_HOST_DEVICE __host__ __device__
#define SPECTRAL_KERNELS_PRAGMA(text) _Pragma(#text)
#define SPECTRAL_KERNELS_UNROLL _Pragma("unroll")
#define SPECTRAL_KERNELS_UNROLL_BY(times) SPECTRAL_KERNELS_PRAGMA(unroll times)

namespace spectral_kernels::device {

constexpr unsigned kAllLanes = 0xffffffffu;

SPECTRAL_KERNELS_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
SPECTRAL_KERNELS_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
SPECTRAL_KERNELS_DEVICE void barrier() { __syncthreads(); }
SPECTRAL_KERNELS_DEVICE void warp_barrier() { __syncwarp(); }

template <class T>
SPECTRAL_KERNELS_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}

template <class T>
SPECTRAL_KERNELS_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}

/// Leaves the lowest value in an error word (errors.py), which may lie in the host's memory.
SPECTRAL_KERNELS_DEVICE void note(int64_t* word, int64_t value) {
  atomicMin(reinterpret_cast<long long*>(word), static_cast<long long>(value));
}

/// Leaves the lowest value in shared memory, whoever else writes there.
SPECTRAL_KERNELS_DEVICE void lower_to(int* place, int value) { atomicMin(place, value); }

SPECTRAL_KERNELS_DEVICE unsigned ballot(bool vote) { return __ballot_sync(kAllLanes, vote); }
SPECTRAL_KERNELS_DEVICE int count_bits(unsigned bits) { return __popc(bits); }
SPECTRAL_KERNELS_DEVICE int lowest_bit(unsigned bits) { return __ffs(static_cast<int>(bits)) - 1; }

SPECTRAL_KERNELS_DEVICE uint32_t warp_max(uint32_t value) { return __reduce_max_sync(kAllLanes, value); }
SPECTRAL_KERNELS_DEVICE uint32_t warp_min(uint32_t value) { return __reduce_min_sync(kAllLanes, value); }

SPECTRAL_KERNELS_DEVICE void send(Mail* to, const Mail& mail) {
  const uint64_t rest = static_cast<uint64_t>(mail.tag) << 32 | mail.note;
  asm volatile(
      "{ .reg .b128 m; mov.b128 m, {%1, %2}; st.relaxed.gpu.global.b128 [%0], m; }" ::"l"(__cvta_generic_to_global(to)),
      "l"(mail.value), "l"(rest)
      : "memory");
}

SPECTRAL_KERNELS_DEVICE Mail receive(const Mail* from) {
  uint64_t value, rest;
  asm volatile("{ .reg .b128 m; ld.relaxed.gpu.global.b128 m, [%2]; mov.b128 {%0, %1}, m; }"
               : "=l"(value), "=l"(rest)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return {value, static_cast<uint32_t>(rest), static_cast<uint32_t>(rest >> 32)};
}

/// Counts this CTA in; what it wrote before can be read by who sees the count.
SPECTRAL_KERNELS_DEVICE void arrive(unsigned* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(__cvta_generic_to_global(counter)) : "memory");
}

SPECTRAL_KERNELS_DEVICE unsigned arrived(const unsigned* counter) {
  unsigned count;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(__cvta_generic_to_global(counter)) : "memory");
  return count;
}

/// A pointer that is kept in registers: what it was computed from is not computed anew where it is used.
template <class T>
SPECTRAL_KERNELS_DEVICE T* pinned(T* pointer) {
  asm("mov.u64 %0, %0;" : "+l"(pointer));
  return pointer;
}

/// Between two looks at what another CTA is to write.
SPECTRAL_KERNELS_DEVICE void spin() {}

}  // namespace spectral_kernels::device

#else

#include "emulation.h"

#define SPECTRAL_KERNELS_DEVICE inline
#define SPECTRAL_KERNELS_HOST_DEVICE
#define SPECTRAL_KERNELS_UNROLL
#define SPECTRAL_KERNELS_UNROLL_BY(times)

#endif

namespace spectral_kernels::device {

constexpr int kWarp = 32;

SPECTRAL_KERNELS_DEVICE int lane_index() { return thread_index() % kWarp; }
SPECTRAL_KERNELS_DEVICE int warp_index() { return thread_index() / kWarp; }

template <class T>
SPECTRAL_KERNELS_DEVICE T larger(T a, T b) {
  return a > b ? a : b;
}

template <class T>
SPECTRAL_KERNELS_DEVICE T smaller(T a, T b) {
  return a < b ? a : b;
}

/// Sum over the warp, the same bits in every lane.
template <class T>
SPECTRAL_KERNELS_DEVICE T warp_sum(T value) {
  SPECTRAL_KERNELS_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

template <class T>
SPECTRAL_KERNELS_DEVICE T warp_max(T value) {
  SPECTRAL_KERNELS_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = larger(value, shuffle_xor(value, mask));
  return value;
}

template <class T>
SPECTRAL_KERNELS_DEVICE T warp_min(T value) {
  SPECTRAL_KERNELS_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = smaller(value, shuffle_xor(value, mask));
  return value;
}

/// 2^-e for |x| = f·2^e, 1 <= f < 2: multiplied by it, x keeps its bits. x normal, below 2^(largest exponent).
SPECTRAL_KERNELS_DEVICE float inverse_power_of_two(float x) {
  const uint32_t exponent = __builtin_bit_cast(uint32_t, x) >> 23 & 0xffu;
  return __builtin_bit_cast(float, (254u - exponent) << 23);
}

SPECTRAL_KERNELS_DEVICE double inverse_power_of_two(double x) {
  const uint64_t exponent = __builtin_bit_cast(uint64_t, x) >> 52 & 0x7ffu;
  return __builtin_bit_cast(double, (2046u - exponent) << 52);
}

}  // namespace spectral_kernels::device
