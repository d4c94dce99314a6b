/*
 * emulated_pairs.h - the bfloat16 instructions that kernels/pairs.h uses, in AVX-512, for processors that lack them.
 *
 * Included before the kernels by the build's option PNN_EMULATE_PAIRS, so that the code around these instructions is
 * tested everywhere. They do as Intel's manual says: to nearest even, denormals taken for zeros; a dot product adds its
 * two products one after the other, the odd one first.
 */
#ifndef PNN_TESTS_EMULATED_PAIRS_H
#define PNN_TESTS_EMULATED_PAIRS_H

#include <immintrin.h>

/* vcvtneps2bf16, in the lower half of each lane. */
static inline __attribute__((always_inline)) __m512i emulated_round(__m512 x) {
  const __m512i bits = (__m512i)x, sign = _mm512_set1_epi32((int)0x80000000);
  const __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  const __mmask16 normal = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x7f800000));
  return _mm512_srli_epi32(_mm512_mask_mov_epi32(_mm512_and_epi32(bits, sign), normal, rounded), 16);
}

/* vdpbf16ps */
static inline __attribute__((always_inline)) __m512 emulated_dot(__m512 sum, __m512i a, __m512i b) {
  const __m512i odd = _mm512_set1_epi32((int)0xffff0000);
  sum = _mm512_fmadd_ps((__m512)_mm512_and_epi32(a, odd), (__m512)_mm512_and_epi32(b, odd), sum);
  return _mm512_fmadd_ps((__m512)_mm512_slli_epi32(a, 16), (__m512)_mm512_slli_epi32(b, 16), sum);
}

#define __m512bh __m512i
#define _mm512_dpbf16_ps(sum, a, b) emulated_dot(sum, (__m512i)(a), (__m512i)(b))
#define _mm512_cvtneps_pbh(x) _mm512_cvtepi32_epi16(emulated_round(x))
#define _mm512_cvtne2ps_pbh(high, low) \
  _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtneps_pbh(low)), _mm512_cvtneps_pbh(high), 1)

#endif
