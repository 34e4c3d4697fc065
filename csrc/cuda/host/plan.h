// What a call will launch. All of it is planned, and its workspaces taken, before the first launch.
#pragma once

#include "../abi.h"
#include "../registry.h"

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string_view>
#include <vector>

namespace rl_kernels::cuda::host {

// A hook failed: the caller knows why.
struct HookFailed : std::runtime_error {
  HookFailed() : std::runtime_error("a hook of the caller failed") {}
};

// All kernels in the order of their names; a place is a kernel's number.
const std::vector<Kernel> &kernels();
// Negative where there is none of that name.
int32_t find(std::string_view name);
void queue(const Launch &launch);

// The name of a kernel, composed of its parts; "_" between them is the caller's.
class Name {
public:
  Name &operator<<(std::string_view part);
  Name &operator<<(int64_t number);
  // Throws where there is no such kernel.
  int32_t number() const;
  const LaunchFacts &facts() const { return kernels()[static_cast<size_t>(number())].facts; }

private:
  char text_[96];
  size_t length_ = 0;
  mutable int32_t number_ = -1; // once it was looked up
};

class Plan {
public:
  explicit Plan(const Call &call) : call_(call) { planned_.reserve(4); } // as many as most calls have

  // Bytes on the device, for as long as the kernels run.
  uint64_t workspace(int64_t bytes);

  struct Grid {
    int64_t x, y = 1, z = 1;
  };

  template <class Params> void add(int32_t kernel, const Grid &grid, int64_t shared_bytes, const Params &params) {
    static_assert(sizeof(Params) <= sizeof(Planned::params));
    put(kernel, grid, shared_bytes, &params, sizeof(Params));
  }

  // Queues everything, in the order in which it was added.
  void run() const;

private:
  struct Planned {
    int32_t kernel;
    uint32_t grid[3];
    uint32_t shared_bytes, params_bytes;
    alignas(8) std::byte params[960];
  };

  void put(int32_t kernel, const Grid &grid, int64_t shared_bytes, const void *params, size_t bytes);

  const Call &call_;
  std::vector<Planned> planned_;
};

// What a call of each op launches.
void plan(const Call &call, Plan &plan);

// The choice of tiles, by the caller's hook where there is one.
Choice chosen(const Call &call, bool wgrad, const Work &work, int space);

// What kernels' names call the type.
std::string_view element_name(ElementName element);
// How much longer matrix instructions take than in 16 bits.
double slowness(ElementName element);

} // namespace rl_kernels::cuda::host
