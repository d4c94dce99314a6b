/*
 * moments.h - mean and squared deviations of response maps, for normalisation in training; a part of kernels.c.
 */
#ifndef PNN_KERNELS_MOMENTS_H
#define PNN_KERNELS_MOMENTS_H

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

#define GUESSED_PIXELS PNN_LANES /* from which a map's mean is guessed, and the fewest that there may be */

/* moments_once for the maps [r, r + columns) of all pixels, which lie in `vectors` vectors and have a sum each over the
 * pixels; *left has a bit for each map. */
static inline __attribute__((always_inline)) uint64_t moments_columns_once(const pnn_rows_run *runs, int64_t count,
                                                                           int64_t ldx, int64_t ldm, row_mask kind,
                                                                           int64_t n, int64_t r, int64_t columns,
                                                                           int vectors, double *mean, double *m2,
                                                                           pnn_ahead *ahead, vr (*activate)(vr)) {
  const int64_t mask_r = kind == MASK_OF_CHANNEL ? r : 0;
  vr guess[MOMENTS_ABREAST], sum[MOMENTS_ABREAST], squares[MOMENTS_ABREAST];
  vr some[GUESSED_PIXELS][MOMENTS_ABREAST];
  int64_t run = 0, before = 0; /* pixels before the run */
  for (int64_t i = 0; i < GUESSED_PIXELS; i++) {
    const int64_t pixel = i * (n / GUESSED_PIXELS);
    while (pixel >= before + runs[run].pixels) before += runs[run++].pixels;
    const real *x = (const real *)runs[run].x + (pixel - before) * ldx + r;
    const real *mask = kind == NO_MASK ? NULL : (const real *)runs[run].mask + (pixel - before) * ldm + mask_r;
    const vr one = vr_set1(kind == MASK_OF_PIXEL ? mask[0] : 0);
    for (int v = 0; v < vectors; v++)
      some[i][v] = activate(row_perturbed(kind, x, mask, one, v * VR, columns - v * VR));
  }
  /* By halves, so that it is exact where all values are the same. */
  for (int64_t half = GUESSED_PIXELS / 2; half; half /= 2)
    for (int64_t i = 0; i < half; i++)
      for (int v = 0; v < vectors; v++) some[i][v] += some[i + half][v];
  for (int v = 0; v < vectors; v++) {
    guess[v] = some[0][v] * vr_set1((real)(1.0 / GUESSED_PIXELS));
    sum[v] = squares[v] = vr_set1(0);
  }
  for (int64_t i = 0; i < count; i++) {
    const real *x = (const real *)runs[i].x + r;
    const real *mask = kind == NO_MASK ? NULL : (const real *)runs[i].mask + mask_r;
    for (int64_t p = 0; p < runs[i].pixels; p++, x += ldx, mask += kind == NO_MASK ? 0 : ldm) {
      const vr one = vr_set1(kind == MASK_OF_PIXEL ? mask[0] : 0);
      for (int v = 0; v < vectors; v++) {
        const vr d = activate(row_perturbed(kind, x, mask, one, v * VR, columns - v * VR)) - guess[v];
        sum[v] += d;
        squares[v] = vr_fma(d, d, squares[v]);
      }
      pnn_ahead_step_rows(ahead);
    }
  }
  uint64_t left = 0;
  for (int64_t i = 0; i < columns; i++) {
    const double s = (double)sum[i / VR][i % VR], q = (double)squares[i / VR][i % VR], both = s * s / (double)n;
    mean[i] = (double)guess[i / VR][i % VR] + s / (double)n;
    m2[i] = q - both;
    if (!(both <= 0.5 * q) || !(m2[i] <= 1e300)) left |= (uint64_t)1 << i;
  }
  return left;
}
_Static_assert(MOMENTS_ABREAST *VR <= 64, "a bit for each map");

/* The moments of the maps of `left` by two passes over a, at most a vector of columns; the others stay. */
static inline void moments_columns_left(const real *a, int64_t lda, int64_t n, int64_t columns, uint64_t left,
                                        double *mean, double *m2, pnn_ahead *ahead) {
  double again[VR], again_m2[VR];
  moments_columns(a, lda, n, columns, 1, again, again_m2, ahead);
  for (int64_t i = 0; i < columns; i++)
    if (left >> i & 1) mean[i] = again[i], m2[i] = again_m2[i];
}

