/*
 * pairs.h - kernels on bfloat16 pairs, for processors with VDPBF16PS; a part of kernels.c.
 *
 * A pair is two bfloat16 values in 32 bits, the even one low. VDPBF16PS adds the two products of each lane to a float,
 * rounding to nearest, with denormals as zero. Response maps of bfloat16 tensors are made straight into pairs: computed
 * as floats in registers, rounded there, never stored as floats.
 */
#ifndef PNN_KERNELS_PAIRS_H
#define PNN_KERNELS_PAIRS_H

#define HAVE_PAIRS 1
#if defined(PNN_EMULATE_PAIRS) /* tests/c/emulated_pairs.h */
#define PAIRS_TARGET
#else
#define PAIRS_TARGET __attribute__((target("avx512bf16")))
#endif
#define PAIRS_INLINE PAIRS_TARGET static inline __attribute__((always_inline))

/* ---- bfloat16 values and pairs of them, 16 at a time ---- */

/* The first n lanes; all where n is at least 16. */
static inline __mmask16 lanes(int64_t n) { return (__mmask16)(n >= VR ? 0xffffu : n > 0 ? (1u << n) - 1 : 0u); }

/* The first n < 16 values; the others are 0. */
static inline vr load_bfloat16_part(const uint16_t *p, int64_t n) {
  const __m256i half = _mm256_maskz_loadu_epi16(lanes(n), p);
  return (vr)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
}

#define DENORMAL_CLASS 0x20 /* of vfpclass */

/* As store_vector_bfloat16, denormals included, by the processor's own rounding where there are none. */
PAIRS_INLINE __m256i narrow(vr v) {
  if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)v, DENORMAL_CLASS) != 0, 0))
    return _mm512_cvtepi32_epi16((__m512i)(upper_half(v) >> 16));
  return (__m256i)_mm512_cvtneps_pbh((__m512)v);
}

/* The same of two vectors, one behind the other. */
PAIRS_INLINE void store_narrow(uint16_t *p, vr first, vr second) {
  const __mmask16 denormals =
      _mm512_fpclass_ps_mask((__m512)first, DENORMAL_CLASS) | _mm512_fpclass_ps_mask((__m512)second, DENORMAL_CLASS);
  if (__builtin_expect(denormals != 0, 0)) {
    store_vector_bfloat16(p, first);
    store_vector_bfloat16(p + VR, second);
    return;
  }
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}

/* (bfloat16(low), bfloat16(high)) in each lane, to nearest even; denormals become 0, as in the products. */
PAIRS_INLINE __m512i pairs_of(vr low, vr high) {
  /* Both halves one after the other, then lane by lane. */
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}

/* (low, high) in each lane. */
PAIRS_INLINE __m512i interleave(__m256i low, __m256i high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
}

PAIRS_TARGET static void pair_rows(void *dst_, const void *a_, int64_t ld, int64_t rows, int64_t columns) {
  uint32_t *dst = dst_;
  const real *a = a_;
  for (int64_t r = 0; r < rows; r += 2, a += 2 * ld, dst += ld)
    for (int64_t j = 0; j < columns; j += VR) {
      const vr high = r + 1 < rows ? vr_load(a + ld + j) : vr_set1(0);
      _mm512_storeu_si512(dst + j, pairs_of(vr_load(a + j), high));
    }
}

PAIRS_TARGET static void pair_columns(void *dst_, int64_t ldd, const void *a_, int64_t lda, int64_t rows,
                                      int64_t columns) {
  for (int64_t r = 0; r < rows; r++) {
    uint32_t *dst = (uint32_t *)dst_ + r * ldd;
    const real *a = (const real *)a_ + r * lda;
    for (int64_t j = 0; j < columns; j += 2 * VR)
      _mm512_storeu_si512(dst + j / 2,
                          (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(a + j + VR), _mm512_loadu_ps(a + j)));
  }
}

