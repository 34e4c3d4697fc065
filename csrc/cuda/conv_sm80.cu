// Convolutions on sm_80 and later as implicit products: forward, dgrad (a phase of the stride at a time) and wgrad.
#include "elements.cuh"
#include "product.cuh"
#include "wgrad.cuh"

using namespace rl_kernels;

// The configurations, as rl_kernels/backends/cuda/configs.py lists them: rows x columns, and warps over them.
using Large = Tile<128, 256, 4, 2>;  // the pixels' tile is read once for 128 rows: shared memory binds least
using Medium = Tile<128, 128, 4, 1>; // two blocks fit a multiprocessor and hide each other's epilogue
using Small = Tile<64, 64, 2, 2>;    // few features or pixels
using Square = Tile<128, 128, 4, 2>; // a row and a column of G are read for 128 products each

#define PRODUCTS(name, Shape)                                                                                          \
  ELEMENT_KERNEL(conv_forward_pair_##name, Shape::THREADS, Product,                                                    \
                 product<ElementType, Shape, Pixels, false, Pair>(p));                                                 \
  ELEMENT_KERNEL(conv_forward_general_##name, Shape::THREADS, Product,                                                 \
                 product<ElementType, Shape, Pixels, false, General>(p));                                              \
  ELEMENT_KERNEL(conv_dgrad_pair_##name, Shape::THREADS, Product, product<ElementType, Shape, Pixels, true, Pair>(p)); \
  ELEMENT_KERNEL(conv_dgrad_general_##name, Shape::THREADS, Product,                                                   \
                 product<ElementType, Shape, Pixels, true, General>(p));

PRODUCTS(128x256, Large)
PRODUCTS(128x128, Medium)
PRODUCTS(64x64, Small)
ELEMENT_KERNEL(conv_reduce, 256, ProductReduction, reduce_product<ElementType, Pixels>(p));

#define WGRADS(name, Shape)                                                                                            \
  ELEMENT_KERNEL(conv_wgrad_##name, Shape::THREADS, Wgrad, wgrad<ElementType, Shape, Pixels>(p));                      \
  ELEMENT_KERNEL(conv_wgrad_reduce_##name, Shape::THREADS, Wgrad, reduce_wgrad<ElementType, Shape, Pixels>(p));

WGRADS(128x128, Square)
WGRADS(64x64, Small)
