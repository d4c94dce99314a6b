/*
 * weights.c - the weight matrix as the products read it, and normalisation's algebra per response map, in double.
 */
#include <math.h>
#include <string.h>

#include "internal.h"

const void *pnn_weights_read(const pnn_problem *problem, void *room) {
  const pnn_tensor *w = &problem->params->weight;
  const bool rows_join = problem->outputs < 2 || w->stride[0] == problem->group_maps;
  if (pnn_dtype_size(w->dtype) == problem->real_size && rows_join && (problem->group_maps < 2 || w->stride[1] == 1))
    return w->data;
  problem->kernels->load[w->dtype](room, problem->group_maps, w->data, problem->outputs, w->stride[0],
                                   problem->group_maps, problem->group_maps > 1 ? w->stride[1] : 1);
  return room;
}

void pnn_reals_store(const pnn_problem *problem, int64_t count, const double *src, void *dst) {
  for (int64_t i = 0; i < count; i++) {
    if (problem->precision)
      ((double *)dst)[i] = src[i];
    else
      ((float *)dst)[i] = (float)src[i];
  }
}

/* Rounds a double once to bfloat16 or float16: through float, made safe from double rounding by rounding to odd first
 * (Boldo, Melquiond, "When double rounding is odd", 2005). */
static float float_to_odd(double x) {
  float f = (float)x;
  if ((double)f == x || x != x || isinf(f)) return f;
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  if (!(bits & 1)) {
    /* Of the two floats around x, the odd one is the neighbour on x's side. */
    bits = ((double)f < x) == (f > 0 || (f == 0 && x > 0)) ? bits + 1 : bits - 1;
    if (f == 0) bits = x > 0 ? 1 : UINT32_C(0x80000001);
    memcpy(&f, &bits, sizeof f);
  }
  return f;
}

const pnn_host *pnn_weights_host(const pnn_problem *problem, const pnn_host *host) {
  return problem->outputs * problem->group_maps < 16384 ? NULL : host;
}

typedef struct scale_job {
  const pnn_problem *problem;
  const char *weights;
  const double *scale;
  char *scaled;
} scale_job;

#define SCALE_OUTPUTS 16

static void scale_item(void *job_, int32_t worker, int64_t item) {
  (void)worker;
  const scale_job *job = job_;
  const pnn_problem *problem = job->problem;
  const int64_t columns = problem->group_maps, end = PNN_MIN((item + 1) * SCALE_OUTPUTS, problem->outputs);
  const bool narrow = problem->rounded;
  for (int64_t t = item * SCALE_OUTPUTS; t < end; t++) {
    const double *s = job->scale + t / problem->group_outputs * columns;
    const char *from = job->weights + t * columns * problem->real_size;
    char *row = job->scaled + t * columns * problem->real_size;
    for (int64_t k = 0; k < columns; k++) {
      const double product = pnn_real_get(problem, from, k) * s[k];
      if (problem->precision)
        ((double *)(void *)row)[k] = product;
      else
        ((float *)(void *)row)[k] = narrow ? float_to_odd(product) : (float)product;
    }
    if (narrow) problem->kernels->round16(problem->product_type, row, columns, 1, columns);
  }
}

void pnn_weights_scale(const pnn_problem *problem, const pnn_host *host, const void *weights, const double *scale,
                       void *scaled) {
  scale_job job = {problem, weights, scale, scaled};
  pnn_parallel(pnn_weights_host(problem, host), (problem->outputs + SCALE_OUTPUTS - 1) / SCALE_OUTPUTS, scale_item,
               &job);
}

pnn_packing pnn_packing_forward(const pnn_problem *problem, int64_t tile) {
  const int64_t rows = problem->group_outputs;
  return (pnn_packing){.rows = rows,
                       .depth = problem->group_maps,
                       .block = PNN_MAX(rows, 1),
                       .tile = tile,
                       .block_tiles = pnn_quotient_up(PNN_MAX(rows, 1), tile),
                       .blocks = rows > 0,
                       .pairs = problem->pairs};
}

pnn_packing pnn_packing_backward(const pnn_problem *problem, int64_t tile, int64_t block) {
  const int64_t rows = problem->group_maps, step = PNN_MAX(block, 1);
  return (pnn_packing){.rows = rows,
                       .depth = problem->group_outputs,
                       .block = step,
                       .tile = tile,
                       .block_tiles = pnn_quotient_up(step, tile),
                       .blocks = pnn_quotient_up(rows, step),
                       .transposed = true,
                       .pairs = problem->pairs};
}

/* Bytes of one tile's column of rows: an element each, at every depth. */
static int64_t packing_step(const pnn_problem *problem, const pnn_packing *p) {
  return p->tile * (p->pairs ? 2 : problem->real_size);
}

static int64_t packing_depth(const pnn_packing *p) { return p->pairs ? (p->depth + 1) / 2 * 2 : p->depth; }

int64_t pnn_packing_bytes(const pnn_problem *problem, const pnn_packing *p) {
  int64_t columns, bytes;
  if (__builtin_mul_overflow(problem->groups * p->blocks, p->block_tiles * packing_step(problem, p), &columns) ||
      __builtin_mul_overflow(columns, packing_depth(p), &bytes))
    return INT64_MAX; /* the arena reports it */
  return bytes;
}

const void *pnn_packing_tile(const pnn_problem *problem, const pnn_packing *p, const void *packed, int64_t group,
                             int64_t block, int64_t tile, int64_t k) {
  const int64_t index = (group * p->blocks + block) * p->block_tiles + tile;
  return (const char *)packed + (index * packing_depth(p) + k) * packing_step(problem, p);
}

