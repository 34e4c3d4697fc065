// The module rl_kernels._cuda: the kernels that registry.h lists, launched by name. It knows no torch, and it loads
// where there is no GPU and no driver: the CUDA runtime is linked in, and only a call of it finds that out.

#include "registry.h"

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#ifndef RL_KERNELS_CUDA_ARCHITECTURES
#error "RL_KERNELS_CUDA_ARCHITECTURES: what this is built for, as a string such as 8.0 9.0+PTX"
#endif
#ifndef RL_KERNELS_NVCC
#error "RL_KERNELS_NVCC: the version of nvcc, as a string"
#endif

namespace rl_kernels::cuda {
namespace {

namespace py = pybind11;

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

const Kernel &find(std::string_view name) {
  static const auto *by_name = [] {
    auto *kernels = new std::map<std::string_view, Kernel>;
    for (const Kernel &kernel : registered_kernels())
      kernels->emplace(kernel.name, kernel);
    return kernels;
  }();
  const auto found = by_name->find(name);
  if (found == by_name->end())
    throw std::invalid_argument("there is no kernel " + std::string(name) + " in rl_kernels._cuda");
  return found->second;
}

// More than 48 KiB, what a kernel declares itself included, must be allowed, to each kernel on each device; that lasts,
// so it is asked for when it grows.
void allow_shared(const Kernel &kernel, unsigned bytes, const std::string &doing) {
  static std::mutex mutex;
  static auto *allowed = new std::map<std::pair<const void *, int>, unsigned>;
  int device = 0;
  check(cudaGetDevice(&device), doing);
  const std::lock_guard lock(mutex);
  unsigned &now = (*allowed)[{kernel.function, device}];
  if (bytes <= now)
    return;
  check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        doing);
  now = bytes;
}

// On the current device, whose stream `stream` must be: a cudaStream_t as an integer, 0 for the default one.
void launch(std::string_view name, const std::array<unsigned, 3> &grid, unsigned shared_bytes, std::uintptr_t stream,
            const py::bytes &params) {
  const Kernel &kernel = find(name);
  const int threads = kernel.facts.threads;
  const std::string_view bytes = params;
  if (bytes.size() != kernel.params_bytes)
    throw std::invalid_argument("kernel " + std::string(name) + " takes parameters of " +
                                std::to_string(kernel.params_bytes) + " bytes, got " + std::to_string(bytes.size()));
  void *arguments[] = {const_cast<char *>(bytes.data())}; // copied before the call returns
  cudaError_t error;
  {
    const py::gil_scoped_release no_gil; // a full queue blocks
    if (shared_bytes > 0)
      allow_shared(kernel, shared_bytes,
                   "kernel " + std::string(name) + " with " + std::to_string(shared_bytes) + " bytes of shared memory");
    error = cudaLaunchKernel(kernel.function, dim3(grid[0], grid[1], grid[2]), dim3(threads), arguments, shared_bytes,
                             reinterpret_cast<cudaStream_t>(stream));
  }
  if (error != cudaSuccess)
    check(error, "kernel " + std::string(name) + " on a grid of " + std::to_string(grid[0]) + " x " +
                     std::to_string(grid[1]) + " x " + std::to_string(grid[2]) + " blocks of " +
                     std::to_string(threads) + " threads and " + std::to_string(shared_bytes) +
                     " bytes of shared memory");
}

// Name to the bytes of its parameters, and its LaunchFacts under their own names.
py::dict kernels() {
  py::dict found;
  for (const Kernel &kernel : registered_kernels()) {
    const LaunchFacts &facts = kernel.facts;
    py::dict entry;
    entry["params_bytes"] = kernel.params_bytes;
    entry["threads"] = facts.threads;
    entry["rows"] = facts.rows;
    entry["columns"] = facts.columns;
    entry["depth_bytes"] = facts.depth_bytes;
    entry["stage_bytes"] = facts.stage_bytes;
    entry["source_bytes"] = facts.source_bytes;
    entry["step_bytes"] = facts.step_bytes;
    entry["epilogue_bytes"] = facts.epilogue_bytes;
    entry["kept_bytes"] = facts.kept_bytes;
    found[kernel.name] = entry;
  }
  return found;
}

py::dict build_info() {
  py::dict info;
  info["architectures"] = RL_KERNELS_CUDA_ARCHITECTURES;
  info["nvcc"] = RL_KERNELS_NVCC;
  info["runtime"] = version(CUDART_VERSION);
  return info;
}

// What a launch can be planned by; sizes in bytes.
py::dict device_info(int index) {
  const std::string doing = "device " + std::to_string(index);
  int count = 0;
  check(cudaGetDeviceCount(&count), doing);
  if (index < 0 || index >= count)
    throw std::invalid_argument(doing + ": there are " + std::to_string(count));
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, index), doing);
  py::dict info;
  info["name"] = properties.name;
  info["capability"] = py::make_tuple(properties.major, properties.minor);
  info["multiprocessors"] = properties.multiProcessorCount;
  info["shared_bytes_a_block"] = properties.sharedMemPerBlockOptin;
  info["shared_bytes_a_multiprocessor"] = properties.sharedMemPerMultiprocessor;
  info["registers_a_multiprocessor"] = properties.regsPerMultiprocessor;
  info["l2_bytes"] = properties.l2CacheSize;
  return info;
}

} // namespace

PYBIND11_MODULE(_cuda, module) {
  module.def("kernels", &kernels);
  module.def("launch", &launch, py::arg("name"), py::arg("grid"), py::arg("shared_bytes"), py::arg("stream"),
             py::arg("params"));
  module.def("build_info", &build_info);
  module.def("device_info", &device_info, py::arg("index") = 0);
}

} // namespace rl_kernels::cuda
