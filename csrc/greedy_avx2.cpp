#define SPECTRAL_KERNELS_ISA avx2
#include "greedy_kernels.inc"
