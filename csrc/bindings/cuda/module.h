// What Python sees of the CUDA ops.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace rl_kernels::cuda_ops {

void define(pybind11::module_ &module);

} // namespace rl_kernels::cuda_ops
