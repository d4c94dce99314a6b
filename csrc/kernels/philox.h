/*
 * philox.h - Philox4x32-10, the counter-based generator behind every mask recipe.
 *
 * Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Four 32-bit words of counter and
 * two of key give four words of output, with no state, so that any pixel's mask can be computed by itself. Sixteen
 * counters at a time, word by word, in plain loops that compilers turn into vectors.
 */
#ifndef PNN_KERNELS_PHILOX_H
#define PNN_KERNELS_PHILOX_H

#include <stdint.h>

#define PHILOX_LANES 16

/* words[w][lane]: the counter's word w on entry, the output's on return. */
static inline void philox4x32_10(uint32_t words[4][PHILOX_LANES], const uint32_t key[2]) {
  uint32_t k0 = key[0], k1 = key[1];
  for (int round = 0; round < 10; round++) {
    for (int i = 0; i < PHILOX_LANES; i++) {
      const uint64_t a = (uint64_t)UINT32_C(0xD2511F53) * words[0][i];
      const uint64_t b = (uint64_t)UINT32_C(0xCD9E8D57) * words[2][i];
      words[0][i] = (uint32_t)(b >> 32) ^ words[1][i] ^ k0;
      words[2][i] = (uint32_t)(a >> 32) ^ words[3][i] ^ k1;
      words[1][i] = (uint32_t)b;
      words[3][i] = (uint32_t)a;
    }
    k0 += UINT32_C(0x9E3779B9);
    k1 += UINT32_C(0xBB67AE85);
  }
}

#endif
