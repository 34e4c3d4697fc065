// Linear layers of at most 16 tokens on sm_80 and later: forward and dgrad.
#include "skinny.cuh"
#include "types.cuh"

namespace rl_kernels::cuda {

#define SKINNY_KERNELS(tokens)                                                                                         \
  ELEMENT_KERNEL(skinny_forward_pair_##tokens, SkinnyKernel<ElementType, tokens, false, Pair>);                        \
  ELEMENT_KERNEL(skinny_forward_general_##tokens, SkinnyKernel<ElementType, tokens, false, General>);                  \
  ELEMENT_KERNEL(skinny_dgrad_pair_##tokens, SkinnyKernel<ElementType, tokens, true, Pair>);                           \
  ELEMENT_KERNEL(skinny_dgrad_general_##tokens, SkinnyKernel<ElementType, tokens, true, General>);

SKINNY_KERNELS(8)
SKINNY_KERNELS(16)

} // namespace rl_kernels::cuda
