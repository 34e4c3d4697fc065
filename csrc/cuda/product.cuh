// out (pixels, features) = activation W^T, computed transposed: the mixed weight is the matrix instructions' first
// operand and never exists but in registers. Forward and, with TRANSPOSED, dgrad; linear layers and convolutions.
#pragma once

#include "registry.h"
#include "tile.cuh"

namespace rl_kernels::cuda {

// Two sources with a scalar each: the recipe of Replacement Learning.
struct Pair {
  static constexpr bool IS_PAIR = true;
};
// Up to four, with any strides of the coefficients.
struct General {
  static constexpr bool IS_PAIR = false;
};

// The coefficients of a lane's elements of a first operand.
template <class T, class Tile, class Addressing, bool TRANSPOSED, class Kind> class Factors {
public:
  // first: the lane's warp's first feature.
  __device__ Factors(const Product &p, int first, int lane) : p_(p), lane_(lane) {
    if constexpr (Kind::IS_PAIR) {
      a_ = coefficient(p.recipe, 0, 0);
      b_ = coefficient(p.recipe, 1, 0);
    } else if constexpr (!TRANSPOSED) {
#pragma unroll
      for (int j = 0; j < MAX_SOURCES; ++j)
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
        int64_t channel = int64_t(blockIdx.y) * p_.channels + Addressing::channel(p_.correlation, min(at, k_end - 1));
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
  float rows_[MAX_SOURCES][2 * Tile::DOWN];
  float step_[PER_STEP]; // of the source and step at hand
};

// A block's tile of a product.
template <class T, class Tile, class Addressing, bool TRANSPOSED, class Kind> class ProductKernel {
  using E = Element<T>;
  using Weight = std::conditional_t<TRANSPOSED, DepthOuter<T, Tile::ROWS>, DepthInner<T, Tile::ROWS>>;
  using Activation = DepthInner<T, Tile::COLUMNS>;
  using Sums = typename Tile::Sums;
  using Pixel = typename Addressing::Pixel;
  using CoefficientsOfLane = Factors<T, Tile, Addressing, TRANSPOSED, Kind>;

  // Copies: chunks of a row along the sum, of a row of the weights' tile, and how many pixels' chunks a thread copies.
  static constexpr int CHUNKS = STEP_BYTES / CHUNK_BYTES;
  static constexpr int WEIGHT_CHUNKS = TRANSPOSED ? Tile::ROWS / E::IN_CHUNK : CHUNKS;
  static constexpr int WEIGHT_ROWS = TRANSPOSED ? E::TILE_DEPTH : Tile::ROWS;
  static constexpr int PIXELS = Tile::COLUMNS * CHUNKS / Tile::THREADS;
  static constexpr int WEIGHT_STEP = Tile::THREADS / WEIGHT_CHUNKS, PIXEL_STEP = Tile::THREADS / CHUNKS; // in rows
  static constexpr int SOURCES = Kind::IS_PAIR ? 2 : MAX_SOURCES, WEIGHT_COPIES = WEIGHT_ROWS / WEIGHT_STEP;
  static constexpr int POINTERS = TRANSPOSED ? 1 : WEIGHT_COPIES; // rows across the sum are equally far apart
  static_assert(Tile::THREADS % CHUNKS == 0 && Tile::THREADS % WEIGHT_CHUNKS == 0,
                "a thread copies one column of chunks");
  static_assert(WEIGHT_STEP % (TRANSPOSED && sizeof(T) == 4 ? 4 : 8) == 0 && PIXEL_STEP % 8 == 0,
                "and its chunks are swapped alike in all rows");
  static_assert(PIXELS * Tile::THREADS == Tile::COLUMNS * CHUNKS, "threads copy equally many");

  // Epilogue: 32 columns of each warp beside another, as rows of floats.
  static constexpr int PITCH = Tile::ROWS + 4; // lanes of a row and a column of the sums lie in different banks
  static constexpr int STAGED_COLUMNS = 32 * Tile::WARPS_OVER_COLUMNS;
  static constexpr int OUT_CHUNKS = Tile::ROWS / E::IN_CHUNK;
  static_assert(Tile::THREADS % OUT_CHUNKS == 0, "a thread's chunks have the same features");

public:
  using Params = Product;
  static constexpr int MAX_THREADS = Tile::THREADS;
  static constexpr LaunchFacts FACTS = {
      .threads = Tile::THREADS,
      .rows = Tile::ROWS,
      .columns = Tile::COLUMNS,
      .depth_bytes = STEP_BYTES,
      .stage_bytes = Activation::BYTES,
      .source_bytes = Weight::BYTES,
      .epilogue_bytes = STAGED_COLUMNS * PITCH * int(sizeof(float)),
      .kept_bytes = Addressing::KEPT ? Tile::COLUMNS * int(sizeof(Pixel)) : 0,
  };

  static __device__ void run(const Product &p) {
    // Shared memory: `stages` times every source's tile and the activation's; then the epilogue's floats.
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ Pixel kept[Addressing::KEPT ? Tile::COLUMNS : 1];
    ProductKernel block(p, shared, kept);
    block.keep_pixels();
    CoefficientsOfLane factors(p, block.first_feature_ + block.warp_row_, block.lane_);
    Sums sums = {};
    pipeline(
        block.steps_, p.stages, ptx::shared_address(shared), block.stage_bytes_,
        [&](int step, uint32_t to) { block.load(step, to); },
        [&](int step, uint32_t from) { block.multiply(sums, factors, step, from); });
    block.finish(sums);
  }

private:
  const Product &p_;
  uint8_t *const shared_;
  Pixel *const kept_;
  const int thread_ = threadIdx.x, lane_ = thread_ % 32, warp_ = thread_ / 32;
  const int group_ = blockIdx.y, split_ = blockIdx.z;
  const int sources_, stage_bytes_;
  const int warp_row_ = warp_ / Tile::WARPS_OVER_COLUMNS * Tile::WARP_ROWS;
  const int warp_column_ = warp_ % Tile::WARPS_OVER_COLUMNS * Tile::WARP_COLUMNS;
  const int depth_, first_step_, steps_;
  const bool whole_taps_;     // whether steps lie within a tap
  const int whole_steps_;     // before the one in which the sum ends
  const int vector_steps_;    // of which every operand may be copied 16 bytes at a time, its rows in equal steps
  const T *const activation_; // the group's
  int first_feature_, first_pixel_;
  // Where a thread's chunks of the next step lie, if it is a whole one, within the same tap.
  const T *from_[SOURCES][POINTERS], *pixels_[PIXELS];
  int bytes_; // of a chunk of a source's row along the sum, that there are
  // In a stage: where a thread copies to, and where a lane reads.
  const int source_at_, activation_at_, rows_at_, columns_at_;
  // Of a convolution: how many bytes of each pixel's chunk are no padding, and the next step's first channel.
  int pixel_bytes_[PIXELS], channel_;

  __device__ ProductKernel(const Product &p, uint8_t *shared, Pixel *kept)
      : p_(p), shared_(shared), kept_(kept), sources_(Kind::IS_PAIR ? 2 : p.recipe.sources),
        stage_bytes_(sources_ * Weight::BYTES + Activation::BYTES), depth_(p.channels * taps_of(p.correlation)),
        first_step_(split_ * p.steps), steps_(min(p.steps, (depth_ + E::TILE_DEPTH - 1) / E::TILE_DEPTH - first_step_)),
        whole_taps_(!Addressing::KEPT || p.channels % E::TILE_DEPTH == 0),
        whole_steps_(depth_ / E::TILE_DEPTH - first_step_),
        vector_steps_(p.vector_activation && p.recipe.vectors == (1 << sources_) - 1 && (!TRANSPOSED || whole_taps_)
                          ? whole_steps_
                          : 0),
        activation_(reinterpret_cast<const T *>(p.activation) + int64_t(group_) * p.channels * p.activation_strides[1]),
        source_at_(in_register(Weight::offset(thread_ / WEIGHT_CHUNKS, thread_ % WEIGHT_CHUNKS))),
        activation_at_(in_register(sources_ * Weight::BYTES + Activation::offset(thread_ / CHUNKS, thread_ % CHUNKS))),
        rows_at_(in_register(Weight::of_rows(warp_row_, lane_))),
        columns_at_(in_register(sources_ * Weight::BYTES + Activation::of_columns(warp_column_, lane_))) {
    const int2 tile =
        tile_of(blockIdx.x, (p.features + Tile::ROWS - 1) / Tile::ROWS, (p.pixels + Tile::COLUMNS - 1) / Tile::COLUMNS);
    first_feature_ = tile.x * Tile::ROWS;
    first_pixel_ = tile.y * Tile::COLUMNS;
    const int features = p.features - first_feature_ - thread_ % WEIGHT_CHUNKS * E::IN_CHUNK;
    bytes_ = in_register(min(max(features, 0), E::IN_CHUNK) * E::BYTES);
    if constexpr (Addressing::KEPT)
      channel_ = p.channels; // so that the first step's tap is found
    else
      find_chunks(first_step_ * E::TILE_DEPTH);
  }

  // Where pixels lie is computed once, and kept where it takes more than a product.
  __device__ void keep_pixels() const {
    if constexpr (Addressing::KEPT) {
      for (int i = thread_; i < Tile::COLUMNS; i += Tile::THREADS)
        kept_[i] = Addressing::pixel(p_.correlation, p_.activation_strides, min(first_pixel_ + i, p_.pixels - 1));
      __syncthreads();
    }
  }

  __device__ Pixel pixel_of(int row) const {
    if constexpr (Addressing::KEPT)
      return kept_[row];
    else
      return Addressing::pixel(p_.correlation, p_.activation_strides, min(first_pixel_ + row, p_.pixels - 1));
  }

  // Copies. A thread's chunks of the activation lie in one column of the tile, and in the same rows each step.

  __device__ void load(int step, uint32_t stage) {
    const int first_k = (first_step_ + step) * E::TILE_DEPTH;
    if (step < vector_steps_) {
      copy_whole_step(stage, first_k);
      return;
    }
    uint8_t *to = shared_ + (stage - ptx::shared_address(shared_));
    for (int j = 0; j < sources_; ++j)
      load_source(to + j * Weight::BYTES, j, first_k);
    load_activation(to + sources_ * Weight::BYTES, first_k);
  }

  // Most steps: 16 bytes at a time, nothing past the sum's end. Rows past the last are copies of it, for nobody stores
  // what becomes of them.

  __device__ void find_chunks(int first_k) {
#pragma unroll
    for (int j = 0; j < SOURCES; ++j) {
      if (!Kind::IS_PAIR && j >= sources_)
        break;
      const int64_t *strides = p_.recipe.strides[j];
      const int chunk = thread_ % WEIGHT_CHUNKS * E::IN_CHUNK, first_row = thread_ / WEIGHT_CHUNKS;
      auto *weight = reinterpret_cast<const T *>(p_.recipe.weights[j]) + group_ * p_.recipe.group_strides[j] +
                     Addressing::weight_offset(p_.correlation, strides, first_k + (TRANSPOSED ? first_row : chunk));
#pragma unroll
      for (int i = 0; i < POINTERS; ++i) {
        const int row = first_row + i * WEIGHT_STEP;
        const int feature = TRANSPOSED ? first_feature_ + chunk : min(first_feature_ + row, p_.features - 1);
        from_[j][i] = weight + (feature < p_.features ? feature * strides[0] : 0);
      }
    }
    const auto at =
        Addressing::position(p_.correlation, p_.activation_strides, first_k + thread_ % CHUNKS * E::IN_CHUNK);
#pragma unroll
    for (int i = 0; i < PIXELS; ++i) {
      const auto pixel = pixel_of(thread_ / CHUNKS + i * PIXEL_STEP);
      const bool inside = Addressing::meets(p_.correlation, pixel, at);
      pixels_[i] = activation_ + (inside ? pixel.offset + at.offset : 0);
      pixel_bytes_[i] = inside ? CHUNK_BYTES : 0;
    }
  }

  __device__ void copy_whole_step(uint32_t to, int first_k) {
    if constexpr (Addressing::KEPT) {
      if (channel_ >= p_.channels) {
        find_chunks(first_k);
        channel_ = whole_taps_ ? Addressing::channel(p_.correlation, first_k) : p_.channels;
      }
      channel_ += E::TILE_DEPTH;
    }
    unrolled<SOURCES>([&](auto j) {
      if (Kind::IS_PAIR || j < sources_)
        copy_source<j>(to + source_at_);
    });
    copy_activation(to + activation_at_);
  }

  template <int J> __device__ void copy_source(uint32_t to) {
    constexpr int ROW_BYTES = TRANSPOSED ? Tile::ROWS * E::BYTES : STEP_BYTES;
    unrolled<WEIGHT_COPIES>([&](auto i) {
      constexpr int OFFSET = J * Weight::BYTES + i * WEIGHT_STEP * ROW_BYTES;
      if constexpr (TRANSPOSED) {
        ptx::cp_async<OFFSET>(to, from_[J][0], bytes_);
        from_[J][0] += WEIGHT_STEP * p_.recipe.strides[J][1];
      } else {
        ptx::cp_async<OFFSET>(to, from_[J][i]);
        from_[J][i] += E::TILE_DEPTH;
      }
    });
  }

  __device__ void copy_activation(uint32_t to) {
    unrolled<PIXELS>([&](auto i) {
      constexpr int OFFSET = i * PIXEL_STEP * STEP_BYTES;
      if constexpr (Addressing::KEPT)
        ptx::cp_async<OFFSET>(to, pixels_[i], pixel_bytes_[i]);
      else
        ptx::cp_async<OFFSET>(to, pixels_[i]);
      pixels_[i] += E::TILE_DEPTH;
    });
  }

  __device__ void load_source(uint8_t *tile, int j, int first_k) const {
    auto *weight = reinterpret_cast<const T *>(p_.recipe.weights[j]) + group_ * p_.recipe.group_strides[j];
    const int64_t *strides = p_.recipe.strides[j];
    const bool vector = p_.recipe.vectors >> j & 1;
    const int chunk = thread_ % WEIGHT_CHUNKS;
#pragma unroll
    for (int row = thread_ / WEIGHT_CHUNKS; row < WEIGHT_ROWS; row += Tile::THREADS / WEIGHT_CHUNKS) {
      uint8_t *to = tile + Weight::offset(row, chunk);
      const int k = first_k + (TRANSPOSED ? row : chunk * E::IN_CHUNK);
      const int feature = first_feature_ + (TRANSPOSED ? chunk * E::IN_CHUNK : row);
      if constexpr (TRANSPOSED) {
        const T *from = weight + Addressing::weight_offset(p_.correlation, strides, k);
        copy_chunk<T>(to, vector, k < depth_ ? min(p_.features - feature, E::IN_CHUNK) : 0, weight,
                      [&](int e) { return from + (feature + e) * strides[0]; });
      } else {
        const T *from = weight + feature * strides[0];
        copy_chunk<T>(to, vector, feature < p_.features ? min(depth_ - k, E::IN_CHUNK) : 0, weight,
                      [&](int e) { return from + Addressing::weight_offset(p_.correlation, strides, k + e); });
      }
    }
  }

  __device__ void load_activation(uint8_t *tile, int first_k) const {
    const Correlation &c = p_.correlation;
    const int chunk = thread_ % CHUNKS, k = first_k + chunk * E::IN_CHUNK;
    const auto at = Addressing::position(c, p_.activation_strides, k);
#pragma unroll
    for (int i = 0; i < PIXELS; ++i) {
      const int row = thread_ / CHUNKS + i * (Tile::THREADS / CHUNKS);
      uint8_t *to = tile + Activation::offset(row, chunk);
      const bool exists = first_pixel_ + row < p_.pixels;
      const auto pixel = pixel_of(row);
      if (p_.vector_activation) {
        // Its elements have one tap: they lie inside together.
        const int inside = exists && Addressing::meets(c, pixel, at) ? min(depth_ - k, E::IN_CHUNK) : 0;
        copy_chunk<T>(to, true, inside, activation_, [&](int) { return activation_ + pixel.offset + at.offset; });
      } else {
#pragma unroll 1
        for (int e = 0; e < E::IN_CHUNK; ++e) {
          const auto here = Addressing::position(c, p_.activation_strides, k + e);
          const bool inside = exists && k + e < depth_ && Addressing::meets(c, pixel, here);
          reinterpret_cast<T *>(to)[e] = inside ? activation_[pixel.offset + here.offset] : T(0.0f);
        }
      }
    }
  }

  // Main loop: the sources' fragments are mixed, and multiplied with the activation's.

  __device__ void multiply(Sums &sums, CoefficientsOfLane &factors, int step, uint32_t from) const {
    const uint32_t rows = from + rows_at_, columns = from + columns_at_;
    unrolled<E::TILE_DEPTH / E::MMA_DEPTH>([&](auto s) {
      uint32_t weight[Tile::DOWN][4];
      mix<s>(weight, factors, rows, step);
      multiply_add<T, Tile, Activation, s>(sums, weight, columns);
    });
  }

  // The first operands of matrix instructions S of a step.
  template <int S>
  __device__ void mix(uint32_t (&weight)[Tile::DOWN][4], CoefficientsOfLane &factors, uint32_t rows, int step) const {
    const int first_k = (first_step_ + step) * E::TILE_DEPTH + S * E::MMA_DEPTH;
    float2 mixed[Tile::DOWN][4];
    auto add = [&](auto j) {
      factors.step(j, first_k, depth_);
      unrolled<Tile::DOWN>([&](auto down) {
        uint32_t source[4];
        Weight::template first_operand<S, down, j * Weight::BYTES>(source, rows);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float2 factor = factors.of(j, down, r);
          float2 &sum = mixed[down][r];
          sum = j == 0 ? first_source<T>(source[r], factor) : add_source<T>(sum, source[r], factor);
        }
      });
    };
    unrolled<SOURCES>([&](auto j) {
      if (Kind::IS_PAIR || j < sources_)
        add(j);
    });
    // Past the sum's end sources are 0, but an infinite coefficient makes that nan.
    if (step >= whole_steps_) {
#pragma unroll
      for (int down = 0; down < Tile::DOWN; ++down)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int k = first_k + r / 2 * (E::MMA_DEPTH / 2) + lane_ % 4 * E::IN_REGISTER;
          float2 &sum = mixed[down][r];
          sum = {k < depth_ ? sum.x : 0.0f, k + 1 < depth_ ? sum.y : 0.0f};
        }
    }
#pragma unroll
    for (int down = 0; down < Tile::DOWN; ++down)
#pragma unroll
      for (int r = 0; r < 4; ++r)
        weight[down][r] = operand<T>(pack<T>(mixed[down][r]));
  }

  // Epilogue: 32 columns of each warp at a time through shared memory, as rows of features, then 16 bytes a thread.

  __device__ void finish(const Sums &sums) const {
    const int feature = first_feature_ + thread_ % OUT_CHUNKS * E::IN_CHUNK;
    const int inside = min(p_.features - feature, E::IN_CHUNK);
    float bias[E::IN_CHUNK] = {};
    if (p_.biases[0] != 0 && p_.splits == 1) {
#pragma unroll
      for (int e = 0; e < E::IN_CHUNK; ++e)
        if (e < inside)
          bias[e] = mixed_bias<T>(p_, int64_t(group_) * p_.features + feature + e);
    }
#pragma unroll
    for (int pass = 0; pass < Tile::ACROSS / 4; ++pass) {
      if (pass > 0)
        __syncthreads();
      stage_sums(sums, pass);
      __syncthreads();
      for (int column = thread_ / OUT_CHUNKS; column < STAGED_COLUMNS; column += Tile::THREADS / OUT_CHUNKS) {
        const int pixel = first_pixel_ + column / 32 * Tile::WARP_COLUMNS + 32 * pass + column % 32;
        if (pixel >= p_.pixels || inside <= 0)
          continue;
        float sum[E::IN_CHUNK];
        read_chunk<T>(sum, reinterpret_cast<float *>(shared_) + column * PITCH + feature - first_feature_, lane_);
        if (p_.splits > 1)
          store_share(sum, pixel, feature, inside);
        else
          store(sum, bias, pixel, feature, inside);
      }
    }
  }

  __device__ void stage_sums(const Sums &sums, int pass) const {
    auto *staged = reinterpret_cast<float *>(shared_);
#pragma unroll
    for (int down = 0; down < Tile::DOWN; ++down)
#pragma unroll
      for (int across = 0; across < 4; ++across)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int column = warp_ % Tile::WARPS_OVER_COLUMNS * 32 + 8 * across + 2 * (lane_ % 4) + r % 2;
          staged[column * PITCH + warp_row_ + 16 * down + lane_ / 4 + r / 2 * 8] = sums[down][4 * pass + across][r];
        }
  }

