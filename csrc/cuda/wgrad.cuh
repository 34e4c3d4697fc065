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
    column_ = first_column + in_register(threadIdx.x) % CHUNKS * E::IN_CHUNK;
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

  // Instead, of a split: its share of the chunk is kept.
  __device__ void share(int split, int row, const float (&sum)[E::IN_CHUNK]) const {
    const int feature = first_row_ + row;
    if (feature >= p_.features)
      return;
    const int64_t channel = (int64_t(split) * p_.groups + group_) * p_.features + feature;
    auto *to = reinterpret_cast<float *>(p_.partial) + channel * p_.channels * taps_of(p_.correlation) + column_;
#pragma unroll
    for (int e = 0; e < E::IN_CHUNK; ++e)
      if (e < inside_)
        to[e] = sum[e];
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
  __device__ int2 own() const { return tile_of(in_register(blockIdx.x), rows, columns); }
  __device__ explicit Tiles(const Wgrad &p) {
    // What is counted again after the main loop takes no register meanwhile.
    rows = in_register((p.features + Tile::ROWS - 1) / Tile::ROWS);
    columns = in_register((p.channels * taps_of(p.correlation) + Tile::COLUMNS - 1) / Tile::COLUMNS);
  }
};

template <class T, class Tile, class Addressing> __device__ Finish<T, Tile, Addressing> finish_of(const Wgrad &p) {
  const Tiles<Tile> tiles(p);
  const int2 tile = tiles.own();
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

  // Copies, of dy and x alike: chunks of a row, and rows from one of a thread's chunks to the next.
  static constexpr int CHUNKS = Tile::ROWS / E::IN_CHUNK, STEP = Tile::THREADS / CHUNKS;
  static constexpr int COPIES = E::TILE_DEPTH / STEP;
  static_assert(Tile::ROWS == Tile::COLUMNS, "tiles are square");
  static_assert(Tile::THREADS % CHUNKS == 0, "a thread copies one column of chunks");
  static_assert(STEP % (sizeof(T) == 4 ? 4 : 8) == 0, "and its chunks are swapped alike in all rows");

  // Epilogue: 16 rows of each warp above another, as floats.
  static constexpr int PITCH = Tile::COLUMNS + 8; // half a warp's pairs lie in different banks
  static constexpr int STAGED_ROWS = 16 * Tile::WARPS_OVER_ROWS;
  static_assert(STAGED_ROWS % Finishing::ROWS_AT_ONCE == 0, "all lanes finish equally many chunks");

public:
  using Params = Wgrad;
  static constexpr int MAX_THREADS = Tile::THREADS;
  static constexpr int BLOCKS = 2; // one finishes its tile while the other multiplies
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
    WgradKernel block(p, shared, Tiles<Tile>(p).own());
    Sums sums = {};
    pipeline(
        block.steps_, p.stages, ptx::shared_address(shared), STAGE_BYTES,
        [&](int step, uint32_t to) { block.load(step, to); }, [&](int, uint32_t from) { block.multiply(sums, from); });
    Finishing finish = finish_of<T, Tile, Addressing>(p);
    block.finish(sums, finish);
    if (p.splits == 1)
      finish.end();
  }

