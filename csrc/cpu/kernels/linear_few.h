// Linear layers on few rows of an activation: bound by reading the sources, which are mixed in registers and met once.
#pragma once

#include "gradients.h"
#include "mix.h"
#include "parallel.h"
#include "problem.h"
#include "rows.h"
#include "tile.h"
#include "vector.h"

#include <cstddef>
#include <cstdint>

namespace rl_kernels::cpu {
namespace {

constexpr int64_t max_few_rows_forward = 16; // sums alone fill the registers; a backward pass has more to hold

// Calls body(Int<rows>) with the power of two up to max_few_rows that m rows fill.
template <class Body> void with_rows(int rows, const Body &body) {
  if (rows == 1)
    body(Int<1>{});
  else if (rows == 2)
    body(Int<2>{});
  else if (rows == 4)
    body(Int<4>{});
  else
    body(Int<8>{});
}
inline int rows_for(int64_t m) { return m == 1 ? 1 : m <= 2 ? 2 : m <= 4 ? 4 : 8; }

// y for rows o..o+at_once of W: every source is read once, mixed in registers and multiplied by all rows of x at once.
template <class S, class X, int rows, int at_once>
void forward_few(const Linear &p, const Mixed<S, X> &recipe, const Accumulate<X> *const *x, int64_t o) {
  using T = Accumulate<X>;
  const MixedRows<S, X, at_once> mixed(recipe, o, 0);
  Vector<T> sums[at_once][rows] = {};
  const auto step = [&](int64_t q, auto load_weight, auto load_x) {
    Vector<T> weight[at_once];
#pragma GCC unroll 4
    for (int r = 0; r < at_once; ++r)
      weight[r] = mixed(r, q, load_weight);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      Vector<T> value = load_x(x[i] + q);
#pragma GCC unroll 4
      for (int r = 0; r < at_once; ++r)
        sums[r][i] += value * weight[r];
    }
  };
  int64_t q = 0;
  for (; q + width<T> <= p.k; q += width<T>)
    step(q, [](const S *at) { return load(at); }, [](const T *at) { return load(at); });
  if (const int64_t left = p.k - q; left > 0)
    step(q, [=](const S *at) { return load_part(at, left); }, [=](const T *at) { return load_part(at, left); });
  for (int r = 0; r < at_once; ++r)
    for (int i = 0; i < min(rows, p.m); ++i)
      store_one(static_cast<X *>(p.out) + i * p.n + o + r, sum<T>(sums[r][i]) + recipe.bias(o + r));
}

// y for rows o..end of W.
template <class S, class X>
void forward_few_rows(const Linear &p, const Mixed<S, X> &recipe, const Accumulate<X> *const *x, int64_t o,
                      int64_t end) {
  const auto run = [&](auto rows, auto at_once) {
    for (; o + at_once.value <= end; o += at_once.value)
      forward_few<S, X, rows.value, at_once.value>(p, recipe, x, o);
    for (; o < end; ++o)
      forward_few<S, X, rows.value, 1>(p, recipe, x, o);
  };
  if (p.m == 1)
    run(Int<1>{}, Int<4>{});
  else if (p.m == 2)
    run(Int<2>{}, Int<4>{});
  else if (p.m <= 4)
    run(Int<4>{}, Int<4>{});
  else if (p.m <= 8)
    run(Int<8>{}, Int<3>{});
  else
    run(Int<16>{}, Int<1>{});
}

template <class S, class X> void linear_forward_few(const Linear &p, const Mixed<S, X> &recipe, const Team &team) {
  using T = Accumulate<X>;
  const int64_t block = 12, count = ceil_div(p.n, block);
  share(team, count, [&](int64_t item) {
    Scratch scratch(team);
    const T *x[max_few_rows_forward]; // beyond m, row 0 stands in
    for (int64_t i = 0; i < max_few_rows_forward; ++i) {
      const X *row = static_cast<const X *>(p.x) + (i < p.m ? i : 0) * p.x_stride;
      if constexpr (sizeof(X) == sizeof(T)) {
        x[i] = row;
      } else {
        T *converted = scratch.take<T>(i < p.m ? p.k : 0);
        if (i < p.m)
          convert(row, p.k, converted);
        x[i] = i < p.m ? converted : x[0];
      }
    }
    const int64_t o = item * block, end = min(p.n, o + block);
    if (!recipe.is_outer())
      return forward_few_rows(p, recipe, x, o, end);
    T *rows = scratch.take<T>(block * p.k), *biases = scratch.take<T>(block);
    const MixedAhead<S, X> ahead(recipe, o, end - o, 0, p.k, rows, biases);
    Linear part = p;
    part.out = static_cast<X *>(p.out) + o;
    forward_few_rows(part, ahead.recipe(), x, 0, end - o);
  });
}

// One after the other, so many rows of W add to one sum, and then to another: a long sum in one accumulator would round
// worse than a blocked product does.
constexpr int64_t rows_to_a_sum = 128;

// dx's sums over rows begin..end of W, for `size` columns from q on: every source is read once, four rows of W at a
// time.
template <class S, class X, int rows>
RLK_ONE_BODY void dgrad_few(const Linear &p, const Mixed<S, X> &recipe, const Accumulate<X> *dy, int64_t q,
                            int64_t size, int64_t begin, int64_t end, Accumulate<X> *const *sums) {
  using T = Accumulate<X>;
  constexpr int at_once = 4;
  for (int64_t o = begin; o < end; o += at_once) {
    const int some = int(min(at_once, end - o));
    const MixedRows<S, X, at_once> mixed(recipe, o, q, some);
    Vector<T> scale[rows][at_once];
    for (int i = 0; i < rows; ++i)
      for (int r = 0; r < at_once; ++r)
        scale[i][r] = broadcast(r < some ? dy[i * p.n + o + r] : T(0));
    const auto step = [&](int64_t l, auto load_weight, auto load_sum, auto store_sum) {
      Vector<T> weight[at_once];
      for (int r = 0; r < some; ++r)
        weight[r] = mixed(r, l, load_weight);
      for (int i = 0; i < rows; ++i) {
        Vector<T> total = o == begin ? Vector<T>{} : load_sum(sums[i] + l);
        for (int r = 0; r < some; ++r)
          total += scale[i][r] * weight[r];
        store_sum(sums[i] + l, total);
      }
    };
    int64_t l = 0;
    for (; l + width<T> <= size; l += width<T>)
      step(
          l, [](const S *at) { return load(at); }, [](const T *at) { return load(at); },
          [](T *at, Vector<T> v) { store(at, v); });
    if (const int64_t left = size - l; left > 0)
      step(
          l, [=](const S *at) { return load_part(at, left); }, [=](const T *at) { return load_part(at, left); },
          [=](T *at, Vector<T> v) { store_part(at, v, left); });
  }
}

// dy of few rows as T, (rows, n), zeros beyond m.
template <class X> void copy_few_rows(const Linear &p, int rows, Accumulate<X> *to) {
  for (int64_t i = 0; i < rows; ++i)
    if (i < p.m)
      convert(static_cast<const X *>(p.dy) + i * p.dy_stride, p.n, to + i * p.n);
    else
      __builtin_memset(to + i * p.n, 0, size_t(p.n) * sizeof(Accumulate<X>));
}

template <class S, class X> void linear_dgrad_few(const Linear &p, const Mixed<S, X> &recipe, const Team &team) {
  using T = Accumulate<X>;
  const int64_t count = block_count(p.k, 4096 / sizeof(T), 1024 / sizeof(T), team.threads);
  const int64_t size = round_up(ceil_div(p.k, count), width<T>);
  const int rows = rows_for(p.m);
  const Target<T, X> dx(p.out, p.k);
  share(team, ceil_div(p.k, size), [&](int64_t item) {
    Scratch scratch(team);
    const int64_t q = item * size, some = min(size, p.k - q);
    T *spare = scratch.take<T>(rows * size), *more = scratch.take<T>(rows * size);
    T *dy = scratch.take<T>(rows * p.n);
    T *weight = scratch.take<T>(recipe.is_outer() ? rows_to_a_sum * size : 0);
    copy_few_rows<X>(p, rows, dy);
    T *sums[max_few_rows], *parts[max_few_rows];
    dx.point(0, p.m, q, sums, spare, size);
    for (int64_t i = p.m; i < rows; ++i)
      sums[i] = spare + i * size;
    for (int i = 0; i < rows; ++i)
      parts[i] = more + i * size;
    with_rows(rows, [&](auto many) {
      for (int64_t begin = 0; begin < p.n; begin += rows_to_a_sum) {
        const int64_t end = min(begin + rows_to_a_sum, p.n);
        T *const *to = begin == 0 ? sums : parts;
        if (!recipe.is_outer()) {
          dgrad_few<S, X, many.value>(p, recipe, dy, q, some, begin, end, to);
        } else {
          const MixedAhead<S, X> ahead(recipe, begin, end - begin, q, some, weight, nullptr);
          dgrad_few<T, X, many.value>(p, ahead.recipe(), dy + begin, 0, some, 0, end - begin, to);
        }
        for (int64_t i = 0; begin > 0 && i < p.m; ++i)
          for (int64_t l = 0; l < some; ++l)
            sums[i][l] += parts[i][l];
      }
    });
    dx.finish(0, p.m, q, some, spare, size);
  });
}

// What a pass over the sources reads and writes of `size` columns: for each vector of columns, those of every row of x
// and then those of every row of dx, one stream whatever the number of rows. `totals` takes dx's sums from it, every so
// many rows of W.
template <class T, int rows> struct Strip {
  static constexpr int64_t n = width<T>, pitch = 2 * rows * n;
  static constexpr int64_t max_elements = (16 << 10) / int64_t(sizeof(T)); // which stay in the first cache

  T *columns, *totals;
  int64_t size;

  T *x(int64_t l) const { return columns + l / n * pitch; }
  T *dx(int64_t l) const { return x(l) + rows * n; }
  T *total(int64_t l) const { return totals + l / n * rows * n; }

  template <class X> void load_x(const X *from, int64_t stride, int64_t m) const {
    for (int64_t l = 0; l < size; l += n)
      for (int i = 0; i < rows; ++i) {
        const X *at = from + i * stride + l;
        store(x(l) + i * n, i >= m ? Vector<T>{} : l + n <= size ? load(at) : load_part(at, size - l));
        store(dx(l) + i * n, Vector<T>{});
        store(total(l) + i * n, Vector<T>{});
      }
  }
  void total_up() const {
    for (int64_t l = 0; l < size; l += n)
      for (int i = 0; i < rows; ++i) {
        T *from = dx(l) + i * n, *to = total(l) + i * n;
        store(to, load(to) + load(from));
        store(from, Vector<T>{});
      }
  }
  template <class X> void store_dx(X *to, int64_t stride, int64_t m) const {
    for (int64_t l = 0; l < size; l += n)
      for (int i = 0; i < m; ++i) {
        X *at = to + i * stride + l;
        const Vector<T> sums = load(total(l) + i * n);
        if (l + n <= size)
          store(at, sums);
        else
          store_part(at, sums, size - l);
      }
  }
};

// dx, dW_j and <G, W_j> of the strip's columns, which begin at q, in one pass over the sources.
template <class S, class X, int rows>
void backward_few(const Linear &p, const Mixed<S, X> &recipe, const Accumulate<X> *dy, int64_t q,
                  const Strip<Accumulate<X>, rows> &strip, double *dots) {
  using T = Accumulate<X>;
  constexpr int at_once = 4;
  constexpr int64_t chunk = Mixed<S, X>::chunk, n = width<T>;
  alignas(64) T g[at_once][chunk];
  strip.load_x(static_cast<const X *>(p.x) + q, p.x_stride, p.m);
  for (int64_t o = 0; o < p.n; o += at_once) {
    if (o > 0 && o % rows_to_a_sum == 0)
      strip.total_up();
    const int some = int(min(at_once, p.n - o));
    const MixedRows<S, X, at_once> mixed(recipe, o, q, some);
    T scale[rows][at_once];
    for (int i = 0; i < rows; ++i)
      for (int r = 0; r < at_once; ++r)
        scale[i][r] = r < some ? dy[i * p.n + o + r] : T(0);
    const auto step = [&](int64_t l, int64_t in_chunk, auto load_weight) {
      Vector<T> weight[at_once], product[at_once];
#pragma GCC unroll 4
      for (int r = 0; r < at_once; ++r) {
        weight[r] = mixed(r, l, load_weight);
        product[r] = Vector<T>{};
      }
      T *x = strip.x(l), *dx = x + rows * n;
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
        const Vector<T> value = load(x + i * n);
        Vector<T> total = load(dx + i * n);
#pragma GCC unroll 4
        for (int r = 0; r < at_once; ++r) {
          total += scale[i][r] * weight[r];
          product[r] += scale[i][r] * value;
        }
        store(dx + i * n, total);
      }
#pragma GCC unroll 4
      for (int r = 0; r < at_once; ++r)
        store(g[r] + in_chunk, product[r]);
    };
    for (int64_t first = 0; first < strip.size; first += chunk) {
      const int64_t length = min(chunk, strip.size - first);
      int64_t l = 0;
      for (; l + n <= length; l += n)
        step(first + l, l, [](const S *at) { return load(at); });
      if (const int64_t left = length - l; left > 0)
        step(first + l, l, [=](const S *at) { return load_part(at, left); });
      for (int r = 0; r < some; ++r)
        finish_row(recipe, p.gradients, o + r, q + first, length, g[r],
                   Dots{dots != nullptr ? dots + o + r : nullptr, p.n, nullptr});
    }
  }
  strip.total_up();
  strip.store_dx(static_cast<X *>(p.out) + q, p.k, p.m);
}

