#include "threads.h"

#include "ops.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <cstdlib>
#include <memory>

namespace rl_kernels {
namespace {

void *thread_scratch(size_t bytes) {
  struct Release {
    void operator()(void *memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<void, Release> memory;
  if (!memory)
    memory.reset(std::aligned_alloc(4096, cpu::max_scratch_bytes));
  TORCH_CHECK_WITH(OutOfMemoryError, memory && bytes <= cpu::max_scratch_bytes,
                   "no scratch memory for a thread: asked for ", bytes, " bytes");
  return memory.get();
}

// Work on so few multiplications is done before a second thread has woken up.
constexpr double serial_below = 1e6;

} // namespace

cpu::Team threads_for(double multiplications) {
  const bool serial = multiplications < serial_below || at::in_parallel_region();
  return {serial ? 1 : at::get_num_threads(),
          [](int threads, void (*body)(void *, int), void *context) {
            if (threads == 1)
              return body(context, 0);
            at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
              for (int64_t thread = begin; thread < end; ++thread)
                body(context, int(thread));
            });
          },
          thread_scratch};
}

int64_t workspace_bytes_a_thread() { return int64_t(cpu::max_scratch_bytes); }

} // namespace rl_kernels