PAIRS_TARGET static void pair_bfloat16(void *dst_, int64_t ld, const void *src_, int64_t row_stride, int64_t rows,
                                       int64_t columns) {
  uint32_t *dst = dst_;
  const uint16_t *src = src_;
  const int64_t whole = columns / VR * VR;
  const __mmask16 rest = lanes(columns - whole);
  for (int64_t r = 0; r < rows; r += 2, src += 2 * row_stride, dst += ld) {
    const bool two = r + 1 < rows;
    const uint16_t *const high = two ? src + row_stride : src;
    const __mmask16 all = two ? lanes(VR) : 0;
    for (int64_t j = 0; j < whole; j += VR)
      _mm512_storeu_si512(dst + j, interleave(_mm256_loadu_si256((const __m256i *)(const void *)(src + j)),
                                              _mm256_maskz_loadu_epi16(all, high + j)));
    if (rest)
      _mm512_mask_storeu_epi32(dst + whole, rest,
                               interleave(_mm256_maskz_loadu_epi16(rest, src + whole),
                                          _mm256_maskz_loadu_epi16((__mmask16)(rest & all), high + whole)));
  }
}

/* ---- tensors whose channels are neighbours, turned ---- */

#define TURNED_COLUMNS (2 * VR)

/* In lane r, the values r of columns[0] and columns[1]. The first n lanes are read, the second column where `two`. */
PAIRS_INLINE vr load_column_pair(const uint16_t *src, int64_t lds, int64_t n, bool two) {
  const __m256i low = _mm256_maskz_loadu_epi16(lanes(n), src);
  const __m256i high = _mm256_maskz_loadu_epi16((__mmask16)(two ? lanes(n) : 0), two ? src + lds : src);
  return (vr)interleave(low, high);
}

PAIRS_TARGET static void turn_bfloat16(void *dst_, int64_t ldd, const void *src_, int64_t lds, int64_t rows,
                                       int64_t columns) {
  uint16_t *dst = dst_;
  const uint16_t *src = src_;
  for (int64_t r = 0; r < rows; r += VR) {
    const int64_t n = rows - r < VR ? rows - r : VR;
    for (int64_t j = 0; j < columns; j += TURNED_COLUMNS) {
      const int64_t left = columns - j;
      const uint16_t *from = src + j * lds + r;
      vr v[VR];
      for (int i = 0; i < VR; i++)
        v[i] = 2 * i < left ? load_column_pair(from + 2 * i * lds, lds, n, 2 * i + 1 < left) : vr_set1(0);
      vr_transpose(v);
      const __mmask32 there = left < TURNED_COLUMNS ? (__mmask32)((UINT32_C(1) << left) - 1) : ~(__mmask32)0;
      for (int i = 0; i < n; i++) _mm512_mask_storeu_epi16(dst + (r + i) * ldd + j, there, (__m512i)v[i]);
    }
  }
}

PAIRS_TARGET static void turn_pairs(void *dst_, int64_t ld, const void *src_, int64_t lds, int64_t rows,
                                    int64_t columns) {
  uint32_t *dst = dst_;
  const uint16_t *src = src_;
  for (int64_t r = 0; r < rows; r += 2 * VR, dst += VR * ld) {
    const int64_t n = rows - r < 2 * VR ? rows - r : 2 * VR;
    const __mmask32 read = n < 2 * VR ? (__mmask32)((UINT32_C(1) << n) - 1) : ~(__mmask32)0;
    for (int64_t j = 0; j < columns; j += VR) {
      const int64_t left = columns - j;
      vr v[VR];
      for (int i = 0; i < VR; i++)
        v[i] = i < left ? (vr)_mm512_maskz_loadu_epi16(read, src + (j + i) * lds + r) : vr_set1(0);
      vr_transpose(v);
      for (int i = 0; 2 * i < n; i++) _mm512_mask_storeu_epi32(dst + i * ld + j, lanes(left), (__m512i)v[i]);
    }
  }
}

/* ---- response maps ---- */

/* Walks a source's response maps one after another. */
typedef struct map_walk {
  const uint16_t *x;
  const real *mask, *mean;
  int64_t m;
} map_walk;

PAIRS_INLINE map_walk walk_begin(const pnn_source *s) {
  map_walk w = {.x = s->x, .mask = s->mask, .mean = s->mean, .m = s->k0 % s->masks};
  if (w.mask && s->shared) w.mask += w.m * s->ldm;
  return w;
}

