/*
 * forward.c - y = bias + V * activation(x + level * N), a matrix product with a fused prologue.
 *
 * Per piece of columns: make the masks of its pixels once; then, 64 to 256 columns at a time, fill a panel of response
 * maps [up to 256 maps][columns] in cache and multiply every tile of packed weights with it; sums wait in
 * [T/G][columns] between two blocks of maps, so that each output stays one chain in ascending k, started at the bias.
 * With more than 256 maps and outputs that whole tiles fit, the blocks of maps are the outer loop and the sums wait in
 * the output itself. With few maps the panel is made first, up to 512 columns wide, and each tile of outputs goes along
 * all of it, straight to the output.
 */
#include <string.h>

#include "passes.h"

#define MAPS 256              /* response maps in a panel */
#define FEW_MAPS 24           /* response maps beside whose products the stores and the calls weigh */
#define FEW_BYTES (16 * 1024) /* of such a panel, in the first-level cache: the fewer maps, the longer the runs */
#define SUM_ROWS 512          /* outputs whose sums wait at a time, where they wait for no further maps */

typedef struct worker_scratch {
  char *panel, *pairs, *sums, *mask, *channels;
} worker_scratch;

static worker_scratch scratch_take(const pnn_forward_state *f, pnn_arena *arena) {
  const pnn_problem *p = f->problem;
  worker_scratch s;
  /* A run may begin anywhere in the panel, and its last tile ends behind it. */
  s.panel = pnn_arena_take(arena, f->block * f->ld + (f->few ? p->tile_columns : 0), p->real_size);
  s.pairs = p->pairs ? pnn_arena_take(arena, (f->block + 1) / 2 * f->ld, 4) : NULL;
  s.sums = f->few ? NULL : pnn_arena_take(arena, f->tiles * f->packing.tile * f->ld, p->real_size);
  s.mask = pnn_arena_take(arena, pnn_mask_rows(p, f->slab) * pnn_mask_ld(p, f->deal.pixels), p->real_size);
  s.channels = p->masks == 1 ? NULL : pnn_arena_take(arena, pnn_response_channels(p, f->block) * f->ld, p->real_size);
  return s;
}

/* Columns [j, j + count) of the panel, outputs [row, end) of the group: what the tiles left in `sums`, whose first row
 * is output `first`. */
static void output_rest(const pnn_forward_state *f, const pnn_range *range, int64_t column, int64_t j, int64_t count,
                        int64_t group, int64_t first, int64_t row, int64_t end, const char *sums) {
  const pnn_problem *p = f->problem;
  if (row >= end) return;
  pnn_columns part;
  pnn_columns_set(&part, range, column + j, count);
  pnn_columns_store(p, &part, &p->output, group * p->group_outputs + row, end - row,
                    sums + ((row - first) * f->ld + j) * p->real_size, f->ld);
}

/* Makes the response maps [k0, k0 + depth) of the panel, which begins at `column` of the range, but for the tiles whose
 * source it fills in: their first product makes them. */
static void prologue(const pnn_forward_state *f, const pnn_response *response, const pnn_columns *columns,
                     int64_t column, int64_t k0, int64_t depth, const worker_scratch *s, pnn_source *source) {
  const pnn_problem *p = f->problem;
  const pnn_kernels *kernels = p->kernels;
  const int64_t tile = p->tile_columns;
  const bool fused = p->group_outputs && (p->pairs     ? kernels->respond_product_pairs[p->activation] != NULL
                                          : p->rounded ? false
                                                       : kernels->respond_product[p->activation] != NULL);
  const int64_t turned_ld = fused && pnn_response_turn(response, columns, k0, depth, f->ld) ? f->ld : 0;
  for (int64_t j = 0, next; j < columns->columns; j = next) {
    next = j;
    while (next < columns->columns) { /* up to a tile that makes its own */
      if (fused && pnn_response_source(response, columns, k0, next, tile, turned_ld, &source[pnn_quotient(next, tile)]))
        break;
      source[pnn_quotient(next, tile)].x = NULL;
      next += tile;
    }
    if (next > j) {
      pnn_columns part;
      pnn_columns_part(&part, columns, column, j, PNN_MIN(next, columns->columns));
      pnn_response of_part = *response; /* whose channels go where they were turned to */
      if (turned_ld) of_part.channels = (char *)response->channels + j * p->native;
      if (p->pairs)
        pnn_response_map_pairs(&of_part, &part, k0, depth, s->pairs + j * 4, s->panel + j * p->real_size, f->ld);
      else
        pnn_response_operand(&of_part, &part, k0, depth, s->panel + j * p->real_size, f->ld);
    }
    next += tile;
  }
}

