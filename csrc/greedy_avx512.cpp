#define SPECTRAL_KERNELS_ISA avx512
#include "greedy_kernels.inc"
