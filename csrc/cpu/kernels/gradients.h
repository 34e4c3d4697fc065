// Where G, the gradient of the mixed W, becomes the gradients of the recipe's parts: dW_j = c_j * G, dc_j = <G, W_j>,
// and those of the biases.
#pragma once

#include "mix.h"
#include "parallel.h"
#include "problem.h"
#include "vector.h"

#include <cstdint>

namespace rl_kernels::cpu {
namespace {

inline bool wants_dots(const WgradOutputs &gradients) { return gradients.coefficients != nullptr; }
inline bool wants_weights(const WgradOutputs &gradients, int sources) {
  for (int j = 0; j < sources; ++j)
    if (gradients.weight[j] != nullptr)
      return true;
  return false;
}
// Whether the sums of dy over all but its channels are needed: for the biases, or for what these add to dc, which is
// nothing where coefficients are Outer ones.
inline bool wants_channel_sums(const WgradOutputs &gradients, const Recipe &recipe) {
  for (int j = 0; j < recipe.sources; ++j)
    if (gradients.bias[j] != nullptr)
      return true;
  return wants_dots(gradients) && recipe.bias[0] != nullptr && recipe.rank == 0;
}

// Of one output channel, <G, W_j> for each source, `stride` apart; nullptr where they are not wanted. With Outer
// coefficients left's gradient for each source and r, and in `columns` (N, R, row) the sums of right's, for which the
// channels of one thread's share are added up.
struct Dots {
  double *first;
  int64_t stride;
  double *columns;

