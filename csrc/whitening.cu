// Launches the whitening kernel (whitening_cuda.h).

#include "launch_cuda.h"
#include "whitening_cuda.h"

namespace spectral_kernels {
namespace {

using namespace device;

template <class T>
__global__ void __launch_bounds__(kWhiteningThreads, 1)
    whitening_matrix_kernel(const __grid_constant__ WhiteningArguments<T> arguments) {
  extern __shared__ __align__(16) unsigned char memory[];
  WhiteningMatrix<T>(arguments, memory).run();
}

template <class T>
void launch(const WhiteningArguments<T>& arguments, int64_t batches, cudaStream_t stream) {
  const size_t bytes = whitening_shared_bytes(arguments.d);
  allow_shared_memory(whitening_matrix_kernel<T>, bytes);
  whitening_matrix_kernel<T><<<static_cast<unsigned>(batches), kWhiteningThreads, bytes, stream>>>(arguments);
  check_cuda(cudaGetLastError(), "whitening_matrix");
}

/// W (b, d, d), lower triangular, with W C_ε Wᵀ = I, and which matrices (b,) are singular: their W is NaN. A covariance
/// that is rounding noise beside its mean is set to 0, and W the identity.
std::tuple<Tensor, Tensor> whitening_matrix(Tensor covariance, const Tensor& mean, double shrinkage, double negligible,
                                            double least) {
  const int64_t b = covariance.size(0), d = covariance.size(1);
  const ScalarType type = covariance.scalar_type();
  if ((type != ScalarType::Float && type != ScalarType::Double) || mean.scalar_type() != type) {
    throw std::runtime_error("spectral_kernels: covariance and mean must both be float64 or float32");
  }
  if (d != covariance.size(2) || d < 1 || d > kLargestWhitening || !covariance.is_contiguous() ||
      !mean.is_contiguous()) {
    throw std::runtime_error("spectral_kernels: covariance must be square and dense, of 1 to " +
                             std::to_string(kLargestWhitening) + " rows, got " + std::to_string(d));
  }
  const torch::stable::accelerator::DeviceGuard guard(covariance.get_device_index());
  const Tensor matrix = torch::stable::new_empty(covariance, {b, d, d});
  const Tensor singular = torch::stable::new_empty(covariance, {b}, ScalarType::Int);
  if (b == 0) return {matrix, singular};
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    launch(
        WhiteningArguments<T>{data_of<T>(covariance), static_cast<const T*>(mean.const_data_ptr()), data_of<T>(matrix),
                              data_of<int>(singular), static_cast<int>(d), shrinkage, negligible, least},
        b, current_stream(covariance));
  };
  if (type == ScalarType::Double) {
    run(double{});
  } else {
    run(float{});
  }
  return {matrix, singular};
}

}  // namespace
}  // namespace spectral_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(spectral_kernels_cuda, m) {
  m.def(
      "whitening_matrix(Tensor(a!) covariance, Tensor mean, float shrinkage, float negligible, float least)"
      " -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(spectral_kernels_cuda, CUDA, m) {
  m.impl("whitening_matrix", TORCH_BOX(&spectral_kernels::whitening_matrix));
}
