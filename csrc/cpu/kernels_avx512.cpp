// The kernels for AVX-512 (F, BW, VL, DQ); compiled with these enabled, empty elsewhere.
#include "kernels.h"

#if defined(__AVX512F__)
#include <immintrin.h>

#define RLK_VECTOR_BYTES 64
#define RLK_TILE_VECTORS 4

namespace rl_kernels::cpu {
namespace {
#include "vector.h"

#include "mix.h"

#include "gemm.h"

#include "linear.h"

#include "conv.h"

#include "kernels_table.h"
constexpr Kernels table = make_table("avx512");
} // namespace

const Kernels *kernels_avx512() {
  const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return runs ? &table : nullptr;
}
} // namespace rl_kernels::cpu
#else
const rl_kernels::cpu::Kernels *rl_kernels::cpu::kernels_avx512() { return nullptr; }
#endif