PAIRS_INLINE void walk_next(map_walk *w, const pnn_source *s, bool masked, bool centred) {
  if (masked) w->mask += s->ldm;
  if (centred) w->mean++;
  if (++w->m < s->masks) return;
  w->m = 0;
  w->x += s->ldx;
  if (masked && s->shared) w->mask -= s->masks * s->ldm;
}

/* activation(x + mask) - mean of columns [j, j + 16), or the first n of them. */
PAIRS_INLINE vr walk_respond(const map_walk *w, int64_t j, vr (*activate)(vr), bool masked, bool centred) {
  vr u = load_vector_bfloat16(w->x + j);
  if (masked) u += vr_load(w->mask + j);
  u = activate(u);
  return centred ? u - vr_set1(*w->mean) : u;
}
PAIRS_INLINE vr walk_respond_part(const map_walk *w, int64_t j, int64_t n, vr (*activate)(vr), bool masked,
                                  bool centred) {
  vr u = load_bfloat16_part(w->x + j, n);
  if (masked) u += vr_load_part(w->mask + j, n);
  u = activate(u);
  return centred ? u - vr_set1(*w->mean) : u;
}

PAIRS_INLINE void respond_pairs(uint32_t *dst, int64_t ld, const pnn_source *source, int64_t rows, int64_t columns,
                                vr (*activate)(vr)) {
  const bool masked = source->mask, centred = source->mean;
  const int64_t whole = columns / VR * VR, rest = columns - whole;
  map_walk low = walk_begin(source);
  for (int64_t r = 0; r < rows; r += 2, dst += ld) {
    const bool two = r + 1 < rows;
    map_walk high = low;
    if (two) walk_next(&high, source, masked, centred);
    for (int64_t j = 0; j < whole; j += VR)
      _mm512_storeu_si512(dst + j, pairs_of(walk_respond(&low, j, activate, masked, centred),
                                            two ? walk_respond(&high, j, activate, masked, centred) : vr_set1(0)));
    if (rest)
      _mm512_mask_storeu_epi32(
          dst + whole, lanes(rest),
          pairs_of(walk_respond_part(&low, whole, rest, activate, masked, centred),
                   two ? walk_respond_part(&high, whole, rest, activate, masked, centred) : vr_set1(0)));
    low = high;
    if (r + 2 < rows) walk_next(&low, source, masked, centred);
  }
}

PAIRS_INLINE void respond_bfloat16(uint16_t *dst, int64_t ld, const pnn_source *source, int64_t rows, int64_t columns,
                                   vr (*activate)(vr)) {
  const bool masked = source->mask, centred = source->mean;
  const int64_t whole = columns / (2 * VR) * (2 * VR);
  map_walk w = walk_begin(source);
  for (int64_t r = 0; r < rows; r++, dst += ld) {
    int64_t j = 0;
    for (; j < whole; j += 2 * VR)
      _mm512_storeu_si512(dst + j,
                          (__m512i)_mm512_cvtne2ps_pbh((__m512)walk_respond(&w, j + VR, activate, masked, centred),
                                                       (__m512)walk_respond(&w, j, activate, masked, centred)));
    for (int64_t n; j < columns; j += n) {
      n = columns - j < VR ? columns - j : VR;
      const vr a = n == VR ? walk_respond(&w, j, activate, masked, centred)
                           : walk_respond_part(&w, j, n, activate, masked, centred);
      _mm256_mask_storeu_epi16(dst + j, lanes(n), (__m256i)_mm512_cvtneps_pbh((__m512)a));
    }
    if (r + 1 < rows) walk_next(&w, source, masked, centred);
  }
}

/* ---- products ---- */

PAIRS_INLINE void tile_step_pairs(__m512 sum[STRIP_ROWS][STRIP_VECTORS], const int32_t *a,
                                  const __m512i b[STRIP_VECTORS]) {
#pragma GCC unroll 8
  for (int i = 0; i < STRIP_ROWS; i++) {
    const __m512i av = _mm512_set1_epi32(a[i]);
#pragma GCC unroll 4
    for (int v = 0; v < STRIP_VECTORS; v++) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], (__m512bh)av, (__m512bh)b[v]);
  }
}

