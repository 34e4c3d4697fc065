// out (pixels, features) = activation W^T, computed transposed: the mixed weight is the matrix instructions' first
// operand and never exists but in registers. Forward and, with TRANSPOSED, dgrad; linear layers and convolutions.
#pragma once

#include "tile.cuh"

namespace rl_kernels {

// Two sources with a scalar each: the recipe of Replacement Learning.
struct Pair {
  static constexpr bool IS_PAIR = true;
};
// Up to four, with any strides of the coefficients.
struct General {
  static constexpr bool IS_PAIR = false;
};

// The coefficients of a lane's elements of a first operand.
template <class T, class Tile, class Place, bool TRANSPOSED, class Kind> class Factors {
public:
  // first: the lane's warp's first feature.
  __device__ Factors(const Product &p, int first, int lane) : p_(p), lane_(lane) {
    if constexpr (Kind::IS_PAIR) {
      a_ = coefficient(p.recipe, 0, 0);
      b_ = coefficient(p.recipe, 1, 0);
    } else if constexpr (!TRANSPOSED) {
#pragma unroll
      for (int j = 0; j < MOST_SOURCES; ++j)
#pragma unroll
        for (int row = 0; row < 2 * Tile::DOWN; ++row) {
          int feature = min(first + row * 8 + lane / 4, p.features - 1);
          int64_t channel = int64_t(blockIdx.y) * p.features + feature;
          if (j < p.recipe.sources)
            rows_[j][row] = coefficient(p.recipe, j, channel);
        }
    }
  }

  // To be called before `of` for each source and step of the matrix instructions; k: the first position of the sum in
  // it, of k_end.
  __device__ void step(int j, int k, int k_end) {
    if constexpr (!Kind::IS_PAIR && TRANSPOSED) {
#pragma unroll
      for (int e = 0; e < PER_STEP; ++e) {
        int at = k + e / PER_REGISTER * (Element<T>::MMA_DEPTH / 2) + lane_ % 4 * PER_REGISTER + e % PER_REGISTER;
        int64_t channel = int64_t(blockIdx.y) * p_.channels + Place::channel(p_.geometry, min(at, k_end - 1));
        step_[e] = coefficient(p_.recipe, j, channel);
      }
    }
  }

  // Of the elements of register r of matrix instruction `down`.
  __device__ float2 of(int j, int down, int r) const {
    if constexpr (Kind::IS_PAIR)
      return j == 0 ? float2{a_, a_} : float2{b_, b_};
    else if constexpr (TRANSPOSED)
      return {step_[r / 2 * PER_REGISTER], step_[r / 2 * PER_REGISTER + PER_REGISTER - 1]};
    else
      return {rows_[j][2 * down + r % 2], rows_[j][2 * down + r % 2]};
  }

private:
  static constexpr int PER_REGISTER = Element<T>::IN_REGISTER, PER_STEP = 2 * PER_REGISTER;
  const Product &p_;
  int lane_;
  float a_, b_;
  float rows_[MOST_SOURCES][2 * Tile::DOWN];
  float step_[PER_STEP]; // of the source and step at hand
};

template <class T, class Tile, class Place, bool TRANSPOSED, class Kind> __device__ void product(const Product &p) {
  using E = Element<T>;
  using Weight = std::conditional_t<TRANSPOSED, DepthOuter<T, Tile::ROWS>, DepthInner<T, Tile::ROWS>>;
  using Activation = DepthInner<T, Tile::COLUMNS>;
  constexpr int CHUNKS = 64 / 16;                                               // of a row along the sum
  constexpr int WEIGHT_CHUNKS = TRANSPOSED ? Tile::ROWS / E::IN_CHUNK : CHUNKS; // of a row of the weights' tile
  constexpr int WEIGHT_ROWS = TRANSPOSED ? E::TILE_DEPTH : Tile::ROWS;
  constexpr int PIXELS = Tile::COLUMNS * CHUNKS / Tile::THREADS; // of the activation that a thread copies chunks of
  static_assert(Tile::THREADS % CHUNKS == 0 && Tile::THREADS % WEIGHT_CHUNKS == 0,
                "a thread copies one column of chunks");
  static_assert(PIXELS * Tile::THREADS == Tile::COLUMNS * CHUNKS, "threads copy equally many");

  // Shared memory: `stages` times every source's tile and the activation's; then the epilogue's floats.
  extern __shared__ __align__(128) uint8_t shared[];
  const int sources = Kind::IS_PAIR ? 2 : p.recipe.sources;
  const int stage_bytes = sources * Weight::BYTES + Activation::BYTES;

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int group = blockIdx.y, split = blockIdx.z;
  const int2 tile =
      tile_of(blockIdx.x, (p.features + Tile::ROWS - 1) / Tile::ROWS, (p.pixels + Tile::COLUMNS - 1) / Tile::COLUMNS);
  const int first_feature = tile.x * Tile::ROWS, first_pixel = tile.y * Tile::COLUMNS;
  const int warp_row = warp / Tile::WARPS_OVER_COLUMNS * Tile::WARP_ROWS;
  const int warp_column = warp % Tile::WARPS_OVER_COLUMNS * Tile::WARP_COLUMNS;
  const Geometry &g = p.geometry;
  const int depth = p.channels * taps_of(g);
  const int first_step = split * p.steps;
  const int steps = min(p.steps, (depth + E::TILE_DEPTH - 1) / E::TILE_DEPTH - first_step);

  // Copies. A thread's chunks of the activation lie in one column of the tile, and in the same rows each step.
  auto *activation = reinterpret_cast<const T *>(p.activation) + int64_t(group) * p.channels * p.activation_strides[1];
  const int chunk = thread % CHUNKS, weight_chunk = thread % WEIGHT_CHUNKS;
  // Where pixels lie is computed once, and kept where it takes more than a product.
  __shared__ typename Place::Pixel kept[Place::KEPT ? Tile::COLUMNS : 1];
  if constexpr (Place::KEPT) {
    for (int i = thread; i < Tile::COLUMNS; i += Tile::THREADS)
      kept[i] = Place::pixel(g, p.activation_strides, min(first_pixel + i, p.pixels - 1));
    __syncthreads();
  }
  auto pixel_of = [&](int row) -> typename Place::Pixel {
    if constexpr (Place::KEPT)
      return kept[row];
    else
      return Place::pixel(g, p.activation_strides, first_pixel + row);
  };

  auto load = [&](int step, int stage) {
    uint8_t *to = shared + stage * stage_bytes;
    const int first_k = (first_step + step) * E::TILE_DEPTH;
    for (int j = 0; j < sources; ++j) {
      auto *weight = reinterpret_cast<const T *>(p.recipe.weights[j]) + group * p.recipe.group_strides[j];
      const int64_t *strides = p.recipe.strides[j];
      const bool vector = p.recipe.vectors >> j & 1;
#pragma unroll
      for (int row = thread / WEIGHT_CHUNKS; row < WEIGHT_ROWS; row += Tile::THREADS / WEIGHT_CHUNKS) {
        uint8_t *place = to + j * Weight::BYTES + Weight::offset(row, weight_chunk);
        const int k = first_k + (TRANSPOSED ? row : weight_chunk * E::IN_CHUNK);
        const int feature = first_feature + (TRANSPOSED ? weight_chunk * E::IN_CHUNK : row);
        if constexpr (TRANSPOSED) {
          const T *from = weight + Place::weight_offset(g, strides, k);
          copy_chunk<T>(place, vector, k < depth ? min(p.features - feature, E::IN_CHUNK) : 0, weight,
                        [&](int e) { return from + (feature + e) * strides[0]; });
        } else {
          const T *from = weight + feature * strides[0];
          copy_chunk<T>(place, vector, feature < p.features ? min(depth - k, E::IN_CHUNK) : 0, weight,
                        [&](int e) { return from + Place::weight_offset(g, strides, k + e); });
        }
      }
    }
    const int k = first_k + chunk * E::IN_CHUNK;
    const auto at = Place::position(g, p.activation_strides, k);
#pragma unroll
    for (int i = 0; i < PIXELS; ++i) {
      const int row = thread / CHUNKS + i * (Tile::THREADS / CHUNKS);
      uint8_t *place = to + sources * Weight::BYTES + Activation::offset(row, chunk);
      const bool exists = first_pixel + row < p.pixels;
      const auto pixel = pixel_of(row);
      if (p.vector_activation) {
        // Its elements have one tap: they lie inside together.
        const int inside = exists && Place::meets(g, pixel, at) ? min(depth - k, E::IN_CHUNK) : 0;
        copy_chunk<T>(place, true, inside, activation, [&](int) { return activation + pixel.offset + at.offset; });
      } else {
#pragma unroll 1
        for (int e = 0; e < E::IN_CHUNK; ++e) {
          const auto here = Place::position(g, p.activation_strides, k + e);
          const bool inside = exists && k + e < depth && Place::meets(g, pixel, here);
          reinterpret_cast<T *>(place)[e] = inside ? activation[pixel.offset + here.offset] : T(0.0f);
        }
      }
    }
  };

  // Main loop: the sources' fragments are mixed, and multiplied with the activation's.
  Factors<T, Tile, Place, TRANSPOSED, Kind> factors(p, first_feature + warp_row, lane);
  typename Tile::Sums sums = {};
  auto multiply = [&](int step, int stage) {
    const uint32_t from = ptx::shared_address(shared + stage * stage_bytes);
#pragma unroll
    for (int s = 0; s < E::TILE_DEPTH / E::MMA_DEPTH; ++s) {
      const int first_k = (first_step + step) * E::TILE_DEPTH + s * E::MMA_DEPTH;
      float2 mixed[Tile::DOWN][4];
      auto add = [&](int j) {
        factors.step(j, first_k, depth);
#pragma unroll
        for (int down = 0; down < Tile::DOWN; ++down) {
          uint32_t source[4];
          Weight::first_operand(source, from + j * Weight::BYTES, warp_row + 16 * down, s, lane);
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const float2 factor = factors.of(j, down, r);
            float2 &sum = mixed[down][r];
            sum = j == 0 ? first_source<T>(source[r], factor) : add_source<T>(sum, source[r], factor);
          }
        }
      };
      if constexpr (Kind::IS_PAIR) {
        add(0);
        add(1);
      } else {
#pragma unroll
        for (int j = 0; j < MOST_SOURCES; ++j)
          if (j < sources)
            add(j);
      }
      uint32_t weight[Tile::DOWN][4];
#pragma unroll
      for (int down = 0; down < Tile::DOWN; ++down) {
        // Past the sum's end sources are 0, but an infinite coefficient makes that nan.
        if (first_k + E::MMA_DEPTH > depth) {
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int k = first_k + r / 2 * (E::MMA_DEPTH / 2) + lane % 4 * E::IN_REGISTER;
            float2 &sum = mixed[down][r];
            sum = {k < depth ? sum.x : 0.0f, k + 1 < depth ? sum.y : 0.0f};
          }
        }
#pragma unroll
        for (int r = 0; r < 4; ++r)
          weight[down][r] = operand<T>(pack<T>(mixed[down][r]));
      }
      multiply_add<T, Tile, Activation>(sums, weight, from + sources * Weight::BYTES, warp_column, s, lane);
    }
  };
  pipeline(steps, p.stages, load, multiply);

  // Epilogue: 32 columns of each warp at a time through shared memory, as rows of features, then 16 bytes a thread.
  constexpr int PITCH = Tile::ROWS + 4; // floats: lanes of a row and a column of the sums lie in different banks
  constexpr int OUT_CHUNKS = Tile::ROWS / E::IN_CHUNK;
  static_assert(Tile::THREADS % OUT_CHUNKS == 0, "a thread's chunks have the same features");
  auto *staged = reinterpret_cast<float *>(shared);
  const int feature = first_feature + thread % OUT_CHUNKS * E::IN_CHUNK;
  const int inside = min(p.features - feature, E::IN_CHUNK);
  const int64_t out_feature = int64_t(group) * p.features + feature;
  float bias[E::IN_CHUNK] = {};
  if (p.biases[0] != 0 && p.splits == 1) {
    for (int e = 0; e < inside; ++e)
      bias[e] = mixed_bias<T>(p, out_feature + e);
  }
