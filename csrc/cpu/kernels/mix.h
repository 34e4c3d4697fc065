// The recipe: the one place where W = sum_j c_j * W_j is evaluated. Another recipe is another mix() here, and another
// finish_row() in gradients.h.
#pragma once

#include "problem.h"
#include "vector.h"

#include <cstdint>

namespace rl_kernels::cpu {
namespace {

// Terms in source order, as every backend adds them.
template <class T> inline Vector<T> mix(const Vector<T> *sources, const Vector<T> *factors, int n) {
  Vector<T> total = sources[0] * factors[0];
  for (int j = 1; j < n; ++j)
    total += sources[j] * factors[j];
  return total;
}

// The same for who mixes a vector a row: source(j) and factor(j) are read one by one, and Replacement Learning's case
// of two sources is apart. Two functions, since the compiler chooses by their form which product of the first sum it
// fuses, and with it the last bit of W.
template <class Source, class Factor> inline auto mix_apart(int n, const Source &source, const Factor &factor) {
  auto total = source(0) * factor(0);
  if (n == 2)
    total += source(1) * factor(1);
  else
    for (int j = 1; j < n; ++j)
      total += source(j) * factor(j);
  return total;
}

template <class S> constexpr bool share_body = false;
template <> constexpr bool share_body<Float16> = true;

// A recipe of sources of type S whose mix is rounded to X, as rows: row o holds the elements (i, t) of output channel
// o, taps innermost unless the first source has its input channels innermost (channels_last).
template <class S, class X> class Mixed {
public:
  using T = Accumulate<X>;

  Mixed(const Recipe &recipe, int64_t in, int64_t taps) : recipe_(recipe), in_(in), taps_(taps) {
    channels_inner_ = taps > 1 && recipe.in_stride[0] == 1 && recipe.tap_stride[0] == in;
    for (int j = 0; j < recipe.sources; ++j)
      dense_[j] = lies_as_rows(recipe.in_stride[j], recipe.tap_stride[j]);
  }

  // Whether a tensor of these strides has the elements of an output channel in the order of the rows.
  bool lies_as_rows(int64_t in_stride, int64_t tap_stride) const {
    return channels_inner_ ? (in_ == 1 || in_stride == 1) && tap_stride == in_
                           : (taps_ == 1 || tap_stride == 1) && (in_ == 1 || in_stride == taps_);
  }

  int64_t row_size() const { return in_ * taps_; }
  int sources() const { return recipe_.sources; }
  int64_t dots() const { return dot_count(recipe_); }
  bool is_outer() const { return recipe_.rank > 0; }
  bool channels_inner() const { return channels_inner_; }
  bool all_dense() const {
    for (int j = 0; j < recipe_.sources; ++j)
      if (!dense_[j])
        return false;
    return true;
  }
  T factor(int j, int64_t o) const {
    return static_cast<const T *>(recipe_.coefficients)[j * recipe_.source_stride + o * recipe_.channel_stride];
  }
  // Outer coefficients are none of the biases, which are summed.
  T bias_factor(int j, int64_t o) const { return is_outer() ? T(1) : factor(j, o); }
  // Outer coefficients' left for row o, and right from element q on: of source j, and of one r after the other.
  int64_t rank() const { return recipe_.rank; }
  T left(int j, int64_t r, int64_t o) const {
    return static_cast<const T *>(recipe_.coefficients)[at_rank(j, r) + o * recipe_.channel_stride];
  }
  const T *right(int j, int64_t r, int64_t q) const {
    return static_cast<const T *>(recipe_.right) + at_rank(j, r) + q;
  }
  // Row o of source j if its elements lie as the rows' do, else nullptr.
  const S *dense_row(int j, int64_t o) const {
    return dense_[j] ? static_cast<const S *>(recipe_.weight[j]) + o * recipe_.out_stride[j] : nullptr;
  }
  // How far the next row is from one of source j.
  int64_t next_row(int j) const { return recipe_.out_stride[j]; }
  // The input channel and tap of element q of a row.
  void place(int64_t q, int64_t &i, int64_t &t) const {
    i = channels_inner_ ? q % in_ : q / taps_;
    t = channels_inner_ ? q / in_ : q % taps_;
  }
  // The place of element q in the weight's own order, taps innermost.
  int64_t column(int64_t q) const { return channels_inner_ ? q % in_ * taps_ + q / in_ : q; }

  // n elements of row o from q on: of source j as stored, gathered into `gathered` where they are not dense.
  const S *source_row(int j, int64_t o, int64_t q, int64_t n, S *gathered) const {
    if (const S *row = dense_row(j, o))
      return row + q;
    const S *row = static_cast<const S *>(recipe_.weight[j]) + o * recipe_.out_stride[j];
    int64_t i, t;
    place(q, i, t);
    for (int64_t l = 0; l < n; ++l) {
      gathered[l] = row[i * recipe_.in_stride[j] + t * recipe_.tap_stride[j]];
      if (channels_inner_) {
        if (++i == in_)
          i = 0, ++t;
      } else if (++t == taps_) {
        t = 0, ++i;
      }
    }
    return gathered;
  }

  static constexpr int64_t chunk = 256;

  // Mixes n elements of row o from q on into out, and fetches what lies `ahead` elements further in each source: what
  // the caller will mix after some other rows, too far apart for the CPU to foresee.
  void row(int64_t o, int64_t q, int64_t n, T *out, int64_t ahead) const {
    if (is_outer())
      return outer_row(o, q, n, out, ahead);
    Vector<T> factors[max_sources], values[max_sources];
    const int count = recipe_.sources;
    for (int j = 0; j < count; ++j)
      factors[j] = broadcast(factor(j, o));
    S gathered[max_sources][chunk];
    for (int64_t first = 0; first < n; first += chunk) {
      const int64_t some = min(chunk, n - first);
      int64_t l = 0;
      const S *rows[max_sources];
      for (int j = 0; j < count; ++j)
        rows[j] = source_row(j, o, q + first, some, gathered[j]);
      T *to = out + first;
      if (count == 2) // Replacement Learning's case, without the loops over sources
        for (; l + width<T> <= some; l += width<T>) {
          __builtin_prefetch(rows[0] + l + ahead, 0, 2);
          __builtin_prefetch(rows[1] + l + ahead, 0, 2);
          values[0] = load(rows[0] + l);
          values[1] = load(rows[1] + l);
          store(to + l, rounded<X>(mix<T>(values, factors, 2)));
        }
      for (; l < some; l += width<T>) {
        const bool whole = l + width<T> <= some;
        for (int j = 0; j < count; ++j)
          values[j] = whole ? load(rows[j] + l) : load_part(rows[j] + l, some - l);
        const Vector<T> total = rounded<X>(mix<T>(values, factors, count));
        if (whole)
          store(to + l, total);
        else
          store_part(to + l, total, some - l);
      }
    }
  }

  // The same for packs of W^T. With float16 sources they share one body: inlined into each, the compiler would not fuse
  // the same products everywhere. With others that costs speed and changes nothing.
  void packed_row(int64_t o, int64_t q, int64_t n, T *out, int64_t ahead) const {
    if constexpr (share_body<S>)
      shared_row(o, q, n, out, ahead);
    else
      row(o, q, n, out, ahead);
  }

  // Outer coefficients of n elements of row o of source j from q on, up to a whole vector: the sum over r in order.
  void outer_factors(int j, int64_t o, int64_t q, int64_t n, T *out) const {
    constexpr int w = width<T>, at_once = 4; // vectors that share the broadcast of an element of left
    int64_t l = 0;
    for (; l + at_once * w <= n; l += at_once * w) {
      Vector<T> totals[at_once];
      for (int v = 0; v < at_once; ++v)
        totals[v] = left(j, 0, o) * load(right(j, 0, q + l + v * w));
      for (int64_t r = 1; r < recipe_.rank; ++r) {
        const T scale = left(j, r, o), *from = right(j, r, q + l);
        for (int v = 0; v < at_once; ++v)
          totals[v] += scale * load(from + v * w);
      }
      for (int v = 0; v < at_once; ++v)
        store(out + l + v * w, totals[v]);
    }
    for (; l < n; l += w) {
      const auto columns = [&](int64_t r) {
        const T *from = right(j, r, q + l);
        return l + w <= n ? load(from) : load_part(from, n - l);
      };
      Vector<T> total = left(j, 0, o) * columns(0);
      for (int64_t r = 1; r < recipe_.rank; ++r)
        total += left(j, r, o) * columns(r);
      store(out + l, total);
    }
  }

  // The mixed bias of channel o, rounded to X; 0 without biases.
  T bias(int64_t o) const {
    if (recipe_.bias[0] == nullptr)
      return 0;
    T total = 0;
    for (int j = 0; j < recipe_.sources; ++j) {
      const T term = bias_factor(j, o) * load_one(static_cast<const S *>(recipe_.bias[j]) + o * recipe_.bias_stride[j]);
      total = j == 0 ? term : total + term;
    }
    X result;
    store_one(&result, total);
    return load_one(&result);
  }

private:
  __attribute__((noinline)) void shared_row(int64_t o, int64_t q, int64_t n, T *out, int64_t ahead) const {
    row(o, q, n, out, ahead);
  }

  // row() with a factor an element. Apart, so that it leaves row() as fast as it is.
  __attribute__((noinline)) void outer_row(int64_t o, int64_t q, int64_t n, T *out, int64_t ahead) const {
    constexpr int64_t at_once = 64; // elements, of which the factors of every source stay in the first cache
    const int count = recipe_.sources;
    alignas(64) T factors[max_sources][at_once];
    S gathered[max_sources][at_once];
    Vector<T> values[max_sources], scales[max_sources];
    for (int64_t first = 0; first < n; first += at_once) {
      const int64_t some = min(at_once, n - first);
      const S *rows[max_sources];
      for (int j = 0; j < count; ++j) {
        rows[j] = source_row(j, o, q + first, some, gathered[j]);
        outer_factors(j, o, q + first, some, factors[j]);
      }
      for (int64_t l = 0; l < some; l += width<T>) {
        const bool whole = l + width<T> <= some;
        for (int j = 0; j < count; ++j) {
          __builtin_prefetch(rows[j] + l + ahead, 0, 2);
          values[j] = whole ? load(rows[j] + l) : load_part(rows[j] + l, some - l);
          scales[j] = load(factors[j] + l);
        }
        const Vector<T> total = rounded<X>(count == 2 ? mix<T>(values, scales, 2) : mix<T>(values, scales, count));
        if (whole)
          store(out + first + l, total);
        else
          store_part(out + first + l, total, some - l);
      }
    }
  }

  int64_t at_rank(int j, int64_t r) const { return j * recipe_.source_stride + r * recipe_.rank_stride; }

  const Recipe &recipe_;
  int64_t in_, taps_;
  bool channels_inner_;
  bool dense_[max_sources];
};

// `count` rows of W at a time, mixed in registers a vector at a time: for who meets each element of W once. The
// sources must be dense.
template <class S, class X, int count> class MixedRows {
public:
  using T = Accumulate<X>;

  // Rows o..o+some from element q on. Row o stands in for the rest, so that all loops may have a constant length.
  MixedRows(const Mixed<S, X> &recipe, int64_t o, int64_t q, int some = count)
      : sources_(recipe.sources()), ahead_(count * recipe.next_row(0)) {
    for (int r = 0; r < count; ++r) {
      const int64_t row = o + (r < some ? r : 0);
      for (int j = 0; j < sources_; ++j) {
        from_[r][j] = recipe.dense_row(j, row) + q;
        factors_[r][j] = broadcast(recipe.factor(j, row));
      }
    }
  }

  // A vector of row r, `l` elements on, as `load` reads it.
  template <class Load> Vector<T> operator()(int r, int64_t l, const Load &load) const {
    // What the rows that come next will want.
    __builtin_prefetch(from_[r][0] + l + ahead_, 0, 2);
    __builtin_prefetch(from_[r][sources_ - 1] + l + ahead_, 0, 2);
    const auto source = [&](int j) { return load(from_[r][j] + l); };
    const auto factor = [&](int j) { return factors_[r][j]; };
    return rounded<X>(mix_apart(sources_, source, factor));
  }

private:
  int sources_;
  int64_t ahead_;
  const S *from_[count][max_sources];
  Vector<T> factors_[count][max_sources];
};

// Rows o..o+n of a recipe, elements q..q+size, mixed into scratch, and their biases where there is room for these. They
// pose as the one source of a recipe that begins with them: for MixedRows, which has a factor a row.
template <class S, class X> class MixedAhead {
public:
  using T = Accumulate<X>;

  MixedAhead(const Mixed<S, X> &recipe, int64_t o, int64_t n, int64_t q, int64_t size, T *rows, T *biases)
      : source_(source(rows, size, biases, &one_)), recipe_(source_, size, 1) {
    for (int64_t i = 0; i < n; ++i) {
      recipe.row(o + i, q, size, rows + i * size, recipe.next_row(0));
      if (biases != nullptr)
        biases[i] = recipe.bias(o + i);
    }
  }
  MixedAhead(const MixedAhead &) = delete;

  const Mixed<T, X> &recipe() const { return recipe_; }

private:
  static Recipe source(const T *rows, int64_t size, const T *biases, const T *one) {
    Recipe recipe{};
    recipe.sources = 1;
    recipe.weight[0] = rows;
    recipe.out_stride[0] = size, recipe.in_stride[0] = recipe.tap_stride[0] = 1;
    recipe.bias[0] = biases, recipe.bias_stride[0] = 1;
    recipe.coefficients = one;
    return recipe;
  }

  const T one_ = 1;
  const Recipe source_;
  const Mixed<T, X> recipe_;
};

} // namespace
} // namespace rl_kernels::cpu
