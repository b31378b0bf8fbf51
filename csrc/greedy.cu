// Launches the cluster of greedy selection (greedy_cuda.h). Clusters are sm_90's; older code holds an empty kernel that
// is never launched.

#include <optional>
#include <tuple>
#include <vector>

#include "greedy_cuda.h"
#include "launch_cuda.h"

namespace spectral_kernels {
namespace {

using namespace device;

template <class T>
__global__ void __launch_bounds__(kGreedyThreads, 1)
    greedy_cluster_kernel(const __grid_constant__ GreedyArguments<T> arguments) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char memory[];
  GreedyCluster<T>(arguments, memory).run();
#endif
}

/// A launch of `pools` clusters of 16 CTAs: more than the 8 that every device must take, so that the kernel must ask.
template <class T>
struct Launch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute cluster{};

  Launch(int64_t pools, size_t bytes, cudaStream_t stream) {
    const auto kernel = greedy_cluster_kernel<T>;
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cluster of 16");
    allow_shared_memory(kernel, bytes);
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = kGreedyCluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.gridDim = dim3(static_cast<unsigned>(pools * kGreedyCluster));
    config.blockDim = dim3(kGreedyThreads);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  Launch(const Launch&) = delete;
};

template <class T>
void launch(const GreedyArguments<T>& arguments, int64_t pools, cudaStream_t stream) {
  const size_t bytes = GreedyLayout::make<T>(arguments.n, arguments.d, arguments.logdet).bytes;
  if (bytes > kGreedySharedLimit) throw std::runtime_error("spectral_kernels: pool does not fit into a cluster");
  Launch<T> launch(pools, bytes, stream);
  check_cuda(cudaLaunchKernelEx(&launch.config, greedy_cluster_kernel<T>, arguments), "greedy_select");
}

std::tuple<Tensor, Tensor, Tensor> greedy_select(const Tensor& rows, const Tensor& starts,
                                                 const std::optional<Tensor>& drawn, const std::optional<Tensor>& mask,
                                                 int64_t k, bool all_rows, bool logdet,
                                                 std::optional<std::vector<double>> window, bool normalize) {
  const ScalarType type = rows.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::Double) {
    throw std::runtime_error("spectral_kernels: pool must be float64 or float32");
  }
  const torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  const Tensor pool = torch::stable::contiguous(rows), start = torch::stable::contiguous(starts);
  std::optional<Tensor> draws, valid;
  if (drawn) draws = torch::stable::contiguous(*drawn);
  if (mask) valid = torch::stable::contiguous(*mask);
  const int64_t b = pool.size(0);
  const Tensor indices = torch::stable::new_empty(pool, {b, k}, ScalarType::Long);
  const Tensor ranks = torch::stable::new_empty(pool, {b, k}), objectives = torch::stable::new_empty(pool, {b, k});
  if (b == 0) return {indices, ranks, objectives};
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    launch(
        GreedyArguments<T>{
            static_cast<const T*>(pool.const_data_ptr()), static_cast<const int64_t*>(start.const_data_ptr()),
            draws ? static_cast<const int64_t*>(draws->const_data_ptr()) : nullptr,
            valid ? static_cast<const bool*>(valid->const_data_ptr()) : nullptr, data_of<int64_t>(indices),
            data_of<T>(ranks), data_of<T>(objectives), static_cast<int>(pool.size(1)), static_cast<int>(pool.size(2)),
            static_cast<int>(k), static_cast<int>(start.size(1)), draws ? static_cast<int>(draws->size(2)) : 0,
            all_rows, logdet, window.has_value(), normalize, window ? (*window)[0] : 0.0, window ? (*window)[1] : 0.0},
        b, current_stream(pool));
  };
  if (type == ScalarType::Double) {
    run(double{});
  } else {
    run(float{});
  }
  return {indices, ranks, objectives};
}

/// Shared memory that a CTA of the cluster takes.
int64_t greedy_bytes(int64_t n, int64_t d, bool logdet, bool wide) {
  const int rows = static_cast<int>(n), columns = static_cast<int>(d);
  const GreedyLayout layout =
      wide ? GreedyLayout::make<double>(rows, columns, logdet) : GreedyLayout::make<float>(rows, columns, logdet);
  return static_cast<int64_t>(layout.bytes);
}

/// Clusters of `bytes` shared memory a CTA that the current device runs at a time; 0 when it runs none.
int64_t greedy_clusters(int64_t bytes) {
  int count = 0;
  if (bytes > static_cast<int64_t>(kGreedySharedLimit)) return 0;
  cudaError_t error = cudaErrorInvalidValue;
  try {
    Launch<float> launch(1, static_cast<size_t>(bytes), nullptr);
    error = cudaOccupancyMaxActiveClusters(&count, greedy_cluster_kernel<float>, &launch.config);
  } catch (const std::runtime_error&) {
  }
  cudaGetLastError();
  return error == cudaSuccess ? count : 0;
}

}  // namespace
}  // namespace spectral_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(spectral_kernels_cuda, m) {
  m.def(
      "greedy_select(Tensor pool, Tensor start, Tensor? draws, Tensor? valid, int k, bool all_rows, bool logdet,"
      " float[]? window, bool normalize) -> (Tensor, Tensor, Tensor)");
  m.def("greedy_bytes(int n, int d, bool logdet, bool wide) -> int");
  m.def("greedy_clusters(int bytes) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(spectral_kernels_cuda, CUDA, m) {
  m.impl("greedy_select", TORCH_BOX(&spectral_kernels::greedy_select));
}

STABLE_TORCH_LIBRARY_IMPL(spectral_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("greedy_bytes", TORCH_BOX(&spectral_kernels::greedy_bytes));
  m.impl("greedy_clusters", TORCH_BOX(&spectral_kernels::greedy_clusters));
}
