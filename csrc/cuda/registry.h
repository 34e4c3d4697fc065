// The kernels of the library rl_kernels/_cuda.so by name: a .cu file declares each with RL_KERNEL, library.cpp launches
// them.
#pragma once

#include <cstddef>
#include <vector>

namespace rl_kernels::cuda {

// What the host has to know of a kernel to launch it; 0 for what it does not have.
struct LaunchFacts {
  int threads = 0;        // of a block
  int rows = 0;           // of the result, that a block computes
  int columns = 0;        // of the result, that a block computes
  int depth_bytes = 0;    // of a row along the sum, that a step takes
  int stage_bytes = 0;    // of shared memory, for each stage of the pipeline
  int source_bytes = 0;   // of shared memory, for each stage and source
  int step_bytes = 0;     // of shared memory, for each step of the sum, in a kernel that keeps them all
  int epilogue_bytes = 0; // of shared memory, for results on their way out
  int kept_bytes = 0;     // of shared memory that the kernel declares itself, beside what it is launched with
};

struct Kernel {
  const char *name;         // the entry's name in PTX
  const void *function;     // what cudaLaunchKernel takes
  std::size_t params_bytes; // of the struct that is its only parameter
  LaunchFacts facts;
};

// How many blocks of a kernel its class wants on a multiprocessor.
template <class Body> constexpr int blocks_of = 1;
template <class Body>
  requires(Body::BLOCKS > 0)
constexpr int blocks_of<Body> = Body::BLOCKS;

// Those of every object file in the library, in no particular order.
inline std::vector<Kernel> &registered_kernels() {
  static std::vector<Kernel> kernels; // a local: the objects below are made before any global could be relied on
  return kernels;
}

// A static object of this class puts one kernel on the list while the module is loaded.
class Registration {
public:
  explicit Registration(const Kernel &kernel) { registered_kernels().push_back(kernel); }
};

} // namespace rl_kernels::cuda

// Declares the kernel `name` that a class describes, which comes last, for it may have commas in its name:
// RL_KERNEL(double_f32, Multiplying<float, 2>). The class has
//   Params: the struct that is the kernel's only parameter,
//   FACTS: its LaunchFacts,
//   MAX_THREADS: how many threads registers are to suffice for; FACTS.threads or more,
//   BLOCKS: and for how many blocks of a multiprocessor; 1 where it says nothing,
//   run(const Params &): its body.
// Whatever namespace this stands in, `name` is the entry's name in PTX.
#define RL_KERNEL(name, ...)                                                                                           \
  extern "C" __global__ void __launch_bounds__((__VA_ARGS__::MAX_THREADS), ::rl_kernels::cuda::blocks_of<__VA_ARGS__>) \
      name(const __grid_constant__ __VA_ARGS__::Params p) {                                                            \
    __VA_ARGS__::run(p);                                                                                               \
  }                                                                                                                    \
  static const ::rl_kernels::cuda::Registration registration_of_##name(                                                \
      {#name, reinterpret_cast<const void *>(&name), sizeof(__VA_ARGS__::Params), __VA_ARGS__::FACTS})
