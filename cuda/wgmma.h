/*
 * wgmma.h - what the kernels by Hopper's asynchronous products (*_wgmma.cu, for sm_90a alone) share: V's copy in the
 * products' order, x of two neighbouring pixels and sixteen maps in a thread's registers, and whether this device has
 * such products.
 *
 * Their steps are of 64 depths, four products. A thread of a product owns the depths {2t, 2t+1, 2t+8, 2t+9} (t = lane %
 * 4) of rows g and g + 8 (g = lane / 4), and columns 8 j + {2t, 2t+1} of the sums. In which order depths, rows and
 * columns stand there is free, as long as V has the same one: here thread t's depths, of a step's four products
 * together, are 16 t to 16 t + 15, its rows neighbouring pixels, its columns, of each BLOCK, a quarter in a row.
 */
#ifndef PNN_CUDA_WGMMA_H
#define PNN_CUDA_WGMMA_H

#include "kernels.h"
#include "response.h"

namespace pnn_cuda {

constexpr int STEP = 64, PRODUCTS = 4; /* depths of a step, and products that they make */
constexpr int RUNS = STEP / 8;         /* of 16 bytes that a step's depths take */

/* V as the products' B: of each group `columns` by `depth`, whose elements lie so many apart. */
struct WeightOrder {
  int64_t groups, columns, depth;
  int64_t group_step, column_step, depth_step;
};

/* [group][tile of columns][step][product][half of its depth][column][eight depths], zeros beyond: a tile's steps are
 * one run of bytes. Threads go along V's contiguous dimension: its columns with COLUMNS_FIRST, else its depth. */
template <class D, int TILE, int BLOCK, bool COLUMNS_FIRST>
__global__ void wgmma_weight_kernel(const __grid_constant__ WeightOrder order, const D *from, D *to) {
  const int64_t steps = (order.depth + STEP - 1) / STEP, tiles = (order.columns + TILE - 1) / TILE;
  const int64_t rows = order.groups * tiles * TILE, parts = steps * RUNS;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * parts; i += threads) {
    const int64_t row = COLUMNS_FIRST ? i % rows : i / parts, at = COLUMNS_FIRST ? i / rows : i % parts;
    const int64_t step = at / RUNS, tile = row / TILE, group = tile / tiles, column = tile % tiles * TILE + row % TILE;
    const int part = static_cast<int>(at % RUNS), product = part / 2, half = part % 2;
    const int in_tile = static_cast<int>(row % TILE), in = in_tile % BLOCK;
    const int place = in_tile - in + in % (BLOCK / 4) / 2 * 8 + in / (BLOCK / 4) * 2 + in % 2;
    words4 words = {{0, 0, 0, 0}};
    if (column < order.columns) {
      const D *const first = from + group * order.group_step + column * order.column_step;
#pragma unroll
      for (int quad = 0; quad < 4; quad++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int64_t k = step * STEP + quad * 16 + product * 4 + half * 2 + e;
          if (k < order.depth) words.w[quad] |= static_cast<uint32_t>(first[k * order.depth_step].bits) << (16 * e);
        }
    }
    store_global(reinterpret_cast<words4 *>(to) + ((tile * steps + step) * RUNS + part) * TILE + place, words);
  }
}

template <class D, int TILE, int BLOCK, bool COLUMNS_FIRST>
Status run_wgmma_weight(const WeightOrder &order, const void *from, void *to, Stream stream) {
  constexpr int THREADS = 256;
  const int64_t runs = ceil_div(order.columns, TILE) * TILE * order.groups * ceil_div(order.depth, STEP) * RUNS;
  const int64_t blocks = ceil_div(runs, THREADS);
  const auto kernel = wgmma_weight_kernel<D, TILE, BLOCK, COLUMNS_FIRST>;
  Status status;
  PNN_LAUNCH(status, kernel, blocks < 65536 ? blocks : 65536, THREADS, 0, stream, order, static_cast<const D *>(from),
             static_cast<D *>(to));
  return status;
}

/* Half h (of two) of the halves' words, */
PNN_DEVICE float half_of(bfloat16, uint32_t word, int h) { return float_of(h ? word & 0xffff0000u : word << 16); }
PNN_DEVICE float half_of(float16, uint32_t word, int h) {
  return widen(float16{static_cast<uint16_t>(h ? word >> 16 : word)});
}

/* x of a thread's two pixels and sixteen maps, MASKS to a channel (16 stands for more, too), as it comes from memory: a
 * word has two pixels of a channel or, where the channels are contiguous, two channels of a pixel. */
