#include "heuristics.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <stdexcept>
#include <string>

namespace rl_kernels::cuda::host {
namespace {

constexpr int SPLITS[] = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32};
constexpr int MIN_DEPTH = 16;     // the shortest sum that matrix instructions take
constexpr int FEW_COLUMNS = 64;   // the most that have to be one tile's: the rows are read once
constexpr int SHARED_BYTES = 128; // of shared memory, that a multiprocessor reads or writes in a cycle
constexpr double START = 2000;    // cycles that a block takes to fill its pipeline and to finish its tile

// A multiprocessor's, a cycle: multiply-adds of 16-bit matrix instructions, and bytes from L2, sustained.
struct Rates {
  int products, load_bytes;
};

Rates rates_of(const Device &device) {
  if (device.capability == 80)
    return {1024, 40};
  return device.capability >= 90 && device.capability < 120 ? Rates{2048, 40} : Rates{512, 40};
}

int64_t steps_of(const Work &work, const Configuration &c, int64_t splits) {
  return std::max<int64_t>(1, cdiv(cdiv(work.depth, c.depth), splits));
}

// Cycles that a step of one block takes of what binds it most: matrix instructions, L2 or shared memory.
double limit(const Work &work, const Configuration &c, const Rates &rates) {
  // What lies outside is not loaded, but written to shared memory as zeros.
  const double rows = double(c.rows + std::min<int64_t>(c.rows, work.rows)) / 2;
  const double columns = double(c.columns + std::min<int64_t>(c.columns, work.columns)) / 2;
  const double loaded = rows * work.row_bytes + columns * work.column_bytes;
  const double read = double(cdiv(c.rows, 64) * c.columns * work.column_bytes); // every 64 rows read the columns anew
  const double matrix = double(int64_t(c.rows) * c.columns * c.depth) * work.slowness / rates.products;
  return std::max({matrix, c.depth * loaded / rates.load_bytes, c.depth * (loaded + read) / SHARED_BYTES});
}

// Blocks that a multiprocessor's registers suffice for; a tile of either kind has one number.
int resident_of(const Configuration &c) {
  for (const auto &[rows, columns, resident] : PRODUCTS)
    if (c.rows == rows && c.columns == columns)
      return resident;
  return 1;
}

// With no more depth than there is to sum.
Configuration shortened(Configuration c, const Work &work) {
  const auto power = int64_t(std::bit_ceil(uint64_t(std::max<int64_t>(1, work.depth))));
  c.depth = int32_t(std::min<int64_t>(c.depth, std::max<int64_t>(MIN_DEPTH, power)));
  return c;
}

} // namespace

int64_t shared_bytes(const Work &work, const Configuration &c) {
  return int64_t(c.depth) * c.stages * (int64_t(c.rows) * work.row_bytes + int64_t(c.columns) * work.column_bytes);
}

std::vector<Configuration> usable(bool wgrad, const Work &work, int space) {
  std::vector<Configuration> found;
  const auto add = [&](const Size &size) {
    Configuration c = {size.rows, size.columns, STEP_BYTES / work.column_bytes, STAGES[0]};
    for (const int stages : STAGES) {
      c.stages = stages;
      if (shared_bytes(work, c) <= space)
        break;
      c.stages = STAGES[0];
    }
    found.push_back(c);
  };
  if (wgrad)
    std::for_each(std::begin(WGRADS), std::end(WGRADS), add);
  else
    std::for_each(std::begin(PRODUCTS), std::end(PRODUCTS), add);
  return found;
}

double estimate(const Work &work, const Configuration &c, int splits, const Device &device, int space) {
  const Rates rates = rates_of(device);
  const int64_t tiles = work.repeats * cdiv(work.rows, c.rows) * cdiv(work.columns, c.columns);
  const int64_t resident =
      std::max<int64_t>(1, std::min<int64_t>(resident_of(c), space / std::max<int64_t>(1, shared_bytes(work, c))));
  const int64_t waves = cdiv(tiles * splits, device.multiprocessors * resident);
  // Blocks that share a multiprocessor take turns on what binds them, and hide each other's start.
  double time = double(waves) * (double(resident * steps_of(work, c, splits)) * limit(work, c, rates) + START);
  if (splits > 1) { // a further launch takes twice the start
    const double traffic = 8.0 * splits * double(work.repeats) * double(work.rows) * double(work.columns);
    time += 2 * START + traffic / (double(device.multiprocessors) * rates.load_bytes);
  }
  return time;
}

Choice choose(bool wgrad, const Work &work, const Device &device, int space) {
  double least = 0;
  Choice best{};
  for (const Configuration &each : usable(wgrad, work, space)) {
    const Configuration c = shortened(each, work);
    const bool reads_twice = c.columns < work.columns && work.columns <= FEW_COLUMNS;
    if (reads_twice || shared_bytes(work, c) > space)
      continue;
    for (const int splits : SPLITS) {
      const bool too_short = work.depth < int64_t(splits) * c.depth;
      const bool too_large = 4 * splits * work.repeats * work.rows * work.columns > WORKSPACE_BYTES;
      if (splits > 1 && (too_short || too_large))
        break;
      const double time = estimate(work, c, splits, device, space);
      if (best.splits == 0 || time < least) {
        least = time;
        best = {c, splits, 0};
      }
    }
  }
  if (best.splits == 0)
    throw std::runtime_error("no configuration fits " + std::to_string(space) + " bytes of shared memory");
  const int64_t steps = steps_of(work, best.configuration, best.splits);
  best.steps = int32_t(steps);
  best.splits = int32_t(std::max<int64_t>(1, cdiv(cdiv(work.depth, best.configuration.depth), steps)));
  return best;
}

} // namespace rl_kernels::cuda::host
