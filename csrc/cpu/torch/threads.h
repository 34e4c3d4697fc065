// The threads of a call, which are torch's own, and the scratch of each.
#pragma once

#include "cpu/kernels/problem.h"

namespace rl_kernels {

// Those that so many multiplications are worth.
cpu::Team threads_for(double multiplications);

} // namespace rl_kernels
