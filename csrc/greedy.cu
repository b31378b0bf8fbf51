// Launches greedy selection (greedy_cuda.h): a cooperative launch, whose CTAs all run at the same time.

#include <algorithm>
#include <array>
#include <mutex>
#include <optional>
#include <tuple>

#include "greedy_cuda.h"
#include "launch_cuda.h"

namespace spectral_kernels {
namespace {

using namespace device;

// by log-determinant fewer, which have more registers each
template <bool kLogdet>
constexpr int kThreads = kLogdet ? 384 : 512;

template <class T, bool kLogdet>
__global__ void __launch_bounds__(kThreads<kLogdet>, 1)
    greedy_kernel(const __grid_constant__ GreedyArguments<T> arguments, const __grid_constant__ GreedyPlan plan,
                  unsigned char* scratch) {
  extern __shared__ __align__(128) unsigned char memory[];
  GreedyGrid<T, kLogdet>(arguments, plan, memory, scratch, kThreads<kLogdet>).run();
}

/// What a device offers, asked once.
struct Chip {
  int multiprocessors = 0;  // 0: it cannot run the kernel
  size_t shared = 0;        // bytes that a CTA may have

  static const Chip& of(int device) {
    static std::array<Chip, 64> chips;
    static std::array<std::once_flag, 64> asked;
    const size_t place = static_cast<size_t>(device);
    if (place >= chips.size()) throw std::runtime_error("spectral_kernels: too many devices");
    std::call_once(asked[place], [&] {
      int current = 0, cooperative = 0, count = 0, bytes = 0;
      if (cudaGetDevice(&current) != cudaSuccess || cudaSetDevice(device) != cudaSuccess) {
        cudaGetLastError();
        return;
      }
      cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
      const bool runs = fits<float, false>(bytes) && fits<float, true>(bytes) && fits<double, false>(bytes) &&
                        fits<double, true>(bytes);
      if (cooperative != 0 && runs) chips[place] = {count, static_cast<size_t>(bytes)};
      cudaSetDevice(current);
      cudaGetLastError();
    });
    return chips[place];
  }

 private:
  template <class T, bool kLogdet>
  static bool fits(int bytes) {
    const auto kernel = greedy_kernel<T, kLogdet>;
    int blocks = 0;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) == cudaSuccess &&
           cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads<kLogdet>,
                                                         static_cast<size_t>(bytes)) == cudaSuccess &&
           blocks > 0;
  }
};

template <class T>
void launch(const GreedyArguments<T>& arguments, const Tensor& pool) {
  const Chip& chip = Chip::of(pool.get_device_index());
  const GreedyPlan plan =
      chip.multiprocessors == 0 ? GreedyPlan{} : GreedyPlan::make(arguments, chip.multiprocessors, chip.shared);
  if (plan.members == 0) throw std::runtime_error("spectral_kernels: the pool does not suit the device");
  const Tensor scratch = torch::stable::new_empty(pool, {static_cast<int64_t>(plan.scratch)}, ScalarType::Byte);
  const cudaStream_t stream = current_stream(pool);
  check_cuda(cudaMemsetAsync(scratch.data_ptr(), 0, plan.rows, stream), "greedy_select");
  cudaLaunchAttribute cooperative;
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.groups * plan.members));
  config.blockDim = dim3(arguments.logdet ? kThreads<true> : kThreads<false>);
  config.dynamicSmemBytes = plan.shared;
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  const auto kernel = arguments.logdet ? greedy_kernel<T, true> : greedy_kernel<T, false>;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments, plan, data_of<unsigned char>(scratch)), "greedy_select");
}

std::tuple<Tensor, Tensor, Tensor> greedy_select(const Tensor& rows, const Tensor& starts,
                                                 const std::optional<Tensor>& drawn, const std::optional<Tensor>& mask,
                                                 const Tensor& seeds, int64_t k, bool logdet, bool normalize,
                                                 const std::optional<Tensor>& words) {
  const ScalarType type = rows.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::Double) {
    throw std::runtime_error("spectral_kernels: pool must be float64 or float32");
  }
  const torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  const Tensor pool = torch::stable::contiguous(rows), start = torch::stable::contiguous(starts),
               seed = torch::stable::contiguous(seeds);
  std::optional<Tensor> draws, valid;
  if (drawn) draws = torch::stable::contiguous(*drawn);
  if (mask) valid = torch::stable::contiguous(*mask);
  const int64_t b = pool.size(0);
  const Tensor indices = torch::stable::new_empty(pool, {b, k}, ScalarType::Long);
  const Tensor ranks = torch::stable::new_empty(pool, {b, k}), objectives = torch::stable::new_empty(pool, {b, k});
  if (b == 0) return {indices, ranks, objectives};
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    launch(GreedyArguments<T>{static_cast<const T*>(pool.const_data_ptr()),
                              static_cast<const int64_t*>(start.const_data_ptr()),
                              draws ? static_cast<const int64_t*>(draws->const_data_ptr()) : nullptr,
                              valid ? static_cast<const bool*>(valid->const_data_ptr()) : nullptr,
                              static_cast<const int64_t*>(seed.const_data_ptr()), data_of<int64_t>(indices),
                              data_of<T>(ranks), data_of<T>(objectives), words ? data_of<int64_t>(*words) : nullptr,
                              static_cast<int>(b), static_cast<int>(pool.size(1)), static_cast<int>(pool.size(2)),
                              static_cast<int>(k), static_cast<int>(start.size(1)),
                              draws ? static_cast<int>(draws->size(2)) : 0, logdet, normalize},
           pool);
  };
  if (type == ScalarType::Double) {
    run(double{});
  } else {
    run(float{});
  }
  return {indices, ranks, objectives};
}

/// Whether a device runs the selection from such pools; `m` draws a step, 0: every row is a candidate.
bool greedy_fits(int64_t device, int64_t b, int64_t n, int64_t d, int64_t k, int64_t m, bool logdet, bool normalize,
                 bool wide) {
  const Chip& chip = Chip::of(static_cast<int>(device));
  if (chip.multiprocessors == 0) return false;
  const auto fits = [&](auto zero) {
    GreedyArguments<decltype(zero)> in{};
    // looked at for whether it is there
    static const int64_t some = 0;
    in.draws = m == 0 ? nullptr : &some;
    in.b = static_cast<int>(std::max(b, int64_t{1}));
    in.n = static_cast<int>(n);
    in.d = static_cast<int>(d);
    in.k = static_cast<int>(k);
    in.m = static_cast<int>(m);
    in.logdet = logdet;
    in.normalize = normalize;
    return GreedyPlan::make(in, chip.multiprocessors, chip.shared).members > 0;
  };
  return wide ? fits(double{}) : fits(float{});
}

}  // namespace
}  // namespace spectral_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(spectral_kernels_cuda, m) {
  m.def(
      "greedy_select(Tensor pool, Tensor start, Tensor? draws, Tensor? valid, Tensor seed, int k, bool logdet,"
      " bool normalize, Tensor(a!)? words) -> (Tensor, Tensor, Tensor)");
  m.def("greedy_fits(int device, int b, int n, int d, int k, int m, bool logdet, bool normalize, bool wide) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(spectral_kernels_cuda, CUDA, m) {
  m.impl("greedy_select", TORCH_BOX(&spectral_kernels::greedy_select));
}

STABLE_TORCH_LIBRARY_IMPL(spectral_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("greedy_fits", TORCH_BOX(&spectral_kernels::greedy_fits));
}