#pragma unroll
  for (int pass = 0; pass < Tile::ACROSS / 4; ++pass) {
    if (pass > 0)
      __syncthreads();
#pragma unroll
    for (int down = 0; down < Tile::DOWN; ++down)
#pragma unroll
      for (int across = 0; across < 4; ++across)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int column = warp % Tile::WARPS_OVER_COLUMNS * 32 + 8 * across + 2 * (lane % 4) + r % 2;
          staged[column * PITCH + warp_row + 16 * down + lane / 4 + r / 2 * 8] = sums[down][4 * pass + across][r];
        }
    __syncthreads();
    for (int column = thread / OUT_CHUNKS; column < 32 * Tile::WARPS_OVER_COLUMNS;
         column += Tile::THREADS / OUT_CHUNKS) {
      const int pixel = first_pixel + column / 32 * Tile::WARP_COLUMNS + 32 * pass + column % 32;
      if (pixel >= p.pixels || inside <= 0)
        continue;
      const float *from = staged + column * PITCH + feature - first_feature;
      if (p.splits > 1) {
        auto *to = reinterpret_cast<float *>(p.out) + (int64_t(split) * p.pixels + pixel) * p.groups * p.features +
                   out_feature;
        if (p.vector_out && inside == E::IN_CHUNK) {
#pragma unroll
          for (int e = 0; e < E::IN_CHUNK; e += 4)
            *reinterpret_cast<float4 *>(to + e) = *reinterpret_cast<const float4 *>(from + e);
        } else {
          for (int e = 0; e < inside; ++e)
            to[e] = from[e];
        }
        continue;
      }
      auto *to = reinterpret_cast<T *>(p.out) + Place::out_offset(g, p.out_strides, pixel);
      if (p.vector_out && inside == E::IN_CHUNK) {
        uint32_t packed[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int e = r * E::IN_REGISTER, f = e + E::IN_REGISTER - 1;
          packed[r] = pack<T>({from[e] + bias[e], from[f] + bias[f]});
        }
        *reinterpret_cast<uint4 *>(to + out_feature) = {packed[0], packed[1], packed[2], packed[3]};
      } else {
        for (int e = 0; e < inside; ++e)
          to[(out_feature + e) * p.out_strides[1]] = rounded<T>(from[e] + bias[e]);
      }
    }
  }
}

// One thread for each IN_CHUNK features of a pixel.
template <class T, class Place> __device__ void reduce_product(const ProductReduction &r) {
  const Product &p = r.product;
  const int64_t features = int64_t(p.groups) * p.features, size = p.pixels * features;
  for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < size; at += int64_t(gridDim.x) * blockDim.x) {
    const int64_t pixel = at / features, feature = at % features;
    float sum = 0.0f;
    for (int split = 0; split < p.splits; ++split)
      sum += reinterpret_cast<const float *>(r.partial)[split * size + at];
    if (p.biases[0] != 0)
      sum += mixed_bias<T>(p, feature);
    reinterpret_cast<T *>(
        p.out)[Place::out_offset(p.geometry, p.out_strides, int(pixel)) + feature * p.out_strides[1]] = rounded<T>(sum);
  }
}

} // namespace rl_kernels