static void moments_rows(const void *a_, int64_t lda, int64_t n, int64_t rows, double *mean, double *m2,
                         pnn_ahead *ahead) {
  const real *a = a_;
  const pnn_rows_run run = {a, NULL, n};
  for (int64_t r = 0, columns; r < rows; r += columns) {
    columns = rows - r < VR ? rows - r : VR;
    uint64_t left = ~(uint64_t)0;
    if (n >= GUESSED_PIXELS && rows - r >= MOMENTS_ABREAST * VR) {
      columns = MOMENTS_ABREAST * VR;
      left = moments_columns_once(&run, 1, lda, 0, NO_MASK, n, r, MOMENTS_ABREAST * VR, MOMENTS_ABREAST, mean + r,
                                  m2 + r, ahead, PNN_ACTIVATE(identity));
    } else if (n >= GUESSED_PIXELS) {
      left = moments_columns_once(&run, 1, lda, 0, NO_MASK, n, r, columns, 1, mean + r, m2 + r, ahead,
                                  PNN_ACTIVATE(identity));
    }
    for (int64_t i = 0; left && i < columns; i += VR)
      moments_columns_left(a + r + i, lda, n, columns - i < VR ? columns - i : VR, left >> i, mean + r + i, m2 + r + i,
                           ahead);
  }
}

/* `moments_rows` of response maps that are not stored, but for vectors with maps that take a second pass. */
static inline __attribute__((always_inline)) void respond_moments_rows(row_mask kind, real *a, const pnn_rows_run *runs,
                                                                       int64_t count, int64_t ldx, int64_t ldm,
                                                                       int64_t n, int64_t rows, double *mean,
                                                                       double *m2, pnn_ahead *ahead, vr (*activate)(vr),
                                                                       pnn_respond_rows_fn respond) {
  for (int64_t r = 0, columns; r < rows; r += columns) {
    const bool abreast = rows - r >= MOMENTS_ABREAST * VR;
    columns = abreast ? MOMENTS_ABREAST * VR : rows - r < VR ? rows - r : VR;
    const uint64_t left = abreast ? moments_columns_once(runs, count, ldx, ldm, kind, n, r, MOMENTS_ABREAST * VR,
                                                         MOMENTS_ABREAST, mean + r, m2 + r, ahead, activate)
                                  : moments_columns_once(runs, count, ldx, ldm, kind, n, r, columns, 1, mean + r,
                                                         m2 + r, ahead, activate);
    for (int64_t i = 0; left && i < columns; i += VR) {
      const int64_t maps = columns - i < VR ? columns - i : VR;
      real *to = a;
      for (int64_t j = 0; j < count; to += runs[j++].pixels * VR) {
        const real *mask = kind == NO_MASK ? NULL : (const real *)runs[j].mask + (kind == MASK_OF_CHANNEL ? r + i : 0);
        respond(to, VR, (const real *)runs[j].x + r + i, ldx, mask, ldm, NULL, runs[j].pixels, maps,
                kind == MASK_OF_PIXEL);
      }
      moments_columns_left(a, VR, n, maps, left >> i, mean + r + i, m2 + r + i, ahead);
    }
  }
}

#define DEFINE_RESPOND_MOMENTS_ROWS(suffix, name)                                                                    \
  static void respond_moments_rows_##name(void *a, const pnn_rows_run *run, int64_t count, int64_t ldx, int64_t ldm, \
                                          int32_t shared, int64_t n, int64_t rows, double *mean, double *m2,         \
                                          pnn_ahead *ahead) {                                                        \
    if (!run->mask)                                                                                                  \
      respond_moments_rows(NO_MASK, a, run, count, ldx, ldm, n, rows, mean, m2, ahead, PNN_ACTIVATE(name),           \
                           respond_rows_##name);                                                                     \
    else if (shared)                                                                                                 \
      respond_moments_rows(MASK_OF_PIXEL, a, run, count, ldx, ldm, n, rows, mean, m2, ahead, PNN_ACTIVATE(name),     \
                           respond_rows_##name);                                                                     \
    else                                                                                                             \
      respond_moments_rows(MASK_OF_CHANNEL, a, run, count, ldx, ldm, n, rows, mean, m2, ahead, PNN_ACTIVATE(name),   \
                           respond_rows_##name);                                                                     \
  }
CHEAP_ACTIVATIONS(DEFINE_RESPOND_MOMENTS_ROWS)

#endif
