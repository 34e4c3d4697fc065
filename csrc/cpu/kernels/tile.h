// The register tile that every product is made of.
//
// A tile is rows x (vectors * width) of the output. One operand is read row by row, an element at a time, and
// broadcast; the other is a panel packed as [k][vectors * width]: the mixed weight, or the activation in wgrad.
#pragma once

#include "vector.h"

#include <cstdint>

namespace rl_kernels::cpu {
namespace {

template <int value_> struct Int {
  static constexpr int value = value_;
};

constexpr int max_vectors = RLK_TILE_VECTORS;
// With 32 vector registers, 24 hold sums; with 16, 12.
constexpr int tile_rows(int vectors) { return vectors == 4 ? 6 : (max_vectors == 2 && vectors == 2) ? 6 : 8; }
template <class T> constexpr int panel_width = max_vectors * width<T>;
template <class T> constexpr int vectors_for(int64_t columns) {
  return int(min(max_vectors, ceil_div(columns, width<T>)));
}

// Which elements are multiplied: `count` runs of `size`, run r from offset[r] of every row on, against the rows of the
// panel from row[r] on.
struct Runs {
  int64_t count;
  const int64_t *offset, *row;
  int64_t size;
};

// Where a tile's sums go: into the output (stored, or added to it), with a bias added where there is one.
template <class T> struct Out {
  T *const *rows;
  int64_t columns;
  bool accumulate;
  const T *bias; // as many as the panel is wide, or nullptr
};

template <class T, int rows, int vectors>
void tile(const Runs &runs, const T *const *a, const T *panel, const Out<T> &out) {
  Vector<T> sums[rows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j)
      sums[i][j] = Vector<T>{};
  for (int64_t r = 0; r < runs.count; ++r) {
    const T *from[rows];
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
      from[i] = a[i] + runs.offset[r];
    const T *row = panel + runs.row[r] * vectors * width<T>;
    for (int64_t k = 0; k < runs.size; ++k) {
      Vector<T> b[vectors];
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j)
        b[j] = load(row + j * width<T>);
      row += vectors * width<T>;
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
        const T element = from[i][k];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; ++j)
          sums[i][j] += element * b[j];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      T *to = out.rows[i] + j * width<T>;
      const int64_t n = out.columns - j * width<T>;
      Vector<T> total = sums[i][j];
      if (out.bias != nullptr)
        total += load(out.bias + j * width<T>);
      if (n >= width<T>)
        store(to, out.accumulate ? load(to) + total : total);
      else if (n > 0)
        store_part(to, out.accumulate ? load_part(to, n) + total : total, n);
    }
}

// The same tile where the broadcast operand is packed as [k][rows]: run r takes it from step[r] on, and the panel from
// offset[r] on, with rows `pitch` apart. Sums are added to `out`, whose rows are `out_stride` apart: a long sum is made
// of short ones, which keeps its rounding error small.
struct OuterRuns {
  int64_t count;
  const int64_t *step, *offset;
  int64_t size, pitch;
};

template <class T, int rows, int vectors>
void tile_outer(const OuterRuns &runs, const T *a, const T *panel, T *out, int64_t out_stride) {
  Vector<T> sums[rows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j)
      sums[i][j] = Vector<T>{};
  for (int64_t r = 0; r < runs.count; ++r) {
    const T *row = panel + runs.offset[r], *elements = a + runs.step[r] * rows;
    for (int64_t k = 0; k < runs.size; ++k) {
      Vector<T> b[vectors];
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j)
        b[j] = load(row + j * width<T>);
      row += runs.pitch;
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; ++j)
          sums[i][j] += elements[i] * b[j];
      elements += rows;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      T *to = out + i * out_stride + j * width<T>;
      store(to, load(to) + sums[i][j]);
    }
}

template <class T, int vectors>
void multiply_rows(const Runs &runs, int64_t m, const T *const *a, const T *panel, Out<T> out) {
  constexpr int full = tile_rows(vectors);
  const auto advance = [&](int rows) { m -= rows, a += rows, out.rows += rows; };
  for (; m >= full; advance(full))
    tile<T, full, vectors>(runs, a, panel, out);
  if (m >= 4) {
    tile<T, 4, vectors>(runs, a, panel, out);
    advance(4);
  }
  if (m >= 2) {
    tile<T, 2, vectors>(runs, a, panel, out);
    advance(2);
  }
  if (m >= 1)
    tile<T, 1, vectors>(runs, a, panel, out);
}

// out (m rows) = A panel, for a panel of `vectors` vectors.
template <class T>
void multiply(int vectors, const Runs &runs, int64_t m, const T *const *a, const T *panel, const Out<T> &out) {
  switch (vectors) {
  case 1:
    return multiply_rows<T, 1>(runs, m, a, panel, out);
  case 2:
    return multiply_rows<T, 2>(runs, m, a, panel, out);
#if RLK_TILE_VECTORS == 4
  case 3:
    return multiply_rows<T, 3>(runs, m, a, panel, out);
  case 4:
    return multiply_rows<T, 4>(runs, m, a, panel, out);
#endif
  }
}

// How an outer product is cut: tiles of `rows` rows and up to `vectors` vectors.
struct OuterShape {
  int rows, vectors;
};
template <class T> OuterShape outer_shape(int64_t rows, int64_t columns) {
  if (max_vectors < 4)
    return {tile_rows(max_vectors), max_vectors};
  const auto waste = [&](OuterShape shape) {
    return round_up(rows, shape.rows) * ceil_div(columns, width<T>) * (columns % (shape.vectors * width<T>) ? 9 : 8);
  };
  const OuterShape square{8, 3}, wide{6, 4};
  return waste(square) < waste(wide) ? square : wide;
}
constexpr int64_t max_outer_rows = 8;

// The operands of A^T B. A is packed by pack_outer in `tiles` tiles of `steps` rows; B is `columns` columns, of which
// panels of panel_width columns lie `panel_stride` apart. (With 0 they lie side by side, as B's rows are.)
template <class T> struct OuterOperands {
  const T *a;
  int64_t tiles, steps;
  const T *panel;
  int64_t panel_stride, columns;
};

// Adds A^T B to `out`.
template <class T>
void multiply_outer(OuterShape shape, const OuterRuns &runs, const OuterOperands<T> &operands, T *out,
                    int64_t out_stride) {
  const int64_t wide = shape.vectors * width<T>;
  for (int64_t first = 0; first < operands.columns; first += wide) {
    const int64_t vectors = min(shape.vectors, ceil_div(operands.columns - first, width<T>));
    const T *b = operands.panel + (operands.panel_stride == 0 ? first : first / wide * operands.panel_stride);
    const auto run = [&](auto rows, auto count) {
      for (int64_t t = 0; t < operands.tiles; ++t)
        tile_outer<T, rows.value, count.value>(runs, operands.a + t * operands.steps * rows.value, b,
                                               out + t * rows.value * out_stride + first, out_stride);
    };
    const auto with_rows = [&](auto rows) {
      if (vectors == 1)
        run(rows, Int<1>{});
      else if (vectors == 2)
        run(rows, Int<2>{});
      else if constexpr (max_vectors == 4) {
        if (vectors == 3)
          run(rows, Int<3>{});
        else if constexpr (rows.value == 6)
          run(rows, Int<4>{});
      }
    };
    if (max_vectors == 4 && shape.rows == 8)
      with_rows(Int<8>{});
    else
      with_rows(Int<6>{});
  }
}

} // namespace
} // namespace rl_kernels::cpu