PAIRS_INLINE void tile_begin_pairs(__m512 sum[STRIP_ROWS][STRIP_VECTORS], const float *c, int64_t ldc,
                                   const float *start) {
#pragma GCC unroll 8
  for (int i = 0; i < STRIP_ROWS; i++)
#pragma GCC unroll 4
    for (int v = 0; v < STRIP_VECTORS; v++)
      sum[i][v] = start ? _mm512_set1_ps(start[i]) : _mm512_loadu_ps(c + i * ldc + v * VR);
}

PAIRS_INLINE void tile_end_pairs(__m512 sum[STRIP_ROWS][STRIP_VECTORS], float *c, int64_t ldc, uint16_t *out,
                                 int64_t ldo) {
#pragma GCC unroll 8
  for (int i = 0; i < STRIP_ROWS; i++)
#pragma GCC unroll 4
    for (int v = 0; v < STRIP_VECTORS; v++) {
      if (out)
        _mm256_storeu_si256((__m256i *)(void *)(out + i * ldo + v * VR), narrow((vr)sum[i][v]));
      else
        _mm512_storeu_ps(c + i * ldc + v * VR, sum[i][v]);
    }
}

PAIRS_INLINE void tile_products_pairs(int64_t depth, __m512 sum[STRIP_ROWS][STRIP_VECTORS], const int32_t *a,
                                      const int32_t *b, int64_t ldb, pnn_ahead *ahead) {
  for (int64_t left = depth; left > 0; left -= PNN_AHEAD_DEPTH, pnn_ahead_step(ahead))
    for (int64_t k = 0; k < left && k < PNN_AHEAD_DEPTH; k++, a += STRIP_ROWS, b += ldb) {
      __m512i bv[STRIP_VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < STRIP_VECTORS; v++) bv[v] = _mm512_loadu_si512(b + v * VR);
      tile_step_pairs(sum, a, bv);
    }
}

PAIRS_TARGET static void product_pairs(int64_t depth, const void *a, const void *b, int64_t ldb, void *c, int64_t ldc,
                                       const void *start, void *out, int64_t ldo, pnn_ahead *ahead) {
  __m512 sum[STRIP_ROWS][STRIP_VECTORS];
  tile_begin_pairs(sum, c, ldc, start);
  tile_products_pairs(depth, sum, a, b, ldb, ahead);
  tile_end_pairs(sum, c, ldc, out, ldo);
}

/* `product_pairs` whose panel is made on the way. */
PAIRS_INLINE void respond_product_pairs(int64_t maps, const int32_t *a, uint32_t *b, int64_t ldb, float *c, int64_t ldc,
                                        const float *start, uint16_t *out, int64_t ldo, const pnn_source *source,
                                        pnn_ahead *ahead, vr (*activate)(vr), bool masked, bool centred) {
  map_walk low = walk_begin(source);
  __m512 sum[STRIP_ROWS][STRIP_VECTORS];
  tile_begin_pairs(sum, c, ldc, start);
  for (int64_t left = maps; left > 0; left -= 2 * PNN_AHEAD_DEPTH, pnn_ahead_step(ahead))
    for (int64_t k = 0; k < left && k < 2 * PNN_AHEAD_DEPTH; k += 2, a += STRIP_ROWS, b += ldb) {
      const bool two = k + 1 < left;
      map_walk high = low;
      if (two) walk_next(&high, source, masked, centred);
      __m512i bv[STRIP_VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < STRIP_VECTORS; v++) {
        bv[v] = pairs_of(walk_respond(&low, v * VR, activate, masked, centred),
                         two ? walk_respond(&high, v * VR, activate, masked, centred) : vr_set1(0));
        _mm512_storeu_si512(b + v * VR, bv[v]);
      }
      tile_step_pairs(sum, a, bv);
      low = high;
      if (k + 2 < left) walk_next(&low, source, masked, centred);
    }
  tile_end_pairs(sum, c, ldc, out, ldo);
}

