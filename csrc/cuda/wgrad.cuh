// G (out, taps * in) = dy^T x, a tile at a time, which becomes every source's gradient and its share of the
// coefficients' before the next: G never exists in memory, but for float32 shares of it where its sum is split.
// Linear layers and convolutions.
#pragma once

#include "tile.cuh"

namespace rl_kernels {

// Makes a tile of G into gradients, 16 bytes of a row a thread.
template <class T, class Tile, class Place> class Finish {
  using E = Element<T>;

public:
  static constexpr int CHUNKS = Tile::COLUMNS / E::IN_CHUNK; // of a row, in as many neighbouring lanes
  static constexpr int ROWS_AT_ONCE = Tile::THREADS / CHUNKS;
  static_assert(CHUNKS <= 32 && 32 % CHUNKS == 0, "the lanes of a row belong to one warp");

  // part: the tile's, of `parts` whose shares of a dot product are summed.
  __device__ Finish(const Wgrad &p, int group, int first_row, int first_column, int part, int parts)
      : p_(p), group_(group), first_row_(first_row), part_(part), parts_(parts) {
    column_ = first_column + int(threadIdx.x) % CHUNKS * E::IN_CHUNK;
    inside_ = min(p.channels * taps_of(p.geometry) - column_, E::IN_CHUNK);
  }

  // g: the thread's chunk of a row of the tile. All lanes of a warp have to come here together.
  __device__ void chunk(int row, const float (&g)[E::IN_CHUNK]) {
    const int feature = first_row_ + row;
    const int64_t channel = int64_t(group_) * p_.features + feature;
    const bool exists = feature < p_.features;
#pragma unroll
    for (int j = 0; j < MOST_SOURCES; ++j) { // unrolled, for dots_ to stay in registers
      if (j >= p_.recipe.sources)
        break;
      if (p_.gradients[j] != 0 && exists && inside_ > 0) {
        const float factor = coefficient(p_.recipe, j, channel);
        if (p_.wide >> j & 1)
          store<float>(j, feature, factor, g);
        else
          store<T>(j, feature, factor, g);
      }
      if (p_.dots != 0) {
        float dot = exists && inside_ > 0 ? dot_with_source(j, feature, g) : 0.0f;
        if (!p_.per_channel) {
          dots_[j] += dot;
          continue;
        }
#pragma unroll
        for (int step = CHUNKS / 2; step > 0; step /= 2)
          dot += __shfl_xor_sync(~0u, dot, step);
        if (exists && threadIdx.x % CHUNKS == 0)
          reinterpret_cast<float *>(p_.dots)[(int64_t(j) * parts_ + part_) * p_.groups * p_.features + channel] = dot;
      }
    }
  }

  // After the last chunk, by all threads.
  __device__ void end() {
    if (p_.dots == 0 || p_.per_channel)
      return;
    __shared__ float warps[MOST_SOURCES][Tile::THREADS / 32];
#pragma unroll
    for (int j = 0; j < MOST_SOURCES; ++j) {
      float dot = dots_[j];
#pragma unroll
      for (int step = 16; step > 0; step /= 2)
        dot += __shfl_xor_sync(~0u, dot, step);
      if (threadIdx.x % 32 == 0)
        warps[j][threadIdx.x / 32] = dot;
    }
    __syncthreads();
    if (threadIdx.x < p_.recipe.sources) {
      float dot = 0.0f;
      for (int warp = 0; warp < Tile::THREADS / 32; ++warp)
        dot += warps[threadIdx.x][warp];
      reinterpret_cast<float *>(p_.dots)[int64_t(threadIdx.x) * parts_ + part_] = dot;
    }
  }

private:
  // Of type To: the sources', or float32 under sources of 16 bits.
  template <class To> __device__ void store(int j, int feature, float factor, const float (&g)[E::IN_CHUNK]) const {
    using R = Element<To>;
    const int64_t *strides = p_.gradient_strides[j];
    To *row = reinterpret_cast<To *>(p_.gradients[j]) + group_ * p_.gradient_group_strides[j] + feature * strides[0];
    const bool added = p_.added >> j & 1;
    if ((p_.vector_gradients >> j & 1) && inside_ == E::IN_CHUNK) {
      To *to = row + Place::weight_offset(p_.geometry, strides, column_);
#pragma unroll
      for (int e = 0; e < E::IN_CHUNK; e += R::IN_CHUNK) {
        auto *place = reinterpret_cast<uint4 *>(to + e);
        const uint4 there = added ? *place : uint4{};
        uint32_t registers[4] = {there.x, there.y, there.z, there.w};
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int first = e + r * R::IN_REGISTER, last = first + R::IN_REGISTER - 1;
          const float2 before = added ? unpack<To>(registers[r]) : float2{-0.0f, -0.0f};
          registers[r] = pack<To>({fmaf(factor, g[first], before.x), fmaf(factor, g[last], before.y)});
        }
        *place = {registers[0], registers[1], registers[2], registers[3]};
      }
    } else {
#pragma unroll
      for (int e = 0; e < E::IN_CHUNK; ++e)
        if (e < inside_) {
          To *place = row + Place::weight_offset(p_.geometry, strides, column_ + e);
          *place = rounded<To>(fmaf(factor, g[e], added ? widened(*place) : -0.0f)); // x + -0 is x, also where x is -0
        }
    }
  }

