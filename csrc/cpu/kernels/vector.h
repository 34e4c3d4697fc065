// What vectors can do: loads and stores with conversions, sums, dot products, transposes. Only x86.h knows an
// intrinsic; everything here is left to the compiler, on any machine.
#pragma once

#include "vector_types.h"
#include "x86.h"

#include <cstddef>
#include <cstdint>

namespace rl_kernels::cpu {
namespace {

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline Vector<float> load(const float *p) { return *reinterpret_cast<const VectorOf<float>::unaligned *>(p); }
inline Vector<double> load(const double *p) { return *reinterpret_cast<const VectorOf<double>::unaligned *>(p); }
inline void store(float *p, Vector<float> v) { *reinterpret_cast<VectorOf<float>::unaligned *>(p) = v; }
inline void store(double *p, Vector<double> v) { *reinterpret_cast<VectorOf<double>::unaligned *>(p) = v; }

inline Vector<float> load(const BFloat16 *p) {
  Halves bits = *reinterpret_cast<const UnalignedHalves *>(p);
  return (Vector<float>)(__builtin_convertvector(bits, Words) << 16);
}
inline Halves to_bfloat16(Vector<float> v) {
  Words bits = (Words)v;
  Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; // to nearest, ties to even
  Words nan = (Words)(v != v);
  return __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), Halves);
}
inline void store(BFloat16 *p, Vector<float> v) { *reinterpret_cast<UnalignedHalves *>(p) = to_bfloat16(v); }

#if RLK_VECTOR_BYTES == 16
// Half a vector of floats as doubles.
inline Vector<double> load_wide(const float *p) {
  typedef float Part __attribute__((vector_size(RLK_VECTOR_BYTES / 2), aligned(4), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Part *>(p), Vector<double>);
}
inline Vector<float> load(const Float16 *p) {
  Halves bits = *reinterpret_cast<const UnalignedHalves *>(p);
  Words wide = __builtin_convertvector(bits, Words);
  Words magnitude = (wide & 0x7fff) << 13;
  // 2^112 moves the exponent's bias from 15 to 127, for subnormal numbers too.
  Words value = (Words)((Vector<float>)magnitude * 0x1p112f);
  Words special = (Words)((wide & 0x7c00) == 0x7c00); // infinity and nan
  value = (special & (magnitude | 0x7f800000)) | (~special & value);
  return (Vector<float>)(value | (wide & 0x8000) << 16);
}
inline uint16_t to_float16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000)
    return uint16_t(sign | 0x7e00); // nan
  if (magnitude >= 0x477ff000)
    return uint16_t(sign | 0x7c00); // 65520 and more round to infinity
  if (magnitude < 0x38800000) {     // subnormal: adding 0.5 rounds at the last place that float16 keeps
    float rounded;
    __builtin_memcpy(&rounded, &magnitude, 4);
    rounded += 0.5f;
    __builtin_memcpy(&magnitude, &rounded, 4);
    return uint16_t(sign | (magnitude - 0x3f000000));
  }
  return uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}
inline void store(Float16 *p, Vector<float> v) {
  for (int l = 0; l < width<float>; ++l)
    p[l].bits = to_float16(v[l]);
}
#endif

template <class T> inline Vector<T> broadcast(T value) { return Vector<T>{} + value; }

// The first n < width elements; the rest are 0.
template <class X> inline Vector<Accumulate<X>> load_part(const X *p, int64_t n) {
  X part[width<Accumulate<X>>] = {};
  __builtin_memcpy(part, p, size_t(n) * sizeof(X));
  return load(part);
}
template <class X> inline void store_part(X *p, Vector<Accumulate<X>> v, int64_t n) {
  X part[width<Accumulate<X>>];
  store(part, v);
  __builtin_memcpy(p, part, size_t(n) * sizeof(X));
}
template <class X> inline Accumulate<X> load_one(const X *p) {
  if constexpr (sizeof(X) >= 4)
    return *p;
  else
    return load_part(p, 1)[0];
}
template <class X> inline void store_one(X *p, Accumulate<X> value) {
  if constexpr (sizeof(X) >= 4)
    *p = value;
  else
    store_part(p, broadcast(value), 1);
}

// A sum in X's precision: what storing and loading it again would give.
template <class X> inline Vector<Accumulate<X>> rounded(Vector<Accumulate<X>> v) {
  if constexpr (sizeof(X) >= 4)
    return v;
  X part[width<Accumulate<X>>];
  store(part, v);
  return load(part);
}

// The sum of a vector's elements, by halves: each waits for the one before it otherwise.
template <class T> inline T sum(Vector<T> v) {
  T lanes[width<T>];
  store(lanes, v);
  for (int half = width<T> / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l)
      lanes[l] += lanes[l + half];
  return lanes[0];
}

// Converts n elements to the type that they are multiplied in, or sums to their result's.
template <class From, class To> inline void convert(const From *from, int64_t n, To *to) {
  constexpr int w = width<Accumulate<From>>;
  int64_t l = 0;
  for (; l + w <= n; l += w)
    store(to + l, load(from + l));
  if (l < n)
    store_part(to + l, load_part(from + l, n - l), n - l);
}

// <a, b> in float64 and in a fixed order, for n elements.
inline double dot(const double *a, const double *b, int64_t n) {
  Vector<double> lanes = {};
  int64_t l = 0;
  for (; l + width<double> <= n; l += width<double>)
    lanes += load(a + l) * load(b + l);
  if (l < n)
    lanes += load_part(a + l, n - l) * load_part(b + l, n - l);
  return sum<double>(lanes);
}
inline double dot(const float *a, const float *b, int64_t n) {
  constexpr int half = width<double>;
  Vector<double> lanes[4] = {};
  int64_t l = 0;
  for (; l + 4 * half <= n; l += 4 * half)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      lanes[i] += load_wide(a + l + i * half) * load_wide(b + l + i * half);
  for (; l + half <= n; l += half)
    lanes[0] += load_wide(a + l) * load_wide(b + l);
  double total = sum<double>((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]));
  for (; l < n; ++l)
    total += double(a[l]) * double(b[l]);
  return total;
}

template <class T> inline Vector<T> shuffle(Vector<T> a, Vector<T> b, Lanes<T> lanes) {
#if defined(__clang__)
  Vector<T> result;
  for (int l = 0; l < width<T>; ++l)
    result[l] = lanes[l] < width<T> ? a[lanes[l]] : b[lanes[l] - width<T>];
  return result;
#else
  return __builtin_shuffle(a, b, lanes);
#endif
}

// Transposes width x width elements held as rows. Each step exchanges the off-diagonal blocks of size s.
template <class T, int s = 1> inline void transpose(Vector<T> (&rows)[width<T>]) {
  constexpr int n = width<T>;
  if constexpr (s < n) {
    Lanes<T> upper, lower;
    for (int l = 0; l < n; ++l) {
      upper[l] = l & s ? n + l - s : l;
      lower[l] = l & s ? n + l : l + s;
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i)
      if (!(i & s)) {
        Vector<T> a = rows[i], b = rows[i + s];
        rows[i] = shuffle<T>(a, b, upper);
        rows[i + s] = shuffle<T>(a, b, lower);
      }
    transpose<T, 2 * s>(rows);
  }
}

} // namespace
} // namespace rl_kernels::cpu
