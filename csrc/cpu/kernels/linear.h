// Linear layers. W (n, k) is mixed where it is packed, a panel at a time, into scratch that stays in L2.
#pragma once

#include "gradients.h"
#include "linear_few.h"
#include "mix.h"
#include "pack.h"
#include "parallel.h"
#include "problem.h"
#include "rows.h"
#include "tile.h"
#include "vector.h"

#include <cstdint>

namespace rl_kernels::cpu {
namespace {

template <class S, class X> void linear_forward(const Linear &p, const Team &team) {
  using T = Accumulate<X>;
  const Mixed<S, X> recipe(p.recipe, p.k, 1);
  // A half-precision row is converted whole into scratch, and rows with a factor an element are mixed there.
  if (p.m <= max_few_rows_forward && (recipe.is_outer() || recipe.all_dense()) &&
      ((sizeof(X) == sizeof(T) && !recipe.is_outer()) || p.k <= 48 << 10 >> 1))
    return linear_forward_few(p, recipe, team);
  constexpr int64_t wide = panel_width<T>, depth = 2048 / sizeof(T);
  const Rows<T, X> x(p.x, p.x_stride);
  const Target<T, X> y(p.out, p.n);
  // In half precision the sums stay in scratch over all of k, so that a panel is mixed once for each block of rows.
  const int64_t tall = x.converts ? 4 * row_block<T, X> : p.m;
  // An item is a few panels side by side: y is then written, and x read, in longer pieces.
  const int64_t panels = ceil_div(p.n, wide);
  const int64_t group = max(
      1, min(min(4, panels / (2 * team.threads)), (512 << 10) / int64_t(sizeof(T)) / wide / max(1, min(depth, p.k))));
  const int64_t groups = ceil_div(panels, group);
  const int64_t splits = row_splits(groups, p.m, team.threads);
  const int64_t rows_a_split = ceil_div(p.m, splits);
  share(team, groups * splits, [&](int64_t item) {
    Scratch scratch(team);
    T *packed = scratch.take<T>(group * depth * wide);
    T *converted = scratch.take<T>(x.converts ? row_block<T, X> * depth : 0);
    T *sums = scratch.take<T>(y.converts ? tall * group * wide : 0);
    T *bias = scratch.take<T>(group * wide);
    const int64_t o = item % groups * group * wide, n = min(group * wide, p.n - o), pitch = group * wide;
    for (int64_t i = 0; i < pitch; ++i)
      bias[i] = i < n ? recipe.bias(o + i) : 0;
    const int64_t begin = item / groups * rows_a_split, end = min(p.m, begin + rows_a_split);
    for (int64_t top = begin; top < end; top += tall) {
      const int64_t bottom = min(end, top + tall);
      for (int64_t k = 0; k == 0 || k < p.k; k += depth) { // once for no k: the bias remains
        const int64_t size = min(depth, p.k - k), zero = 0;
        for (int64_t c = 0; c < n; c += wide)
          pack_transposed(recipe, o + c, min(wide, n - c), k, size, vectors_for<T>(n - c), packed + c * depth,
                          [](int64_t element) { return element; });
        for (int64_t m = top; m < bottom; m += row_block<T, X>) {
          const int64_t count = min(row_block<T, X>, bottom - m);
          const T *a[row_block<T, X>];
          T *to[row_block<T, X>];
          x.point(m, count, k, size, a, converted);
          for (int64_t c = 0; c < n; c += wide) {
            y.point(m, count, o + c, to, sums + (m - top) * pitch + c, pitch);
            multiply<T>(vectors_for<T>(n - c), {1, &zero, &zero, size}, count, a, packed + c * depth,
                        {to, min(wide, n - c), k > 0, k > 0 ? nullptr : bias + c});
          }
        }
      }
      y.finish(top, bottom - top, o, n, sums, pitch);
    }
  });
}

template <class S, class X> void linear_dgrad(const Linear &p, const Team &team) {
  using T = Accumulate<X>;
  const Mixed<S, X> recipe(p.recipe, p.k, 1);
  if (p.m <= max_few_rows && (recipe.is_outer() || recipe.all_dense()) && p.n <= 32 << 10)
    return linear_dgrad_few(p, recipe, team);
  // Columns of dx are owned, in runs long enough to read the sources at full bandwidth.
  constexpr int64_t wide = panel_width<T>, depth = 1024 / sizeof(T);
  const Rows<T, X> dy(p.dy, p.dy_stride);
  const Target<T, X> dx(p.out, p.k);
  const int64_t tall = dy.converts ? 2 * row_block<T, X> : p.m;
  const int64_t columns = round_up(ceil_div(p.k, block_count(p.k, 8 * wide, 4 * wide, team.threads)), wide);
  const int64_t count = ceil_div(p.k, columns);
  const int64_t splits = row_splits(count, p.m, team.threads);
  const int64_t rows_a_split = ceil_div(p.m, splits);
  share(team, count * splits, [&](int64_t item) {
    Scratch scratch(team);
    T *panels = scratch.take<T>(depth * columns);
    T *converted = scratch.take<T>(dy.converts ? row_block<T, X> * depth : 0);
    T *sums = scratch.take<T>(dx.converts ? tall * columns : 0);
    T *row = scratch.take<T>(columns);
    const int64_t q = item % count * columns, n = min(columns, p.k - q);
    const int64_t begin = item / count * rows_a_split, end = min(p.m, begin + rows_a_split);
    for (int64_t l = 0; l < columns; ++l)
      row[l] = 0;
    for (int64_t top = begin; top < end; top += tall) {
      const int64_t bottom = min(end, top + tall);
      for (int64_t o = 0; o < p.n; o += depth) {
        const int64_t size = min(depth, p.n - o), zero = 0;
        for (int64_t r = 0; r < size; ++r) {
          recipe.row(o + r, q, n, row, 4 * p.recipe.out_stride[0]);
          for (int64_t c = 0; c < n; c += wide) {
            const int vectors = vectors_for<T>(n - c);
            T *to = panels + c * depth + r * vectors * width<T>;
            for (int v = 0; v < vectors; ++v)
              store(to + v * width<T>, load(row + c + v * width<T>));
          }
        }
        for (int64_t m = top; m < bottom; m += row_block<T, X>) {
          const int64_t rows = min(row_block<T, X>, bottom - m);
          const T *a[row_block<T, X>];
          T *to[row_block<T, X>];
          dy.point(m, rows, o, size, a, converted);
          for (int64_t c = 0; c < n; c += wide) {
            dx.point(m, rows, q + c, to, sums + (m - top) * columns + c, columns);
            multiply<T>(vectors_for<T>(n - c), {1, &zero, &zero, size}, rows, a, panels + c * depth,
                        {to, min(wide, n - c), o > 0, nullptr});
          }
        }
      }
      dx.finish(top, bottom - top, q, n, sums, columns);
    }
  });
}

constexpr OuterShape wgrad_shape{tile_rows(max_vectors), max_vectors};

// Rows o..o+n and columns q..q+size of a weight.
struct WeightBlock {
  int64_t o, n, q, size;
};

// G of rows o..o+n and columns q..q+size, finished while it is in cache; x and dy are packed for it, `depth` rows each.
template <class S, class X>
void finish_block(const Linear &p, const Mixed<S, X> &recipe, WeightBlock block, Dots dots, const Team &team) {
  using T = Accumulate<X>;
  constexpr int64_t depth = 512 / sizeof(T), wide = panel_width<T>;
  const auto [o, n, q, size] = block;
  const X *x = static_cast<const X *>(p.x) + q, *dy = static_cast<const X *>(p.dy) + o;
  const int64_t pitch = round_up(size, width<T>), tiles = ceil_div(n, wgrad_shape.rows);
  Scratch scratch(team);
  T *g = scratch.take<T>(tiles * wgrad_shape.rows * pitch);
  T *a = scratch.take<T>(tiles * wgrad_shape.rows * depth);
  T *b = scratch.take<T>(depth * round_up(size, wide));
  for (int64_t l = 0; l < tiles * wgrad_shape.rows * pitch; l += width<T>)
    store(g + l, Vector<T>{});
  for (int64_t m = 0; m < p.m; m += depth) {
    const int64_t steps = min(depth, p.m - m), zero = 0;
    for (int64_t i = 0; i < steps; ++i) {
      pack_outer(wgrad_shape.rows, dy + (m + i) * p.dy_stride, n, i, steps, a);
      for (int64_t c = 0; c < size; c += wide)
        convert(x + (m + i) * p.x_stride + c, min(wide, size - c), b + c * depth + i * wide);
    }
    multiply_outer<T>(wgrad_shape, {1, &zero, &zero, steps, wide}, {a, tiles, steps, b, depth * wide, size}, g, pitch);
  }
  for (int64_t i = 0; i < n; ++i)
    dots.of_channel(o + i).clear(recipe.dots());
  // What rows add to right's gradient stays in the first cache from row to row.
  const int64_t at_once = recipe.is_outer() ? 128 : size;
  for (int64_t c = 0; c < size; c += at_once)
    for (int64_t i = 0; i < n; ++i)
      finish_row(recipe, p.gradients, o + i, q + c, min(at_once, size - c), g + i * pitch + c, dots.of_channel(o + i));
}

template <class S, class X> void linear_wgrad(const Linear &p, const Team &team) {
  const Mixed<S, X> recipe(p.recipe, p.k, 1);
  const bool needs_dots = wants_dots(p.gradients);
  // Nothing points to gradients without elements.
  const bool needs_product = (needs_dots && p.n > 0 && p.k > 0) || wants_weights(p.gradients, p.recipe.sources);
  const int64_t stride = recipe.dots() * p.n; // of dots, a block of columns
  const int64_t columns = linear_dots_columns(sizeof(Accumulate<X>)), across = ceil_div(p.k, columns);
  if (needs_product) {
    const int64_t rows = wgrad_shape.rows, tallest = (p.m < 512 ? 16 : 48) * rows;
    const int64_t threads_down = ceil_div(team.threads, min(team.threads, across));
    const int64_t tall = round_up(ceil_div(p.n, block_count(p.n, tallest, 4 * rows, threads_down)), rows);
    // Where each item needs sums of its own, it takes more rows than a block has.
    const bool sums_columns = needs_dots && recipe.is_outer();
    const int64_t shares = sums_columns ? linear_shares(p.n, p.k, sizeof(Accumulate<X>), team.threads) : 1;
    const int64_t rows_an_item = sums_columns ? round_up(ceil_div(p.n, shares), rows) : tall;
    share(team, ceil_div(p.n, rows_an_item) * across, [&](int64_t item) {
      const int64_t begin = item / across * rows_an_item, end = min(p.n, begin + rows_an_item);
      const int64_t q = item % across * columns;
      const Dots dots{needs_dots ? p.dots + item % across * stride : nullptr, p.n,
                      sums_columns ? p.columns + item / across * recipe.dots() * p.k : nullptr};
      for (int64_t o = begin; o < end; o += tall)
        finish_block(p, recipe, {o, min(tall, end - o), q, min(columns, p.k - q)}, dots, team);
    });
  }
  finish_linear(p, recipe, needs_product ? across : 0, team);
}

} // namespace
} // namespace rl_kernels::cpu
