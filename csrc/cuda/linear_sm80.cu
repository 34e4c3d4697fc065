// Linear layers on sm_80 and later: forward, dgrad and wgrad.
#include "kernels_sm80.cuh"

namespace rl_kernels::cuda {

LAYER_KERNELS(linear, Rows)

} // namespace rl_kernels::cuda
