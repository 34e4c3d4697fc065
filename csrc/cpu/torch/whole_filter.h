// Convolutions of few channels a group: the filter is mixed whole here, and torch's own convolution is run on it.
#pragma once

#include "ops.h"

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace rl_kernels {

// Few channels a group leave the kernels' vectors half empty.
bool narrow_groups(const at::Tensor &activation, const at::Tensor &weight, const Geometry &geometry);

// The vendor's convolution on a filter mixed here, in float32.
class WholeFilter {
public:
  static bool serves(const at::Tensor &activation, const at::Tensor &weight, const Geometry &geometry);

  // The coefficients are as_read().
  WholeFilter(const Tensors &weights, const at::Tensor &coefficients, const Biases &biases, const Geometry &geometry);

  at::Tensor forward(const at::Tensor &x) const;

  // As a convolution transposed: that needs no stand-in for x, which the vendor would copy.
  at::Tensor dgrad(const at::Tensor &dy, const std::vector<int64_t> &input_size) const;

  // G, laid out as the kernels' conv_mix lays the filter out.
  static at::Tensor wgrad(const at::Tensor &dy, const at::Tensor &x, const at::Tensor &weight,
                          const Geometry &geometry);

private:
  const Geometry &geometry_;
  at::Tensor filter_, bias_;
};

} // namespace rl_kernels