  // A chunk of features of a pixel, of which `inside` are there, as this split's share of them.
  __device__ void store_share(const float (&sum)[E::IN_CHUNK], int pixel, int feature, int inside) const {
    auto *to = reinterpret_cast<float *>(p_.out) + (int64_t(split_) * p_.pixels + pixel) * p_.groups * p_.features +
               int64_t(group_) * p_.features + feature;
    if (p_.vector_out && inside == E::IN_CHUNK) {
#pragma unroll
      for (int e = 0; e < E::IN_CHUNK; e += 4)
        *reinterpret_cast<float4 *>(to + e) = *reinterpret_cast<const float4 *>(sum + e);
    } else {
#pragma unroll
      for (int e = 0; e < E::IN_CHUNK; ++e)
        if (e < inside)
          to[e] = sum[e];
    }
  }

  // A chunk alike, as the result.
  __device__ void store(const float (&sum)[E::IN_CHUNK], const float (&bias)[E::IN_CHUNK], int pixel, int feature,
                        int inside) const {
    const int64_t out_feature = int64_t(group_) * p_.features + feature;
    auto *to = reinterpret_cast<T *>(p_.out) + Addressing::out_offset(p_.correlation, p_.out_strides, pixel);
    if (p_.vector_out && inside == E::IN_CHUNK) {
      uint32_t packed[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int e = r * E::IN_REGISTER, f = e + E::IN_REGISTER - 1;
        packed[r] = pack<T>({sum[e] + bias[e], sum[f] + bias[f]});
      }
      *reinterpret_cast<uint4 *>(to + out_feature) = {packed[0], packed[1], packed[2], packed[3]};
    } else {
#pragma unroll
      for (int e = 0; e < E::IN_CHUNK; ++e)
        if (e < inside)
          to[(out_feature + e) * p_.out_strides[1]] = rounded<T>(sum[e] + bias[e]);
    }
  }
};

// The sum of the splits' shares, and the bias: a feature of a pixel a thread.
template <class T, class Addressing> class ProductReductionKernel {
public:
  using Params = ProductReduction;
  static constexpr int MAX_THREADS = 256;
  static constexpr LaunchFacts FACTS = {.threads = MAX_THREADS};

  static __device__ void run(const ProductReduction &r) {
    const Product &p = r.product;
    const int64_t features = int64_t(p.groups) * p.features, size = p.pixels * features;
    const int64_t threads = int64_t(gridDim.x) * blockDim.x;
    for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < size; at += threads) {
      const int64_t pixel = at / features, feature = at % features;
      float sum = 0.0f;
      for (int split = 0; split < p.splits; ++split)
        sum += reinterpret_cast<const float *>(r.partial)[split * size + at];
      if (p.biases[0] != 0)
        sum += mixed_bias<T>(p, feature);
      T *out = reinterpret_cast<T *>(p.out) + Addressing::out_offset(p.correlation, p.out_strides, int(pixel));
      out[feature * p.out_strides[1]] = rounded<T>(sum);
    }
  }
};

} // namespace rl_kernels::cuda
