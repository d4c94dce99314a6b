/*
 * product.h - products whose columns are pixels: outputs, and gradients of the input; a part of kernels.c.
 */
#ifndef PNN_KERNELS_PRODUCT_H
#define PNN_KERNELS_PRODUCT_H

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

#endif
