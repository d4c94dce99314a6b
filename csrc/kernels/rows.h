/*
 * rows.h - the kernels on panels whose rows are pixels, for channels-last tensors; a part of kernels.c.
 */
#ifndef PNN_KERNELS_ROWS_H
#define PNN_KERNELS_ROWS_H

static inline __attribute__((always_inline)) void rows_steps(int most, int vectors, bool whole, vr sum[][TILE_VECTORS],
                                                             int64_t rows, int64_t depth, const real *restrict a,
                                                             int64_t a_row, int64_t a_step, const real *restrict b,
                                                             int64_t ldb, int64_t strip, pnn_ahead *ahead) {
  /* Three rows share a pointer, which their addresses need no more than a multiple of a_row beside. Where there are
   * fewer, those that are missing repeat the last one. */
  const real *third[3] = {a, a + 3 * a_row, a + 6 * a_row}, *row[STRIP_ROWS];
#pragma GCC unroll 8
  for (int i = 0; i < most; i++) row[i] = a + (i < rows ? i : rows - 1) * a_row;
  for (int64_t left = depth; left > 0; left -= PNN_AHEAD_DEPTH, pnn_ahead_step_rows(ahead))
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
}

/* `rows` of `most` rows, with `columns` of `strips` strips; whole: all of both. */
static inline __attribute__((always_inline)) void rows_product(int most, int strips, bool whole, pnn_product_mode mode,
                                                               int64_t rows, int64_t columns, int64_t depth,
                                                               const real *restrict a, int64_t a_row, int64_t a_step,
                                                               const real *restrict b, int64_t ldb, int64_t strip,
                                                               real *restrict c, int64_t ldc, const real *start,
                                                               pnn_ahead *ahead) {
  const int vectors = strips * STRIP_VECTORS;
  vr sum[STRIP_ROWS][TILE_VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < most; i++)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) sum[i][v] = vr_set1(0);
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
  rows_steps(most, vectors, whole, sum, rows, depth, a, a_row, a_step, b, ldb, strip, ahead);
#pragma GCC unroll 8
  for (int i = 0; i < most; i++, c += ldc) {
    if (!whole && i >= rows) continue;
    if (whole) KEEP_POINTER(c);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
      real *to = c + v * VR;
      if (whole) {
        vr_store(to, mode == PNN_PRODUCT_ADD ? vr_load(to) + sum[i][v] : sum[i][v]);
      } else if (v * VR < columns) {
        const int64_t n = columns - v * VR;
        store_some(to, mode == PNN_PRODUCT_ADD ? load_some(to, n) + sum[i][v] : sum[i][v], n);
      }
    }
  }
}

/* A tile after the other. */
static inline __attribute__((always_inline)) void rows_products(int most, int strips, pnn_product_mode mode,
                                                                int64_t rows, int64_t columns, int64_t depth,
                                                                const real *a, int64_t a_row, int64_t a_step,
                                                                const real *b, int64_t ldb, int64_t strip, real *c,
                                                                int64_t ldc, const real *start, pnn_ahead *ahead) {
  const int64_t all = strips * STRIP_COLUMNS;
  if (columns == all)
    for (; rows >= most; rows -= most, a += most * a_row, c += most * ldc)
      rows_product(most, strips, true, mode, most, all, depth, a, a_row, a_step, b, ldb, strip, c, ldc, start, ahead);
  for (; rows > 0; rows -= most, a += most * a_row, c += most * ldc)
    rows_product(most, strips, false, mode, rows < most ? rows : most, columns, depth, a, a_row, a_step, b, ldb, strip,
                 c, ldc, start, ahead);
}

