// Linear layers. W (n, k) is mixed where it is packed, a panel at a time, into scratch that stays in L2.

// Packs W^T for rows o..o+n of W and elements q..q+size: panel[place(element)][row], rows beyond n as zeros. An element
// whose place is negative is left out.
template <class S, class X, class Place>
void pack_transposed(const Mixed<S, X> &recipe, int64_t o, int64_t n, int64_t q, int64_t size, int vectors,
                     Accumulate<X> *panel, const Place &place) {
  using T = Accumulate<X>;
  constexpr int64_t chunk = 128;
  constexpr int w = width<T>;
  alignas(64) T rows[w][chunk];
  for (int v = 0; v < vectors; ++v) {
    const int64_t some = most(0, least(w, n - v * w));
    for (int64_t i = some; i < w; ++i)
      for (int64_t l = 0; l < chunk; ++l)
        rows[i][l] = 0;
    for (int64_t first = 0; first < size; first += chunk) {
      const int64_t length = least(chunk, size - first);
      for (int64_t i = 0; i < some; ++i)
        recipe.row(o + v * w + i, q + first, length, rows[i], length);
      for (int64_t l = 0; l < length; l += w) {
        Vector<T> block[w];
#pragma GCC unroll 16
        for (int i = 0; i < w; ++i)
          block[i] = load(rows[i] + l);
        transpose<T>(block);
        const int64_t whole = least(w, length - l);
        for (int i = 0; i < whole; ++i)
          if (const int64_t at = place(first + l + i); at >= 0)
            store(panel + (at * vectors + v) * w, block[i]);
      }
    }
  }
}

constexpr int64_t most_small_rows = 16;