/* The sums of a tile through the activation to the gradient of the input, one mask a channel. */
PAIRS_INLINE void product_pairs_respond_grad(int64_t depth, const int32_t *a, const int32_t *b, int64_t ldb,
                                             uint16_t *dx, int64_t ldo, int64_t rows, const pnn_source *source,
                                             pnn_ahead *ahead, vr (*activate_grad)(vr, vr)) {
  const uint16_t *x = source->x;
  const real *mask = source->mask;
  const int64_t ldx = source->ldx, ldm = source->shared ? 0 : source->ldm;
  for (int64_t i = 0; i < rows; i++) {
    __builtin_prefetch(x + i * ldx);
    for (int v = 0; mask && v < STRIP_VECTORS; v++) __builtin_prefetch(mask + i * ldm + v * VR);
  }
  __m512 sum[STRIP_ROWS][STRIP_VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < STRIP_ROWS; i++)
#pragma GCC unroll 4
    for (int v = 0; v < STRIP_VECTORS; v++) sum[i][v] = _mm512_setzero_ps();
  tile_products_pairs(depth, sum, a, b, ldb, ahead);
#pragma GCC unroll 8
  for (int i = 0; i < STRIP_ROWS; i++) {
    if (i >= rows) continue;
#pragma GCC unroll 4
    for (int v = 0; v < STRIP_VECTORS; v++) {
      vr u = load_vector_bfloat16(x + i * ldx + v * VR);
      if (mask) u += vr_load(mask + i * ldm + v * VR);
      _mm256_storeu_si256((__m256i *)(void *)(dx + i * ldo + v * VR), narrow(activate_grad(u, (vr)sum[i][v])));
    }
  }
}

PAIRS_TARGET static void dot_pairs(int64_t columns, const void *a_, int64_t lda, const void *b_, int64_t ldb,
                                   int64_t rows, int64_t width, void *out, int64_t ldo, int32_t first,
                                   const pnn_ahead_run *ahead) {
  const int32_t *restrict a = a_;
  const int32_t *restrict b = b_;
  __m512 sum[DOT_ROWS][DOT_COLUMNS];
#pragma GCC unroll 4
  for (int i = 0; i < DOT_ROWS; i++)
#pragma GCC unroll 4
    for (int j = 0; j < DOT_COLUMNS; j++) sum[i][j] = _mm512_setzero_ps();
  const char *line = ahead->data;
  const int64_t line_step = ahead->step;
  for (int64_t p = 0; p < columns; p += VR) {
    __builtin_prefetch(line, 0, 2);
    line += line_step;
    __m512i bv[DOT_COLUMNS];
#pragma GCC unroll 4
    for (int j = 0; j < DOT_COLUMNS; j++) bv[j] = _mm512_loadu_si512(b + j * ldb + p);
#pragma GCC unroll 4
    for (int i = 0; i < DOT_ROWS; i++) {
      const __m512i av = _mm512_loadu_si512(a + i * lda + p);
#pragma GCC unroll 4
      for (int j = 0; j < DOT_COLUMNS; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], (__m512bh)av, (__m512bh)bv[j]);
    }
  }
  vr all[DOT_ROWS * DOT_COLUMNS][LANE_VECTORS];
#pragma GCC unroll 4
  for (int i = 0; i < DOT_ROWS; i++)
#pragma GCC unroll 4
    for (int j = 0; j < DOT_COLUMNS; j++) all[i * DOT_COLUMNS + j][0] = (vr)sum[i][j];
  add_tile(all, rows, width, out, ldo, first);
}

static void sum_bfloat16(int64_t columns, const void *a_, int64_t lda, int64_t rows, void *out_) {
  real *out = out_;
  for (int64_t r = 0; r < rows; r++) {
    const uint16_t *a = (const uint16_t *)a_ + r * lda;
    vr sum[LANE_VECTORS] = {vr_set1(0)};
    for (int64_t p = 0; p < columns; p += PNN_LANES) sum[0] += load_vector_bfloat16(a + p);
    out[r] = lanes_sum(sum);
  }
}

/* ---- panels whose rows are pixels ---- */

