// What the kernels for sm_80 and later have in common: tiles, their operands in shared memory, copies and the pipeline.
#pragma once

#include "addressing.cuh"
#include "mix.cuh"

#include <type_traits>
#include <utility>

namespace rl_kernels::cuda {

// Calls f with 0 to COUNT - 1 as constants.
template <int COUNT, class F> __device__ inline void unrolled(F f) {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>()), ...);
  }(std::make_integer_sequence<int, COUNT>());
}

// A block's share of the result, rows of the first operand by columns of the second, and how its warps divide it.
template <int ROWS_, int COLUMNS_, int WARPS_OVER_ROWS_, int WARPS_OVER_COLUMNS_> struct Tile {
  static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_;
  static constexpr int WARPS_OVER_ROWS = WARPS_OVER_ROWS_, WARPS_OVER_COLUMNS = WARPS_OVER_COLUMNS_;
  static constexpr int THREADS = 32 * WARPS_OVER_ROWS * WARPS_OVER_COLUMNS;
  static constexpr int WARP_ROWS = ROWS / WARPS_OVER_ROWS, WARP_COLUMNS = COLUMNS / WARPS_OVER_COLUMNS;
  static constexpr int DOWN = WARP_ROWS / 16, ACROSS = WARP_COLUMNS / 8; // matrix instructions of a warp
  static_assert(WARP_ROWS % 16 == 0 && WARP_COLUMNS % 32 == 0, "a warp has whole matrix instructions, in fours");

  // A warp's sums: [d][a][r] is row 16 d + lane / 4 + 8 (r / 2), column 8 a + 2 (lane % 4) + r % 2.
  using Sums = float[DOWN][ACROSS][4];
};

