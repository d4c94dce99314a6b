/*
 * dot.h - sums over pixels in PNN_LANES partial sums: gradients of the weight and the bias; a part of kernels.c.
 */
#ifndef PNN_KERNELS_DOT_H
#define PNN_KERNELS_DOT_H

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

/* One tile of sums, lanes v * VR, ... of all of them at a time: as many columns of each PNN_LANES. Its panels are made
 * on the way, a copied from g, b from its source, where these are not NULL. */
static inline __attribute__((always_inline)) void dot_tile(int64_t columns, real *restrict a, int64_t lda,
                                                           const real *g, int64_t ldg, real *restrict b, int64_t ldb,
                                                           const pnn_source *source, int64_t rows, int64_t width,
                                                           real *out, int64_t ldo, bool first,
                                                           const pnn_ahead_run *ahead, vr (*activate)(vr)) {
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
      vr bv[DOT_COLUMNS];
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
        vr av = vr_load(g ? g + i * ldg + at : a + i * lda + at);
        if (g) vr_store(a + i * lda + at, av);
        KEEP_VECTOR(av);
#pragma GCC unroll 4
        for (int j = 0; j < DOT_COLUMNS; j++) one[i * DOT_COLUMNS + j] = vr_fma(av, bv[j], one[i * DOT_COLUMNS + j]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < DOT_ROWS * DOT_COLUMNS; i++) sum[i][v] = one[i];
  }
  add_tile(sum, rows, width, out, ldo, first);
}

static inline vr not_activated(vr u) { return u; }

static void dot(int64_t columns, const void *a, int64_t lda, const void *b, int64_t ldb, int64_t rows, int64_t width,
                void *out, int64_t ldo, int32_t first, const pnn_ahead_run *ahead) {
  /* Without g and a source the panels are only read. */
  dot_tile(columns, (real *)(uintptr_t)a, lda, NULL, 0, (real *)(uintptr_t)b, ldb, NULL, rows, width, out, ldo, first,
           ahead, not_activated);
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

#endif