typedef struct packing_job {
  const pnn_problem *problem;
  const pnn_packing *packing;
  const char *weights;
  void *packed;
} packing_job;

/* One tile: [depth][tile], or pairs of depths. */
static void packing_item(void *job_, int32_t worker, int64_t item) {
  (void)worker;
  const packing_job *job = job_;
  const pnn_problem *problem = job->problem;
  const pnn_packing *p = job->packing;
  const int64_t size = problem->real_size, columns = problem->group_maps, depth = packing_depth(p);
  const int64_t tile = item % p->block_tiles, block = item / p->block_tiles % p->blocks;
  const int64_t group = item / p->block_tiles / p->blocks;
  char *dst = (char *)(uintptr_t)pnn_packing_tile(problem, p, job->packed, group, block, tile, 0);
  const int64_t first = block * p->block + tile * p->tile;
  const int64_t rows = PNN_MIN(PNN_MIN(first + p->tile, (block + 1) * p->block), p->rows) - first;
  if (rows < p->tile || depth != p->depth) memset(dst, 0, (size_t)(depth * packing_step(problem, p)));
  if (rows <= 0) return;
  const int64_t t = group * problem->group_outputs;
  if (!p->pairs) {
    const pnn_dtype real = problem->precision ? PNN_FLOAT64 : PNN_FLOAT32;
    if (p->transposed)
      problem->kernels->load[real](dst, p->tile, job->weights + (t * columns + first) * size, p->depth, columns, rows,
                                   1);
    else
      problem->kernels->store[real](dst, 1, p->tile, job->weights + (t + first) * columns * size, columns, rows,
                                    p->depth);
    return;
  }
  /* The values are bfloat16 already: their upper halves say it all. */
  const uint32_t *const from = (const uint32_t *)(const void *)job->weights;
  uint32_t *pairs = (uint32_t *)(void *)dst;
  for (int64_t k = 0; k < p->depth; k += 2, pairs += p->tile) {
    const bool two = k + 1 < p->depth;
    const uint32_t *low = from + (p->transposed ? (t + k) * columns + first : (t + first) * columns + k);
    const uint32_t *high = two ? low + (p->transposed ? columns : 1) : NULL;
    const int64_t step = p->transposed ? 1 : columns;
    for (int64_t i = 0; i < rows; i++)
      pairs[i] = low[i * step] >> 16 | (two ? high[i * step] & UINT32_C(0xffff0000) : 0);
  }
}

void pnn_packing_fill(const pnn_problem *problem, const pnn_host *host, const pnn_packing *packing, const void *weights,
                      void *packed) {
  packing_job job = {problem, packing, weights, packed};
  const int64_t items = problem->groups * packing->blocks * packing->block_tiles;
  pnn_parallel(pnn_weights_host(problem, host), items, packing_item, &job);
}

void pnn_vector_load(const pnn_tensor *tensor, int64_t count, double absent, double *dst) {
  if (!tensor->data) {
    for (int64_t i = 0; i < count; i++) dst[i] = absent;
    return;
  }
  /* The double kernels read float32 and float64; 16-bit vectors go through the float ones. */
  const bool narrow = tensor->dtype == PNN_BFLOAT16 || tensor->dtype == PNN_FLOAT16;
  const int64_t step = count > 1 ? tensor->stride[0] : 1;
  if (!narrow) {
    pnn_kernels_get(1)->load[tensor->dtype](dst, count, tensor->data, 1, 0, count, step);
    return;
  }
  for (int64_t i = 0; i < count; i++) {
    float value;
    pnn_kernels_get(0)->load[tensor->dtype](&value, 1, (const char *)tensor->data + i * step * 2, 1, 0, 1, 1);
    dst[i] = (double)value;
  }
}

void pnn_vector_store(const pnn_tensor *tensor, int64_t count, const double *src) {
  if (!tensor->data) return;
  const bool narrow = tensor->dtype == PNN_BFLOAT16 || tensor->dtype == PNN_FLOAT16;
  const int64_t step = count > 1 ? tensor->stride[0] : 1;
  if (!narrow) {
    pnn_kernels_get(1)->store[tensor->dtype](tensor->data, 0, step, src, count, 1, count);
    return;
  }
  for (int64_t i = 0; i < count; i++) {
    const float value = float_to_odd(src[i]);
    pnn_kernels_get(0)->store[tensor->dtype]((char *)tensor->data + i * step * 2, 0, 1, &value, 1, 1, 1);
  }
}

void pnn_norm_plan(const pnn_problem *problem, pnn_arena *arena, pnn_norm *norm) {
  double **vectors[] = {&norm->mean, &norm->variance, &norm->gamma, &norm->beta, &norm->scale, &norm->inverse};
  for (size_t i = 0; i < sizeof vectors / sizeof vectors[0]; i++) *vectors[i] = pnn_arena_take(arena, problem->maps, 8);
  norm->mean_reals = pnn_arena_take(arena, problem->maps, problem->real_size);
}

void pnn_norm_fill(const pnn_problem *problem, pnn_norm *norm) {
  pnn_vector_load(&problem->params->norm_weight, problem->maps, 1, norm->gamma);
  pnn_vector_load(&problem->params->norm_bias, problem->maps, 0, norm->beta);
  for (int64_t k = 0; k < problem->maps; k++) {
    norm->inverse[k] = 1 / sqrt(norm->variance[k] + problem->eps);
    norm->scale[k] = norm->gamma[k] * norm->inverse[k];
  }
  pnn_reals_store(problem, problem->maps, norm->mean, norm->mean_reals);
}