private:
  const Wgrad &p_;
  uint8_t *const shared_;
  const int thread_ = threadIdx.x, lane_ = thread_ % 32, warp_ = thread_ / 32;
  const int group_ = blockIdx.y, split_ = blockIdx.z;
  const int warp_row_ = warp_ / Tile::WARPS_OVER_COLUMNS * Tile::WARP_ROWS;
  const int warp_column_ = warp_ % Tile::WARPS_OVER_COLUMNS * Tile::WARP_COLUMNS;
  const int columns_, first_step_, steps_;
  // What a thread copies: its chunks have the same channels, and those of x the same tap, each step.
  const T *const dy_, *const x_; // the group's
  const int feature_, column_;
  const int vector_steps_;                 // which may be copied 16 bytes at a time, and have all their pixels
  const int dy_bytes_, x_bytes_;           // of a chunk, that there are
  const T *dy_from_, *x_from_;             // of a linear layer: where its first chunks of the next such step lie
  typename Addressing::Position position_; // of a convolution: the tap and channel of its chunks of x
  // In a stage: where a thread copies to, and where a lane reads.
  const int copy_at_, rows_at_, columns_at_;

  __device__ WgradKernel(const Wgrad &p, uint8_t *shared, int2 tile)
      : p_(p), shared_(shared), columns_(p.channels * taps_of(p.correlation)), first_step_(split_ * p.steps),
        steps_(min(p.steps, (p.pixels + E::TILE_DEPTH - 1) / E::TILE_DEPTH - first_step_)), dy_(dy_of(p, group_)),
        x_(x_of(p, group_)), feature_(tile.x * Tile::ROWS + thread_ % CHUNKS * E::IN_CHUNK),
        column_(tile.y * Tile::COLUMNS + thread_ % CHUNKS * E::IN_CHUNK),
        vector_steps_(p.vector_dy && p.vector_x ? p.pixels / E::TILE_DEPTH - first_step_ : 0),
        dy_bytes_(in_register(min(max(p.features - feature_, 0), E::IN_CHUNK) * E::BYTES)),
        x_bytes_(in_register(min(max(columns_ - column_, 0), E::IN_CHUNK) * E::BYTES)),
        copy_at_(in_register(Gradient::offset(thread_ / CHUNKS, thread_ % CHUNKS))),
        rows_at_(in_register(Gradient::of_rows(warp_row_, lane_))),
        columns_at_(in_register(Gradient::BYTES + Activation::of_columns(warp_column_, lane_))) {
    if constexpr (Addressing::KEPT) {
      position_ = Addressing::position(p.correlation, p.x_strides, min(column_, columns_ - 1));
    } else {
      const int first_pixel = first_step_ * E::TILE_DEPTH;
      dy_from_ = dy_ + (dy_bytes_ > 0 ? feature_ : 0) + (first_pixel + thread_ / CHUNKS) * p.dy_strides[0];
      x_from_ = x_ + (x_bytes_ > 0 ? column_ : 0) + (first_pixel + thread_ / CHUNKS) * p.x_strides[0];
    }
  }

  __device__ static const T *dy_of(const Wgrad &p, int group) {
    return reinterpret_cast<const T *>(p.dy) + int64_t(group) * p.features * p.dy_strides[1];
  }
  __device__ static const T *x_of(const Wgrad &p, int group) {
    return reinterpret_cast<const T *>(p.x) + int64_t(group) * p.channels * p.x_strides[1];
  }

  // Copies.

  __device__ void load(int step, uint32_t stage) {
    if (step < vector_steps_) {
      copy_whole_step(stage, (first_step_ + step) * E::TILE_DEPTH);
      return;
    }
    const int first_pixel = (in_register(split_) * p_.steps + step) * E::TILE_DEPTH;
    uint8_t *to = shared_ + (stage - ptx::shared_address(shared_));
    load_dy(to, first_pixel);
    load_x(to + Gradient::BYTES, first_pixel);
  }

  // Most steps.
  __device__ void copy_whole_step(uint32_t to, int first_pixel) {
    unrolled<COPIES>([&](auto i) {
      constexpr int OFFSET = i * STEP * Gradient::ROW_BYTES;
      if constexpr (Addressing::KEPT) {
        const int pixel = first_pixel + thread_ / CHUNKS + i * STEP;
        const T *from = dy_ + Addressing::out_offset(p_.correlation, p_.dy_strides, pixel);
        ptx::cp_async<OFFSET>(to + copy_at_, from + (dy_bytes_ > 0 ? feature_ : 0), dy_bytes_);
      } else {
        ptx::cp_async<OFFSET>(to + copy_at_, dy_from_, dy_bytes_);
        dy_from_ += STEP * p_.dy_strides[0];
      }
    });
    unrolled<COPIES>([&](auto i) {
      constexpr int OFFSET = Gradient::BYTES + i * STEP * Activation::ROW_BYTES;
      if constexpr (Addressing::KEPT) {
        const auto pixel = Addressing::pixel(p_.correlation, p_.x_strides, first_pixel + thread_ / CHUNKS + i * STEP);
        // The chunk's elements have one tap: they lie inside together.
        const bool inside = Addressing::meets(p_.correlation, pixel, position_);
        ptx::cp_async<OFFSET>(to + copy_at_, x_ + (inside ? pixel.offset + position_.offset : 0),
                              inside ? x_bytes_ : 0);
      } else {
        ptx::cp_async<OFFSET>(to + copy_at_, x_from_, x_bytes_);
        x_from_ += STEP * p_.x_strides[0];
      }
    });
  }

  // The others; what only they need is computed here, for registers are few.

  __device__ void load_dy(uint8_t *tile, int first_pixel) const {
    const T *dy = dy_of(p_, in_register(group_));
#pragma unroll
    for (int row = thread_ / CHUNKS; row < E::TILE_DEPTH; row += Tile::THREADS / CHUNKS) {
      const int pixel = first_pixel + row;
      const T *from = dy + Addressing::out_offset(p_.correlation, p_.dy_strides, min(pixel, p_.pixels - 1));
      copy_chunk<T>(tile + Gradient::offset(row, thread_ % CHUNKS), p_.vector_dy,
                    pixel < p_.pixels ? min(p_.features - feature_, E::IN_CHUNK) : 0, dy,
                    [&](int e) { return from + (feature_ + e) * p_.dy_strides[1]; });
    }
  }

  __device__ void load_x(uint8_t *tile, int first_pixel) const {
    const Correlation &c = p_.correlation;
    const T *x = x_of(p_, in_register(group_));
    const int column = in_register(column_);
    const int columns = in_register(p_.channels) * taps_of(c);
    const auto at = Addressing::position(c, p_.x_strides, min(column, columns - 1));
#pragma unroll
    for (int row = thread_ / CHUNKS; row < E::TILE_DEPTH; row += Tile::THREADS / CHUNKS) {
      const bool exists = first_pixel + row < p_.pixels;
      const auto pixel = Addressing::pixel(c, p_.x_strides, min(first_pixel + row, p_.pixels - 1));
      uint8_t *to = tile + Activation::offset(row, thread_ % CHUNKS);
      if (p_.vector_x) {
        // Its elements have one tap: they lie inside together.
        const int inside = exists && Addressing::meets(c, pixel, at) ? min(columns - column, E::IN_CHUNK) : 0;
        copy_chunk<T>(to, true, inside, x, [&](int) { return x + pixel.offset + at.offset; });
      } else {
#pragma unroll 1
        for (int e = 0; e < E::IN_CHUNK; ++e) {
          const auto here = Addressing::position(c, p_.x_strides, min(column + e, columns - 1));
          const bool inside = exists && column + e < columns && Addressing::meets(c, pixel, here);
          reinterpret_cast<T *>(to)[e] = inside ? x[pixel.offset + here.offset] : T(0.0f);
        }
      }
    }
  }

  // Main loop.

  __device__ void multiply(Sums &sums, uint32_t stage) const {
    const uint32_t rows_at = stage + rows_at_, columns_at = stage + columns_at_;
    unrolled<E::TILE_DEPTH / E::MMA_DEPTH>([&](auto s) {
      uint32_t rows[Tile::DOWN][4];
      unrolled<Tile::DOWN>([&](auto down) {
        Gradient::template first_operand<s, down>(rows[down], rows_at);
#pragma unroll
        for (int r = 0; r < 4; ++r)
          rows[down][r] = operand<T>(rows[down][r]);
      });
      multiply_add<T, Tile, Activation, s>(sums, rows, columns_at);
    });
  }

  // Epilogue: 16 rows of each warp at a time through shared memory, then 16 bytes of every gradient a thread.

  __device__ void finish(const Sums &sums, Finishing &finish) const {
    const auto *staged = reinterpret_cast<const float *>(shared_);
    const int thread = in_register(threadIdx.x); // what follows from it takes no registers in the main loop
    const int chunk = thread % Finishing::CHUNKS * E::IN_CHUNK;
#pragma unroll
    for (int down = 0; down < Tile::DOWN; ++down) {
      if (down > 0)
        __syncthreads();
      stage_sums(sums, down, thread / 32, thread % 32);
      __syncthreads();
#pragma unroll 1
      for (int at = thread / Finishing::CHUNKS; at < STAGED_ROWS; at += Finishing::ROWS_AT_ONCE) {
        const int row = at / 16 * Tile::WARP_ROWS + 16 * down + at % 16; // of the tile
        float sum[E::IN_CHUNK];
        read_chunk<T>(sum, staged + at * PITCH + chunk, thread % 32);
        if (p_.splits == 1)
          finish.chunk(row, sum);
        else
          finish.share(split_, row, sum);
      }
    }
  }

  __device__ void stage_sums(const Sums &sums, int down, int warp, int lane) const {
    auto *staged = reinterpret_cast<float *>(shared_);
#pragma unroll
    for (int across = 0; across < Tile::ACROSS; ++across)
#pragma unroll
      for (int r = 0; r < 4; r += 2) {
        const int row = warp / Tile::WARPS_OVER_COLUMNS * 16 + lane / 4 + r / 2 * 8;
        *reinterpret_cast<float2 *>(staged + row * PITCH + warp % Tile::WARPS_OVER_COLUMNS * Tile::WARP_COLUMNS +
                                    8 * across + lane % 4 * 2) = {sums[down][across][r], sums[down][across][r + 1]};
      }
  }
};

// A tile of G from the splits' shares, added in their order.
template <class T, class Tile, class Addressing> class WgradReductionKernel {
  using E = Element<T>;
  using Finishing = Finish<T, Tile, Addressing>;

public:
  using Params = Wgrad;
  static constexpr int MAX_THREADS = Tile::THREADS;
  static constexpr int BLOCKS = 2;
  static constexpr LaunchFacts FACTS = {
      .threads = Tile::THREADS, .rows = Tile::ROWS, .columns = Tile::COLUMNS, .kept_bytes = Finishing::KEPT_BYTES};

  static __device__ void run(const Wgrad &p) {
    const int2 tile = Tiles<Tile>(p).own();
    const int columns = p.channels * taps_of(p.correlation);
    const int column = tile.y * Tile::COLUMNS + int(threadIdx.x) % Finishing::CHUNKS * E::IN_CHUNK;
    const int64_t channels = int64_t(p.groups) * p.features;
    Finishing finish = finish_of<T, Tile, Addressing>(p);
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
