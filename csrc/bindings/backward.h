// The backward pass of a call of the fast path: by the kernels where it may, else by Python's formulas.
#pragma once

#include "read_arguments.h"

#include <torch/csrc/autograd/custom_function.h>

#include <cstdint>
#include <vector>

namespace rl_kernels {

// What a backward pass needs besides tensors, as the one list of integers in which it is saved.
std::vector<int64_t> saved_integers(const Call &call);

// The gradients of what `context` saved: (x, coefficients, *weights, *biases) and saved_integers under "call". The
// first is undefined, for the argument of forward that is no tensor.
torch::autograd::variable_list run_backward(torch::autograd::AutogradContext *context, const at::Tensor &dy);

} // namespace rl_kernels
