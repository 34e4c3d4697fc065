// The C interface of rl_kernels/_cuda.so, which one build of it offers to every Python and every torch: the binding
// looks its functions up by name, and Python calls some of them through ctypes (backends/cuda/library.py).
//
// A function that can fail returns 0 or, where it failed, something else; rl_cuda_error() then has the words.
#pragma once

#include "call.h"

#include <cstdint>

namespace rl_kernels::cuda {

// Changes with every change of what stands below.
constexpr int32_t ABI = 1;

// A kernel, as registry.h describes it; sizes are in bytes.
struct KernelFacts {
  const char *name;
  int32_t params_bytes;
  int32_t threads, rows, columns, depth_bytes, stage_bytes, source_bytes, step_bytes, epilogue_bytes, kept_bytes;
};

// A GPU; sizes are in bytes.
struct DeviceFacts {
  char name[256];
  int32_t major, minor; // of its compute capability
  int32_t multiprocessors, shared_bytes_a_block, shared_bytes_a_multiprocessor, registers_a_multiprocessor, l2_bytes;
};

// One launch, on the current device, whose stream `stream` must be.
struct Launch {
  int32_t kernel; // its number
  uint32_t grid[3];
  uint32_t shared_bytes; // dynamic ones
  uint32_t params_bytes;
  const void *params; // the kernel's struct, copied before the call returns
  void *stream;       // a cudaStream_t
};

} // namespace rl_kernels::cuda

extern "C" {

int32_t rl_cuda_abi();
const char *rl_cuda_architectures(); // what this is built for, as "8.0 9.0+PTX"
const char *rl_cuda_nvcc();          // the compiler's version
const char *rl_cuda_runtime();       // that of the CUDA runtime, which is linked in

// The words of the last failure in this thread.
const char *rl_cuda_error();

// All kernels, in the order of their numbers; returns how many.
int32_t rl_cuda_kernels(const rl_kernels::cuda::KernelFacts **kernels);
// The number of a kernel; negative where there is none of that name.
int32_t rl_cuda_find(const char *name);
int32_t rl_cuda_device(int32_t index, rl_kernels::cuda::DeviceFacts *facts);
int32_t rl_cuda_launch(const rl_kernels::cuda::Launch *launch);
// Plans a call, takes its workspaces, and queues its kernels on its stream of the current device: all, or none where
// that fails before the first launch. 2 where a hook failed, which then has the words.
int32_t rl_cuda_call(const rl_kernels::cuda::Call *call);
}
