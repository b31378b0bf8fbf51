// What the launchers of the CUDA kernels share.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <stdexcept>
#include <string>

namespace spectral_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

/// PyTorch's current stream of a tensor's device. Asked of the loaded torch by name: a torch for the CPU, which this
/// may be linked against, has no such function.
inline cudaStream_t current_stream(const Tensor& tensor) {
  static const auto ask = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* const found = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<AOTITorchError (*)(int32_t, void**)>(found);
  }();
  if (ask == nullptr) throw std::runtime_error("spectral_kernels: this torch tells no CUDA stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(ask(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

/// Above 48 KB a kernel must ask for its shared memory.
template <class Kernel>
void allow_shared_memory(Kernel* kernel, size_t bytes) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
             "shared memory");
}

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

}  // namespace spectral_kernels
