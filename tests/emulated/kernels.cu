// Kernels whose right results are known, for calibration.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <mma.h>

using namespace nvcuda;

extern "C" __global__ void add(const float *a, const float *b, float *c, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n)
    c[i] = a[i] + b[i];
}

extern "C" __global__ void transpose(const float *in, float *out, int rows, int columns) {
  __shared__ float tile[32][33];
  int x = blockIdx.x * 32 + threadIdx.x, y = blockIdx.y * 32 + threadIdx.y;
  for (int j = 0; j < 32; j += 8)
    if (x < columns && y + j < rows)
      tile[threadIdx.y + j][threadIdx.x] = in[(y + j) * columns + x];
  __syncthreads();
  x = blockIdx.y * 32 + threadIdx.x;
  y = blockIdx.x * 32 + threadIdx.y;
  for (int j = 0; j < 32; j += 8)
    if (x < rows && y + j < columns)
      out[(y + j) * rows + x] = tile[threadIdx.x][threadIdx.y + j];
}

extern "C" __global__ void total(const float *in, float *out, int n) {
  float sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    sum += in[i];
  for (int step = 16; step; step /= 2)
    sum += __shfl_xor_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 0)
    atomicAdd(out, sum);
}

// Each thread's own array, indexed by what is not known when this is compiled; a table in constant memory.
__constant__ int primes[8] = {2, 3, 5, 7, 11, 13, 17, 19};
extern "C" __global__ void histogram(const int *in, int *out, int n) {
  int counts[8] = {};
  for (int i = threadIdx.x; i < n; i += blockDim.x)
    counts[in[i] & 7] += primes[in[i] & 7];
  for (int k = 0; k < 8; k++)
    atomicAdd(&out[k], counts[k]);
}

struct Numbers {
  int scale[3];
  short shift;
  double factor;
};
extern "C" __global__ void structure(Numbers numbers, float *out) {
  int i = threadIdx.x;
  out[i] = float(numbers.scale[i % 3] * i / 7 % 5 + numbers.shift + numbers.factor * i);
}

extern "C" __global__ void half_math(const __half2 *a, const __nv_bfloat162 *b, float2 *out) {
  int i = threadIdx.x;
  __half2 x = __hfma2(a[i], a[i], __float2half2_rn(0.5f));
  float2 left = __half22float2(x), right = __bfloat1622float2(__hmul2(b[i], b[i]));
  out[i] = make_float2(left.x + right.x, expf(left.y) / (1.0f + sqrtf(fabsf(right.y))));
}

template <class T> __device__ void wmma_tile(const T *a, const T *b, float *c) {
  __shared__ T sa[256], sb[256];
  for (int i = threadIdx.x; i < 256; i += 32) {
    sa[i] = a[i];
    sb[i] = b[i];
  }
  __syncthreads();
  wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> fa;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major> fb;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> fc;
  wmma::fill_fragment(fc, 0.25f);
  wmma::load_matrix_sync(fa, sa, 16);
  wmma::load_matrix_sync(fb, sb, 16);
  wmma::mma_sync(fc, fa, fb, fc);
  wmma::store_matrix_sync(c, fc, 16, wmma::mem_row_major);
}
extern "C" __global__ void wmma_bf16(const __nv_bfloat16 *a, const __nv_bfloat16 *b, float *c) { wmma_tile(a, b, c); }
extern "C" __global__ void wmma_f16(const __half *a, const __half *b, float *c) { wmma_tile(a, b, c); }

// Sums of windows of 128 from tiles that are copied two ahead; out[i] = in[i] + in[i + 1] within a tile.
extern "C" __global__ void pipeline(const float *in, float *out, int tiles) {
  __shared__ __align__(16) float stage[3][128];
  auto copy = [&](int tile) {
    if (threadIdx.x < 32 && tile < tiles)
      __pipeline_memcpy_async(&stage[tile % 3][threadIdx.x * 4], in + tile * 128 + threadIdx.x * 4, 16);
    __pipeline_commit();
  };
  copy(0);
  copy(1);
  for (int tile = 0; tile < tiles; tile++) {
    copy(tile + 2);
    __pipeline_wait_prior(2);
    __syncthreads();
    const float *here = stage[tile % 3];
    out[tile * 128 + threadIdx.x] = here[threadIdx.x] + here[(threadIdx.x + 1) % 128];
    __syncthreads();
  }
}