/* A panel of columns on its way through the maps. */
typedef struct panel_walk {
  const pnn_columns *columns;
  const pnn_range *range;
  int64_t column, group;             /* the panel's first column of the range */
  char *place[PNN_WIDEST / 4];       /* of each tile's columns, or NULL; no tile has fewer than four */
  pnn_source source[PNN_WIDEST / 4]; /* of a tile's response maps, where its first product makes them */
} panel_walk;

/* The products of the response maps [k, k + depth) with the tiles of outputs [first, end), into the output where their
 * columns have a place there, else to sums, which go out behind the last map. */
static void panel_products(const pnn_forward_state *f, const worker_scratch *s, const panel_walk *w, int64_t k,
                           int64_t depth, int64_t first, int64_t end, pnn_ahead *ahead) {
  const pnn_problem *p = f->problem;
  const pnn_kernels *kernels = p->kernels;
  const int64_t size = p->real_size, columns = w->columns->columns, rows = p->tile_rows, wide = p->tile_columns;
  /* The kernels on pairs write whole tiles. */
  const int64_t in_place = p->pairs ? pnn_quotient(p->group_outputs, rows) * rows : p->group_outputs;
  const bool last = k + depth == p->group_maps, all = first == 0 && end == f->packing.block_tiles;
  for (int64_t j = 0, n = 0; j < columns; j += wide, n++) {
    char *const at = w->place[n];
    const pnn_source *from = &w->source[n];
    /* Response maps that nothing reads again take the place of those of the tile before, in the first-level cache. */
    char *const panel = s->panel + (all && from->x ? 0 : j * size);
    for (int64_t tile = first; tile < end; tile++) {
      const void *a = pnn_packing_tile(p, &f->packing, f->packed, w->group, 0, tile, k);
      const int64_t row = tile * rows;
      const char *start = k ? NULL : (const char *)f->bias + (w->group * f->sum_rows + row) * size;
      char *const to = at && row < in_place ? at + row * p->output.channel * p->native : NULL;
      char *const sums = s->sums + ((row - first * rows) * f->ld + j) * size;
      if (p->pairs) { /* sums become bfloat16 behind the last map */
        char *const out = last ? to : NULL;
        if (tile == 0 && from->x)
          kernels->respond_product_pairs[p->activation](depth, a, s->pairs + j * 4, f->ld, sums, f->ld, start, out,
                                                        p->output.channel, from, ahead);
        else
          kernels->product_pairs((depth + 1) / 2, a, s->pairs + j * 4, f->ld, sums, f->ld, start, out,
                                 p->output.channel, ahead);
        continue;
      }
      const int64_t count = PNN_MIN(rows, p->group_outputs - row);
      char *const c = to ? to : sums;
      const int64_t ldc = to ? p->output.channel : f->ld;
      if (tile == 0 && from->x)
        kernels->respond_product[p->activation](depth, count, a, panel, f->ld, c, ldc, start, from, ahead);
      else
        kernels->product(depth, count, a, panel, f->ld, c, ldc, start, ahead);
    }
  }
  if (!last) return;
  /* Neighbouring tiles that wait in `sums` go out together. */
  for (int64_t j = 0, rest; j < columns; j = rest) {
    const bool here = w->place[pnn_quotient(j, wide)];
    for (rest = j + wide; rest < columns; rest += wide)
      if ((w->place[pnn_quotient(rest, wide)] != NULL) != here) break;
    rest = PNN_MIN(rest, columns);
    output_rest(f, w->range, w->column, j, rest - j, w->group, first * rows,
                here ? PNN_MAX(in_place, first * rows) : first * rows, PNN_MIN(end * rows, p->group_outputs), s->sums);
  }
}

