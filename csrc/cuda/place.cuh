// Where a product's pixels, channels and taps lie in memory: Rows for linear layers, Pixels for convolutions.
#pragma once

#include "params.h"

namespace rl_kernels {

__device__ inline uint32_t quotient(uint32_t n, const Divisor &by) {
  return by.divisor == 1 ? n : __umulhi(n, by.multiplier) >> by.shift;
}

// Of all dimensions.
__device__ inline int taps_of(const Geometry &g) { return g.taps[0] * g.taps[1] * g.taps[2]; }

// n becomes the remainder.
__device__ inline uint32_t divide(uint32_t &n, const Divisor &by) {
  uint32_t q = quotient(n, by);
  n -= q * by.divisor;
  return q;
}

// A linear layer: a pixel is a row of the activation, and there is one tap.
struct Rows {
  static constexpr bool KEPT = false; // whether where a pixel lies takes long to compute
  struct Pixel {
    int64_t offset;
  };
  // A position of the sum: a channel, and what it adds to a pixel's offset.
  struct Position {
    int channel;
    int64_t offset;
  };

  __device__ static Pixel pixel(const Geometry &, const int64_t *strides, int pixel) { return {pixel * strides[0]}; }

  __device__ static Position position(const Geometry &, const int64_t *strides, int k) { return {k, k * strides[1]}; }

  __device__ static bool meets(const Geometry &, const Pixel &, const Position &) { return true; }

  // What position k adds to an offset in a tensor of (feature, channel, ...).
  __device__ static int64_t weight_offset(const Geometry &, const int64_t *strides, int k) { return k * strides[1]; }

  __device__ static int64_t out_offset(const Geometry &, const int64_t *strides, int pixel) {
    return pixel * strides[0];
  }

  __device__ static int channel(const Geometry &, int k) { return k; }
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
  struct Tap {
    int channel, d, h, w;
  };

  __device__ static Tap tap(const Geometry &g, int k) {
    uint32_t channel = k, d = divide(channel, g.by_channels), w = d;
    uint32_t h = divide(w, g.by_taps[2]);
    d = divide(h, g.by_taps[1]);
    return {int(channel), int(d), int(h), int(w)};
  }

  __device__ static Pixel pixel(const Geometry &g, const int64_t *strides, int pixel) {
    uint32_t w = pixel, h = divide(w, g.by_out_sizes[2]);
    uint32_t d = divide(h, g.by_out_sizes[1]);
    uint32_t image = divide(d, g.by_out_sizes[0]);
    Pixel at = {0, int(d) * g.pixel_steps[0] + g.first_shifts[0], int(h) * g.pixel_steps[1] + g.first_shifts[1],
                int(w) * g.pixel_steps[2] + g.first_shifts[2]};
    at.offset = image * strides[0] + at.d * strides[2] + at.h * strides[3] + at.w * strides[4];
    return at;
  }

  __device__ static Position position(const Geometry &g, const int64_t *strides, int k) {
    Tap t = tap(g, k);
    Position at = {t.channel, 0, t.d * g.shift_steps[0], t.h * g.shift_steps[1], t.w * g.shift_steps[2]};
    at.offset = t.channel * strides[1] + at.d * strides[2] + at.h * strides[3] + at.w * strides[4];
    return at;
  }

  // Whether there is a pixel of the input, and not padding.
  __device__ static bool meets(const Geometry &g, const Pixel &pixel, const Position &at) {
    return unsigned(pixel.d + at.d) < unsigned(g.sizes[0]) && unsigned(pixel.h + at.h) < unsigned(g.sizes[1]) &&
           unsigned(pixel.w + at.w) < unsigned(g.sizes[2]);
  }

  __device__ static int64_t weight_offset(const Geometry &g, const int64_t *strides, int k) {
    Tap t = tap(g, k);
    return t.channel * strides[1] + t.d * strides[2] + t.h * strides[3] + t.w * strides[4];
  }

  __device__ static int64_t out_offset(const Geometry &g, const int64_t *strides, int pixel) {
    uint32_t w = pixel, h = divide(w, g.by_out_sizes[2]);
    uint32_t d = divide(h, g.by_out_sizes[1]);
    uint32_t image = divide(d, g.by_out_sizes[0]);
    return image * strides[0] + d * strides[2] + h * strides[3] + w * strides[4];
  }

  __device__ static int channel(const Geometry &g, int k) {
    uint32_t channel = k;
    divide(channel, g.by_channels);
    return channel;
  }
};

} // namespace rl_kernels
