#include "rules.h"

#include "cuda/params.h"

#include <ATen/Context.h>
#include <torch/version.h>

#include <algorithm>

namespace rl_kernels::cuda_ops {
namespace {

using at::Tensor;

constexpr int64_t MAX_GROUPS = (1 << 16) - 1;           // that the second dimension of a grid can have
constexpr int64_t MAX_COUNT = (int64_t{1} << 31) - 512; // that 31 bits count, with room for a tile past the last
constexpr int64_t LEAST_CHANNELS = 16;                  // of a group, for `auto`: products of fewer are mostly padding

std::string name_of(at::ScalarType type) {
  switch (type) {
  case at::kFloat:
    return "float32";
  case at::kDouble:
    return "float64";
  case at::kHalf:
    return "float16";
  case at::kBFloat16:
    return "bfloat16";
  default:
    return at::toString(type);
  }
}

// Of pixels, or of positions of the sum, that kernels count.
int64_t largest_count(const Tensor &activation, const Tensor &weight, at::IntArrayRef input_size, bool conv) {
  const int64_t channels = activation.size(conv ? 1 : activation.dim() - 1);
  int64_t taps = 1;
  for (int64_t d = 2; d < weight.dim(); ++d)
    taps *= weight.size(d);
  int64_t most =
      std::max(activation.numel() / std::max<int64_t>(1, channels), std::max(weight.size(0), weight.size(1)) * taps);
  if (!input_size.empty()) {
    int64_t pixels = input_size[0];
    for (size_t d = 2; d < input_size.size(); ++d)
      pixels *= input_size[d];
    most = std::max(most, pixels);
  }
  return most;
}

} // namespace

Reason why_not(const Tensor &activation, const Tensors &weights, const Tensor &coefficients, at::IntArrayRef input_size,
               const Geometry *geometry) {
  static_assert(cuda::MAX_SOURCES == 4 && MAX_COUNT == 2147483136, "as the texts say");
  if (weights.size() > cuda::MAX_SOURCES)
    return "more than 4 sources";
  for (const auto &weight : weights)
    if (weight.scalar_type() != activation.scalar_type())
      return "sources in " + name_of(weight.scalar_type()) + " under " + name_of(activation.scalar_type());
  if (coefficients.scalar_type() != at::kFloat)
    return "coefficients in " + name_of(coefficients.scalar_type());
  if (largest_count(activation, weights[0], input_size, geometry != nullptr) >= MAX_COUNT)
    return "more than 2^31 - 512 pixels or channels";
  if (geometry != nullptr && geometry->groups > MAX_GROUPS)
    return "more than 65535 groups";
  return std::nullopt;
}

Reason worse(const Tensor &activation, const Tensor &x, const Tensors &weights, const Geometry *geometry) {
  const auto channels_together = [](const Tensor &tensor) { return tensor.stride(1) == 1; };
  const bool together = std::all_of(weights.begin(), weights.end(), channels_together);
  if (geometry == nullptr)
    return together ? Reason() : "sources lie by columns";
  const int64_t least = std::min(weights[0].size(1), weights[0].size(0) / geometry->groups);
  if (least < LEAST_CHANNELS)
    return "fewer than 16 channels a group";
  const bool all = together && channels_together(activation) && (!x.defined() || channels_together(x));
  return all ? Reason() : "needs channels_last";
}

bool allows_tf32(bool conv) {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 11
  const auto precision = at::globalContext().float32Precision(at::Float32Backend::CUDA,
                                                              conv ? at::Float32Op::CONV : at::Float32Op::MATMUL);
  return precision == at::Float32Precision::TF32;
#else
  static_cast<void>(conv); // its names have changed: Python asks
  return false;
#endif
}

} // namespace rl_kernels::cuda_ops
