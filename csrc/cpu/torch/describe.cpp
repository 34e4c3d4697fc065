#include "describe.h"

#include "huge_pages.h"

#include <ATen/Functions.h>

namespace rl_kernels {

cpu::Type type_of(const at::Tensor &tensor) {
  switch (tensor.scalar_type()) {
  case at::kFloat:
    return cpu::Type::float32;
  case at::kDouble:
    return cpu::Type::float64;
  case at::kBFloat16:
    return cpu::Type::bfloat16;
  default:
    return cpu::Type::float16;
  }
}

bool weight_strides(const at::Tensor &weight, int64_t &out, int64_t &in, int64_t &tap) {
  const auto sizes = weight.sizes();
  const auto strides = weight.strides();
  out = strides[0], in = strides[1], tap = 1;
  bool first = true;
  int64_t expected = 0;
  for (int64_t dim = weight.dim() - 1; dim >= 2; --dim) {
    if (sizes[dim] == 1)
      continue;
    if (first)
      tap = expected = strides[dim], first = false;
    else if (strides[dim] != expected)
      return false;
    expected *= sizes[dim];
  }
  return true;
}

bool has_channels_innermost(const at::Tensor &weight) {
  int64_t out, in, tap;
  weight_strides(weight, out, in, tap);
  const int64_t channels = weight.size(1);
  return in == 1 && tap == channels && weight.numel() != weight.size(0) * channels;
}

at::Tensor as_read(const at::Tensor &coefficients, const at::Tensor &weight) {
  if (coefficients.dim() != 3)
    return coefficients;
  if (!has_channels_innermost(weight))
    return coefficients.stride(2) == 1 ? coefficients : coefficients.contiguous();
  const int64_t out = weight.size(0), columns = coefficients.size(2) - out;
  const at::Tensor right = coefficients.narrow(2, out, columns).unflatten(2, {weight.size(1), -1});
  return at::cat({coefficients.narrow(2, 0, out), right.transpose(2, 3).flatten(2)}, 2);
}

size_t element_bytes(const cpu::Recipe &recipe) { return recipe.type == cpu::Type::float64 ? 8 : 4; }

cpu::Recipe describe_recipe(const Tensors &weights, const at::Tensor &coefficients, const Biases &biases) {
  cpu::Recipe recipe{};
  recipe.sources = int(weights.size());
  recipe.type = type_of(weights[0]);
  for (size_t j = 0; j < weights.size(); ++j) {
    recipe.weight[j] = weights[j].data_ptr();
    weight_strides(weights[j], recipe.out_stride[j], recipe.in_stride[j], recipe.tap_stride[j]);
    if (biases) {
      recipe.bias[j] = (*biases)[j].data_ptr();
      recipe.bias_stride[j] = (*biases)[j].stride(0);
    }
  }
  recipe.coefficients = coefficients.data_ptr();
  recipe.source_stride = coefficients.stride(0);
  recipe.channel_stride = coefficients.dim() == 2 ? coefficients.stride(1) : 0;
  if (coefficients.dim() == 3) {
    recipe.channel_stride = 1;
    recipe.rank = coefficients.size(1), recipe.rank_stride = coefficients.stride(1);
    recipe.right = static_cast<const char *>(coefficients.data_ptr()) + weights[0].size(0) * coefficients.itemsize();
  }
  return recipe;
}

cpu::Linear describe_linear(const at::Tensor &rows, const Tensors &weights, const at::Tensor &coefficients,
                            const Biases &biases) {
  cpu::Linear problem{};
  problem.type = type_of(rows);
  problem.m = rows.size(0), problem.n = weights[0].size(0), problem.k = weights[0].size(1);
  problem.recipe = describe_recipe(weights, coefficients, biases);
  return problem;
}

cpu::Conv describe_conv(const at::Tensor &activation, const at::Tensor &weight, const Geometry &geometry) {
  cpu::Conv problem{};
  problem.type = type_of(activation);
  problem.batch = activation.size(0);
  problem.groups = geometry.groups;
  const size_t spatial = geometry.stride.size();
  for (size_t d = 0; d < 3; ++d) {
    const bool present = d + spatial >= 3;
    const size_t i = d + spatial - 3;
    problem.kernel[d] = present ? weight.size(2 + int64_t(i)) : 1;
    problem.stride[d] = present ? geometry.stride[i] : 1;
    problem.padding[d] = present ? geometry.padding[i] : 0;
    problem.dilation[d] = present ? geometry.dilation[i] : 1;
  }
  return problem;
}

cpu::WgradOutputs allocate_gradients(Gradients &outputs, const Tensors &weights, const at::Tensor &coefficients,
                                     const Biases &biases, const Wanted &wanted, at::MemoryFormat format) {
  auto &[dweights, dcoefficients, dbiases] = outputs;
  cpu::WgradOutputs gradients{};
  gradients.in_stride = gradients.tap_stride = 1;
  const auto nothing = [](const at::Tensor &like) { return at::empty({0}, like.options()); };
  for (size_t j = 0; j < weights.size(); ++j) {
    if (!wanted.weights[j]) {
      dweights.push_back(nothing(weights[j]));
      continue;
    }
    dweights.push_back(empty_gradient(weights[j], format));
    gradients.weight[j] = dweights.back().data_ptr();
    weight_strides(dweights.back(), gradients.out_stride, gradients.in_stride, gradients.tap_stride);
  }
  dcoefficients = wanted.coefficients ? at::empty(coefficients.sizes(), coefficients.options()) : nothing(coefficients);
  gradients.coefficients = wanted.coefficients ? dcoefficients.data_ptr() : nullptr;
  gradients.per_channel = coefficients.dim() == 2;
  if (biases)
    for (size_t j = 0; j < biases->size(); ++j) {
      const auto &bias = (*biases)[j];
      dbiases.push_back(wanted.biases[j] ? at::empty(bias.sizes(), bias.options()) : nothing(bias));
      gradients.bias[j] = wanted.biases[j] ? dbiases.back().data_ptr() : nullptr;
    }
  return gradients;
}

at::Tensor zero_dots(const cpu::Linear &problem, int threads) {
  // Strips a thread are of the pass that also makes dx, which has no Outer coefficients.
  const int strips = problem.recipe.rank > 0 ? 0 : threads;
  const size_t bytes = element_bytes(problem.recipe);
  return at::zeros({cpu::linear_dots(problem.n, problem.k, cpu::dot_count(problem.recipe), bytes, strips)},
                   at::kDouble);
}

at::Tensor zero_columns(const cpu::Recipe &recipe, const cpu::WgradOutputs &gradients, int64_t shares, int64_t row) {
  const bool wanted = recipe.rank > 0 && gradients.coefficients != nullptr;
  return at::zeros({wanted ? shares * cpu::dot_count(recipe) * row : 0}, at::kDouble);
}

at::Tensor zero_columns(const cpu::Linear &problem, int threads) {
  const int64_t shares = cpu::linear_shares(problem.n, problem.k, element_bytes(problem.recipe), threads);
  return zero_columns(problem.recipe, problem.gradients, shares, problem.k);
}

} // namespace rl_kernels
