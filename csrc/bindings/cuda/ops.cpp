#include "ops.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <utility>

namespace rl_kernels::cuda_ops {
namespace {

using at::Tensor;
using cuda::View;

View view_of(const Tensor &tensor) {
  View view = {};
  view.address = tensor.numel() == 0 ? 0 : reinterpret_cast<uint64_t>(tensor.const_data_ptr());
  view.bytes = static_cast<int32_t>(tensor.element_size());
  view.dims = static_cast<int32_t>(tensor.dim());
  std::copy_n(tensor.sizes().begin(), view.dims, view.sizes);
  std::copy_n(tensor.strides().begin(), view.dims, view.strides);
  return view;
}

// (*, features) as (rows, features); `kept` owns the copy, where it takes one.
View rows_of(const Tensor &tensor, Tensor &kept) {
  if (tensor.dim() == 2)
    return view_of(tensor);
  const int64_t features = tensor.size(-1);
  int64_t rows = 1;
  for (const int64_t size : tensor.sizes().slice(0, tensor.dim() - 1))
    rows *= size;
  if (!tensor.is_contiguous()) {
    kept = tensor.reshape({rows, features});
    return view_of(kept);
  }
  const auto address = tensor.numel() == 0 ? 0 : reinterpret_cast<uint64_t>(tensor.const_data_ptr());
  return {address, static_cast<int32_t>(tensor.element_size()), 2, {rows, features}, {features, 1}};
}

cuda::ElementName element_of(const Tensor &tensor) {
  switch (tensor.scalar_type()) {
  case at::kHalf:
    return cuda::ElementName::f16;
  case at::kBFloat16:
    return cuda::ElementName::bf16;
  default:
    return cuda::ElementName::tf32;
  }
}

// All but the activation, the other operand and the outputs.
cuda::Call call_of(cuda::Op op, const Tensor &activation, const Mixture &recipe, const Geometry *geometry) {
  cuda::Call call = {};
  call.op = op;
  call.element = element_of(activation);
  call.sources = static_cast<int32_t>(recipe.weights.size());
  for (size_t j = 0; j < recipe.weights.size(); ++j)
    call.weights[j] = view_of(recipe.weights[j]);
  call.coefficients = view_of(recipe.coefficients);
  call.biased = recipe.biases.has_value();
  if (recipe.biases)
    for (size_t j = 0; j < recipe.biases->size(); ++j)
      call.biases[j] = view_of((*recipe.biases)[j]);
  call.groups = 1;
  if (geometry != nullptr) {
    call.spatial = static_cast<int32_t>(geometry->stride.size());
    call.groups = static_cast<int32_t>(geometry->groups);
    std::copy(geometry->stride.begin(), geometry->stride.end(), call.stride);
    std::copy(geometry->padding.begin(), geometry->padding.end(), call.padding);
    std::copy(geometry->dilation.begin(), geometry->dilation.end(), call.dilation);
  }
  return call;
}

std::vector<Tensor> operands_of(const Tensor &activation, const Mixture &recipe) {
  std::vector<Tensor> operands{activation};
  operands.reserve(2 + recipe.weights.size());
  operands.insert(operands.end(), recipe.weights.begin(), recipe.weights.end());
  return operands;
}

// Those that are only recorded: they are no part of an error's words.
void note(Session &session, const Mixture &recipe) {
  session.writes(recipe.coefficients);
  if (recipe.biases)
    for (const auto &bias : *recipe.biases)
      session.writes(bias);
}

std::vector<int64_t> output_size(const Tensor &x, const Tensor &weight, const Geometry &geometry) {
  std::vector<int64_t> size{x.size(0), weight.size(0)};
  for (size_t d = 0; d < geometry.stride.size(); ++d) {
    const auto at = static_cast<int64_t>(d) + 2;
    const int64_t reach = geometry.dilation[d] * (weight.size(at) - 1);
    size.push_back((x.size(at) + 2 * geometry.padding[d] - reach - 1) / geometry.stride[d] + 1);
  }
  return size;
}

// What a wgrad returns, and where the kernels write it.
Gradients allocate(const Tensor &x, const Mixture &recipe, const Wanted &wanted, bool conv, const Into &into) {
  Gradients outputs;
  auto &[weights, coefficients, biases] = outputs;
  const auto format = conv ? memory_format(x, recipe.weights) : at::MemoryFormat::Contiguous;
  for (size_t j = 0; j < recipe.weights.size(); ++j) {
    const Tensor &weight = recipe.weights[j];
    if (into && (*into)[j].defined())
      weights.push_back((*into)[j]);
    else if (wanted.weights[j])
      weights.push_back(at::empty(weight.sizes(), weight.options().memory_format(format).requires_grad(false)));
    else
      weights.push_back(at::empty({0}, weight.options().requires_grad(false)));
  }
  const auto options = recipe.coefficients.options().requires_grad(false);
  coefficients = wanted.coefficients ? at::empty(recipe.coefficients.sizes(), options) : at::empty({0}, options);
  for (size_t j = 0; j < wanted.biases.size() && recipe.biases; ++j) {
    const Tensor &bias = (*recipe.biases)[j];
    biases.push_back(at::empty({wanted.biases[j] ? bias.size(0) : 0}, bias.options().requires_grad(false)));
  }
  return outputs;
}

} // namespace

void multiply(const char *op, const Tensor &out, const Tensor &activation, const Mixture &recipe, bool transposed,
              const Geometry *geometry, const Settings &settings) {
  cuda::Call call = call_of(transposed ? cuda::Op::dgrad : cuda::Op::forward, activation, recipe, geometry);
  Tensor kept[2];
  call.activation = geometry == nullptr ? rows_of(activation, kept[0]) : view_of(activation);
  call.out = geometry == nullptr ? rows_of(out, kept[1]) : view_of(out);
  Session session(op, operands_of(activation, recipe));
  note(session, recipe);
  session.writes(kept[0].defined() ? kept[0] : activation);
  session.writes(out);
  session.run(call, settings);
}

Tensor forward(const Tensor &x, const Mixture &recipe, const Geometry *geometry, const Settings &settings) {
  const Tensor &weight = recipe.weights[0];
  Tensor y;
  if (geometry == nullptr) {
    auto size = x.sizes().vec();
    size.back() = weight.size(0);
    y = at::empty(size, x.options().requires_grad(false));
  } else {
    const auto format = memory_format(x, recipe.weights);
    y = at::empty(output_size(x, weight, *geometry), x.options().memory_format(format).requires_grad(false));
  }
  if (y.numel() > 0)
    multiply(geometry ? "mixed_conv" : "mixed_linear", y, x, recipe, false, geometry, settings);
  return y;
}

Tensor dgrad(const Tensor &dy, const Mixture &recipe, at::IntArrayRef input_size, const Geometry *geometry,
             const Settings &settings) {
  Tensor dx;
  if (geometry == nullptr) {
    auto size = dy.sizes().vec();
    size.back() = recipe.weights[0].size(1);
    dx = at::empty(size, dy.options().requires_grad(false));
  } else
    dx = at::empty(input_size, dy.options().memory_format(memory_format(dy, recipe.weights)).requires_grad(false));
  if (dx.numel() > 0)
    multiply(geometry ? "mixed_conv_dgrad" : "mixed_linear_dgrad", dx, dy, recipe, true, geometry, settings);
  return dx;
}

Gradients wgrad(const Tensor &dy, const Tensor &x, const Mixture &recipe, const Wanted &wanted,
                const Geometry *geometry, const Into &into, const Settings &settings) {
  const bool conv = geometry != nullptr;
  Gradients outputs = allocate(x, recipe, wanted, conv, into);
  auto &[weights, coefficients, biases] = outputs;
  cuda::Call call = call_of(cuda::Op::wgrad, dy, recipe, geometry);
  Tensor kept[2];
  call.activation = conv ? view_of(dy) : rows_of(dy, kept[0]);
  call.x = conv ? view_of(x) : rows_of(x, kept[1]);
  auto operands = operands_of(dy, recipe);
  operands.insert(operands.begin() + 1, x);
  Session session(conv ? "mixed_conv_wgrad" : "mixed_linear_wgrad", std::move(operands));
  note(session, recipe);
  for (const auto &tensor : kept)
    if (tensor.defined())
      session.writes(tensor);
  for (size_t j = 0; j < weights.size(); ++j) {
    if (into && (*into)[j].defined())
      call.added |= 1 << j;
    if (!wanted.weights[j])
      continue;
    call.wants_weights |= 1 << j;
    call.weight_gradients[j] = view_of(weights[j]);
    session.writes(weights[j]);
  }
  for (size_t j = 0; j < biases.size(); ++j)
    if (wanted.biases[j]) {
      call.wants_biases |= 1 << j;
      call.bias_gradients[j] = view_of(biases[j]);
      session.writes(biases[j]);
    }
  call.wants_coefficients = wanted.coefficients;
  if (wanted.coefficients) {
    call.coefficient_gradients = view_of(coefficients);
    session.writes(coefficients);
  }
  if (call.wants_weights != 0 || call.wants_biases != 0 || wanted.coefficients)
    session.run(call, settings);
  return outputs;
}

} // namespace rl_kernels::cuda_ops
