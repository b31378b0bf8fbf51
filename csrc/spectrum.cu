// Launches the spectrum kernels (spectrum_cuda.h).

#include "launch_cuda.h"
#include "spectrum_cuda.h"

namespace spectral_kernels {
namespace {

using namespace device;

template <class Shape, class T>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    small_spectrum_kernel(const T* matrices, T* values, int d, bool largest) {
  __shared__ __align__(16) unsigned char memory[sizeof(typename Shape::Shared)];
  Shape::run(matrices, values, d, largest, memory);
}

template <class Shape, class T>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    large_spectrum_kernel(T* matrices, T* values, int d, bool largest) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shape::run(matrices, values, d, largest, memory);
}

template <class T>
void launch(const Tensor& matrices, const Tensor& values, bool largest) {
  using Shapes = SpectrumShapes<T>;
  const cudaStream_t stream = current_stream(matrices);
  const int d = static_cast<int>(matrices.size(1));
  const unsigned batches = static_cast<unsigned>(matrices.size(0));
  T* const to = data_of<T>(values);
  const auto small = [&](auto shape) {
    using Shape = decltype(shape);
    const T* const from = static_cast<const T*>(matrices.const_data_ptr());
    small_spectrum_kernel<Shape, T><<<batches, Shape::kThreads, 0, stream>>>(from, to, d, largest);
  };
  if (d <= 32) {
    small(typename Shapes::Size32{});
  } else if (d <= 64) {
    small(typename Shapes::Size64{});
  } else if (d <= 128) {
    small(typename Shapes::Size128{});
  } else {
    using Shape = typename Shapes::Large;
    const Tensor work = torch::stable::clone(matrices);
    const size_t bytes = Shape::shared_bytes(d);
    allow_shared_memory(large_spectrum_kernel<Shape, T>, bytes);
    large_spectrum_kernel<Shape, T><<<batches, Shape::kThreads, bytes, stream>>>(data_of<T>(work), to, d, largest);
  }
  check_cuda(cudaGetLastError(), "spectrum");
}

/// Eigenvalues (b, d) of positive semidefinite matrices (b, d, d), descending, or (b, 1) the largest alone; none below
/// 0.
Tensor eigenvalues(const Tensor& given, bool largest) {
  const Tensor matrices = torch::stable::contiguous(given);
  const int64_t b = matrices.size(0), d = matrices.size(1);
  const ScalarType type = matrices.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::Double) {
    throw std::runtime_error("spectral_kernels: matrices must be float64 or float32");
  }
  if (d != matrices.size(2) || d < 1 || d > kLargestSpectrum) {
    throw std::runtime_error("spectral_kernels: matrices must be square, of 1 to " + std::to_string(kLargestSpectrum) +
                             " rows, got " + std::to_string(d));
  }
  const torch::stable::accelerator::DeviceGuard guard(matrices.get_device_index());
  const Tensor values = torch::stable::new_empty(matrices, {b, largest ? 1 : d});
  if (b == 0) return values;
  if (type == ScalarType::Double) {
    launch<double>(matrices, values, largest);
  } else {
    launch<float>(matrices, values, largest);
  }
  return values;
}

}  // namespace
}  // namespace spectral_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(spectral_kernels_cuda, m) {
  m.def("eigenvalues(Tensor matrices, bool largest) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(spectral_kernels_cuda, CUDA, m) {
  m.impl("eigenvalues", TORCH_BOX(&spectral_kernels::eigenvalues));
}
