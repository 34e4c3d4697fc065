// Tensors of the host that pose as those of a GPU, for tests and for timing the host: what would be launched goes to a
// Python function, or nowhere.
#pragma once

#include "cuda/abi.h"

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <vector>

namespace rl_kernels::cuda_ops {

struct Pose {
  cuda::Device device;
  // Takes ("allocate", bytes), ("free",), or ("launch", kernel, grid, threads, shared bytes, stream, device, params,
  // tensors); may be None.
  pybind11::object record;
};

// nullptr where nothing poses.
std::shared_ptr<const Pose> posing();
bool poses();
// From now on; nullptr ends it.
void set_pose(std::shared_ptr<const Pose> pose);

} // namespace rl_kernels::cuda_ops
