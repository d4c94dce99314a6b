/*
 * simd.h - vectors of float and double, one spelling for every instruction set.
 *
 * The kernel sources are compiled once per instruction set, each time with one of PNN_ISA_PORTABLE, PNN_ISA_AVX2,
 * PNN_ISA_AVX512 or PNN_ISA_NEON defined. Types are the compiler's own vector extensions (GCC and Clang), so that
 * + - * / & | ^ ~ << >> and the comparisons (which give all-ones or zero per lane) are ordinary operators; here stands
 * only what they lack. Every function works lane by lane and rounds as IEEE 754 says, so a lane's bits do not depend
 * on the width: this is what makes results equal on every instruction set. Compile with -ffp-contract=off: a fused
 * multiply-add happens where vf_fma or vd_fma is written, and nowhere else.
 *
 *     vf  PNN_VF floats     vi  as many int32      vu  as many uint32
 *     vd  PNN_VD doubles    vl  as many int64      vw  as many uint64       PNN_VD = PNN_VF / 2
 */
#ifndef PNN_SIMD_H
#define PNN_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(PNN_ISA_AVX512)
#include <immintrin.h>
#define PNN_VF 16
#elif defined(PNN_ISA_AVX2)
#include <immintrin.h>
#define PNN_VF 8
#elif defined(PNN_ISA_NEON)
#include <arm_neon.h>
#define PNN_VF 4
#elif defined(PNN_ISA_PORTABLE)
#define PNN_VF 4
#else
#error "define one PNN_ISA_..."
#endif
#define PNN_VD (PNN_VF / 2)

typedef float vf __attribute__((vector_size(4 * PNN_VF)));
typedef int32_t vi __attribute__((vector_size(4 * PNN_VF)));
typedef uint32_t vu __attribute__((vector_size(4 * PNN_VF)));
typedef double vd __attribute__((vector_size(8 * PNN_VD)));
typedef int64_t vl __attribute__((vector_size(8 * PNN_VD)));
typedef uint64_t vw __attribute__((vector_size(8 * PNN_VD)));
typedef uint32_t vuh __attribute__((vector_size(4 * PNN_VD))); /* as many 32-bit values as a vw has lanes */
typedef uint16_t vh __attribute__((vector_size(2 * PNN_VF)));  /* as many 16-bit values as a vf has floats */
typedef uint8_t vb __attribute__((vector_size(PNN_VF)));       /* as many bytes */
typedef double vd2 __attribute__((vector_size(8 * PNN_VF)));   /* as many doubles as a vf has floats */

static inline vf vf_set1(float x) { return x - (vf){0}; }
static inline vd vd_set1(double x) { return x - (vd){0}; }
static inline vi vi_set1(int32_t x) { return x - (vi){0}; }
static inline vl vl_set1(int64_t x) { return x - (vl){0}; }
static inline vw vw_set1(uint64_t x) { return x - (vw){0}; }

