// Each op as the products that it consists of.
#include "heuristics.h"
#include "product.h"
#include "wgrad.h"

#include <algorithm>
#include <numeric>

namespace rl_kernels::cuda::host {
namespace {

constexpr int64_t ONES[3] = {1, 1, 1};

bool all(const int64_t *values, int count, int64_t expected) {
  return std::all_of(values, values + count, [&](int64_t value) { return value == expected; });
}

// Whether a convolution is a product of (pixels, channels), for activations that can be seen so.
bool is_product(const Call &call) {
  if (call.held.resident_blocks > 0)
    return false;
  return call.groups == 1 && taps_of(call.weights[0]) == 1 && all(call.stride, call.spatial, 1) &&
         all(call.padding, call.spatial, 0) && channels_innermost(call.activation) && channels_innermost(call.out);
}

void multiply_as_linear(const Call &call, Plan &plan) {
  Multiplication product = {call, call.out, call.activation, {}, {}, 1, call.op == Op::dgrad};
  for (int j = 0; j < call.sources; ++j)
    product.weights[j] = as_matrix(call.weights[j]);
  if (call.spatial > 0) {
    product.out = as_pixels(call.out);
    product.activation = as_pixels(call.activation);
  }
  multiply_rows(product, plan);
}

Meeting forward_meeting(const Call &call, const View &x, const View &y) {
  const int64_t shifts[3] = {-call.padding[0], -call.padding[1], -call.padding[2]};
  return Meeting::of(x, y, call.weights[0], shifts, call.dilation, call.stride);
}

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

// One phase of a strided dgrad: the pixels of dx from `at` on, `stride` apart, and the taps that meet them; no zero is
// multiplied.
void multiply_phase(const Call &call, const int64_t *at, Plan &plan) {
  int64_t firsts[3] = {}, apart[3] = {1, 1, 1}, shifts[3] = {}, shift_steps[3] = {};
  for (int d = 0; d < call.spatial; ++d) {
    const int64_t step = call.stride[d], pad = call.padding[d], dilation = call.dilation[d];
    const int64_t size = call.weights[0].sizes[2 + d];
    apart[d] = step / std::gcd(step, dilation);
    firsts[d] = size; // of the taps: where none meets
    for (int64_t tap = 0; tap < std::min(apart[d], size); ++tap)
      if ((at[d] + pad - tap * dilation) % step == 0) {
        firsts[d] = tap;
        break;
      }
    shifts[d] = floor_div(at[d] + pad - firsts[d] * dilation, step);
    shift_steps[d] = -(apart[d] * dilation / step);
  }
  Multiplication product = {call, part_of(call.out, at, call.stride), call.activation, {}, {}, call.groups, true};
  if (numel(product.out) == 0)
    return;
  for (int j = 0; j < call.sources; ++j)
    product.weights[j] = part_of(call.weights[j], firsts, apart);
  product.meeting = Meeting::of(call.activation, product.out, product.weights[0], shifts, shift_steps, ONES);
  multiply_pixels(product, plan);
}

void multiply(const Call &call, Plan &plan) {
  if (numel(call.out) == 0)
    return;
  if (call.spatial == 0 || is_product(call))
    return multiply_as_linear(call, plan);
  if (call.op == Op::forward) {
    Multiplication product = {call, call.out, call.activation, {}, {}, call.groups, false};
    std::copy(call.weights, call.weights + call.sources, product.weights);
    product.meeting = forward_meeting(call, call.activation, call.out);
    return multiply_pixels(product, plan);
  }
  int64_t at[3] = {};
  const auto strides = [&](int d) { return d < call.spatial ? call.stride[d] : 1; };
  for (at[0] = 0; at[0] < strides(0); ++at[0])
    for (at[1] = 0; at[1] < strides(1); ++at[1])
      for (at[2] = 0; at[2] < strides(2); ++at[2])
        multiply_phase(call, at, plan);
}

} // namespace

void plan(const Call &call, Plan &plan) {
  if (call.op != Op::wgrad)
    multiply(call, plan);
  else
    differentiate(call, call.spatial == 0 ? Meeting() : forward_meeting(call, call.x, call.activation), plan);
}

} // namespace rl_kernels::cuda::host
