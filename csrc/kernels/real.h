/*
 * real.h - the kernels' number type: float with PNN_REAL_F32, double with PNN_REAL_F64, on top of simd.h.
 *
 *     real  the scalar      vr  a vector of VR reals      vm  its comparison mask
 */
#ifndef PNN_KERNELS_REAL_H
#define PNN_KERNELS_REAL_H

#include "simd.h"

#if defined(PNN_REAL_F32)
typedef float real;
typedef vf vr;
typedef vi vm;
#define VR PNN_VF
#define vr_set1 vf_set1
#define vr_load vf_load
#define vr_store vf_store
#define vr_fma vf_fma
#define vr_select vf_select
#define PNN_REAL_SUFFIX f32
#elif defined(PNN_REAL_F64)
typedef double real;
typedef vd vr;
typedef vl vm;
#define VR PNN_VD
#define vr_set1 vd_set1
#define vr_load vd_load
#define vr_store vd_store
#define vr_fma vd_fma
#define vr_select vd_select
#define PNN_REAL_SUFFIX f64
#else
#error "define PNN_REAL_F32 or PNN_REAL_F64"
#endif

#if defined(PNN_ISA_AVX512)
#define PNN_ISA_SUFFIX avx512
#elif defined(PNN_ISA_AVX2)
#define PNN_ISA_SUFFIX avx2
#elif defined(PNN_ISA_NEON)
#define PNN_ISA_SUFFIX neon
#else
#define PNN_ISA_SUFFIX portable
#endif

/* From here on the compiler takes the pointer for an unknown one, so that it neither computes addresses nor loads
 * through it ahead of a tile's products, which leave no registers for that. */
#define KEEP_POINTER(pointer) __asm__("" : "+r"(pointer))

/* Keeps a vector in its register: short of registers, the compiler would load it again for each multiply-add. */
#if defined(PNN_ISA_AVX2)
#define KEEP_VECTOR(vector) __asm__("" : "+x"(vector))
#else
#define KEEP_VECTOR(vector) ((void)0)
#endif

/* The first n < VR reals; the vector's other lanes are zero, memory behind them is not touched. */
static inline vr vr_load_part(const real *p, int64_t n) {
#if defined(PNN_ISA_AVX512) && defined(PNN_REAL_F32)
  return (vr)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#elif defined(PNN_ISA_AVX512)
  return (vr)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
#elif defined(PNN_ISA_AVX2) && defined(PNN_REAL_F32)
  static const int32_t mask[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return (vr)_mm256_maskload_ps(p, _mm256_loadu_si256((const __m256i *)(const void *)(mask + VR - n)));
#elif defined(PNN_ISA_AVX2)
  static const int64_t mask[8] = {-1, -1, -1, -1};
  return (vr)_mm256_maskload_pd(p, _mm256_loadu_si256((const __m256i *)(const void *)(mask + VR - n)));
#else
  vr v = {0};
  for (int64_t i = 0; i < n; i++) v[i] = p[i];
  return v;
#endif
}
static inline void vr_store_part(real *p, vr v, int64_t n) {
#if defined(PNN_ISA_AVX512) && defined(PNN_REAL_F32)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#elif defined(PNN_ISA_AVX512)
  _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
#elif defined(PNN_ISA_AVX2) && defined(PNN_REAL_F32)
  /* By halves: a masked store takes AMD's processors ten times as long. */
  __m128 half = _mm256_castps256_ps128((__m256)v);
  if (n & 4) {
    _mm_storeu_ps(p, half);
    half = _mm256_extractf128_ps((__m256)v, 1);
    p += 4;
  }
  if (n & 2) {
    _mm_storel_pi((__m64 *)(void *)p, half);
    half = _mm_movehl_ps(half, half);
    p += 2;
  }
  if (n & 1) _mm_store_ss(p, half);
#else
  for (int64_t i = 0; i < n; i++) p[i] = v[i];
#endif
}

/* x becomes its transpose, as a VR x VR matrix: at each step two vectors exchange blocks of 8, 4, 2 and 1 lanes. */
#define PNN_EXCHANGE_8_LOW 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define PNN_EXCHANGE_8_HIGH 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#if VR == 16
#define PNN_EXCHANGE_4_LOW 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define PNN_EXCHANGE_4_HIGH 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define PNN_EXCHANGE_2_LOW 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define PNN_EXCHANGE_2_HIGH 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define PNN_EXCHANGE_1_LOW 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define PNN_EXCHANGE_1_HIGH 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
#elif VR == 8
#define PNN_EXCHANGE_4_LOW 0, 1, 2, 3, 8, 9, 10, 11
#define PNN_EXCHANGE_4_HIGH 4, 5, 6, 7, 12, 13, 14, 15
#define PNN_EXCHANGE_2_LOW 0, 1, 8, 9, 4, 5, 12, 13
#define PNN_EXCHANGE_2_HIGH 2, 3, 10, 11, 6, 7, 14, 15
#define PNN_EXCHANGE_1_LOW 0, 8, 2, 10, 4, 12, 6, 14
#define PNN_EXCHANGE_1_HIGH 1, 9, 3, 11, 5, 13, 7, 15
#elif VR == 4
#define PNN_EXCHANGE_2_LOW 0, 1, 4, 5
#define PNN_EXCHANGE_2_HIGH 2, 3, 6, 7
#define PNN_EXCHANGE_1_LOW 0, 4, 2, 6
#define PNN_EXCHANGE_1_HIGH 1, 5, 3, 7
#else
#define PNN_EXCHANGE_1_LOW 0, 2
#define PNN_EXCHANGE_1_HIGH 1, 3
#endif
#define PNN_EXCHANGE(x, block)                                                                   \
  _Pragma("GCC unroll 16") for (int i = 0; i < VR; i++) {                                        \
    if (i & (block)) continue;                                                                   \
    const vr low = __builtin_shufflevector(x[i], x[i + (block)], PNN_EXCHANGE_##block##_LOW);    \
    x[i + (block)] = __builtin_shufflevector(x[i], x[i + (block)], PNN_EXCHANGE_##block##_HIGH); \
    x[i] = low;                                                                                  \
  }
static inline void vr_transpose(vr x[VR]) {
#if VR >= 16
  PNN_EXCHANGE(x, 8)
#endif
#if VR >= 8
  PNN_EXCHANGE(x, 4)
#endif
#if VR >= 4
  PNN_EXCHANGE(x, 2)
#endif
  PNN_EXCHANGE(x, 1)
}

#define PNN_JOIN_(a, b, c) a##_##b##_##c
#define PNN_JOIN(a, b, c) PNN_JOIN_(a, b, c)
#define PNN_STRING_(a) #a
#define PNN_STRING(a) PNN_STRING_(a)

/* name_<instruction set>_<precision>, for the few symbols that leave a kernel's file. */
#define PNN_KERNEL_NAME(name) PNN_JOIN(name, PNN_ISA_SUFFIX, PNN_REAL_SUFFIX)

#endif
