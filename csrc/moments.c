/*
 * moments.c - mean and variance of each response map over the batch, for normalisation in training.
 *
 * One pass over the input. A chunk's moments come from the kernel, about its own mean, so that nothing cancels; chunks
 * and parts are joined in double (Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983).
 */
#include <math.h>

#include "internal.h"

#define BLOCK 32 /* response maps at a time: a panel of 32 x 512 floats */

pnn_moments_plan pnn_moments_prepare(const pnn_problem *problem, const pnn_host *host, pnn_arena *arena) {
  pnn_moments_plan plan = {.chunks = pnn_chunks_make(problem)};
  plan.block = PNN_MIN(problem->maps, BLOCK);
  plan.blocks = plan.block ? (problem->maps + plan.block - 1) / plan.block : 0;
  const int64_t workers = pnn_workers(host, plan.blocks * plan.chunks.parts);
  plan.partial = pnn_arena_take(arena, plan.chunks.parts * problem->maps, 16);
  pnn_arena one = {.base = NULL};
  pnn_arena_take(&one, plan.block * PNN_CHUNK, problem->real_size);
  pnn_arena_take(&one, pnn_mask_rows(problem, plan.block) * plan.chunks.pixels, problem->real_size);
  if (problem->masks > 1)
    pnn_arena_take(&one, pnn_response_channels(problem, plan.block) * PNN_CHUNK, problem->real_size);
  plan.scratch_bytes = (int64_t)one.used;
  plan.scratch = pnn_arena_take(arena, workers, plan.scratch_bytes);
  arena->overflow |= one.overflow;
  return plan;
}

typedef struct moments {
  const pnn_problem *problem;
  const pnn_moments_plan *plan;
} moments;

typedef struct joined {
  double n, mean, m2;
} joined;

static joined join(joined a, joined b) {
  if (a.n == 0) return b;
  if (b.n == 0) return a;
  const double n = a.n + b.n, delta = b.mean - a.mean;
  joined r = {.n = n, .mean = a.mean + delta * (b.n / n), .m2 = a.m2 + b.m2 + delta * delta * (a.n * b.n / n)};
  if (!isfinite(delta)) r.mean = (a.mean * a.n + b.mean * b.n) / n; /* infinity minus infinity is none of the mean's */
  return r;
}

static int64_t part_columns(const pnn_problem *problem, const pnn_chunks *chunks, int64_t part) {
  int64_t first, end, columns = 0;
  pnn_chunks_part(chunks, part, &first, &end);
  for (int64_t chunk = first; chunk < end; chunk++) {
    pnn_range range;
    int64_t column;
    columns += pnn_chunk_locate(problem, chunks, chunk, &range, &column);
  }
  return columns;
}

static void moments_item(void *moments_, int32_t worker, int64_t item) {
  const moments *m = moments_;
  const pnn_problem *p = m->problem;
  const pnn_moments_plan *plan = m->plan;
  const int64_t part = item / plan->blocks, k0 = item % plan->blocks * plan->block;
  const int64_t rows = PNN_MIN(plan->block, p->maps - k0);
  pnn_arena own = {.base = plan->scratch + worker * plan->scratch_bytes};
  char *panel = pnn_arena_take(&own, plan->block * PNN_CHUNK, p->real_size);
  pnn_response response = {.problem = p, .mask_k0 = k0, .mask_ld = plan->chunks.pixels};
  void *mask = pnn_arena_take(&own, pnn_mask_rows(p, plan->block) * plan->chunks.pixels, p->real_size);
  response.mask = mask;
  if (p->masks > 1)
    response.channels = pnn_arena_take(&own, pnn_response_channels(p, plan->block) * PNN_CHUNK, p->real_size);
  joined sum[BLOCK] = {{0, 0, 0}};
  pnn_columns columns;
  pnn_range range, made = {.pixel = -1};
  int64_t chunk, end;
  for (pnn_chunks_part(&plan->chunks, part, &chunk, &end); chunk < end; chunk++) {
    int64_t first;
    const int64_t count = pnn_chunk_locate(p, &plan->chunks, chunk, &range, &first);
    if (range.pixel != made.pixel) {
      made = range;
      pnn_mask_panel(p, k0, rows, &made, mask, plan->chunks.pixels);
    }
    pnn_columns_set(&columns, &made, first, count);
    pnn_response_activated(&response, &columns, k0, rows, panel, PNN_CHUNK);
    for (int64_t r = 0; r < rows; r++) {
      joined c = {.n = (double)count};
      p->kernels->moments(panel + r * PNN_CHUNK * p->real_size, count, &c.mean, &c.m2);
      sum[r] = join(sum[r], c);
    }
  }
  for (int64_t r = 0; r < rows; r++) {
    double *out = plan->partial + (part * p->maps + k0 + r) * 2;
    out[0] = sum[r].mean;
    out[1] = sum[r].m2;
  }
}

void pnn_moments_run(const pnn_problem *problem, const pnn_host *host, const pnn_moments_plan *plan, double *mean,
                     double *variance) {
  const pnn_chunks *chunks = &plan->chunks;
  if (chunks->count == 0) {
    for (int64_t k = 0; k < problem->maps; k++) mean[k] = 0, variance[k] = 1;
    return;
  }
  moments m = {problem, plan};
  pnn_parallel(host, plan->blocks * chunks->parts, moments_item, &m);
  double n[PNN_PARTS] = {0};
  for (int64_t part = 0; part < chunks->parts; part++) n[part] = (double)part_columns(problem, chunks, part);
  for (int64_t k = 0; k < problem->maps; k++) {
    joined part[PNN_PARTS] = {{0, 0, 0}};
    for (int64_t i = 0; i < chunks->parts; i++) {
      const double *from = plan->partial + (i * problem->maps + k) * 2;
      part[i] = (joined){.n = n[i], .mean = from[0], .m2 = from[1]};
    }
    const joined all = join(join(part[0], part[1]), join(part[2], part[3]));
    mean[k] = all.mean;
    variance[k] = all.m2 / all.n;
  }
}
