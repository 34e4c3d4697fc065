// Which calls the kernels cannot compute, and on which another backend does better.
#include "describe.h"
#include "isa.h"
#include "ops.h"
#include "whole_filter.h"

namespace rl_kernels {
namespace {

bool is_served(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

// The kernels multiply bfloat16 in float32; where the CPU has instructions for it, the vendor's products are twice as
// fast, which repays streamed's second pass over a panel once the panel meets enough rows.
constexpr int64_t max_bfloat16_rows = 384;

const char *worse_in_bfloat16(const at::Tensor &activation, int64_t rows) {
#if defined(__x86_64__)
  static const bool native = __builtin_cpu_supports("avx512bf16");
#else
  constexpr bool native = false;
#endif
  const bool many = rows > max_bfloat16_rows && activation.scalar_type() == at::kBFloat16;
  return native && many ? "bfloat16 on many rows" : nullptr;
}

// The gradients of Outer coefficients cost two steps an element for each r here, one vendor's product there: with a
// high rank that outweighs G, unless many rows are summed into each of its elements.
constexpr int64_t max_outer_rank = 8, rows_to_repay_ranks = 1024;

const char *worse_in_rank(const at::Tensor &coefficients, int64_t rows) {
  const bool high = coefficients.dim() == 3 && coefficients.size(1) > max_outer_rank;
  return high && rows <= rows_to_repay_ranks ? "Outer coefficients of a rank above 8 on few rows" : nullptr;
}

const char *worse_on_rows(const at::Tensor &activation, int64_t channels, const at::Tensor &coefficients, bool wgrad) {
  const int64_t rows = channels ? activation.numel() / channels : 0;
  const char *reason = worse_in_bfloat16(activation, rows);
  return reason == nullptr && wgrad ? worse_in_rank(coefficients, rows) : reason;
}

} // namespace

const char *why_not_linear(const at::Tensor &activation, const Tensors &weights) {
  if (!activation.device().is_cpu())
    return "an activation that is not on a CPU";
  if (!is_served(activation.scalar_type()))
    return "an activation in another type than float32, float64, bfloat16 and float16";
  static_assert(cpu::max_sources == 16, "as the text says");
  return weights.size() > size_t(cpu::max_sources) ? "more than 16 sources" : nullptr;
}

const char *why_not_conv(const at::Tensor &activation, const Tensors &weights, const Geometry &geometry) {
  if (const char *reason = why_not_linear(activation, weights))
    return reason;
  int64_t out, in, tap;
  for (const auto &weight : weights)
    if (!weight_strides(weight, out, in, tap))
      return "a filter whose taps do not lie one stride apart";
  cpu::Conv problem = describe_conv(activation, weights[0], geometry);
  problem.x.channels = weights[0].size(1) * geometry.groups;
  problem.y.channels = weights[0].size(0);
  return kernels().conv_fits(problem) ? nullptr : "a filter with pieces larger than a thread's scratch";
}

const char *worse_linear(const at::Tensor &activation, const Tensors &, const at::Tensor &coefficients, bool wgrad) {
  return worse_on_rows(activation, activation.size(-1), coefficients, wgrad);
}

const char *worse_conv(const at::Tensor &activation, const Tensors &weights, const at::Tensor &coefficients, bool wgrad,
                       const Geometry &geometry) {
  if (narrow_groups(activation, weights[0], geometry) && !WholeFilter::serves(activation, weights[0], geometry))
    return "few channels a group";
  return worse_on_rows(activation, activation.size(1), coefficients, wgrad);
}

} // namespace rl_kernels
