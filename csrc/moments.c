/*
 * moments.c - mean and variance of each response map over the batch, for normalisation in training.
 *
 * One pass over the input. A chunk's moments come from the kernel, about its own mean, so that nothing cancels; chunks
 * and parts are joined in double (Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983).
 */
#include <math.h>

#include "passes.h"

/* Response maps at a time: panels of 32 x 512 floats, or of 512 x 64 in channels-last form. Where channels are turned
 * for all of them, or read where they lie, as many as leave every thread some work: the more, the longer the pieces of
 * a pixel's channels. */
#define BLOCK 32
#define ROWS_BLOCK 64
#define WIDE_BLOCK 128
#define NEAR_ROWS 8 /* as many as stay in the first-level cache from their making to their sums */

typedef struct moments_scratch {
  char *panel, *mask, *channels;
} moments_scratch;

static moments_scratch scratch_take(const pnn_problem *p, const pnn_moments_plan *plan, pnn_arena *arena) {
  moments_scratch s = {NULL, NULL, NULL};
  s.panel = pnn_arena_take(arena, plan->near * PNN_CHUNK, p->real_size);
  s.mask = pnn_arena_take(arena, pnn_mask_rows(p, plan->block) * pnn_mask_ld(p, plan->chunks.pixels), p->real_size);
  if (p->masks > 1) s.channels = pnn_arena_take(arena, pnn_response_channels(p, plan->block) * PNN_CHUNK, p->real_size);
  return s;
}

