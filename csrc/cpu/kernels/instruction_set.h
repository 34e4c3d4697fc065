// The instruction set that one compilation of the kernels is for: its name, and how wide its vectors and tiles are.
//
// table.cpp is compiled once for each set (building/cpu.py), on the same headers. Everything in them therefore lies in
// an unnamed namespace, inline functions too, and nothing comes from the C++ library: under one external name the
// linker would keep one copy of a function for all sets, maybe the one whose instructions this CPU lacks.
#pragma once

#if defined(RLK_AVX512)
#define RLK_NAME avx512
#define RLK_VECTOR_BYTES 64
#define RLK_TILE_VECTORS 4
#elif defined(RLK_AVX2)
#define RLK_NAME avx2
#define RLK_VECTOR_BYTES 32
#define RLK_TILE_VECTORS 2
#else // what the compiler makes of its baseline: SSE2, NEON or plain scalars
#define RLK_NAME scalar
#define RLK_VECTOR_BYTES 16
#if defined(__aarch64__) // 32 vector registers
#define RLK_TILE_VECTORS 4
#else
#define RLK_TILE_VECTORS 2
#endif
#endif
