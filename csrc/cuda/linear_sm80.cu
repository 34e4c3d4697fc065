// Linear layers on sm_80 and later: forward, dgrad and wgrad.
#include "kernels_sm80.cuh"

using namespace rl_kernels;

LAYER_KERNELS(linear, Rows)
