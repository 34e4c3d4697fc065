// out (pixels, features) = activation W^T for convolutions of few features and channels, whose whole filter fits into
// shared memory: each block mixes it once, and goes over tiles of pixels. Forward and, with TRANSPOSED, dgrad.
//
// Positions of the sum are in chunks of IN_CHUNK channels of one tap: taps, and channels within them, the last of which
// are filled up with 0. Product's steps and splits are not used.
#pragma once

#include "product.cuh"

namespace rl_kernels::cuda {

// The mixed filter in shared memory, for all steps of the sum, and how it gets there.
template <class T, class Tile, bool TRANSPOSED, class Kind> class ResidentFilter {
public:
  using E = Element<T>;
  using Operand = DepthInner<T, Tile::ROWS>;              // of a step
  static constexpr int CHUNKS = STEP_BYTES / CHUNK_BYTES; // of a step

  __device__ ResidentFilter(const Product &p, uint8_t *filter)
      : p_(p), filter_(filter), group_(blockIdx.y), sources_(Kind::IS_PAIR ? 2 : p.recipe.sources),
        taps_(taps_of(p.correlation)), of_tap_((p.channels + E::IN_CHUNK - 1) / E::IN_CHUNK) {
    if constexpr (Kind::IS_PAIR) {
      a_ = coefficient(p.recipe, 0, 0);
      b_ = coefficient(p.recipe, 1, 0);
    }
  }

  __device__ int chunks() const { return taps_ * of_tap_; }
  // At least one, so that pixels that no tap meets are written too.
  __device__ int steps() const { return max((chunks() + CHUNKS - 1) / CHUNKS, 1); }
  __device__ int bytes() const { return steps() * Operand::BYTES; }

  // Where the sum's chunk lies in the activation. The channel of one past the end is past the end.
  __device__ Pixels::Position position(int chunk) const {
    if (chunk >= chunks())
      return {p_.channels};
    const int k = chunk / of_tap_ * p_.channels + chunk % of_tap_ * E::IN_CHUNK;
    return Pixels::position(p_.correlation, p_.activation_strides, k);
  }

  __device__ void clear() {
    for (int at = threadIdx.x * 16; at < bytes(); at += Tile::THREADS * 16)
      *reinterpret_cast<uint4 *>(filter_ + at) = {0, 0, 0, 0};
  }

  // Once it is clear.
  __device__ void mix() {
    const int all = (1 << sources_) - 1;
    if ((p_.recipe.vectors & all) == all && (TRANSPOSED ? p_.features : p_.channels) % E::IN_CHUNK == 0)
      mix_all<true>();
    else
      mix_all<false>();
  }

private:
  const Product &p_;
  uint8_t *filter_;
  int group_, sources_, taps_, of_tap_;
  float a_, b_;

  __device__ float factor(int j, int feature, int channel) const {
    if constexpr (Kind::IS_PAIR)
      return j == 0 ? a_ : b_;
    const int64_t at = TRANSPOSED ? int64_t(group_) * p_.channels + channel : int64_t(group_) * p_.features + feature;
    return coefficient(p_.recipe, j, at);
  }

  // A thread mixes 16 bytes of each source at a time: of IN_CHUNK channels of a feature and tap or, transposed,
  // features of a channel and tap, as many channels as a register has. Its neighbours' lie beside them in memory.
  template <bool VECTORS> __device__ void mix_all() {
    const int units = TRANSPOSED ? (p_.channels + E::IN_REGISTER - 1) / E::IN_REGISTER : of_tap_;
    const int over = TRANSPOSED ? (p_.features + E::IN_CHUNK - 1) / E::IN_CHUNK : p_.features;
    const int size = over * units * taps_;
    // All threads go round equally often, the last ones with nothing to store.
#pragma unroll(VECTORS &&Kind::IS_PAIR ? 4 : 1)
    for (int first = 0; first < size; first += Tile::THREADS) {
      const int mine = first + int(threadIdx.x), i = min(mine, size - 1);
      const int row = i / (units * taps_), rest = i % (units * taps_);
      const int tap = VECTORS ? rest / units : rest % taps_, unit = VECTORS ? rest % units : rest / taps_;
      if constexpr (TRANSPOSED)
        mix_across<VECTORS>(row * E::IN_CHUNK, tap, unit * E::IN_REGISTER, mine < size);
      else
        mix_along<VECTORS>(row, tap, unit * E::IN_CHUNK, mine < size);
    }
  }

  // Elements along the channels or, transposed, the features, of which the first `inside` are there.
  template <bool VECTORS>
  __device__ void mix_chunk(float2 (&mixed)[4], int feature, int tap, int channel, int inside) const {
    uint32_t source[Kind::IS_PAIR ? 2 : MAX_SOURCES][4];
#pragma unroll
    for (int j = 0; j < (Kind::IS_PAIR ? 2 : MAX_SOURCES); ++j)
      if (Kind::IS_PAIR || j < sources_) {
        const int64_t *strides = p_.recipe.strides[j];
        const T *from = reinterpret_cast<const T *>(p_.recipe.weights[j]) + group_ * p_.recipe.group_strides[j] +
                        feature * strides[0] +
                        Pixels::weight_offset(p_.correlation, strides, tap * p_.channels + channel);
        if constexpr (VECTORS)
          ptx::ld_global_nc(source[j], from);
        else
          load_chunk<T>(source[j], from, strides[TRANSPOSED ? 0 : 1], inside, false);
      }
#pragma unroll
    for (int j = 0; j < (Kind::IS_PAIR ? 2 : MAX_SOURCES); ++j)
      if (Kind::IS_PAIR || j < sources_) {
        const float one = factor(j, feature, channel);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          float2 &sum = mixed[r];
          sum = j == 0 ? first_source<T>(source[j][r], {one, one}) : add_source<T>(sum, source[j][r], {one, one});
        }
      }
  }

