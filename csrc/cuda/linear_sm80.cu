// Linear layers on sm_80 and later: forward, dgrad and wgrad.
#include "elements.cuh"
#include "product.cuh"
#include "wgrad.cuh"

using namespace rl_kernels;

// The configurations, as rl_kernels/backends/cuda/configs.py lists them: rows x columns, and warps over them.
using Large = Tile<128, 256, 4, 2>;  // the activation's tile is read once for 128 rows: shared memory binds least
using Medium = Tile<128, 128, 4, 1>; // two blocks fit a multiprocessor and hide each other's epilogue
using Small = Tile<64, 64, 2, 2>;    // few rows or tokens

#define PRODUCTS(name, Shape)                                                                                          \
  ELEMENT_KERNEL(linear_forward_pair_##name, Shape::THREADS, Product,                                                  \
                 product<ElementType, Shape, Rows, false, Pair>(p));                                                   \
  ELEMENT_KERNEL(linear_forward_general_##name, Shape::THREADS, Product,                                               \
                 product<ElementType, Shape, Rows, false, General>(p));                                                \
  ELEMENT_KERNEL(linear_dgrad_pair_##name, Shape::THREADS, Product, product<ElementType, Shape, Rows, true, Pair>(p)); \
  ELEMENT_KERNEL(linear_dgrad_general_##name, Shape::THREADS, Product,                                                 \
                 product<ElementType, Shape, Rows, true, General>(p));

PRODUCTS(128x256, Large)
PRODUCTS(128x128, Medium)
PRODUCTS(64x64, Small)
ELEMENT_KERNEL(linear_reduce, 256, ProductReduction, reduce_product<ElementType, Rows>(p));

using Square = Tile<128, 128, 4, 2>; // a row and a column are read for 128 products each
#define WGRADS(name, Shape)                                                                                            \
  ELEMENT_KERNEL(linear_wgrad_##name, Shape::THREADS, Wgrad, wgrad<ElementType, Shape, Rows>(p));                      \
  ELEMENT_KERNEL(linear_wgrad_reduce_##name, Shape::THREADS, Wgrad, reduce_wgrad<ElementType, Shape, Rows>(p));

WGRADS(128x128, Square)
WGRADS(64x64, Small) // few rows, columns or tokens
