/*
 * kernels.c - every kernel of the table, compiled once per instruction set and precision.
 *
 * Written on the vectors of real.h: one source gives the portable, AVX2, AVX-512 and NEON kernels, and each gives the
 * same bits, since a lane's arithmetic does not depend on the width (simd.h) and the order of every sum is fixed in
 * the contract (table.h). Only the tile sizes below are chosen per instruction set; they change speed, never bits.
 */
#include <stdbool.h>

#include "real.h"

#include "activations.h"
#include "philox.h"
#include "table.h"

/* Tiles of `product`: rows x vectors of accumulators, beside the vectors of B and one broadcast of A. 32 registers hold
 * 6 x 4, which take 37 instructions for 24 multiply-adds where 8 x 2 take 29 for 16: a processor with two multiply-add
 * units of 16 lanes is bound by what it decodes. 16 registers hold 6 x 2.
 * Strips are the narrower tiles of products whose columns are outputs or maps, of which there may be few. */
#if defined(PNN_ISA_AVX512)
#define TILE_ROWS 6
#define TILE_VECTORS 4
#define STRIP_ROWS 8
#define STRIP_VECTORS 2
#elif defined(PNN_ISA_NEON)
#define TILE_ROWS 8
#define TILE_VECTORS 2
#else
#define TILE_ROWS 6
#define TILE_VECTORS 2
#endif
#if !defined(STRIP_ROWS)
#define STRIP_ROWS TILE_ROWS
#define STRIP_VECTORS TILE_VECTORS
#endif
#define TILE_COLUMNS (TILE_VECTORS * VR)
#define STRIP_COLUMNS (STRIP_VECTORS * VR)
#define LINE (64 / (int64_t)sizeof(real)) /* reals of a cache line */

/* Tiles of `dot`: rows x columns of sums in PNN_LANES lanes each, LANE_VECTORS registers, of which one is in work at a
 * time: 32 registers hold 4 x 4, 16 hold 4 x 2. */
#define LANE_VECTORS (PNN_LANES / VR)
#define DOT_ROWS 4
#if defined(PNN_ISA_AVX512) || defined(PNN_ISA_NEON)
#define DOT_COLUMNS 4
#else
#define DOT_COLUMNS 2
#endif

/* ---- tensors to panels and back ---- */

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

/* ---- products ---- */

/* The sums of a tile, in registers from tile_begin to tile_end: of `most` rows, a constant, the first `rows` of which C
 * has. */
static inline __attribute__((always_inline)) void tile_begin(int most, vr sum[][TILE_VECTORS], int64_t rows,
                                                             const real *c, int64_t ldc, const real *start) {
  if (start) {
#pragma GCC unroll 8
    for (int i = 0; i < most; i++)
#pragma GCC unroll 4
      for (int v = 0; v < TILE_VECTORS; v++) sum[i][v] = vr_set1(start[i]);
    return;
  }
#pragma GCC unroll 8
  for (int i = 0; i < most; i++)
#pragma GCC unroll 4
    for (int v = 0; v < TILE_VECTORS; v++) sum[i][v] = i < rows ? vr_load(c + i * ldc + v * VR) : vr_set1(0);
}

static inline __attribute__((always_inline)) void tile_step(int most, vr sum[][TILE_VECTORS], const real *a,
                                                            const vr b[TILE_VECTORS]) {
#pragma GCC unroll 8
  for (int i = 0; i < most; i++) {
    const vr av = vr_set1(a[i]);
#pragma GCC unroll 4
    for (int v = 0; v < TILE_VECTORS; v++) sum[i][v] = vr_fma(av, b[v], sum[i][v]);
  }
}

static inline __attribute__((always_inline)) void tile_products(int most, int64_t depth, vr sum[][TILE_VECTORS],
                                                                const real *restrict a, const real *restrict b,
                                                                int64_t ldb, pnn_ahead *ahead) {
  for (int64_t left = depth; left > 0; left -= PNN_AHEAD_DEPTH, pnn_ahead_step(ahead))
    for (int64_t k = 0; k < left && k < PNN_AHEAD_DEPTH; k++, a += TILE_ROWS, b += ldb) {
      vr bv[TILE_VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < TILE_VECTORS; v++) bv[v] = vr_load(b + v * VR);
      tile_step(most, sum, a, bv);
    }
}

static inline __attribute__((always_inline)) void tile_end(int most, vr sum[][TILE_VECTORS], int64_t rows, real *c,
                                                           int64_t ldc) {
#pragma GCC unroll 8
  for (int i = 0; i < most; i++) {
    if (i >= rows) break;
#pragma GCC unroll 4
    for (int v = 0; v < TILE_VECTORS; v++) vr_store(c + i * ldc + v * VR, sum[i][v]);
  }
}

static inline __attribute__((always_inline)) void tile_product(int most, int64_t depth, int64_t rows,
                                                               const real *restrict a, const real *restrict b,
                                                               int64_t ldb, real *restrict c, int64_t ldc,
                                                               const real *start, pnn_ahead *ahead) {
  vr sum[TILE_ROWS][TILE_VECTORS];
  tile_begin(most, sum, rows, c, ldc, start);
  tile_products(most, depth, sum, a, b, ldb, ahead);
  tile_end(most, sum, rows, c, ldc);
}

static void product(int64_t depth, int64_t rows, const void *a, const void *b, int64_t ldb, void *c, int64_t ldc,
                    const void *start, pnn_ahead *ahead) {
  if (rows == TILE_ROWS)
    tile_product(TILE_ROWS, depth, TILE_ROWS, a, b, ldb, c, ldc, start, ahead);
  else if (rows > 4)
    tile_product(TILE_ROWS, depth, rows, a, b, ldb, c, ldc, start, ahead);
  else if (rows > 2)
    tile_product(4, depth, rows, a, b, ldb, c, ldc, start, ahead);
  else
    tile_product(2, depth, rows, a, b, ldb, c, ldc, start, ahead);
}

/* One tile after the other along the columns, so that each row of C is written as one stream. The lines that the next
 * panel writes, if it is as wide, are asked for on the way: rows of a panel are too short for the processor to foresee
 * them. */
static void product_run(int64_t depth, int64_t rows, int64_t columns, const void *a_, const void *b_, int64_t ldb,
                        void *c_, int64_t ldc, const void *start, pnn_ahead *ahead) {
  for (int64_t j = 0; j < columns; j += TILE_COLUMNS, pnn_ahead_step(ahead)) {
    const real *restrict a = a_;
    const real *restrict b = (const real *)b_ + j;
    real *restrict c = (real *)c_ + j;
    vr sum[TILE_ROWS][TILE_VECTORS];
    tile_begin(TILE_ROWS, sum, rows, c, ldc, start);
    for (int64_t k = 0; k < depth; k++, a += TILE_ROWS, b += ldb) {
      vr bv[TILE_VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < TILE_VECTORS; v++) bv[v] = vr_load(b + v * VR);
      tile_step(TILE_ROWS, sum, a, bv);
    }
    const int64_t n = columns - j;
    if (n >= TILE_COLUMNS && rows == TILE_ROWS) {
      tile_end(TILE_ROWS, sum, TILE_ROWS, c, ldc);
#pragma GCC unroll 8
      for (int i = 0; i < TILE_ROWS; i++)
        for (int64_t next = columns; next < columns + TILE_COLUMNS; next += LINE)
          __builtin_prefetch(c + i * ldc + next, 1, 2);
      continue;
    }
#pragma GCC unroll 8
    for (int i = 0; i < TILE_ROWS; i++) {
      if (i >= rows) continue;
#pragma GCC unroll 4
      for (int v = 0; v < TILE_VECTORS; v++)
        if (v * VR < n) store_some(c + i * ldc + v * VR, sum[i][v], n - v * VR);
    }
  }
}

/* The tree over PNN_LANES partial sums: (i, i+8), (i, i+4), (i, i+2), (0, 1). */
static inline real lanes_sum(const vr lane[LANE_VECTORS]) {
#if LANE_VECTORS == 1
  vr v = lane[0];
  v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  return v[0] + v[1];
#else
  real x[PNN_LANES];
  memcpy(x, lane, sizeof x);
  for (int width = PNN_LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) x[i] += x[i + width];
  return x[0];
#endif
}

/* The same tree for DOT_ROWS * DOT_COLUMNS sums at once: the steps within a vector fold two vectors into one, so that
 * each addition works on full vectors. */
