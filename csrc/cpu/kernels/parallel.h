// How a team of threads shares out work, and the scratch that each of them has.
#pragma once

#include "problem.h"
#include "vector.h"

#include <cstdint>

namespace rl_kernels::cpu {
namespace {

// The scratch of the calling thread, cut into typed pieces.
class Scratch {
public:
  explicit Scratch(const Team &team) : next_(static_cast<char *>(team.scratch(max_scratch_bytes))) {}
  template <class T> T *take(int64_t count) {
    T *piece = reinterpret_cast<T *>(next_);
    next_ += round_up(count * int64_t(sizeof(T)), 64);
    return piece;
  }

private:
  char *next_;
};

// Calls body(item) for every item in 0..count-1, each on one thread: whichever is free takes the next, so that a thread
// whose core is busy elsewhere holds nobody up. What an item computes does not depend on the thread.
template <class Body> void share(const Team &team, int64_t count, const Body &body) {
  struct Context {
    const Body *body;
    int64_t next, count;
  } context{&body, 0, count};
  const auto run = [](void *opaque, int) {
    auto *shared = static_cast<Context *>(opaque);
    for (;;) {
      const int64_t item = __atomic_fetch_add(&shared->next, 1, __ATOMIC_RELAXED);
      if (item >= shared->count)
        return;
      (*shared->body)(item);
    }
  };
  team.run(int(min(team.threads, count)), run, &context);
}

// How many blocks of at most `largest` to cut `total` into, a multiple of `threads` where that leaves none smaller than
// `smallest`.
inline int64_t block_count(int64_t total, int64_t largest, int64_t smallest, int64_t threads) {
  const int64_t count = ceil_div(total, largest), even = round_up(count, threads);
  return max(1, total / even >= smallest ? even : count);
}

// Into how many shares of the rows to cut `items` pieces of work that the threads cannot share out evenly.
inline int64_t row_splits(int64_t items, int64_t rows, int64_t threads) {
  return items % threads == 0 || items >= 4 * threads ? 1 : block_count(rows, rows, 128, threads);
}

// In how many shares to cut `count` blocks, at most `largest` and four a thread, so that the threads end together.
inline int64_t even_splits(int64_t count, int64_t largest, int64_t threads) {
  int64_t best = 1, shortest = count;
  for (int64_t splits = 2; splits <= min(min(count, largest), 4 * threads); ++splits)
    if (const int64_t length = ceil_div(count, splits) * ceil_div(splits, threads); length <= shortest)
      best = splits, shortest = length;
  return best;
}

} // namespace
} // namespace rl_kernels::cpu