// An operand in shared memory whose rows run along the sum: WIDTH rows of 64 bytes, in which 16-byte chunks are swapped
// so that 8 rows' equal chunks lie in different banks.
template <class T, int WIDTH> struct DepthInner {
  static constexpr int BYTES = WIDTH * STEP_BYTES;

  __device__ static int offset(int row, int chunk) {
    return row * STEP_BYTES + ((chunk ^ (row >> 1)) & 3) * CHUNK_BYTES;
  }

  // The first operand of matrix instruction `step`: 16 rows from 16 * DOWN after `first` on.
  template <int DOWN>
  __device__ static void first_operand(uint32_t (&to)[4], uint32_t tile, int first, int step, int lane) {
    // Chunks of rows 8 apart are swapped alike.
    ptx::ldmatrix<16 * DOWN * STEP_BYTES>(to, tile + offset(first + lane % 16, 2 * step + lane / 16));
  }

  // The second operands of two: 8 columns from 8 * ACROSS after `first` on in to[0] and to[1], and the next 8.
  template <int ACROSS>
  __device__ static void second_operands(uint32_t (&to)[4], uint32_t tile, int first, int step, int lane) {
    ptx::ldmatrix<8 * ACROSS * STEP_BYTES>(to,
                                           tile + offset(first + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
  }
};

// An operand whose rows run across the sum: TILE_DEPTH rows of WIDTH elements, swapped likewise.
template <class T, int WIDTH> struct DepthOuter {
  static constexpr int ROW_BYTES = WIDTH * Element<T>::BYTES;
  static constexpr int BYTES = ROW_BYTES * Element<T>::TILE_DEPTH;
  static_assert(ROW_BYTES >= 128, "a row has a chunk for each of the 8 that one may be swapped with");

  __device__ static int offset(int row, int chunk) {
    // Floats are read one at a time, of 4 rows by 2 chunks.
    return row * ROW_BYTES + (chunk ^ (sizeof(T) == 2 ? row & 7 : (row & 3) << 1)) * CHUNK_BYTES;
  }

  template <int DOWN>
  __device__ static void first_operand(uint32_t (&to)[4], uint32_t tile, int first, int step, int lane) {
    first += 16 * DOWN;
    if constexpr (sizeof(T) == 2) {
      int row = step * 16 + lane / 16 * 8 + lane % 8;
      ptx::ldmatrix_trans(to, tile + offset(row, first / 8 + lane / 8 % 2));
    } else {
#pragma unroll
      for (int r = 0; r < 4; ++r)
        to[r] = element(tile, step * 8 + lane % 4 + r / 2 * 4, first + lane / 4 + r % 2 * 8);
    }
  }

  template <int ACROSS>
  __device__ static void second_operands(uint32_t (&to)[4], uint32_t tile, int first, int step, int lane) {
    first += 8 * ACROSS;
    if constexpr (sizeof(T) == 2) {
      int row = step * 16 + lane / 8 % 2 * 8 + lane % 8;
      ptx::ldmatrix_trans(to, tile + offset(row, first / 8 + lane / 16));
    } else {
#pragma unroll
      for (int r = 0; r < 4; ++r)
        to[r] = element(tile, step * 8 + lane % 4 + r % 2 * 4, first + lane / 4 + r / 2 * 8);
    }
  }

  __device__ static uint32_t element(uint32_t tile, int row, int column) {
    return ptx::ld_shared(tile + offset(row, column / 4) + column % 4 * 4);
  }
};

// Adds to a warp's sums the products of its rows, first operands in registers, and of its columns from `first` on,
// which are read from shared memory in between.
template <class T, class Tile, class Columns>
__device__ inline void multiply_add(typename Tile::Sums &sums, const uint32_t (&rows)[Tile::DOWN][4], uint32_t tile,
                                    int first, int step, int lane) {
  unrolled<Tile::ACROSS / 2>([&](auto pair) {
    constexpr int across = 2 * pair;
    uint32_t columns[4];
    Columns::template second_operands<across>(columns, tile, first, step, lane);
#pragma unroll
    for (int r = 0; r < 4; ++r)
      columns[r] = operand<T>(columns[r]);
#pragma unroll
    for (int down = 0; down < Tile::DOWN; ++down) {
      ptx::mma<T>(sums[down][across], rows[down], columns[0], columns[1]);
      ptx::mma<T>(sums[down][across + 1], rows[down], columns[2], columns[3]);
    }
  });
}

// The tile of block `index` of rows x columns of tiles: 8 rows at a time, whose blocks share the columns' operand in
// L2.
__device__ inline int2 tile_of(int index, int rows, int columns) {
  int band = index / (8 * columns), within = index % (8 * columns), height = min(rows - band * 8, 8);
  return {band * 8 + within % height, within / height};
}

// A chunk to shared memory: its first `inside` elements, and 0. element(e) is where element e lies.
template <class T, class At>
__device__ inline void copy_chunk(uint8_t *to, bool vector, int inside, const T *none, At element) {
  if (vector) {
    // Nothing is read where nothing is inside, but the address has to be one.
    ptx::cp_async(ptx::shared_address(to), inside > 0 ? element(0) : none, max(inside, 0) * Element<T>::BYTES);
  } else {
#pragma unroll 1
    for (int e = 0; e < Element<T>::IN_CHUNK; ++e)
      reinterpret_cast<T *>(to)[e] = e < inside ? *element(e) : T(0.0f);
  }
}

// Runs load(step, stage) ahead of multiply(step, stage), in a ring of `stages` (2 to 4).
template <class Load, class Multiply>
__device__ inline void pipeline(int steps, int stages, Load load, Multiply multiply) {
  for (int step = 0; step < stages - 1; ++step) {
    if (step < steps)
      load(step, step);
    ptx::cp_async_commit_group();
  }
  int stage = 0, free = stages - 1;
  for (int step = 0; step < steps; ++step) {
    // Groups are committed also where there is nothing left to copy: the one of this step is always `stages` - 2 back.
    if (stages == 2)
      ptx::cp_async_wait_group<0>();
    else if (stages == 3)
      ptx::cp_async_wait_group<1>();
    else
      ptx::cp_async_wait_group<2>();
    __syncthreads(); // this stage has arrived for all, and all have read the one that is loaded next
    if (step + stages - 1 < steps)
      load(step + stages - 1, free);
    ptx::cp_async_commit_group();
    multiply(step, stage);
    stage = stage + 1 == stages ? 0 : stage + 1;
    free = free + 1 == stages ? 0 : free + 1;
  }
  __syncthreads(); // all that was copied was waited for; the epilogue uses the stages' memory
}

} // namespace rl_kernels::cuda