static inline __attribute__((always_inline)) void lanes_sums(const vr sum[DOT_ROWS * DOT_COLUMNS][LANE_VECTORS],
                                                             real *out) {
  /* Lanes whose number lacks the bit `step` become a[lane] + a[lane ^ step], the others b[lane] + b[lane ^ step]: one
   * operand keeps its lanes and needs no shuffle. */
#define FOLD(a, b, step) \
  (__builtin_shufflevector(a, b, FOLD_KEEP_##step) + __builtin_shufflevector(a, b, FOLD_MOVE_##step))
#define FOLD_ALL(step) \
  _Pragma("GCC unroll 8") for (int i = 0; i < (step); i++) one[i] = FOLD(one[i], one[i + (step)], step);
#if VR == 16
#define FOLD_KEEP_8 0, 1, 2, 3, 4, 5, 6, 7, 24, 25, 26, 27, 28, 29, 30, 31
#define FOLD_MOVE_8 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23
#define FOLD_KEEP_4 0, 1, 2, 3, 20, 21, 22, 23, 8, 9, 10, 11, 28, 29, 30, 31
#define FOLD_MOVE_4 4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27
#define FOLD_KEEP_2 0, 1, 18, 19, 4, 5, 22, 23, 8, 9, 26, 27, 12, 13, 30, 31
#define FOLD_MOVE_2 2, 3, 16, 17, 6, 7, 20, 21, 10, 11, 24, 25, 14, 15, 28, 29
#define FOLD_KEEP_1 0, 17, 2, 19, 4, 21, 6, 23, 8, 25, 10, 27, 12, 29, 14, 31
#define FOLD_MOVE_1 1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30
#elif VR == 8
#define FOLD_KEEP_4 0, 1, 2, 3, 12, 13, 14, 15
#define FOLD_MOVE_4 4, 5, 6, 7, 8, 9, 10, 11
#define FOLD_KEEP_2 0, 1, 10, 11, 4, 5, 14, 15
#define FOLD_MOVE_2 2, 3, 8, 9, 6, 7, 12, 13
#define FOLD_KEEP_1 0, 9, 2, 11, 4, 13, 6, 15
#define FOLD_MOVE_1 1, 8, 3, 10, 5, 12, 7, 14
#elif VR == 4
#define FOLD_KEEP_2 0, 1, 6, 7
#define FOLD_MOVE_2 2, 3, 4, 5
#define FOLD_KEEP_1 0, 5, 2, 7
#define FOLD_MOVE_1 1, 4, 3, 6
#else
#define FOLD_KEEP_1 0, 3
#define FOLD_MOVE_1 1, 2
#endif
#pragma GCC unroll 8
  for (int first = 0; first < DOT_ROWS * DOT_COLUMNS; first += VR) {
    vr one[VR]; /* of each sum, in the end in lane i of one[0] */
#pragma GCC unroll 16
    for (int i = 0; i < VR; i++) {
      vr lane[LANE_VECTORS];
#pragma GCC unroll 8
      for (int v = 0; v < LANE_VECTORS; v++) lane[v] = sum[first + i][v];
#pragma GCC unroll 3
      for (int width = LANE_VECTORS / 2; width > 0; width /= 2)
#pragma GCC unroll 4
        for (int v = 0; v < width; v++) lane[v] += lane[v + width];
      one[i] = lane[0];
    }
#if VR >= 16
    FOLD_ALL(8)
#endif
#if VR >= 8
    FOLD_ALL(4)
#endif
#if VR >= 4
    FOLD_ALL(2)
#endif
    FOLD_ALL(1)
    vr_store(out + first, one[0]);
  }
}

/* out[i][j] += the folded sums, where they belong to the output; first: = them. */
static inline __attribute__((always_inline)) void add_tile(const vr sum[DOT_ROWS * DOT_COLUMNS][LANE_VECTORS],
                                                           int64_t rows, int64_t width, real *out, int64_t ldo,
                                                           bool first) {
  real tile[DOT_ROWS * DOT_COLUMNS];
  lanes_sums(sum, tile);
  if (rows >= DOT_ROWS && width >= DOT_COLUMNS) {
    typedef real tile_row __attribute__((vector_size(DOT_COLUMNS * sizeof(real))));
#pragma GCC unroll 4
    for (int i = 0; i < DOT_ROWS; i++) {
      tile_row row, there;
      memcpy(&row, tile + i * DOT_COLUMNS, sizeof row);
      if (!first) {
        memcpy(&there, out + i * ldo, sizeof there);
        row += there;
      }
      memcpy(out + i * ldo, &row, sizeof row);
    }
    return;
  }
  for (int64_t i = 0; i < rows && i < DOT_ROWS; i++)
    for (int64_t j = 0; j < width && j < DOT_COLUMNS; j++)
      out[i * ldo + j] = first ? tile[i * DOT_COLUMNS + j] : out[i * ldo + j] + tile[i * DOT_COLUMNS + j];
}

/* Adds a vector of columns' products to dot's sums. */
static inline __attribute__((always_inline)) void dot_step(vr one[DOT_ROWS * DOT_COLUMNS], const vr av[DOT_ROWS],
                                                           const vr bv[DOT_COLUMNS]) {
#pragma GCC unroll 4
  for (int i = 0; i < DOT_ROWS; i++)
#pragma GCC unroll 4
    for (int j = 0; j < DOT_COLUMNS; j++) one[i * DOT_COLUMNS + j] = vr_fma(av[i], bv[j], one[i * DOT_COLUMNS + j]);
}

/* Lanes v * VR, ... of all sums at a time: as many columns of each PNN_LANES. */
static void dot(int64_t columns, const void *a_, int64_t lda, const void *b_, int64_t ldb, int64_t rows, int64_t width,
                void *out, int64_t ldo, int32_t first, const pnn_ahead_run *ahead) {
  const real *restrict a = a_;
  const real *restrict b = b_;
  vr sum[DOT_ROWS * DOT_COLUMNS][LANE_VECTORS];
#pragma GCC unroll 8
  for (int v = 0; v < LANE_VECTORS; v++) {
    vr one[DOT_ROWS * DOT_COLUMNS] = {{0}};
    const char *line = ahead->data;
    const int64_t line_step = ahead->step;
    for (int64_t at = v * VR; at < columns; at += PNN_LANES) {
      if (v == 0) __builtin_prefetch(line, 0, 2);
      line += line_step;
      vr av[DOT_ROWS], bv[DOT_COLUMNS];
#pragma GCC unroll 4
      for (int j = 0; j < DOT_COLUMNS; j++) bv[j] = vr_load(b + j * ldb + at);
#pragma GCC unroll 4
      for (int i = 0; i < DOT_ROWS; i++) av[i] = vr_load(a + i * lda + at);
      dot_step(one, av, bv);
    }
#pragma GCC unroll 16
    for (int i = 0; i < DOT_ROWS * DOT_COLUMNS; i++) sum[i][v] = one[i];
  }
  add_tile(sum, rows, width, out, ldo, first);
}

static void sum_rows(int64_t columns, const void *a_, int64_t lda, int64_t rows, void *out_) {
  real *out = out_;
  for (int64_t r = 0; r < rows; r++) {
    const real *a = (const real *)a_ + r * lda;
    vr sum[LANE_VECTORS];
    memset(sum, 0, sizeof sum);
    for (int64_t p = 0; p < columns; p += PNN_LANES)
      for (int v = 0; v < LANE_VECTORS; v++) sum[v] += vr_load(a + p + v * VR);
    out[r] = lanes_sum(sum);
  }
}

/* ---- element by element ---- */

#if defined(PNN_REAL_F32)
#define PNN_ACTIVATE(name) pnn_##name##_f32
#define PNN_ACTIVATE_GRAD(name) pnn_##name##_grad_f32
#else
#define PNN_ACTIVATE(name) pnn_##name##_f64
#define PNN_ACTIVATE_GRAD(name) pnn_##name##_grad_f64
#endif

#define DEFINE_ACTIVATION(suffix, name)                                                                                \
  static void respond_##name(void *a_, int64_t lda, const pnn_source *source, int64_t rows, int64_t columns) {         \
    const int64_t whole = columns / VR * VR, rest = columns - whole, ldx = source->ldx, ldm = source->ldm;             \
    const int64_t masks = source->masks;                                                                               \
    int64_t m = pnn_remainder(source->k0, masks), channel = 0;                                                         \
    for (int64_t r = 0; r < rows; r++) {                                                                               \
      real *a = (real *)a_ + r * lda;                                                                                  \
      const real *x = (const real *)source->x + channel * ldx;                                                         \
      const real *mask = source->mask ? (const real *)source->mask + (source->shared ? m : r) * ldm : NULL;            \
      /* a - 0 is a, to the bit */                                                                                     \
      const vr mean = vr_set1(source->mean ? ((const real *)source->mean)[r] : 0);                                     \
      if (mask) {                                                                                                      \
        for (int64_t j = 0; j < whole; j += VR)                                                                        \
          vr_store(a + j, PNN_ACTIVATE(name)(vr_load(x + j) + vr_load(mask + j)) - mean);                              \
      } else {                                                                                                         \
        for (int64_t j = 0; j < whole; j += VR) vr_store(a + j, PNN_ACTIVATE(name)(vr_load(x + j)) - mean);            \
      }                                                                                                                \
      if (rest) {                                                                                                      \
        vr u = vr_load_part(x + whole, rest);                                                                          \
        if (mask) u += vr_load_part(mask + whole, rest);                                                               \
        vr_store_part(a + whole, PNN_ACTIVATE(name)(u) - mean, rest);                                                  \
      }                                                                                                                \
      if (++m == masks) m = 0, channel++;                                                                              \
    }                                                                                                                  \
  }                                                                                                                    \
  static void activate_##name(void *a_, int64_t lda, int64_t rows, int64_t columns) {                                  \
    for (int64_t r = 0; r < rows; r++) {                                                                               \
      real *a = (real *)a_ + r * lda;                                                                                  \
      for (int64_t j = 0; j < columns; j += VR) vr_store(a + j, PNN_ACTIVATE(name)(vr_load(a + j)));                   \
    }                                                                                                                  \
  }                                                                                                                    \
  static void activate_grad_##name(void *d_, int64_t ldd, const void *u_, int64_t ldu, int64_t rows,                   \
                                   int64_t columns) {                                                                  \
    for (int64_t r = 0; r < rows; r++) {                                                                               \
      real *d = (real *)d_ + r * ldd;                                                                                  \
      const real *u = (const real *)u_ + r * ldu;                                                                      \
      for (int64_t j = 0; j < columns; j += VR)                                                                        \
        vr_store(d + j, PNN_ACTIVATE_GRAD(name)(vr_load(u + j), vr_load(d + j)));                                      \
    }                                                                                                                  \
  }                                                                                                                    \
  static void respond_grad_##name(void *dx_, int64_t ldx, const void *d_, int64_t ldd, const void *x_, int64_t step,   \
                                  const void *mask_, int64_t ldm, const pnn_norm_terms *norm, int64_t rows,            \
                                  int64_t columns, int64_t masks, int32_t shared) {                                    \
    for (int64_t r = 0; r < rows; r++) {                                                                               \
      real *dx = (real *)dx_ + r * ldx;                                                                                \
      const real *d = (const real *)d_ + r * masks * ldd, *x = (const real *)x_ + r * step;                            \
      const real *mask = mask_ ? (const real *)mask_ + (shared ? 0 : r * masks * ldm) : NULL;                          \
      const real *mean = norm ? (const real *)norm->mean + r * masks : NULL;                                           \
      const real *offset = norm ? (const real *)norm->offset + r * masks : NULL;                                       \
      const real *slope = norm ? (const real *)norm->slope + r * masks : NULL;                                         \
      const int64_t whole = masks == 1 && !norm ? columns / VR * VR : 0; /* the common case, without choices */        \
      if (mask) {                                                                                                      \
        for (int64_t j = 0; j < whole; j += VR)                                                                        \
          vr_store(dx + j, PNN_ACTIVATE_GRAD(name)(vr_load(x + j) + vr_load(mask + j), vr_load(d + j)));               \
      } else {                                                                                                         \
        for (int64_t j = 0; j < whole; j += VR)                                                                        \
          vr_store(dx + j, PNN_ACTIVATE_GRAD(name)(vr_load(x + j), vr_load(d + j)));                                   \
      }                                                                                                                \
      for (int64_t j = whole; j < columns; j += VR) {                                                                  \
        const int64_t n = columns - j;                                                                                 \
        const vr v = load_some(x + j, n);                                                                              \
        vr sum = vr_set1(0);                                                                                           \
        for (int64_t m = 0; m < masks; m++) {                                                                          \
          const vr u = mask ? v + load_some(mask + m * ldm + j, n) : v;                                                \
          vr da = load_some(d + m * ldd + j, n);                                                                       \
          if (norm) da = vr_fma(vr_set1(slope[m]), PNN_ACTIVATE(name)(u) - vr_set1(mean[m]), da + vr_set1(offset[m])); \
          const vr one = PNN_ACTIVATE_GRAD(name)(u, da);                                                               \
          if (m) {                                                                                                     \
            sum += one;                                                                                                \
          } else {                                                                                                     \
            sum = one;                                                                                                 \
          }                                                                                                            \
        }                                                                                                              \
        store_some(dx + j, sum, n);                                                                                    \
      }                                                                                                                \
    }                                                                                                                  \
  }