  __device__ float dot_with_source(int j, int feature, const float (&g)[E::IN_CHUNK]) const {
    const int64_t *strides = p_.recipe.strides[j];
    auto *row =
        reinterpret_cast<const T *>(p_.recipe.weights[j]) + group_ * p_.recipe.group_strides[j] + feature * strides[0];
    float dot = 0.0f;
    if ((p_.recipe.vectors >> j & 1) && inside_ == E::IN_CHUNK) {
      const uint4 source = *reinterpret_cast<const uint4 *>(row + Place::weight_offset(p_.geometry, strides, column_));
      const uint32_t registers[4] = {source.x, source.y, source.z, source.w};
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float2 values = unpack<T>(registers[r]);
        dot = fmaf(g[r * E::IN_REGISTER], values.x, dot);
        if constexpr (E::IN_REGISTER == 2)
          dot = fmaf(g[r * 2 + 1], values.y, dot);
      }
    } else {
#pragma unroll
      for (int e = 0; e < E::IN_CHUNK; ++e)
        if (e < inside_)
          dot = fmaf(g[e], widened(row[Place::weight_offset(p_.geometry, strides, column_ + e)]), dot);
    }
    return dot;
  }

  const Wgrad &p_;
  int group_, first_row_, part_, parts_;
  int column_, inside_; // the thread's chunk, and how many of its elements there are
  float dots_[MOST_SOURCES] = {};
};

// The tiles of a group's part of G.
template <class Tile> struct Tiles {
  int rows, columns;
  __device__ explicit Tiles(const Wgrad &p) {
    rows = (p.features + Tile::ROWS - 1) / Tile::ROWS;
    columns = (p.channels * taps_of(p.geometry) + Tile::COLUMNS - 1) / Tile::COLUMNS;
  }
};

template <class T, class Tile, class Place>
__device__ Finish<T, Tile, Place> finish_of(const Wgrad &p, int2 tile, const Tiles<Tile> &tiles) {
  const int group = blockIdx.y, all = tiles.rows * tiles.columns;
  return {p,
          group,
          tile.x * Tile::ROWS,
          tile.y * Tile::COLUMNS,
          p.per_channel ? tile.y : group * all + int(blockIdx.x),
          p.per_channel ? tiles.columns : p.groups * all};
}

