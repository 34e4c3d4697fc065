// The library rl_kernels/_cuda.so, which is opened at run time: nothing of CUDA is linked.
#pragma once

#include "cuda/abi.h"

#include <c10/core/Device.h>

#include <string>

namespace rl_kernels::cuda_ops {

struct KernelsLibrary {
  decltype(&rl_cuda_call) call = nullptr;
  decltype(&rl_cuda_device) device = nullptr;
  decltype(&rl_cuda_error) error = nullptr;
};

// Opens it; throws where it cannot, or where it has another interface.
void open_library(const std::string &path);
// nullptr before that.
const KernelsLibrary *opened_library();

// What plans depend on, of a GPU, or of what poses as one (posing.h). It is asked once.
cuda::Device facts_of(const c10::Device &device);

} // namespace rl_kernels::cuda_ops