  explicit operator bool() const { return first != nullptr; }
  Dots of_channel(int64_t o) const { return {first != nullptr ? first + o : nullptr, stride, columns}; }
  void clear(int64_t count) const {
    for (int64_t j = 0; first != nullptr && j < count; ++j)
      first[j * stride] = 0;
  }
};

// n elements of a gradient's row from q on: factor * g, where they lie or, where those are not side by side, one by
// one.
template <class S, class X>
void write_scaled(const Mixed<S, X> &recipe, const WgradOutputs &gradients, int j, int64_t o, int64_t q, int64_t n,
                  const Accumulate<X> *g, Accumulate<X> factor) {
  using T = Accumulate<X>;
  S *out = static_cast<S *>(gradients.weight[j]) + o * gradients.out_stride;
  const bool dense = recipe.lies_as_rows(gradients.in_stride, gradients.tap_stride);
  S scattered[Mixed<S, X>::chunk];
  S *to = dense ? out + q : scattered;
  if (dense)
    for (int64_t l = 0; l < n; l += 64 / int64_t(sizeof(S)))
      __builtin_prefetch(to + l + gradients.out_stride, 1, 2);
  int64_t l = 0;
  for (; l + width<T> <= n; l += width<T>)
    store(to + l, load(g + l) * factor);
  if (l < n)
    store_part(to + l, load_part(g + l, n - l) * factor, n - l);
  if (!dense)
    for (l = 0; l < n; ++l) {
      int64_t i, t;
      recipe.place(q + l, i, t);
      out[i * gradients.in_stride + t * gradients.tap_stride] = scattered[l];
    }
}

// <g, W_j> for n elements of row o from q on; fetches the next row.
template <class S, class X>
double dot_with_source(const Mixed<S, X> &recipe, int j, int64_t o, int64_t q, int64_t n, const Accumulate<X> *g) {
  using T = Accumulate<X>;
  S gathered[Mixed<S, X>::chunk];
  const S *row = recipe.source_row(j, o, q, n, gathered);
  for (int64_t l = 0; l < n; l += 64 / int64_t(sizeof(S)))
    __builtin_prefetch(row + l + recipe.next_row(j), 0, 2);
  if constexpr (sizeof(S) == sizeof(T)) {
    return dot(g, row, n);
  } else {
    T converted[Mixed<S, X>::chunk];
    convert(row, n, converted);
    return dot(g, converted, n);
  }
}

// product = g * W_j for n elements of row o from q on, and zeros up to a whole vector; fetches the next row.
template <class S, class X>
void multiply_by_source(const Mixed<S, X> &recipe, int j, int64_t o, int64_t q, int64_t n, const Accumulate<X> *g,
                        Accumulate<X> *product) {
  constexpr int w = width<Accumulate<X>>;
  S gathered[Mixed<S, X>::chunk];
  const S *row = recipe.source_row(j, o, q, n, gathered);
  for (int64_t l = 0; l < n; l += w) {
    __builtin_prefetch(row + l + recipe.next_row(j), 0, 2);
    store(product + l, l + w <= n ? load(g + l) * load(row + l) : load_part(g + l, n - l) * load_part(row + l, n - l));
  }
}

// Elements of G * W_j, and again in double: a gradient of right is a sum over many rows.
template <class T, int64_t chunk> struct Products {
  alignas(64) T of[chunk];
  alignas(64) double wide[chunk];
};

// Adds what row o of source j gives to the gradients of left and right at r: the sum of product * right, and
// product * left.
template <class S, class X>
void add_outer(const Mixed<S, X> &recipe, int j, int64_t r, int64_t o, int64_t q, int64_t n,
               const Products<Accumulate<X>, Mixed<S, X>::chunk> &products, Dots dots) {
  using T = Accumulate<X>;
  const T *right = recipe.right(j, r, q);
  Vector<T> lanes = {};
  int64_t l = 0;
  for (; l + width<T> <= n; l += width<T>)
    lanes += load(products.of + l) * load(right + l);
  if (l < n)
    lanes += load(products.of + l) * load_part(right + l, n - l);
  const int64_t at = j * recipe.rank() + r;
  dots.first[at * dots.stride] += double(sum<T>(lanes));
  double *column = dots.columns + at * recipe.row_size() + q;
  const double left = double(recipe.left(j, r, o));
  for (l = 0; l + width<double> <= n; l += width<double>)
    store(column + l, load(column + l) + load(products.wide + l) * left);
  for (; l < n; ++l)
    column[l] += products.wide[l] * left;
}

// finish_row with Outer coefficients.
template <class S, class X>
__attribute__((noinline)) void finish_outer_row(const Mixed<S, X> &recipe, const WgradOutputs &gradients, int64_t o,
                                                int64_t q, int64_t n, const Accumulate<X> *g, Dots dots) {
  using T = Accumulate<X>;
  constexpr int64_t chunk = Mixed<S, X>::chunk;
  alignas(64) T scaled[chunk];
  Products<T, chunk> products;
  for (int j = 0; j < recipe.sources(); ++j)
    for (int64_t first = 0; first < n; first += chunk) {
      const int64_t some = min(chunk, n - first);
      if (dots) {
        multiply_by_source(recipe, j, o, q + first, some, g + first, products.of);
        for (int64_t l = 0; l < some; ++l)
          products.wide[l] = double(products.of[l]);
        for (int64_t r = 0; r < recipe.rank(); ++r)
          add_outer(recipe, j, r, o, q + first, some, products, dots);
      }
      if (gradients.weight[j] != nullptr) {
        recipe.outer_factors(j, o, q + first, some, scaled);
        for (int64_t l = 0; l < some; ++l)
          scaled[l] *= g[first + l];
        write_scaled(recipe, gradients, j, o, q + first, some, scaled, T(1));
      }
    }
}

// Finishes row o of every gradient from the row g of G: writes c_j * G where wanted, and adds <G, W_j> to the dots.
template <class S, class X>
void finish_row(const Mixed<S, X> &recipe, const WgradOutputs &gradients, int64_t o, int64_t q, int64_t n,
                const Accumulate<X> *g, Dots dots) {
  if (recipe.is_outer())
    return finish_outer_row(recipe, gradients, o, q, n, g, dots);
  constexpr int64_t chunk = Mixed<S, X>::chunk;
  for (int j = 0; j < recipe.sources(); ++j) {
    double total = 0;
    for (int64_t first = 0; first < n; first += chunk) {
      const int64_t some = min(chunk, n - first);
      if (dots)
        total += dot_with_source(recipe, j, o, q + first, some, g + first);
      if (gradients.weight[j] != nullptr)
        write_scaled(recipe, gradients, j, o, q + first, some, g + first, recipe.factor(j, o));
    }
    if (dots)
      dots.first[j * dots.stride] += total;
  }
}

// The biases' gradients, and what the biases add to the coefficients': s[o] is the sum of dy over all but channel o.
template <class S, class X>
void finish_biases(const Mixed<S, X> &recipe, const Recipe &sources, const WgradOutputs &gradients, int64_t out,
                   const double *s, double *dots) {
  using T = Accumulate<X>;
  for (int j = 0; j < sources.sources; ++j) {
    S *to = static_cast<S *>(gradients.bias[j]);
    for (int64_t o = 0; o < out; ++o) {
      if (to != nullptr)
        store_one(to + o, T(recipe.bias_factor(j, o) * s[o]));
      if (dots != nullptr)
        dots[j * out + o] +=
            s[o] * double(load_one(static_cast<const S *>(sources.bias[j]) + o * sources.bias_stride[j]));
    }
  }
}

// dc from dots (N, out), summed over the channels in their order where a coefficient serves all of them.
template <class T>
void finish_coefficients(const WgradOutputs &gradients, int sources, int64_t out, const double *dots) {
  T *to = static_cast<T *>(gradients.coefficients);
  for (int j = 0; j < sources; ++j) {
    double total = 0;
    for (int64_t o = 0; o < out; ++o)
      if (gradients.per_channel)
        to[j * out + o] = T(dots[j * out + o]);
      else
        total += dots[j * out + o];
    if (!gradients.per_channel)
      to[j] = T(total);
  }
}

// The same of Outer coefficients: left's gradient from dots (N, R, out), right's from `columns` (shares, N, R, row),
// the shares in their order.
template <class S, class X>
void finish_outer_coefficients(const Mixed<S, X> &recipe, const WgradOutputs &gradients, int64_t out, Dots all,
                               int64_t shares, const Team &team) {
  using T = Accumulate<X>;
  const int64_t row = recipe.row_size(), count = recipe.dots();
  share(team, count, [&](int64_t at) {
    T *left = static_cast<T *>(gradients.coefficients) + at * (out + row), *right = left + out;
    for (int64_t o = 0; o < out; ++o)
      left[o] = T(all.first[at * all.stride + o]);
    for (int64_t q = 0; q < row; ++q) {
      double total = 0;
      for (int64_t part = 0; part < shares; ++part)
        total += all.columns[(part * count + at) * row + q];
      right[recipe.column(q)] = T(total);
    }
  });
}

// s = sum of dy over its rows, in double, for `columns` columns from `first` on.
template <class X> void sum_rows(const X *dy, int64_t stride, int64_t m, int64_t first, int64_t columns, double *sums) {
  using T = Accumulate<X>;
  for (int64_t c = 0; c < columns; c += width<T>) {
    const int64_t some = min(width<T>, columns - c);
    double lanes[width<T>] = {};
    for (int64_t i = 0; i < m; ++i) {
      const X *at = dy + i * stride + first + c;
      Vector<T> v = some == width<T> ? load(at) : load_part(at, some);
      for (int l = 0; l < width<T>; ++l)
        lanes[l] += double(v[l]);
    }
    for (int64_t l = 0; l < some; ++l)
      sums[c + l] = lanes[l];
  }
}

// The end of a linear layer's wgrad: the blocks' shares of <G, W_j> are added in order, the biases join in.
template <class S, class X>
void finish_linear(const Linear &p, const Mixed<S, X> &recipe, int64_t dots_blocks, const Team &team) {
  const int64_t stride = recipe.dots() * p.n;
  const bool needs_dots = wants_dots(p.gradients);
  for (int64_t block = 1; needs_dots && block < dots_blocks; ++block)
    for (int64_t l = 0; l < stride; ++l)
      p.dots[l] += p.dots[block * stride + l];
  if (wants_channel_sums(p.gradients, p.recipe)) {
    double *sums = p.dots + max(1, dots_blocks) * stride;
    const X *dy = static_cast<const X *>(p.dy);
    constexpr int64_t columns = 256;
    share(team, ceil_div(p.n, columns), [&](int64_t item) {
      const int64_t first = item * columns;
      sum_rows(dy, p.dy_stride, p.m, first, min(columns, p.n - first), sums + first);
    });
    finish_biases(recipe, p.recipe, p.gradients, p.n, sums, needs_dots && !recipe.is_outer() ? p.dots : nullptr);
  }
  if (needs_dots && recipe.is_outer())
    finish_outer_coefficients(recipe, p.gradients, p.n, {p.dots, p.n, p.columns},
                              linear_shares(p.n, p.k, sizeof(Accumulate<X>), team.threads), team);
  else if (needs_dots)
    finish_coefficients<Accumulate<X>>(p.gradients, p.recipe.sources, p.n, p.dots);
}

} // namespace
} // namespace rl_kernels::cpu
