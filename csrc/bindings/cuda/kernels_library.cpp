#include "kernels_library.h"

#include "posing.h"

#include <c10/util/Exception.h>

#include <dlfcn.h>

#include <array>
#include <atomic>
#include <mutex>

namespace rl_kernels::cuda_ops {
namespace {

std::atomic<const KernelsLibrary *> opened = nullptr;

template <class Function> void look_up(void *library, const char *name, Function &function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  TORCH_CHECK(function != nullptr, "the CUDA kernels' library has no ", name);
}

} // namespace

void open_library(const std::string &path) {
  void *library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library != nullptr, dlerror());
  decltype(&rl_cuda_abi) abi = nullptr;
  look_up(library, "rl_cuda_abi", abi);
  TORCH_CHECK(abi() == cuda::ABI, "its interface is number ", abi(), ", expected ", cuda::ABI);
  auto *found = new KernelsLibrary; // for good, as the library itself
  look_up(library, "rl_cuda_call", found->call);
  look_up(library, "rl_cuda_device", found->device);
  look_up(library, "rl_cuda_error", found->error);
  opened.store(found);
}

const KernelsLibrary *opened_library() { return opened.load(); }

cuda::Device facts_of(const c10::Device &device) {
  if (const auto pose = posing())
    return pose->device;
  static std::mutex mutex;
  static std::array<cuda::Device, 64> known = {};
  const auto index = static_cast<size_t>(device.index());
  TORCH_CHECK(index < known.size(), "device ", device.index(), ": more than 64 devices");
  const std::lock_guard lock(mutex);
  if (known[index].multiprocessors == 0) {
    const auto *library = opened_library();
    cuda::DeviceFacts facts = {};
    TORCH_CHECK(library->device(device.index(), &facts) == 0, library->error());
    known[index] = {10 * facts.major + facts.minor, facts.multiprocessors, facts.shared_bytes_a_block};
  }
  return known[index];
}

} // namespace rl_kernels::cuda_ops
