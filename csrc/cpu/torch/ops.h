// The CPU ops on torch tensors, as their schemas declare them, computed by the kernels of csrc/cpu/kernels.
//
// Arguments are those of the schemas and have passed their checks. A function allocates its outputs, describes the
// problem in raw pointers and runs it in one parallel region on torch's own threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace rl_kernels {

using Tensors = std::vector<at::Tensor>;
using Biases = std::optional<Tensors>;
using Mask = std::vector<bool>;

struct Geometry {
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups = 1;
};

// (dweights, dcoefficients, dbiases); what is not asked for is an empty tensor in its place.
using Gradients = std::tuple<Tensors, at::Tensor, Tensors>;

struct Wanted {
  Mask weights;
  bool coefficients = false;
  Mask biases;
};

// Why the kernels cannot compute a call; nullptr where they can. Cheap: types, devices and strides are looked at only.
const char *why_not_linear(const at::Tensor &activation, const Tensors &weights);
const char *why_not_conv(const at::Tensor &activation, const Tensors &weights, const Geometry &geometry);
// Why the vendor's kernels on mixed panels do better on a call that the kernels can compute; nullptr where they do not.
// wgrad: whether the call is one.
const char *worse_linear(const at::Tensor &activation, const Tensors &weights, const at::Tensor &coefficients,
                         bool wgrad);
const char *worse_conv(const at::Tensor &activation, const Tensors &weights, const at::Tensor &coefficients, bool wgrad,
                       const Geometry &geometry);

// Of a convolution's results. torch's rule: channels_last where the activation is, or the first source.
at::MemoryFormat memory_format(const at::Tensor &activation, const Tensors &weights);

at::Tensor mixed_linear(const at::Tensor &x, const Tensors &weights, const at::Tensor &coefficients,
                        const Biases &biases);
at::Tensor mixed_linear_dgrad(const at::Tensor &dy, const Tensors &weights, const at::Tensor &coefficients);
Gradients mixed_linear_wgrad(const at::Tensor &dy, const at::Tensor &x, const Tensors &weights,
                             const at::Tensor &coefficients, const Biases &biases, const Wanted &wanted);
// dgrad and wgrad together: for few rows, in one pass over the sources.
std::pair<at::Tensor, Gradients> mixed_linear_backward(const at::Tensor &dy, const at::Tensor &x,
                                                       const Tensors &weights, const at::Tensor &coefficients,
                                                       const Biases &biases, const Wanted &wanted);

at::Tensor mixed_conv(const at::Tensor &x, const Tensors &weights, const at::Tensor &coefficients, const Biases &biases,
                      const Geometry &geometry);
at::Tensor mixed_conv_dgrad(const at::Tensor &dy, const Tensors &weights, const at::Tensor &coefficients,
                            const std::vector<int64_t> &input_size, const Geometry &geometry);
Gradients mixed_conv_wgrad(const at::Tensor &dy, const at::Tensor &x, const Tensors &weights,
                           const at::Tensor &coefficients, const Biases &biases, const Wanted &wanted,
                           const Geometry &geometry);

// "avx512", "avx2" or "scalar": the path in use. RL_KERNELS_CPU_CAPABILITY, read at the first call, asks for a lower
// one.
std::string capability();
// The paths that this build holds and this machine can run, best first.
std::vector<std::string> capabilities();
// The most scratch in bytes that one thread takes for a call.
int64_t workspace_bytes_a_thread();

} // namespace rl_kernels
