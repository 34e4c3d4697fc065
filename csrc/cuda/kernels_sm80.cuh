// The kernels that linear layers and convolutions have alike on sm_80 and later, in every configuration.
#pragma once

#include "product.cuh"
#include "types.cuh"
#include "wgrad.cuh"

namespace rl_kernels::cuda {

// Rows x columns, and warps over them; rl_kernels/backends/cuda/configs.py chooses among them by their names.
using Tile128x256 = Tile<128, 256, 4, 2>; // the activation's tile is read once for 128 rows: shared memory binds least
using Tile128x128 = Tile<128, 128, 4, 1>; // two blocks fit a multiprocessor and hide each other's epilogue
using Tile64x64 = Tile<64, 64, 2, 2>;     // few rows, columns, tokens or pixels
using WgradTile128x128 = Tile<128, 128, 4, 2>; // a row and a column of G are read for 128 products each
using WgradTile64x64 = Tile64x64;

} // namespace rl_kernels::cuda

#define PRODUCT_KERNELS(layer, Addressing, size)                                                                       \
  ELEMENT_KERNEL(layer##_forward_pair_##size, ProductKernel<ElementType, Tile##size, Addressing, false, Pair>);        \
  ELEMENT_KERNEL(layer##_forward_general_##size, ProductKernel<ElementType, Tile##size, Addressing, false, General>);  \
  ELEMENT_KERNEL(layer##_dgrad_pair_##size, ProductKernel<ElementType, Tile##size, Addressing, true, Pair>);           \
  ELEMENT_KERNEL(layer##_dgrad_general_##size, ProductKernel<ElementType, Tile##size, Addressing, true, General>);

#define WGRAD_KERNELS(layer, Addressing, size)                                                                         \
  ELEMENT_KERNEL(layer##_wgrad_##size, WgradKernel<ElementType, WgradTile##size, Addressing>);                         \
  ELEMENT_KERNEL(layer##_wgrad_reduce_##size, WgradReductionKernel<ElementType, WgradTile##size, Addressing>);

// Those of a layer, in whose tensors elements lie as Addressing says.
#define LAYER_KERNELS(layer, Addressing)                                                                               \
  PRODUCT_KERNELS(layer, Addressing, 128x256)                                                                          \
  PRODUCT_KERNELS(layer, Addressing, 128x128)                                                                          \
  PRODUCT_KERNELS(layer, Addressing, 64x64)                                                                            \
  ELEMENT_KERNEL(layer##_reduce, ProductReductionKernel<ElementType, Addressing>);                                     \
  WGRAD_KERNELS(layer, Addressing, 128x128)                                                                            \
  WGRAD_KERNELS(layer, Addressing, 64x64)