/* A panel of few maps: products with the whole run of its columns in an image, written where they belong. */
static void panel_runs(const pnn_forward_state *f, const worker_scratch *s, const pnn_response *response,
                       const pnn_columns *columns, int64_t group, pnn_ahead *ahead) {
  const pnn_problem *p = f->problem;
  const pnn_kernels *kernels = p->kernels;
  const pnn_view *y = &p->output;
  const int64_t size = p->real_size, rows = p->tile_rows;
  pnn_response_operand(response, columns, group * p->group_maps, p->group_maps, s->panel, f->ld);
  for (int64_t tile = 0; tile < f->packing.block_tiles; tile++) {
    const void *a = pnn_packing_tile(p, &f->packing, f->packed, group, 0, tile, 0);
    const char *start = (const char *)f->bias + (group * f->sum_rows + tile * rows) * size;
    const int64_t row = tile * rows, channel = group * p->group_outputs + row;
    for (int64_t i = 0; i < columns->segments; i++) {
      const pnn_segment *g = &columns->segment[i];
      char *c = y->data + (g->image * y->batch + channel * y->channel + g->pixel) * size;
      kernels->product_run(p->group_maps, PNN_MIN(rows, p->group_outputs - row), g->columns, a,
                           s->panel + g->column * size, f->ld, c, y->channel, start, ahead);
    }
  }
}

/* One panel of the piece [begin, end), from `column` of the range on, and the response maps [first, last) of the group.
 */
static void forward_panel(const pnn_forward_state *f, const worker_scratch *s, const pnn_response *response,
                          int64_t group, const pnn_range *range, int64_t begin, int64_t column, int64_t end,
                          int64_t first, int64_t last) {
  const pnn_problem *p = f->problem;
  const int64_t k_group = group * p->group_maps, channel = pnn_quotient(k_group + first, p->masks);
  pnn_columns columns;
  pnn_columns_set(&columns, range, column, PNN_MIN(f->width, end - column));
  const int64_t next = column + f->width, count = PNN_MIN(f->width, end - next);
  pnn_ahead ahead = {.streams = 0};
  if (first < last)
    pnn_ahead_add(p, &ahead, range, next, count, &p->input, channel,
                  pnn_quotient(k_group + last - 1, p->masks) - channel + 1, false);
  if (f->few) {
    pnn_ahead_spread(&ahead, f->packing.block_tiles * pnn_quotient(columns.padded, p->tile_columns));
    panel_runs(f, s, response, &columns, group, &ahead);
    return;
  }
  panel_walk w;
  w.columns = &columns, w.range = range, w.column = column, w.group = group;
  for (int64_t j = 0, n = 0; j < columns.columns; j += p->tile_columns, n++)
    w.place[n] = pnn_columns_place(p, &columns, &p->output, group * p->group_outputs, j, p->tile_columns);
  pnn_ahead_add(p, &ahead, range, next, count, &p->output, group * p->group_outputs, p->group_outputs, true);
  pnn_mask_ahead(p, &ahead, k_group + last, PNN_MIN(f->slab, p->group_maps - last), range,
                 pnn_quotient(column - begin, f->width), pnn_quotient_up(end - begin, f->width));
  pnn_ahead_spread(&ahead, f->packing.block_tiles * pnn_quotient(columns.padded, p->tile_columns) *
                               ((last - first) / (p->pairs ? 2 : 1) / PNN_AHEAD_DEPTH + 1));
  for (int64_t k = first; k < last || k == 0; k += PNN_MAX(f->block, 1)) {
    const int64_t depth = PNN_MIN(f->block, last - k);
    prologue(f, response, &columns, column, k_group + k, depth, s, w.source);
    for (int64_t tile = 0; tile < f->packing.block_tiles; tile += f->tiles)
      panel_products(f, s, &w, k, depth, tile, PNN_MIN(tile + f->tiles, f->packing.block_tiles), &ahead);
  }
}

