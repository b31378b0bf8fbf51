#define SPECTRAL_KERNELS_ISA baseline
#include "kernels.inc"
