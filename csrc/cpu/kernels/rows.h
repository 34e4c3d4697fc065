// Rows of activations and of outputs, in the type that is multiplied: where they are, or by way of scratch.
#pragma once

#include "vector.h"

#include <cstdint>

namespace rl_kernels::cpu {
namespace {

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
      for (int64_t i = 0; i < count; ++i)
        convert(sums + i * sums_pitch, columns, out_ + (m + i) * pitch_ + column);
  }

private:
  X *out_;
  int64_t pitch_;
};

} // namespace
} // namespace rl_kernels::cpu
