/*
 * philox.h - Philox4x32-10, the counter-based generator behind every mask recipe.
 *
 * Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Four 32-bit words of counter and
 * two of key give four words of output, with no state, so that any pixel's mask can be computed by itself. Sixteen
 * counters at a time, word by word.
 */
#ifndef PNN_KERNELS_PHILOX_H
#define PNN_KERNELS_PHILOX_H

#include <stdint.h>

#include "simd.h"

#define PHILOX_LANES 16
#define PHILOX_M0 UINT32_C(0xD2511F53) /* the multipliers, and what the keys grow by from round to round */
#define PHILOX_M1 UINT32_C(0xCD9E8D57)
#define PHILOX_W0 UINT32_C(0x9E3779B9)
#define PHILOX_W1 UINT32_C(0xBB67AE85)

/* Counters are computed a vf's number at a time, in two vectors of 64-bit lanes: a word is the low half of a lane, and
 * since the multiplication reads no more, the high half holds anything. */
typedef struct philox_words {
  vw w[4][2];
} philox_words;

/* The rounds' keys, in every lane. */
typedef struct philox_keys {
  vw round[10][2];
} philox_keys;

static inline philox_keys philox_schedule(const uint32_t key[2]) {
  philox_keys keys;
  for (uint32_t i = 0; i < 10; i++) {
    keys.round[i][0] = vw_set1(key[0] + i * PHILOX_W0);
    keys.round[i][1] = vw_set1(key[1] + i * PHILOX_W1);
  }
  return keys;
}

static inline __attribute__((always_inline)) void philox_rounds(philox_words *words, const philox_keys *keys,
                                                                int first) {
  vw(*w)[2] = words->w;
#pragma GCC unroll 10
  for (int round = first; round < 10; round++)
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      const vw a = vw_mul_low(vw_set1(PHILOX_M0), w[0][h]), b = vw_mul_low(vw_set1(PHILOX_M1), w[2][h]);
      w[0][h] = vw_xor3(b >> 32, w[1][h], keys->round[round][0]);
      w[2][h] = vw_xor3(a >> 32, w[3][h], keys->round[round][1]);
      w[1][h] = b;
      w[3][h] = a;
    }
}

/* PNN_VF words, each to the low half of a lane, and back. */
static inline void philox_load(const uint32_t *words, vw lanes[2]) {
  for (int h = 0; h < 2; h++) {
    vuh half;
    memcpy(&half, words + h * PNN_VD, sizeof half);
    lanes[h] = __builtin_convertvector(half, vw);
  }
}
static inline void philox_store(uint32_t *words, const vw lanes[2]) {
  const vu all = vw_low_halves(lanes[0], lanes[1]);
  memcpy(words, &all, sizeof all);
}

/* words[w][lane]: the counter's word w on entry, the output's on return. */
static inline void philox4x32_10(uint32_t words[4][PHILOX_LANES], const philox_keys *keys) {
  for (int lane = 0; lane < PHILOX_LANES; lane += PNN_VF) {
    philox_words at;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) philox_load(words[i] + lane, at.w[i]);
    philox_rounds(&at, keys, 0);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) philox_store(words[i] + lane, at.w[i]);
  }
}

#endif
