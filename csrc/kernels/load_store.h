/*
 * load_store.h - tensors to panels and back: conversions, and rows or columns turned on the way; a part of kernels.c.
 */
#ifndef PNN_KERNELS_LOAD_STORE_H
#define PNN_KERNELS_LOAD_STORE_H

#if defined(PNN_REAL_F32)
static inline real from_bfloat16(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

static inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u); /* a NaN stays one */
  return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline real from_float16(uint16_t x) {
  /* The exponent is rebiased by a multiplication, which is exact and handles denormals; 2^112 = 2^(127 - 15). */
  const uint32_t sign = (uint32_t)(x & 0x8000u) << 16, rest = x & 0x7fffu;
  uint32_t bits = rest << 13;
  float f;
  memcpy(&f, &bits, sizeof f);
  f *= 0x1p112f;
  memcpy(&bits, &f, sizeof bits);
  if (rest >= 0x7c00u) bits = 0x7f800000u | (rest << 13);
  bits |= sign;
  memcpy(&f, &bits, sizeof f);
  return f;
}

static inline uint16_t to_float16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
  if (rest >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and above round to infinity */
  if (rest < 0x38800000u) {
    /* Below 2^-14 the result is a multiple of 2^-24: adding 0.5 rounds the sum there to nearest even. */
    float f;
    memcpy(&f, &rest, sizeof f);
    f += 0.5f;
    uint32_t sum;
    memcpy(&sum, &f, sizeof sum);
    return (uint16_t)(sign | (sum - 0x3f000000u));
  }
  return (uint16_t)(sign | ((rest + 0xfffu + ((rest >> 13) & 1u) - 0x38000000u) >> 13));
}

#else
static inline real from_float(float x) { return (real)x; }
static inline float to_float(real x) { return (float)x; }
#endif

static inline real from_real(real x) { return x; }
static inline real to_real(real x) { return x; }

/* The same conversions, a vector at a time: from and to a contiguous run. */
static inline vr load_vector_real(const real *p) { return vr_load(p); }
static inline void store_vector_real(real *p, vr v) { vr_store(p, v); }

#if defined(PNN_REAL_F32)
static inline vr load_vector_bfloat16(const uint16_t *p) {
  vh half;
  memcpy(&half, p, sizeof half);
  return (vr)(__builtin_convertvector(half, vu) << 16);
}

/* The bits of bfloat16(x) in the upper half of each lane; the lower half is anything. */
static inline vu upper_half(vf x) {
  const vu bits = (vu)x;
  const vu rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const vu nan = (vu)(x != x);
  return (nan & (bits | 0x400000)) | (~nan & rounded);
}

static inline void store_vector_bfloat16(uint16_t *p, vr v) {
  const vh half = __builtin_convertvector(upper_half(v) >> 16, vh);
  memcpy(p, &half, sizeof half);
}

static inline vr load_vector_float16(const uint16_t *p) {
#if defined(PNN_ISA_AVX512)
  return (vr)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
#elif defined(PNN_ISA_AVX2)
  return (vr)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
#else
  vr v;
  for (int i = 0; i < VR; i++) v[i] = from_float16(p[i]);
  return v;
#endif
}

static inline void store_vector_float16(uint16_t *p, vr v) {
#if defined(PNN_ISA_AVX512)
  _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(PNN_ISA_AVX2)
  _mm_storeu_si128((__m128i *)(void *)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < VR; i++) p[i] = to_float16(v[i]);
#endif
}
#else
static inline vr load_vector_float(const float *p) {
  vr v;
  for (int i = 0; i < VR; i++) v[i] = (real)p[i];
  return v;
}
static inline void store_vector_float(float *p, vr v) {
  for (int i = 0; i < VR; i++) p[i] = (float)v[i];
}
#endif

#define LOAD_AHEAD 8 /* rows: short pieces far apart, which the processor's own prefetchers don't foresee */

/* min(n, VR) reals. */
static inline vr load_some(const real *p, int64_t n) { return n >= VR ? vr_load(p) : vr_load_part(p, n); }
static inline void store_some(real *p, vr v, int64_t n) {
  if (n >= VR)
    vr_store(p, v);
  else
    vr_store_part(p, v, n);
}

