#include "views.h"

#include "heuristics.h"

#include <algorithm>
#include <bit>

namespace rl_kernels::cuda::host {

int64_t numel(const View &view) {
  int64_t product = 1;
  for (int d = 0; d < view.dims; ++d)
    product *= view.sizes[d];
  return product;
}

int64_t taps_of(const View &weight) {
  int64_t product = 1;
  for (int d = 2; d < weight.dims; ++d)
    product *= weight.sizes[d];
  return product;
}

bool is_vector(const View &view, int64_t whole) {
  const int64_t chunk = COPIED_BYTES / view.bytes;
  if (view.address % COPIED_BYTES != 0 || view.strides[1] != 1 || (whole != ANY && whole % chunk != 0))
    return false;
  for (int d = 0; d < view.dims; ++d)
    if (d != 1 && view.sizes[d] > 1 && view.strides[d] % chunk != 0)
      return false;
  return true;
}

int32_t vectors(const View *views, int count, int64_t whole) {
  int32_t bits = 0;
  for (int j = 0; j < count; ++j)
    if (views[j].dims > 0 && is_vector(views[j], whole))
      bits |= 1 << j;
  return bits;
}

bool channels_innermost(const View &view) {
  if (numel(view) == 0)
    return true;
  int64_t expected = 1;
  const auto fits = [&](int d) {
    const bool right = view.sizes[d] == 1 || view.strides[d] == expected;
    expected *= view.sizes[d];
    return right;
  };
  if (!fits(1))
    return false;
  for (int d = view.dims - 1; d >= 2; --d)
    if (!fits(d))
      return false;
  return fits(0);
}

View as_pixels(const View &view) {
  const int64_t channels = view.sizes[1];
  return {view.address, view.bytes, 2, {channels == 0 ? 0 : numel(view) / channels, channels}, {channels, 1}};
}

View as_matrix(const View &weight) {
  return {weight.address, weight.bytes, 2, {weight.sizes[0], weight.sizes[1]}, {weight.strides[0], weight.strides[1]}};
}

View part_of(const View &view, const int64_t *firsts, const int64_t *steps) {
  View part = view;
  for (int d = 2; d < view.dims; ++d) {
    const int64_t first = std::min(firsts[d - 2], view.sizes[d]);
    part.sizes[d] = cdiv(view.sizes[d] - first, steps[d - 2]);
    part.strides[d] = view.strides[d] * steps[d - 2];
    part.address += uint64_t(first * view.strides[d] * view.bytes);
  }
  if (numel(part) == 0)
    part.address = 0;
  return part;
}

void write_strides(int64_t (&to)[5], const View &view, bool swapped) {
  std::fill(std::begin(to), std::end(to), 0);
  if (view.dims == 0)
    return;
  to[0] = view.strides[swapped ? 1 : 0];
  to[1] = view.strides[swapped ? 0 : 1];
  for (int d = 2; d < view.dims; ++d)
    to[5 - view.dims + d] = view.strides[d];
}

Divisor divisor_of(int64_t divisor) {
  if (divisor <= 1) // nothing is divided by 0
    return {1, 0, 0};
  const int bits = std::bit_width(uint64_t(divisor - 1));
  const auto multiplier = ((uint64_t{1} << (31 + bits)) + uint64_t(divisor) - 1) / uint64_t(divisor);
  return {uint32_t(divisor), uint32_t(multiplier), uint32_t(bits - 1)};
}

Meeting Meeting::of(const View &input, const View &output, const View &weight, const int64_t *first_shifts,
                    const int64_t *shift_steps, const int64_t *pixel_steps) {
  Meeting found;
  const int spatial = weight.dims - 2;
  for (int d = 0; d < spatial; ++d) {
    const int at = 3 - spatial + d;
    found.sizes[at] = int32_t(input.sizes[2 + d]);
    found.out_sizes[at] = int32_t(output.sizes[2 + d]);
    found.taps[at] = int32_t(weight.sizes[2 + d]);
    found.first_shifts[at] = int32_t(first_shifts[d]);
    found.shift_steps[at] = int32_t(shift_steps[d]);
    found.pixel_steps[at] = int32_t(pixel_steps[d]);
  }
  return found;
}

Correlation Meeting::with_channels(int64_t channels) const {
  Correlation c = {};
  for (int d = 0; d < 3; ++d) {
    c.sizes[d] = sizes[d];
    c.taps[d] = taps[d];
    c.first_shifts[d] = first_shifts[d];
    c.shift_steps[d] = shift_steps[d];
    c.pixel_steps[d] = pixel_steps[d];
    c.by_taps[d] = divisor_of(taps[d]);
    c.by_out_sizes[d] = divisor_of(out_sizes[d]);
  }
  c.by_channels = divisor_of(channels);
  return c;
}

Recipe recipe_of(const Call &call, const View *weights, int64_t groups, int64_t whole, bool transposed) {
  Recipe recipe = {};
  for (int j = 0; j < call.sources; ++j) {
    const View &weight = weights[j];
    recipe.weights[j] = weight.address;
    write_strides(recipe.strides[j], weight, transposed);
    if (groups > 1)
      recipe.group_strides[j] = weight.sizes[0] / groups * weight.strides[0];
  }
  const View &coefficients = call.coefficients;
  recipe.coefficients = coefficients.address;
  recipe.source_stride = coefficients.strides[0];
  recipe.channel_stride = coefficients.dims == 2 ? coefficients.strides[1] : 0;
  recipe.sources = call.sources;
  recipe.vectors = vectors(weights, call.sources, whole);
  return recipe;
}

} // namespace rl_kernels::cuda::host
