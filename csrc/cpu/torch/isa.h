// Which instruction set's kernels are used: the best that this machine runs, or the lower one asked for.
#pragma once

#include "cpu/kernels/problem.h"

namespace rl_kernels {

const cpu::Kernels &kernels();

} // namespace rl_kernels
