// The gradients of sources, coefficients and biases.
#pragma once

#include "plan.h"
#include "views.h"

namespace rl_kernels::cuda::host {

// Of an output and an input that meet as `meeting` says; of one tap for linear layers.
void differentiate(const Call &call, const Meeting &meeting, Plan &plan);

} // namespace rl_kernels::cuda::host