/* a: element (i, k) is the pair at (uint16_t *)a + i*a_row + 2*k*a_step. */
PAIRS_TARGET static void rows_product_pairs(pnn_product_mode mode, int64_t rows, int64_t columns, int64_t depth,
                                            const void *a_, int64_t a_row, int64_t a_step, const void *b_, int64_t ldb,
                                            void *c, int64_t ldc, const void *start_, int32_t to_bfloat16,
                                            pnn_ahead *ahead) {
  const int32_t *restrict b = b_;
  const real *start = mode == PNN_PRODUCT_START ? start_ : NULL;
  const char *a[STRIP_ROWS];
  __m512 sum[STRIP_ROWS][STRIP_VECTORS];
  __mmask16 there[STRIP_VECTORS];
#pragma GCC unroll 4
  for (int v = 0; v < STRIP_VECTORS; v++) {
    there[v] = lanes(columns - v * VR);
    const __m512 s = start ? _mm512_maskz_loadu_ps(there[v], start + v * VR) : _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int i = 0; i < STRIP_ROWS; i++) sum[i][v] = s;
  }
#pragma GCC unroll 8
  for (int i = 0; i < STRIP_ROWS; i++) /* rows that are not there repeat the last one and are not written */
    a[i] = (const char *)a_ + (i < rows ? i : rows - 1) * a_row * 2;
  for (int64_t k = 0; k < depth; pnn_ahead_step_rows(ahead)) {
    const int64_t next = k + PNN_AHEAD_DEPTH;
    for (; k < depth && k < next; k++, b += ldb) {
      __m512i bv[STRIP_VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < STRIP_VECTORS; v++) bv[v] = _mm512_loadu_si512(b + v * VR);
#pragma GCC unroll 8
      for (int i = 0; i < STRIP_ROWS; i++) {
        int32_t pair;
        memcpy(&pair, a[i] + k * a_step * 4, sizeof pair);
        const __m512i av = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int v = 0; v < STRIP_VECTORS; v++) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], (__m512bh)av, (__m512bh)bv[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < STRIP_ROWS; i++) {
    if (i >= rows) continue;
#pragma GCC unroll 4
    for (int v = 0; v < STRIP_VECTORS; v++) {
      if (to_bfloat16) {
        _mm256_mask_storeu_epi16((uint16_t *)c + i * ldc + v * VR, there[v], narrow((vr)sum[i][v]));
      } else {
        real *to = (real *)c + i * ldc + v * VR;
        __m512 s = sum[i][v];
        if (mode == PNN_PRODUCT_ADD) s = _mm512_add_ps(_mm512_maskz_loadu_ps(there[v], to), s);
        _mm512_mask_storeu_ps(to, there[v], s);
      }
    }
  }
}

PAIRS_TARGET static void product_rows_pairs(pnn_product_mode mode, int64_t rows, int64_t columns, int64_t depth,
                                            const void *a, int64_t a_row, int64_t a_step, const void *b, int64_t ldb,
                                            void *c, int64_t ldc, const void *start, int32_t to_bfloat16,
                                            pnn_ahead *ahead) {
  for (int64_t i = 0; i < rows; i += STRIP_ROWS)
    rows_product_pairs(mode, rows - i < STRIP_ROWS ? rows - i : STRIP_ROWS, columns, depth,
                       (const uint16_t *)a + i * a_row, a_row, a_step, b, ldb,
                       (char *)c + i * ldc * (to_bfloat16 ? 2 : 4), ldc, start, to_bfloat16, ahead);
}

static inline vr load_some_bfloat16(const uint16_t *p, int64_t n) {
  return n >= VR ? load_vector_bfloat16(p) : load_bfloat16_part(p, n);
}

PAIRS_INLINE vr rows_respond(const uint16_t *x, const real *mask, const real *mean, int64_t r, int64_t rows, vr one,
                             bool shared, vr (*activate)(vr)) {
  const int64_t n = rows - r;
  vr u = load_some_bfloat16(x + r, n);
  if (mask) u += shared ? one : load_some(mask + r, n);
  u = activate(u);
  return mean ? u - load_some(mean + r, n) : u;
}