static inline vf vf_load(const float *p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
static inline vd vd_load(const double *p) {
  vd v;
  memcpy(&v, p, sizeof v);
  return v;
}
static inline void vf_store(float *p, vf v) { memcpy(p, &v, sizeof v); }
static inline void vd_store(double *p, vd v) { memcpy(p, &v, sizeof v); }

/* mask ? a : b, by bits; each mask lane is all ones or zero. */
static inline vf vf_select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
static inline vd vd_select(vl mask, vd a, vd b) { return (vd)((mask & (vl)a) | (~mask & (vl)b)); }
static inline vi vi_select(vi mask, vi a, vi b) { return (mask & a) | (~mask & b); }
static inline vl vl_select(vl mask, vl a, vl b) { return (mask & a) | (~mask & b); }

/* a * b + c, rounded once. */
static inline vf vf_fma(vf a, vf b, vf c) {
#if defined(PNN_ISA_AVX512)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(PNN_ISA_AVX2)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(PNN_ISA_NEON)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  vf r;
  for (int i = 0; i < PNN_VF; i++) r[i] = fmaf(a[i], b[i], c[i]);
  return r;
#endif
}

static inline vd vd_fma(vd a, vd b, vd c) {
#if defined(PNN_ISA_AVX512)
  return (vd)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(PNN_ISA_AVX2)
  return (vd)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(PNN_ISA_NEON)
  return (vd)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  vd r;
  for (int i = 0; i < PNN_VD; i++) r[i] = fma(a[i], b[i], c[i]);
  return r;
#endif
}

static inline vf vf_abs(vf a) { return (vf)((vi)a & vi_set1(0x7fffffff)); }
static inline vd vd_abs(vd a) { return (vd)((vl)a & vl_set1(INT64_MAX)); }

/* The magnitude of a with the sign bit of s. */
static inline vf vf_copysign(vf a, vf s) { return (vf)(((vi)a & vi_set1(0x7fffffff)) | ((vi)s & vi_set1(INT32_MIN))); }
static inline vd vd_copysign(vd a, vd s) { return (vd)(((vl)a & vl_set1(INT64_MAX)) | ((vl)s & vl_set1(INT64_MIN))); }

/* Products of the lanes' low halves, whatever the high ones hold; by itself, no compiler finds this instruction. */
static inline vw vw_mul_low(vw a, vw b) {
#if defined(PNN_ISA_AVX512)
  return (vw)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(PNN_ISA_AVX2)
  return (vw)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(PNN_ISA_NEON)
  return (vw)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
  return (a & UINT32_MAX) * (b & UINT32_MAX);
#endif
}

static inline vw vw_xor3(vw a, vw b, vw c) {
#if defined(PNN_ISA_AVX512)
  return (vw)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
  return a ^ b ^ c;
#endif
}

#if defined(PNN_ISA_AVX512)
#define PNN_EVEN_HALVES 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define PNN_EVEN_AND_ODD_HALVES 0, 17, 2, 19, 4, 21, 6, 23, 8, 25, 10, 27, 12, 29, 14, 31
#elif defined(PNN_ISA_AVX2)
#define PNN_EVEN_HALVES 0, 2, 4, 6, 8, 10, 12, 14
#define PNN_EVEN_AND_ODD_HALVES 0, 9, 2, 11, 4, 13, 6, 15
#elif defined(PNN_ISA_NEON)
#define PNN_EVEN_HALVES 0, 2, 4, 6
#define PNN_EVEN_AND_ODD_HALVES 0, 5, 2, 7
#endif

/* The low halves of a's lanes and then of b's. */
static inline vu vw_low_halves(vw a, vw b) {
#if defined(PNN_ISA_PORTABLE) /* whichever half of a lane comes first */
  vu r;
  for (int i = 0; i < PNN_VD; i++) {
    r[i] = (uint32_t)a[i];
    r[i + PNN_VD] = (uint32_t)b[i];
  }
  return r;
#else
  return __builtin_shufflevector((vu)a, (vu)b, PNN_EVEN_HALVES);
#endif
}

/* Lane by lane, the low halves of `low` and `high` side by side. */
static inline vw vw_pair_low(vw low, vw high) {
#if defined(PNN_ISA_PORTABLE)
  return (low & UINT32_MAX) | high << 32;
#else
  return (vw)__builtin_shufflevector((vu)low, (vu)(high << 32), PNN_EVEN_AND_ODD_HALVES);
#endif
}

/* The sum of the eight bytes of each lane. */
static inline vw vw_byte_sums(vw a) {
#if defined(PNN_ISA_AVX512)
  return (vw)_mm512_sad_epu8((__m512i)a, _mm512_setzero_si512());
#elif defined(PNN_ISA_AVX2)
  return (vw)_mm256_sad_epu8((__m256i)a, _mm256_setzero_si256());
#elif defined(PNN_ISA_NEON)
  return (vw)vpaddlq_u32(vpaddlq_u16(vpaddlq_u8((uint8x16_t)a)));
#else
  const vw bytes = vw_set1(UINT64_C(0x00ff00ff00ff00ff)), pairs = (a & bytes) + (a >> 8 & bytes);
  const vw fours = pairs + (pairs >> 32);
  return (fours + (fours >> 16)) & 0xffff;
#endif
}

/* The two halves of a vf as doubles, exactly, and back, rounded to nearest. */
static inline void vf_to_vd(vf a, vd *low, vd *high) {
#if defined(PNN_ISA_AVX512)
  *low = (vd)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)a));
  *high = (vd)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)a, 1));
#elif defined(PNN_ISA_AVX2)
  *low = (vd)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)a));
  *high = (vd)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)a, 1));
#else
  for (int i = 0; i < PNN_VD; i++) {
    (*low)[i] = a[i];
    (*high)[i] = a[i + PNN_VD];
  }
#endif
}

static inline vf vf_from_vd(vd low, vd high) {
#if defined(PNN_ISA_AVX512)
  return (vf)_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)low)), _mm512_cvtpd_ps((__m512d)high),
                                1);
#elif defined(PNN_ISA_AVX2)
  return (vf)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps((__m256d)low)), _mm256_cvtpd_ps((__m256d)high),
                                  1);
#else
  vf r;
  for (int i = 0; i < PNN_VD; i++) {
    r[i] = (float)low[i];
    r[i + PNN_VD] = (float)high[i];
  }
  return r;
#endif
}

#endif