/* The first n < VR values of a contiguous run, the other lanes 0 or anything; memory behind them is not touched. */
static inline vr load_part_real(const real *p, int64_t n) { return vr_load_part(p, n); }
static inline void store_part_real(real *p, vr v, int64_t n) { vr_store_part(p, v, n); }
#define DEFINE_PART(type, convert)                                    \
  static inline vr load_part_##convert(const type *p, int64_t n) {    \
    type part[VR];                                                    \
    copy_in(part, p, n);                                              \
    return load_vector_##convert(part);                               \
  }                                                                   \
  static inline void store_part_##convert(type *p, vr v, int64_t n) { \
    type part[VR];                                                    \
    store_vector_##convert(part, v);                                  \
    copy_out(p, part, n);                                             \
  }
#if defined(PNN_REAL_F32)
static inline void copy_in(uint16_t part[VR], const uint16_t *p, int64_t n) {
#if defined(PNN_ISA_AVX512)
  _mm256_storeu_si256((__m256i *)(void *)part, _mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p));
#else
  for (int i = 0; i < VR; i++) part[i] = i < n ? p[i] : 0;
#endif
}
static inline void copy_out(uint16_t *p, const uint16_t part[VR], int64_t n) {
#if defined(PNN_ISA_AVX512)
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), _mm256_loadu_si256((const __m256i *)(const void *)part));
#else
  for (int64_t i = 0; i < n; i++) p[i] = part[i];
#endif
}
DEFINE_PART(uint16_t, bfloat16)
DEFINE_PART(uint16_t, float16)
#else
static inline void copy_in(float part[VR], const float *p, int64_t n) {
  for (int i = 0; i < VR; i++) part[i] = i < n ? p[i] : 0;
}
static inline void copy_out(float *p, const float part[VR], int64_t n) {
  for (int64_t i = 0; i < n; i++) p[i] = part[i];
}
DEFINE_PART(float, float)
#endif

#define TURNED_LEAST (VR / 4) /* rows or columns; fewer are moved one by one */

/* One loop where columns are contiguous, one where rows are (a channels-last tensor, packed weights: up to VR x VR
 * values are turned in registers), one for the rest. */