PNN_ACTIVATION_LIST(DEFINE_ACTIVATION)

/* `product` whose panel is made on the way. */
static inline __attribute__((always_inline)) void respond_product(int64_t depth, int64_t rows, const real *restrict a,
                                                                  real *restrict b, int64_t ldb, real *restrict c,
                                                                  int64_t ldc, const real *start,
                                                                  const pnn_source *source, pnn_ahead *ahead,
                                                                  vr (*activate)(vr), bool masked, bool centred) {
  const int64_t masks = source->masks, ldm = source->ldm, ldx = source->ldx;
  const int64_t mask_back = source->shared ? masks * ldm : 0;
  int64_t m = pnn_remainder(source->k0, masks);
  const real *x = source->x, *mask = source->mask, *mean = source->mean;
  if (masked && source->shared) mask += m * ldm;
  vr sum[TILE_ROWS][TILE_VECTORS];
  tile_begin(TILE_ROWS, sum, rows, c, ldc, start);
  for (int64_t left = depth; left > 0; left -= PNN_AHEAD_DEPTH, pnn_ahead_step(ahead))
    for (int64_t k = 0; k < left && k < PNN_AHEAD_DEPTH; k++, a += TILE_ROWS, b += ldb) {
      vr bv[TILE_VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < TILE_VECTORS; v++) {
        bv[v] = vr_load(x + v * VR);
        if (masked) bv[v] += vr_load(mask + v * VR);
        bv[v] = activate(bv[v]);
        if (centred) bv[v] -= vr_set1(*mean);
        vr_store(b + v * VR, bv[v]);
      }
      tile_step(TILE_ROWS, sum, a, bv);
      if (masked) mask += ldm;
      if (centred) mean++;
      if (++m == masks) {
        m = 0;
        x += ldx;
        if (masked) mask -= mask_back;
      }
    }
  tile_end(TILE_ROWS, sum, rows, c, ldc);
}

/* From a tile of da to dx. All of x is read before the first store: where rows lie a multiple of 4096 bytes apart, a
 * processor takes a row's store for what the next row's load waits for. */
static inline __attribute__((always_inline)) void tile_respond_grad(int most, vr sum[][TILE_VECTORS], real *restrict dx,
                                                                    int64_t ldo, int64_t rows, const real *restrict x,
                                                                    int64_t ldx, const real *restrict mask, int64_t ldm,
                                                                    bool masked, const pnn_norm_terms *norm,
                                                                    vr (*activate)(vr), vr (*activate_grad)(vr, vr)) {
#pragma GCC unroll 8
  for (int i = 0; i < most; i++) {
    if (i >= rows) break;
#pragma GCC unroll 4
    for (int v = 0; v < TILE_VECTORS; v++) {
      vr u = vr_load(x + i * ldx + v * VR), da = sum[i][v];
      if (masked) u += vr_load(mask + i * ldm + v * VR);
      if (norm) {
        const real *mean = norm->mean, *offset = norm->offset, *slope = norm->slope;
        da = vr_fma(vr_set1(slope[i]), activate(u) - vr_set1(mean[i]), da + vr_set1(offset[i]));
      }
      sum[i][v] = activate_grad(u, da);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < most; i++) {
    if (i >= rows) break;
#pragma GCC unroll 4
    for (int v = 0; v < TILE_VECTORS; v++) vr_store(dx + i * ldo + v * VR, sum[i][v]);
  }
}

/* The sums of a tile through the activation to the gradient of the input, one mask a channel; g NULL: b holds the panel
 * already. */
static inline __attribute__((always_inline)) void product_respond_grad(
    int most, int64_t depth, const real *restrict a, const real *restrict g, int64_t ldg, real *restrict b, int64_t ldb,
    real *restrict dx, int64_t ldo, int64_t rows, const pnn_source *source, const pnn_norm_terms *norm,
    pnn_ahead *ahead, vr (*activate)(vr), vr (*activate_grad)(vr, vr)) {
  const real *x = source->x, *mask = source->mask;
  const int64_t ldx = source->ldx, ldm = source->shared ? 0 : source->ldm;
  for (int64_t i = 0; i < rows; i++)
    for (int v = 0; v < TILE_VECTORS; v++) {
      __builtin_prefetch(x + i * ldx + v * VR);
      if (mask) __builtin_prefetch(mask + i * ldm + v * VR);
    }
  vr sum[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < most; i++)
#pragma GCC unroll 4
    for (int v = 0; v < TILE_VECTORS; v++) sum[i][v] = vr_set1(0);
  if (g) {
    for (int64_t left = depth; left > 0; left -= PNN_AHEAD_DEPTH, pnn_ahead_step(ahead))
      for (int64_t k = 0; k < left && k < PNN_AHEAD_DEPTH; k++, a += TILE_ROWS, b += ldb, g += ldg) {
        vr bv[TILE_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < TILE_VECTORS; v++) {
          bv[v] = vr_load(g + v * VR);
          vr_store(b + v * VR, bv[v]);
        }
        tile_step(most, sum, a, bv);
      }
  } else {
    tile_products(most, depth, sum, a, b, ldb, ahead);
  }
  if (norm)
    tile_respond_grad(most, sum, dx, ldo, rows, x, ldx, mask, ldm, mask != NULL, norm, activate, activate_grad);
  else if (mask)
    tile_respond_grad(most, sum, dx, ldo, rows, x, ldx, mask, ldm, true, NULL, activate, activate_grad);
  else
    tile_respond_grad(most, sum, dx, ldo, rows, x, ldx, NULL, 0, false, NULL, activate, activate_grad);
}

/* `dot` whose panels are made on the way: a copied from g, b from its source, where these are not NULL. */
static inline __attribute__((always_inline)) void respond_dot(int64_t columns, real *restrict a, int64_t lda,
                                                              const real *g, int64_t ldg, real *restrict b, int64_t ldb,
                                                              const pnn_source *source, real *out, int64_t ldo,
                                                              bool first, const pnn_ahead_run *ahead,
                                                              vr (*activate)(vr)) {
  vr sum[DOT_ROWS * DOT_COLUMNS][LANE_VECTORS];
  const real *x[DOT_COLUMNS], *mask[DOT_COLUMNS];
  vr mean[DOT_COLUMNS];
  const bool masked = source && source->mask;
  int64_t m = source ? pnn_remainder(source->k0, source->masks) : 0, channel = 0;
  for (int j = 0; j < DOT_COLUMNS; j++) {
    if (!source) continue;
    x[j] = (const real *)source->x + channel * source->ldx;
    mask[j] = masked ? (const real *)source->mask + (source->shared ? m : j) * source->ldm : NULL;
    mean[j] = vr_set1(source->mean ? ((const real *)source->mean)[j] : 0);
    if (++m == source->masks) m = 0, channel++;
  }
#pragma GCC unroll 8
  for (int v = 0; v < LANE_VECTORS; v++) {
    vr one[DOT_ROWS * DOT_COLUMNS] = {{0}};
    const char *line = ahead->data;
    const int64_t line_step = ahead->step;
    for (int64_t at = v * VR; at < columns; at += PNN_LANES) {
      if (v == 0) __builtin_prefetch(line, 0, 2);
      line += line_step;
      vr av[DOT_ROWS], bv[DOT_COLUMNS];
#pragma GCC unroll 4
      for (int j = 0; j < DOT_COLUMNS; j++) {
        if (source) {
          bv[j] = vr_load(x[j] + at);
          if (masked) bv[j] += vr_load(mask[j] + at);
          bv[j] = activate(bv[j]) - mean[j];
          vr_store(b + j * ldb + at, bv[j]);
        } else {
          bv[j] = vr_load(b + j * ldb + at);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < DOT_ROWS; i++) {
        av[i] = vr_load(g ? g + i * ldg + at : a + i * lda + at);
        if (g) vr_store(a + i * lda + at, av[i]);
      }
      dot_step(one, av, bv);
    }
#pragma GCC unroll 16
    for (int i = 0; i < DOT_ROWS * DOT_COLUMNS; i++) sum[i][v] = one[i];
  }
  add_tile(sum, DOT_ROWS, DOT_COLUMNS, out, ldo, first);
}

/* Activations of a few instructions, which leave the registers to the sums. The portable kernels gain nothing from it
 * (and GCC 12 fails on their selections of doubles here). */
#if defined(PNN_ISA_PORTABLE)
#define CHEAP_ACTIVATIONS(X) X(IDENTITY, identity)
#else
#define CHEAP_ACTIVATIONS(X) X(IDENTITY, identity) X(RELU, relu) X(LEAKY_RELU, leaky_relu) X(HARDTANH, hardtanh)
#endif

#define DEFINE_RESPOND_PRODUCT(suffix, name)                                                                          \
  static void respond_product_##name(int64_t depth, int64_t rows, const void *a, void *b, int64_t ldb, void *c,       \
                                     int64_t ldc, const void *start, const pnn_source *source, pnn_ahead *ahead) {    \
    if (source->mask && source->mean)                                                                                 \
      respond_product(depth, rows, a, b, ldb, c, ldc, start, source, ahead, PNN_ACTIVATE(name), true, true);          \
    else if (source->mask)                                                                                            \
      respond_product(depth, rows, a, b, ldb, c, ldc, start, source, ahead, PNN_ACTIVATE(name), true, false);         \
    else if (source->mean)                                                                                            \
      respond_product(depth, rows, a, b, ldb, c, ldc, start, source, ahead, PNN_ACTIVATE(name), false, true);         \
    else                                                                                                              \
      respond_product(depth, rows, a, b, ldb, c, ldc, start, source, ahead, PNN_ACTIVATE(name), false, false);        \
  }                                                                                                                   \
  static void respond_dot_##name(int64_t columns, void *a, int64_t lda, const void *g, int64_t ldg, void *b,          \
                                 int64_t ldb, const pnn_source *source, void *out, int64_t ldo, int32_t first,        \
                                 const pnn_ahead_run *ahead) {                                                        \
    if (g && source)                                                                                                  \
      respond_dot(columns, a, lda, g, ldg, b, ldb, source, out, ldo, first, ahead, PNN_ACTIVATE(name));               \
    else if (source)                                                                                                  \
      respond_dot(columns, a, lda, NULL, 0, b, ldb, source, out, ldo, first, ahead, PNN_ACTIVATE(name));              \
    else                                                                                                              \
      respond_dot(columns, a, lda, g, ldg, b, ldb, NULL, out, ldo, first, ahead, PNN_ACTIVATE(name));                 \
  }                                                                                                                   \
  static void product_respond_grad_##name(int64_t depth, const void *a, const void *g, int64_t ldg, void *b,          \
                                          int64_t ldb, void *dx, int64_t ldo, int64_t rows, const pnn_source *source, \
                                          const pnn_norm_terms *norm, pnn_ahead *ahead) {                             \
    if (rows > 4)                                                                                                     \
      product_respond_grad(TILE_ROWS, depth, a, g, ldg, b, ldb, dx, ldo, rows, source, norm, ahead,                   \
                           PNN_ACTIVATE(name), PNN_ACTIVATE_GRAD(name));                                              \
    else                                                                                                              \
      product_respond_grad(4, depth, a, g, ldg, b, ldb, dx, ldo, rows, source, norm, ahead, PNN_ACTIVATE(name),       \
                           PNN_ACTIVATE_GRAD(name));                                                                  \
  }
