// The element type that a file of kernels is compiled for, by RL_ELEMENT, and its name in the kernels' names.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <type_traits>

#include "registry.h"

namespace rl_kernels::cuda {

#if RL_ELEMENT == 0
using ElementType = __half;
#define ELEMENT_KERNEL(name, ...) RL_KERNEL(name##_f16, __VA_ARGS__)
#elif RL_ELEMENT == 1
using ElementType = __nv_bfloat16;
#define ELEMENT_KERNEL(name, ...) RL_KERNEL(name##_bf16, __VA_ARGS__)
#else
using ElementType = float; // multiplied as tf32
#define ELEMENT_KERNEL(name, ...) RL_KERNEL(name##_tf32, __VA_ARGS__)
#endif

} // namespace rl_kernels::cuda
