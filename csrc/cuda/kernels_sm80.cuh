// The kernels that linear layers and convolutions have alike on sm_80 and later, in every configuration.
#pragma once

#include "elements.cuh"
#include "product.cuh"
#include "wgrad.cuh"

namespace rl_kernels {

// The configurations, as rl_kernels/backends/cuda/configs.py lists them: rows x columns, and warps over them.
using Large = Tile<128, 256, 4, 2>;  // the activation's tile is read once for 128 rows: shared memory binds least
using Medium = Tile<128, 128, 4, 1>; // two blocks fit a multiprocessor and hide each other's epilogue
using Small = Tile<64, 64, 2, 2>;    // few rows, columns, tokens or pixels
using Square = Tile<128, 128, 4, 2>; // of G: a row and a column are read for 128 products each

} // namespace rl_kernels

#define PRODUCTS(layer, Place, name, Shape)                                                                            \
  ELEMENT_KERNEL(layer##_forward_pair_##name, Shape::THREADS, Product,                                                 \
                 product<ElementType, Shape, Place, false, Pair>(p));                                                  \
  ELEMENT_KERNEL(layer##_forward_general_##name, Shape::THREADS, Product,                                              \
                 product<ElementType, Shape, Place, false, General>(p));                                               \
  ELEMENT_KERNEL(layer##_dgrad_pair_##name, Shape::THREADS, Product,                                                   \
                 product<ElementType, Shape, Place, true, Pair>(p));                                                   \
  ELEMENT_KERNEL(layer##_dgrad_general_##name, Shape::THREADS, Product,                                                \
                 product<ElementType, Shape, Place, true, General>(p));

#define WGRADS(layer, Place, name, Shape)                                                                              \
  ELEMENT_KERNEL(layer##_wgrad_##name, Shape::THREADS, Wgrad, wgrad<ElementType, Shape, Place>(p));                    \
  ELEMENT_KERNEL(layer##_wgrad_reduce_##name, Shape::THREADS, Wgrad, reduce_wgrad<ElementType, Shape, Place>(p));

// Of a layer's name, whose pixels lie as Place says.
#define LAYER_KERNELS(layer, Place)                                                                                    \
  PRODUCTS(layer, Place, 128x256, Large)                                                                               \
  PRODUCTS(layer, Place, 128x128, Medium)                                                                              \
  PRODUCTS(layer, Place, 64x64, Small)                                                                                 \
  ELEMENT_KERNEL(layer##_reduce, 256, ProductReduction, reduce_product<ElementType, Place>(p));                        \
  WGRADS(layer, Place, 128x128, Square)                                                                                \
  WGRADS(layer, Place, 64x64, Small)
