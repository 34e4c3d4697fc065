// The element type that a file of kernels is compiled for, by RL_ELEMENT, and its name in the kernels' names.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <type_traits>

#include "registry.h"

#if RL_ELEMENT == 0
using ElementType = __half;
#define ELEMENT_KERNEL(name, threads, Params, ...) RL_KERNEL(name##_f16, threads, Params, __VA_ARGS__)
#elif RL_ELEMENT == 1
using ElementType = __nv_bfloat16;
#define ELEMENT_KERNEL(name, threads, Params, ...) RL_KERNEL(name##_bf16, threads, Params, __VA_ARGS__)
#else
using ElementType = float; // multiplied as tf32
#define ELEMENT_KERNEL(name, threads, Params, ...) RL_KERNEL(name##_tf32, threads, Params, __VA_ARGS__)
#endif