  __device__ uint8_t *address(int feature, int tap, int channel) const {
    const int chunk = tap * of_tap_ + channel / E::IN_CHUNK;
    return filter_ + chunk / CHUNKS * Operand::BYTES + Operand::offset(feature, chunk % CHUNKS) +
           channel % E::IN_CHUNK * E::BYTES;
  }

  template <bool VECTORS> __device__ void mix_along(int feature, int tap, int channel, bool stored) const {
    float2 mixed[4];
    const int inside = min(p_.channels - channel, E::IN_CHUNK);
    mix_chunk<VECTORS>(mixed, feature, tap, channel, inside);
    uint32_t packed[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      // Past the last channel sources are 0, but an infinite coefficient makes that nan.
      const int e = r * E::IN_REGISTER;
      packed[r] = operand<T>(pack<T>({e < inside ? mixed[r].x : 0.0f, e + 1 < inside ? mixed[r].y : 0.0f}));
    }
    if (stored)
      *reinterpret_cast<uint4 *>(address(feature, tap, channel)) = {packed[0], packed[1], packed[2], packed[3]};
  }

  template <bool VECTORS> __device__ void mix_across(int feature, int tap, int channel, bool stored) const {
    constexpr int LAST = E::IN_REGISTER - 1;
    float2 mixed[E::IN_REGISTER][4];
    const int inside = min(p_.features - feature, E::IN_CHUNK); // what comes of the other rows is not stored
#pragma unroll
    for (int h = 0; h < E::IN_REGISTER; ++h)
      mix_chunk<VECTORS>(mixed[h], feature, tap, min(channel + h, p_.channels - 1), inside);
    const bool odd = channel + LAST == p_.channels; // a register's second channel is past the last
#pragma unroll
    for (int e = 0; e < E::IN_CHUNK; ++e) {
      const float2 first = mixed[0][e / E::IN_REGISTER], last = mixed[LAST][e / E::IN_REGISTER];
      const bool upper = e % E::IN_REGISTER == 1;
      const uint32_t packed = pack<T>({upper ? first.y : first.x, LAST > 0 && odd ? 0.0f : upper ? last.y : last.x});
      if (stored)
        *reinterpret_cast<uint32_t *>(address(feature + e, tap, channel)) = operand<T>(packed);
    }
  }
};

