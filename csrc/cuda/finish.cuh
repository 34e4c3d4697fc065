// What is left of a wgrad when the sources' gradients are written: dy summed over its pixels, and the gradients of
// coefficients and biases. Everything is added in float64 in a fixed order.
#pragma once

#include "addressing.cuh"
#include "finish_params.h"
#include "mix.cuh"
#include "registry.h"

namespace rl_kernels::cuda {

// A warp goes over every eighth pixel of a split, 16 bytes of channels a lane.
template <class T> class ChannelSumsKernel {
  using E = Element<T>;
  static constexpr int WARPS = 8, COLUMNS = 32 * E::IN_CHUNK;
  static constexpr int AT_ONCE = 16; // pixels that are added in float32 before float64 takes over

public:
  using Params = ChannelSums;
  static constexpr int MAX_THREADS = 32 * WARPS;
  static constexpr LaunchFacts FACTS = {
      .threads = MAX_THREADS, .columns = COLUMNS, .kept_bytes = WARPS * COLUMNS * int(sizeof(double))};

  static __device__ void run(const ChannelSums &p) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first = blockIdx.x * COLUMNS, channel = first + lane * E::IN_CHUNK;
    const int inside = max(0, min(E::IN_CHUNK, p.channels - channel));
    const int begin = blockIdx.y * p.rows, end = min(p.pixels, begin + p.rows);
    double total[E::IN_CHUNK] = {};
    for (int pixel = begin + warp; pixel < end; pixel += WARPS * AT_ONCE) {
      float sum[E::IN_CHUNK] = {};
#pragma unroll 4
      for (int i = 0; i < AT_ONCE; ++i)
        add(p, sum, pixel + i * WARPS, end, channel, inside);
#pragma unroll
      for (int e = 0; e < E::IN_CHUNK; ++e)
        total[e] += double(sum[e]);
    }
    __shared__ double warps[WARPS][COLUMNS];
#pragma unroll
    for (int e = 0; e < E::IN_CHUNK; ++e)
      warps[warp][lane * E::IN_CHUNK + e] = total[e];
    __syncthreads();
    for (int column = threadIdx.x; column < COLUMNS && first + column < p.channels; column += MAX_THREADS) {
      double sum = 0.0;
      for (int other = 0; other < WARPS; ++other)
        sum += warps[other][column];
      reinterpret_cast<double *>(p.sums)[int64_t(blockIdx.y) * p.channels + first + column] = sum;
    }
  }

private:
  __device__ static void add(const ChannelSums &p, float (&sum)[E::IN_CHUNK], int pixel, int end, int channel,
                             int inside) {
    if (pixel >= end || inside == 0)
      return;
    const T *from = reinterpret_cast<const T *>(p.dy) + Pixels::out_offset(p.correlation, p.dy_strides, pixel) +
                    channel * p.dy_strides[1];
    uint32_t registers[4];
    load_chunk<T>(registers, from, p.dy_strides[1], inside, p.vector_dy);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float2 values = unpack<T>(registers[r]);
      sum[r * E::IN_REGISTER] += values.x;
      if constexpr (E::IN_REGISTER == 2)
        sum[r * 2 + 1] += values.y;
    }
  }
};

// A block for each scalar coefficient, then a thread for each channel.
template <class T> class FinishKernel {
public:
  using Params = Finish;
  static constexpr int MAX_THREADS = 512;
  static constexpr LaunchFacts FACTS = {.threads = MAX_THREADS, .kept_bytes = MAX_THREADS * int(sizeof(double))};

  static __device__ void run(const Finish &p) {
    if (int(blockIdx.x) < p.totals)
      finish_scalar(p, blockIdx.x);
    else
      finish_channel(p, (int(blockIdx.x) - p.totals) * MAX_THREADS + int(threadIdx.x));
  }

private:
  __device__ static double sum_of(const Finish &p, int channel) {
    double sum = 0.0;
    if (p.sums != 0)
      for (int split = 0; split < p.splits; ++split)
        sum += reinterpret_cast<const double *>(p.sums)[int64_t(split) * p.channels + channel];
    return sum;
  }

  __device__ static double bias(const Finish &p, int j, int channel) {
    return p.biases[j] == 0 ? 0.0
                            : double(widened(reinterpret_cast<const T *>(p.biases[j])[channel * p.bias_strides[j]]));
  }

  __device__ static void finish_scalar(const Finish &p, int j) {
    double total = 0.0;
    if (p.dots != 0)
      for (int part = threadIdx.x; part < p.parts; part += MAX_THREADS)
        total += double(reinterpret_cast<const float *>(p.dots)[int64_t(j) * p.parts + part]);
    if (p.biases[j] != 0)
      for (int channel = threadIdx.x; channel < p.channels; channel += MAX_THREADS)
        total += sum_of(p, channel) * bias(p, j, channel);
    __shared__ double totals[MAX_THREADS];
    totals[threadIdx.x] = total;
#pragma unroll 1
    for (int half = MAX_THREADS / 2; half > 0; half /= 2) {
      __syncthreads(); // what is added was written
      if (int(threadIdx.x) < half)
        totals[threadIdx.x] += totals[threadIdx.x + half];
    }
    if (threadIdx.x == 0)
      reinterpret_cast<float *>(p.coefficient_gradients)[j] = float(totals[0]);
  }

  __device__ static void finish_channel(const Finish &p, int channel) {
    if (channel >= p.channels)
      return;
    const double sum = sum_of(p, channel);
    for (int j = 0; j < p.sources; ++j) {
      if (p.bias_gradients[j] != 0) {
        const float factor =
            reinterpret_cast<const float *>(p.coefficients)[j * p.source_stride + channel * p.channel_stride];
        reinterpret_cast<T *>(p.bias_gradients[j])[channel] = rounded<T>(float(sum * double(factor)));
      }
      if (p.coefficient_gradients != 0 && p.per_channel) {
        double total = 0.0;
        if (p.dots != 0)
          for (int part = 0; part < p.parts; ++part)
            total +=
                double(reinterpret_cast<const float *>(p.dots)[(int64_t(j) * p.parts + part) * p.channels + channel]);
        if (p.biases[j] != 0)
          total += sum * bias(p, j, channel);
        reinterpret_cast<float *>(p.coefficient_gradients)[int64_t(j) * p.channels + channel] = float(total);
      }
    }
  }
};

} // namespace rl_kernels::cuda
