// PTX instructions, one a function, under their own names; the numbers are sections of the PTX ISA 9.0.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace rl_kernels::cuda::ptx {

// The address that instructions on shared memory take.
__device__ inline uint32_t shared_address(const void *pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 9.7.9.25.3: 16 bytes to shared memory, of which the first `bytes` are read and the others are 0; past L1,
// and into L2 with the rest of their 128.
__device__ inline void cp_async(uint32_t to, const void *from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// The same to OFFSET bytes behind `to`.
template <int OFFSET> __device__ inline void cp_async(uint32_t to, const void *from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0 + %3], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes),
               "n"(OFFSET)
               : "memory");
}

// All 16 bytes, to OFFSET bytes behind `to`.
template <int OFFSET> __device__ inline void cp_async(uint32_t to, const void *from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0 + %2], [%1], 16;" ::"r"(to), "l"(from), "n"(OFFSET) : "memory");
}

__device__ inline void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most N of this thread's latest groups are under way.
template <int N> __device__ inline void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// 9.7.14.5.15: four 8x8 matrices of 16-bit elements, OFFSET bytes behind `from`; lane l names row l % 8 of matrix l
// / 8.
template <int OFFSET> __device__ inline void ldmatrix(uint32_t (&to)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from), "n"(OFFSET)
               : "memory");
}

// The same, each matrix transposed on the way.
template <int OFFSET> __device__ inline void ldmatrix_trans(uint32_t (&to)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from), "n"(OFFSET)
               : "memory");
}

template <int OFFSET> __device__ inline uint32_t ld_shared(uint32_t from) {
  uint32_t to;
  asm volatile("ld.shared.b32 %0, [%1 + %2];" : "=r"(to) : "r"(from), "n"(OFFSET) : "memory");
  return to;
}

// 9.7.14.5: d += a b, of 16x16 and 16x8 elements, or 16x8 and 8x8 of tf32; a and b in row.col order.
template <class T> __device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <> __device__ inline void mma<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <> __device__ inline void mma<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <> __device__ inline void mma<float>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 9.7.8: two bfloat16 as floats, an instruction each; in C++ a cast between registers would come to each.
__device__ inline float2 widened_bf16x2(uint32_t bits) {
  float2 to;
  asm("shl.b32 %0, %1, 16;" : "=f"(to.x) : "r"(bits));
  asm("and.b32 %0, %1, 0xffff0000;" : "=f"(to.y) : "r"(bits));
  return to;
}

// 9.7.9.21: to the nearest tf32, ties away from 0; its bits are a float's whose low 13 are 0.
__device__ inline uint32_t cvt_rna_tf32(float value) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return rounded;
}

// 9.7.9.8: 16 bytes that no kernel writes meanwhile, and that are read once: past L1.
__device__ inline void ld_global_once(uint32_t (&to)[4], const void *from) {
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
      : "l"(from));
}

// The same of bytes that other warps read too.
__device__ inline void ld_global_nc(uint32_t (&to)[4], const void *from) {
  asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from));
}

} // namespace rl_kernels::cuda::ptx