CHEAP_ACTIVATIONS(DEFINE_RESPOND_PRODUCT)

static void affine(void *d_, int64_t ldd, const void *c_, int64_t ldc, const void *offset_, const void *slope_,
                   int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r++) {
    real *d = (real *)d_ + r * ldd;
    const real *c = (const real *)c_ + r * ldc;
    const vr offset = vr_set1(((const real *)offset_)[r]), slope = vr_set1(((const real *)slope_)[r]);
    for (int64_t j = 0; j < columns; j += VR) vr_store(d + j, vr_fma(slope, vr_load(c + j), vr_load(d + j) + offset));
  }
}

static void scale(void *a_, int64_t lda, double factor, int64_t rows, int64_t columns) {
  const real f = (real)factor;
  for (int64_t r = 0; r < rows; r++) {
    real *a = (real *)a_ + r * lda;
    for (int64_t j = 0; j < columns; j++) a[j] *= f;
  }
}

static void accumulate(void *s_, const void *a_, int64_t columns) {
  real *restrict s = s_;
  const real *restrict a = a_;
  for (int64_t j = 0; j < columns; j++) s[j] += a[j];
}

static void round16(pnn_dtype which, void *a_, int64_t lda, int64_t rows, int64_t columns) {
#if defined(PNN_REAL_F32)
  for (int64_t r = 0; r < rows; r++) {
    real *a = (real *)a_ + r * lda;
    uint16_t half[VR];
    int64_t j = 0;
    if (which == PNN_BFLOAT16) {
      for (; j + VR <= columns; j += VR) vr_store(a + j, (vr)(upper_half(vr_load(a + j)) & 0xffff0000u));
      for (; j < columns; j++) a[j] = from_bfloat16(to_bfloat16(a[j]));
    } else {
      for (; j + VR <= columns; j += VR) {
        store_vector_float16(half, vr_load(a + j));
        vr_store(a + j, load_vector_float16(half));
      }
      for (; j < columns; j++) a[j] = from_float16(to_float16(a[j]));
    }
  }
#else
  (void)which, (void)a_, (void)lda, (void)rows, (void)columns; /* double products have no 16-bit operands */
#endif
}

/* ---- panels whose rows are pixels ---- */

/* `rows` of `most` rows, with `columns` of `strips` strips; whole: all of both. */
static inline __attribute__((always_inline)) void rows_product(int most, int strips, bool whole, pnn_product_mode mode,
                                                               int64_t rows, int64_t columns, int64_t depth,
                                                               const real *restrict a, int64_t a_row, int64_t a_step,
                                                               const real *restrict b, int64_t ldb, int64_t strip,
                                                               real *restrict c, int64_t ldc, const real *start,
                                                               pnn_ahead *ahead) {
  const int vectors = strips * STRIP_VECTORS;
  /* Three rows share a pointer, which their addresses need no more than a multiple of a_row beside. Where there are
   * fewer, those that are missing repeat the last one and are not written. */
  const real *third[3] = {a, a + 3 * a_row, a + 6 * a_row}, *row[STRIP_ROWS];
  vr sum[STRIP_ROWS][TILE_VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < most; i++) {
    row[i] = a + (i < rows ? i : rows - 1) * a_row;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) sum[i][v] = vr_set1(0);
  }
  if (mode == PNN_PRODUCT_START && start) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
      const vr s = whole              ? vr_load(start + v * VR)
                   : v * VR < columns ? load_some(start + v * VR, columns - v * VR)
                                      : vr_set1(0);
#pragma GCC unroll 8
      for (int i = 0; i < most; i++) sum[i][v] = s;
    }
  }
  if (mode == PNN_PRODUCT_CONTINUE) {
#pragma GCC unroll 8
    for (int i = 0; i < most; i++) {
      if (!whole && i >= rows) continue;
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) {
        if (whole)
          sum[i][v] = vr_load(c + i * ldc + v * VR);
        else if (v * VR < columns)
          sum[i][v] = load_some(c + i * ldc + v * VR, columns - v * VR);
      }
    }
  }
  for (int64_t left = depth; left > 0; left -= PNN_AHEAD_DEPTH, pnn_ahead_step(ahead))
    for (int64_t k = 0; k < left && k < PNN_AHEAD_DEPTH; k++, b += ldb) {
      vr bv[TILE_VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) bv[v] = vr_load(b + v / STRIP_VECTORS * strip + v % STRIP_VECTORS * VR);
#pragma GCC unroll 8
      for (int i = 0; i < most; i++) {
        const vr av = vr_set1(whole ? third[i / 3][i % 3 * a_row] : row[i][(depth - left + k) * a_step]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sum[i][v] = vr_fma(av, bv[v], sum[i][v]);
      }
#pragma GCC unroll 3
      for (int i = 0; i < 3; i++) third[i] += a_step;
    }
#pragma GCC unroll 8
  for (int i = 0; i < most; i++) {
    if (!whole && i >= rows) continue;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
      real *to = c + i * ldc + v * VR;
      if (whole) {
        vr_store(to, mode == PNN_PRODUCT_ADD ? vr_load(to) + sum[i][v] : sum[i][v]);
      } else if (v * VR < columns) {
        const int64_t n = columns - v * VR;
        store_some(to, mode == PNN_PRODUCT_ADD ? load_some(to, n) + sum[i][v] : sum[i][v], n);
      }
    }
  }
}

static void product_rows(pnn_product_mode mode, int64_t rows, int64_t columns, int64_t depth, const void *a,
                         int64_t a_row, int64_t a_step, const void *b, int64_t ldb, int64_t strip, void *c, int64_t ldc,
                         const void *start, pnn_ahead *ahead) {
#if TILE_VECTORS > STRIP_VECTORS
  if (columns > STRIP_COLUMNS) {
    const int strips = TILE_VECTORS / STRIP_VECTORS;
    if (rows == TILE_ROWS && columns == TILE_COLUMNS)
      rows_product(TILE_ROWS, strips, true, mode, rows, columns, depth, a, a_row, a_step, b, ldb, strip, c, ldc, start,
                   ahead);
    else
      rows_product(TILE_ROWS, strips, false, mode, rows, columns, depth, a, a_row, a_step, b, ldb, strip, c, ldc, start,
                   ahead);
    return;
  }
#endif
  if (rows == STRIP_ROWS && columns == STRIP_COLUMNS) {
    if (a_row == 1) /* a packed operand */
      rows_product(STRIP_ROWS, 1, true, mode, rows, columns, depth, a, 1, a_step, b, ldb, strip, c, ldc, start, ahead);
    else
      rows_product(STRIP_ROWS, 1, true, mode, rows, columns, depth, a, a_row, a_step, b, ldb, strip, c, ldc, start,
                   ahead);
  } else {
    rows_product(STRIP_ROWS, 1, false, mode, rows, columns, depth, a, a_row, a_step, b, ldb, strip, c, ldc, start,
                 ahead);
  }
}

