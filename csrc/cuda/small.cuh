// out (tokens, features) = activation W^T for at most 16 tokens, which takes as long as the sources' bytes take to
// arrive: each is read once, 16 at a time, and mixed in the registers it arrives in. Forward and, with TRANSPOSED,
// dgrad of linear layers; Product's geometry, groups, stages and vector_out are not used.
//
// A sum may be taken in any order, if both operands agree on it, and the result's rows may lie in any. So a lane's 16
// bytes of a row are the registers of two matrix instructions as they are, without shared memory in between.
#pragma once

#include "product.cuh"

namespace rl_kernels {

// How a block, whose warps all have the same features and divide the sum, goes along the sum.
template <class T, bool TRANSPOSED> struct SmallTile {
  static constexpr int WARPS = 8, THREADS = 32 * WARPS;
  static constexpr int CHUNK = 4 * Element<T>::IN_CHUNK; // positions of the sum that lanes of a warp have 16 bytes of
  static constexpr int ROWS = TRANSPOSED ? Element<T>::IN_CHUNK : 4;     // of a source, in one chunk of a lane
  static constexpr int CHUNKS = 8 / ROWS;                                // under way at once: 8 loads a source
  static constexpr int SPAN = CHUNKS * CHUNK;                            // positions of a warp at once
  static constexpr int DOWN = TRANSPOSED ? Element<T>::IN_CHUNK / 2 : 2; // matrix instructions over features
  static constexpr int FEATURES = 16 * DOWN;                             // of a block
  static constexpr int TURN = 16 * CHUNK;                                // positions; what p.steps counts
  static_assert(TURN % (WARPS * SPAN) == 0, "splits begin where a warp's span does");
};

template <class T, int TOKENS, bool TRANSPOSED, class Kind> __device__ void small_product(const Product &p) {
  using E = Element<T>;
  using Tile = SmallTile<T, TRANSPOSED>;
  constexpr int ACROSS = TOKENS / 8; // matrix instructions over tokens
  static_assert(TOKENS == 8 || TOKENS == 16);

  // Shared memory: each warp's sums, to be added.
  constexpr int PITCH = Tile::FEATURES + 4; // two tokens' sums of equal lanes lie in different banks
  __shared__ float shared[Tile::WARPS][TOKENS][PITCH];

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int split = blockIdx.z;
  const int first_feature = blockIdx.x * Tile::FEATURES;
  const int depth = p.channels;
  const int begin = split * p.steps * Tile::TURN, end = min(begin + p.steps * Tile::TURN, depth);
  const int sources = Kind::IS_PAIR ? 2 : p.recipe.sources;

  // Whether every row of this block's features can be read by 16 bytes, wherever the sum's end is.
  const int all = (1 << sources) - 1;
  const bool vectors = (p.recipe.vectors & all) == all && p.vector_activation &&
                       (!TRANSPOSED || p.features % E::IN_CHUNK == 0 || first_feature + Tile::FEATURES <= p.features);

  // A lane's rows of the sources are features, or have IN_CHUNK features each. Those past the last are read again
  // instead: nothing comes of them.
  const int feature = first_feature + lane / 4 * (TRANSPOSED ? E::IN_CHUNK : 1);
  auto row = [&](int j, int i) {
    auto *weight = reinterpret_cast<const T *>(p.recipe.weights[j]);
    const int inside = TRANSPOSED ? (vectors ? min(feature, p.features - E::IN_CHUNK) : feature)
                                  : min(feature + 8 * i, p.features - 1);
    return weight + inside * p.recipe.strides[j][0];
  };
  const T *columns[ACROSS];
#pragma unroll
  for (int across = 0; across < ACROSS; ++across)
    columns[across] =
        reinterpret_cast<const T *>(p.activation) + min(8 * across + lane / 4, p.pixels - 1) * p.activation_strides[0];

  // Coefficients: of all, or of a lane's rows; those of dgrad differ along the sum.
  float factors[MOST_SOURCES][Kind::IS_PAIR || TRANSPOSED ? 1 : Tile::ROWS];
#pragma unroll
  for (int j = 0; j < (Kind::IS_PAIR ? 2 : MOST_SOURCES); ++j) {
    if constexpr (Kind::IS_PAIR) {
      factors[j][0] = coefficient(p.recipe, j, 0);
    } else if constexpr (!TRANSPOSED) {
#pragma unroll
      for (int i = 0; i < Tile::ROWS; ++i)
        if (j < sources)
          factors[j][i] = coefficient(p.recipe, j, min(feature + 8 * i, p.features - 1));
    }
  }
  auto factor = [&](int j, int i, int k) {
    if constexpr (!Kind::IS_PAIR && TRANSPOSED)
      return coefficient(p.recipe, j, min(k, depth - 1));
    else
      return factors[j][Kind::IS_PAIR ? 0 : i];
  };

  // Main loop: chunks of the sources' rows and of the tokens are loaded, mixed and multiplied.
  float sums[Tile::DOWN][ACROSS][4] = {};
  auto take = [&](auto whole, auto chunks, int k) {
    constexpr int CHUNKS = chunks;
    const int at = k + lane % 4 * E::IN_CHUNK; // the first of this lane's positions
    auto position = [&](int c, int i) { return at + c * Tile::CHUNK + (TRANSPOSED ? i : 0); };
    using Rows = uint32_t[CHUNKS][Tile::ROWS][4];
    auto load = [&](Rows &to, int j) {
      const int64_t stride = p.recipe.strides[j][1];
      const bool vector = p.recipe.vectors >> j & 1;
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
        for (int i = 0; i < Tile::ROWS; ++i) {
          const int here = position(c, i);
          if constexpr (whole)
            ptx::ld_global_once(to[c][i], row(j, i) + (TRANSPOSED ? here * stride : here));
          else if constexpr (TRANSPOSED)
            load_chunk<T>(to[c][i], row(j, i) + here * stride, p.recipe.strides[j][0],
                          here < depth ? p.features - feature : 0, vector);
          else
            load_chunk<T>(to[c][i], row(j, i) + here * stride, stride, depth - here, vector);
        }
    };
    float2 mixed[CHUNKS][Tile::ROWS][4];
    auto add = [&](const Rows &from, int j) {
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
        for (int i = 0; i < Tile::ROWS; ++i) {
          const float one = factor(j, i, position(c, i));
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            float2 &sum = mixed[c][i][r];
            sum = j == 0 ? first_source<T>(from[c][i][r], {one, one}) : add_source<T>(sum, from[c][i][r], {one, one});
          }
        }
    };

    uint32_t tokens[CHUNKS][ACROSS][4];
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
      for (int across = 0; across < ACROSS; ++across) {
        const int here = at + c * Tile::CHUNK;
        if constexpr (whole)
          ptx::ld_global_nc(tokens[c][across], columns[across] + here);
        else
          load_chunk<T>(tokens[c][across], columns[across] + here * p.activation_strides[1], p.activation_strides[1],
                        depth - here, p.vector_activation);
      }
    if constexpr (Kind::IS_PAIR) {
      Rows first, second;
      load(first, 0);
      load(second, 1);
      add(first, 0);
      add(second, 1);
    } else {
#pragma unroll
      for (int j = 0; j < MOST_SOURCES; ++j)
        if (j < sources) {
          Rows rows;
          load(rows, j);
          add(rows, j);
        }
    }

#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      // Past the sum's end sources are 0, but an infinite coefficient makes that nan.
      if constexpr (!whole) {
#pragma unroll
        for (int i = 0; i < Tile::ROWS; ++i)
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int x = position(c, i) + (TRANSPOSED ? 0 : r * E::IN_REGISTER), y = TRANSPOSED ? x : x + 1;
            float2 &sum = mixed[c][i][r];
            sum = {x < depth ? sum.x : 0.0f, y < depth ? sum.y : 0.0f};
          }
      }
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int down = 0; down < Tile::DOWN; ++down) {
          // Register r is of row lane / 4 + 8 (r % 2), and of the positions that register 2 s + r / 2 of tokens is of.
          uint32_t weight[4];
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int along = 2 * s + r / 2;
            float2 pair;
            if constexpr (!TRANSPOSED)
              pair = mixed[c][2 * down + r % 2][along];
            else if constexpr (sizeof(T) == 4)
              pair = mixed[c][along][2 * down + r % 2];
            else if (r % 2 == 0)
              pair = {mixed[c][2 * along][down].x, mixed[c][2 * along + 1][down].x};
            else
              pair = {mixed[c][2 * along][down].y, mixed[c][2 * along + 1][down].y};
            weight[r] = operand<T>(pack<T>(pair));
          }
