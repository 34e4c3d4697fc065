// The kernels of one instruction set, for every pair of types, as a table of function pointers. Compiled once for each
// set (instruction_set.h).
#include "conv.h"
#include "conv_wgrad.h"
#include "instruction_set.h"
#include "linear.h"
#include "problem.h"
#include "vector_types.h"

#include <cstdint>
#if defined(RLK_AVX2) && !defined(RLK_AVX512)
#include <cpuid.h>
#endif

namespace rl_kernels::cpu {
namespace {

// Calls kernel(Type of the sources, type of the activation) with the element types of a problem.
template <class Problem, class Kernel> void with_types(const Problem &problem, const Kernel &kernel) {
  const Type sources = problem.recipe.type;
  switch (problem.type) {
  case Type::float32:
    return kernel(float{}, float{});
  case Type::float64:
    return kernel(double{}, double{});
  case Type::bfloat16:
    return sources == Type::float32 ? kernel(float{}, BFloat16{}) : kernel(BFloat16{}, BFloat16{});
  case Type::float16:
    return sources == Type::float32 ? kernel(float{}, Float16{}) : kernel(Float16{}, Float16{});
  }
}

#define RLK_ENTRY(name, Problem)                                                                                       \
  void run_##name(const Problem &problem, const Team &team) {                                                          \
    with_types(problem,                                                                                                \
               [&](auto source, auto activation) { name<decltype(source), decltype(activation)>(problem, team); });    \
  }
RLK_ENTRY(linear_forward, Linear)
RLK_ENTRY(linear_dgrad, Linear)
RLK_ENTRY(linear_wgrad, Linear)
RLK_ENTRY(conv_forward, Conv)
RLK_ENTRY(conv_dgrad, Conv)
RLK_ENTRY(conv_wgrad, Conv)
#undef RLK_ENTRY

bool run_linear_backward(const Linear &problem, const Team &team) {
  bool done = false;
  with_types(problem, [&](auto source, auto activation) {
    done = linear_backward<decltype(source), decltype(activation)>(problem, team);
  });
  return done;
}
void run_conv_mix(const Conv &problem, void *bias, const Team &team) {
  with_types(problem, [&](auto source, auto activation) {
    conv_mix<decltype(source), decltype(activation)>(problem, bias, team);
  });
}
int64_t run_conv_partials(const Conv &problem, int threads) {
  return problem.type == Type::float64 ? conv_partials<double>(problem, threads)
                                       : conv_partials<float>(problem, threads);
}
bool run_conv_fits(const Conv &problem) {
  return problem.type == Type::float64 ? conv_fits<double>(problem) : conv_fits<float>(problem);
}

#define RLK_STRING_OF(name) #name
#define RLK_STRING(name) RLK_STRING_OF(name)
constexpr Kernels table = {RLK_STRING(RLK_NAME), run_linear_forward, run_linear_dgrad, run_linear_wgrad,
                           run_linear_backward,  run_conv_forward,   run_conv_dgrad,   run_conv_wgrad,
                           run_conv_mix,         run_conv_partials,  run_conv_fits};

// Whether this machine can run them.
bool runs() {
#if defined(RLK_AVX512)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#elif defined(RLK_AVX2)
  // clang before 18 does not know the name "f16c".
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}

} // namespace

#define RLK_JOIN_OF(a, b) a##b
#define RLK_JOIN(a, b) RLK_JOIN_OF(a, b)
const Kernels *RLK_JOIN(kernels_, RLK_NAME)() { return runs() ? &table : nullptr; }

} // namespace rl_kernels::cpu