static void forward_item(void *forward_, int32_t worker, int64_t item) {
  const pnn_forward_state *f = forward_;
  const pnn_problem *p = f->problem;
  const int64_t pieces = f->deal.ranges * f->deal.cuts, group = pnn_quotient(item, pieces);
  pnn_range range;
  int64_t begin, end;
  pnn_deal_piece(p, &f->deal, pnn_remainder(item, pieces), &range, &begin, &end);
  if (begin == end) return;
  pnn_arena own = {.base = f->scratch + worker * f->scratch_bytes};
  const worker_scratch s = scratch_take(f, &own);
  for (int64_t k = 0; k < p->group_maps || k == 0; k += PNN_MAX(f->slab, 1)) {
    const int64_t last = PNN_MIN(k + f->slab, p->group_maps), k0 = group * p->group_maps + k;
    const pnn_response response = {.problem = p,
                                   .mask = s.mask,
                                   .mask_ld = pnn_mask_ld(p, f->deal.pixels),
                                   .mask_k0 = k0,
                                   .mean = f->mean,
                                   .channels = s.channels};
    pnn_mask_panel(p, k0, last - k, &range, s.mask, response.mask_ld);
    for (int64_t column = begin; column < end; column += f->width)
      forward_panel(f, &s, &response, group, &range, begin, column, end, k, last);
  }
}

/* Whether products with few maps gain by whole runs of pixels in the contiguous form: where there are more outputs than
 * maps, so that making the maps beforehand costs little, and images that fill a tile. */
static bool runs_pay(const pnn_problem *p) {
  return pnn_columns_native(p, &p->output) && p->group_outputs >= 2 * p->group_maps && p->pixels >= p->tile_columns;
}

/* Columns of a panel of few maps. */
static int64_t run_columns(const pnn_problem *p) {
  const int64_t columns = FEW_BYTES / p->real_size / PNN_MAX(p->group_maps, 1);
  return PNN_MIN(columns / PNN_PANEL * PNN_PANEL, PNN_CHUNK);
}

/* Whether every tile of every output is written where it belongs: then sums can wait there for as long as one likes. */
static bool outputs_wait(const pnn_problem *p) {
  const pnn_view *v = &p->output;
  const bool joined = p->out_height == 1 || v->row == p->out_width * v->column;
  return !p->pairs && v->element == p->real_size && v->column == 1 && joined && p->pixels % p->tile_columns == 0;
}

typedef struct start_job {
  const pnn_problem *problem;
  const void *weights;
  const double *beta;
  double *start;
} start_job;

#define START_OUTPUTS 16

static void start_item(void *job_, int32_t worker, int64_t item) {
  (void)worker;
  const start_job *job = job_;
  const pnn_problem *p = job->problem;
  const int64_t end = PNN_MIN((item + 1) * START_OUTPUTS, p->outputs);
  for (int64_t t = item * START_OUTPUTS, count; t < end; t += count) {
    count = PNN_MIN(end - t, p->group_outputs - t % p->group_outputs); /* of one group */
    const double *b = job->beta + t / p->group_outputs * p->group_maps;
    double sum[START_OUTPUTS]; /* side by side: one sum waits for each of its additions */
    memcpy(sum, job->start + t, (size_t)count * sizeof *sum);
    for (int64_t k = 0; k < p->group_maps; k++)
      for (int64_t i = 0; i < count; i++) sum[i] += pnn_real_get(p, job->weights, (t + i) * p->group_maps + k) * b[k];
    memcpy(job->start + t, sum, (size_t)count * sizeof *sum);
  }
}

/* bias + V * beta in double, rounded once; V as given. beta may be NULL. */
static void start_values(const pnn_problem *problem, const pnn_host *host, const void *weights, const double *beta,
                         double *start) {
  pnn_vector_load(&problem->params->bias, problem->outputs, 0, start);
  if (!beta) return;
  start_job job = {problem, weights, beta, start};
  pnn_parallel(pnn_weights_host(problem, host), (problem->outputs + START_OUTPUTS - 1) / START_OUTPUTS, start_item,
               &job);
}

