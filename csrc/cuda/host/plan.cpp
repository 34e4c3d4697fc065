#include "plan.h"

#include "heuristics.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <string>

namespace rl_kernels::cuda::host {

const std::vector<Kernel> &kernels() {
  static const auto *sorted = [] {
    auto *all = new std::vector<Kernel>(registered_kernels());
    std::sort(all->begin(), all->end(),
              [](const Kernel &a, const Kernel &b) { return std::strcmp(a.name, b.name) < 0; });
    return all;
  }();
  return *sorted;
}

int32_t find(std::string_view name) {
  const auto &all = kernels();
  const auto found = std::lower_bound(all.begin(), all.end(), name,
                                      [](const Kernel &kernel, std::string_view other) { return kernel.name < other; });
  return found != all.end() && found->name == name ? static_cast<int32_t>(found - all.begin()) : -1;
}

Name &Name::operator<<(std::string_view part) {
  if (length_ + part.size() > sizeof(text_))
    throw std::length_error("the name of a kernel is too long");
  std::memcpy(text_ + length_, part.data(), part.size());
  length_ += part.size();
  number_ = -1;
  return *this;
}

Name &Name::operator<<(int64_t number) {
  char digits[24];
  const auto end = std::to_chars(digits, digits + sizeof(digits), number).ptr;
  return *this << std::string_view(digits, static_cast<size_t>(end - digits));
}

int32_t Name::number() const {
  if (number_ >= 0)
    return number_;
  const std::string_view name(text_, length_);
  number_ = find(name);
  if (number_ < 0)
    throw std::invalid_argument("there is no kernel " + std::string(name) + " in _cuda.so");
  return number_;
}

uint64_t Plan::workspace(int64_t bytes) {
  const uint64_t address = call_.hooks.allocate(call_.hooks.context, bytes);
  if (address == 0)
    throw HookFailed();
  return address;
}

void Plan::put(int32_t kernel, const Grid &grid, int64_t shared_bytes, const void *params, size_t bytes) {
  Planned &next = planned_.emplace_back();
  next.kernel = kernel;
  next.grid[0] = uint32_t(grid.x);
  next.grid[1] = uint32_t(grid.y);
  next.grid[2] = uint32_t(grid.z);
  next.shared_bytes = uint32_t(shared_bytes);
  next.params_bytes = uint32_t(bytes);
  std::memcpy(next.params, params, bytes);
}

void Plan::run() const {
  const Hooks &hooks = call_.hooks;
  for (const Planned &each : planned_) {
    const Launch launch = {each.kernel,       {each.grid[0], each.grid[1], each.grid[2]},
                           each.shared_bytes, each.params_bytes,
                           each.params,       call_.stream};
    if (hooks.launch == nullptr) {
      queue(launch);
      continue;
    }
    const Kernel &kernel = kernels()[static_cast<size_t>(each.kernel)];
    if (hooks.launch(hooks.context, kernel.name, kernel.facts.threads, &launch) != 0)
      throw HookFailed();
  }
}

Choice chosen(const Call &call, bool wgrad, const Work &work, int space) {
  const Hooks &hooks = call.hooks;
  if (hooks.choose == nullptr)
    return choose(wgrad, work, call.device, space);
  Choice found = {};
  if (hooks.choose(hooks.context, wgrad, &work, space, &found) != 0)
    throw HookFailed();
  return found;
}

std::string_view element_name(ElementName element) {
  return element == ElementName::f16 ? "f16" : element == ElementName::bf16 ? "bf16" : "tf32";
}

double slowness(ElementName element) { return element == ElementName::tf32 ? 2.0 : 1.0; }

} // namespace rl_kernels::cuda::host
