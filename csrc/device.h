// What the bodies of CUDA kernels are written with: threads, barriers, warp and cluster exchange. nvcc maps it to the
// machine; any other compiler to the emulation (emulation.h), which the tests run the very same bodies on.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)

#include <cooperative_groups.h>

#define SPECTRAL_KERNELS_DEVICE __device__ __forceinline__
#define SPECTRAL_KERNELS_HOST_DEVICE __host__ __device__
#define SPECTRAL_KERNELS_UNROLL _Pragma("unroll")

namespace spectral_kernels::device {

constexpr unsigned kAllLanes = 0xffffffffu;

SPECTRAL_KERNELS_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
SPECTRAL_KERNELS_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
SPECTRAL_KERNELS_DEVICE void barrier() { __syncthreads(); }

template <class T>
SPECTRAL_KERNELS_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}

template <class T>
SPECTRAL_KERNELS_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}

SPECTRAL_KERNELS_DEVICE unsigned ballot(bool vote) { return __ballot_sync(kAllLanes, vote); }
SPECTRAL_KERNELS_DEVICE int count_bits(unsigned bits) { return __popc(bits); }

// CTAs of a cluster, and the address of one's shared memory in another of them; kernels for older machines, which have
// no clusters, are empty
#if __CUDA_ARCH__ >= 900
SPECTRAL_KERNELS_DEVICE int cluster_rank() { return static_cast<int>(cooperative_groups::this_cluster().block_rank()); }
SPECTRAL_KERNELS_DEVICE void cluster_barrier() { cooperative_groups::this_cluster().sync(); }

template <class T>
SPECTRAL_KERNELS_DEVICE T* at_rank(T* shared, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(shared, static_cast<unsigned>(rank));
}
#else
__device__ int cluster_rank();
__device__ void cluster_barrier();

template <class T>
__device__ T* at_rank(T* shared, int rank);
#endif

}  // namespace spectral_kernels::device

#else

#include "emulation.h"

#define SPECTRAL_KERNELS_DEVICE inline
#define SPECTRAL_KERNELS_HOST_DEVICE
#define SPECTRAL_KERNELS_UNROLL

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
