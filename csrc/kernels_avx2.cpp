#define SPECTRAL_KERNELS_ISA avx2
#include "kernels.inc"
