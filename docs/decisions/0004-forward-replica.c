/*
 * 0004-forward-replica.c - the contiguous forward pass of (32,64,56,64,1) in one loop, to leave parts of it out.
 *
 * The loads, products, stores and requests ahead are the library's (AVX-512, 6 x 4 tiles, panels of 256 pixels); each
 * of the streams below can be taken away. What it printed, and what follows: 0004-cpu-speed.md, "After the eighth
 * round". One thread:
 *
 *     gcc -O3 -march=skylake-avx512 -mprefer-vector-width=512 -Wa,-mbranches-within-32B-boundaries \
 *         -DAHEAD=2 -DSTORES=1 -DMASKS=1 -DHUGE_PAGES=0 docs/decisions/0004-forward-replica.c && ./a.out
 *
 * It prints nanoseconds for each cache line of x (and one of y): 16 pixels of a channel, 1,024 multiply-adds.
 */
#define _DEFAULT_SOURCE
#include <immintrin.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#ifndef AHEAD
#define AHEAD 2 /* asked for ahead: 0 nothing, 1 x, 2 x and y */
#endif
#ifndef STORES
#define STORES 1 /* 1: y where it belongs; 0: over each other, in the first-level cache */
#endif
#ifndef MASKS
#define MASKS 1 /* 1: masks of 512 pixels (128 KiB), in turn; 0: of 64 pixels, always the same */
#endif
#ifndef HUGE_PAGES
#define HUGE_PAGES 0
#endif

enum { IMAGES = 32, CHANNELS = 64, PIXELS = 3136, RANGE = 512, WIDE = 256, ROWS = 6, VECTORS = 4, TILE = 64 };
enum { TILES = (CHANNELS + ROWS - 1) / ROWS, STEP = 8, LINES = WIDE / 16, MASK_LD = RANGE + 16 };

/* Lines of x and of y in turn. */
typedef struct requests {
  const float *x, *y;
  unsigned next, count, pace;
} requests;

static inline __attribute__((always_inline)) void ask(requests *r) {
  for (unsigned i = 0; i < r->pace && r->next < r->count; i++, r->next++) {
    const unsigned line = AHEAD == 2 ? r->next / 2 : r->next;
    const float *from = AHEAD == 2 && r->next % 2 ? r->y : r->x;
    __builtin_prefetch(from + line / LINES * PIXELS + line % LINES * 16, 0, 2);
  }
}

static inline __attribute__((always_inline)) void tile(int first, const float *a, float *panel, float *c, long ldc,
                                                       const float *x, const float *mask, requests *r) {
  __m512 sum[ROWS][VECTORS];
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) sum[i][v] = _mm512_set1_ps(0.5f);
  for (int begin = 0; begin < CHANNELS; begin += STEP, ask(r))
    for (int k = begin; k < begin + STEP; k++) {
      __m512 b[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) {
        if (!first) {
          b[v] = _mm512_loadu_ps(panel + k * TILE + v * 16);
          continue;
        }
        const __m512 n = _mm512_loadu_ps(mask + (MASKS ? k * MASK_LD : 0) + v * 16);
        b[v] = _mm512_max_ps(_mm512_add_ps(_mm512_loadu_ps(x + (long)k * PIXELS + v * 16), n), _mm512_setzero_ps());
        _mm512_storeu_ps(panel + k * TILE + v * 16, b[v]);
      }
#pragma GCC unroll 6
      for (int i = 0; i < ROWS; i++) {
        const __m512 weight = _mm512_set1_ps(a[k * ROWS + i]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sum[i][v] = _mm512_fmadd_ps(weight, b[v], sum[i][v]);
      }
    }
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) _mm512_storeu_ps(c + i * ldc + v * 16, sum[i][v]);
}

static __attribute__((noinline)) void first_tile(const float *a, float *panel, float *c, long ldc, const float *x,
                                                 const float *mask, requests *r) {
  tile(1, a, panel, c, ldc, x, mask, r);
}

static __attribute__((noinline)) void next_tile(const float *a, float *panel, float *c, long ldc, requests *r) {
  tile(0, a, panel, c, ldc, NULL, NULL, r);
}

static float *zeros(size_t count) {
  const size_t page = 2 << 20, bytes = (count * sizeof(float) + page - 1) / page * page;
  float *p = aligned_alloc(page, bytes);
  if (!p) exit(1);
  madvise(p, bytes, HUGE_PAGES ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  memset(p, 0, bytes);
  return p;
}

int main(void) {
  float *x = zeros((IMAGES + 1L) * CHANNELS * PIXELS), *y = zeros((IMAGES + 1L) * CHANNELS * PIXELS);
  float *masks = zeros(CHANNELS * MASK_LD), *panel = zeros(CHANNELS * TILE), *a = zeros(TILES * ROWS * CHANNELS);
  float *near = zeros(ROWS * TILE);
  double best = 1e9;
  for (int repetition = 0; repetition < 10; repetition++) {
    struct timespec t0, t1;
    clock_gettime(CLOCK_MONOTONIC, &t0);
    for (long range = 0; range + RANGE <= PIXELS; range += RANGE)
      for (long image = 0; image < IMAGES; image++)
        for (long j = 0; j < RANGE; j += WIDE) {
          const long at = image * CHANNELS * PIXELS + range + j;
          const long next = j + WIDE < RANGE ? at + WIDE : at - j + (long)CHANNELS * PIXELS;
          requests r = {x + next, y + next, 0, AHEAD * CHANNELS * LINES, 0};
          r.pace = (r.count + WIDE / TILE * TILES * (CHANNELS / STEP) - 1) / (WIDE / TILE * TILES * (CHANNELS / STEP));
          for (long column = 0; column < WIDE; column += TILE)
            for (long i = 0; i < TILES; i++) {
              const long row = i * ROWS < CHANNELS - ROWS ? i * ROWS : CHANNELS - ROWS;
              float *c = STORES ? y + at + column + row * PIXELS : near;
              const long ldc = STORES ? PIXELS : TILE;
              if (i == 0)
                first_tile(a, panel, c, ldc, x + at + column, MASKS ? masks + j + column : masks, &r);
              else
                next_tile(a + i * ROWS * CHANNELS, panel, c, ldc, &r);
            }
        }
    clock_gettime(CLOCK_MONOTONIC, &t1);
    const double seconds = (double)(t1.tv_sec - t0.tv_sec) + 1e-9 * (double)(t1.tv_nsec - t0.tv_nsec);
    if (seconds < best) best = seconds;
  }
  printf("ahead %d, stores %d, masks %d, huge pages %d: %.1f ns a line\n", AHEAD, STORES, MASKS, HUGE_PAGES,
         1e9 * best / ((double)IMAGES * CHANNELS * (PIXELS / RANGE * RANGE) / 16));
  return 0;
}
