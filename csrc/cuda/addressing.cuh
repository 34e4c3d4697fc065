// Where a product's pixels, channels and taps lie in memory: Rows for linear layers, Pixels for convolutions.
#pragma once

#include "params.h"

namespace rl_kernels::cuda {

__device__ inline uint32_t quotient(uint32_t n, const Divisor &by) {
  return by.divisor == 1 ? n : __umulhi(n, by.multiplier) >> by.shift;
}

// The filter's, of all dimensions.
__device__ inline int taps_of(const Correlation &c) { return c.taps[0] * c.taps[1] * c.taps[2]; }

// n becomes the remainder.
__device__ inline uint32_t divide(uint32_t &n, const Divisor &by) {
  uint32_t q = quotient(n, by);
  n -= q * by.divisor;
  return q;
}

// A linear layer: a pixel is a row of the activation, and there is one tap.
struct Rows {
  static constexpr bool KEPT = false; // whether pixels are kept in shared memory, for they take long to compute
  struct Pixel {
    int64_t offset;
  };
  // A position of the sum: a channel, and what it adds to a pixel's offset.
  struct Position {
    int channel;
    int64_t offset;
  };

  __device__ static Pixel pixel(const Correlation &, const int64_t *strides, int pixel) { return {pixel * strides[0]}; }

  __device__ static Position position(const Correlation &, const int64_t *strides, int k) {
    return {k, k * strides[1]};
  }

  __device__ static bool meets(const Correlation &, const Pixel &, const Position &) { return true; }

  // What position k adds to an offset in a tensor of (feature, channel, ...).
  __device__ static int64_t weight_offset(const Correlation &, const int64_t *strides, int k) { return k * strides[1]; }

  __device__ static int64_t out_offset(const Correlation &, const int64_t *strides, int pixel) {
    return pixel * strides[0];
  }

  __device__ static int channel(const Correlation &, int k) { return k; }
};

// A convolution, of up to three dimensions; positions of the sum have channels innermost, then width, height, depth.
struct Pixels {
  static constexpr bool KEPT = true;
  struct Pixel {
    int64_t offset; // of the input's pixel that meets the first tap, which may lie outside
    int d, h, w;    // that pixel
  };
  struct Position {
    int channel;
    int64_t offset;
    int d, h, w; // from the first tap's pixel to this one's
  };
  // Kernels keep these in shared memory, of which a launch has to know how much.
  static_assert(sizeof(Pixel) == 24 && sizeof(Position) == 32);
  struct Tap {
    int channel, d, h, w;
  };

  __device__ static Tap tap(const Correlation &c, int k) {
    uint32_t channel = k, d = divide(channel, c.by_channels), w = d;
    uint32_t h = divide(w, c.by_taps[2]);
    d = divide(h, c.by_taps[1]);
    return {int(channel), int(d), int(h), int(w)};
  }

  __device__ static Pixel pixel(const Correlation &c, const int64_t *strides, int pixel) {
    uint32_t w = pixel, h = divide(w, c.by_out_sizes[2]);
    uint32_t d = divide(h, c.by_out_sizes[1]);
    uint32_t image = divide(d, c.by_out_sizes[0]);
    Pixel at = {0, int(d) * c.pixel_steps[0] + c.first_shifts[0], int(h) * c.pixel_steps[1] + c.first_shifts[1],
                int(w) * c.pixel_steps[2] + c.first_shifts[2]};
    at.offset = image * strides[0] + at.d * strides[2] + at.h * strides[3] + at.w * strides[4];
    return at;
  }

  __device__ static Position position(const Correlation &c, const int64_t *strides, int k) {
    Tap t = tap(c, k);
    Position at = {t.channel, 0, t.d * c.shift_steps[0], t.h * c.shift_steps[1], t.w * c.shift_steps[2]};
    at.offset = t.channel * strides[1] + at.d * strides[2] + at.h * strides[3] + at.w * strides[4];
    return at;
  }

  // Whether there is a pixel of the input, and not padding.
  __device__ static bool meets(const Correlation &c, const Pixel &pixel, const Position &at) {
    // Without a branch: all three are computed.
    return bool(int(unsigned(pixel.d + at.d) < unsigned(c.sizes[0])) &
                int(unsigned(pixel.h + at.h) < unsigned(c.sizes[1])) &
                int(unsigned(pixel.w + at.w) < unsigned(c.sizes[2])));
  }

  __device__ static int64_t weight_offset(const Correlation &c, const int64_t *strides, int k) {
    Tap t = tap(c, k);
    return t.channel * strides[1] + t.d * strides[2] + t.h * strides[3] + t.w * strides[4];
  }

  __device__ static int64_t out_offset(const Correlation &c, const int64_t *strides, int pixel) {
    uint32_t w = pixel, h = divide(w, c.by_out_sizes[2]);
    uint32_t d = divide(h, c.by_out_sizes[1]);
    uint32_t image = divide(d, c.by_out_sizes[0]);
    return image * strides[0] + d * strides[2] + h * strides[3] + w * strides[4];
  }

  __device__ static int channel(const Correlation &c, int k) {
    uint32_t channel = k;
    divide(channel, c.by_channels);
    return channel;
  }
};

} // namespace rl_kernels::cuda
