// out (tokens, features) = activation W^T for at most 16 tokens, which takes as long as the sources' bytes take to
// arrive: each is read once, 16 at a time, and mixed in the registers it arrives in. Forward and, with TRANSPOSED,
// dgrad of linear layers; Product's correlation, groups, stages and vector_out are not used.
//
// A sum may be taken in any order, if both operands agree on it, and the result's rows may lie in any. So a lane's 16
// bytes of a row are the registers of two matrix instructions as they are, without shared memory in between.
#pragma once

#include "product.cuh"

namespace rl_kernels::cuda {

// How a block, whose warps all have the same features and divide the sum, goes along the sum.
template <class T, bool TRANSPOSED> struct SkinnyTile {
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

// A block's features of all tokens, or a split's share of them.
template <class T, int TOKENS, bool TRANSPOSED, class Kind> class SkinnyKernel {
  using E = Element<T>;
  using Tile = SkinnyTile<T, TRANSPOSED>;
  static constexpr int ACROSS = TOKENS / 8; // matrix instructions over tokens
  static_assert(TOKENS == 8 || TOKENS == 16);
  static constexpr int SOURCES = Kind::IS_PAIR ? 2 : MAX_SOURCES; // at most
  static constexpr int PITCH = Tile::FEATURES + 4; // floats: two tokens' sums of equal lanes lie in different banks

public:
  using Params = Product;
  // Twice the threads leave 128 registers a thread, so that two blocks fit a multiprocessor.
  static constexpr int MAX_THREADS = Tile::THREADS * (TOKENS == 8 && Kind::IS_PAIR ? 2 : 1);
  static constexpr LaunchFacts FACTS = {
      .threads = Tile::THREADS,
      .rows = Tile::FEATURES,
      .columns = TOKENS,
      .depth_bytes = Tile::TURN * E::BYTES,
      .kept_bytes = Tile::WARPS * TOKENS * PITCH * int(sizeof(float)),
  };

  static __device__ void run(const Product &p) {
    // Shared memory: each warp's sums, to be added.
    __shared__ float shared[Tile::WARPS][TOKENS][PITCH];
    static_assert(sizeof(shared) == FACTS.kept_bytes);
    SkinnyKernel block(p);
    block.sum();
    block.finish(shared);
  }

private:
  template <int CHUNKS> using Chunks = uint32_t[CHUNKS][Tile::ROWS][4]; // of a source's rows, as they arrive
  template <int CHUNKS> using Mixed = float2[CHUNKS][Tile::ROWS][4];
  template <int CHUNKS> using Tokens = uint32_t[CHUNKS][ACROSS][4];

  const Product &p_;
  const int lane_ = threadIdx.x % 32, warp_ = threadIdx.x / 32;
  const int split_ = blockIdx.z;
  const int first_feature_ = blockIdx.x * Tile::FEATURES;
  const int depth_, begin_, end_; // of the sum, and this split's part of it
  const int sources_;
  const bool vectors_; // whether every row of this block's features can be read by 16 bytes, wherever the sum's end is
  // A lane's rows of the sources are features, or have IN_CHUNK features each.
  const int feature_ = first_feature_ + lane_ / 4 * (TRANSPOSED ? E::IN_CHUNK : 1);
  const T *tokens_[ACROSS];
  // Coefficients: of all, or of a lane's rows; those of dgrad differ along the sum.
  float factors_[MAX_SOURCES][Kind::IS_PAIR || TRANSPOSED ? 1 : Tile::ROWS];
  float sums_[Tile::DOWN][ACROSS][4] = {};

  __device__ explicit SkinnyKernel(const Product &p)
      : p_(p), depth_(p.channels), begin_(split_ * p.steps * Tile::TURN),
        end_(min(begin_ + p.steps * Tile::TURN, depth_)), sources_(Kind::IS_PAIR ? 2 : p.recipe.sources),
        vectors_((p.recipe.vectors & ((1 << sources_) - 1)) == (1 << sources_) - 1 && p.vector_activation &&
                 (!TRANSPOSED || p.features % E::IN_CHUNK == 0 || first_feature_ + Tile::FEATURES <= p.features)) {
#pragma unroll
    for (int across = 0; across < ACROSS; ++across)
      tokens_[across] = reinterpret_cast<const T *>(p.activation) +
                        min(8 * across + lane_ / 4, p.pixels - 1) * p.activation_strides[0];
#pragma unroll
    for (int j = 0; j < SOURCES; ++j) {
      if constexpr (Kind::IS_PAIR) {
        factors_[j][0] = coefficient(p.recipe, j, 0);
      } else if constexpr (!TRANSPOSED) {
#pragma unroll
        for (int i = 0; i < Tile::ROWS; ++i)
          if (j < sources_)
            factors_[j][i] = coefficient(p.recipe, j, min(feature_ + 8 * i, p.features - 1));
      }
    }
  }

  // Row i of a lane's rows of source j. Those past the last are read again instead: nothing comes of them.
  __device__ const T *row(int j, int i) const {
    auto *weight = reinterpret_cast<const T *>(p_.recipe.weights[j]);
    const int inside = TRANSPOSED ? (vectors_ ? min(feature_, p_.features - E::IN_CHUNK) : feature_)
                                  : min(feature_ + 8 * i, p_.features - 1);
    return weight + inside * p_.recipe.strides[j][0];
  }

  // That of source j for row i and position k.
  __device__ float factor(int j, int i, int k) const {
    if constexpr (!Kind::IS_PAIR && TRANSPOSED)
      return coefficient(p_.recipe, j, min(k, depth_ - 1));
    else
      return factors_[j][Kind::IS_PAIR ? 0 : i];
  }

  // The position of row i of chunk c, where a lane's first is `at`.
  __device__ static int position(int at, int c, int i) { return at + c * Tile::CHUNK + (TRANSPOSED ? i : 0); }

  // Main loop: chunks of the sources' rows and of the tokens are loaded, mixed and multiplied.

  __device__ void sum() {
    int k = begin_ + warp_ * Tile::SPAN;
    if (vectors_) {
      for (; k + Tile::SPAN <= end_; k += Tile::WARPS * Tile::SPAN)
        take<true, Tile::CHUNKS>(k);
    }
    for (; k < end_; k += Tile::WARPS * Tile::SPAN) {
      for (int chunk = k; chunk < min(k + Tile::SPAN, end_); chunk += Tile::CHUNK) {
        if (vectors_ && chunk + Tile::CHUNK <= end_)
          take<true, 1>(chunk);
        else
          take<false, 1>(chunk);
      }
    }
  }

  // Adds the products of the positions from k on; WHOLE: all of them are there, and 16 bytes may be read at once.
  template <bool WHOLE, int CHUNKS> __device__ void take(int k) {
    const int at = k + lane_ % 4 * E::IN_CHUNK; // the first of this lane's positions
    Tokens<CHUNKS> tokens;
    load_tokens<WHOLE>(tokens, at);
    Mixed<CHUNKS> mixed;
    if constexpr (Kind::IS_PAIR) {
      Chunks<CHUNKS> first, second;
      load<WHOLE>(first, 0, at);
      load<WHOLE>(second, 1, at);
      add(mixed, first, 0, at);
      add(mixed, second, 1, at);
    } else {
#pragma unroll
      for (int j = 0; j < MAX_SOURCES; ++j)
        if (j < sources_) {
          Chunks<CHUNKS> rows;
          load<WHOLE>(rows, j, at);
          add(mixed, rows, j, at);
        }
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      if constexpr (!WHOLE)
        clear_past_end(mixed[c], at + c * Tile::CHUNK);
      multiply(mixed[c], tokens[c]);
    }
  }

  template <bool WHOLE, int CHUNKS> __device__ void load_tokens(uint32_t (&to)[CHUNKS][ACROSS][4], int at) const {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
      for (int across = 0; across < ACROSS; ++across) {
        const int here = at + c * Tile::CHUNK;
        if constexpr (WHOLE)
          ptx::ld_global_nc(to[c][across], tokens_[across] + here);
        else
          load_chunk<T>(to[c][across], tokens_[across] + here * p_.activation_strides[1], p_.activation_strides[1],
                        depth_ - here, p_.vector_activation);
      }
  }

  template <bool WHOLE, int CHUNKS> __device__ void load(uint32_t (&to)[CHUNKS][Tile::ROWS][4], int j, int at) const {
    const int64_t stride = p_.recipe.strides[j][1];
    const bool vector = p_.recipe.vectors >> j & 1;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
      for (int i = 0; i < Tile::ROWS; ++i) {
        const int here = position(at, c, i);
        if constexpr (WHOLE)
          ptx::ld_global_once(to[c][i], row(j, i) + (TRANSPOSED ? here * stride : here));
        else if constexpr (TRANSPOSED)
          load_chunk<T>(to[c][i], row(j, i) + here * stride, p_.recipe.strides[j][0],
                        here < depth_ ? p_.features - feature_ : 0, vector);
        else
          load_chunk<T>(to[c][i], row(j, i) + here * stride, stride, depth_ - here, vector);
      }
  }

  template <int CHUNKS>
  __device__ void add(float2 (&mixed)[CHUNKS][Tile::ROWS][4], const uint32_t (&from)[CHUNKS][Tile::ROWS][4], int j,
                      int at) const {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
      for (int i = 0; i < Tile::ROWS; ++i) {
        const float one = factor(j, i, position(at, c, i));
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          float2 &sum = mixed[c][i][r];
          sum = j == 0 ? first_source<T>(from[c][i][r], {one, one}) : add_source<T>(sum, from[c][i][r], {one, one});
        }
      }
  }

  // Past the sum's end sources are 0, but an infinite coefficient makes that nan.
  __device__ void clear_past_end(float2 (&mixed)[Tile::ROWS][4], int at) const {
#pragma unroll
    for (int i = 0; i < Tile::ROWS; ++i)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int x = position(at, 0, i) + (TRANSPOSED ? 0 : r * E::IN_REGISTER), y = TRANSPOSED ? x : x + 1;
        float2 &sum = mixed[i][r];
        sum = {x < depth_ ? sum.x : 0.0f, y < depth_ ? sum.y : 0.0f};
      }
  }

