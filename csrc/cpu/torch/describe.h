// torch's values as the kernels' problems: raw pointers, sizes and strides.
#pragma once

#include "cpu/kernels/problem.h"
#include "ops.h"

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace rl_kernels {

cpu::Type type_of(const at::Tensor &tensor);

// The strides of (out, in, taps) of a weight; false where the taps cannot be walked with one stride.
bool weight_strides(const at::Tensor &weight, int64_t &out, int64_t &in, int64_t &tap);

// Whether the rows of a weight, as of a recipe's first source, have their input channels innermost.
bool has_channels_innermost(const at::Tensor &weight);

// Outer coefficients as the kernels read them: the elements of right side by side, in the order in which the rows of
// `weight`, the first source, lie. A copy where they come otherwise; other coefficients are as they come.
at::Tensor as_read(const at::Tensor &coefficients, const at::Tensor &weight);

// Of the type in which a recipe mixes.
size_t element_bytes(const cpu::Recipe &recipe);

// The coefficients are as_read(), here and below.
cpu::Recipe describe_recipe(const Tensors &weights, const at::Tensor &coefficients, const Biases &biases);

// A linear layer on `rows`, which are x or dy; their pointers are the caller's to set.
cpu::Linear describe_linear(const at::Tensor &rows, const Tensors &weights, const at::Tensor &coefficients,
                            const Biases &biases);

// A convolution of an activation's type and batch; its recipe, volumes and pointers are the caller's to set.
cpu::Conv describe_conv(const at::Tensor &activation, const at::Tensor &weight, const Geometry &geometry);

// The outputs of a wgrad, allocated; what is not wanted is empty. Returns the pointers for the kernels.
cpu::WgradOutputs allocate_gradients(Gradients &outputs, const Tensors &weights, const at::Tensor &coefficients,
                                     const Biases &biases, const Wanted &wanted, at::MemoryFormat format);

// Where wgrad leaves its shares of <G, W_j>, and the sums of dy.
at::Tensor zero_dots(const cpu::Linear &problem, int threads);

// Where so many shares of wgrad sum right's gradient, over rows of `row` elements; without elements where coefficients
// are not Outer ones, or want no gradient.
at::Tensor zero_columns(const cpu::Recipe &recipe, const cpu::WgradOutputs &gradients, int64_t shares, int64_t row);
at::Tensor zero_columns(const cpu::Linear &problem, int threads);

} // namespace rl_kernels
