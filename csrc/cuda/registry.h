// The kernels of the module rl_kernels._cuda by name: a .cu file declares each with RL_KERNEL, bindings.cpp launches
// them.
#pragma once

#include <cstddef>
#include <vector>

namespace rl_kernels {

struct Kernel {
  const char *name;         // the entry's name in PTX
  const void *function;     // what cudaLaunchKernel takes
  std::size_t params_bytes; // of the struct that is its only parameter
};

// Of every object file in the module, in no particular order.
inline std::vector<Kernel> &registered_kernels() {
  static std::vector<Kernel> kernels; // a local: the objects below are made before any global could be relied on
  return kernels;
}

// A static object of this class puts one kernel on the list while the module is loaded.
class Registration {
public:
  Registration(const char *name, const void *function, std::size_t params_bytes) {
    registered_kernels().push_back({name, function, params_bytes});
  }
};

} // namespace rl_kernels

// A kernel for blocks of at most `threads` threads, whose only parameter is the struct `p` of type Params, and whose
// body is the rest: RL_KERNEL(double_f32, 128, Doubling, twice<float>(p)). At file scope outside any namespace: its
// name is its entry's name in PTX. A type with a comma in its name needs an alias.
#define RL_KERNEL(name, threads, Params, ...)                                                                          \
  extern "C" __global__ void __launch_bounds__(threads, 1) name(const __grid_constant__ Params p) { __VA_ARGS__; }     \
  static const ::rl_kernels::Registration registration_of_##name(#name, reinterpret_cast<const void *>(&name),         \
                                                                 sizeof(Params))
