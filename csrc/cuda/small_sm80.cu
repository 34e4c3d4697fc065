// Linear layers of at most 16 tokens on sm_80 and later: forward and dgrad.
#include "elements.cuh"
#include "small.cuh"

using namespace rl_kernels;

// A bound of twice the threads leaves 128 registers a thread, so that two blocks fit a multiprocessor.
template <int TOKENS, class Kind> constexpr int BLOCKS = TOKENS == 8 && Kind::IS_PAIR ? 2 : 1;

#define SMALL_KERNEL(name, tokens, transposed, Kind)                                                                   \
  ELEMENT_KERNEL(name, (SmallTile<ElementType, transposed>::THREADS * BLOCKS<tokens, Kind>), Product,                  \
                 small_product<ElementType, tokens, transposed, Kind>(p))
#define SMALL_KERNELS(tokens)                                                                                          \
  SMALL_KERNEL(small_forward_pair_##tokens, tokens, false, Pair);                                                      \
  SMALL_KERNEL(small_forward_general_##tokens, tokens, false, General);                                                \
  SMALL_KERNEL(small_dgrad_pair_##tokens, tokens, true, Pair);                                                         \
  SMALL_KERNEL(small_dgrad_general_##tokens, tokens, true, General);

SMALL_KERNELS(8)
SMALL_KERNELS(16)
