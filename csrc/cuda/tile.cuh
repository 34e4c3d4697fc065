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

// The same value, which is kept in a register: the compiler does not compute it anew where it is used.
__device__ inline int in_register(int value) {
  asm volatile("" : "+r"(value));
  return value;
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

// Operands in shared memory, at multiples of 128 bytes. Where a lane reads is found once: `of_rows` and `of_columns`
// are its address in a tile for a warp whose first or second operands begin at `first`, a multiple of what the warp
// has. All else that it reads is a number of bytes from there, or there with some bits of a chunk's place changed:
// 16-byte chunks of a row are swapped among themselves, so that what is read at once lies in different banks.

// WIDTH rows of 64 bytes that run along the sum; 8 rows' equal chunks lie in different banks.
template <class T, int WIDTH> struct DepthInner {
  static constexpr int BYTES = WIDTH * STEP_BYTES;

  __device__ static int offset(int row, int chunk) {
    return row * STEP_BYTES + ((chunk ^ (row >> 1)) & 3) * CHUNK_BYTES;
  }

  __device__ static int of_rows(int first, int lane) { return offset(first + lane % 16, lane / 16); }
  __device__ static int of_columns(int first, int lane) {
    return offset(first + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }

  // The first operand of matrix instruction STEP: 16 rows from 16 * DOWN on, in a tile BEHIND bytes behind `at`.
  template <int STEP, int DOWN, int BEHIND = 0> __device__ static void first_operand(uint32_t (&to)[4], uint32_t at) {
    // Chunks of rows 8 apart are swapped alike.
    ptx::ldmatrix<BEHIND + 16 * DOWN * STEP_BYTES>(to, at ^ 2 * STEP * CHUNK_BYTES);
  }

  // The second operands of two: 8 columns from 8 * ACROSS on in to[0] and to[1], and the next 8.
  template <int STEP, int ACROSS> __device__ static void second_operands(uint32_t (&to)[4], uint32_t at) {
    ptx::ldmatrix<8 * ACROSS * STEP_BYTES>(to, at ^ 2 * STEP * CHUNK_BYTES);
  }
};

// TILE_DEPTH rows of WIDTH elements that run across the sum.
template <class T, int WIDTH> struct DepthOuter {
  static constexpr int ROW_BYTES = WIDTH * Element<T>::BYTES;
  static constexpr int BYTES = ROW_BYTES * Element<T>::TILE_DEPTH;
  static_assert(ROW_BYTES >= 128, "a row has a chunk for each of the 8 that one may be swapped with");

  __device__ static int offset(int row, int chunk) {
    // Floats are read one at a time, of 4 rows by 2 chunks.
    return row * ROW_BYTES + (chunk ^ (sizeof(T) == 2 ? row & 7 : (row & 3) << 1)) * CHUNK_BYTES;
  }

  __device__ static int of_rows(int first, int lane) {
    if constexpr (sizeof(T) == 2)
      return offset(lane / 16 * 8 + lane % 8, first / 8 + lane / 8 % 2);
    else
      return of_element(first, lane);
  }
  __device__ static int of_columns(int first, int lane) {
    if constexpr (sizeof(T) == 2)
      return offset(lane / 8 % 2 * 8 + lane % 8, first / 8 + lane / 16);
    else
      return of_element(first, lane);
  }

  template <int STEP, int DOWN, int BEHIND = 0> __device__ static void first_operand(uint32_t (&to)[4], uint32_t at) {
    if constexpr (sizeof(T) == 2)
      ptx::ldmatrix_trans<BEHIND + 16 * STEP * ROW_BYTES + added(2 * DOWN)>(to, at ^ changed(2 * DOWN));
    else
      unrolled<4>([&](auto r) { to[r] = element<STEP, r / 2, 2 * DOWN + r % 2, BEHIND>(at); });
  }

  template <int STEP, int ACROSS> __device__ static void second_operands(uint32_t (&to)[4], uint32_t at) {
    if constexpr (sizeof(T) == 2)
      ptx::ldmatrix_trans<16 * STEP * ROW_BYTES + added(ACROSS)>(to, at ^ changed(ACROSS));
    else
      unrolled<4>([&](auto r) { to[r] = element<STEP, r % 2, ACROSS + r / 2>(at); });
  }

private:
  // From a chunk to one further on in the row: the bits of its place that are swapped, and the others.
  static constexpr int changed(int chunks) { return chunks % 8 * CHUNK_BYTES; }
  static constexpr int added(int chunks) { return chunks / 8 * 8 * CHUNK_BYTES; }

  __device__ static int of_element(int first, int lane) {
    return offset(lane % 4, (first + lane / 4) / 4) + lane / 4 % 4 * 4;
  }

  // A float of matrix instruction STEP, 4 * DEEP rows and 8 * OVER columns on.
  template <int STEP, int DEEP, int OVER, int BEHIND = 0> __device__ static uint32_t element(uint32_t at) {
    return ptx::ld_shared<BEHIND + (8 * STEP + 4 * DEEP) * ROW_BYTES + added(2 * OVER)>(at ^ changed(2 * OVER));
  }
};

// Adds to a warp's sums the products of its rows, first operands in registers, and of its columns, which are read from
// shared memory in between.
template <class T, class Tile, class Columns, int STEP>
__device__ inline void multiply_add(typename Tile::Sums &sums, const uint32_t (&rows)[Tile::DOWN][4], uint32_t at) {
  unrolled<Tile::ACROSS / 2>([&](auto pair) {
    constexpr int across = 2 * pair;
    uint32_t columns[4];
    Columns::template second_operands<STEP, across>(columns, at);
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

// A chunk's floats from shared memory, whose neighbours in the row the neighbouring lanes read.
template <class T> __device__ inline void read_chunk(float (&to)[Element<T>::IN_CHUNK], const float *from, int lane) {
  if constexpr (Element<T>::IN_CHUNK == 4) {
    *reinterpret_cast<float4 *>(to) = *reinterpret_cast<const float4 *>(from);
  } else {
    // 8 lanes are served at once: of chunks 32 banks apart, one's first half is read with another's second.
    const bool swapped = lane / 4 % 2 == 1;
    const float4 one = *reinterpret_cast<const float4 *>(from + (swapped ? 4 : 0));
    const float4 other = *reinterpret_cast<const float4 *>(from + (swapped ? 0 : 4));
    *reinterpret_cast<float4 *>(to) = swapped ? other : one;
    *reinterpret_cast<float4 *>(to + 4) = swapped ? one : other;
  }
}

// Runs load(step, to) ahead of multiply(step, from), in a ring of `stages` (2 to 4), whose addresses they are given:
// the first, and others STAGE_BYTES further each.
template <class Load, class Multiply>
__device__ inline void pipeline(int steps, int stages, uint32_t first, int stage_bytes, Load load, Multiply multiply) {
  uint32_t free = first;
  for (int step = 0; step < stages - 1; ++step) {
    if (step < steps)
      load(step, free);
    ptx::cp_async_commit_group();
    free += stage_bytes;
  }
  const uint32_t end = free + stage_bytes;
  uint32_t stage = first;
  for (int step = 0; step < steps; ++step) {
    // Groups are committed also where there is nothing left to copy: the one of this step is always `stages` - 2 back.
    ptx::cp_async_wait_group<2>();
    if (stages < 4) {
      ptx::cp_async_wait_group<1>();
      if (stages < 3)
        ptx::cp_async_wait_group<0>();
    }
    __syncthreads(); // this stage has arrived for all, and all have read the one that is loaded next
    if (step + stages - 1 < steps)
      load(step + stages - 1, free);
    ptx::cp_async_commit_group();
    multiply(step, stage);
    free = stage; // once all have read it
    stage += stage_bytes;
    stage = stage == end ? first : stage;
  }
  __syncthreads(); // all that was copied was waited for; the epilogue uses the stages' memory
}

} // namespace rl_kernels::cuda
