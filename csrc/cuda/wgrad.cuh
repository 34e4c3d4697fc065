// G (out, taps * in) = dy^T x, a tile at a time, which becomes every source's gradient and its share of the
// coefficients' before the next: G never exists in memory, but for float32 shares of it where its sum is split.
// Linear layers and convolutions.
#pragma once

#include "registry.h"
#include "tile.cuh"

namespace rl_kernels::cuda {

// Makes a tile of G into gradients, 16 bytes of a row a thread.
template <class T, class Tile, class Addressing> class Finish {
  using E = Element<T>;

public:
  static constexpr int CHUNKS = Tile::COLUMNS / E::IN_CHUNK; // of a row, in as many neighbouring lanes
  static constexpr int ROWS_AT_ONCE = Tile::THREADS / CHUNKS;
  static constexpr int WARPS = Tile::THREADS / 32;
  static constexpr int KEPT_BYTES = MAX_SOURCES * WARPS * int(sizeof(float)); // what end() declares
  static_assert(CHUNKS <= 32 && 32 % CHUNKS == 0, "the lanes of a row belong to one warp");

  // part: the tile's, of `parts` whose shares of a dot product are summed.
  __device__ Finish(const Wgrad &p, int group, int first_row, int first_column, int part, int parts)
      : p_(p), group_(group), first_row_(first_row), part_(part), parts_(parts) {
    column_ = first_column + int(threadIdx.x) % CHUNKS * E::IN_CHUNK;
    inside_ = min(p.channels * taps_of(p.correlation) - column_, E::IN_CHUNK);
  }

  // g: the thread's chunk of a row of the tile. All lanes of a warp have to come here together.
  __device__ void chunk(int row, const float (&g)[E::IN_CHUNK]) {
    const int feature = first_row_ + row;
    const int64_t channel = int64_t(group_) * p_.features + feature;
    const bool exists = feature < p_.features;
#pragma unroll
    for (int j = 0; j < MAX_SOURCES; ++j) { // unrolled, for dots_ to stay in registers
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
    __shared__ float warps[MAX_SOURCES][WARPS];
    static_assert(sizeof(warps) == KEPT_BYTES);
#pragma unroll
    for (int j = 0; j < MAX_SOURCES; ++j) {
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
      for (int warp = 0; warp < WARPS; ++warp)
        dot += warps[threadIdx.x][warp];
      reinterpret_cast<float *>(p_.dots)[int64_t(threadIdx.x) * parts_ + part_] = dot;
    }
  }

private:
  // To: the sources' type, or float32 under sources of 16 bits.
  template <class To> __device__ void store(int j, int feature, float factor, const float (&g)[E::IN_CHUNK]) const {
    using R = Element<To>;
    const int64_t *strides = p_.gradient_strides[j];
    To *row = reinterpret_cast<To *>(p_.gradients[j]) + group_ * p_.gradient_group_strides[j] + feature * strides[0];
    const bool added = p_.added >> j & 1;
    if ((p_.vector_gradients >> j & 1) && inside_ == E::IN_CHUNK) {
      To *to = row + Addressing::weight_offset(p_.correlation, strides, column_);
#pragma unroll
      for (int e = 0; e < E::IN_CHUNK; e += R::IN_CHUNK) {
        auto *chunk = reinterpret_cast<uint4 *>(to + e);
        const uint4 old = added ? *chunk : uint4{};
        uint32_t registers[4] = {old.x, old.y, old.z, old.w};
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int first = e + r * R::IN_REGISTER, last = first + R::IN_REGISTER - 1;
          const float2 before = added ? unpack<To>(registers[r]) : float2{-0.0f, -0.0f};
          registers[r] = pack<To>({fmaf(factor, g[first], before.x), fmaf(factor, g[last], before.y)});
        }
        *chunk = {registers[0], registers[1], registers[2], registers[3]};
      }
    } else {
#pragma unroll
      for (int e = 0; e < E::IN_CHUNK; ++e)
        if (e < inside_) {
          To *to = row + Addressing::weight_offset(p_.correlation, strides, column_ + e);
          *to = rounded<To>(fmaf(factor, g[e], added ? widened(*to) : -0.0f)); // x + -0 is x, also where x is -0
        }
    }
  }

  __device__ float dot_with_source(int j, int feature, const float (&g)[E::IN_CHUNK]) const {
    const int64_t *strides = p_.recipe.strides[j];
    auto *row =
        reinterpret_cast<const T *>(p_.recipe.weights[j]) + group_ * p_.recipe.group_strides[j] + feature * strides[0];
    float dot = 0.0f;
    if ((p_.recipe.vectors >> j & 1) && inside_ == E::IN_CHUNK) {
      const uint4 source =
          *reinterpret_cast<const uint4 *>(row + Addressing::weight_offset(p_.correlation, strides, column_));
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
          dot = fmaf(g[e], widened(row[Addressing::weight_offset(p_.correlation, strides, column_ + e)]), dot);
    }
    return dot;
  }

  const Wgrad &p_;
  int group_, first_row_, part_, parts_;
  int column_, inside_; // the thread's chunk, and how many of its elements there are
  float dots_[MAX_SOURCES] = {};
};

// The tiles of a group's part of G.
template <class Tile> struct Tiles {
  int rows, columns;
  __device__ explicit Tiles(const Wgrad &p) {
    rows = (p.features + Tile::ROWS - 1) / Tile::ROWS;
    columns = (p.channels * taps_of(p.correlation) + Tile::COLUMNS - 1) / Tile::COLUMNS;
  }
};

template <class T, class Tile, class Addressing>
__device__ Finish<T, Tile, Addressing> finish_of(const Wgrad &p, int2 tile, const Tiles<Tile> &tiles) {
  const int group = blockIdx.y, all = tiles.rows * tiles.columns;
  return {p,
          group,
          tile.x * Tile::ROWS,
          tile.y * Tile::COLUMNS,
          p.per_channel ? tile.y : group * all + int(blockIdx.x),
          p.per_channel ? tiles.columns : p.groups * all};
}

// A block's tile of G, or a split's share of it.
template <class T, class Tile, class Addressing> class WgradKernel {
  using E = Element<T>;
  using Gradient = DepthOuter<T, Tile::ROWS>;      // dy
  using Activation = DepthOuter<T, Tile::COLUMNS>; // x
  using Finishing = Finish<T, Tile, Addressing>;
  using Sums = typename Tile::Sums;
  static constexpr int STAGE_BYTES = Gradient::BYTES + Activation::BYTES;

  // Copies: chunks of a row.
  static constexpr int DY_CHUNKS = Tile::ROWS / E::IN_CHUNK, X_CHUNKS = Tile::COLUMNS / E::IN_CHUNK;
  static_assert(Tile::THREADS % DY_CHUNKS == 0 && Tile::THREADS % X_CHUNKS == 0,
                "a thread copies one column of chunks");

  // Epilogue: 16 rows of each warp above another, as floats.
  static constexpr int PITCH = Tile::COLUMNS + 8; // half a warp's pairs lie in different banks
  static constexpr int STAGED_ROWS = 16 * Tile::WARPS_OVER_ROWS;
  static_assert(STAGED_ROWS % Finishing::ROWS_AT_ONCE == 0, "all lanes finish equally many chunks");

public:
  using Params = Wgrad;
  static constexpr int MAX_THREADS = Tile::THREADS;
  static constexpr LaunchFacts FACTS = {
      .threads = Tile::THREADS,
      .rows = Tile::ROWS,
      .columns = Tile::COLUMNS,
      .depth_bytes = STEP_BYTES,
      .stage_bytes = STAGE_BYTES,
      .epilogue_bytes = STAGED_ROWS * PITCH * int(sizeof(float)),
      .kept_bytes = Finishing::KEPT_BYTES,
  };

  static __device__ void run(const Wgrad &p) {
    // Shared memory: `stages` times dy's tile and x's; then the epilogue's floats.
    extern __shared__ __align__(128) uint8_t shared[];
    const Tiles<Tile> tiles(p);
    const int2 tile = tile_of(blockIdx.x, tiles.rows, tiles.columns);
    const WgradKernel block(p, shared, tile);
    Sums sums = {};
    pipeline(
        block.steps_, p.stages, [&](int step, int stage) { block.load(step, stage); },
        [&](int, int stage) { block.multiply(sums, stage); });
    Finishing finish = finish_of<T, Tile, Addressing>(p, tile, tiles);
    block.finish(sums, finish);
    if (p.splits == 1)
      finish.end();
  }

private:
  const Wgrad &p_;
  uint8_t *const shared_;
  const int thread_ = threadIdx.x, lane_ = thread_ % 32, warp_ = thread_ / 32;
  const int group_ = blockIdx.y, split_ = blockIdx.z;
  const int first_row_, first_column_;
  const int warp_row_ = warp_ / Tile::WARPS_OVER_COLUMNS * Tile::WARP_ROWS;
  const int warp_column_ = warp_ % Tile::WARPS_OVER_COLUMNS * Tile::WARP_COLUMNS;
  const int columns_, first_step_, steps_;
  // What a thread copies: its chunks have the same channels, and those of x the same tap, each step.
  const T *const dy_, *const x_; // the group's
  const int feature_, column_;
  const typename Addressing::Position position_;

  __device__ WgradKernel(const Wgrad &p, uint8_t *shared, int2 tile)
      : p_(p), shared_(shared), first_row_(tile.x * Tile::ROWS), first_column_(tile.y * Tile::COLUMNS),
        columns_(p.channels * taps_of(p.correlation)), first_step_(split_ * p.steps),
        steps_(min(p.steps, (p.pixels + E::TILE_DEPTH - 1) / E::TILE_DEPTH - first_step_)),
        dy_(reinterpret_cast<const T *>(p.dy) + int64_t(group_) * p.features * p.dy_strides[1]),
        x_(reinterpret_cast<const T *>(p.x) + int64_t(group_) * p.channels * p.x_strides[1]),
        feature_(first_row_ + thread_ % DY_CHUNKS * E::IN_CHUNK),
        column_(first_column_ + thread_ % X_CHUNKS * E::IN_CHUNK),
        position_(Addressing::position(p.correlation, p.x_strides, min(column_, columns_ - 1))) {}

  // Copies.

  __device__ void load(int step, int stage) const {
    uint8_t *to = shared_ + stage * STAGE_BYTES;
    const int first_pixel = (first_step_ + step) * E::TILE_DEPTH;
    load_dy(to, first_pixel);
    load_x(to + Gradient::BYTES, first_pixel);
  }

  __device__ void load_dy(uint8_t *tile, int first_pixel) const {
#pragma unroll
    for (int row = thread_ / DY_CHUNKS; row < E::TILE_DEPTH; row += Tile::THREADS / DY_CHUNKS) {
      const int pixel = first_pixel + row;
      const T *from = dy_ + Addressing::out_offset(p_.correlation, p_.dy_strides, min(pixel, p_.pixels - 1));
      copy_chunk<T>(tile + Gradient::offset(row, thread_ % DY_CHUNKS), p_.vector_dy,
                    pixel < p_.pixels ? min(p_.features - feature_, E::IN_CHUNK) : 0, dy_,
                    [&](int e) { return from + (feature_ + e) * p_.dy_strides[1]; });
    }
  }

  __device__ void load_x(uint8_t *tile, int first_pixel) const {
    const Correlation &c = p_.correlation;
#pragma unroll
    for (int row = thread_ / X_CHUNKS; row < E::TILE_DEPTH; row += Tile::THREADS / X_CHUNKS) {
      const bool exists = first_pixel + row < p_.pixels;
      const auto pixel = Addressing::pixel(c, p_.x_strides, min(first_pixel + row, p_.pixels - 1));
      uint8_t *to = tile + Activation::offset(row, thread_ % X_CHUNKS);
      if (p_.vector_x) {
        // Its elements have one tap: they lie inside together.
        const int inside = exists && Addressing::meets(c, pixel, position_) ? min(columns_ - column_, E::IN_CHUNK) : 0;
        copy_chunk<T>(to, true, inside, x_, [&](int) { return x_ + pixel.offset + position_.offset; });
      } else {
#pragma unroll 1
        for (int e = 0; e < E::IN_CHUNK; ++e) {
          const auto here = Addressing::position(c, p_.x_strides, min(column_ + e, columns_ - 1));
          const bool inside = exists && column_ + e < columns_ && Addressing::meets(c, pixel, here);
          reinterpret_cast<T *>(to)[e] = inside ? x_[pixel.offset + here.offset] : T(0.0f);
        }
      }
    }
  }

  // Main loop.

  __device__ void multiply(Sums &sums, int stage) const {
    const uint32_t from = ptx::shared_address(shared_ + stage * STAGE_BYTES);
#pragma unroll
    for (int s = 0; s < E::TILE_DEPTH / E::MMA_DEPTH; ++s) {
      uint32_t rows[Tile::DOWN][4];
      unrolled<Tile::DOWN>([&](auto down) {
        Gradient::template first_operand<down>(rows[down], from, warp_row_, s, lane_);
#pragma unroll
        for (int r = 0; r < 4; ++r)
          rows[down][r] = operand<T>(rows[down][r]);
      });
      multiply_add<T, Tile, Activation>(sums, rows, from + Gradient::BYTES, warp_column_, s, lane_);
    }
  }

  // Epilogue: 16 rows of each warp at a time through shared memory, then 16 bytes of every gradient a thread.

  __device__ void finish(const Sums &sums, Finishing &finish) const {
    const auto *staged = reinterpret_cast<const float *>(shared_);
    const int chunk = thread_ % Finishing::CHUNKS * E::IN_CHUNK;
#pragma unroll
    for (int down = 0; down < Tile::DOWN; ++down) {
      if (down > 0)
        __syncthreads();
      stage_sums(sums, down);
      __syncthreads();
#pragma unroll 1
      for (int at = thread_ / Finishing::CHUNKS; at < STAGED_ROWS; at += Finishing::ROWS_AT_ONCE) {
        const int row = at / 16 * Tile::WARP_ROWS + 16 * down + at % 16; // of the tile
        float sum[E::IN_CHUNK];
#pragma unroll
        for (int e = 0; e < E::IN_CHUNK; e += 4)
          *reinterpret_cast<float4 *>(sum + e) = *reinterpret_cast<const float4 *>(staged + at * PITCH + chunk + e);
        if (p_.splits == 1)
          finish.chunk(row, sum);
        else if (first_row_ + row < p_.features)
          store_share(row, chunk, sum);
      }
    }
  }

  __device__ void stage_sums(const Sums &sums, int down) const {
    auto *staged = reinterpret_cast<float *>(shared_);
#pragma unroll
    for (int across = 0; across < Tile::ACROSS; ++across)
#pragma unroll
      for (int r = 0; r < 4; r += 2) {
        const int row = warp_ / Tile::WARPS_OVER_COLUMNS * 16 + lane_ / 4 + r / 2 * 8;
        *reinterpret_cast<float2 *>(staged + row * PITCH + warp_column_ + 8 * across +
                                    lane_ % 4 * 2) = {sums[down][across][r], sums[down][across][r + 1]};
      }
  }

  __device__ void store_share(int row, int chunk, const float (&sum)[E::IN_CHUNK]) const {
    const int64_t channel = int64_t(group_) * p_.features + first_row_ + row;
    auto *to = reinterpret_cast<float *>(p_.partial) +
               (int64_t(split_) * p_.groups * p_.features + channel) * columns_ + first_column_ + chunk;
    for (int e = 0; e < min(columns_ - first_column_ - chunk, E::IN_CHUNK); ++e)
      to[e] = sum[e];
  }
};

// A tile of G from the splits' shares, added in their order.
template <class T, class Tile, class Addressing> class WgradReductionKernel {
  using E = Element<T>;
  using Finishing = Finish<T, Tile, Addressing>;

public:
  using Params = Wgrad;
  static constexpr int MAX_THREADS = Tile::THREADS;
  static constexpr LaunchFacts FACTS = {
      .threads = Tile::THREADS, .rows = Tile::ROWS, .columns = Tile::COLUMNS, .kept_bytes = Finishing::KEPT_BYTES};

  static __device__ void run(const Wgrad &p) {
    const Tiles<Tile> tiles(p);
    const int2 tile = tile_of(blockIdx.x, tiles.rows, tiles.columns);
    const int columns = p.channels * taps_of(p.correlation);
    const int column = tile.y * Tile::COLUMNS + int(threadIdx.x) % Finishing::CHUNKS * E::IN_CHUNK;
    const int64_t channels = int64_t(p.groups) * p.features;
    Finishing finish = finish_of<T, Tile, Addressing>(p, tile, tiles);
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
};

} // namespace rl_kernels::cuda
