// The input of a block of pixels, and its output: where they are, or by way of a copy with the channels innermost in
// the type that is multiplied.
#pragma once

#include "conv_phase.h"
#include "pack.h"
#include "problem.h"
#include "vector.h"

#include <cstddef>
#include <cstdint>

namespace rl_kernels::cpu {
namespace {

// The input of one block. `origin` is where input pixel (0, 0, 0) of the block's first image would be.
template <class T> struct InputStrip {
  const T *origin;
  int64_t image, plane, line, pixel;
};

// The box of input pixels that a copy holds: begin..end along each dimension.
struct Box {
  Range along[3];
  int64_t line, plane, image; // pitches, in elements

  // With `padded`, pixels outside the input are in it.
  Box(const Volume &in, const Phase &phase, const Block &block, int64_t channels, bool padded) {
    const Range pixels[3] = {{block.depth, block.depth + 1}, block.lines, block.columns};
    for (int d = 0; d < 3; ++d) {
      const Phase::Dimension &of = phase.dimension[d];
      Range &range = along[d];
      range.begin = pixels[d].begin * of.step + of.low();
      range.end = (pixels[d].end - 1) * of.step + of.high() + 1;
      if (!padded)
        range.begin = max(range.begin, 0), range.end = max(range.begin, min(range.end, in.size[d]));
    }
    line = along[2].size() * channels, plane = along[1].size() * line, image = along[0].size() * plane;
  }
};

// A line of a box, from begin..end of the input's line at `from`; zeros where it reaches beyond.
template <class T, class X> void copy_line(const X *from, const Volume &in, Range columns, int64_t channels, T *to) {
  const auto clear = [](T *at, int64_t n) { __builtin_memset(at, 0, size_t(n) * sizeof(T)); };
  const int64_t left = min(columns.end, max(0, columns.begin)), right = max(left, min(columns.end, in.size[2]));
  clear(to, (left - columns.begin) * channels);
  clear(to + (right - columns.begin) * channels, (columns.end - right) * channels);
  if (left == right)
    return;
  to += (left - columns.begin) * channels;
  from += left * in.stride[2];
  if (in.channel_stride == 1 && in.stride[2] == channels)
    convert(from, (right - left) * channels, to);
  else if (in.channel_stride == 1)
    for (int64_t w = 0; w < right - left; ++w)
      convert(from + w * in.stride[2], channels, to + w * channels);
  else if (in.stride[2] == 1)
    transpose_block(from, in.channel_stride, channels, right - left, to, channels);
  else
    for (int64_t w = 0; w < right - left; ++w)
      for (int64_t c = 0; c < channels; ++c)
        to[w * channels + c] = load_one(from + w * in.stride[2] + c * in.channel_stride);
}

// The strip of `channels` channels from `channel` on; `copy` has room for it.
template <class T, class X>
InputStrip<T> make_strip(const X *input, const Volume &in, const Phase &phase, const Block &block, Range channels,
                         bool padded, T *copy) {
  const X *first = input + block.image * in.batch_stride + channels.begin * in.channel_stride;
  if constexpr (sizeof(X) == sizeof(T))
    if (!padded && in.channel_stride == 1)
      return {first, in.batch_stride, in.stride[0], in.stride[1], in.stride[2]};
  const int64_t count = channels.size();
  const Box box(in, phase, block, count, padded);
  const auto &[planes, lines, columns] = box.along;
  const bool flat = in.stride[2] == 1 && in.stride[1] == in.size[2] && columns.size() == in.size[2] && !padded;
  for (int64_t n = 0; n < block.images; ++n)
    for (int64_t z = planes.begin; z < planes.end; ++z) {
      const int64_t at = n * in.batch_stride + z * in.stride[0]; // of a plane that may lie outside
      T *to = copy + n * box.image + (z - planes.begin) * box.plane;
      if (flat && in.channel_stride != 1) { // whole lines follow one another on both sides
        transpose_block(first + at + lines.begin * in.stride[1], in.channel_stride, count,
                        lines.size() * columns.size(), to, count);
        continue;
      }
      for (int64_t y = lines.begin; y < lines.end; ++y) {
        T *line = to + (y - lines.begin) * box.line;
        if (z < 0 || z >= in.size[0] || y < 0 || y >= in.size[1])
          __builtin_memset(line, 0, size_t(box.line) * sizeof(T));
        else
          copy_line(first + at + y * in.stride[1], in, columns, count, line);
      }
    }
  return {copy - planes.begin * box.plane - lines.begin * box.line - columns.begin * count, box.image, box.plane,
          box.line, count};
}

// Writes sums (pixels of the block, pitch) to the output where it does not have its channels side by side in T.
template <class T, class X>
void write_block(const T *sums, int64_t pitch, X *out, const Volume &y, const Phase &phase, const Block &block,
                 int64_t columns) {
  const Phase::Dimension &height = phase.dimension[1], &width = phase.dimension[2];
  const int64_t pixel = width.out_step * y.stride[2], pixels = block.columns.size();
  const bool flat = pixel == 1 && height.out_step == 1 && y.stride[1] == pixels;
  for (int64_t n = 0; n < block.images; ++n) {
    X *image = out + n * y.batch_stride + (width.first + block.columns.begin * width.out_step) * y.stride[2];
    const auto line = [&](int64_t h) { return image + (height.first + h * height.out_step) * y.stride[1]; };
    if (flat && y.channel_stride != 1) {
      transpose_block(sums + block.number(n, block.lines.begin, block.columns.begin) * pitch, pitch,
                      block.lines.size() * pixels, columns, line(block.lines.begin), y.channel_stride);
      continue;
    }
    for (int64_t h = block.lines.begin; h < block.lines.end; ++h) {
      X *to = line(h);
      const T *from = sums + block.number(n, h, block.columns.begin) * pitch;
      if (y.channel_stride == 1)
        for (int64_t w = 0; w < pixels; ++w)
          convert(from + w * pitch, columns, to + w * pixel);
      else if (pixel == 1)
        transpose_block(from, pitch, pixels, columns, to, y.channel_stride);
      else
        for (int64_t w = 0; w < pixels; ++w)
          for (int64_t c = 0; c < columns; ++c)
            store_one(to + w * pixel + c * y.channel_stride, from[w * pitch + c]);
    }
  }
}

} // namespace
} // namespace rl_kernels::cpu
