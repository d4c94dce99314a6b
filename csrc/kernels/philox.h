/*
 * philox.h - Philox4x32-10, the counter-based generator behind every mask recipe.
 *
 * Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Four 32-bit words of counter and
 * two of key give four words of output, with no state, so that any pixel's mask can be computed by itself. Sixteen
 * counters at a time, word by word; by itself, no compiler finds AVX-512's multiplication of 32-bit halves.
 */
#ifndef PNN_KERNELS_PHILOX_H
#define PNN_KERNELS_PHILOX_H

#include <stdint.h>

#define PHILOX_LANES 16
#define PHILOX_M0 UINT32_C(0xD2511F53) /* the multipliers, and what the keys grow by from round to round */
#define PHILOX_M1 UINT32_C(0xCD9E8D57)
#define PHILOX_W0 UINT32_C(0x9E3779B9)
#define PHILOX_W1 UINT32_C(0xBB67AE85)
#define PHILOX_XOR 0x96 /* what vpternlog calls the exclusive or of all three */

#if defined(PNN_ISA_AVX512)
/* Rounds first, ..., 9 on words in the low halves of 64-bit lanes: the multiplication reads no more, so that the high
 * halves hold anything. */
static inline __attribute__((always_inline)) void philox_rounds(__m512i w[4][2], const uint32_t key[2], int first) {
  const __m512i m0 = _mm512_set1_epi64(PHILOX_M0), m1 = _mm512_set1_epi64(PHILOX_M1);
  __m512i k0 = _mm512_set1_epi64(key[0] + (uint32_t)first * PHILOX_W0);
  __m512i k1 = _mm512_set1_epi64(key[1] + (uint32_t)first * PHILOX_W1);
#pragma GCC unroll 10
  for (int round = first; round < 10; round++) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      const __m512i a = _mm512_mul_epu32(m0, w[0][h]), b = _mm512_mul_epu32(m1, w[2][h]);
      w[0][h] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(b, 32), w[1][h], k0, PHILOX_XOR);
      w[2][h] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(a, 32), w[3][h], k1, PHILOX_XOR);
      w[1][h] = b;
      w[3][h] = a;
    }
    k0 = _mm512_add_epi32(k0, _mm512_set1_epi64(PHILOX_W0));
    k1 = _mm512_add_epi32(k1, _mm512_set1_epi64(PHILOX_W1));
  }
}

/* Eight words, each in the low half of a lane. */
static inline __m512i philox_load(const uint32_t *words) {
  return _mm512_cvtepu32_epi64(_mm256_loadu_si256((const __m256i *)(const void *)words));
}
#endif

/* words[w][lane]: the counter's word w on entry, the output's on return. */
static inline void philox4x32_10(uint32_t words[4][PHILOX_LANES], const uint32_t key[2]) {
#if defined(PNN_ISA_AVX512)
  __m512i w[4][2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) w[i][h] = philox_load(words[i] + 8 * h);
  philox_rounds(w, key, 0);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++)
      _mm256_storeu_si256((__m256i *)(void *)(words[i] + 8 * h), _mm512_cvtepi64_epi32(w[i][h]));
#else
  uint32_t k0 = key[0], k1 = key[1];
  for (int round = 0; round < 10; round++) {
    for (int i = 0; i < PHILOX_LANES; i++) {
      const uint64_t a = (uint64_t)PHILOX_M0 * words[0][i];
      const uint64_t b = (uint64_t)PHILOX_M1 * words[2][i];
      words[0][i] = (uint32_t)(b >> 32) ^ words[1][i] ^ k0;
      words[2][i] = (uint32_t)(a >> 32) ^ words[3][i] ^ k1;
      words[1][i] = (uint32_t)b;
      words[3][i] = (uint32_t)a;
    }
    k0 += PHILOX_W0;
    k1 += PHILOX_W1;
  }
#endif
}

#endif