PAIRS_INLINE void respond_rows_bfloat16(uint16_t *a, int64_t lda, const uint16_t *x, int64_t ldx, const real *mask,
                                        int64_t ldm, const real *mean, int64_t pixels, int64_t rows, bool shared,
                                        vr (*activate)(vr)) {
  for (int64_t p = 0; p < pixels; p++, a += lda, x += ldx, mask += mask ? ldm : 0) {
    const vr one = vr_set1(mask && shared ? mask[0] : 0);
    int64_t r = 0;
    for (; r + 2 * VR <= rows; r += 2 * VR)
      _mm512_storeu_si512(
          a + r, (__m512i)_mm512_cvtne2ps_pbh((__m512)rows_respond(x, mask, mean, r + VR, rows, one, shared, activate),
                                              (__m512)rows_respond(x, mask, mean, r, rows, one, shared, activate)));
    for (; r < rows; r += VR) {
      const vr u = rows_respond(x, mask, mean, r, rows, one, shared, activate);
      _mm256_mask_storeu_epi16(a + r, lanes(rows - r), (__m256i)_mm512_cvtneps_pbh((__m512)u));
    }
  }
}

PAIRS_INLINE void respond_grad_rows_bfloat16(uint16_t *dx, int64_t ldx, const real *d, int64_t ldd, const uint16_t *x,
                                             int64_t step, const real *mask, int64_t ldm, int64_t pixels, int64_t rows,
                                             bool shared, vr (*activate_grad)(vr, vr)) {
  for (int64_t p = 0; p < pixels; p++, dx += ldx, d += ldd, x += step, mask += mask ? ldm : 0) {
    const vr one = vr_set1(mask && shared ? mask[0] : 0);
    int64_t r = 0;
    for (; r + 2 * VR <= rows; r += 2 * VR) {
      vr d_x[2];
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) {
        const int64_t at = r + v * VR;
        vr u = load_vector_bfloat16(x + at);
        if (mask) u += shared ? one : vr_load(mask + at);
        d_x[v] = activate_grad(u, vr_load(d + at));
      }
      store_narrow(dx + r, d_x[0], d_x[1]);
    }
    for (; r < rows; r += VR) {
      const int64_t n = rows - r;
      vr u = load_some_bfloat16(x + r, n);
      if (mask) u += shared ? one : load_some(mask + r, n);
      _mm256_mask_storeu_epi16(dx + r, lanes(n), narrow(activate_grad(u, load_some(d + r, n))));
    }
  }
}

#define SUMS_ABREAST 4 /* chains: one waits for each of its additions */

static void sum_columns_bfloat16(int64_t depth, const void *a_, int64_t lda, int64_t columns, void *out_) {
  real *out = out_;
  int64_t j = 0;
  for (; j + SUMS_ABREAST * VR <= columns; j += SUMS_ABREAST * VR) {
    const uint16_t *a = (const uint16_t *)a_ + j;
    vr sum[SUMS_ABREAST] = {vr_set1(0)};
    for (int64_t k = 0; k < depth; k++, a += lda)
#pragma GCC unroll 4
      for (int v = 0; v < SUMS_ABREAST; v++) sum[v] += load_vector_bfloat16(a + v * VR);
#pragma GCC unroll 4
    for (int v = 0; v < SUMS_ABREAST; v++) vr_store(out + j + v * VR, vr_load(out + j + v * VR) + sum[v]);
  }
  for (; j < columns; j += VR) {
    const uint16_t *a = (const uint16_t *)a_ + j;
    vr sum = vr_set1(0);
    for (int64_t k = 0; k < depth; k++, a += lda) sum += load_some_bfloat16(a, columns - j);
    store_some(out + j, load_some(out + j, columns - j) + sum, columns - j);
  }
}

/* ---- one of each for an activation ---- */

