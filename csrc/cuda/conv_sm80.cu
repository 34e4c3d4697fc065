// Convolutions on sm_80 and later as implicit products: forward, dgrad (a phase of the stride at a time) and wgrad.
#include "kernels_sm80.cuh"

namespace rl_kernels::cuda {

LAYER_KERNELS(conv, Pixels)

} // namespace rl_kernels::cuda