template <class D, bool PIXELS, int MASKS>
struct Inputs {
  static constexpr int CHANNELS = SIXTEEN / MASKS, WORDS = PIXELS ? CHANNELS : (CHANNELS + 1) / 2;
  static constexpr int COUNT = PIXELS ? 1 : 2; /* pointers */
  uint32_t words[COUNT][WORDS];

  PNN_DEVICE float value(int pixel, int map) const {
    const int c = map / MASKS;
    return PIXELS ? half_of(D{}, words[0][c], pixel) : half_of(D{}, words[pixel][c / 2], c % 2);
  }
  /* The first or the second eight maps' channels, from those of the first pixel and channel on, in device memory or
   * SHARED. */
  template <bool SHARED = false>
  PNN_DEVICE void load(int second, const char *const from[COUNT], int64_t step) {
    const auto get = [](const auto *p) {
      if constexpr (SHARED)
        return load_shared(p);
      else
        return load_global(p);
    };
    if constexpr (PIXELS) {
      if (CHANNELS == 1 && !second) return;
      const int first = CHANNELS == 1 ? 0 : second * CHANNELS / 2, last = CHANNELS == 1 ? 1 : first + CHANNELS / 2;
      const char *at = from[0] + first * step;
#pragma unroll
      for (int c = first; c < last; c++, at += step) words[0][c] = get(reinterpret_cast<const uint32_t *>(at));
    } else {
#pragma unroll
      for (int p = 0; p < 2; p++) {
        if constexpr (MASKS == 1) {
          const words4 v = get(reinterpret_cast<const words4 *>(from[p]) + second);
#pragma unroll
          for (int i = 0; i < 4; i++) words[p][second * 4 + i] = v.w[i];
        } else if (second) {
          if constexpr (SHARED && MASKS == 4) {
            const words2 v = load_shared(reinterpret_cast<const words2 *>(from[p]));
            words[p][0] = v.w[0], words[p][1] = v.w[1];
          } else if constexpr (MASKS == 2) {
            const words4 v = get(reinterpret_cast<const words4 *>(from[p]));
#pragma unroll
            for (int i = 0; i < 4; i++) words[p][i] = v.w[i];
          } else if constexpr (MASKS == 16) {
            if (SHARED) note_load(from[p], 2);
            words[p][0] = *reinterpret_cast<const uint16_t *>(from[p]);
          } else {
#pragma unroll
            for (int i = 0; i < WORDS; i++) words[p][i] = get(reinterpret_cast<const uint32_t *>(from[p]) + i);
          }
        }
      }
    }
  }
  PNN_DEVICE void clear() {
#pragma unroll
    for (int p = 0; p < COUNT; p++)
#pragma unroll
      for (int i = 0; i < WORDS; i++) words[p][i] = 0;
  }
};

/* The same of any layout, element by element: a word has one. */
template <class D, int MASKS>
struct ElementInputs {
  static constexpr int CHANNELS = SIXTEEN / MASKS, COUNT = 2;
  uint32_t words[COUNT][CHANNELS];

  PNN_DEVICE float value(int pixel, int map) const { return half_of(D{}, words[pixel][map / MASKS], 0); }
  PNN_DEVICE void load(int second, const char *const from[COUNT], int64_t step) {
    if (CHANNELS == 1 && !second) return;
    const int first = CHANNELS == 1 ? 0 : second * CHANNELS / 2, last = CHANNELS == 1 ? 1 : first + CHANNELS / 2;
#pragma unroll
    for (int p = 0; p < COUNT; p++) {
      const char *at = from[p] + first * step;
#pragma unroll
      for (int c = first; c < last; c++, at += step) words[p][c] = *reinterpret_cast<const uint16_t *>(at);
    }
  }
  PNN_DEVICE void clear() {
#pragma unroll
    for (int p = 0; p < COUNT; p++)
#pragma unroll
      for (int c = 0; c < CHANNELS; c++) words[p][c] = 0;
  }
};

/* Which of them x is read by. */
enum Reading { READ_PIXELS, READ_CHANNELS, READ_ELEMENTS };
template <class D, Reading READING, int MASKS>
using InputsOf =
    std::conditional_t<READING == READ_ELEMENTS, ElementInputs<D, MASKS>, Inputs<D, READING == READ_PIXELS, MASKS>>;

/* In tensors whose pixels lie in aligned pairs, which no image ends inside, a word has two of them; where channels lie
 * in runs of 16 bytes a thread takes those. `channels` are a group's. */
inline Reading reading_of(int staging, int64_t channels) {
  if (along_pixels(staging)) return READ_PIXELS;
  return staging == STAGE_CHANNELS && channels % 8 == 0 ? READ_CHANNELS : READ_ELEMENTS;
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
