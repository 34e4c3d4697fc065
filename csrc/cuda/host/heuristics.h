// How a product is cut into blocks: a pure function of its sizes and of the device, as gpu/heuristics.py has it for
// Triton. A test holds the two equal.
#pragma once

#include "../call.h"

#include <vector>

namespace rl_kernels::cuda::host {

constexpr int STEP_BYTES = 64;                // of a row along the sum, that a stage of the pipelines holds
constexpr int64_t WORKSPACE_BYTES = 32 << 20; // that a call takes for the shares of a split sum, at most
constexpr int STAGES[] = {4, 3, 2};           // of the pipelines; the first that fit are taken

constexpr int64_t cdiv(int64_t dividend, int64_t divisor) { return (dividend + divisor - 1) / divisor; }

// Of a tile, and how many blocks of it a multiprocessor's registers suffice for.
struct Size {
  int rows, columns, resident;
};
// Rows are features, columns are tokens or pixels.
constexpr Size PRODUCTS[] = {{128, 256, 1}, {128, 128, 2}, {64, 64, 4}};
// Rows are output channels, columns are input channels of every tap.
constexpr Size WGRADS[] = {{128, 128, 2}, {64, 64, 4}};

// Each at the depth of a type, with as many stages as fit into `space` bytes of shared memory.
std::vector<Configuration> usable(bool wgrad, const Work &work, int space);

// Cycles that a product takes, launches of its reduction included.
double estimate(const Work &work, const Configuration &configuration, int splits, const Device &device, int space);

// That with the smallest estimate; the first of equals.
Choice choose(bool wgrad, const Work &work, const Device &device, int space);

// Bytes of shared memory for the stages.
int64_t shared_bytes(const Work &work, const Configuration &configuration);

} // namespace rl_kernels::cuda::host
