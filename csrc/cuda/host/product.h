// The products of forward and dgrad: which kernel serves one, and its parameters.
#pragma once

#include "plan.h"
#include "views.h"

namespace rl_kernels::cuda::host {

// out (batch, features, *pixels) = activation (batch, channels, *sizes) W^T, of any kind of layer.
struct Multiplication {
  const Call &call;
  View out, activation;
  View weights[MAX_SOURCES];
  Meeting meeting;
  int64_t groups;  // of features and channels
  bool transposed; // whether the channels are W's output channels, and the features its inputs

  bool linear() const { return out.dims == 2; }
  int64_t features() const { return out.sizes[1] / groups; }
  int64_t channels() const { return activation.sizes[1] / groups; }
  int64_t pixels() const { return numel(out) / out.sizes[1]; }
};

// A linear layer's, or that of a convolution which is one.
void multiply_rows(const Multiplication &product, Plan &plan);
// A convolution's, or a phase of it.
void multiply_pixels(const Multiplication &product, Plan &plan);

} // namespace rl_kernels::cuda::host
