/*
 * wgmma.h - what the kernels by Hopper's asynchronous products (*_wgmma.cu, for sm_90a alone) share: x of two
 * neighbouring pixels and sixteen maps in a thread's registers, and whether this device has such products.
 */
#ifndef PNN_CUDA_WGMMA_H
#define PNN_CUDA_WGMMA_H

#include "kernels.h"
#include "response.h"

namespace pnn_cuda {

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
  /* The first or the second eight maps' channels, from those of the first pixel and channel on. */
  PNN_DEVICE void load(int second, const char *const from[COUNT], int64_t step) {
    if constexpr (PIXELS) {
      if (CHANNELS == 1 && !second) return;
      const int first = CHANNELS == 1 ? 0 : second * CHANNELS / 2, last = CHANNELS == 1 ? 1 : first + CHANNELS / 2;
      const char *at = from[0] + first * step;
#pragma unroll
      for (int c = first; c < last; c++, at += step) words[0][c] = load_global(reinterpret_cast<const uint32_t *>(at));
    } else {
#pragma unroll
      for (int p = 0; p < 2; p++) {
        if constexpr (MASKS == 1) {
          const words4 v = load_global(reinterpret_cast<const words4 *>(from[p]) + second);
#pragma unroll
          for (int i = 0; i < 4; i++) words[p][second * 4 + i] = v.w[i];
        } else if (second) {
          if constexpr (MASKS == 2) {
            const words4 v = load_global(reinterpret_cast<const words4 *>(from[p]));
#pragma unroll
            for (int i = 0; i < 4; i++) words[p][i] = v.w[i];
          } else if constexpr (MASKS == 16) {
            words[p][0] = *reinterpret_cast<const uint16_t *>(from[p]);
          } else {
#pragma unroll
            for (int i = 0; i < WORDS; i++) words[p][i] = load_global(reinterpret_cast<const uint32_t *>(from[p]) + i);
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

/* What a thread knows of its two pixels. */
struct Pair {
  uint32_t row[2], column[2];
  const char *input[2];
};

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