void pnn_forward_pass(const pnn_problem *problem, const pnn_host *host, pnn_arena *arena, bool run) {
  const pnn_problem *p = problem;
  const bool rows = pnn_rows_fit(p, &p->output, NULL);
  /* Sums can wait in an output of reals only. */
  pnn_forward_state f = {.problem = p, .block = rows && p->pairs ? p->group_maps : PNN_MIN(p->group_maps, MAPS)};
  f.width = pnn_panel_columns(p, f.block, PNN_MAX(p->group_outputs, p->group_maps));
  f.few = !p->pairs && p->group_maps <= FEW_MAPS && (rows || runs_pay(p));
  if (f.few && !rows) f.width = PNN_MAX(f.width, run_columns(p));
  int64_t unit = PNN_PANEL;
  if (rows && !f.few) {
    unit = pnn_rows_tile(p, p->group_outputs);
    f.width = pnn_rows_width(p, f.width, p->group_outputs);
  }
  f.ld = pnn_panel_ld(p, f.width);
  f.packing = pnn_packing_forward(p, rows ? p->kernels->strip_columns : p->tile_rows);
  /* With many maps a piece's masks would fill the second-level cache for a few pixels. Where the sums can wait in the
   * output, the maps are the outermost loop: masks and weights of one panel's maps serve the whole piece. */
  f.slab = f.block;
  bool slabs = !rows && f.slab < p->group_maps && !p->shared && outputs_wait(p);
  if (slabs) {
    f.deal = pnn_deal_columns(p, host, f.width, PNN_PANEL, pnn_mask_rows(p, f.slab), p->groups, true);
    slabs = p->groups * f.deal.ranges >= 2 * (host ? host->threads : 1);
  }
  if (!slabs) {
    f.slab = p->group_maps;
    f.deal = pnn_deal_columns(p, host, rows || f.few ? PNN_PANEL : f.width, unit, pnn_mask_rows(p, f.slab), p->groups,
                              false);
  }
  f.sum_rows = f.packing.block_tiles * f.packing.tile;
  f.tiles = PNN_MAX(f.packing.block_tiles, 1);
  if (f.block == p->group_maps) f.tiles = PNN_MIN(f.tiles, SUM_ROWS / f.packing.tile);
  const int64_t items = p->group_outputs ? p->groups * f.deal.ranges * f.deal.cuts : 0;

  void *room = pnn_arena_take(arena, p->outputs * p->group_maps, p->real_size);
  double *start = pnn_arena_take(arena, p->outputs, 8);
  f.bias = pnn_arena_take(arena, p->groups * f.sum_rows, p->real_size);
  pnn_norm norm;
  if (p->norm) pnn_norm_plan(p, arena, &norm);
  /* The moments are done with their part before the weights are packed and the products begin. */
  pnn_arena moments_arena = *arena;
  pnn_moments_plan moments_plan;
  if (p->training) moments_plan = pnn_moments_prepare(p, host, &moments_arena);
  f.packed = pnn_arena_take(arena, 1, pnn_packing_bytes(p, &f.packing));
  pnn_arena one = {.base = NULL};
  if (rows)
    pnn_rows_forward_scratch(&f, &one);
  else
    scratch_take(&f, &one);
  f.scratch_bytes = (int64_t)one.used;
  f.scratch = pnn_arena_take(arena, pnn_workers(host, items), f.scratch_bytes);
  arena->used = PNN_MAX(arena->used, moments_arena.used);
  arena->overflow |= moments_arena.overflow || one.overflow;
  if (!run || !pnn_arena_fits(arena)) return;

  const void *weights = pnn_weights_read(p, room);
  start_values(p, host, weights, NULL, start);
  if (p->norm) {
    if (p->training) {
      pnn_moments_run(p, host, &moments_plan, norm.mean, norm.variance);
      pnn_vector_store(&p->params->mean, p->maps, norm.mean);
      pnn_vector_store(&p->params->variance, p->maps, norm.variance);
    } else {
      pnn_vector_load(&p->params->mean, p->maps, 0, norm.mean);
      pnn_vector_load(&p->params->variance, p->maps, 0, norm.variance);
    }
    pnn_norm_fill(p, &norm);
    start_values(p, host, weights, norm.beta, start);
    pnn_weights_scale(p, host, weights, norm.scale, room);
    weights = room;
    f.mean = norm.mean_reals;
  }
  memset(f.bias, 0, (size_t)(p->groups * f.sum_rows * p->real_size));
  for (int64_t group = 0; group < p->groups; group++)
    pnn_reals_store(p, p->group_outputs, start + group * p->group_outputs,
                    (char *)f.bias + group * f.sum_rows * p->real_size);
  pnn_packing_fill(p, host, &f.packing, weights, f.packed);
  pnn_parallel(host, items, rows ? pnn_rows_forward_item : forward_item, &f);
}
