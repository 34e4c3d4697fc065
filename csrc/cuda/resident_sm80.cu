// Convolutions whose filter stays in shared memory, on sm_80 and later: forward and dgrad.
#include "resident.cuh"
#include "types.cuh"

namespace rl_kernels::cuda {

// Features x pixels, and warps over them.
using Tile16x128 = Tile<16, 128, 1, 4>;
using Tile32x128 = Tile<32, 128, 1, 4>;
using Tile64x128 = Tile<64, 128, 2, 4>;

#define RESIDENT_KERNELS(rows)                                                                                         \
  ELEMENT_KERNEL(resident_forward_pair_##rows, ResidentKernel<ElementType, Tile##rows##x128, false, Pair>);            \
  ELEMENT_KERNEL(resident_forward_general_##rows, ResidentKernel<ElementType, Tile##rows##x128, false, General>);      \
  ELEMENT_KERNEL(resident_dgrad_pair_##rows, ResidentKernel<ElementType, Tile##rows##x128, true, Pair>);               \
  ELEMENT_KERNEL(resident_dgrad_general_##rows, ResidentKernel<ElementType, Tile##rows##x128, true, General>);

RESIDENT_KERNELS(16)
RESIDENT_KERNELS(32)
RESIDENT_KERNELS(64)

} // namespace rl_kernels::cuda