  __device__ void multiply(const float2 (&mixed)[Tile::ROWS][4], const uint32_t (&tokens)[ACROSS][4]) {
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
            pair = mixed[2 * down + r % 2][along];
          else if constexpr (sizeof(T) == 4)
            pair = mixed[along][2 * down + r % 2];
          else if (r % 2 == 0)
            pair = {mixed[2 * along][down].x, mixed[2 * along + 1][down].x};
          else
            pair = {mixed[2 * along][down].y, mixed[2 * along + 1][down].y};
          weight[r] = operand<T>(pack<T>(pair));
        }
#pragma unroll
        for (int across = 0; across < ACROSS; ++across)
          ptx::mma<T>(sums_[down][across], weight, operand<T>(tokens[across][2 * s]),
                      operand<T>(tokens[across][2 * s + 1]));
      }
  }

  // Epilogue: the warps' sums are added in their order, a result a thread.
  __device__ void finish(float (&shared)[Tile::WARPS][TOKENS][PITCH]) const {
#pragma unroll
    for (int down = 0; down < Tile::DOWN; ++down)
#pragma unroll
      for (int across = 0; across < ACROSS; ++across)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int token = 8 * across + 2 * (lane_ % 4) + r % 2, half = r / 2;
          const int column = TRANSPOSED ? lane_ / 4 * E::IN_CHUNK + 2 * down + half : 16 * down + lane_ / 4 + 8 * half;
          shared[warp_][token][column] = sums_[down][across][r];
        }
    __syncthreads();
    for (int i = threadIdx.x; i < TOKENS * Tile::FEATURES; i += Tile::THREADS) {
      const int token = i / Tile::FEATURES, column = i % Tile::FEATURES;
      const int64_t out_feature = first_feature_ + column;
      if (token >= p_.pixels || out_feature >= p_.features)
        continue;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < Tile::WARPS; ++w)
        sum += shared[w][token][column];
      if (p_.splits > 1) {
        reinterpret_cast<float *>(p_.out)[(int64_t(split_) * p_.pixels + token) * p_.features + out_feature] = sum;
        continue;
      }
      if (p_.biases[0] != 0)
        sum += mixed_bias<T>(p_, out_feature);
      reinterpret_cast<T *>(p_.out)[token * p_.out_strides[0] + out_feature * p_.out_strides[1]] = rounded<T>(sum);
    }
  }
};

} // namespace rl_kernels::cuda
