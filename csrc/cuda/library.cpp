// The library rl_kernels/_cuda.so, as abi.h declares it: the kernels that registry.h lists, and their launch. It knows
// neither Python nor torch, and loads where there is no GPU and no driver: the CUDA runtime is linked in, and only a
// call of it finds that out.

#include "abi.h"
#include "host/plan.h"
#include "registry.h"

#include <cuda_runtime.h>

#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#ifndef RL_KERNELS_CUDA_ARCHITECTURES
#error "RL_KERNELS_CUDA_ARCHITECTURES: what this is built for, as a string such as 8.0 9.0+PTX"
#endif
#ifndef RL_KERNELS_NVCC
#error "RL_KERNELS_NVCC: the version of nvcc, as a string"
#endif
#define RL_EXPORT extern "C" __attribute__((visibility("default")))

namespace rl_kernels::cuda {
namespace {

thread_local std::string last_error;

// Runs what may throw; nothing is thrown through the C interface.
template <class Function> int32_t guarded(Function function) {
  try {
    function();
    return 0;
  } catch (const host::HookFailed &) {
    return 2;
  } catch (const std::exception &error) {
    last_error = error.what();
    return 1;
  }
}

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess ? value : 0;
}

// The compute capability of the device in use, as the list of architectures writes it.
std::string this_device() {
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess)
    return "unknown";
  return std::to_string(attribute(cudaDevAttrComputeCapabilityMajor, device)) + "." +
         std::to_string(attribute(cudaDevAttrComputeCapabilityMinor, device));
}

// What the runtime's own words leave out, for the errors that an installation can have.
std::string advice(cudaError_t error) {
  if (error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice) {
    int driver = 0; // 0 without one
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
      return "there is no CUDA driver on this machine: ";
    return "the driver is for CUDA " + version(driver) + ", this is built with CUDA " + version(CUDART_VERSION) + ": ";
  }
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
      error == cudaErrorUnsupportedPtxVersion)
    return "built for compute capability " RL_KERNELS_CUDA_ARCHITECTURES ", you have " + this_device() +
           " (RL_KERNELS_CUDA_ARCH_LIST chooses when the package is built): ";
  return "";
}

void check(cudaError_t error, const std::string &doing) {
  if (error == cudaSuccess)
    return;
  cudaGetLastError(); // or the next call would report it again
  throw std::runtime_error(doing + ": " + advice(error) + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

const std::vector<KernelFacts> &facts() {
  static const auto *all = [] {
    auto *made = new std::vector<KernelFacts>;
    for (const Kernel &kernel : host::kernels()) {
      const LaunchFacts &f = kernel.facts;
      made->push_back({kernel.name, static_cast<int32_t>(kernel.params_bytes), f.threads, f.rows, f.columns,
                       f.depth_bytes, f.stage_bytes, f.source_bytes, f.step_bytes, f.epilogue_bytes, f.kept_bytes});
    }
    return made;
  }();
  return *all;
}

std::string described(const Kernel &kernel, const Launch &launch) {
  const auto text = [](auto number) { return std::to_string(number); };
  return "kernel " + std::string(kernel.name) + " on a grid of " + text(launch.grid[0]) + " x " + text(launch.grid[1]) +
         " x " + text(launch.grid[2]) + " blocks of " + text(kernel.facts.threads) + " threads and " +
         text(launch.shared_bytes) + " bytes of shared memory";
}

// More than 48 KiB, what a kernel declares itself included, must be allowed, to each kernel on each device; that lasts,
// so it is asked for when it grows.
cudaError_t allow_shared(const Kernel &kernel, unsigned bytes) {
  static std::mutex mutex;
  static auto *allowed = new std::map<std::pair<const void *, int>, unsigned>;
  int device = 0;
  if (const auto error = cudaGetDevice(&device); error != cudaSuccess)
    return error;
  const std::lock_guard lock(mutex);
  unsigned &now = (*allowed)[{kernel.function, device}];
  if (bytes <= now)
    return cudaSuccess;
  const auto error =
      cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess)
    now = bytes;
  return error;
}

void describe_device(int index, DeviceFacts &facts) {
  const std::string doing = "device " + std::to_string(index);
  int count = 0;
  check(cudaGetDeviceCount(&count), doing);
  if (index < 0 || index >= count)
    throw std::invalid_argument(doing + ": there are " + std::to_string(count));
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, index), doing);
  static_assert(sizeof(facts.name) == sizeof(properties.name));
  std::memcpy(facts.name, properties.name, sizeof(facts.name));
  facts.major = properties.major;
  facts.minor = properties.minor;
  facts.multiprocessors = properties.multiProcessorCount;
  facts.shared_bytes_a_block = static_cast<int32_t>(properties.sharedMemPerBlockOptin);
  facts.shared_bytes_a_multiprocessor = static_cast<int32_t>(properties.sharedMemPerMultiprocessor);
  facts.registers_a_multiprocessor = properties.regsPerMultiprocessor;
  facts.l2_bytes = properties.l2CacheSize;
}

} // namespace

void host::queue(const Launch &launch) {
  const auto &all = host::kernels();
  if (launch.kernel < 0 || static_cast<size_t>(launch.kernel) >= all.size())
    throw std::invalid_argument("there is no kernel of number " + std::to_string(launch.kernel));
  const Kernel &kernel = all[static_cast<size_t>(launch.kernel)];
  if (launch.params_bytes != kernel.params_bytes)
    throw std::invalid_argument("kernel " + std::string(kernel.name) + " takes parameters of " +
                                std::to_string(kernel.params_bytes) + " bytes, got " +
                                std::to_string(launch.params_bytes));
  auto error = launch.shared_bytes > 0 ? allow_shared(kernel, launch.shared_bytes) : cudaSuccess;
  void *arguments[] = {const_cast<void *>(launch.params)};
  if (error == cudaSuccess)
    error = cudaLaunchKernel(kernel.function, dim3(launch.grid[0], launch.grid[1], launch.grid[2]),
                             dim3(static_cast<unsigned>(kernel.facts.threads)), arguments, launch.shared_bytes,
                             static_cast<cudaStream_t>(launch.stream));
  if (error != cudaSuccess)
    check(error, described(kernel, launch));
}

} // namespace rl_kernels::cuda

using namespace rl_kernels::cuda;

RL_EXPORT int32_t rl_cuda_abi() { return ABI; }

RL_EXPORT const char *rl_cuda_architectures() { return RL_KERNELS_CUDA_ARCHITECTURES; }

RL_EXPORT const char *rl_cuda_nvcc() { return RL_KERNELS_NVCC; }

RL_EXPORT const char *rl_cuda_runtime() {
  static const auto *text = new std::string(version(CUDART_VERSION));
  return text->c_str();
}

RL_EXPORT const char *rl_cuda_error() { return last_error.c_str(); }

RL_EXPORT int32_t rl_cuda_kernels(const KernelFacts **kernels) {
  *kernels = facts().data();
  return static_cast<int32_t>(facts().size());
}

RL_EXPORT int32_t rl_cuda_find(const char *name) { return host::find(name); }

RL_EXPORT int32_t rl_cuda_device(int32_t index, DeviceFacts *facts) {
  return guarded([&] { describe_device(index, *facts); });
}

RL_EXPORT int32_t rl_cuda_launch(const Launch *launch) {
  return guarded([&] { host::queue(*launch); });
}

RL_EXPORT int32_t rl_cuda_call(const Call *call) {
  return guarded([&] {
    host::Plan plan(*call);
    host::plan(*call, plan);
    plan.run();
  });
}