// A block's tiles of pixels, one after another.
template <class T, class Tile, bool TRANSPOSED, class Kind> class ResidentKernel {
  using E = Element<T>;
  using Filter = ResidentFilter<T, Tile, TRANSPOSED, Kind>;
  using Weight = typename Filter::Operand;
  using Activation = DepthInner<T, Tile::COLUMNS>;
  static constexpr int CHUNKS = Filter::CHUNKS;
  static constexpr int PIXELS = Tile::COLUMNS * CHUNKS / Tile::THREADS; // that a thread copies chunks of
  static_assert(PIXELS * Tile::THREADS == Tile::COLUMNS * CHUNKS, "threads copy equally many");

  // Epilogue: a tile of results as rows of features.
  static constexpr int PITCH = Tile::ROWS * E::BYTES + CHUNK_BYTES; // bytes: a warp's lanes store to different banks
  static constexpr int OUT_CHUNKS = Tile::ROWS / E::IN_CHUNK;
  static_assert(Tile::THREADS % OUT_CHUNKS == 0, "a thread's chunks have the same features");

public:
  using Params = Product;
  static constexpr int MAX_THREADS = Tile::THREADS;
  static constexpr int BLOCKS = 512 / Tile::THREADS; // as resident.py counts them
  static constexpr LaunchFacts FACTS = {
      .threads = Tile::THREADS,
      .rows = Tile::ROWS,
      .columns = Tile::COLUMNS,
      .depth_bytes = STEP_BYTES,
      .stage_bytes = Activation::BYTES,
      .step_bytes = Weight::BYTES + CHUNKS * int(sizeof(Pixels::Position)),
      .epilogue_bytes = Tile::COLUMNS * PITCH,
  };

  static __device__ void run(const Product &p) {
    // Shared memory: the filter, the stages of the activation, a tile of results, and where the sum's chunks lie.
    extern __shared__ __align__(128) uint8_t shared[];
    Filter filter(p, shared);
    ResidentKernel block(p, filter, shared);
    filter.clear();
    block.keep_positions(filter);
    __syncthreads(); // the pipeline has one more before the filter is read
    filter.mix();
    block.mix_biases();

    const int tiles = (p.pixels + Tile::COLUMNS - 1) / Tile::COLUMNS;
    const int own_tiles = (tiles - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x);
    pipeline(
        own_tiles * block.steps_, p.stages, ptx::shared_address(block.staged_), Activation::BYTES,
        [&](int, uint32_t to) { block.load_next(to); }, [&](int, uint32_t from) { block.multiply_next(from); });
  }

private:
  const Product &p_;
  uint8_t *const shared_;
  const int steps_;
  uint8_t *const staged_, *const results_;
  Pixels::Position *const positions_;
  const int thread_ = threadIdx.x, lane_ = thread_ % 32, warp_ = thread_ / 32;
  const int group_ = blockIdx.y;
  const int warp_row_ = warp_ / Tile::WARPS_OVER_COLUMNS * Tile::WARP_ROWS;
  const int warp_column_ = warp_ % Tile::WARPS_OVER_COLUMNS * Tile::WARP_COLUMNS;
  const T *const activation_; // the group's
  Pixels::Pixel pixels_[PIXELS];
  int load_tile_ = blockIdx.x, load_step_ = 0; // what is copied next
  int tile_ = blockIdx.x, step_ = 0;           // what is multiplied next
  float bias_[Tile::DOWN][2] = {};
  typename Tile::Sums sums_ = {};

  __device__ ResidentKernel(const Product &p, const Filter &filter, uint8_t *shared)
      : p_(p), shared_(shared), steps_(filter.steps()), staged_(shared + filter.bytes()),
        results_(staged_ + p.stages * Activation::BYTES),
        positions_(reinterpret_cast<Pixels::Position *>(results_ + Tile::COLUMNS * PITCH)),
        activation_(reinterpret_cast<const T *>(p.activation) +
                    int64_t(group_) * p.channels * p.activation_strides[1]) {}

  __device__ void keep_positions(const Filter &filter) const {
    for (int chunk = thread_; chunk < steps_ * CHUNKS; chunk += Tile::THREADS)
      positions_[chunk] = filter.position(chunk);
  }

  __device__ void mix_biases() {
    if (p_.biases[0] != 0) {
#pragma unroll
      for (int down = 0; down < Tile::DOWN; ++down)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int feature = warp_row_ + 16 * down + lane_ / 4 + 8 * half;
          if (feature < p_.features)
            bias_[down][half] = mixed_bias<T>(p_, int64_t(group_) * p_.features + feature);
        }
    }
  }

  // Copies: of the next step of the sum, or the first of the next tile. A thread's chunks lie in one column of the
  // tile.
  __device__ void load_next(uint32_t stage) {
    uint8_t *to = staged_ + (stage - ptx::shared_address(staged_));
    if (load_step_ == 0) {
#pragma unroll
      for (int i = 0; i < PIXELS; ++i) {
        const int pixel = load_tile_ * Tile::COLUMNS + thread_ / CHUNKS + i * (Tile::THREADS / CHUNKS);
        // Past the last: that one.
        pixels_[i] = Pixels::pixel(p_.correlation, p_.activation_strides, min(pixel, p_.pixels - 1));
      }
    }
    const int chunk = thread_ % CHUNKS;
    const Pixels::Position at = positions_[load_step_ * CHUNKS + chunk];
#pragma unroll
    for (int i = 0; i < PIXELS; ++i) {
      const int row = thread_ / CHUNKS + i * (Tile::THREADS / CHUNKS);
      const int inside = Pixels::meets(p_.correlation, pixels_[i], at) ? min(p_.channels - at.channel, E::IN_CHUNK) : 0;
      const T *from = activation_ + pixels_[i].offset + at.offset;
      copy_chunk<T>(to + Activation::offset(row, chunk), p_.vector_activation, inside, activation_,
                    [&](int e) { return from + e * p_.activation_strides[1]; });
    }
    if (++load_step_ == steps_) {
      load_step_ = 0;
      load_tile_ += gridDim.x;
    }
  }

  // Main loop, over the steps of all tiles.
  __device__ void multiply_next(uint32_t stage) {
    const uint32_t rows =
        ptx::shared_address(shared_ + step_ * Weight::BYTES) + uint32_t(Weight::of_rows(warp_row_, lane_));
    const uint32_t columns = stage + Activation::of_columns(warp_column_, lane_);
    unrolled<E::TILE_DEPTH / E::MMA_DEPTH>([&](auto s) {
      uint32_t weight[Tile::DOWN][4];
      unrolled<Tile::DOWN>([&](auto down) { Weight::template first_operand<s, down>(weight[down], rows); });
      multiply_add<T, Tile, Activation, s>(sums_, weight, columns);
    });
    if (++step_ == steps_) {
      finish_tile();
      step_ = 0;
      tile_ += gridDim.x;
    }
  }

  // Epilogue: the bias, and a tile of results through shared memory, as rows of features, then 16 bytes a thread.
  __device__ void finish_tile() {
#pragma unroll
    for (int down = 0; down < Tile::DOWN; ++down)
#pragma unroll
      for (int across = 0; across < Tile::ACROSS; ++across)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int row = warp_row_ + 16 * down + lane_ / 4 + r / 2 * 8;
          const int column = warp_column_ + 8 * across + 2 * (lane_ % 4) + r % 2;
          float &sum = sums_[down][across][r];
          *reinterpret_cast<T *>(results_ + column * PITCH + row * E::BYTES) = rounded<T>(sum + bias_[down][r / 2]);
          sum = 0.0f;
        }
    __syncthreads(); // the pipeline has one before the next tile's results
    const int feature = thread_ % OUT_CHUNKS * E::IN_CHUNK;
    const int64_t out_feature = int64_t(group_) * p_.features + feature;
    for (int column = thread_ / OUT_CHUNKS; column < Tile::COLUMNS; column += Tile::THREADS / OUT_CHUNKS) {
      const int pixel = tile_ * Tile::COLUMNS + column;
      const int inside = pixel < p_.pixels ? min(p_.features - feature, E::IN_CHUNK) : 0;
      const uint8_t *from = results_ + column * PITCH + feature * E::BYTES;
      auto *to = reinterpret_cast<T *>(p_.out) + Pixels::out_offset(p_.correlation, p_.out_strides, pixel);
      if (p_.vector_out && inside == E::IN_CHUNK) {
        *reinterpret_cast<uint4 *>(to + out_feature) = *reinterpret_cast<const uint4 *>(from);
      } else {
        for (int e = 0; e < inside; ++e)
          to[(out_feature + e) * p_.out_strides[1]] = reinterpret_cast<const T *>(from)[e];
      }
    }
  }
};

} // namespace rl_kernels::cuda