// y for a few rows: every source is read once, mixed in registers and multiplied by all rows at once.
template <class S, class X, int rows, int at_once>
void forward_few(const Linear &p, const Mixed<S, X> &recipe, const Accumulate<X> *const *x, int64_t o) {
  using T = Accumulate<X>;
  const int count = recipe.sources();
  const S *from[at_once][max_sources];
  Vector<T> factors[at_once][max_sources];
  for (int r = 0; r < at_once; ++r)
    for (int j = 0; j < count; ++j) {
      from[r][j] = recipe.dense_row(j, o + r);
      factors[r][j] = broadcast(recipe.factor(j, o + r));
    }
  const int64_t ahead = at_once * recipe.next_row(0); // the rows that come next
  Vector<T> sums[at_once][rows] = {};
  const auto step = [&](int64_t q, auto load_weight, auto load_x) {
    Vector<T> weight[at_once];
#pragma GCC unroll 4
    for (int r = 0; r < at_once; ++r) {
      __builtin_prefetch(from[r][0] + q + ahead, 0, 2);
      __builtin_prefetch(from[r][count - 1] + q + ahead, 0, 2);
      Vector<T> total = load_weight(from[r][0] + q) * factors[r][0];
      if (count == 2)
        total += load_weight(from[r][1] + q) * factors[r][1];
      else
        for (int j = 1; j < count; ++j)
          total += load_weight(from[r][j] + q) * factors[r][j];
      weight[r] = rounded<X>(total);
    }
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
    for (int i = 0; i < least(rows, p.m); ++i)
      store_one(static_cast<X *>(p.out) + i * p.n + o + r, sum<T>(sums[r][i]) + recipe.bias(o + r));
}

template <class S, class X> void linear_forward_small(const Linear &p, const Team &team) {
  using T = Accumulate<X>;
  const Mixed<S, X> recipe(p.recipe, p.k, 1);
  const int64_t block = 12, count = ceil_div(p.n, block);
  share(team, count, [&](int64_t item) {
    Scratch scratch(team);
    const T *x[most_small_rows];
    for (int64_t i = 0; i < most_small_rows; ++i) {
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
    int64_t o = item * block;
    const int64_t end = least(p.n, o + block);
    const auto rows = [&](auto many, auto at_once) {
      for (; o + at_once.value <= end; o += at_once.value)
        forward_few<S, X, many.value, at_once.value>(p, recipe, x, o);
      for (; o < end; ++o)
        forward_few<S, X, many.value, 1>(p, recipe, x, o);
    };
    if (p.m == 1)
      rows(Int<1>{}, Int<4>{});
    else if (p.m == 2)
      rows(Int<2>{}, Int<4>{});
    else if (p.m <= 4)
      rows(Int<4>{}, Int<4>{});
    else if (p.m <= 8)
      rows(Int<8>{}, Int<3>{});
    else
      rows(Int<16>{}, Int<1>{});
  });
}

template <class S, class X> bool all_dense(const Mixed<S, X> &recipe) {
  for (int j = 0; j < recipe.sources(); ++j)
    if (recipe.dense_row(j, 0) == nullptr)
      return false;
  return true;
}

// Rows of an activation as T: where they are, or converted into scratch for elements k..k+size.
template <class T, class X> class Rows {
public:
  Rows(const void *data, int64_t stride) : data_(static_cast<const X *>(data)), stride_(stride) {}
  static constexpr bool converts = sizeof(X) != sizeof(T);
  void point(int64_t m, int64_t count, int64_t k, int64_t size, const T **rows, T *converted) const {
    for (int64_t i = 0; i < count; ++i) {
      const X *row = data_ + (m + i) * stride_ + k;
      if constexpr (converts) {
        convert(row, size, converted + i * size);
        rows[i] = converted + i * size;
      } else {
        rows[i] = row;
      }
    }
  }

private:
  const X *data_;
  int64_t stride_;
};

// Into how many shares of the rows to cut `items` pieces of work that the threads cannot share out evenly.
inline int64_t row_splits(int64_t items, int64_t rows, int64_t threads) {
  return items % threads == 0 || items >= 4 * threads ? 1 : blocks(rows, rows, 128, threads);
}

// Rows handled at once: so many pointers are set up, and so many rows are converted, at a time.
template <class T, class X> constexpr int64_t row_block = sizeof(X) == sizeof(T) ? 240 : 96;

// out[m..m+rows][column..] = sums: through float scratch where the output is in half precision.
template <class T, class X> class Target {
public:
  Target(void *out, int64_t pitch) : out_(static_cast<X *>(out)), pitch_(pitch) {}
  static constexpr bool converts = sizeof(X) != sizeof(T);
  void point(int64_t m, int64_t count, int64_t column, T **rows, T *sums, int64_t sums_pitch) const {
    for (int64_t i = 0; i < count; ++i)
      if constexpr (converts)
        rows[i] = sums + i * sums_pitch;
      else
        rows[i] = out_ + (m + i) * pitch_ + column;
  }
  void finish(int64_t m, int64_t count, int64_t column, int64_t columns, const T *sums, int64_t sums_pitch) const {
    if constexpr (converts)
      for (int64_t i = 0; i < count; ++i) {
        X *to = out_ + (m + i) * pitch_ + column;
        int64_t l = 0;
        for (; l + width<T> <= columns; l += width<T>)
          store(to + l, load(sums + i * sums_pitch + l));
        if (l < columns)
          store_part(to + l, load_part(sums + i * sums_pitch + l, columns - l), columns - l);
      }
  }

private:
  X *out_;
  int64_t pitch_;
};

template <class S, class X> void linear_forward(const Linear &p, const Team &team) {
  using T = Accumulate<X>;
  const Mixed<S, X> recipe(p.recipe, p.k, 1);
  // A half-precision row is converted whole into scratch.
  if (p.m <= most_small_rows && all_dense(recipe) && (sizeof(X) == sizeof(T) || p.k <= 48 << 10 >> 1))
    return linear_forward_small<S, X>(p, team);
  constexpr int64_t wide = panel_width<T>, depth = 2048 / sizeof(T);
  const Rows<T, X> x(p.x, p.x_stride);
  const Target<T, X> y(p.out, p.n);
  // In half precision the sums stay in scratch over all of k, so that a panel is mixed once for each block of rows.
  const int64_t tall = x.converts ? 4 * row_block<T, X> : p.m;
  // An item is a few panels side by side: y is then written, and x read, in longer pieces.
  const int64_t panels = ceil_div(p.n, wide);
  const int64_t group = most(1, least(least(4, panels / (2 * team.threads)),
                                      (512 << 10) / int64_t(sizeof(T)) / wide / most(1, least(depth, p.k))));
  const int64_t groups = ceil_div(panels, group);
  const int64_t splits = row_splits(groups, p.m, team.threads);
  const int64_t rows_a_split = ceil_div(p.m, splits);
  share(team, groups * splits, [&](int64_t item) {
    Scratch scratch(team);
    T *packed = scratch.take<T>(group * depth * wide);
    T *converted = scratch.take<T>(x.converts ? row_block<T, X> * depth : 0);
    T *sums = scratch.take<T>(y.converts ? tall * group * wide : 0);
    T *bias = scratch.take<T>(group * wide);
    const int64_t o = item % groups * group * wide, n = least(group * wide, p.n - o), pitch = group * wide;
    for (int64_t i = 0; i < pitch; ++i)
      bias[i] = i < n ? recipe.bias(o + i) : 0;
    const int64_t begin = item / groups * rows_a_split, end = least(p.m, begin + rows_a_split);
    for (int64_t top = begin; top < end; top += tall) {
      const int64_t bottom = least(end, top + tall);
      for (int64_t k = 0; k == 0 || k < p.k; k += depth) { // once for no k: the bias remains
        const int64_t size = least(depth, p.k - k), zero = 0;
        for (int64_t c = 0; c < n; c += wide)
          pack_transposed(recipe, o + c, least(wide, n - c), k, size, vectors_for<T>(n - c), packed + c * depth,
                          [](int64_t element) { return element; });
        for (int64_t m = top; m < bottom; m += row_block<T, X>) {
          const int64_t count = least(row_block<T, X>, bottom - m);
          const T *a[row_block<T, X>];
          T *to[row_block<T, X>];
          x.point(m, count, k, size, a, converted);
          for (int64_t c = 0; c < n; c += wide) {
            y.point(m, count, o + c, to, sums + (m - top) * pitch + c, pitch);
            multiply<T>(vectors_for<T>(n - c), {1, &zero, &zero, size}, count, a, packed + c * depth,
                        {to, least(wide, n - c), k > 0, k > 0 ? nullptr : bias + c});
          }
        }
      }
      y.finish(top, bottom - top, o, n, sums, pitch);
    }
  });
}

// One after the other, so many rows of W add to one sum, and then to another: a long sum in one accumulator would round
// worse than a blocked product does.
constexpr int64_t rows_to_a_sum = 128;

// dx's sums over rows begin..end of W, for a few rows of dx: every source is read once; four rows of W at a time, mixed
// in registers.
template <class S, class X, int rows>
void dgrad_few(const Linear &p, const Mixed<S, X> &recipe, const Accumulate<X> *dy, int64_t q, int64_t size,
               int64_t begin, int64_t end, Accumulate<X> *const *sums) {
  using T = Accumulate<X>;
  constexpr int at_once = 4;
  const int count = recipe.sources();
  for (int64_t o = begin; o < end; o += at_once) {
    const S *from[at_once][max_sources];
    Vector<T> factors[at_once][max_sources], scale[rows][at_once];
    const int some = int(least(at_once, end - o));
    for (int r = 0; r < at_once; ++r) {
      const int64_t row = o + (r < some ? r : 0);
      for (int j = 0; j < count; ++j) {
        from[r][j] = recipe.dense_row(j, row) + q;
        factors[r][j] = broadcast(recipe.factor(j, row));
      }
      for (int i = 0; i < rows; ++i)
        scale[i][r] = broadcast(r < some ? dy[i * p.n + row] : T(0));
    }
    const int64_t ahead = at_once * recipe.next_row(0); // the rows that come next
    const auto step = [&](int64_t l, auto load_weight, auto load_sum, auto store_sum) {
      Vector<T> weight[at_once];
      for (int r = 0; r < some; ++r) {
        __builtin_prefetch(from[r][0] + l + ahead, 0, 2);
        __builtin_prefetch(from[r][count - 1] + l + ahead, 0, 2);
        Vector<T> total = load_weight(from[r][0] + l) * factors[r][0];
        if (count == 2)
          total += load_weight(from[r][1] + l) * factors[r][1];
        else
          for (int j = 1; j < count; ++j)
            total += load_weight(from[r][j] + l) * factors[r][j];
        weight[r] = rounded<X>(total);
      }
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

template <class S, class X> void linear_dgrad_small(const Linear &p, const Team &team) {
  using T = Accumulate<X>;
  const Mixed<S, X> recipe(p.recipe, p.k, 1);
  const int64_t count = blocks(p.k, 4096 / sizeof(T), 1024 / sizeof(T), team.threads);
  const int64_t size = round_up(ceil_div(p.k, count), width<T>);
  const Target<T, X> dx(p.out, p.k);
  share(team, ceil_div(p.k, size), [&](int64_t item) {
    Scratch scratch(team);
    const int64_t q = item * size, some = least(size, p.k - q);
    const int rows = p.m == 1 ? 1 : p.m <= 2 ? 2 : p.m <= 4 ? 4 : 8;
    T *spare = scratch.take<T>(rows * size), *more = scratch.take<T>(rows * size);
    T *dy = scratch.take<T>(rows * p.n);
    T *sums[few_rows], *parts[few_rows];
    dx.point(0, p.m, q, sums, spare, size);
    for (int64_t i = 0; i < rows; ++i)
      if (i < p.m) {
        convert(static_cast<const X *>(p.dy) + i * p.dy_stride, p.n, dy + i * p.n);
      } else {
        sums[i] = spare + i * size;
        for (int64_t l = 0; l < p.n; ++l)
          dy[i * p.n + l] = 0;
      }
    for (int i = 0; i < rows; ++i)
      parts[i] = more + i * size;
    for (int64_t begin = 0; begin < p.n; begin += rows_to_a_sum) {
      const int64_t end = least(begin + rows_to_a_sum, p.n);
      T *const *to = begin == 0 ? sums : parts;
      if (rows == 1)
        dgrad_few<S, X, 1>(p, recipe, dy, q, some, begin, end, to);
      else if (rows == 2)
        dgrad_few<S, X, 2>(p, recipe, dy, q, some, begin, end, to);
      else if (rows == 4)
        dgrad_few<S, X, 4>(p, recipe, dy, q, some, begin, end, to);
      else
        dgrad_few<S, X, 8>(p, recipe, dy, q, some, begin, end, to);
      for (int64_t i = 0; begin > 0 && i < p.m; ++i)
        for (int64_t l = 0; l < some; ++l)
          sums[i][l] += parts[i][l];
    }
    dx.finish(0, p.m, q, some, spare, size);
  });
}

template <class S, class X> void linear_dgrad(const Linear &p, const Team &team) {
  using T = Accumulate<X>;
  const Mixed<S, X> recipe(p.recipe, p.k, 1);
  if (p.m <= few_rows && all_dense(recipe) && p.n <= 32 << 10)
    return linear_dgrad_small<S, X>(p, team);
  // Columns of dx are owned, in runs long enough to read the sources at full bandwidth.
  constexpr int64_t wide = panel_width<T>, depth = 1024 / sizeof(T);
  const Rows<T, X> dy(p.dy, p.dy_stride);
  const Target<T, X> dx(p.out, p.k);
  const int64_t tall = dy.converts ? 2 * row_block<T, X> : p.m;
  const int64_t columns = round_up(ceil_div(p.k, blocks(p.k, 8 * wide, 4 * wide, team.threads)), wide);
  const int64_t count = ceil_div(p.k, columns);
  const int64_t splits = row_splits(count, p.m, team.threads);
  const int64_t rows_a_split = ceil_div(p.m, splits);
  share(team, count * splits, [&](int64_t item) {
    Scratch scratch(team);
    T *panels = scratch.take<T>(depth * columns);
    T *converted = scratch.take<T>(dy.converts ? row_block<T, X> * depth : 0);
    T *sums = scratch.take<T>(dx.converts ? tall * columns : 0);
    T *row = scratch.take<T>(columns);
    const int64_t q = item % count * columns, n = least(columns, p.k - q);
    const int64_t begin = item / count * rows_a_split, end = least(p.m, begin + rows_a_split);
    for (int64_t l = 0; l < columns; ++l)
      row[l] = 0;
    for (int64_t top = begin; top < end; top += tall) {
      const int64_t bottom = least(end, top + tall);
      for (int64_t o = 0; o < p.n; o += depth) {
        const int64_t size = least(depth, p.n - o), zero = 0;
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
          const int64_t rows = least(row_block<T, X>, bottom - m);
          const T *a[row_block<T, X>];
          T *to[row_block<T, X>];
          dy.point(m, rows, o, size, a, converted);
          for (int64_t c = 0; c < n; c += wide) {
            dx.point(m, rows, q + c, to, sums + (m - top) * columns + c, columns);
            multiply<T>(vectors_for<T>(n - c), {1, &zero, &zero, size}, rows, a, panels + c * depth,
                        {to, least(wide, n - c), o > 0, nullptr});
          }
        }
      }
      dx.finish(top, bottom - top, q, n, sums, columns);
    }
  });
}

// s = sum of dy over its rows, in double, for `columns` columns from `first` on.
template <class X> void sum_rows(const X *dy, int64_t stride, int64_t m, int64_t first, int64_t columns, double *sums) {
  using T = Accumulate<X>;
  for (int64_t c = 0; c < columns; c += width<T>) {
    const int64_t some = least(width<T>, columns - c);
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

// The biases' gradients, and what the biases add to the coefficients': s[o] is the sum of dy over all but channel o.
template <class S, class X>
void finish_biases(const Mixed<S, X> &recipe, const Recipe &sources, const Gradients &gradients, int64_t out,
                   const double *s, double *dots) {
  using T = Accumulate<X>;
  for (int j = 0; j < sources.sources; ++j) {
    S *to = static_cast<S *>(gradients.bias[j]);
    for (int64_t o = 0; o < out; ++o) {
      if (to != nullptr)
        store_one(to + o, T(recipe.factor(j, o) * s[o]));
      if (dots != nullptr)
        dots[j * out + o] +=
            s[o] * double(load_one(static_cast<const S *>(sources.bias[j]) + o * sources.bias_stride[j]));
    }
  }
}

// dc from dots (N, out), summed over the channels in their order where a coefficient serves all of them.
template <class S, class X>
void finish_coefficients(const Recipe &sources, const Gradients &gradients, int64_t out, const double *dots) {
  using T = Accumulate<X>;
  T *to = static_cast<T *>(gradients.coefficients);
  for (int j = 0; j < sources.sources; ++j) {
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

// The end of a wgrad: the blocks' shares of <G, W_j> are added in order, the biases join in.
template <class S, class X>
void finish_linear(const Linear &p, const Mixed<S, X> &recipe, int64_t dots_blocks, const Team &team) {
  const int64_t stride = p.recipe.sources * p.n;
  const bool needs_dots = p.gradients.coefficients != nullptr;
  bool needs_sums = needs_dots && p.recipe.bias[0] != nullptr;
  for (int j = 0; j < p.recipe.sources; ++j)
    needs_sums |= p.gradients.bias[j] != nullptr;
  for (int64_t block = 1; needs_dots && block < dots_blocks; ++block)
    for (int64_t l = 0; l < stride; ++l)
      p.dots[l] += p.dots[block * stride + l];
  if (needs_sums) {
    double *sums = p.dots + most(1, dots_blocks) * stride;
    const X *dy = static_cast<const X *>(p.dy);
    constexpr int64_t columns = 256;
    share(team, ceil_div(p.n, columns), [&](int64_t item) {
      const int64_t first = item * columns;
      sum_rows(dy, p.dy_stride, p.m, first, least(columns, p.n - first), sums + first);
    });
    finish_biases(recipe, p.recipe, p.gradients, p.n, sums, needs_dots ? p.dots : nullptr);
  }
  if (needs_dots)
    finish_coefficients<S, X>(p.recipe, p.gradients, p.n, p.dots);
}

template <class S, class X> void linear_wgrad(const Linear &p, const Team &team) {
  using T = Accumulate<X>;
  const Mixed<S, X> recipe(p.recipe, p.k, 1);
  const Gradients &gradients = p.gradients;
  const X *x = static_cast<const X *>(p.x), *dy = static_cast<const X *>(p.dy);
  const bool needs_dots = gradients.coefficients != nullptr;
  bool needs_product = needs_dots && p.n > 0 && p.k > 0; // nothing points to gradients without elements
  for (int j = 0; j < p.recipe.sources; ++j)
    needs_product |= gradients.weight[j] != nullptr;
  const int64_t stride = p.recipe.sources * p.n; // of dots, a block of columns
  const int64_t columns = linear_dots_columns(sizeof(T)), across = ceil_div(p.k, columns);
  if (needs_product) {
    // G is made a block at a time, finished while it is in cache; x and dy are packed for the block, `depth` rows each.
    constexpr int64_t depth = 512 / sizeof(T), wide = panel_width<T>;
    const OuterShape shape{tile_rows(max_vectors), max_vectors};
    const int64_t tallest = (p.m < 512 ? 16 : 48) * shape.rows;
    const int64_t tall = round_up(
        ceil_div(p.n, blocks(p.n, tallest, 4 * shape.rows, ceil_div(team.threads, least(team.threads, across)))),
        shape.rows);
    const int64_t down = ceil_div(p.n, tall);
    share(team, down * across, [&](int64_t item) {
      Scratch scratch(team);
      const int64_t o = item / across * tall, n = least(tall, p.n - o);
      const int64_t q = item % across * columns, size = least(columns, p.k - q);
      const int64_t pitch = round_up(size, width<T>), tiles = ceil_div(n, shape.rows);
      T *g = scratch.take<T>(tiles * shape.rows * pitch);
      T *a = scratch.take<T>(tiles * shape.rows * depth);
      T *b = scratch.take<T>(depth * round_up(size, wide));
      for (int64_t l = 0; l < tiles * shape.rows * pitch; l += width<T>)
        store(g + l, Vector<T>{});
      for (int64_t m = 0; m < p.m; m += depth) {
        const int64_t steps = least(depth, p.m - m), zero = 0;
        for (int64_t i = 0; i < steps; ++i) {
          pack_outer(shape.rows, dy + (m + i) * p.dy_stride + o, n, i, steps, a);
          for (int64_t c = 0; c < size; c += wide)
            convert(x + (m + i) * p.x_stride + q + c, least(wide, size - c), b + c * depth + i * wide);
        }
        multiply_outer<T>(shape, tiles, {1, &zero, &zero, steps, wide}, steps, a, b, depth * wide, size, g, pitch);
      }
      double *dots = needs_dots ? p.dots + item % across * stride : nullptr;
      for (int64_t i = 0; i < n; ++i) {
        if (needs_dots)
          for (int j = 0; j < p.recipe.sources; ++j)
            dots[j * p.n + o + i] = 0;
        finish_row(recipe, gradients, o + i, q, size, g + i * pitch, needs_dots ? dots + o + i : nullptr, p.n);
      }
    });
  }
  finish_linear<S, X>(p, recipe, needs_product ? across : 0, team);
}

template <class T> constexpr int64_t strip_elements = (16 << 10) / int64_t(sizeof(T));

// dx, dW_j and <G, W_j> of columns q..q+size for a few rows, in one pass over the sources. `strip` holds, for each
// vector of columns, those of every row of x and then those of every row of dx: one stream, whatever the number of
// rows. `totals` takes dx's sums from the strip, every so many rows of W.
template <class S, class X, int rows>
void backward_few(const Linear &p, const Mixed<S, X> &recipe, const Accumulate<X> *dy, int64_t q, int64_t size,
                  Accumulate<X> *strip, Accumulate<X> *totals, double *dots) {
  using T = Accumulate<X>;
  constexpr int at_once = 4;
  constexpr int64_t chunk = Mixed<S, X>::chunk, n = width<T>, pitch = 2 * rows * n;
  const int count = recipe.sources();
  alignas(64) T g[at_once][chunk];
  for (int64_t l = 0; l < size; l += n)
    for (int i = 0; i < rows; ++i) {
      T *to = strip + l / n * pitch + i * n;
      const X *from = static_cast<const X *>(p.x) + i * p.x_stride + q + l;
      store(to, i >= p.m ? Vector<T>{} : l + n <= size ? load(from) : load_part(from, size - l));
      store(to + rows * n, Vector<T>{});
      store(totals + (l / n * rows + i) * n, Vector<T>{});
    }
  const auto total_up = [&] {
    for (int64_t l = 0; l < size; l += n)
      for (int i = 0; i < rows; ++i) {
        T *from = strip + l / n * pitch + (rows + i) * n, *to = totals + (l / n * rows + i) * n;
        store(to, load(to) + load(from));
        store(from, Vector<T>{});
      }
  };
  for (int64_t o = 0; o < p.n; o += at_once) {
    if (o > 0 && o % rows_to_a_sum == 0)
      total_up();
    const int some = int(least(at_once, p.n - o));
    const S *from[at_once][max_sources];
    Vector<T> factors[at_once][max_sources];
    T scale[rows][at_once];
    for (int r = 0; r < at_once; ++r) {
      const int64_t row = o + (r < some ? r : 0);
      for (int j = 0; j < count; ++j) {
        from[r][j] = recipe.dense_row(j, row) + q;
        factors[r][j] = broadcast(recipe.factor(j, row));
      }
      for (int i = 0; i < rows; ++i)
        scale[i][r] = r < some ? dy[i * p.n + row] : T(0);
    }
    const int64_t ahead = at_once * recipe.next_row(0); // the rows that come next
    const auto step = [&](int64_t l, int64_t in_chunk, auto load_weight) {
      Vector<T> weight[at_once], product[at_once];
#pragma GCC unroll 4
      for (int r = 0; r < at_once; ++r) {
        __builtin_prefetch(from[r][0] + l + ahead, 0, 2);
        __builtin_prefetch(from[r][count - 1] + l + ahead, 0, 2);
        Vector<T> total = load_weight(from[r][0] + l) * factors[r][0];
        if (count == 2)
          total += load_weight(from[r][1] + l) * factors[r][1];
        else
          for (int j = 1; j < count; ++j)
            total += load_weight(from[r][j] + l) * factors[r][j];
        weight[r] = rounded<X>(total);
        product[r] = Vector<T>{};
      }
      T *x = strip + l / n * pitch, *dx = x + rows * n;
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
    for (int64_t first = 0; first < size; first += chunk) {
      const int64_t length = least(chunk, size - first);
      int64_t l = 0;
      for (; l + n <= length; l += n)
        step(first + l, l, [](const S *at) { return load(at); });
      if (const int64_t left = length - l; left > 0)
        step(first + l, l, [=](const S *at) { return load_part(at, left); });
      for (int r = 0; r < some; ++r)
        finish_row(recipe, p.gradients, o + r, q + first, length, g[r], dots != nullptr ? dots + o + r : nullptr, p.n);
    }
  }
  total_up();
  for (int64_t l = 0; l < size; l += n)
    for (int i = 0; i < p.m; ++i) {
      X *to = static_cast<X *>(p.out) + i * p.k + q + l;
      const Vector<T> total = load(totals + (l / n * rows + i) * n);
      if (l + n <= size)
        store(to, total);
      else
        store_part(to, total, size - l);
    }
}

template <class S, class X> bool linear_backward(const Linear &p, const Team &team) {
  using T = Accumulate<X>;
  const Mixed<S, X> recipe(p.recipe, p.k, 1);
  if (p.n > 32 << 10 || !all_dense(recipe))
    return false;
  const int rows = p.m == 1 ? 1 : p.m <= 2 ? 2 : p.m <= 4 ? 4 : 8;
  const int64_t columns = linear_dots_columns(sizeof(T));
  const int64_t size = round_up(ceil_div(p.k, blocks(p.k, columns, columns / 4, team.threads)), width<T>);
  const int64_t count = ceil_div(p.k, size);
  share(team, count, [&](int64_t item) {
    Scratch scratch(team);
    const int64_t begin = item * size, end = least(p.k, begin + size);
    // A strip stays in the first cache while the sources pass by.
    const int64_t strips = ceil_div(size, strip_elements<T> / (2 * rows)),
                  wide = round_up(ceil_div(size, strips), width<T>);
    T *strip = scratch.take<T>(2 * rows * wide), *totals = scratch.take<T>(rows * wide);
    T *dy = scratch.take<T>(rows * p.n);
    for (int64_t i = 0; i < rows; ++i)
      if (i < p.m)
        convert(static_cast<const X *>(p.dy) + i * p.dy_stride, p.n, dy + i * p.n);
      else
        __builtin_memset(dy + i * p.n, 0, size_t(p.n) * sizeof(T));
    double *dots = p.gradients.coefficients != nullptr ? p.dots + item * p.recipe.sources * p.n : nullptr;
    for (int64_t l = 0; dots != nullptr && l < p.recipe.sources * p.n; ++l)
      dots[l] = 0;
    const auto run = [&](auto many) {
      for (int64_t q = begin; q < end; q += wide)
        backward_few<S, X, many.value>(p, recipe, dy, q, least(wide, end - q), strip, totals, dots);
    };
    if (rows == 1)
      run(Int<1>{});
    else if (rows == 2)
      run(Int<2>{});
    else if (rows == 4)
      run(Int<4>{});
    else
      run(Int<8>{});
  });
  finish_linear<S, X>(p, recipe, count, team);
  return true;
}
