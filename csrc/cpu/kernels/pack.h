// How operands are laid out for the register tile: W^T mixed into panels, the broadcast operand of wgrad, transposes.
#pragma once

#include "mix.h"
#include "tile.h"
#include "vector.h"

#include <cstdint>

namespace rl_kernels::cpu {
namespace {

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
    const int64_t some = max(0, min(w, n - v * w));
    for (int64_t i = some; i < w; ++i)
      for (int64_t l = 0; l < chunk; ++l)
        rows[i][l] = 0;
    for (int64_t first = 0; first < size; first += chunk) {
      const int64_t length = min(chunk, size - first);
      for (int64_t i = 0; i < some; ++i)
        recipe.packed_row(o + v * w + i, q + first, length, rows[i], length);
      for (int64_t l = 0; l < length; l += w) {
        Vector<T> block[w];
#pragma GCC unroll 16
        for (int i = 0; i < w; ++i)
          block[i] = load(rows[i] + l);
        transpose<T>(block);
        const int64_t whole = min(w, length - l);
        for (int i = 0; i < whole; ++i)
          if (const int64_t at = place(first + l + i); at >= 0)
            store(panel + (at * vectors + v) * w, block[i]);
      }
    }
  }
}

// Packs n columns of one row of A into tiles of `rows`: to[(tile, k, row in tile)], `steps` rows of A in all, this one
// the k-th.
template <int rows, class T, class X>
inline void pack_outer_row(const X *row, int64_t n, int64_t k, int64_t steps, T *to) {
  T *tile = to + k * rows;
  for (; n >= rows; n -= rows, row += rows, tile += steps * rows)
    for (int i = 0; i < rows; ++i)
      tile[i] = load_one(row + i);
  if (n > 0)
    for (int i = 0; i < rows; ++i)
      tile[i] = i < n ? load_one(row + i) : T(0);
}
template <class T, class X> inline void pack_outer(int rows, const X *row, int64_t n, int64_t k, int64_t steps, T *to) {
  if (rows == 8)
    pack_outer_row<8>(row, n, k, steps, to);
  else
    pack_outer_row<6>(row, n, k, steps, to);
}

// to[c][r] = from[r][c] for `rows` rows and `columns` columns; X and Y may differ. Columns of `to` up to the next
// multiple of a vector may be overwritten: the pitch leaves room for them.
template <class X, class Y>
void transpose_block(const X *from, int64_t from_pitch, int64_t rows, int64_t columns, Y *to, int64_t to_pitch) {
  using T = Accumulate<X>;
  constexpr int n = width<T>;
  for (int64_t r = 0; r < rows; r += n) { // few rows at a time: each is a page of its own
    const int64_t some_rows = min(n, rows - r);
    for (int64_t c = 0; c < columns; c += n) {
      const int64_t some_columns = min(n, columns - c);
      Vector<T> block[n];
      for (int i = 0; i < n; ++i)
        block[i] = i >= some_rows      ? Vector<T>{}
                   : some_columns == n ? load(from + (r + i) * from_pitch + c)
                                       : load_part(from + (r + i) * from_pitch + c, some_columns);
      transpose<T>(block);
      for (int i = 0; i < some_columns; ++i)
        if (some_rows == n)
          store(to + (c + i) * to_pitch + r, block[i]);
        else
          store_part(to + (c + i) * to_pitch + r, block[i], some_rows);
    }
  }
}

} // namespace
} // namespace rl_kernels::cpu