pnn_moments_plan pnn_moments_prepare(const pnn_problem *problem, const pnn_host *host, pnn_arena *arena) {
  pnn_moments_plan plan = {.chunks = pnn_chunks_make(problem)};
  plan.rows = !problem->pairs && pnn_rows_fit(problem, NULL, NULL);
  const bool direct = (plan.rows ? problem->kernels->respond_moments_rows[problem->activation] != NULL
                                 : problem->kernels->respond_moments[problem->activation] != NULL);
  const bool turned = problem->input.column != 1 && problem->masks > 1 && problem->native == problem->real_size;
  const int64_t least = plan.rows ? ROWS_BLOCK : BLOCK, threads = host ? host->threads : 1;
  plan.block = direct && (plan.rows || turned) ? WIDE_BLOCK : least;
  while (plan.block > least && pnn_quotient_up(problem->maps, plan.block) * plan.chunks.parts < 2 * threads)
    plan.block /= 2;
  plan.block = PNN_MIN(problem->maps, plan.block);
  plan.blocks = plan.block ? pnn_quotient_up(problem->maps, plan.block) : 0;
  /* Channels that have to be turned, but are not for all of a block, are loaded for as many maps as are made. */
  plan.near = PNN_MIN(problem->input.column == 1 ? NEAR_ROWS : BLOCK, plan.block);
  plan.part_run = 1;
  while (plan.part_run * 2 <= plan.chunks.parts && plan.chunks.parts % (plan.part_run * 2) == 0 &&
         plan.blocks * plan.chunks.parts / (plan.part_run * 2) >= 8 * (int64_t)(host ? host->threads : 1))
    plan.part_run *= 2;
  const int64_t workers = pnn_workers(host, plan.blocks * (plan.chunks.parts / plan.part_run));
  plan.partial = pnn_arena_take(arena, plan.chunks.parts * problem->maps, 16);
  pnn_arena one = {.base = NULL};
  if (plan.rows)
    pnn_rows_moments_scratch(problem, &plan, &one);
  else
    scratch_take(problem, &plan, &one);
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
  const double n = a.n + b.n, delta = b.mean - a.mean, share = b.n / n, both = a.n * b.n / n;
  joined r = {.n = n, .mean = a.mean + delta * share, .m2 = a.m2 + b.m2 + delta * delta * both};
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

/* One chunk's moments of the maps [k0, k0 + rows). */
static void moments_chunk(const pnn_problem *p, const pnn_moments_plan *plan, pnn_arena scratch, int64_t k0,
                          int64_t rows, int64_t chunk, int64_t end, pnn_range *made, double *mean, double *m2) {
  const moments_scratch s = scratch_take(p, plan, &scratch);
  const pnn_response response = {.problem = p,
                                 .mask = s.mask,
                                 .mask_ld = pnn_mask_ld(p, plan->chunks.pixels),
                                 .mask_k0 = k0,
                                 .channels = s.channels};
  pnn_columns columns;
  pnn_range range;
  int64_t first;
  const int64_t count = pnn_chunk_locate(p, &plan->chunks, chunk, &range, &first);
  if (range.pixel != made->pixel) {
    *made = range;
    pnn_mask_panel(p, k0, rows, made, s.mask, pnn_mask_ld(p, plan->chunks.pixels));
  }
  pnn_columns_set(&columns, made, first, count);
  /* Where a chunk lies in one image, its rows are summed without being stored. */
  const bool whole = p->native == p->real_size && p->kernels->respond_moments[p->activation] && count >= 64 &&
                     count % PNN_LANES == 0 && columns.segments == 1;
  const bool turned = whole && pnn_response_turn(&response, &columns, k0, rows, PNN_CHUNK);
  pnn_source all;
  const bool direct = whole && pnn_response_source(&response, &columns, k0, 0, count, turned ? PNN_CHUNK : 0, &all);
  const int64_t most = turned ? rows : plan->near; /* so that the next chunk's channels are asked for once */
  for (int64_t r = 0; r < rows; r += most) {
    const int64_t near = PNN_MIN(most, rows - r);
    if (!direct) pnn_response_activated(&response, &columns, k0 + r, near, s.panel, PNN_CHUNK);
    const int64_t next = r + near < rows ? r + near : 0; /* the next rows, or the first ones of the next chunk */
    pnn_ahead ahead = {.streams = 0};
    if (next || chunk + 1 < end) {
      const int64_t then = next ? chunk : chunk + 1, channel = (k0 + next) / p->masks;
      const int64_t columns_then = pnn_chunk_locate(p, &plan->chunks, then, &range, &first);
      pnn_ahead_add(p, &ahead, &range, first, columns_then, &p->input, channel,
                    (k0 + PNN_MIN(next + most, rows) - 1) / p->masks - channel + 1, false);
    }
    pnn_ahead_spread(&ahead, near * (columns.padded / PNN_LANES) / 4);
    if (direct) {
      const pnn_source source = pnn_source_at(p, &all, r);
      p->kernels->respond_moments[p->activation](s.panel, &source, near, count, &mean[r], &m2[r], &ahead);
    } else {
      p->kernels->moments(s.panel, PNN_CHUNK, near, count, &mean[r], &m2[r], &ahead);
    }
  }
}

/* One part's moments of the maps [k0, k0 + rows). */
static void moments_part(const pnn_problem *p, const pnn_moments_plan *plan, pnn_arena own, int64_t part, int64_t k0,
                         int64_t rows, pnn_range *made) {
  joined sum[WIDE_BLOCK];
  for (int64_t r = 0; r < rows; r++) sum[r] = (joined){0, 0, 0};
  int64_t chunk, end;
  for (pnn_chunks_part(&plan->chunks, part, &chunk, &end); chunk < end; chunk++) {
    double mean[WIDE_BLOCK], m2[WIDE_BLOCK];
    (plan->rows ? pnn_rows_moments_chunk : moments_chunk)(p, plan, own, k0, rows, chunk, end, made, mean, m2);
    pnn_range range;
    int64_t first;
    const double n = (double)pnn_chunk_locate(p, &plan->chunks, chunk, &range, &first);
    for (int64_t r = 0; r < rows; r++) sum[r] = join(sum[r], (joined){.n = n, .mean = mean[r], .m2 = m2[r]});
  }
  for (int64_t r = 0; r < rows; r++) {
    double *out = plan->partial + (part * p->maps + k0 + r) * 2;
    out[0] = sum[r].mean;
    out[1] = sum[r].m2;
  }
}

static void moments_item(void *moments_, int32_t worker, int64_t item) {
  const moments *m = moments_;
  const pnn_moments_plan *plan = m->plan;
  const int64_t k0 = item % plan->blocks * plan->block, first = item / plan->blocks * plan->part_run;
  const pnn_arena own = {.base = plan->scratch + worker * plan->scratch_bytes};
  pnn_range made = {.pixel = -1};
  for (int64_t part = first; part < first + plan->part_run; part++)
    moments_part(m->problem, plan, own, part, k0, PNN_MIN(plan->block, m->problem->maps - k0), &made);
}

void pnn_moments_run(const pnn_problem *problem, const pnn_host *host, const pnn_moments_plan *plan, double *mean,
                     double *variance) {
  const pnn_chunks *chunks = &plan->chunks;
  if (chunks->count == 0) {
    for (int64_t k = 0; k < problem->maps; k++) mean[k] = 0, variance[k] = 1;
    return;
  }
  moments m = {problem, plan};
  pnn_parallel(host, plan->blocks * (chunks->parts / plan->part_run), moments_item, &m);
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
