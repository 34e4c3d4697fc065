// One call of an op, as the binding describes it to rl_kernels/_cuda.so: addresses, sizes and strides. Part of the C
// interface (abi.h).
#pragma once

#include "params.h"

#include <cstdint>

namespace rl_kernels::cuda {

constexpr int MAX_DIMS = 5;

// A tensor of (tokens, channel), or of (batch or out, channel, *spatial); sizes and strides are in elements. A vector
// has one dimension.
struct View {
  uint64_t address; // 0 where there is no such tensor, or nothing in it
  int32_t bytes;    // of an element
  int32_t dims;
  int64_t sizes[MAX_DIMS], strides[MAX_DIMS];
};

enum class ElementName : int32_t { f16, bf16, tf32 };
enum class Op : int32_t { forward, dgrad, wgrad };

// What a plan depends on, of a GPU.
struct Device {
  int32_t capability; // 80 for 8.0
  int32_t multiprocessors;
  int32_t shared_bytes; // that one block may take
};

// A product of (rows, columns) summed over depth, as heuristics.h takes it.
struct Work {
  int64_t rows, columns, depth;
  int64_t repeats;                 // such products side by side
  int32_t row_bytes, column_bytes; // that a row or a column of a tile reads for each step of the sum
  double slowness;                 // of the matrix instructions, relative to 16-bit ones
};

// A block's tile, by `depth` of the sum, and the stages of its pipeline.
struct Configuration {
  int32_t rows, columns, depth, stages;
};

// In how many parts the sum is split, of `steps` of the configuration's depth each.
struct Choice {
  Configuration configuration;
  int32_t splits, steps;
};

struct Launch;

// What a call asks of its caller. Each takes `context`.
struct Hooks {
  void *context;
  // Memory on the device until the kernels that are queued have run; 0 where there is none.
  uint64_t (*allocate)(void *context, int64_t bytes);
  // Instead of the choice by estimates, where it is given: 0, or 1 where it failed. `space`: bytes of shared memory.
  int32_t (*choose)(void *context, int32_t wgrad, const Work *work, int32_t space, Choice *choice);
  // Instead of the real launch, where it is given: 0, or 1 where it failed.
  int32_t (*launch)(void *context, const char *kernel, int32_t threads, const Launch *launch);
};

// What a plan is held to, for tests; 0: as is best.
struct Held {
  int32_t products_only; // neither skinny nor resident kernels
  int32_t skinny_splits;
  int32_t resident_blocks, resident_stages;
};

// Arguments have passed the op's checks. Linear layers have two dimensions: their leading ones are one.
struct Call {
  Op op;
  ElementName element;
  int32_t sources;
  int32_t spatial; // dimensions of a convolution; 0 for a linear layer
  int32_t biased;  // whether there are biases
  int32_t added;   // bit j: source j's gradient is added to what is there
  Device device;
  View activation; // x of a forward, dy of the gradients
  View x;          // of a wgrad
  View out;        // of a forward or dgrad
  View weights[MAX_SOURCES], biases[MAX_SOURCES], coefficients;
  // Of a wgrad; without an address where it is not wanted.
  View weight_gradients[MAX_SOURCES], bias_gradients[MAX_SOURCES], coefficient_gradients;
  int32_t wants_weights, wants_biases, wants_coefficients; // the first two: bit j
  int32_t groups;
  int64_t stride[3], padding[3], dilation[3];
  void *stream;
  Held held;
  Hooks hooks;
};

} // namespace rl_kernels::cuda
