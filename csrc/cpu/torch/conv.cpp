#include "describe.h"
#include "isa.h"
#include "ops.h"
#include "threads.h"
#include "whole_filter.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace rl_kernels {
namespace {

cpu::Volume volume(const at::Tensor &tensor) {
  cpu::Volume result{tensor.size(1), {1, 1, 1}, tensor.stride(0), tensor.stride(1), {0, 0, 0}};
  const int64_t spatial = tensor.dim() - 2;
  for (int64_t d = 0; d < spatial; ++d) {
    result.size[3 - spatial + d] = tensor.size(2 + d);
    result.stride[3 - spatial + d] = tensor.stride(2 + d);
  }
  return result;
}

// The same volume as one line of pixels, where its lines follow one another: what a pointwise convolution may do.
cpu::Volume flattened(cpu::Volume volume) {
  const bool follows = (volume.size[1] == 1 || volume.stride[1] == volume.size[2] * volume.stride[2]) &&
                       (volume.size[0] == 1 || volume.stride[0] == volume.size[1] * volume.size[2] * volume.stride[2]);
  return follows ? cpu::Volume{volume.channels,
                               {1, 1, volume.size[0] * volume.size[1] * volume.size[2]},
                               volume.batch_stride,
                               volume.channel_stride,
                               {0, 0, volume.stride[2]}}
                 : volume;
}

std::vector<int64_t> output_size(const at::Tensor &x, const at::Tensor &weight, const Geometry &geometry) {
  std::vector<int64_t> sizes{x.size(0), weight.size(0)};
  for (size_t d = 0; d < geometry.stride.size(); ++d) {
    const int64_t extent = geometry.dilation[d] * (weight.size(2 + int64_t(d)) - 1) + 1;
    sizes.push_back((x.size(2 + int64_t(d)) + 2 * geometry.padding[d] - extent) / geometry.stride[d] + 1);
  }
  return sizes;
}

double multiplications(const at::Tensor &y, const at::Tensor &weight) {
  return weight.size(0) ? double(y.numel()) * double(weight.numel()) / double(weight.size(0)) : 0;
}

// A tensor (batch, channels, *spatial) as (pixels, channels), where that is a view.
std::optional<at::Tensor> as_pixels(const at::Tensor &tensor) {
  if (tensor.stride(1) != 1 && tensor.size(1) != 1)
    return std::nullopt;
  int64_t pixel = -1, expected = 0;
  for (int64_t i = tensor.dim() - 1; i >= 1; --i) {
    const int64_t dim = i == 1 ? 0 : i; // the innermost spatial dimension first, the batch last
    if (tensor.size(dim) == 1)
      continue;
    if (pixel < 0)
      pixel = expected = tensor.stride(dim);
    else if (tensor.stride(dim) != expected)
      return std::nullopt;
    expected *= tensor.size(dim);
  }
  const int64_t channels = tensor.size(1);
  return tensor.as_strided({tensor.numel() / channels, channels}, {pixel < 0 ? channels : pixel, 1});
}

// Describes x and y, or their gradients.
void set_volumes(cpu::Conv &problem, const at::Tensor &x, const at::Tensor &y, bool pointwise) {
  problem.x = volume(x), problem.y = volume(y);
  if (!pointwise)
    return;
  const cpu::Volume flat_x = flattened(problem.x), flat_y = flattened(problem.y);
  if (flat_x.size[2] == flat_y.size[2])
    problem.x = flat_x, problem.y = flat_y;
}

// A convolution of kernel 1 and stride 1 is a linear layer over pixels.
bool is_pointwise(const at::Tensor &weight, const Geometry &geometry) {
  if (geometry.groups != 1)
    return false;
  for (size_t d = 0; d < geometry.stride.size(); ++d)
    if (weight.size(2 + int64_t(d)) != 1 || geometry.stride[d] != 1 || geometry.padding[d] != 0)
      return false;
  return true;
}

} // namespace

at::MemoryFormat memory_format(const at::Tensor &activation, const Tensors &weights) {
  const auto format = activation.suggest_memory_format();
  return format != at::MemoryFormat::Contiguous ? format : weights[0].suggest_memory_format();
}

at::Tensor mixed_conv(const at::Tensor &x, const Tensors &weights, const at::Tensor &coefficients, const Biases &biases,
                      const Geometry &geometry) {
  const auto &weight = weights[0];
  const at::Tensor read = as_read(coefficients, weight);
  const auto format = memory_format(x, weights);
  if (WholeFilter::serves(x, weight, geometry))
    return WholeFilter(weights, read, biases, geometry).forward(x).contiguous(format);
  at::Tensor y = at::empty(output_size(x, weight, geometry), x.options().memory_format(format));
  if (y.numel() == 0)
    return y;
  const cpu::Team threads = threads_for(multiplications(y, weight));
  if (is_pointwise(weight, geometry)) {
    const auto pixels = as_pixels(x), out = as_pixels(y);
    if (pixels && out && out->is_contiguous()) {
      cpu::Linear problem = describe_linear(*pixels, weights, read, biases);
      problem.x = pixels->data_ptr();
      problem.x_stride = pixels->stride(0);
      problem.out = y.data_ptr();
      kernels().linear_forward(problem, threads);
      return y;
    }
  }
  cpu::Conv problem = describe_conv(x, weight, geometry);
  problem.recipe = describe_recipe(weights, read, biases);
  set_volumes(problem, x, y, is_pointwise(weight, geometry));
  problem.input = x.data_ptr();
  problem.out = y.data_ptr();
  kernels().conv_forward(problem, threads);
  return y;
}

