// What a wgrad ends with, on sm_80 and later.
#include "finish.cuh"
#include "types.cuh"

namespace rl_kernels::cuda {

ELEMENT_KERNEL(finish_sums, ChannelSumsKernel<ElementType>);
ELEMENT_KERNEL(finish_gradients, FinishKernel<ElementType>);

} // namespace rl_kernels::cuda
