// A convolution as correlations over pixels, and how these are cut into blocks. Missing dimensions have size 1:
// everything is three-dimensional.
//
// Forward and dgrad are one correlation: output pixel p sums, over taps, the channels of input pixel p * step + shift
// times a slice of the mixed weight. A strided dgrad is one such correlation for each phase of the stride, over the
// taps that meet it: no zero is multiplied.
#pragma once

#include "problem.h"
#include "vector.h"

#include <cstdint>

namespace rl_kernels::cpu {
namespace {

constexpr int64_t max_taps = 1024;   // of a kernel, and along one dimension
constexpr int64_t max_pixels = 1024; // of a block
constexpr int64_t strip_bytes = 192 << 10, max_strip_bytes = 1 << 20;

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
  bool operator==(const Range &other) const { return begin == other.begin && end == other.end; }
};

// One correlation: which pixels, over the grid of taps that the lists of the three dimensions span.
struct Phase {
  struct Dimension {
    int64_t taps;
    int64_t shift[max_taps], index[max_taps]; // ascending shifts; tap of the kernel
    int64_t size;                             // of the input
    int64_t step;                             // of the input, a pixel
    int64_t pixels, first, out_step;          // of the output

    int64_t low() const { return taps ? shift[0] : 0; }
    int64_t high() const { return taps ? shift[taps - 1] : 0; }
    // The taps that fall inside the input at `pixel`.
    Range inside(int64_t pixel) const {
      int64_t from = 0, to = taps;
      while (from < taps && pixel * step + shift[from] < 0)
        ++from;
      while (to > from && pixel * step + shift[to - 1] >= size)
        --to;
      return {from, to};
    }
    // The pixel after the last one from `pixel` on, below `end`, inside at the same taps.
    int64_t alike(int64_t pixel, int64_t end) const {
      const Range range = inside(pixel);
      int64_t next = pixel + 1;
      while (next < end && inside(next) == range)
        ++next;
      return next;
    }
    bool consecutive() const {
      for (int64_t t = 1; t < taps; ++t)
        if (shift[t] != shift[t - 1] + 1)
          return false;
      return true;
    }
  } dimension[3];

  int64_t taps() const { return dimension[0].taps * dimension[1].taps * dimension[2].taps; }
};

inline int64_t tap_count(const Conv &p) { return p.kernel[0] * p.kernel[1] * p.kernel[2]; }

inline void forward_phase(const Conv &p, Phase &phase) {
  for (int d = 0; d < 3; ++d) {
    Phase::Dimension &along = phase.dimension[d];
    along.taps = p.kernel[d];
    for (int64_t t = 0; t < along.taps; ++t) {
      along.shift[t] = t * p.dilation[d] - p.padding[d];
      along.index[t] = t;
    }
    along.size = p.x.size[d], along.step = p.stride[d];
    along.pixels = p.y.size[d], along.first = 0, along.out_step = 1;
  }
}

// The pixels of dx at `at` modulo the stride.
inline void dgrad_phase(const Conv &p, const int64_t (&at)[3], Phase &phase) {
  for (int d = 0; d < 3; ++d) {
    Phase::Dimension &along = phase.dimension[d];
    along.taps = 0;
    for (int64_t t = p.kernel[d] - 1; t >= 0; --t)
      if (const int64_t distance = at[d] + p.padding[d] - t * p.dilation[d]; distance % p.stride[d] == 0) {
        along.shift[along.taps] = distance / p.stride[d];
        along.index[along.taps++] = t;
      }
    along.size = p.y.size[d], along.step = 1;
    along.pixels = ceil_div(p.x.size[d] - at[d], p.stride[d]), along.first = at[d], along.out_step = p.stride[d];
  }
}

// How the pixels of a phase are cut into blocks: several images, whole lines, or parts of lines, as far as the input of
// a block is small.
struct Blocks {
  int64_t images, height, width, stacks, down, across, count;
  int64_t pixels() const { return images * height * width; }
};

template <class T> Blocks cut(const Phase &phase, int64_t batch, int64_t channels, bool copied, int threads) {
  const Phase::Dimension &depth = phase.dimension[0], &height = phase.dimension[1], &width = phase.dimension[2];
  const auto extent = [](const Phase::Dimension &along, int64_t pixels) {
    return min(along.size + 2, (pixels - 1) * along.step + along.high() - along.low() + 1);
  };
  const auto bytes = [&](int64_t lines, int64_t wide) {
    return extent(depth, 1) * extent(height, lines) * extent(width, wide) * channels * int64_t(sizeof(T));
  };
  Blocks blocks;
  blocks.width = min(width.pixels, max_pixels);
  while (blocks.width > 1 && bytes(1, blocks.width) > strip_bytes)
    blocks.width = ceil_div(blocks.width, 2);
  blocks.height = 1;
  while (blocks.height < height.pixels && bytes(blocks.height + 1, blocks.width) <= strip_bytes &&
         (blocks.height + 1) * blocks.width <= max_pixels)
    ++blocks.height;
  blocks.across = ceil_div(width.pixels, blocks.width);
  blocks.down = ceil_div(height.pixels, blocks.height);
  blocks.height = ceil_div(height.pixels, blocks.down);
  blocks.images = 1;
  if (blocks.down == 1 && blocks.across == 1 && depth.pixels == 1)
    while (blocks.images < batch / threads && (blocks.images + 1) * blocks.height * blocks.width <= max_pixels &&
           (!copied || (blocks.images + 1) * bytes(blocks.height, blocks.width) <= max_strip_bytes))
      ++blocks.images;
  blocks.stacks = ceil_div(batch, blocks.images);
  blocks.images = ceil_div(batch, blocks.stacks);
  blocks.count = blocks.stacks * depth.pixels * blocks.down * blocks.across;
  return blocks;
}

// One block: images, a depth, lines and pixels.
struct Block {
  int64_t image, images, depth;
  Range lines, columns;
  Block(const Blocks &blocks, const Phase &phase, int64_t batch, int64_t index) {
    columns.begin = index % blocks.across * blocks.width, index /= blocks.across;
    lines.begin = index % blocks.down * blocks.height, index /= blocks.down;
    depth = index % phase.dimension[0].pixels;
    image = index / phase.dimension[0].pixels * blocks.images;
    images = min(blocks.images, batch - image);
    lines.end = min(lines.begin + blocks.height, phase.dimension[1].pixels);
    columns.end = min(columns.begin + blocks.width, phase.dimension[2].pixels);
  }
  int64_t pixels() const { return images * lines.size() * columns.size(); }
  // A pixel's number within the block.
  int64_t number(int64_t n, int64_t h, int64_t w) const {
    return (n * lines.size() + h - lines.begin) * columns.size() + w - columns.begin;
  }
};

// Pixels of a block that are inside the input at the same taps.
struct Rectangle {
  Range lines, columns, line_taps, column_taps;
};

// Calls body(Rectangle) for those that make up a block.
template <class Body> void each_rectangle(const Phase &phase, const Block &block, const Body &body) {
  const Phase::Dimension &height = phase.dimension[1], &width = phase.dimension[2];
  for (int64_t top = block.lines.begin, bottom; top < block.lines.end; top = bottom) {
    bottom = height.alike(top, block.lines.end);
    const Range line_taps = height.inside(top);
    for (int64_t left = block.columns.begin, right; left < block.columns.end; left = right) {
      right = width.alike(left, block.columns.end);
      body(Rectangle{{top, bottom}, {left, right}, line_taps, width.inside(left)});
    }
  }
}

} // namespace
} // namespace rl_kernels::cpu
