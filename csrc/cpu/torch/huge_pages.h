// Memory for the gradients of large weights.
#pragma once

#include <ATen/core/Tensor.h>

namespace rl_kernels {

// An empty tensor like `weight`.
at::Tensor empty_gradient(const at::Tensor &weight, at::MemoryFormat format);

} // namespace rl_kernels
