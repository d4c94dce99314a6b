/*
 * wgmma.h - what the kernels by Hopper's asynchronous products (*_wgmma.cu, for sm_90a alone) share: V's copy in the
 * products' order, and whether this device has such products.
 *
 * Their steps are of 64 depths, four products, or eight of TF32, which come in two halves. A thread of a product owns
 * the depths {2t, 2t+1, 2t+8, 2t+9} (t = lane % 4), of TF32 {t, t+4}, of rows g and g + 8 (g = lane / 4), and columns
 * 8 j + {2t, 2t+1} of the sums. In which order depths, rows and columns stand there is free, as long as V has the same
 * one: here thread t's depths, of a step's products together, are 16 t to 16 t + 15, its rows neighbouring pixels, its
 * columns, of each BLOCK, a quarter in a row.
 */
#ifndef PNN_CUDA_WGMMA_H
#define PNN_CUDA_WGMMA_H

#include "inputs.h"
#include "kernels.h"
#include "response.h"

namespace pnn_cuda {

constexpr int STEP = 64; /* depths of a step */
template <class D>
constexpr int PARTS = static_cast<int>(sizeof(D)) / 2; /* of a step */
constexpr int PRODUCTS = 4;                            /* of each part */
constexpr int PART_RUNS = 2 * PRODUCTS;                /* of 16 bytes that a part's depths take */

/* The numbers that a thread of a product owns of a row's half of the depth, as one word of A. */
template <class D>
constexpr int NUMBERS = 4 / static_cast<int>(sizeof(D));

/* V as the products' B: of each group `columns` by `depth`, whose elements lie so many apart; and normalisation's scale
 * of each of the maps, which are the columns with COLUMNS_FIRST below, else the depths; or NULL. */
struct WeightOrder {
  int64_t groups, columns, depth;
  int64_t group_step, column_step, depth_step;
  const double *scale;
};

/* V's number times normalisation's scale, as weight_kernel has it; and as the products read it. */
template <class D>
PNN_DEVICE D scaled(D v, double scale) {
  if constexpr (sizeof(D) == 2)
    return round_to(D{}, float_to_odd(widen(v) * scale));
  else
    return {static_cast<float>(widen(v) * scale)};
}
template <class D>
PNN_DEVICE uint32_t word_of(D v) {
  if constexpr (sizeof(D) == 2)
    return v.bits;
  else
    return to_tf32_even(v.value);
}

/* [group][tile of columns][step][product][half of its depth][column][16 bytes of depths], zeros beyond: a tile's steps
 * are one run of bytes. Threads go along V's contiguous dimension: its columns with COLUMNS_FIRST, else its depth. */
template <class D, int TILE, int BLOCK, bool COLUMNS_FIRST>
__global__ void wgmma_weight_kernel(const __grid_constant__ WeightOrder order, const D *from, D *to) {
  const int64_t steps = (order.depth + STEP - 1) / STEP, tiles = (order.columns + TILE - 1) / TILE;
  constexpr int RUNS = PARTS<D> * PART_RUNS;
  const int64_t rows = order.groups * tiles * TILE, parts = steps * RUNS;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * parts; i += threads) {
    const int64_t row = COLUMNS_FIRST ? i % rows : i / parts, at = COLUMNS_FIRST ? i / rows : i % parts;
    const int64_t step = at / RUNS, tile = row / TILE, group = tile / tiles, column = tile % tiles * TILE + row % TILE;
    const int run = static_cast<int>(at % RUNS);
    const int in_tile = static_cast<int>(row % TILE), in = in_tile % BLOCK;
    const int place = in_tile - in + in % (BLOCK / 4) / 2 * 8 + in / (BLOCK / 4) * 2 + in % 2;
    words4 words = {{0, 0, 0, 0}};
    if (column < order.columns) {
      const D *const first = from + group * order.group_step + column * order.column_step;
      const double *const scale =
          order.scale ? order.scale + group * (COLUMNS_FIRST ? order.columns : order.depth) : nullptr;
#pragma unroll
      for (int quad = 0; quad < 4; quad++)
#pragma unroll
        for (int e = 0; e < NUMBERS<D>; e++) {
          const int64_t k = step * STEP + quad * 16 + run * NUMBERS<D> + e;
          if (k >= order.depth) continue;
          D v = first[k * order.depth_step];
          if (scale) v = scaled(v, scale[COLUMNS_FIRST ? column : k]);
          words.w[quad] |= word_of(v) << (16 * e);
        }
    }
    store_global(reinterpret_cast<words4 *>(to) + ((tile * steps + step) * RUNS + run) * TILE + place, words);
  }
}

template <class D, int TILE, int BLOCK, bool COLUMNS_FIRST>
Status run_wgmma_weight(const WeightOrder &order, const void *from, void *to, Stream stream) {
  constexpr int THREADS = 256;
  const int64_t runs =
      ceil_div(order.columns, TILE) * TILE * order.groups * ceil_div(order.depth, STEP) * PARTS<D> * PART_RUNS;
  const int64_t blocks = ceil_div(runs, THREADS);
  const auto kernel = wgmma_weight_kernel<D, TILE, BLOCK, COLUMNS_FIRST>;
  Status status;
  PNN_LAUNCH(status, kernel, blocks < 65536 ? blocks : 65536, THREADS, 0, stream, order, static_cast<const D *>(from),
             static_cast<D *>(to));
  return status;
}

/* Whether a thread's two pixels lie side by side in a tensor of D, no image ending between them; then they are stored
 * together. */
template <class D>
PNN_DEVICE bool in_pairs(int staging) {
  return staging == STAGE_PIXELS || (sizeof(D) == 2 && staging == STAGE_WORDS);
}
template <class D>
PNN_DEVICE void store_pair_if(bool wanted, void *to, float first, float second) {
  if constexpr (sizeof(D) == 2)
    store_global_if(wanted, static_cast<uint32_t *>(to), round_pair(D{}, first, second));
  else
    store_global_if(wanted, static_cast<words2 *>(to), words2{{bits_of(first), bits_of(second)}});
}

/* COUNT numbers side by side, rounded to D, in device memory; they begin at a multiple of all their bytes, or of 16. */
template <class D, int COUNT>
PNN_DEVICE void store_together(char *to, const float *v) {
  constexpr int WORDS = COUNT / NUMBERS<D>;
  uint32_t words[WORDS];
#pragma unroll
  for (int i = 0; i < WORDS; i++) {
    if constexpr (NUMBERS<D> == 2)
      words[i] = round_pair(D{}, v[2 * i], v[2 * i + 1]);
    else
      words[i] = bits_of(v[i]);
  }
  if constexpr (WORDS >= 4) {
#pragma unroll
    for (int i = 0; i < WORDS; i += 4)
      store_global(reinterpret_cast<words4 *>(to + i * 4),
                   words4{{words[i], words[i + 1], words[i + 2], words[i + 3]}});
  } else if constexpr (WORDS == 2) {
    store_global(reinterpret_cast<words2 *>(to), words2{{words[0], words[1]}});
  } else {
    *reinterpret_cast<uint32_t *>(to) = words[0];
  }
}

/* Whether the current device has wgmma: compute capability 9.0. */
inline bool has_wgmma() {
#if defined(__CUDACC__)
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 &&
         minor == 0;
#else
  return true;
#endif
}

}  // namespace pnn_cuda

#endif
