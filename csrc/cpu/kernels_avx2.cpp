// The kernels for AVX2, FMA and F16C; compiled with these enabled, empty elsewhere.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

#define RLK_VECTOR_BYTES 32
#define RLK_TILE_VECTORS 2

namespace rl_kernels::cpu {
namespace {
#include "vector.h"

#include "mix.h"

#include "gemm.h"

#include "linear.h"

#include "conv.h"

#include "kernels_table.h"
constexpr Kernels table = make_table("avx2");
} // namespace

const Kernels *kernels_avx2() {
  const bool runs = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return runs ? &table : nullptr;
}
} // namespace rl_kernels::cpu
#else
const rl_kernels::cpu::Kernels *rl_kernels::cpu::kernels_avx2() { return nullptr; }
#endif
