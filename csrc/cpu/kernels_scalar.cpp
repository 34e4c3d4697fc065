// The kernels for any machine: nothing beyond what the compiler does for its baseline (SSE2, NEON or plain scalars).
#include "kernels.h"

#define RLK_VECTOR_BYTES 16
#if defined(__aarch64__) // 32 vector registers
#define RLK_TILE_VECTORS 4
#else
#define RLK_TILE_VECTORS 2
#endif

namespace rl_kernels::cpu {
namespace {
#include "vector.h"

#include "mix.h"

#include "gemm.h"

#include "linear.h"

#include "conv.h"

#include "kernels_table.h"
constexpr Kernels table = make_table("scalar");
} // namespace

const Kernels *kernels_scalar() { return &table; }
} // namespace rl_kernels::cpu
