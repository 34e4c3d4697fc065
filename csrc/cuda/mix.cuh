// The recipe: the one place where W = sum_j c_j * W_j is evaluated, a register of a fragment at a time.
//
// A register holds 4 bytes of a row or column: two elements of 16 bits, or one float, which is multiplied as tf32.
// Terms are added in source order in float32, and rounded once.
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace rl_kernels::cuda {

constexpr int CHUNK_BYTES = 16; // what is copied at a time
constexpr int STEP_BYTES = 64;  // of a row along the sum, that a stage of the pipelines holds

// How many elements of a type there are in what instructions take.
template <class T> struct Element {
  static constexpr int BYTES = sizeof(T);
  static constexpr int IN_REGISTER = 4 / BYTES;
  static constexpr int IN_CHUNK = CHUNK_BYTES / BYTES;
  static constexpr int MMA_DEPTH = 32 / BYTES;          // of the sum that one matrix instruction takes
  static constexpr int TILE_DEPTH = STEP_BYTES / BYTES; // of the sum that a stage of the pipelines holds
};

// The values of a register, .x the lower; a float has no second.
template <class T> __device__ float2 unpack(uint32_t bits);
template <> __device__ inline float2 unpack<__half>(uint32_t bits) {
  return __half22float2(*reinterpret_cast<__half2 *>(&bits));
}
template <> __device__ inline float2 unpack<__nv_bfloat16>(uint32_t bits) { return ptx::widened_bf16x2(bits); }
template <> __device__ inline float2 unpack<float>(uint32_t bits) { return {__uint_as_float(bits), 0.0f}; }

// The register that holds two values, rounded.
template <class T> __device__ uint32_t pack(float2 values);
template <> __device__ inline uint32_t pack<__half>(float2 values) {
  __half2 packed = __float22half2_rn(values);
  return *reinterpret_cast<uint32_t *>(&packed);
}
template <> __device__ inline uint32_t pack<__nv_bfloat16>(float2 values) {
  __nv_bfloat162 packed = __float22bfloat162_rn(values);
  return *reinterpret_cast<uint32_t *>(&packed);
}
template <> __device__ inline uint32_t pack<float>(float2 values) { return __float_as_uint(values.x); }

// A register as the matrix instructions take it: a float is rounded, not cut off, to tf32.
template <class T> __device__ inline uint32_t operand(uint32_t bits) { return bits; }
template <> __device__ inline uint32_t operand<float>(uint32_t bits) {
  return ptx::cvt_rna_tf32(__uint_as_float(bits));
}

// One element as a float, and a float as an element.
template <class T> __device__ inline float widened(T value) { return static_cast<float>(value); }
template <class T> __device__ T rounded(float value);
template <> __device__ inline __half rounded<__half>(float value) { return __float2half_rn(value); }
template <> __device__ inline __nv_bfloat16 rounded<__nv_bfloat16>(float value) { return __float2bfloat16_rn(value); }
template <> __device__ inline float rounded<float>(float value) { return value; }

// The sum so far plus one source's register, times the coefficients of its two elements.
template <class T> __device__ inline float2 add_source(float2 sum, uint32_t source, float2 factors) {
  float2 values = unpack<T>(source);
  return {fmaf(values.x, factors.x, sum.x), sizeof(T) == 2 ? fmaf(values.y, factors.y, sum.y) : 0.0f};
}

// The first source's register times its coefficients, which has nothing to be added to: -0 stays.
template <class T> __device__ inline float2 first_source(uint32_t source, float2 factors) {
  float2 values = unpack<T>(source);
  return {values.x * factors.x, sizeof(T) == 2 ? values.y * factors.y : 0.0f};
}

// That of source j for an output channel.
__device__ inline float coefficient(const Recipe &recipe, int j, int64_t channel) {
  return reinterpret_cast<const float *>(
      recipe.coefficients)[j * recipe.source_stride + channel * recipe.channel_stride];
}

// The bias of a channel, rounded as the weight is.
template <class T> __device__ inline float mixed_bias(const Product &p, int64_t channel) {
  float sum = 0.0f;
  for (int j = 0; j < p.recipe.sources; ++j) {
    float factor = coefficient(p.recipe, j, channel);
    float term = widened(reinterpret_cast<const T *>(p.biases[j])[channel * p.bias_strides[j]]);
    sum = j == 0 ? term * factor : fmaf(term, factor, sum);
  }
  return widened(rounded<T>(sum));
}

// IN_CHUNK elements `stride` apart, of which the first `inside` are there and the others are 0.
template <class T>
__device__ inline void load_chunk(uint32_t (&to)[4], const T *from, int64_t stride, int inside, bool vector) {
  using E = Element<T>;
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  if (vector && inside >= E::IN_CHUNK) {
    ptx::ld_global_nc(to, from);
    return;
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    to[r] = 0;
#pragma unroll
    for (int h = 0; h < E::IN_REGISTER; ++h) {
      const int e = r * E::IN_REGISTER + h;
      if (e < inside)
        to[r] |= uint32_t(__ldg(reinterpret_cast<const Bits *>(from + e * stride))) << 16 * h;
    }
  }
}

} // namespace rl_kernels::cuda