at::Tensor mixed_conv_dgrad(const at::Tensor &dy, const Tensors &weights, const at::Tensor &coefficients,
                            const std::vector<int64_t> &input_size, const Geometry &geometry) {
  const auto &weight = weights[0];
  const at::Tensor read = as_read(coefficients, weight);
  const auto format = memory_format(dy, weights);
  if (WholeFilter::serves(dy, weight, geometry))
    return WholeFilter(weights, read, std::nullopt, geometry).dgrad(dy, input_size).contiguous(format);
  at::Tensor dx = at::empty(input_size, dy.options().memory_format(format));
  if (dx.numel() == 0)
    return dx;
  if (dy.numel() == 0)
    return dx.zero_();
  const cpu::Team threads = threads_for(multiplications(dy, weight));
  if (is_pointwise(weight, geometry)) {
    const auto pixels = as_pixels(dy), out = as_pixels(dx);
    if (pixels && out && out->is_contiguous()) {
      cpu::Linear problem = describe_linear(*pixels, weights, read, std::nullopt);
      problem.dy = pixels->data_ptr();
      problem.dy_stride = pixels->stride(0);
      problem.out = dx.data_ptr();
      kernels().linear_dgrad(problem, threads);
      return dx;
    }
  }
  cpu::Conv problem = describe_conv(dy, weight, geometry);
  problem.recipe = describe_recipe(weights, read, std::nullopt);
  set_volumes(problem, dx, dy, is_pointwise(weight, geometry));
  problem.input = dy.data_ptr();
  problem.out = dx.data_ptr();
  kernels().conv_dgrad(problem, threads);
  return dx;
}

Gradients mixed_conv_wgrad(const at::Tensor &dy, const at::Tensor &x, const Tensors &weights,
                           const at::Tensor &coefficients, const Biases &biases, const Wanted &wanted,
                           const Geometry &geometry) {
  const auto &weight = weights[0];
  Gradients outputs;
  const cpu::WgradOutputs gradients =
      allocate_gradients(outputs, weights, coefficients, biases, wanted, memory_format(x, weights));
  if (weight.numel() == 0 || dy.numel() == 0) {
    auto &[dweights, dcoefficients, dbiases] = outputs;
    for (auto *list : {&dweights, &dbiases})
      for (auto &gradient : *list)
        gradient.zero_();
    dcoefficients.zero_();
    // Without input channels the biases' gradients remain.
    if (dy.numel() == 0 || !biases)
      return outputs;
  }
  const at::Tensor read = as_read(coefficients, weight);
  const cpu::Team threads = threads_for(multiplications(dy, weight));
  if (weight.numel() != 0 && is_pointwise(weight, geometry)) {
    const auto pixels = as_pixels(x), pixels_dy = as_pixels(dy);
    if (pixels && pixels_dy) {
      cpu::Linear problem = describe_linear(*pixels, weights, read, biases);
      problem.gradients = gradients;
      problem.x = pixels->data_ptr();
      problem.x_stride = pixels->stride(0);
      problem.dy = pixels_dy->data_ptr();
      problem.dy_stride = pixels_dy->stride(0);
      const at::Tensor dots = zero_dots(problem, threads.threads);
      problem.dots = dots.data_ptr<double>();
      const at::Tensor columns = zero_columns(problem, threads.threads);
      problem.columns = columns.data_ptr<double>();
      kernels().linear_wgrad(problem, threads);
      return outputs;
    }
  }
  cpu::Conv problem = describe_conv(x, weight, geometry);
  problem.recipe = describe_recipe(weights, read, biases);
  problem.gradients = gradients;
  set_volumes(problem, x, dy, is_pointwise(weight, geometry));
  problem.input = x.data_ptr();
  problem.dy = dy.data_ptr();
  const at::Tensor dots = at::zeros({(cpu::dot_count(problem.recipe) + 1) * problem.y.channels}, at::kDouble);
  problem.dots = dots.data_ptr<double>();
  const at::Tensor columns =
      zero_columns(problem.recipe, gradients, threads.threads, weight.numel() / std::max<int64_t>(weight.size(0), 1));
  problem.columns = columns.data_ptr<double>();
  at::Tensor product, partials;
  if (WholeFilter::serves(x, weight, geometry)) {
    product = WholeFilter::wgrad(dy, x, weight, geometry);
    problem.product = product.data_ptr();
  } else {
    partials = at::empty({kernels().conv_partials(problem, threads.threads)}, at::kByte);
    problem.partials = partials.data_ptr();
  }
  kernels().conv_wgrad(problem, threads);
  return outputs;
}

} // namespace rl_kernels
