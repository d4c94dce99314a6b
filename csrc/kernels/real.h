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

/* The first n < VR reals; the vector's other lanes are zero, memory behind them is not touched. */
static inline vr vr_load_part(const real *p, int64_t n) {
#if defined(PNN_ISA_AVX512) && defined(PNN_REAL_F32)
  return (vr)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#elif defined(PNN_ISA_AVX512)
  return (vr)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
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
#else
  for (int64_t i = 0; i < n; i++) p[i] = v[i];
#endif
}

#define PNN_JOIN_(a, b, c) a##_##b##_##c
#define PNN_JOIN(a, b, c) PNN_JOIN_(a, b, c)
#define PNN_STRING_(a) #a
#define PNN_STRING(a) PNN_STRING_(a)

/* name_<instruction set>_<precision>, for the few symbols that leave a kernel's file. */
#define PNN_KERNEL_NAME(name) PNN_JOIN(name, PNN_ISA_SUFFIX, PNN_REAL_SUFFIX)

#endif