template <class S, class X> bool linear_backward(const Linear &p, const Team &team) {
  using T = Accumulate<X>;
  const Mixed<S, X> recipe(p.recipe, p.k, 1);
  // Outer coefficients' gradients are sums over more rows than a strip keeps beside its columns.
  if (p.n > 32 << 10 || recipe.is_outer() || !recipe.all_dense())
    return false;
  const int rows = rows_for(p.m);
  const int64_t columns = linear_dots_columns(sizeof(T));
  const int64_t size = round_up(ceil_div(p.k, block_count(p.k, columns, columns / 4, team.threads)), width<T>);
  const int64_t count = ceil_div(p.k, size);
  share(team, count, [&](int64_t item) {
    Scratch scratch(team);
    const int64_t begin = item * size, end = min(p.k, begin + size);
    double *dots = wants_dots(p.gradients) ? p.dots + item * p.recipe.sources * p.n : nullptr;
    for (int64_t l = 0; dots != nullptr && l < p.recipe.sources * p.n; ++l)
      dots[l] = 0;
    with_rows(rows, [&](auto many) {
      using Columns = Strip<T, many.value>;
      const int64_t strips = ceil_div(size, Columns::max_elements / (2 * rows));
      const int64_t wide = round_up(ceil_div(size, strips), width<T>);
      T *memory = scratch.take<T>(2 * rows * wide), *totals = scratch.take<T>(rows * wide);
      T *dy = scratch.take<T>(rows * p.n);
      copy_few_rows<X>(p, rows, dy);
      for (int64_t q = begin; q < end; q += wide)
        backward_few<S, X, many.value>(p, recipe, dy, q, Columns{memory, totals, min(wide, end - q)}, dots);
    });
  });
  finish_linear(p, recipe, count, team);
  return true;
}

} // namespace
} // namespace rl_kernels::cpu
