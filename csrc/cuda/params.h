// What kernels take: one struct by value a launch, which host/ fills (finish_params.h for more).
//
// Offsets are in elements. Linear layers are convolutions of one tap: tokens are pixels, each an image of its own.
#pragma once

#include <cstdint>

namespace rl_kernels::cuda {

constexpr int MAX_SOURCES = 4;

// Division of n < 2^31 by a number that is known before the launch: n * multiplier / 2^(32 + shift), but n by 1.
struct Divisor {
  uint32_t divisor, multiplier, shift;
};

// Where a convolution's pixels and taps lie, (depth, height, width) each. Pixel p and tap t of the result meet the
// input's pixel p * pixel_steps + first_shifts + t * shift_steps.
struct Correlation {
  int32_t sizes[3], taps[3], first_shifts[3], shift_steps[3], pixel_steps[3];
  Divisor by_channels, by_taps[3], by_out_sizes[3]; // [0] of by_taps is not used
};

// The recipe: sources and coefficients. Strides of a source: (feature, channel, depth, height, width), in which
// channels are summed over; those of dgrad's recipe are the layer's output channels.
struct Recipe {
  uint64_t weights[MAX_SOURCES];
  uint64_t coefficients;
  int64_t strides[MAX_SOURCES][5];
  int64_t group_strides[MAX_SOURCES];    // from group to group
  int64_t source_stride, channel_stride; // of the coefficients; channel_stride 0: one for all channels
  int32_t sources;
  int32_t vectors; // bit j: 16 bytes of source j may be copied at once
};

// out (pixels, features) = activation (pixels, taps * channels) W^T, or, split, a share of it.
struct Product {
  Recipe recipe;
  uint64_t biases[MAX_SOURCES]; // 0: none
  int64_t bias_strides[MAX_SOURCES];
  uint64_t activation, out; // out: of float32, (split, pixel, group * feature) where there is more than one split
  int64_t activation_strides[5], out_strides[5]; // (image, channel or feature, depth, height, width)
  Correlation correlation;
  int32_t pixels, features, channels;    // features and channels of one group
  int32_t steps, splits, stages, groups; // steps: of TILE_DEPTH, of one split
  int32_t vector_activation, vector_out; // whether 16 bytes may be copied at once
};

// The gradients from G (out, taps * in) = dy^T (out, pixels) x (pixels, taps * in), or, split, a share of G.
struct Wgrad {
  Recipe recipe;                   // features are output channels
  uint64_t gradients[MAX_SOURCES]; // of the sources; 0: not asked for
  int64_t gradient_strides[MAX_SOURCES][5], gradient_group_strides[MAX_SOURCES];
  uint64_t dots; // float32 (source, part), or (source, part, all output channels) with coefficients a channel; 0: none
  uint64_t partial; // float32 (split, all output channels, taps * in); 0 without splits
  uint64_t dy, x;
  int64_t dy_strides[5], x_strides[5]; // (image, channel, depth, height, width)
  Correlation correlation;
  int32_t pixels, features, channels;
  int32_t steps, splits, stages, groups;
  int32_t vector_dy, vector_x, vector_gradients; // vector_gradients, as the next two: bit j
  int32_t added;                                 // whether a gradient is added to what is there
  int32_t wide;                                  // whether it is float32 where the sources have 16 bits
  int32_t per_channel;                           // whether coefficients are a channel's own, whatever their stride
};

// out = the splits' shares of a product added in their order, and the bias.
struct ProductReduction {
  Product product; // its out is the result's
  uint64_t partial;
};

} // namespace rl_kernels::cuda
