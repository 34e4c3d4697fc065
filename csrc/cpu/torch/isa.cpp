#include "isa.h"

#include "ops.h"

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace rl_kernels {
namespace {

using cpu::Kernels;

std::vector<const Kernels *> available() {
  std::vector<const Kernels *> found;
#if !defined(RL_KERNELS_SCALAR_ONLY)
  for (const Kernels *kernels : {cpu::kernels_avx512(), cpu::kernels_avx2()})
    if (kernels != nullptr)
      found.push_back(kernels);
#endif
  found.push_back(cpu::kernels_scalar());
  return found;
}

} // namespace

const Kernels &kernels() {
  static const Kernels &chosen = []() -> const Kernels & {
    const auto found = available();
    if (const char *wanted = std::getenv("RL_KERNELS_CPU_CAPABILITY"))
      for (const Kernels *kernels : found)
        if (std::strcmp(kernels->name, wanted) == 0)
          return *kernels;
    return *found.front();
  }();
  return chosen;
}

std::string capability() { return kernels().name; }

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const Kernels *kernels : available())
    names.emplace_back(kernels->name);
  return names;
}

} // namespace rl_kernels