#define DEFINE_RESPOND_PAIRS(suffix, name)                                                                           \
  PAIRS_TARGET static void respond_pairs_##name(void *dst, int64_t ld, const pnn_source *source, int64_t rows,       \
                                                int64_t columns) {                                                   \
    respond_pairs(dst, ld, source, rows, columns, PNN_ACTIVATE(name));                                               \
  }                                                                                                                  \
  PAIRS_TARGET static void respond_bfloat16_##name(void *dst, int64_t ld, const pnn_source *source, int64_t rows,    \
                                                   int64_t columns) {                                                \
    respond_bfloat16(dst, ld, source, rows, columns, PNN_ACTIVATE(name));                                            \
  }                                                                                                                  \
  PAIRS_TARGET static void respond_rows_bfloat16_##name(void *a, int64_t lda, const void *x, int64_t ldx,            \
                                                        const void *mask, int64_t ldm, const void *mean,             \
                                                        int64_t pixels, int64_t rows, int32_t shared) {              \
    respond_rows_bfloat16(a, lda, x, ldx, mask, ldm, mean, pixels, rows, shared, PNN_ACTIVATE(name));                \
  }                                                                                                                  \
  PAIRS_TARGET static void respond_grad_rows_bfloat16_##name(                                                        \
      void *dx, int64_t ldx, const void *d, int64_t ldd, const void *x, int64_t step, const void *mask, int64_t ldm, \
      const pnn_norm_terms *norm, int64_t pixels, int64_t rows, int32_t shared) {                                    \
    (void)norm;                                                                                                      \
    respond_grad_rows_bfloat16(dx, ldx, d, ldd, x, step, mask, ldm, pixels, rows, shared, PNN_ACTIVATE_GRAD(name));  \
  }
PNN_ACTIVATION_LIST(DEFINE_RESPOND_PAIRS)

#define DEFINE_RESPOND_PRODUCT_PAIRS(suffix, name)                                                                     \
  PAIRS_TARGET static void respond_product_pairs_##name(int64_t maps, const void *a, void *b, int64_t ldb, void *c,    \
                                                        int64_t ldc, const void *start, void *out, int64_t ldo,        \
                                                        const pnn_source *source, pnn_ahead *ahead) {                  \
    if (source->mean)                                                                                                  \
      respond_product_pairs(maps, a, b, ldb, c, ldc, start, out, ldo, source, ahead, PNN_ACTIVATE(name), source->mask, \
                            true);                                                                                     \
    else if (source->mask)                                                                                             \
      respond_product_pairs(maps, a, b, ldb, c, ldc, start, out, ldo, source, ahead, PNN_ACTIVATE(name), true, false); \
    else                                                                                                               \
      respond_product_pairs(maps, a, b, ldb, c, ldc, start, out, ldo, source, ahead, PNN_ACTIVATE(name), false,        \
                            false);                                                                                    \
  }                                                                                                                    \
  PAIRS_TARGET static void product_pairs_respond_grad_##name(int64_t depth, const void *a, const void *b, int64_t ldb, \
                                                             void *dx, int64_t ldo, int64_t rows,                      \
                                                             const pnn_source *source, pnn_ahead *ahead) {             \
    product_pairs_respond_grad(depth, a, b, ldb, dx, ldo, rows, source, ahead, PNN_ACTIVATE_GRAD(name));               \
  }
CHEAP_ACTIVATIONS(DEFINE_RESPOND_PRODUCT_PAIRS)

#define RESPOND_PAIRS_ENTRY(suffix, name) [PNN_ACTIVATION_##suffix] = respond_pairs_##name,
#define RESPOND_BFLOAT16_ENTRY(suffix, name) [PNN_ACTIVATION_##suffix] = respond_bfloat16_##name,
#define RESPOND_ROWS_BFLOAT16_ENTRY(suffix, name) [PNN_ACTIVATION_##suffix] = respond_rows_bfloat16_##name,
#define RESPOND_GRAD_ROWS_BFLOAT16_ENTRY(suffix, name) [PNN_ACTIVATION_##suffix] = respond_grad_rows_bfloat16_##name,
#define RESPOND_PRODUCT_PAIRS_ENTRY(suffix, name) [PNN_ACTIVATION_##suffix] = respond_product_pairs_##name,
#define PRODUCT_PAIRS_RESPOND_GRAD_ENTRY(suffix, name) [PNN_ACTIVATION_##suffix] = product_pairs_respond_grad_##name,

#endif
