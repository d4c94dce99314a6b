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

#endif
