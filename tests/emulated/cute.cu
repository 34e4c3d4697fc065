// Kernels built of CuTe's atoms: each computes C = A B^T, of A (M, K) and B (N, K), or their transposes where M- or
// N-major, in one CTA.
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>
#include <cutlass/arch/barrier.h>

using namespace cute;

// Copies a global tile to shared memory, both by their layouts.
template <class From, class To> __device__ void fill(From const &from, To &&to, int threads) {
  for (int i = threadIdx.x; i < size(from); i += threads)
    to(i) = from(i);
}

template <class From, class To> __device__ void write(From const &sums, To &&target) {
  CUTE_UNROLL
  for (int i = 0; i < size(sums); ++i)
    target(i) = sums(i);
}

// Warp matrix instructions behind ldmatrix and cp.async, in two stages.
template <class T, class Atom> __device__ void warp_product(T const *a, T const *b, float *c, int depth) {
  constexpr int M = 64, N = 64, K = 32;
  using Layout1 = decltype(composition(Swizzle<2, 3, 3>{}, Layout<Shape<Int<M>, Int<K>>, Stride<Int<K>, _1>>{}));
  __shared__ alignas(128) T sa[2][M * K], sb[2][N * K];
  auto ga = make_tensor(make_gmem_ptr(a), make_layout(make_shape(Int<M>{}, depth), make_stride(depth, _1{})));
  auto gb = make_tensor(make_gmem_ptr(b), make_layout(make_shape(Int<N>{}, depth), make_stride(depth, _1{})));
  auto gc = make_tensor(make_gmem_ptr(c), make_layout(Shape<Int<M>, Int<N>>{}, Stride<Int<N>, _1>{}));
  auto copier = make_tiled_copy(Copy_Atom<SM80_CP_ASYNC_CACHEGLOBAL<uint128_t>, T>{},
                                Layout<Shape<_32, _4>, Stride<_4, _1>>{}, Layout<Shape<_1, _8>>{});
  auto mma = make_tiled_mma(MMA_Atom<Atom>{}, Layout<Shape<_2, _2>>{}, Tile<_32, _32, _16>{});
  auto thread = mma.get_slice(threadIdx.x);
  auto mine = copier.get_slice(threadIdx.x);
  auto sums = thread.partition_fragment_C(gc);
  clear(sums);
  auto load = [&](int tile, int stage) {
    auto from_a = local_tile(ga, Shape<Int<M>, Int<K>>{}, make_coord(0, tile));
    auto from_b = local_tile(gb, Shape<Int<N>, Int<K>>{}, make_coord(0, tile));
    copy(copier, mine.partition_S(from_a), mine.partition_D(make_tensor(make_smem_ptr(sa[stage]), Layout1{})));
    copy(copier, mine.partition_S(from_b), mine.partition_D(make_tensor(make_smem_ptr(sb[stage]), Layout1{})));
    cp_async_fence();
  };
  load(0, 0);
  for (int tile = 0; tile < depth / K; ++tile) {
    if (tile + 1 < depth / K) {
      load(tile + 1, (tile + 1) % 2);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    auto ta = make_tensor(make_smem_ptr(sa[tile % 2]), Layout1{});
    auto tb = make_tensor(make_smem_ptr(sb[tile % 2]), Layout1{});
    auto copy_a = make_tiled_copy_A(Copy_Atom<SM75_U32x4_LDSM_N, T>{}, mma);
    auto copy_b = make_tiled_copy_B(Copy_Atom<SM75_U32x4_LDSM_N, T>{}, mma);
    auto fa = thread.partition_fragment_A(ta);
    auto fb = thread.partition_fragment_B(tb);
    copy(copy_a, copy_a.get_slice(threadIdx.x).partition_S(ta), copy_a.get_slice(threadIdx.x).retile_D(fa));
    copy(copy_b, copy_b.get_slice(threadIdx.x).partition_S(tb), copy_b.get_slice(threadIdx.x).retile_D(fb));
    gemm(mma, fa, fb, sums);
    __syncthreads();
  }
  write(sums, thread.partition_C(gc));
}

extern "C" __global__ void warp_bf16(bfloat16_t const *a, bfloat16_t const *b, float *c, int depth) {
  warp_product<bfloat16_t, SM80_16x8x16_F32BF16BF16F32_TN>(a, b, c, depth);
}
extern "C" __global__ void warp_f16(half_t const *a, half_t const *b, float *c, int depth) {
  warp_product<half_t, SM80_16x8x16_F32F16F16F32_TN>(a, b, c, depth);
}

// A warp group's matrix instruction, with A in shared memory or in registers.
template <class Atom, class LayoutA, class LayoutB, int M, int N, int K, bool A_IS_K_MAJOR, bool B_IS_K_MAJOR,
          bool REGISTERS, class T, class C>
__device__ void group_product(T const *a, T const *b, C *c) {
  extern __shared__ __align__(1024) char shared[];
  T *memory = reinterpret_cast<T *>(shared);
  auto layout_a = tile_to_shape(LayoutA{}, Shape<Int<M>, Int<K>>{});
  auto layout_b = tile_to_shape(LayoutB{}, Shape<Int<N>, Int<K>>{});
  auto sa = make_tensor(make_smem_ptr(memory), layout_a);
  auto sb = make_tensor(make_smem_ptr(memory + M * K), layout_b);
  using StrideA = Stride<Int<A_IS_K_MAJOR ? K : 1>, Int<A_IS_K_MAJOR ? 1 : M>>;
  using StrideB = Stride<Int<B_IS_K_MAJOR ? K : 1>, Int<B_IS_K_MAJOR ? 1 : N>>;
  auto ga = make_tensor(make_gmem_ptr(a), make_layout(Shape<Int<M>, Int<K>>{}, StrideA{}));
  auto gb = make_tensor(make_gmem_ptr(b), make_layout(Shape<Int<N>, Int<K>>{}, StrideB{}));
  auto gc = make_tensor(make_gmem_ptr(c), make_layout(Shape<Int<M>, Int<N>>{}, Stride<Int<N>, _1>{}));
  fill(ga, sa, 128);
  fill(gb, sb, 128);
  cutlass::arch::fence_view_async_shared();
  __syncthreads();
  auto mma = make_tiled_mma(Atom{});
  auto thread = mma.get_slice(threadIdx.x);
  auto fb = thread.make_fragment_B(thread.partition_B(sb));
  auto sums = thread.partition_fragment_C(gc);
  mma.accumulate_ = GMMA::ScaleOut::Zero;
  auto multiply = [&](auto &fa) {
    warpgroup_fence_operand(sums);
    warpgroup_arrive();
    CUTE_UNROLL
    for (int k = 0; k < size<2>(fb); ++k) {
      gemm(mma, fa(_, _, k), fb(_, _, k), sums);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
    warpgroup_wait<0>();
    warpgroup_fence_operand(sums);
  };
  if constexpr (REGISTERS) {
    auto part = thread.partition_A(sa);
    auto fa = thread.make_fragment_A(part);
    copy(part, fa);
    multiply(fa);
  } else {
    auto fa = thread.make_fragment_A(thread.partition_A(sa));
    multiply(fa);
  }
  write(sums, thread.partition_C(gc));
}

#define GROUP(NAME, T, C, ATOM, A, B, M, N, K, A_IS_K_MAJOR, B_IS_K_MAJOR, REGISTERS)                                  \
  extern "C" __global__ void NAME(T const *a, T const *b, C *c) {                                                      \
    group_product<ATOM, GMMA::Layout_##A##_Atom<T>, GMMA::Layout_##B##_Atom<T>, M, N, K, A_IS_K_MAJOR, B_IS_K_MAJOR,   \
                  REGISTERS>(a, b, c);                                                                                 \
  }
constexpr auto MAJOR_K = GMMA::Major::K, MAJOR_MN = GMMA::Major::MN;
using SS_K_K = SM90::GMMA::MMA_64x128x16_F32BF16BF16_SS<MAJOR_K, MAJOR_K>;
using SS_K_MN = SM90::GMMA::MMA_64x128x16_F32BF16BF16_SS<MAJOR_K, MAJOR_MN>;
using SS_MN_K = SM90::GMMA::MMA_64x128x16_F32BF16BF16_SS<MAJOR_MN, MAJOR_K>;
using SS_MN_MN = SM90::GMMA::MMA_64x128x16_F32BF16BF16_SS<MAJOR_MN, MAJOR_MN>;
using RS_K = SM90::GMMA::MMA_64x128x16_F32BF16BF16_RS<MAJOR_K, MAJOR_K>;
using RS_MN = SM90::GMMA::MMA_64x128x16_F32BF16BF16_RS<MAJOR_K, MAJOR_MN>;
using TF32_SS = SM90::GMMA::MMA_64x64x8_F32TF32TF32_SS_TN<>;
using TF32_RS = SM90::GMMA::MMA_64x64x8_F32TF32TF32_RS_TN<>;
using WIDE_8 = SM90::GMMA::MMA_64x8x16_F32F16F16_SS<MAJOR_K, MAJOR_MN>;
using WIDE_256 = SM90::GMMA::MMA_64x256x16_F32F16F16_SS<MAJOR_K, MAJOR_MN>;
using HALF = SM90::GMMA::MMA_64x64x16_F16F16F16_SS<MAJOR_K, MAJOR_K>;

#define BF16(NAME, ATOM, A, B, M, ...) GROUP(NAME, bfloat16_t, float, ATOM, A, B, M, 128, 64, __VA_ARGS__)
#define SWIZZLES(SPAN)                                                                                                 \
  BF16(ss_k_k_##SPAN, SS_K_K, K_##SPAN, K_##SPAN, 64, true, true, false)                                               \
  BF16(ss_mn_mn_##SPAN, SS_MN_MN, MN_##SPAN, MN_##SPAN, 64, false, false, false)                                       \
  BF16(rs_k_mn_##SPAN, RS_MN, K_##SPAN, MN_##SPAN, 64, true, false, true)                                              \
  GROUP(tf32_ss_##SPAN, tfloat32_t, float, TF32_SS, K_##SPAN, K_##SPAN, 64, 64, 32, true, true, false)
SWIZZLES(INTER)
SWIZZLES(SW32)
SWIZZLES(SW64)
SWIZZLES(SW128)
BF16(ss_mn_k_SW128, SS_MN_K, MN_SW128, K_SW64, 128, false, true, false)
BF16(ss_k_mn_SW128, SS_K_MN, K_SW128, MN_SW32, 128, true, false, false)
BF16(rs_k_k_SW128, RS_K, K_SW128, K_SW128, 64, true, true, true)
GROUP(tf32_rs_SW128, tfloat32_t, float, TF32_RS, K_SW128, K_SW64, 64, 64, 32, true, true, true)
GROUP(wide_8, half_t, float, WIDE_8, K_SW64, MN_INTER, 64, 8, 32, true, false, false)
GROUP(wide_256, half_t, float, WIDE_256, K_SW64, MN_INTER, 64, 256, 32, true, false, false)
GROUP(half_sums, half_t, half_t, HALF, K_SW64, K_SW128, 64, 64, 64, true, true, false)

// A warp that copies tiles of A and B with TMA, and a warp group that multiplies them, which holds on to a stage until
// the next product has begun; the result is stored with TMA.
constexpr int STAGES = 2, TILE = 64;

extern "C" __global__ void __launch_bounds__(160)
    piped(const __grid_constant__ TmaDescriptor a, const __grid_constant__ TmaDescriptor b,
          const __grid_constant__ TmaDescriptor c, int tiles) {
  using Full = cutlass::arch::ClusterTransactionBarrier;
  using Empty = cutlass::arch::ClusterBarrier;
  extern __shared__ __align__(1024) char shared[];
  __shared__ uint64_t full[STAGES], empty[STAGES];
  auto memory = reinterpret_cast<bfloat16_t *>(shared);
  constexpr int SIZE = TILE * TILE;
  auto stage_a = [&](int stage) { return memory + stage * 2 * SIZE; };
  auto stage_b = [&](int stage) { return memory + stage * 2 * SIZE + SIZE; };
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      Full::init(&full[stage], 1);
      Empty::init(&empty[stage], 4);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= 128) {
    if (threadIdx.x == 128) {
      for (int tile = 0; tile < tiles; ++tile) {
        int stage = tile % STAGES, round = tile / STAGES;
        Empty::wait(&empty[stage], (round & 1) ^ 1);
        Full::arrive_and_expect_tx(&full[stage], 2 * SIZE * sizeof(bfloat16_t));
        SM90_TMA_LOAD_2D::copy(&a, &full[stage], 0, stage_a(stage), tile * TILE, int(blockIdx.x) * TILE);
        SM90_TMA_LOAD_2D::copy(&b, &full[stage], 0, stage_b(stage), tile * TILE, int(blockIdx.y) * TILE);
      }
    }
    return;
  }
  using Atom = SM90::GMMA::MMA_64x64x16_F32BF16BF16_SS<GMMA::Major::K, GMMA::Major::K>;
  auto layout = tile_to_shape(GMMA::Layout_K_SW128_Atom<bfloat16_t>{}, Shape<Int<TILE>, Int<TILE>>{});
  auto mma = make_tiled_mma(Atom{});
  auto thread = mma.get_slice(threadIdx.x);
  auto sums = partition_fragment_C(mma, Shape<Int<TILE>, Int<TILE>>{});
  clear(sums);
  for (int tile = 0; tile < tiles; ++tile) {
    int stage = tile % STAGES, round = tile / STAGES;
    Full::wait(&full[stage], round & 1);
    auto fa = thread.make_fragment_A(thread.partition_A(make_tensor(make_smem_ptr(stage_a(stage)), layout)));
    auto fb = thread.make_fragment_B(thread.partition_B(make_tensor(make_smem_ptr(stage_b(stage)), layout)));
    warpgroup_fence_operand(sums);
    warpgroup_arrive();
    gemm(mma, fa, fb, sums);
    warpgroup_commit_batch();
    warpgroup_wait<1>();
    warpgroup_fence_operand(sums);
    if (tile > 0 && threadIdx.x % 32 == 0)
      Empty::arrive(&empty[(tile - 1) % STAGES]);
  }
  warpgroup_wait<0>();
  warpgroup_fence_operand(sums);
  auto out = make_tensor(make_smem_ptr(memory + STAGES * 2 * SIZE), layout);
  auto part = thread.partition_C(out);
  CUTE_UNROLL
  for (int i = 0; i < size(sums); ++i)
    part(i) = bfloat16_t(sums(i));
  cutlass::arch::fence_view_async_shared();
  asm volatile("bar.sync 1, 128;");
  if (threadIdx.x == 0) {
    SM90_TMA_STORE_2D::copy(&c, memory + STAGES * 2 * SIZE, int(blockIdx.y) * TILE, int(blockIdx.x) * TILE);
    tma_store_arrive();
    tma_store_wait<0>();
  }
}
