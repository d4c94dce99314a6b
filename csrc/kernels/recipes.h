/*
 * recipes.h - masks computed from a seed: uniform, normal, waves; a part of kernels.c.
 */
#ifndef PNN_KERNELS_RECIPES_H
#define PNN_KERNELS_RECIPES_H

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
  const philox_keys keys = philox_schedule(recipe->key);
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
      philox4x32_10(words, &keys);
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

/* What the first two rounds make of the pixels alone, whatever the block of two maps, which is the counter's word 2.
 * Its word 3 is 2. */
typedef struct normal_pixels {
  vw row[2], product0[2], product1[2]; /* of the first round's multiplier 0, and the second one's multiplier 1 */
} normal_pixels;

static inline void normal_begin(normal_pixels *pixels, const uint32_t *rows, const uint32_t *columns,
                                const philox_keys *keys) {
  philox_load(rows, pixels->row);
  philox_load(columns, pixels->product0);
  for (int h = 0; h < 2; h++) {
    pixels->product0[h] = vw_mul_low(vw_set1(PHILOX_M0), pixels->product0[h]);
    pixels->product1[h] = vw_mul_low(vw_set1(PHILOX_M1), pixels->product0[h] >> 32 ^ keys->round[0][1] ^ vw_set1(2));
  }
}

/* The sums of bytes behind the normal masks: of output words 0 and 1 for the even map of a block, 2 and 3 for the odd
 * one. */
static inline __attribute__((always_inline)) void normal_sums(const normal_pixels *pixels, int64_t block,
                                                              const philox_keys *keys, vi sums[2]) {
  const uint64_t product = (uint64_t)PHILOX_M1 * (uint32_t)block;
  const vw high = vw_set1(product >> 32) ^ keys->round[0][0], low = vw_set1((uint32_t)product) ^ keys->round[1][0];
  philox_words at;
#pragma GCC unroll 2
  for (int h = 0; h < 2; h++) {
    const vw a = vw_mul_low(vw_set1(PHILOX_M0), pixels->row[h] ^ high);
    at.w[0][h] = pixels->product1[h] >> 32 ^ low;
    at.w[1][h] = pixels->product1[h];
    at.w[2][h] = vw_xor3(a >> 32, pixels->product0[h], keys->round[1][1]);
    at.w[3][h] = a;
  }
  philox_rounds(&at, keys, 2);
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    vw sum[2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) sum[h] = vw_byte_sums(vw_pair_low(at.w[2 * i][h], at.w[2 * i + 1][h]));
    sums[i] = (vi)vw_low_halves(sum[0], sum[1]);
  }
}

static inline void store_normal(real *dst, vi sums, real level, int64_t n) {
  /* The sum of eight bytes has mean 1020 and variance 8 * (256^2 - 1) / 12 = 43690. 1/sqrt(43690) to float. */
  const vf deviations = __builtin_convertvector(sums - 1020, vf) * 0x1.39897ep-8f;
#if defined(PNN_REAL_F32)
  const vf values[1] = {vf_set1(level) * deviations};
#else
  vd values[2];
  vf_to_vd(deviations, &values[0], &values[1]);
  for (int i = 0; i < 2; i++) values[i] *= level;
#endif
  if (n >= PNN_VF)
    memcpy(dst, values, sizeof values);
  else
    memcpy(dst, values, (size_t)n * sizeof(real));
}

static void recipe_normal(real *dst, int64_t ld, const pnn_recipe *recipe, real level, int64_t k0, int64_t rows,
                          const pnn_grid *grid) {
  const philox_keys keys = philox_schedule(recipe->key);
  grid_walk at = grid_begin(grid);
  for (int64_t p = 0; p < grid->count; p += PHILOX_LANES) {
    grid_next(&at, grid);
    for (int lane = 0; lane < PHILOX_LANES && p + lane < grid->count; lane += PNN_VF) {
      normal_pixels pixels;
      normal_begin(&pixels, at.rows + lane, at.columns + lane, &keys);
      for (int64_t block = k0 / 2; block * 2 < k0 + rows; block++) {
        vi sums[2];
        normal_sums(&pixels, block, &keys, sums);
        for (int64_t i = 0; i < 2; i++) {
          const int64_t k = block * 2 + i;
          if (k >= k0 && k < k0 + rows)
            store_normal(dst + (k - k0) * ld + p + lane, sums[i], level, grid->count - p - lane);
        }
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
  const philox_keys keys = philox_schedule(recipe->key);
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
      philox4x32_10(words, &keys);
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

#endif
