// Vectors of RLK_VECTOR_BYTES bytes in the compiler's own vector types, and the types of elements.
#pragma once

#include "instruction_set.h"

#include <cstdint>

namespace rl_kernels::cpu {
namespace {

// Of a function that several callers share: neither inlined into one of them nor copied for its constants.
#if defined(__clang__)
#define RLK_ONE_BODY __attribute__((noinline))
#else
#define RLK_ONE_BODY __attribute__((noinline, noclone))
#endif

template <class T> struct VectorOf;
template <> struct VectorOf<float> {
  typedef float type __attribute__((vector_size(RLK_VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(RLK_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t lanes __attribute__((vector_size(RLK_VECTOR_BYTES)));
};
template <> struct VectorOf<double> {
  typedef double type __attribute__((vector_size(RLK_VECTOR_BYTES)));
  typedef double unaligned __attribute__((vector_size(RLK_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t lanes __attribute__((vector_size(RLK_VECTOR_BYTES)));
};
template <class T> using Vector = typename VectorOf<T>::type;
template <class T> using Lanes = typename VectorOf<T>::lanes; // a lane's number for each lane

template <class T> constexpr int width = RLK_VECTOR_BYTES / int(sizeof(T));

typedef uint32_t Words __attribute__((vector_size(RLK_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(RLK_VECTOR_BYTES / 2)));
typedef uint16_t UnalignedHalves __attribute__((vector_size(RLK_VECTOR_BYTES / 2), aligned(2), may_alias));

// The bits of a half-precision number; two types, so that overloads tell them apart.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type in which elements of type X are mixed, multiplied and summed.
template <class X> struct AccumulateOf {
  using type = float;
};
template <> struct AccumulateOf<double> {
  using type = double;
};
template <class X> using Accumulate = typename AccumulateOf<X>::type;

} // namespace
} // namespace rl_kernels::cpu