static void product_rows(pnn_product_mode mode, int64_t rows, int64_t columns, int64_t depth, const void *a,
                         int64_t a_row, int64_t a_step, const void *b, int64_t ldb, int64_t strip, void *c, int64_t ldc,
                         const void *start, pnn_ahead *ahead) {
#if TILE_VECTORS > STRIP_VECTORS
  if (columns > STRIP_COLUMNS) {
    rows_products(TILE_ROWS, TILE_VECTORS / STRIP_VECTORS, mode, rows, columns, depth, a, a_row, a_step, b, ldb, strip,
                  c, ldc, start, ahead);
    return;
  }
#endif
  if (a_row == 1 && rows <= STRIP_ROWS) /* a packed operand */
    rows_products(STRIP_ROWS, 1, mode, rows, columns, depth, a, 1, a_step, b, ldb, strip, c, ldc, start, ahead);
  else
    rows_products(STRIP_ROWS, 1, mode, rows, columns, depth, a, a_row, a_step, b, ldb, strip, c, ldc, start, ahead);
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

static inline __attribute__((always_inline)) void pack_summed(int tiles, bool summed, real *restrict dst,
                                                              int64_t tile_step, const real *restrict src, int64_t step,
                                                              int64_t pixels, int64_t further, real *restrict sums) {
  const int rows = tiles * STRIP_ROWS, vectors = rows / VR, whole = vectors * VR;
  vr sum[PACKED_TILES * STRIP_ROWS / VR + 1];
  real rest[VR]; /* of the rows behind the last whole vector */
  for (int v = 0; v < vectors && summed; v++) sum[v] = vr_load(sums + v * VR);
  for (int i = whole; i < rows && summed; i++) rest[i - whole] = sums[i];
  for (int64_t p = 0; p < pixels; p++, dst += STRIP_ROWS, src += step) {
    for (int i = 0; i < rows; i += LINE) __builtin_prefetch(src + further + i, 0, 2);
#pragma GCC unroll 4
    for (int i = 0; i < tiles; i++) memcpy(dst + i * tile_step, src + i * STRIP_ROWS, STRIP_ROWS * sizeof(real));
    for (int v = 0; v < vectors && summed; v++) sum[v] += vr_load(src + v * VR);
    for (int i = whole; i < rows && summed; i++) rest[i - whole] += src[i];
  }
  for (int v = 0; v < vectors && summed; v++) vr_store(sums + v * VR, sum[v]);
  for (int i = whole; i < rows && summed; i++) sums[i] = rest[i - whole];
}

/* Some whole tiles, and their sums beside, unless NULL. */
static inline __attribute__((always_inline)) void pack_tiles(int tiles, real *restrict dst, int64_t tile_step,
                                                             const real *restrict src, int64_t step, int64_t pixels,
                                                             int64_t further, real *restrict sums) {
  if (sums)
    pack_summed(tiles, true, dst, tile_step, src, step, pixels, further, sums);
  else
    pack_summed(tiles, false, dst, tile_step, src, step, pixels, further, NULL);
}

/* A last tile that is not whole. */
static void pack_rest(real *restrict dst, const real *restrict src, int64_t step, int64_t pixels, int64_t rows,
                      real *restrict sums) {
  for (int64_t p = 0; p < pixels; p++)
    for (int i = 0; i < STRIP_ROWS; i++) {
      dst[p * STRIP_ROWS + i] = i < rows ? src[p * step + i] : 0;
      if (i < rows && sums) sums[i] += src[p * step + i];
    }
}

static void pack_gradient(void *dst_, int64_t tile_step, const void *src_, int64_t step, int64_t pixels, int64_t rows,
                          int64_t further, void *sums_) {
  real *restrict dst = dst_, *restrict sums = sums_;
  const real *restrict src = src_;
  while (rows >= STRIP_ROWS) {
    const int tiles = rows >= PACKED_TILES * STRIP_ROWS ? PACKED_TILES : rows >= 2 * STRIP_ROWS ? 2 : 1;
    switch (tiles) {
      case 1: pack_tiles(1, dst, tile_step, src, step, pixels, further, sums); break;
      case 2: pack_tiles(2, dst, tile_step, src, step, pixels, further, sums); break;
      default: pack_tiles(PACKED_TILES, dst, tile_step, src, step, pixels, further, sums); break;
    }
    rows -= tiles * STRIP_ROWS, src += tiles * STRIP_ROWS, dst += tiles * tile_step;
    if (sums) sums += tiles * STRIP_ROWS;
  }
  if (rows > 0) pack_rest(dst, src, step, pixels, rows, sums);
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

/* From a whole tile of da to dx, as respond_grad_rows. */
static inline __attribute__((always_inline)) void tile_respond_grad_rows(row_mask kind, vr sum[][TILE_VECTORS],
                                                                         real *restrict dx, int64_t ldx,
                                                                         const real *restrict x, int64_t step,
                                                                         const real *restrict mask, int64_t ldm,
                                                                         const pnn_norm_terms *norm, vr (*activate)(vr),
                                                                         vr (*activate_grad)(vr, vr)) {
  const real *mean = norm ? norm->mean : NULL, *offset = norm ? norm->offset : NULL;
  const real *slope = norm ? norm->slope : NULL;
#pragma GCC unroll 8
  for (int i = 0; i < TILE_ROWS; i++, dx += ldx, x += step, mask += kind == NO_MASK ? 0 : ldm) {
    KEEP_POINTER(dx);
    KEEP_POINTER(x);
    KEEP_POINTER(mask);
    const vr one = vr_set1(kind == MASK_OF_PIXEL ? mask[0] : 0);
#pragma GCC unroll 4
    for (int r = 0; r < TILE_COLUMNS; r += VR) {
      const vr u = row_perturbed(kind, x, mask, one, r, VR);
      vr da = sum[i][r / VR];
      if (norm) da = vr_fma(vr_load(slope + r), activate(u) - vr_load(mean + r), da + vr_load(offset + r));
      vr_store(dx + r, activate_grad(u, da));
    }
  }
}

/* The sums of whole tiles through the activation to the gradient of the input. */
static inline __attribute__((always_inline)) void product_respond_grad_rows(
    int64_t pixels, int64_t depth, const real *a, int64_t a_row, const real *b, int64_t ldb, int64_t strip, real *dx,
    int64_t ldx, const real *x, int64_t step, const real *mask, int64_t ldm, const pnn_norm_terms *norm, bool shared,
    pnn_ahead *ahead, vr (*activate)(vr), vr (*activate_grad)(vr, vr)) {
  for (; pixels > 0; pixels -= TILE_ROWS, a += TILE_ROWS * a_row, dx += TILE_ROWS * ldx, x += TILE_ROWS * step) {
    vr sum[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 4
      for (int v = 0; v < TILE_VECTORS; v++) sum[i][v] = vr_set1(0);
    rows_steps(TILE_ROWS, TILE_VECTORS, true, sum, TILE_ROWS, depth, a, a_row, 1, b, ldb, strip, ahead);
    if (!mask)
      tile_respond_grad_rows(NO_MASK, sum, dx, ldx, x, step, NULL, 0, norm, activate, activate_grad);
    else if (shared)
      tile_respond_grad_rows(MASK_OF_PIXEL, sum, dx, ldx, x, step, mask, ldm, norm, activate, activate_grad);
    else if (norm)
      tile_respond_grad_rows(MASK_OF_CHANNEL, sum, dx, ldx, x, step, mask, ldm, norm, activate, activate_grad);
    else
      tile_respond_grad_rows(MASK_OF_CHANNEL, sum, dx, ldx, x, step, mask, ldm, NULL, activate, activate_grad);
    if (mask) mask += TILE_ROWS * ldm;
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

#define DEFINE_PRODUCT_RESPOND_GRAD_ROWS(suffix, name)                                                           \
  static void product_respond_grad_rows_##name(int64_t pixels, int64_t depth, const void *a, int64_t a_row,      \
                                               const void *b, int64_t ldb, int64_t strip, void *dx, int64_t ldx, \
                                               const void *x, int64_t step, const void *mask, int64_t ldm,       \
                                               const pnn_norm_terms *norm, int32_t shared, pnn_ahead *ahead) {   \
    product_respond_grad_rows(pixels, depth, a, a_row, b, ldb, strip, dx, ldx, x, step, mask, ldm, norm, shared, \
                              ahead, PNN_ACTIVATE(name), PNN_ACTIVATE_GRAD(name));                               \
  }
CHEAP_ACTIVATIONS(DEFINE_PRODUCT_RESPOND_GRAD_ROWS)

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

#endif
