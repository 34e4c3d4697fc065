// Which calls the CUDA kernels cannot compute, and on which another backend does better; nothing where they can, or do
// best. The words name a cause.
#pragma once

#include "cpu/torch/ops.h"

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

namespace rl_kernels::cuda_ops {

using Reason = std::optional<std::string>;

// Types, numbers and sizes; not torch's switch for TF32. input_size: of a convolution's dgrad.
Reason why_not(const at::Tensor &activation, const Tensors &weights, const at::Tensor &coefficients,
               at::IntArrayRef input_size, const Geometry *geometry);
// x: of a wgrad, or undefined.
Reason worse(const at::Tensor &activation, const at::Tensor &x, const Tensors &weights, const Geometry *geometry);

// Whether torch's switches allow that float32 is multiplied as TF32; false where this torch cannot be asked.
bool allows_tf32(bool conv);

} // namespace rl_kernels::cuda_ops