/* `rows` pixels with `columns` outputs, which lie in `vectors` vectors. The same outputs of the pixels two tiles
 * further on are asked for. */
static inline __attribute__((always_inline)) void rows_tile(int vectors, int64_t rows, int64_t columns, int64_t depth,
                                                            const real *restrict a, int64_t a_row,
                                                            const real *restrict b, real *restrict c, int64_t ldc,
                                                            const real *start) {
  const real *row[STRIP_ROWS];
  vr sum[STRIP_ROWS][STRIP_VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < STRIP_ROWS; i++) {
    row[i] = a + (i < rows ? i : rows - 1) * a_row; /* rows that are not there repeat the last one */
    for (int v = 0; v < vectors; v++) sum[i][v] = vr_load(start + v * VR);
  }
  for (int64_t k = 0; k < depth; k++, b += STRIP_COLUMNS) {
    vr bv[STRIP_VECTORS];
    for (int v = 0; v < vectors; v++) bv[v] = vr_load(b + v * VR);
#pragma GCC unroll 8
    for (int i = 0; i < STRIP_ROWS; i++) {
      const vr av = vr_set1(row[i][k]);
      for (int v = 0; v < vectors; v++) sum[i][v] = vr_fma(av, bv[v], sum[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < STRIP_ROWS; i++) {
    if (i >= rows) continue;
    for (int v = 0; v < vectors; v++) {
      real *const to = c + i * ldc + v * VR;
      __builtin_prefetch(to + 2 * STRIP_ROWS * ldc, 1, 2);
      store_some(to, sum[i][v], columns - v * VR);
    }
  }
}

/* All of a pixel's outputs before the next pixels', so that C is written from its beginning to its end. */
static void product_rows_run(int64_t rows, int64_t columns, int64_t depth, const void *a_, int64_t a_row,
                             const void *b_, void *c_, int64_t ldc, const void *start_, pnn_ahead *ahead) {
  for (int64_t i = 0; i < rows; i += STRIP_ROWS) {
    const real *const a = (const real *)a_ + i * a_row, *start = start_, *b = b_;
    real *const c = (real *)c_ + i * ldc;
    const int64_t pixels = rows - i < STRIP_ROWS ? rows - i : STRIP_ROWS;
    for (int64_t j = 0; j < columns; j += STRIP_COLUMNS, b += depth * STRIP_COLUMNS, pnn_ahead_step(ahead)) {
      const int64_t n = columns - j;
      if (pixels == STRIP_ROWS && n >= STRIP_COLUMNS)
        rows_tile(STRIP_VECTORS, STRIP_ROWS, STRIP_COLUMNS, depth, a, a_row, b, c + j, ldc, start + j);
      else if (n > VR)
        rows_tile(STRIP_VECTORS, pixels, n, depth, a, a_row, b, c + j, ldc, start + j);
      else
        rows_tile(1, pixels, n, depth, a, a_row, b, c + j, ldc, start + j);
    }
  }
}

static void pack_gradient(void *dst_, int64_t tile_step, const void *src_, int64_t step, int64_t pixels, int64_t rows) {
  real *restrict dst = dst_;
  const real *restrict src = src_;
  if (rows == 2 * STRIP_ROWS) {
    for (int64_t p = 0; p < pixels; p++) {
      memcpy(dst + p * STRIP_ROWS, src + p * step, STRIP_ROWS * sizeof(real));
      memcpy(dst + tile_step + p * STRIP_ROWS, src + p * step + STRIP_ROWS, STRIP_ROWS * sizeof(real));
    }
    return;
  }
  for (int64_t first = 0; first < rows; first += STRIP_ROWS, dst += tile_step)
    for (int64_t p = 0; p < pixels; p++)
      for (int i = 0; i < STRIP_ROWS; i++) dst[p * STRIP_ROWS + i] = first + i < rows ? src[p * step + first + i] : 0;
}

static void sum_columns(int64_t depth, const void *a_, void *out_) {
  const real *restrict a = a_;
  real *restrict out = out_;
  real sum[STRIP_ROWS] = {0};
  for (int64_t k = 0; k < depth; k++)
    for (int i = 0; i < STRIP_ROWS; i++) sum[i] += a[k * STRIP_ROWS + i];
  for (int i = 0; i < STRIP_ROWS; i++) out[i] += sum[i];
}

/* One mask value a pixel, or one for each of its channels, or none. */
typedef enum row_mask { NO_MASK, MASK_OF_PIXEL, MASK_OF_CHANNEL } row_mask;

static inline __attribute__((always_inline)) vr row_perturbed(row_mask kind, const real *x, const real *mask, vr one,
                                                              int64_t r, int64_t n) {
  vr u = load_some(x + r, n);
  if (kind == MASK_OF_CHANNEL) u += load_some(mask + r, n);
  if (kind == MASK_OF_PIXEL) u += one;
  return u;
}

static inline __attribute__((always_inline)) void respond_rows(row_mask kind, real *a, int64_t lda, const real *x,
                                                               int64_t ldx, const real *mask, int64_t ldm,
                                                               const real *mean, int64_t pixels, int64_t rows,
                                                               vr (*activate)(vr)) {
  const int64_t whole = rows / VR * VR, rest = rows - whole;
  for (int64_t p = 0; p < pixels; p++, a += lda, x += ldx, mask += kind == NO_MASK ? 0 : ldm) {
    const vr one = vr_set1(kind == MASK_OF_PIXEL ? mask[0] : 0);
    if (mean)
      for (int64_t r = 0; r < whole; r += VR)
        vr_store(a + r, activate(row_perturbed(kind, x, mask, one, r, VR)) - vr_load(mean + r));
    else
      for (int64_t r = 0; r < whole; r += VR) vr_store(a + r, activate(row_perturbed(kind, x, mask, one, r, VR)));
    if (!rest) continue;
    const vr last = activate(row_perturbed(kind, x, mask, one, whole, rest));
    vr_store_part(a + whole, mean ? last - vr_load_part(mean + whole, rest) : last, rest);
  }
}

static inline __attribute__((always_inline)) void respond_grad_rows(row_mask kind, real *dx, int64_t ldx, const real *d,
                                                                    int64_t ldd, const real *x, int64_t step,
                                                                    const real *mask, int64_t ldm,
                                                                    const pnn_norm_terms *norm, int64_t pixels,
                                                                    int64_t rows, vr (*activate)(vr),
                                                                    vr (*activate_grad)(vr, vr)) {
  const real *mean = norm ? norm->mean : NULL, *offset = norm ? norm->offset : NULL;
  const real *slope = norm ? norm->slope : NULL;
  const int64_t whole = norm ? 0 : rows / VR * VR;
  for (int64_t p = 0; p < pixels; p++, dx += ldx, d += ldd, x += step, mask += kind == NO_MASK ? 0 : ldm) {
    const vr one = vr_set1(kind == MASK_OF_PIXEL ? mask[0] : 0);
    for (int64_t r = 0; r < whole; r += VR)
      vr_store(dx + r, activate_grad(row_perturbed(kind, x, mask, one, r, VR), vr_load(d + r)));
    for (int64_t r = whole; r < rows; r += VR) {
      const int64_t n = rows - r;
      const vr u = row_perturbed(kind, x, mask, one, r, n);
      vr da = load_some(d + r, n);
      if (norm)
        da = vr_fma(load_some(slope + r, n), activate(u) - load_some(mean + r, n), da + load_some(offset + r, n));
      store_some(dx + r, activate_grad(u, da), n);
    }
  }
}

#define DEFINE_RESPOND_ROWS(suffix, name)                                                                              \
  static void respond_rows_##name(void *a, int64_t lda, const void *x, int64_t ldx, const void *mask, int64_t ldm,     \
                                  const void *mean, int64_t pixels, int64_t rows, int32_t shared) {                    \
    if (!mask)                                                                                                         \
      respond_rows(NO_MASK, a, lda, x, ldx, mask, ldm, mean, pixels, rows, PNN_ACTIVATE(name));                        \
    else if (shared)                                                                                                   \
      respond_rows(MASK_OF_PIXEL, a, lda, x, ldx, mask, ldm, mean, pixels, rows, PNN_ACTIVATE(name));                  \
    else                                                                                                               \
      respond_rows(MASK_OF_CHANNEL, a, lda, x, ldx, mask, ldm, mean, pixels, rows, PNN_ACTIVATE(name));                \
  }                                                                                                                    \
  static void respond_grad_rows_##name(void *dx, int64_t ldx, const void *d, int64_t ldd, const void *x, int64_t step, \
                                       const void *mask, int64_t ldm, const pnn_norm_terms *norm, int64_t pixels,      \
                                       int64_t rows, int32_t shared) {                                                 \
    if (!mask)                                                                                                         \
      respond_grad_rows(NO_MASK, dx, ldx, d, ldd, x, step, mask, ldm, norm, pixels, rows, PNN_ACTIVATE(name),          \
                        PNN_ACTIVATE_GRAD(name));                                                                      \
    else if (shared)                                                                                                   \
      respond_grad_rows(MASK_OF_PIXEL, dx, ldx, d, ldd, x, step, mask, ldm, norm, pixels, rows, PNN_ACTIVATE(name),    \
                        PNN_ACTIVATE_GRAD(name));                                                                      \
    else                                                                                                               \
      respond_grad_rows(MASK_OF_CHANNEL, dx, ldx, d, ldd, x, step, mask, ldm, norm, pixels, rows, PNN_ACTIVATE(name),  \
                        PNN_ACTIVATE_GRAD(name));                                                                      \
  }
PNN_ACTIVATION_LIST(DEFINE_RESPOND_ROWS)

/* Elements stand `step` apart. */
static void moments_in_double(const real *a, int64_t step, int64_t n, double *mean, double *m2) {
  double sum = 0, squares = 0;
  for (int64_t j = 0; j < n; j++) sum += (double)a[j * step];
  *mean = sum / (double)n;
  for (int64_t j = 0; j < n; j++) {
    const double d = (double)a[j * step] - *mean;
    squares += d * d;
  }
  *m2 = squares;
}

/* From sums of deviations about `center` to the moments; what the rounded centre misses is subtracted exactly. */
static void moments_finish(real center, real sum, real squares, const real *a, int64_t step, int64_t n, double *mean,
                           double *m2) {
  *mean = (double)center + (double)sum / (double)n;
  *m2 = (double)squares - (double)sum * (double)sum / (double)n;
  if (*m2 < 0) *m2 = 0;
  /* Infinite or NaN elements, or differences beyond the type's range: take the plain formula's result. */
  if (!(*m2 <= 1e300)) moments_in_double(a, step, n, mean, m2);
}

/* Rows, or vectors of columns, whose sums run side by side: one sum waits for each of its additions. */
#if defined(PNN_ISA_AVX512)
#define MOMENTS_ABREAST 4
#elif defined(PNN_ISA_AVX2)
#define MOMENTS_ABREAST 2
#else
#define MOMENTS_ABREAST 1
#endif

static inline __attribute__((always_inline)) void moments_columns(const real *a, int64_t lda, int64_t n,
                                                                  int64_t columns, int vectors, double *mean,
                                                                  double *m2, pnn_ahead *ahead) {
  vr first[MOMENTS_ABREAST], sum[MOMENTS_ABREAST], rest[MOMENTS_ABREAST], squares[MOMENTS_ABREAST];
  vr center[MOMENTS_ABREAST];
  for (int v = 0; v < vectors; v++) {
    first[v] = load_some(a + v * VR, columns - v * VR);
    sum[v] = rest[v] = squares[v] = vr_set1(0);
  }
  for (int64_t p = 0; p < n; p++, pnn_ahead_step(ahead))
    for (int v = 0; v < vectors; v++) sum[v] += load_some(a + p * lda + v * VR, columns - v * VR) - first[v];
  for (int v = 0; v < vectors; v++)
    for (int64_t i = 0; i < VR; i++)
      center[v][i] = v * VR + i < columns ? (real)((double)first[v][i] + (double)sum[v][i] / (double)n) : 0;
  for (int64_t p = 0; p < n; p++)
    for (int v = 0; v < vectors; v++) {
      const vr d = load_some(a + p * lda + v * VR, columns - v * VR) - center[v];
      rest[v] += d;
      squares[v] = vr_fma(d, d, squares[v]);
    }
  for (int v = 0; v < vectors; v++)
    for (int64_t i = v * VR; i < columns && i < (v + 1) * VR; i++)
      moments_finish(center[v][i - v * VR], rest[v][i - v * VR], squares[v][i - v * VR], a + i, lda, n, &mean[i],
                     &m2[i]);
}

static void moments_rows(const void *a_, int64_t lda, int64_t n, int64_t rows, double *mean, double *m2,
                         pnn_ahead *ahead) {
  const real *a = a_;
  int64_t r = 0;
  for (; r + MOMENTS_ABREAST * VR <= rows; r += MOMENTS_ABREAST * VR)
    moments_columns(a + r, lda, n, MOMENTS_ABREAST * VR, MOMENTS_ABREAST, mean + r, m2 + r, ahead);
  for (; r < rows; r += VR) moments_columns(a + r, lda, n, rows - r < VR ? rows - r : VR, 1, mean + r, m2 + r, ahead);
}

/* ---- moments ---- */

/* Sums about a value of the row itself, then about the mean: neither cancels where a map is nearly constant. For rows
 * that moments_once does not settle. */
static inline __attribute__((always_inline)) void moments_abreast(real *a, int64_t lda, int rows, int64_t n,
                                                                  double *mean, double *m2, pnn_ahead *ahead) {
  const int64_t padded = (n + PNN_LANES - 1) / PNN_LANES * PNN_LANES;
  real first[MOMENTS_ABREAST], middle[MOMENTS_ABREAST];
  vr sum[MOMENTS_ABREAST][LANE_VECTORS], squares[MOMENTS_ABREAST][LANE_VECTORS];
  memset(sum, 0, sizeof sum);
  for (int r = 0; r < rows; r++) {
    first[r] = a[r * lda];
    for (int64_t j = n; j < padded; j++) a[r * lda + j] = first[r];
  }
  for (int64_t p = 0; p < padded; p += PNN_LANES, pnn_ahead_step(ahead))
    for (int r = 0; r < rows; r++)
      for (int v = 0; v < LANE_VECTORS; v++) sum[r][v] += vr_load(a + r * lda + p + v * VR) - vr_set1(first[r]);
  for (int r = 0; r < rows; r++) {
    middle[r] = (real)((double)first[r] + (double)lanes_sum(sum[r]) / (double)n);
    for (int64_t j = n; j < padded; j++) a[r * lda + j] = middle[r];
  }
  memset(sum, 0, sizeof sum);
  memset(squares, 0, sizeof squares);
  for (int64_t p = 0; p < padded; p += PNN_LANES)
    for (int r = 0; r < rows; r++)
      for (int v = 0; v < LANE_VECTORS; v++) {
        const vr d = vr_load(a + r * lda + p + v * VR) - vr_set1(middle[r]);
        sum[r][v] += d;
        squares[r][v] = vr_fma(d, d, squares[r][v]);
      }
  for (int r = 0; r < rows; r++)
    moments_finish(middle[r], lanes_sum(sum[r]), lanes_sum(squares[r]), a + r * lda, 1, n, &mean[r], &m2[r]);
}

#define GUESSED (4 * PNN_LANES) /* columns from which a row's mean is guessed, and the fewest that a row may have */

/* activation(x + mask) of 16 columns. */
static inline __attribute__((always_inline)) void moments_values(const real *x, const real *mask, bool masked,
                                                                 vr (*activate)(vr), vr values[LANE_VECTORS]) {
#pragma GCC unroll 8
  for (int v = 0; v < LANE_VECTORS; v++) {
    values[v] = vr_load(x + v * VR);
    if (masked) values[v] += vr_load(mask + v * VR);
    values[v] = activate(values[v]);
  }
}

/* The mean of four runs of columns, exact where all values are the same. */
static inline __attribute__((always_inline)) real moments_guess(const real *x, const real *mask, bool masked, int64_t n,
                                                                vr (*activate)(vr)) {
  vr run[4][LANE_VECTORS];
#pragma GCC unroll 4
  for (int64_t i = 0; i < 4; i++) {
    const int64_t at = i * (n / GUESSED) * PNN_LANES;
    moments_values(x + at, masked ? mask + at : NULL, masked, activate, run[i]);
  }
#pragma GCC unroll 8
  for (int v = 0; v < LANE_VECTORS; v++) run[0][v] = (run[0][v] + run[1][v]) + (run[2][v] + run[3][v]);
  return lanes_sum(run[0]) * (real)(1.0 / GUESSED);
}

/* The moments of `rows` rows side by side by one pass, about each row's guess; columns behind the n-th, up to a
 * multiple of PNN_LANES, should equal it. Returns the rows, a bit each, whose guess is farther from their mean than the
 * standard deviation: the difference below would then cost more than a bit, and all of them in the end. */
static inline __attribute__((always_inline)) unsigned moments_once(const real *const *x, const real *const *mask,
                                                                   bool masked, int rows, int64_t n, const real *guess,
                                                                   vr (*activate)(vr), double *mean, double *m2,
                                                                   pnn_ahead *ahead) {
  vr sum[MOMENTS_ABREAST][LANE_VECTORS], squares[MOMENTS_ABREAST][LANE_VECTORS];
  memset(sum, 0, sizeof sum);
  memset(squares, 0, sizeof squares);
  for (int64_t p = 0; p < n; p += PNN_LANES, pnn_ahead_step(ahead))
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
      vr values[LANE_VECTORS];
      moments_values(x[r] + p, masked ? mask[r] + p : NULL, masked, activate, values);
#pragma GCC unroll 8
      for (int v = 0; v < LANE_VECTORS; v++) {
        const vr d = values[v] - vr_set1(guess[r]);
        sum[r][v] += d;
        squares[r][v] = vr_fma(d, d, squares[r][v]);
      }
    }
  unsigned left = 0;
  for (int r = 0; r < rows; r++) {
    const double s = (double)lanes_sum(sum[r]), q = (double)lanes_sum(squares[r]), both = s * s / (double)n;
    mean[r] = (double)guess[r] + s / (double)n;
    m2[r] = q - both;
    if (!(both <= 0.5 * q) || !(m2[r] <= 1e300)) left |= 1u << r;
  }
  return left;
}