#pragma unroll
          for (int across = 0; across < ACROSS; ++across)
            ptx::mma<T>(sums[down][across], weight, operand<T>(tokens[c][across][2 * s]),
                        operand<T>(tokens[c][across][2 * s + 1]));
        }
    }
  };
  constexpr auto WHOLE = std::true_type{};
  constexpr auto ONE = std::integral_constant<int, 1>{};
  int k = begin + warp * Tile::SPAN;
  if (vectors) {
    for (; k + Tile::SPAN <= end; k += Tile::WARPS * Tile::SPAN)
      take(WHOLE, std::integral_constant<int, Tile::CHUNKS>{}, k);
  }
  for (; k < end; k += Tile::WARPS * Tile::SPAN) {
    for (int chunk = k; chunk < min(k + Tile::SPAN, end); chunk += Tile::CHUNK) {
      if (vectors && chunk + Tile::CHUNK <= end)
        take(WHOLE, ONE, chunk);
      else
        take(std::false_type{}, ONE, chunk);
    }
  }

  // Epilogue: the warps' sums are added in their order, a result a thread.
#pragma unroll
  for (int down = 0; down < Tile::DOWN; ++down)
#pragma unroll
    for (int across = 0; across < ACROSS; ++across)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int token = 8 * across + 2 * (lane % 4) + r % 2, half = r / 2;
        const int column = TRANSPOSED ? lane / 4 * E::IN_CHUNK + 2 * down + half : 16 * down + lane / 4 + 8 * half;
        shared[warp][token][column] = sums[down][across][r];
      }
  __syncthreads();
  for (int i = thread; i < TOKENS * Tile::FEATURES; i += Tile::THREADS) {
    const int token = i / Tile::FEATURES, column = i % Tile::FEATURES;
    const int64_t out_feature = first_feature + column;
    if (token >= p.pixels || out_feature >= p.features)
      continue;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < Tile::WARPS; ++w)
      sum += shared[w][token][column];
    if (p.splits > 1) {
      reinterpret_cast<float *>(p.out)[(int64_t(split) * p.pixels + token) * p.features + out_feature] = sum;
      continue;
    }
    if (p.biases[0] != 0)
      sum += mixed_bias<T>(p, out_feature);
    reinterpret_cast<T *>(p.out)[token * p.out_strides[0] + out_feature * p.out_strides[1]] = rounded<T>(sum);
  }
}

} // namespace rl_kernels
