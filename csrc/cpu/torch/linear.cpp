#include "describe.h"
#include "isa.h"
#include "ops.h"
#include "threads.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <optional>
#include <utility>

namespace rl_kernels {
namespace {

// A (rows, features) view of an activation whose features lie side by side; a copy where they do not.
at::Tensor as_rows(const at::Tensor &tensor) {
  const int64_t features = tensor.size(-1);
  at::Tensor rows = tensor.dim() == 2 ? tensor : tensor.reshape({features ? tensor.numel() / features : 0, features});
  return rows.stride(1) == 1 || features == 1 ? rows : rows.contiguous();
}

// With few rows reading the sources takes as long as some multiplications would.
double multiplications(const cpu::Linear &problem) {
  return double(std::max(problem.m, cpu::max_few_rows)) * double(problem.n) * double(problem.k);
}

at::Tensor empty_like_activation(const at::Tensor &activation, int64_t features) {
  at::DimVector sizes(activation.sizes());
  sizes.back() = features;
  return at::empty(sizes, activation.options());
}

} // namespace

at::Tensor mixed_linear(const at::Tensor &x, const Tensors &weights, const at::Tensor &coefficients,
                        const Biases &biases) {
  at::Tensor y = empty_like_activation(x, weights[0].size(0));
  if (y.numel() == 0)
    return y;
  const at::Tensor rows = as_rows(x), read = as_read(coefficients, weights[0]);
  cpu::Linear problem = describe_linear(rows, weights, read, biases);
  problem.x = rows.data_ptr();
  problem.x_stride = rows.stride(0);
  problem.out = y.data_ptr();
  problem.m = y.numel() / problem.n;
  kernels().linear_forward(problem, threads_for(multiplications(problem)));
  return y;
}

at::Tensor mixed_linear_dgrad(const at::Tensor &dy, const Tensors &weights, const at::Tensor &coefficients) {
  at::Tensor dx = empty_like_activation(dy, weights[0].size(1));
  if (dx.numel() == 0)
    return dx;
  if (weights[0].size(0) == 0)
    return dx.zero_();
  const at::Tensor rows = as_rows(dy), read = as_read(coefficients, weights[0]);
  cpu::Linear problem = describe_linear(rows, weights, read, std::nullopt);
  problem.dy = rows.data_ptr();
  problem.dy_stride = rows.stride(0);
  problem.out = dx.data_ptr();
  kernels().linear_dgrad(problem, threads_for(multiplications(problem)));
  return dx;
}

namespace {

// wgrad, and dgrad as well where dx is given: in one pass over the sources where that is faster.
Gradients wgrad_and_dgrad(const at::Tensor &dy, const at::Tensor &x, const Tensors &weights,
                          const at::Tensor &coefficients, const Biases &biases, const Wanted &wanted, at::Tensor *dx) {
  Gradients outputs;
  const at::Tensor rows = as_rows(x), rows_dy = as_rows(dy), read = as_read(coefficients, weights[0]);
  cpu::Linear problem = describe_linear(rows, weights, read, biases);
  problem.gradients = allocate_gradients(outputs, weights, coefficients, biases, wanted, at::MemoryFormat::Contiguous);
  problem.m = problem.n ? dy.numel() / problem.n : 0;
  problem.x = rows.data_ptr();
  problem.x_stride = rows.stride(0);
  problem.dy = rows_dy.data_ptr();
  problem.dy_stride = rows_dy.stride(0);
  const cpu::Team threads = threads_for(multiplications(problem));
  const at::Tensor dots = zero_dots(problem, threads.threads);
  problem.dots = dots.data_ptr<double>();
  const at::Tensor columns = zero_columns(problem, threads.threads);
  problem.columns = columns.data_ptr<double>();
  if (dx != nullptr && problem.m > 0 && problem.m <= cpu::max_few_rows && weights[0].numel() > 0) {
    *dx = empty_like_activation(dy, problem.k);
    problem.out = dx->data_ptr();
    if (kernels().linear_backward(problem, threads))
      return outputs;
  }
  kernels().linear_wgrad(problem, threads);
  if (dx != nullptr)
    *dx = mixed_linear_dgrad(dy, weights, coefficients);
  return outputs;
}

} // namespace

Gradients mixed_linear_wgrad(const at::Tensor &dy, const at::Tensor &x, const Tensors &weights,
                             const at::Tensor &coefficients, const Biases &biases, const Wanted &wanted) {
  return wgrad_and_dgrad(dy, x, weights, coefficients, biases, wanted, nullptr);
}

std::pair<at::Tensor, Gradients> mixed_linear_backward(const at::Tensor &dy, const at::Tensor &x,
                                                       const Tensors &weights, const at::Tensor &coefficients,
                                                       const Biases &biases, const Wanted &wanted) {
  at::Tensor dx;
  Gradients gradients = wgrad_and_dgrad(dy, x, weights, coefficients, biases, wanted, &dx);
  return {dx, gradients};
}

} // namespace rl_kernels
