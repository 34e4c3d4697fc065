#include "huge_pages.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rl_kernels {
namespace {

// Fresh memory costs a page fault every 4 KiB, which for a gradient takes longer than computing it, and the C library
// gives a large block back to the system each time it is freed. The gradients of large weights are therefore allocated
// in huge pages, where the system leaves these to the program: a fault every 2 MiB. Of what is freed, the last
// `max_kept_bytes` are kept for the next gradient of the same size, and left to the system should it run short.
class HugePages final : public c10::Allocator {
public:
  static constexpr size_t page = 2 << 20, max_kept_bytes = 256 << 20;

  c10::DataPtr allocate(size_t bytes) override {
    const size_t size = (bytes + page - 1) / page * page;
    void *memory = take(size);
    if (memory == nullptr) {
      memory = std::aligned_alloc(page, size);
      TORCH_CHECK_WITH(OutOfMemoryError, memory, "no memory for a gradient of ", bytes, " bytes");
#if defined(__linux__) && defined(MADV_HUGEPAGE)
      madvise(memory, bytes / page * page, MADV_HUGEPAGE); // a hint: failing changes nothing
#endif
    }
    c10::profiledCPUMemoryReporter().New(memory, bytes);
    return {memory, new Kept{this, memory, size}, &release, c10::Device(c10::kCPU)};
  }
  void copy_data(void *to, const void *from, size_t bytes) const override { std::memcpy(to, from, bytes); }

private:
  struct Kept {
    HugePages *owner;
    void *memory;
    size_t size;
  };

  void *take(size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto block = kept_.begin(); block != kept_.end(); ++block)
      if (block->size == size) {
        void *memory = block->memory;
        kept_.erase(block);
        kept_size_ -= size;
        return memory;
      }
    return nullptr;
  }
  void give_back(const Kept &block) {
#if defined(__linux__) && defined(MADV_FREE)
    madvise(block.memory, block.size, MADV_FREE);
#endif
    std::vector<Kept> oldest;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      kept_.push_back(block);
      kept_size_ += block.size;
      while (kept_size_ > max_kept_bytes) {
        oldest.push_back(kept_.front());
        kept_size_ -= kept_.front().size;
        kept_.pop_front();
      }
    }
    for (const Kept &freed : oldest)
      std::free(freed.memory);
  }
  static void release(void *context) {
    const std::unique_ptr<Kept> block(static_cast<Kept *>(context));
    c10::profiledCPUMemoryReporter().Delete(block->memory);
    block->owner->give_back(*block);
  }

  std::mutex mutex_;
  std::deque<Kept> kept_;
  size_t kept_size_ = 0;
};

} // namespace

at::Tensor empty_gradient(const at::Tensor &weight, at::MemoryFormat format) {
  static HugePages &huge_pages = *new HugePages; // outlives every tensor
  if (weight.nbytes() < HugePages::page || weight.nbytes() > HugePages::max_kept_bytes)
    return at::empty(weight.sizes(), weight.options().memory_format(format));
  return at::detail::empty_generic(weight.sizes(), &huge_pages, c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   weight.scalar_type(), format);
}

} // namespace rl_kernels
