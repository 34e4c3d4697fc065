// The ops on CUDA tensors, as their schemas declare them, by the kernels of rl_kernels/_cuda.so.
//
// Arguments are those of the schemas and have passed their checks. A function allocates its outputs, describes the call
// in addresses, sizes and strides, and queues its kernels.
#pragma once

#include "session.h"

#include "cpu/torch/ops.h"

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace rl_kernels::cuda_ops {

// Tensors to add the sources' gradients to; undefined for a source whose gradient is returned.
using Into = std::optional<Tensors>;

struct Mixture {
  const Tensors &weights;
  const at::Tensor &coefficients;
  const Biases &biases;
};

// A convolution's with a geometry, a linear layer's without.
at::Tensor forward(const at::Tensor &x, const Mixture &recipe, const Geometry *geometry, const Settings &settings = {});
// input_size: of a convolution.
at::Tensor dgrad(const at::Tensor &dy, const Mixture &recipe, at::IntArrayRef input_size, const Geometry *geometry,
                 const Settings &settings = {});
Gradients wgrad(const at::Tensor &dy, const at::Tensor &x, const Mixture &recipe, const Wanted &wanted,
                const Geometry *geometry, const Into &into = std::nullopt, const Settings &settings = {});

// The product of forward, or transposed, of dgrad, written to `out`.
void multiply(const char *op, const at::Tensor &out, const at::Tensor &activation, const Mixture &recipe,
              bool transposed, const Geometry *geometry, const Settings &settings);

} // namespace rl_kernels::cuda_ops
