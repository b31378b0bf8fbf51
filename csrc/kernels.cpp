#include "kernels.h"

#include "common.h"

namespace spectral_kernels {

#define SPECTRAL_KERNELS_DECLARE(isa)          \
  namespace isa {                              \
  extern const Kernels<float> float_kernels;   \
  extern const Kernels<double> double_kernels; \
  extern const EigenKernels eigen_kernels;     \
  }
SPECTRAL_KERNELS_DECLARE(baseline)
#if defined(SPECTRAL_KERNELS_X86)
SPECTRAL_KERNELS_DECLARE(avx2)
SPECTRAL_KERNELS_DECLARE(avx512)
#define SPECTRAL_KERNELS_CHOOSE(table) \
  switch (cpu_path()) {                \
    case CpuPath::kAvx512:             \
      return avx512::table;            \
    case CpuPath::kAvx2:               \
      return avx2::table;              \
    default:                           \
      return baseline::table;          \
  }
#else
#define SPECTRAL_KERNELS_CHOOSE(table) return baseline::table;
#endif
#undef SPECTRAL_KERNELS_DECLARE

template <>
const Kernels<float>& kernels<float>() {
  SPECTRAL_KERNELS_CHOOSE(float_kernels)
}

template <>
const Kernels<double>& kernels<double>() {
  SPECTRAL_KERNELS_CHOOSE(double_kernels)
}

const EigenKernels& eigen_kernels() { SPECTRAL_KERNELS_CHOOSE(eigen_kernels) }

}  // namespace spectral_kernels
