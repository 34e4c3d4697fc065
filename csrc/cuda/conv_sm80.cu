// Convolutions on sm_80 and later as implicit products: forward, dgrad (a phase of the stride at a time) and wgrad.
#include "kernels_sm80.cuh"

using namespace rl_kernels;

LAYER_KERNELS(conv, Pixels)
