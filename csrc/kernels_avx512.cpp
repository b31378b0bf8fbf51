#define SPECTRAL_KERNELS_ISA avx512
#include "kernels.inc"
