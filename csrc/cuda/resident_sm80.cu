// Convolutions whose filter stays in shared memory, on sm_80 and later: forward and dgrad.
#include "elements.cuh"
#include "resident.cuh"

using namespace rl_kernels;

// Features x pixels, and warps over them.
using Resident16 = Tile<16, 128, 1, 4>;
using Resident32 = Tile<32, 128, 1, 4>;
using Resident64 = Tile<64, 128, 2, 4>;

#define RESIDENT_KERNELS(rows)                                                                                         \
  ELEMENT_KERNEL(resident_forward_pair_##rows, Resident##rows::THREADS, Product,                                       \
                 resident_product<ElementType, Resident##rows, false, Pair>(p));                                       \
  ELEMENT_KERNEL(resident_forward_general_##rows, Resident##rows::THREADS, Product,                                    \
                 resident_product<ElementType, Resident##rows, false, General>(p));                                    \
  ELEMENT_KERNEL(resident_dgrad_pair_##rows, Resident##rows::THREADS, Product,                                         \
                 resident_product<ElementType, Resident##rows, true, Pair>(p));                                        \
  ELEMENT_KERNEL(resident_dgrad_general_##rows, Resident##rows::THREADS, Product,                                      \
                 resident_product<ElementType, Resident##rows, true, General>(p));

RESIDENT_KERNELS(16)
RESIDENT_KERNELS(32)
RESIDENT_KERNELS(64)
