// Views of tensors, and what kernels' structs hold of them.
#pragma once

#include "../call.h"

#include <cstdint>

namespace rl_kernels::cuda::host {

constexpr int COPIED_BYTES = 16; // in one vectorised copy; the address must be aligned to it
constexpr int64_t ANY = -1;      // of a number of channels, that has not to be a multiple of anything

int64_t numel(const View &view);
int64_t taps_of(const View &weight);

// Whether COPIED_BYTES may be copied at once along the channels (dimension 1), of which `whole` must be a multiple of
// what is copied, if it is not ANY.
bool is_vector(const View &view, int64_t whole = ANY);
// Bit j: is_vector of view j, if it has an address.
int32_t vectors(const View *views, int count, int64_t whole);

// Whether (batch, channels, *spatial) lies in memory as (batch, *spatial, channels).
bool channels_innermost(const View &view);
// That as (pixels, channels), and a weight of one tap as (out, in).
View as_pixels(const View &view);
View as_matrix(const View &weight);

// Every `steps`-th element of the spatial dimensions, from `firsts` on.
View part_of(const View &view, const int64_t *firsts, const int64_t *steps);

// Strides of (batch or out, channel, depth, height, width); 0 for dimensions that there are not. Swapped: of (channel,
// out, ...).
void write_strides(int64_t (&to)[5], const View &view, bool swapped = false);

Divisor divisor_of(int64_t divisor);

// Which pixels of the input and the output meet: missing dimensions, which come first, have size 1.
struct Meeting {
  int32_t sizes[3] = {1, 1, 1}, out_sizes[3] = {1, 1, 1}, taps[3] = {1, 1, 1};
  int32_t first_shifts[3] = {0, 0, 0}, shift_steps[3] = {0, 0, 0}, pixel_steps[3] = {1, 1, 1};

  // From an input, an output and a filter; the three arrays have as many numbers as there are spatial dimensions.
  static Meeting of(const View &input, const View &output, const View &weight, const int64_t *first_shifts,
                    const int64_t *shift_steps, const int64_t *pixel_steps);
  // As kernels take it, with positions of the sum that have so many channels innermost.
  Correlation with_channels(int64_t channels) const;
  int64_t all_taps() const { return int64_t(taps[0]) * taps[1] * taps[2]; }
};

// The recipe for (feature, channel, ...), or, transposed, dgrad's; `whole` as in is_vector.
Recipe recipe_of(const Call &call, const View *weights, int64_t groups, int64_t whole, bool transposed);

} // namespace rl_kernels::cuda::host