static void moments(void *a_, int64_t lda, int64_t rows, int64_t n, double *mean, double *m2, pnn_ahead *ahead) {
  const int64_t padded = (n + PNN_LANES - 1) / PNN_LANES * PNN_LANES;
  for (int64_t first = 0, abreast; first < rows; first += abreast) {
    real *a = (real *)a_ + first * lda;
    abreast = rows - first < MOMENTS_ABREAST ? 1 : MOMENTS_ABREAST;
    unsigned left = n < GUESSED ? (1u << abreast) - 1 : 0;
    if (!left) {
      const real *row[MOMENTS_ABREAST];
      real guess[MOMENTS_ABREAST];
      for (int64_t r = 0; r < abreast; r++) {
        row[r] = a + r * lda;
        guess[r] = moments_guess(row[r], NULL, false, n, PNN_ACTIVATE(identity));
        for (int64_t j = n; j < padded; j++) a[r * lda + j] = guess[r];
      }
      left = abreast == MOMENTS_ABREAST
                 ? moments_once(row, NULL, false, MOMENTS_ABREAST, n, guess, PNN_ACTIVATE(identity), mean + first,
                                m2 + first, ahead)
                 : moments_once(row, NULL, false, 1, n, guess, PNN_ACTIVATE(identity), mean + first, m2 + first, ahead);
    }
    for (int64_t r = 0; r < abreast; r++)
      if (left >> r & 1) moments_abreast(a + r * lda, lda, 1, n, mean + first + r, m2 + first + r, ahead);
  }
}

