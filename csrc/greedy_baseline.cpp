#define SPECTRAL_KERNELS_ISA baseline
#include "greedy_kernels.inc"