template <class T, class Tile, class Place> __device__ void wgrad(const Wgrad &p) {
  using E = Element<T>;
  using Gradient = DepthOuter<T, Tile::ROWS>;                                                 // dy
  using Activation = DepthOuter<T, Tile::COLUMNS>;                                            // x
  constexpr int DY_CHUNKS = Tile::ROWS / E::IN_CHUNK, X_CHUNKS = Tile::COLUMNS / E::IN_CHUNK; // of a row
  static_assert(Tile::THREADS % DY_CHUNKS == 0 && Tile::THREADS % X_CHUNKS == 0,
                "a thread copies one column of chunks");

  // Shared memory: `stages` times dy's tile and x's; then the epilogue's floats.
  extern __shared__ __align__(128) uint8_t shared[];
  constexpr int STAGE_BYTES = Gradient::BYTES + Activation::BYTES;

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int group = blockIdx.y, split = blockIdx.z;
  const Tiles<Tile> tiles(p);
  const int2 tile = tile_of(blockIdx.x, tiles.rows, tiles.columns);
  const int first_row = tile.x * Tile::ROWS, first_column = tile.y * Tile::COLUMNS;
  const int warp_row = warp / Tile::WARPS_OVER_COLUMNS * Tile::WARP_ROWS;
  const int warp_column = warp % Tile::WARPS_OVER_COLUMNS * Tile::WARP_COLUMNS;
  const Geometry &g = p.geometry;
  const int columns = p.channels * taps_of(g);
  const int first_step = split * p.steps;
  const int steps = min(p.steps, (p.pixels + E::TILE_DEPTH - 1) / E::TILE_DEPTH - first_step);

  // Copies. A thread's chunks have the same channels, and those of x the same tap, each step.
  auto *dy = reinterpret_cast<const T *>(p.dy) + int64_t(group) * p.features * p.dy_strides[1];
  auto *x = reinterpret_cast<const T *>(p.x) + int64_t(group) * p.channels * p.x_strides[1];
  const int feature = first_row + thread % DY_CHUNKS * E::IN_CHUNK;
  const int column = first_column + thread % X_CHUNKS * E::IN_CHUNK;
  const auto position = Place::position(g, p.x_strides, min(column, columns - 1));
  auto load = [&](int step, int stage) {
    uint8_t *to = shared + stage * STAGE_BYTES;
    const int first_pixel = (first_step + step) * E::TILE_DEPTH;
#pragma unroll
    for (int row = thread / DY_CHUNKS; row < E::TILE_DEPTH; row += Tile::THREADS / DY_CHUNKS) {
      const int pixel = first_pixel + row;
      const T *from = dy + Place::out_offset(g, p.dy_strides, min(pixel, p.pixels - 1));
      copy_chunk<T>(to + Gradient::offset(row, thread % DY_CHUNKS), p.vector_dy,
                    pixel < p.pixels ? min(p.features - feature, E::IN_CHUNK) : 0, dy,
                    [&](int e) { return from + (feature + e) * p.dy_strides[1]; });
    }
    to += Gradient::BYTES;
#pragma unroll
    for (int row = thread / X_CHUNKS; row < E::TILE_DEPTH; row += Tile::THREADS / X_CHUNKS) {
      const bool exists = first_pixel + row < p.pixels;
      const auto pixel = Place::pixel(g, p.x_strides, min(first_pixel + row, p.pixels - 1));
      uint8_t *place = to + Activation::offset(row, thread % X_CHUNKS);
      if (p.vector_x) {
        // Its elements have one tap: they lie inside together.
        const int inside = exists && Place::meets(g, pixel, position) ? min(columns - column, E::IN_CHUNK) : 0;
        copy_chunk<T>(place, true, inside, x, [&](int) { return x + pixel.offset + position.offset; });
      } else {
#pragma unroll 1
        for (int e = 0; e < E::IN_CHUNK; ++e) {
          const auto here = Place::position(g, p.x_strides, min(column + e, columns - 1));
          const bool inside = exists && column + e < columns && Place::meets(g, pixel, here);
          reinterpret_cast<T *>(place)[e] = inside ? x[pixel.offset + here.offset] : T(0.0f);
        }
      }
    }
  };

  // Main loop.
  typename Tile::Sums sums = {};
  auto multiply = [&](int, int stage) {
    const uint32_t from = ptx::shared_address(shared + stage * STAGE_BYTES);
#pragma unroll
    for (int s = 0; s < E::TILE_DEPTH / E::MMA_DEPTH; ++s) {
      uint32_t rows[Tile::DOWN][4];
#pragma unroll
      for (int down = 0; down < Tile::DOWN; ++down) {
        Gradient::first_operand(rows[down], from, warp_row + 16 * down, s, lane);
#pragma unroll
        for (int r = 0; r < 4; ++r)
          rows[down][r] = operand<T>(rows[down][r]);
      }
      multiply_add<T, Tile, Activation>(sums, rows, from + Gradient::BYTES, warp_column, s, lane);
    }
  };
  pipeline(steps, p.stages, load, multiply);

  // Epilogue: 16 rows of each warp at a time through shared memory, then 16 bytes of every gradient a thread.
  using Finishing = Finish<T, Tile, Place>;
  constexpr int PITCH = Tile::COLUMNS + 8; // floats: half a warp's pairs lie in different banks
  constexpr int ROWS = 16 * Tile::WARPS_OVER_ROWS;
  static_assert(ROWS % Finishing::ROWS_AT_ONCE == 0, "all lanes finish equally many chunks");
  auto *staged = reinterpret_cast<float *>(shared);
  Finishing finish = finish_of<T, Tile, Place>(p, tile, tiles);
  const int chunk = thread % Finishing::CHUNKS * E::IN_CHUNK;
#pragma unroll
  for (int down = 0; down < Tile::DOWN; ++down) {
    if (down > 0)
      __syncthreads();
#pragma unroll
    for (int across = 0; across < Tile::ACROSS; ++across)
#pragma unroll
      for (int r = 0; r < 4; r += 2) {
        const int row = warp / Tile::WARPS_OVER_COLUMNS * 16 + lane / 4 + r / 2 * 8;
        *reinterpret_cast<float2 *>(staged + row * PITCH + warp_column + 8 * across +
                                    lane % 4 * 2) = {sums[down][across][r], sums[down][across][r + 1]};
      }
    __syncthreads();
#pragma unroll 1
    for (int at = thread / Finishing::CHUNKS; at < ROWS; at += Finishing::ROWS_AT_ONCE) {
      const int row = at / 16 * Tile::WARP_ROWS + 16 * down + at % 16; // of the tile
      float sum[E::IN_CHUNK];
#pragma unroll
      for (int e = 0; e < E::IN_CHUNK; e += 4)
        *reinterpret_cast<float4 *>(sum + e) = *reinterpret_cast<const float4 *>(staged + at * PITCH + chunk + e);
      if (p.splits == 1) {
        finish.chunk(row, sum);
      } else if (first_row + row < p.features) {
        const int64_t channel = int64_t(group) * p.features + first_row + row;
        auto *to = reinterpret_cast<float *>(p.partial) + (int64_t(split) * p.groups * p.features + channel) * columns +
                   first_column + chunk;
        for (int e = 0; e < min(columns - first_column - chunk, E::IN_CHUNK); ++e)
          to[e] = sum[e];
      }
    }
  }
  if (p.splits == 1)
    finish.end();
}