/* `moments` of response maps that are not stored, but for those that take a second pass. */
static inline __attribute__((always_inline)) void respond_moments(void *a, const pnn_source *source, int64_t rows,
                                                                  int64_t n, double *mean, double *m2, pnn_ahead *ahead,
                                                                  vr (*activate)(vr), pnn_respond_fn respond,
                                                                  bool masked) {
  int64_t m = pnn_remainder(source->k0, source->masks), channel = 0;
  for (int64_t first = 0, abreast; first < rows; first += abreast) {
    const real *x[MOMENTS_ABREAST], *mask[MOMENTS_ABREAST];
    real guess[MOMENTS_ABREAST];
    abreast = rows - first < MOMENTS_ABREAST ? 1 : MOMENTS_ABREAST;
    for (int64_t r = 0; r < abreast; r++) {
      x[r] = (const real *)source->x + channel * source->ldx;
      mask[r] = masked ? (const real *)source->mask + (source->shared ? m : first + r) * source->ldm : NULL;
      guess[r] = moments_guess(x[r], mask[r], masked, n, activate);
      if (++m == source->masks) m = 0, channel++;
    }
    const unsigned left =
        abreast == MOMENTS_ABREAST
            ? moments_once(x, mask, masked, MOMENTS_ABREAST, n, guess, activate, mean + first, m2 + first, ahead)
            : moments_once(x, mask, masked, 1, n, guess, activate, mean + first, m2 + first, ahead);
    for (int64_t r = 0; r < abreast; r++) {
      if (!(left >> r & 1)) continue;
      const pnn_source one = {.x = x[r], .mask = mask[r], .masks = 1};
      respond(a, n, &one, 1, n);
      moments_abreast(a, n, 1, n, mean + first + r, m2 + first + r, ahead);
    }
  }
}

#define DEFINE_RESPOND_MOMENTS(suffix, name)                                                                   \
  static void respond_moments_##name(void *a, const pnn_source *source, int64_t rows, int64_t n, double *mean, \
                                     double *m2, pnn_ahead *ahead) {                                           \
    if (source->mask)                                                                                          \
      respond_moments(a, source, rows, n, mean, m2, ahead, PNN_ACTIVATE(name), respond_##name, true);          \
    else                                                                                                       \
      respond_moments(a, source, rows, n, mean, m2, ahead, PNN_ACTIVATE(name), respond_##name, false);         \
  }
CHEAP_ACTIVATIONS(DEFINE_RESPOND_MOMENTS)

/* ---- masks ---- */

/* u = 2*byte - 255 over 256, times the level. */
static inline real lattice(uint32_t byte, real level) {
  return level * ((real)((int32_t)byte * 2 - 255) * (real)0x1p-8);
}

/* Rows and columns of the next pixels of a grid, PHILOX_LANES at a time. They count modulo 2^32, as the generator's
 * counters do. */
typedef struct grid_walk {
  int64_t row, column; /* of the grid */
  uint32_t rows[PHILOX_LANES], columns[PHILOX_LANES];
} grid_walk;

static inline grid_walk grid_begin(const pnn_grid *grid) {
  grid_walk w;
  w.row = grid->first / grid->width;
  w.column = grid->first % grid->width;
  return w;
}

static inline void grid_next(grid_walk *w, const pnn_grid *grid) {
  const uint32_t step = (uint32_t)grid->column_step;
  if (w->column + PHILOX_LANES <= grid->width) {
    const uint32_t row = (uint32_t)(w->row * grid->row_step), column = (uint32_t)(w->column * grid->column_step);
    for (int i = 0; i < PHILOX_LANES; i++) {
      w->rows[i] = row;
      w->columns[i] = column + (uint32_t)i * step;
    }
    w->column += PHILOX_LANES;
    return;
  }
  for (int i = 0; i < PHILOX_LANES; i++) {
    if (w->column == grid->width) w->column = 0, w->row++;
    w->rows[i] = (uint32_t)(w->row * grid->row_step);
    w->columns[i] = (uint32_t)(w->column++ * grid->column_step);
  }
}

static inline void copy_some(real *dst, const real values[PHILOX_LANES], int64_t n) {
  if (n >= PHILOX_LANES)
    memcpy(dst, values, PHILOX_LANES * sizeof(real));
  else
    memcpy(dst, values, (size_t)n * sizeof(real));
}

static void recipe_uniform(real *dst, int64_t ld, const pnn_recipe *recipe, real level, int64_t k0, int64_t rows,
                           const pnn_grid *grid) {
  grid_walk at = grid_begin(grid);
  for (int64_t p = 0; p < grid->count; p += PHILOX_LANES) {
    grid_next(&at, grid);
    for (int64_t block = k0 / 16; block * 16 < k0 + rows; block++) {
      const int64_t first = k0 > block * 16 ? k0 - block * 16 : 0;
      const int64_t last = k0 + rows < block * 16 + 16 ? k0 + rows - block * 16 : 16;
      uint32_t words[4][PHILOX_LANES];
      for (int j = 0; j < PHILOX_LANES; j++) {
        words[0][j] = at.columns[j];
        words[1][j] = at.rows[j];
        words[2][j] = (uint32_t)block;
        words[3][j] = 0;
      }
      philox4x32_10(words, recipe->key);
      for (int64_t i = first; i < last; i++) {
        const uint32_t *word = words[i / 4];
        const int shift = (int)(i % 4) * 8;
        real values[PHILOX_LANES];
        for (int j = 0; j < PHILOX_LANES; j++) values[j] = lattice((word[j] >> shift) & 0xff, level);
        copy_some(dst + (block * 16 + i - k0) * ld + p, values, grid->count - p);
      }
    }
  }
}

/* The sums of bytes behind the normal masks: of output words 0 and 1 for the even map of a block, 2 and 3 for the odd
 * one. Word 3 of the counter is 2. */
#if defined(PNN_ISA_AVX512)
/* What the first two rounds make of the pixels alone, whatever the block, which is the counter's word 2. */
typedef struct normal_pixels {
  __m512i row[2], product0[2], product1[2]; /* of the first round's multiplier 0, and the second one's multiplier 1 */
} normal_pixels;

static inline normal_pixels normal_begin(const grid_walk *at, const uint32_t key[2]) {
  normal_pixels pixels;
  for (int h = 0; h < 2; h++) {
    pixels.row[h] = philox_load(at->rows + 8 * h);
    pixels.product0[h] = _mm512_mul_epu32(_mm512_set1_epi64(PHILOX_M0), philox_load(at->columns + 8 * h));
    const __m512i word = _mm512_xor_si512(_mm512_srli_epi64(pixels.product0[h], 32), _mm512_set1_epi64(2 ^ key[1]));
    pixels.product1[h] = _mm512_mul_epu32(_mm512_set1_epi64(PHILOX_M1), word);
  }
  return pixels;
}

static inline __attribute__((always_inline)) void normal_sums(const normal_pixels *pixels, int64_t block,
                                                              const uint32_t key[2], int32_t sums[2][PHILOX_LANES]) {
  const uint64_t product = (uint64_t)PHILOX_M1 * (uint32_t)block;
  const __m512i high = _mm512_set1_epi64((uint32_t)(product >> 32) ^ key[0]);
  const __m512i low = _mm512_set1_epi64((uint32_t)product ^ (key[0] + PHILOX_W0));
  const __m512i k1 = _mm512_set1_epi64(key[1] + PHILOX_W1);
  __m512i w[4][2], sum[2][2];
#pragma GCC unroll 2
  for (int h = 0; h < 2; h++) {
    const __m512i a = _mm512_mul_epu32(_mm512_set1_epi64(PHILOX_M0), _mm512_xor_si512(pixels->row[h], high));
    w[0][h] = _mm512_xor_si512(_mm512_srli_epi64(pixels->product1[h], 32), low);
    w[1][h] = pixels->product1[h];
    w[2][h] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(a, 32), pixels->product0[h], k1, PHILOX_XOR);
    w[3][h] = a;
  }
  philox_rounds(w, key, 2);
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      const __m512i words = _mm512_mask_blend_epi32(0xaaaa, w[2 * i][h], _mm512_slli_epi64(w[2 * i + 1][h], 32));
      sum[i][h] = _mm512_sad_epu8(words, _mm512_setzero_si512());
    }
    _mm512_storeu_si512(sums[i], _mm512_permutex2var_epi32(sum[i][0], even, sum[i][1]));
  }
}
#else
typedef grid_walk normal_pixels;

static inline normal_pixels normal_begin(const grid_walk *at, const uint32_t key[2]) {
  (void)key;
  return *at;
}

static inline uint32_t byte_sum(uint32_t a, uint32_t b) {
  const uint32_t pairs = (a & 0xff00ffu) + ((a >> 8) & 0xff00ffu) + (b & 0xff00ffu) + ((b >> 8) & 0xff00ffu);
  return (pairs & 0xffffu) + (pairs >> 16);
}

