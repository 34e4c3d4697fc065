// What csrc/cpu/torch and the kernels agree on: raw pointers, sizes and strides in elements; no torch here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rl_kernels::cpu {

enum class Type { float32, float64, bfloat16, float16 };

constexpr int max_sources = 16;

// Runs body(context, thread) for every thread in 0..threads-1 at once.
struct Team {
  int threads;
  void (*run)(int threads, void (*body)(void *context, int thread), void *context);
  // Scratch of the calling thread, aligned to 64 bytes; the same memory at every call.
  void *(*scratch)(size_t bytes);
};

// The most scratch that a thread asks for.
constexpr size_t max_scratch_bytes = size_t{15} << 18; // 3.75 MiB

// The recipe W[o, i, t] = sum_j c_j(o) * W_j[o, i, t]; t runs over the kernel's taps (one for a linear layer). Outer
// coefficients are one an element: c_j(o, q) = sum_r left[j, r, o] * right[j, r, q], q an element's place in its row as
// the first source's rows lie: taps innermost, or input channels where they are so there.
struct Recipe {
  int sources;
  Type type; // of the sources
  const void *weight[max_sources];
  int64_t out_stride[max_sources], in_stride[max_sources], tap_stride[max_sources];
  const void *coefficients; // float, or double for float64 sources; left of Outer ones
  int64_t source_stride, channel_stride;
  int64_t rank;                  // of Outer coefficients; 0 with others
  int64_t rank_stride;           // of left, and of right
  const void *right;             // its elements side by side, its sources as far apart as left's
  const void *bias[max_sources]; // nullptr without biases
  int64_t bias_stride[max_sources];
};

// Where wgrad writes; a null pointer is not wanted.
struct WgradOutputs {
  void *weight[max_sources];                 // in the sources' type
  int64_t out_stride, in_stride, tap_stride; // the same for every source
  void *coefficients;                        // laid out as (N,), (N, out) or (N, R, out + row), in their type
  bool per_channel;                          // (N, out), whatever the stride of the coefficients, which may be 0
  void *bias[max_sources];
};

// y (m, n) = x (m, k) W^T. Rows have unit stride between elements.
struct Linear {
  Type type; // of x, y and their gradients
  int64_t m, n, k;
  Recipe recipe;
  const void *x;
  int64_t x_stride;
  const void *dy;
  int64_t dy_stride;
  void *out; // y or dx, contiguous
  WgradOutputs gradients;
  double *dots;    // wgrad: linear_dots(...) doubles of scratch
  double *columns; // wgrad of Outer coefficients: linear_shares(...) times the size of right, zeros
};

// Up to so many rows of an activation a call is bound by reading the sources.
constexpr int64_t max_few_rows = 8;

namespace { // as all that the instruction sets share: see instruction_set.h

// The sums that a channel keeps for the gradients of coefficients: <G, W_j>, or one for each of its elements of left.
inline int64_t dot_count(const Recipe &recipe) { return recipe.sources * (recipe.rank > 0 ? recipe.rank : 1); }

// wgrad finishes this many columns at once, and keeps their share of <G, W_j> apart until all are done.
inline int64_t linear_dots_columns(size_t element_bytes) { return 4096 / int64_t(element_bytes); }
inline int64_t linear_dots(int64_t n, int64_t k, int64_t count, size_t element_bytes, int threads) {
  const int64_t columns = linear_dots_columns(element_bytes);
  return (((k + columns - 1) / columns + threads) * count + 1) * n;
}
// In how many shares it takes the rows of W where each share sums the gradient of right by itself.
inline int64_t linear_shares(int64_t n, int64_t k, size_t element_bytes, int threads) {
  const int64_t columns = linear_dots_columns(element_bytes), across = (k + columns - 1) / columns;
  if (n == 0 || across % threads == 0)
    return 1;
  const int64_t shares = (2 * threads + across - 1) / across;
  return shares < n ? shares : n;
}

} // namespace

// A tensor (batch, channels, depth, height, width) of a convolution; missing dimensions have size 1.
struct Volume {
  int64_t channels, size[3];
  int64_t batch_stride, channel_stride, stride[3];
};

struct Conv {
  Type type;
  int64_t batch, groups;
  int64_t kernel[3], stride[3], padding[3], dilation[3];
  Recipe recipe;
  Volume x, y;       // y describes dy as well, x describes dx
  const void *input; // x, or dy for dgrad
  const void *dy;    // wgrad
  void *out;
  WgradOutputs gradients;
  double *dots;        // wgrad: (dot_count + 1) * output channels doubles of scratch
  double *columns;     // wgrad of Outer coefficients: `threads` times the size of right, zeros
  void *partials;      // wgrad: conv_partials bytes of scratch
  const void *product; // wgrad: G as conv_mix lays W out, where it is there already; else nullptr
};

// The kernels of one instruction set.
struct Kernels {
  const char *name;
  void (*linear_forward)(const Linear &, const Team &);
  void (*linear_dgrad)(const Linear &, const Team &);
  void (*linear_wgrad)(const Linear &, const Team &);
  // dgrad and wgrad in one pass over the sources, for max_few_rows rows at most; false, and nothing done, where the
  // sources do not lie so, or coefficients are Outer ones.
  bool (*linear_backward)(const Linear &, const Team &);
  void (*conv_forward)(const Conv &, const Team &);
  void (*conv_dgrad)(const Conv &, const Team &);
  void (*conv_wgrad)(const Conv &, const Team &);
  // The mixed filter itself into `out`, (out, in, taps) or, where the first source has its input channels innermost,
  // (out, taps, in); and the mixed bias into `bias`, if the recipe has one.
  void (*conv_mix)(const Conv &, void *bias, const Team &);
  // Bytes of partial sums that conv_wgrad wants.
  int64_t (*conv_partials)(const Conv &, int threads);
  // Whether the convolution's pieces fit into the scratch; its kernels may be called only then.
  bool (*conv_fits)(const Conv &);
};

// Null where the machine lacks the instruction set.
const Kernels *kernels_scalar();
const Kernels *kernels_avx2();
const Kernels *kernels_avx512();

} // namespace rl_kernels::cpu
