/*
 * inputs.h - x of a thread's pixels and sixteen or eight maps of a plain layer (response.h), as it comes from memory.
 */
#ifndef PNN_CUDA_INPUTS_H
#define PNN_CUDA_INPUTS_H

#include <type_traits>

#include "response.h"

namespace pnn_cuda {

/* The half h, 0 low and 1 high, of a word of two numbers. */
PNN_DEVICE float half_of(bfloat16, uint32_t word, int h) { return float_of(h ? word & 0xffff0000u : word << 16); }
PNN_DEVICE float half_of(float16, uint32_t word, int h) {
  return widen(float16{static_cast<uint16_t>(h ? word >> 16 : word)});
}

/* x of two pixels and sixteen maps in 16-bit numbers, MASKS to a channel (16 stands for more, too): a word has two
 * pixels of a channel or, where the channels are contiguous, two channels of a pixel. */
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

/* Channels of `maps` maps, `masks` to a channel; one where they are no more than a channel's. */
constexpr int channels_of(int maps, int masks) { return masks < maps ? maps / masks : 1; }

/* The same of float, of MAPS maps: a word has one number. */
template <bool PIXELS, int MASKS, int MAPS>
struct FloatInputs {
  static constexpr int CHANNELS = channels_of(MAPS, MASKS), COUNT = PIXELS ? 1 : 2;
  uint32_t words[2][CHANNELS];

  PNN_DEVICE float value(int pixel, int map) const { return float_of(words[pixel][map / MASKS]); }
  PNN_DEVICE void load(int second, const char *const from[COUNT], int64_t step) {
    if (CHANNELS == 1 && !second) return;
    constexpr int SHARE = CHANNELS == 1 ? 1 : CHANNELS / 2;
    const int first = CHANNELS == 1 ? 0 : second * SHARE;
    if constexpr (PIXELS) {
      const char *at = from[0] + first * step;
#pragma unroll
      for (int c = 0; c < SHARE; c++, at += step) {
        const words2 v = load_global(reinterpret_cast<const words2 *>(at));
        words[0][first + c] = v.w[0], words[1][first + c] = v.w[1];
      }
    } else {
#pragma unroll
      for (int p = 0; p < 2; p++) {
        const char *const at = from[p] + first * 4;
        if constexpr (SHARE >= 4) {
#pragma unroll
          for (int c = 0; c < SHARE; c += 4) {
            const words4 v = load_global(reinterpret_cast<const words4 *>(at + c * 4));
#pragma unroll
            for (int i = 0; i < 4; i++) words[p][first + c + i] = v.w[i];
          }
        } else if constexpr (SHARE == 2) {
          const words2 v = load_global(reinterpret_cast<const words2 *>(at));
          words[p][first] = v.w[0], words[p][first + 1] = v.w[1];
        } else {
          words[p][first] = load_global(reinterpret_cast<const uint32_t *>(at));
        }
      }
    }
  }
  PNN_DEVICE void clear() {
#pragma unroll
    for (int p = 0; p < 2; p++)
#pragma unroll
      for (int c = 0; c < CHANNELS; c++) words[p][c] = 0;
  }
};

/* The same of float, of one pixel and SIXTEEN maps in shared memory. */
template <bool PIXELS, int MASKS>
struct SharedFloats {
  static constexpr int CHANNELS = SIXTEEN / MASKS;
  uint32_t words[CHANNELS];

  PNN_DEVICE float value(int, int map) const { return float_of(words[map / MASKS]); }
  /* All of four channels or fewer come with the second half. */
  template <bool>
  PNN_DEVICE void load(int second, const char *const from[1], int64_t step) {
    constexpr int SHARE = CHANNELS > 4 ? CHANNELS / 2 : CHANNELS;
    if (CHANNELS <= 4 && !second) return;
    const int first = CHANNELS <= 4 ? 0 : second * SHARE;
    if constexpr (PIXELS) {
#pragma unroll
      for (int c = first; c < first + SHARE; c++)
        words[c] = load_shared(reinterpret_cast<const uint32_t *>(from[0] + c * step));
    } else if constexpr (SHARE >= 4) {
#pragma unroll
      for (int c = first; c < first + SHARE; c += 4) {
        const words4 v = load_shared(reinterpret_cast<const words4 *>(from[0] + c * 4));
#pragma unroll
        for (int i = 0; i < 4; i++) words[c + i] = v.w[i];
      }
    } else if constexpr (SHARE == 2) {
      const words2 v = load_shared(reinterpret_cast<const words2 *>(from[0]));
      words[0] = v.w[0], words[1] = v.w[1];
    } else {
      words[0] = load_shared(reinterpret_cast<const uint32_t *>(from[0]));
    }
  }
};

/* The same of any layout, element by element: a word has one. */
template <class D, int MASKS, int MAPS>
struct ElementInputs {
  static constexpr int CHANNELS = channels_of(MAPS, MASKS), COUNT = 2;
  uint32_t words[COUNT][CHANNELS];

  PNN_DEVICE float value(int pixel, int map) const {
    const uint32_t word = words[pixel][map / MASKS];
    if constexpr (sizeof(D) == 4)
      return float_of(word);
    else
      return half_of(D{}, word, 0);
  }
  PNN_DEVICE void load(int second, const char *const from[COUNT], int64_t step) {
    using Word = std::conditional_t<sizeof(D) == 4, uint32_t, uint16_t>;
    if (CHANNELS == 1 && !second) return;
    const int first = CHANNELS == 1 ? 0 : second * CHANNELS / 2, last = CHANNELS == 1 ? 1 : first + CHANNELS / 2;
#pragma unroll
    for (int p = 0; p < COUNT; p++) {
      const char *at = from[p] + first * step;
#pragma unroll
      for (int c = first; c < last; c++, at += step) words[p][c] = *reinterpret_cast<const Word *>(at);
    }
  }
  PNN_DEVICE void clear() {
#pragma unroll
    for (int p = 0; p < COUNT; p++)
#pragma unroll
      for (int c = 0; c < CHANNELS; c++) words[p][c] = 0;
  }
};

/* Which of them x is read by; fewer than sixteen maps are for elements of four bytes. */
enum Reading { READ_PIXELS, READ_CHANNELS, READ_ELEMENTS };
template <class D, Reading READING, int MASKS, int MAPS = SIXTEEN>
using InputsOf = std::conditional_t<READING == READ_ELEMENTS, ElementInputs<D, MASKS, MAPS>,
                                    std::conditional_t<sizeof(D) == 4, FloatInputs<READING == READ_PIXELS, MASKS, MAPS>,
                                                       Inputs<D, READING == READ_PIXELS, MASKS>>>;

/* x of a word's pixels from shared memory: of two or, of float, of one. */
template <class D, bool PIXELS, int MASKS>
using StagedInputs = std::conditional_t<sizeof(D) == 4, SharedFloats<PIXELS, MASKS>, Inputs<D, PIXELS, MASKS>>;

/* In tensors whose pixels lie in aligned pairs, which no image ends inside, a thread takes both at once; where channels
 * lie in runs of 16 bytes it takes those. `channels` are a group's. */
template <class D>
Reading reading_of(int staging, int64_t channels) {
  constexpr int SIZE = static_cast<int>(sizeof(D));
  if (staging == STAGE_PIXELS || (SIZE == 2 && staging == STAGE_WORDS)) return READ_PIXELS;
  return staging == STAGE_CHANNELS && channels % (16 / SIZE) == 0 ? READ_CHANNELS : READ_ELEMENTS;
}

}  // namespace pnn_cuda

#endif