static inline void normal_sums(const normal_pixels *pixels, int64_t block, const uint32_t key[2],
                               int32_t sums[2][PHILOX_LANES]) {
  uint32_t words[4][PHILOX_LANES];
  for (int j = 0; j < PHILOX_LANES; j++) {
    words[0][j] = pixels->columns[j];
    words[1][j] = pixels->rows[j];
    words[2][j] = (uint32_t)block;
    words[3][j] = 2;
  }
  philox4x32_10(words, key);
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < PHILOX_LANES; j++) sums[i][j] = (int32_t)byte_sum(words[2 * i][j], words[2 * i + 1][j]);
}
#endif

static void recipe_normal(real *dst, int64_t ld, const pnn_recipe *recipe, real level, int64_t k0, int64_t rows,
                          const pnn_grid *grid) {
  /* The sum of eight bytes has mean 1020 and variance 8 * (256^2 - 1) / 12 = 43690. 1/sqrt(43690) to float. */
  const float inverse_deviation = 0x1.39897ep-8f;
  grid_walk at = grid_begin(grid);
  for (int64_t p = 0; p < grid->count; p += PHILOX_LANES) {
    grid_next(&at, grid);
    const normal_pixels pixels = normal_begin(&at, recipe->key);
    for (int64_t block = k0 / 2; block * 2 < k0 + rows; block++) {
      int32_t sums[2][PHILOX_LANES];
      normal_sums(&pixels, block, recipe->key, sums);
      for (int64_t i = 0; i < 2; i++) {
        const int64_t k = block * 2 + i;
        if (k < k0 || k >= k0 + rows) continue;
        real values[PHILOX_LANES];
        for (int j = 0; j < PHILOX_LANES; j++)
          values[j] = level * (real)((float)(sums[i][j] - 1020) * inverse_deviation);
        copy_some(dst + (k - k0) * ld + p, values, grid->count - p);
      }
    }
  }
}

/* Cycles per pixel in units of 2^-32, between 2^26 (64 pixels) and 2^30 (4 pixels), minus where bit 2 is set. */
static inline uint32_t wave_frequency(uint32_t word) {
  const uint32_t magnitude = ((UINT32_C(1) << 29) + (word >> 3)) >> (word % 4);
  return word & 4 ? UINT32_C(0) - magnitude : magnitude;
}

#define WAVE_PIXELS 256 /* whose coordinates are found at a time, for all maps */

static void recipe_waves(real *dst, int64_t ld, const pnn_recipe *recipe, real level, int64_t k0, int64_t rows,
                         const pnn_grid *grid) {
  grid_walk at = grid_begin(grid);
  for (int64_t p = 0; p < grid->count; p += WAVE_PIXELS) {
    const int64_t count = grid->count - p < WAVE_PIXELS ? grid->count - p : WAVE_PIXELS;
    uint32_t row[WAVE_PIXELS], column[WAVE_PIXELS];
    for (int64_t j = 0; j < count; j += PHILOX_LANES) {
      grid_next(&at, grid);
      memcpy(row + j, at.rows, sizeof at.rows);
      memcpy(column + j, at.columns, sizeof at.columns);
    }
    for (int64_t r0 = 0; r0 < rows; r0 += PHILOX_LANES) {
      uint32_t words[4][PHILOX_LANES];
      for (int i = 0; i < PHILOX_LANES; i++) {
        words[0][i] = (uint32_t)(k0 + r0 + i);
        words[1][i] = 0;
        words[2][i] = 0;
        words[3][i] = 1;
      }
      philox4x32_10(words, recipe->key);
      const int64_t n = rows - r0 < PHILOX_LANES ? rows - r0 : PHILOX_LANES;
      for (int64_t i = 0; i < n; i++) {
        const uint32_t down = wave_frequency(words[0][i]), across = wave_frequency(words[1][i]), start = words[2][i];
        real *restrict d = dst + (r0 + i) * ld + p;
        for (int64_t j = 0; j < count; j++) {
          const uint32_t t = (start + down * row[j] + across * column[j]) >> 23;
          d[j] = lattice(t < 256 ? t : 511 - t, level);
        }
      }
    }
  }
}

static void recipe_fill(void *dst, int64_t ld, const pnn_recipe *recipe, double level, int64_t k0, int64_t rows,
                        const pnn_grid *grid) {
  if (recipe->noise == PNN_NOISE_WAVES)
    recipe_waves(dst, ld, recipe, (real)level, k0, rows, grid);
  else if (recipe->noise == PNN_NOISE_NORMAL)
    recipe_normal(dst, ld, recipe, (real)level, k0, rows, grid);
  else
    recipe_uniform(dst, ld, recipe, (real)level, k0, rows, grid);
}

#if defined(PNN_ISA_AVX512) && defined(PNN_REAL_F32)
#include "pairs.h"
#endif

/* ---- the table ---- */

#define RESPOND_ROWS_ENTRY(suffix, name) [PNN_ACTIVATION_##suffix] = respond_rows_##name,
#define RESPOND_ENTRY(suffix, name) [PNN_ACTIVATION_##suffix] = respond_##name,
#define RESPOND_PRODUCT_ENTRY(suffix, name) [PNN_ACTIVATION_##suffix] = respond_product_##name,
#define RESPOND_DOT_ENTRY(suffix, name) [PNN_ACTIVATION_##suffix] = respond_dot_##name,
#define PRODUCT_RESPOND_GRAD_ENTRY(suffix, name) [PNN_ACTIVATION_##suffix] = product_respond_grad_##name,
#define RESPOND_MOMENTS_ENTRY(suffix, name) [PNN_ACTIVATION_##suffix] = respond_moments_##name,
#define ACTIVATE_ENTRY(suffix, name) [PNN_ACTIVATION_##suffix] = activate_##name,
#define RESPOND_GRAD_ROWS_ENTRY(suffix, name) [PNN_ACTIVATION_##suffix] = respond_grad_rows_##name,
#define RESPOND_GRAD_ENTRY(suffix, name) [PNN_ACTIVATION_##suffix] = respond_grad_##name,
#define ACTIVATE_GRAD_ENTRY(suffix, name) [PNN_ACTIVATION_##suffix] = activate_grad_##name,

const pnn_kernels PNN_KERNEL_NAME(pnn_kernels);
const pnn_kernels PNN_KERNEL_NAME(pnn_kernels) = {
    .isa = PNN_STRING(PNN_ISA_SUFFIX),
    .tile_rows = TILE_ROWS,
    .tile_columns = TILE_COLUMNS,
    .strip_rows = STRIP_ROWS,
    .strip_columns = STRIP_COLUMNS,
    .dot_rows = DOT_ROWS,
    .dot_columns = DOT_COLUMNS,
#if defined(PNN_REAL_F32)
    .load = {[PNN_FLOAT32] = load_real, [PNN_BFLOAT16] = load_bfloat16, [PNN_FLOAT16] = load_float16},
    .store = {[PNN_FLOAT32] = store_real, [PNN_BFLOAT16] = store_bfloat16, [PNN_FLOAT16] = store_float16},
#else
    .load = {[PNN_FLOAT64] = load_real, [PNN_FLOAT32] = load_float},
    .store = {[PNN_FLOAT64] = store_real, [PNN_FLOAT32] = store_float},
#endif
    .product = product,
    .product_run = product_run,
    .dot = dot,
    .sum = sum_rows,
    .respond = {PNN_ACTIVATION_LIST(RESPOND_ENTRY)},
    .respond_product = {CHEAP_ACTIVATIONS(RESPOND_PRODUCT_ENTRY)},
    .respond_dot = {CHEAP_ACTIVATIONS(RESPOND_DOT_ENTRY)},
    .product_respond_grad = {CHEAP_ACTIVATIONS(PRODUCT_RESPOND_GRAD_ENTRY)},
    .activate = {PNN_ACTIVATION_LIST(ACTIVATE_ENTRY)},
    .activate_grad = {PNN_ACTIVATION_LIST(ACTIVATE_GRAD_ENTRY)},
    .respond_grad = {PNN_ACTIVATION_LIST(RESPOND_GRAD_ENTRY)},
    .affine = affine,
    .scale = scale,
    .accumulate = accumulate,
    .round16 = round16,
    .moments = moments,
    .respond_moments = {CHEAP_ACTIVATIONS(RESPOND_MOMENTS_ENTRY)},
    .recipe = recipe_fill,
#if defined(HAVE_PAIRS)
    .product_pairs = product_pairs,
    .dot_pairs = dot_pairs,
    .pair_rows = pair_rows,
    .pair_columns = pair_columns,
    .pair_bfloat16 = pair_bfloat16,
    .turn_bfloat16 = turn_bfloat16,
    .turn_pairs = turn_pairs,
    .sum_bfloat16 = sum_bfloat16,
    .respond_pairs = {PNN_ACTIVATION_LIST(RESPOND_PAIRS_ENTRY)},
    .respond_bfloat16 = {PNN_ACTIVATION_LIST(RESPOND_BFLOAT16_ENTRY)},
    .respond_product_pairs = {CHEAP_ACTIVATIONS(RESPOND_PRODUCT_PAIRS_ENTRY)},
    .product_rows_pairs = product_rows_pairs,
    .respond_rows_bfloat16 = {PNN_ACTIVATION_LIST(RESPOND_ROWS_BFLOAT16_ENTRY)},
    .respond_grad_rows_bfloat16 = {PNN_ACTIVATION_LIST(RESPOND_GRAD_ROWS_BFLOAT16_ENTRY)},
    .sum_columns_bfloat16 = sum_columns_bfloat16,
    .product_pairs_respond_grad = {CHEAP_ACTIVATIONS(PRODUCT_PAIRS_RESPOND_GRAD_ENTRY)},
#endif
    .product_rows = product_rows,
    .product_rows_run = product_rows_run,
    .pack_gradient = pack_gradient,
    .sum_columns = sum_columns,
    .respond_rows = {PNN_ACTIVATION_LIST(RESPOND_ROWS_ENTRY)},
    .respond_grad_rows = {PNN_ACTIVATION_LIST(RESPOND_GRAD_ROWS_ENTRY)},
    .moments_rows = moments_rows,
};