#define DEFINE_LOAD(name, type, convert)                                                                            \
  static void name(void *dst_, int64_t ld, const void *src_, int64_t rows, int64_t row_stride, int64_t columns,     \
                   int64_t column_stride) {                                                                         \
    real *dst = dst_;                                                                                               \
    const type *src = src_;                                                                                         \
    if (column_stride == 1) {                                                                                       \
      const int64_t whole = columns / VR * VR, rest = columns - whole;                                              \
      for (int64_t r = 0; r < rows; r++) {                                                                          \
        real *restrict d = dst + r * ld;                                                                            \
        const type *restrict s = src + r * row_stride;                                                              \
        if (r + LOAD_AHEAD < rows)                                                                                  \
          for (int64_t j = 0; j < columns; j += 64 / (int64_t)sizeof(type))                                         \
            __builtin_prefetch(s + LOAD_AHEAD * row_stride + j);                                                    \
        for (int64_t j = 0; j < whole; j += VR) vr_store(d + j, load_vector_##convert(s + j));                      \
        if (rest) vr_store_part(d + whole, load_part_##convert(s + whole, rest), rest);                             \
      }                                                                                                             \
      return;                                                                                                       \
    }                                                                                                               \
    const bool turned = row_stride == 1 && rows >= TURNED_LEAST && columns >= TURNED_LEAST;                         \
    for (int64_t r = 0, n; turned && r < rows; r += n) {                                                            \
      n = rows - r < VR ? rows - r : VR;                                                                            \
      for (int64_t j = 0, count; j < columns; j += count) {                                                         \
        count = columns - j < VR ? columns - j : VR;                                                                \
        const type *from = src + r + j * column_stride;                                                             \
        vr v[VR];                                                                                                   \
        if (n == VR && count == VR) {                                                                               \
          for (int i = 0; i < VR; i++) v[i] = load_vector_##convert(from + i * column_stride);                      \
          vr_transpose(v);                                                                                          \
          for (int i = 0; i < VR; i++) vr_store(dst + (r + i) * ld + j, v[i]);                                      \
          continue;                                                                                                 \
        }                                                                                                           \
        for (int i = 0; i < VR; i++)                                                                                \
          v[i] = i >= count ? vr_set1(0)                                                                            \
                 : n == VR  ? load_vector_##convert(from + i * column_stride)                                       \
                            : load_part_##convert(from + i * column_stride, n);                                      \
        vr_transpose(v);                                                                                            \
        for (int i = 0; i < VR; i++)                                                                                \
          if (i < n) store_some(dst + (r + i) * ld + j, v[i], count);                                               \
      }                                                                                                             \
    }                                                                                                               \
    for (int64_t j = 0; !turned && j < columns; j++)                                                                \
      for (int64_t r = 0; r < rows; r++) dst[r * ld + j] = from_##convert(src[r * row_stride + j * column_stride]); \
  }

#define DEFINE_STORE(name, type, convert)                                                                             \
  static void name(void *dst_, int64_t row_stride, int64_t column_stride, const void *src_, int64_t ld, int64_t rows, \
                   int64_t columns) {                                                                                 \
    type *dst = dst_;                                                                                                 \
    const real *src = src_;                                                                                           \
    if (column_stride == 1) {                                                                                         \
      const int64_t whole = columns / VR * VR, rest = columns - whole;                                                \
      for (int64_t r = 0; r < rows; r++) {                                                                            \
        type *restrict d = dst + r * row_stride;                                                                      \
        const real *restrict s = src + r * ld;                                                                        \
        for (int64_t j = 0; j < whole; j += VR) store_vector_##convert(d + j, vr_load(s + j));                        \
        if (rest) store_part_##convert(d + whole, vr_load_part(s + whole, rest), rest);                               \
      }                                                                                                               \
      return;                                                                                                         \
    }                                                                                                                 \
    const bool turned = row_stride == 1 && rows >= TURNED_LEAST && columns >= TURNED_LEAST;                           \
    for (int64_t r = 0, n; turned && r < rows; r += n) {                                                              \
      n = rows - r < VR ? rows - r : VR;                                                                              \
      for (int64_t j = 0, count; j < columns; j += count) {                                                           \
        count = columns - j < VR ? columns - j : VR;                                                                  \
        type *to = dst + r + j * column_stride;                                                                       \
        vr v[VR];                                                                                                     \
        if (n == VR && count == VR) {                                                                                 \
          for (int i = 0; i < VR; i++) v[i] = vr_load(src + (r + i) * ld + j);                                        \
          vr_transpose(v);                                                                                            \
          for (int i = 0; i < VR; i++) store_vector_##convert(to + i * column_stride, v[i]);                          \
          continue;                                                                                                   \
        }                                                                                                             \
        for (int i = 0; i < VR; i++) v[i] = i < n ? load_some(src + (r + i) * ld + j, count) : vr_set1(0);            \
        vr_transpose(v);                                                                                              \
        for (int i = 0; i < VR; i++) {                                                                                \
          if (i >= count) continue;                                                                                   \
          if (n == VR)                                                                                                \
            store_vector_##convert(to + i * column_stride, v[i]);                                                     \
          else                                                                                                        \
            store_part_##convert(to + i * column_stride, v[i], n);                                                    \
        }                                                                                                             \
      }                                                                                                               \
    }                                                                                                                 \
    for (int64_t j = 0; !turned && j < columns; j++)                                                                  \
      for (int64_t r = 0; r < rows; r++) dst[r * row_stride + j * column_stride] = to_##convert(src[r * ld + j]);     \
  }

DEFINE_LOAD(load_real, real, real)
DEFINE_STORE(store_real, real, real)
#if defined(PNN_REAL_F32)
DEFINE_LOAD(load_bfloat16, uint16_t, bfloat16)
DEFINE_LOAD(load_float16, uint16_t, float16)
DEFINE_STORE(store_bfloat16, uint16_t, bfloat16)
DEFINE_STORE(store_float16, uint16_t, float16)
#else
DEFINE_LOAD(load_float, float, float)
DEFINE_STORE(store_float, float, float)
#endif

#endif
