// What the compiler does not make of plain vector code: float16 conversions by F16C, half a vector of floats as
// doubles, and the first n elements of a vector by AVX-512's masks. Empty where these instructions are not targeted.
#pragma once

#include "vector_types.h"

#include <cstdint>

#if RLK_VECTOR_BYTES > 16
#include <immintrin.h>

namespace rl_kernels::cpu {
namespace {

inline Vector<float> load(const Float16 *p) {
#if RLK_VECTOR_BYTES == 64
  return (Vector<float>)_mm512_maskz_cvtph_ps(-1, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
#else
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
#endif
}
inline void store(Float16 *p, Vector<float> v) {
#if RLK_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_maskz_cvtps_ph(-1, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#else
  _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#endif
}

inline Vector<double> load_wide(const float *p) {
#if RLK_VECTOR_BYTES == 64
  return (Vector<double>)_mm512_maskz_cvtps_pd(-1, _mm256_loadu_ps(p));
#else
  return (Vector<double>)_mm256_cvtps_pd(_mm_loadu_ps(p));
#endif
}

#if RLK_VECTOR_BYTES == 64
inline Vector<float> load_part(const float *p, int64_t n) {
  return (Vector<float>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
}
inline Vector<double> load_part(const double *p, int64_t n) {
  return (Vector<double>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
}
inline void store_part(float *p, Vector<float> v, int64_t n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
}
inline void store_part(double *p, Vector<double> v, int64_t n) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
}
#endif

} // namespace
} // namespace rl_kernels::cpu
#endif