// A tile of G from its shares, added in their order.
template <class T, class Tile, class Place> __device__ void reduce_wgrad(const Wgrad &p) {
  using E = Element<T>;
  using Finishing = Finish<T, Tile, Place>;
  const Tiles<Tile> tiles(p);
  const int2 tile = tile_of(blockIdx.x, tiles.rows, tiles.columns);
  const int columns = p.channels * taps_of(p.geometry);
  const int column = tile.y * Tile::COLUMNS + int(threadIdx.x) % Finishing::CHUNKS * E::IN_CHUNK;
  const int64_t channels = int64_t(p.groups) * p.features;
  Finishing finish = finish_of<T, Tile, Place>(p, tile, tiles);
#pragma unroll 1
  for (int row = threadIdx.x / Finishing::CHUNKS; row < Tile::ROWS; row += Finishing::ROWS_AT_ONCE) {
    const int feature = tile.x * Tile::ROWS + row;
    float sum[E::IN_CHUNK] = {};
    if (feature < p.features) {
      const int64_t channel = int64_t(blockIdx.y) * p.features + feature;
      for (int split = 0; split < p.splits; ++split) {
        auto *from = reinterpret_cast<const float *>(p.partial) + (split * channels + channel) * columns + column;
#pragma unroll
        for (int e = 0; e < E::IN_CHUNK; ++e)
          sum[e] += column + e < columns ? from[e] : 0.0f;
      }
    }
    finish.chunk(row, sum);
  }
  finish.end();
}

} // namespace rl_kernels
