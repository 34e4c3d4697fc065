#include "whole_filter.h"

#include "describe.h"
#include "isa.h"
#include "threads.h"

#include <ATen/Functions.h>

#include <optional>
#include <tuple>

namespace rl_kernels {
namespace {

// Filters of few channels a group are small: up to this size one is mixed whole.
constexpr int64_t max_filter_bytes = 1 << 20;

// A filter whose rows lie as those of the recipe do.
at::Tensor empty_filter(const at::Tensor &weight) {
  at::DimVector sizes(weight.sizes());
  if (!has_channels_innermost(weight))
    return at::empty(sizes, weight.options());
  sizes.erase(sizes.begin() + 1);
  sizes.push_back(weight.size(1));
  return at::empty(sizes, weight.options()).movedim(-1, 1);
}

} // namespace

bool narrow_groups(const at::Tensor &activation, const at::Tensor &weight, const Geometry &geometry) {
  return geometry.groups > 1 && weight.size(0) / geometry.groups < (activation.scalar_type() == at::kDouble ? 8 : 16);
}

bool WholeFilter::serves(const at::Tensor &activation, const at::Tensor &weight, const Geometry &geometry) {
  return narrow_groups(activation, weight, geometry) && int64_t(weight.nbytes()) <= max_filter_bytes &&
         activation.scalar_type() == at::kFloat && activation.numel() != 0 && weight.numel() != 0;
}

WholeFilter::WholeFilter(const Tensors &weights, const at::Tensor &coefficients, const Biases &biases,
                         const Geometry &geometry)
    : geometry_(geometry), filter_(empty_filter(weights[0])) {
  const at::Tensor &weight = weights[0];
  if (biases)
    bias_ = at::empty({weight.size(0)}, weight.options());
  cpu::Conv problem = describe_conv(weight, weight, geometry);
  problem.recipe = describe_recipe(weights, coefficients, biases);
  problem.x.channels = weight.size(1) * geometry.groups, problem.y.channels = weight.size(0);
  problem.out = filter_.data_ptr();
  kernels().conv_mix(problem, biases ? bias_.data_ptr() : nullptr, threads_for(double(weight.numel())));
}

at::Tensor WholeFilter::forward(const at::Tensor &x) const {
  const std::optional<at::Tensor> bias = bias_.defined() ? std::optional(bias_) : std::nullopt;
  const std::vector<int64_t> output_padding(geometry_.stride.size(), 0);
  return at::convolution(x, filter_, bias, geometry_.stride, geometry_.padding, geometry_.dilation,
                         /*transposed=*/false, output_padding, geometry_.groups);
}

at::Tensor WholeFilter::dgrad(const at::Tensor &dy, const std::vector<int64_t> &input_size) const {
  std::vector<int64_t> output_padding;
  for (size_t d = 0; d < geometry_.stride.size(); ++d)
    output_padding.push_back(input_size[d + 2] -
                             ((dy.size(int64_t(d) + 2) - 1) * geometry_.stride[d] - 2 * geometry_.padding[d] +
                              geometry_.dilation[d] * (filter_.size(int64_t(d) + 2) - 1) + 1));
  return at::convolution(dy, filter_, std::nullopt, geometry_.stride, geometry_.padding, geometry_.dilation,
                         /*transposed=*/true, output_padding, geometry_.groups);
}

at::Tensor WholeFilter::wgrad(const at::Tensor &dy, const at::Tensor &x, const at::Tensor &weight,
                              const Geometry &geometry) {
  const at::Tensor like = empty_filter(weight);
  const std::vector<int64_t> output_padding(geometry.stride.size(), 0);
  const at::Tensor g = std::get<1>(at::convolution_backward(
      dy, x, like, std::nullopt, geometry.stride, geometry.padding, geometry.dilation, /*transposed=*/false,
      output_padding, geometry.groups, /*output_mask=*/{false, true, false}));
  return g.strides() == like.strides() ? g : like.copy_(g);
}

} // namespace rl_kernels
