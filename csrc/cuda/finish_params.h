// What the kernels take that end a wgrad, as params.h has it for the others.
#pragma once

#include "params.h"

namespace rl_kernels::cuda {

// dy summed over the pixels of a split, of each channel.
struct ChannelSums {
  uint64_t dy, sums; // sums: of float64, (split, channel)
  int64_t dy_strides[5];
  Correlation correlation;
  int32_t pixels, channels; // channels of all groups
  int32_t rows;             // pixels of one split
  int32_t vector_dy;
};

// The gradients of coefficients and biases, from what a wgrad and ChannelSums left.
struct Finish {
  uint64_t dots;                                             // as Wgrad's; 0: none
  uint64_t sums;                                             // of float64, (split, channel); 0: none
  uint64_t coefficients, coefficient_gradients;              // the gradients lie without gaps; 0: not asked for
  uint64_t biases[MAX_SOURCES], bias_gradients[MAX_SOURCES]; // 0: not asked for
  int64_t bias_strides[MAX_SOURCES];
  int64_t source_stride, channel_stride; // of the coefficients
  int32_t sources, parts, splits, channels;
  int32_t per_channel;
  int32_t totals; // how many blocks, the first ones, make a coefficient each: the others make a channel a thread
};

} // namespace rl_kernels::cuda
