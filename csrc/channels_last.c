/*
 * channels_last.c - the passes on panels whose rows are pixels, for tensors whose channels are next to each other.
 *
 * For one mask a channel; with more, an image is so much smaller than its response maps that forward.c and backward.c
 * turn its panels on the way in and out. Nothing is transposed here but the masks, once per range of pixels: response
 * maps are filled along the channels, and the products take their vectors along the outputs (forward) or the maps
 * (backward), with the packed weights as their second operand and pixels as their rows. Each element is the same chain
 * of fused multiply-adds as in forward.c and backward.c, so the bits are the same.
 */
#include <string.h>

#include "passes.h"

#define FEW 16
#define MANY 2048

bool pnn_rows_fit(const pnn_problem *problem, const pnn_view *a, const pnn_view *b) {
  const pnn_view *views[] = {&problem->input, a, b};
  if (problem->masks != 1 || problem->channels < 2 || problem->outputs < 2 ||
      problem->product_type != problem->params->input.dtype)
    return false;
  /* Few outputs (or maps, in the input gradient) leave most of a tile's columns idle, and packed weights are mostly
   * padding; beside many maps (or outputs) that takes more memory than all else. */
  if (PNN_MIN(problem->group_outputs, problem->group_maps) < FEW &&
      PNN_MAX(problem->group_outputs, problem->group_maps) > MANY)
    return false;
  if (problem->pairs && (problem->group_maps % 2 || problem->group_outputs % 2)) return false; /* none is cut in two */
  for (int i = 0; i < 3; i++)
    if (views[i] && views[i]->data && (views[i]->channel != 1 || views[i]->element != problem->native)) return false;
  return true;
}

/* A panel's row holds `maps` elements of `size` bytes, readable to a whole strip and written to whole PNN_LANES. */
static int64_t row_length(const pnn_problem *p, int64_t maps, int64_t size) {
  return pnn_odd_lines(PNN_MAX(pnn_round_up(maps, p->kernels->strip_columns), pnn_round_up(maps, PNN_LANES)), size);
}

/* ---- runs of pixels at one step ---- */

typedef struct pixel_run {
  int64_t column, columns, offset; /* elements, without the channel */
} pixel_run;

/* From pixel to pixel of a run. Images of one pixel, or one column of them, step by image, or by row. */
static int64_t pixel_step(const pnn_problem *p, const pnn_view *v) {
  return p->pixels == 1 ? v->batch : p->out_width == 1 ? v->row : v->column;
}

/* The columns as maximal runs in which the view's pixels stand pixel_step apart. */
static int64_t pixel_runs(const pnn_problem *p, const pnn_columns *columns, const pnn_view *v, pixel_run *runs) {
  const int64_t step = pixel_step(p, v);
  int64_t count = 0;
  for (int64_t i = 0; i < columns->segments; i++) {
    const pnn_segment *s = &columns->segment[i];
    for (int64_t done = 0; done < s->columns;) {
      const int64_t pixel = s->pixel + done, row = pnn_quotient(pixel, p->out_width);
      const int64_t from = pnn_remainder(pixel, p->out_width);
      const int64_t here = PNN_MIN(p->out_width - from, s->columns - done);
      const int64_t offset = s->image * v->batch + row * v->row + from * v->column;
      if (count && runs[count - 1].offset + runs[count - 1].columns * step == offset)
        runs[count - 1].columns += here;
      else
        runs[count++] = (pixel_run){.column = s->column + done, .columns = here, .offset = offset};
      done += here;
    }
  }
  return count;
}

/* ---- masks and response maps ---- */

#define MASK_BLOCK 64 /* maps and pixels at a time on the way from a mask panel to its transpose */

typedef struct row_masks {
  char *panel, *block;
  int64_t ld;
} row_masks;

static row_masks masks_take(const pnn_problem *p, int64_t maps, int64_t pixels, pnn_arena *arena) {
  row_masks m = {NULL, NULL, pnn_mask_rows(p, maps)};
  if (!m.ld) return m;
  m.panel = pnn_arena_take(arena, m.ld * pixels, p->real_size);
  m.block = pnn_arena_take(arena, (p->shared ? m.ld : MASK_BLOCK) * MASK_BLOCK, p->real_size);
  return m;
}

/* panel[pixel][r] = level * N of response map k0 + r; [pixel][0] where shared. */
static void masks_make(const pnn_problem *p, const row_masks *m, int64_t k0, int64_t maps, const pnn_range *range) {
  if (!m->ld) return;
  const int64_t size = p->real_size;
  const pnn_store_fn transpose = p->kernels->store[p->precision ? PNN_FLOAT64 : PNN_FLOAT32];
  for (int64_t pixel = 0; pixel < range->pixels; pixel += MASK_BLOCK) {
    const pnn_range part = {range->pixel + pixel, PNN_MIN(MASK_BLOCK, range->pixels - pixel)};
    const int64_t step = p->shared ? maps : MASK_BLOCK;
    for (int64_t k = 0; k < maps; k += step) {
      const int64_t rows = PNN_MIN(step, maps - k);
      pnn_mask_panel(p, k0 + k, rows, &part, m->block, MASK_BLOCK);
      transpose(m->panel + (pixel * m->ld + (p->shared ? 0 : k)) * size, 1, m->ld, m->block, MASK_BLOCK,
                pnn_mask_rows(p, rows), part.pixels);
    }
  }
}

/* A maximal run of a panel's columns whose input pixels stand at one step; its masks follow mask_step apart. */
typedef struct input_run {
  int64_t column, columns;
  const char *x, *mask; /* of response map k0; mask NULL without noise */
  int64_t mask_step;
} input_run;

/* On the way through a panel's columns, run by run. */
typedef struct input_walk {
  const pnn_columns *columns;
  input_run run;         /* none at first */
  int64_t segment, done; /* where the next one begins */
} input_walk;

/* On to the next run, its first map k0; false, and the walk as it was, behind the last one. The masks begin at map
 * mask_k0. */
static bool input_walk_on(const pnn_problem *p, const row_masks *m, int64_t mask_k0, int64_t k0, input_walk *walk) {
  const pnn_columns *columns = walk->columns;
  if (walk->segment == columns->segments) return false;
  const pnn_view *v = &p->input;
  const int64_t size = p->real_size, width = p->out_width, step = pixel_step(p, v);
  const pnn_segment *s = &columns->segment[walk->segment];
  const char *mask = m->ld ? m->panel + (p->shared ? 0 : k0 - mask_k0) * size : NULL;
  if (p->pixels == 1) { /* one mask row serves all images */
    walk->segment = columns->segments;
    walk->run = (input_run){0, columns->columns, v->data + (s->image * v->batch + k0) * p->native, mask, 0};
    return true;
  }
  const bool rows_join = p->out_height == 1 || v->row == width * step;
  const int64_t pixel = s->pixel + walk->done, row = pnn_quotient(pixel, width), from = pnn_remainder(pixel, width);
  input_run run = {.column = s->column + walk->done, .mask_step = m->ld};
  run.columns = rows_join ? s->columns - walk->done : PNN_MIN(width - from, s->columns - walk->done);
  run.x = v->data + (s->image * v->batch + k0 + row * v->row + from * v->column) * p->native;
  if (mask) run.mask = mask + (pixel - columns->range->pixel) * m->ld * size;
  walk->run = run;
  walk->done += run.columns;
  if (walk->done == s->columns) walk->done = 0, walk->segment++;
  return true;
}

/* panel[column][r] = activation(u) of response map k0 + r, minus its mean where there is one ([K] reals); reals, or
 * with pairs bfloat16. */
static void respond(const pnn_problem *p, const row_masks *m, int64_t mask_k0, const pnn_columns *columns, int64_t k0,
                    int64_t maps, const void *mean, char *panel, int64_t ld) {
  const char *from = mean ? (const char *)mean + k0 * p->real_size : NULL;
  const pnn_respond_rows_fn kernel =
      (p->pairs ? p->kernels->respond_rows_bfloat16 : p->kernels->respond_rows)[p->activation];
  const int64_t step = pixel_step(p, &p->input);
  /* Without a gap between pixels a run is one long row: with few maps that fills the vectors. */
  const bool dense = step == maps && ld == maps && !from && !p->shared;
  input_walk walk = {.columns = columns};
  while (input_walk_on(p, m, mask_k0, k0, &walk)) {
    const input_run run = walk.run;
    char *const to = panel + run.column * ld * p->native;
    if (dense && (!run.mask || run.mask_step == maps))
      kernel(to, ld, run.x, step, run.mask, maps, NULL, 1, run.columns * maps, 0);
    else
      kernel(to, ld, run.x, step, run.mask, run.mask_step, from, run.columns, maps, p->shared);
  }
}

static const char *from_map(const pnn_problem *p, const void *vector, int64_t k) {
  return (const char *)vector + k * p->real_size;
}

int64_t pnn_rows_tile(const pnn_problem *problem, int64_t columns) {
  return columns > problem->kernels->strip_columns ? problem->tile_rows : problem->kernels->strip_rows;
}

int64_t pnn_rows_width(const pnn_problem *problem, int64_t width, int64_t columns) {
  const int64_t tile = pnn_rows_tile(problem, columns), up = pnn_round_up(width, tile);
  return up <= PNN_WIDEST ? up : up - tile;
}

/* ---- forward ---- */

typedef struct forward_scratch {
  char *panel;
  int64_t ld;
  row_masks masks;
} forward_scratch;

static forward_scratch forward_take(const pnn_forward_state *f, pnn_arena *arena) {
  const pnn_problem *p = f->problem;
  forward_scratch s = {.ld = f->few ? p->group_maps : row_length(p, f->block, p->native)};
  s.panel = pnn_arena_take(arena, s.ld * f->width, p->native);
  s.masks = masks_take(p, p->group_maps, f->deal.pixels, arena);
  return s;
}

void pnn_rows_forward_scratch(const pnn_forward_state *state, pnn_arena *arena) { forward_take(state, arena); }

#define ROWS_MADE 24     /* pixels at a time: whole tiles */
#define ROWS_MADE_FEW 64 /* of few maps */

/* A panel of few maps: a few pixels' response maps, then all of their outputs. */
static void forward_runs(const pnn_forward_state *f, const forward_scratch *s, const pnn_columns *columns,
                         int64_t first, int64_t group, const pixel_run *runs, int64_t count, int64_t step,
                         pnn_ahead *ahead) {
  const pnn_problem *p = f->problem;
  const int64_t k_first = group * p->group_maps;
  const void *b = pnn_packing_tile(p, &f->packing, f->packed, group, 0, 0, 0);
  const char *start = from_map(p, f->bias, group * f->sum_rows);
  for (int64_t r = 0; r < count; r++)
    for (int64_t i = 0; i < runs[r].columns; i += ROWS_MADE_FEW) {
      const int64_t column = runs[r].column + i, pixels = PNN_MIN(ROWS_MADE_FEW, runs[r].columns - i);
      pnn_columns part;
      pnn_columns_part(&part, columns, first, column, column + pixels);
      respond(p, &s->masks, k_first, &part, k_first, p->group_maps, f->mean, s->panel, s->ld);
      char *c = p->output.data + (runs[r].offset + i * step + group * p->group_outputs) * p->native;
      p->kernels->product_rows_run(pixels, p->group_outputs, p->group_maps, s->panel, s->ld, b, c, step, start, ahead);
    }
}

/* A panel's pixels on the way to response maps. */
typedef struct forward_walk {
  input_walk input;
  int64_t used, made; /* pixels of the run, of the panel */
} forward_walk;

/* Makes the response maps [k, k + depth) of the group up to the panel's pixel `end`. */
static void forward_walk_to(const pnn_forward_state *f, const forward_scratch *s, forward_walk *w, int64_t k_first,
                            int64_t k, int64_t depth, int64_t end) {
  const pnn_problem *p = f->problem;
  const pnn_respond_rows_fn kernel =
      (p->pairs ? p->kernels->respond_rows_bfloat16 : p->kernels->respond_rows)[p->activation];
  const int64_t step = pixel_step(p, &p->input);
  const char *mean = f->mean ? from_map(p, f->mean, k_first + k) : NULL;
  const input_run *run = &w->input.run;
  while (w->made < end) {
    if (w->used == run->columns) {
      input_walk_on(p, &s->masks, k_first, k_first, &w->input);
      w->used = 0;
    }
    const int64_t pixels = PNN_MIN(end - w->made, run->columns - w->used);
    const char *mask = run->mask;
    if (mask) mask += (w->used * run->mask_step + (p->shared ? 0 : k)) * p->real_size;
    kernel(s->panel + w->made * s->ld * p->native, s->ld, run->x + (w->used * step + k) * p->native, step, mask,
           run->mask_step, mean, pixels, depth, p->shared);
    w->used += pixels;
    w->made += pixels;
  }
}

void pnn_rows_forward_item(void *state, int32_t worker, int64_t item) {
  const pnn_forward_state *f = state;
  const pnn_problem *p = f->problem;
  const pnn_kernels *kernels = p->kernels;
  const int64_t pieces = f->deal.ranges * f->deal.cuts, group = pnn_quotient(item, pieces);
  const int64_t k_first = group * p->group_maps, strip = f->packing.tile, wide = p->tile_columns;
  pnn_range range;
  int64_t column, end;
  pnn_deal_piece(p, &f->deal, pnn_remainder(item, pieces), &range, &column, &end);
  if (column == end) return;
  pnn_arena own = {.base = f->scratch + worker * f->scratch_bytes};
  const forward_scratch s = forward_take(f, &own);
  masks_make(p, &s.masks, k_first, p->group_maps, &range);
  pnn_columns columns;
  pixel_run runs[PNN_WIDEST];
  for (; column < end; column += f->width) {
    pnn_columns_set(&columns, &range, column, PNN_MIN(f->width, end - column));
    const int64_t count = pixel_runs(p, &columns, &p->output, runs), step = pixel_step(p, &p->output);
    const int64_t next = column + f->width, ahead_count = PNN_MIN(f->width, end - next);
    pnn_ahead ahead = {.streams = 0};
    pnn_ahead_add(p, &ahead, &range, next, ahead_count, &p->input, group * p->group_channels, p->group_channels, false);
    if (f->few) {
      pnn_ahead_spread(&ahead, f->packing.block_tiles * (pnn_quotient(columns.columns, kernels->strip_rows) + 1));
      forward_runs(f, &s, &columns, column, group, runs, count, step, &ahead);
      continue;
    }
    pnn_ahead_add(p, &ahead, &range, next, ahead_count, &p->output, group * p->group_outputs, p->group_outputs, true);
    pnn_ahead_spread(&ahead, pnn_quotient_up(p->group_outputs, wide) *
                                 (pnn_quotient(columns.columns, pnn_rows_tile(p, p->group_outputs)) + 1) *
                                 (p->group_maps / (p->pairs ? 2 : 1) / PNN_AHEAD_DEPTH + 1));
    for (int64_t k = 0; k < p->group_maps || k == 0; k += PNN_MAX(f->block, 1)) {
      const int64_t depth = PNN_MIN(f->block, p->group_maps - k);
      forward_walk walk = {.input = {.columns = &columns}};
      for (int64_t t = 0; t < p->group_outputs; t += wide) {
        const void *b = pnn_packing_tile(p, &f->packing, f->packed, group, 0, pnn_quotient(t, strip), k);
        const char *start = from_map(p, f->bias, group * f->sum_rows + t);
        const int64_t outputs = PNN_MIN(wide, p->group_outputs - t);
        for (int64_t r = 0; r < count; r++)
          for (int64_t i = 0, pixels; i < runs[r].columns; i += pixels) {
            const int64_t offset = runs[r].offset + i * step + group * p->group_outputs + t;
            pixels = runs[r].columns - i;
            if (t == 0) { /* the first tile of outputs finds a few pixels' response maps in the first-level cache */
              pixels = PNN_MIN(ROWS_MADE, pixels);
              forward_walk_to(f, &s, &walk, k_first, k, depth, runs[r].column + i + pixels);
            }
            const char *a = s.panel + (runs[r].column + i) * s.ld * p->native;
            char *c = p->output.data + offset * p->native;
            if (p->pairs)
              kernels->product_rows_pairs(PNN_PRODUCT_START, pixels, outputs, depth / 2, a, s.ld, 1, b, strip, c, step,
                                          start, true, &ahead);
            else
              kernels->product_rows(k ? PNN_PRODUCT_CONTINUE : PNN_PRODUCT_START, pixels, outputs, depth, a, s.ld, 1, b,
                                    strip, strip * p->group_maps, c, step, start, &ahead);
          }
      }
    }
  }
}

/* ---- backward: sums over pixels ---- */

/* Outputs whose gradient is packed at a time. */
static int64_t packed_outputs(const pnn_problem *p) {
  return (p->pairs ? 2 : p->kernels->packed_tiles) * p->kernels->strip_rows;
}

#define ROWS_PAIRED 32 /* pixels whose response maps are made at a time, then paired; even */

typedef struct sums_scratch {
  char *maps, *outputs, *totals; /* maps and outputs: reals, or with pairs those of two neighbouring pixels */
  char *some_maps, *gradient;    /* with pairs: what is paired, as bfloat16 */
  int64_t ld, some_ld;
  row_masks masks;
} sums_scratch;

static sums_scratch sums_take(const pnn_sums *s, pnn_arena *arena) {
  const pnn_problem *p = s->problem;
  sums_scratch t = {.ld = p->pairs ? row_length(p, s->block, p->real_size) : p->kernels->strip_columns};
  const int64_t columns = p->pairs ? PNN_CHUNK / 2 : PNN_CHUNK;
  const int64_t packed = packed_outputs(p);
  if (p->pairs) t.gradient = pnn_arena_take(arena, packed * PNN_CHUNK, p->native);
  t.outputs = pnn_arena_take(arena, packed * columns, p->real_size);
  t.totals = pnn_arena_take(arena, packed, p->real_size);
  if (!s->products) return t;
  t.maps = pnn_arena_take(arena, (p->pairs ? t.ld : pnn_round_up(s->block, t.ld)) * columns, p->real_size);
  if (p->pairs) {
    t.some_ld = row_length(p, s->block, p->native);
    t.some_maps = pnn_arena_take(arena, t.some_ld * ROWS_PAIRED, p->native);
  }
  t.masks = masks_take(p, s->block, s->chunks.pixels, arena);
  return t;
}

void pnn_rows_sums_scratch(const pnn_sums *sums, pnn_arena *arena) { sums_take(sums, arena); }

/* dst[tile][column][strip_rows] = the gradient of the outputs [t, t + rows), and their sums, unless NULL. What stands
 * `further` outputs behind is asked for. */
static void gradient_pack(const pnn_problem *p, const pixel_run *runs, int64_t count, int64_t t, int64_t rows,
                          int64_t further, char *dst, char *sums) {
  const int64_t tile = p->kernels->strip_rows, size = p->real_size;
  const pnn_view *g = &p->grad_output;
  for (int64_t r = 0; r < count; r++)
    p->kernels->pack_gradient(dst + runs[r].column * tile * size, PNN_CHUNK * tile,
                              g->data + (runs[r].offset + t) * size, pixel_step(p, g), runs[r].columns, rows, further,
                              sums);
}

typedef struct gradient_rows {
  const char *data;
  int64_t step; /* elements from pixel to pixel */
} gradient_rows;

/* The outputs [t, t + rows) of the gradient, as bfloat16: where they stand if that is one run of pixels, else a copy.
 */
static gradient_rows gradient_find(const pnn_problem *p, const pixel_run *runs, int64_t count, int64_t t, int64_t rows,
                                   char *copy) {
  const int64_t ld = packed_outputs(p), step = pixel_step(p, &p->grad_output);
  if (count == 1) return (gradient_rows){p->grad_output.data + (runs->offset + t) * p->native, step};
  for (int64_t r = 0; r < count; r++)
    for (int64_t i = 0; i < runs[r].columns; i++)
      memcpy(copy + (runs[r].column + i) * ld * p->native,
             p->grad_output.data + (runs[r].offset + i * step + t) * p->native, (size_t)(rows * p->native));
  return (gradient_rows){copy, ld};
}

/* The response maps in strips, [strip][PNN_CHUNK][ld]: rows of all maps would be read at a stride. */
static void respond_strips(const pnn_sums *s, const pnn_sums_place *at, const sums_scratch *t,
                           const pnn_columns *columns) {
  const pnn_problem *p = s->problem;
  for (int64_t j = 0; j < at->maps; j += t->ld)
    respond(p, &t->masks, at->k0, columns, at->k0 + j, PNN_MIN(t->ld, at->maps - j), s->mean,
            t->maps + j * PNN_CHUNK * p->real_size, t->ld);
}

/* The response maps of two neighbouring pixels as pairs, [column/2][ld]. */
static void respond_pairs(const pnn_sums *s, const pnn_sums_place *at, const sums_scratch *t,
                          const pnn_columns *columns, int64_t first) {
  const pnn_problem *p = s->problem;
  for (int64_t column = 0; column < columns->columns; column += ROWS_PAIRED) {
    pnn_columns part;
    pnn_columns_part(&part, columns, first, column, PNN_MIN(column + ROWS_PAIRED, columns->columns));
    respond(p, &t->masks, at->k0, &part, at->k0, at->maps, s->mean, t->some_maps, t->some_ld);
    p->kernels->pair_bfloat16(t->maps + column / 2 * t->ld * p->real_size, t->ld, t->some_maps, t->some_ld,
                              part.columns, at->maps);
  }
}

/* One part's chunks. `made` remembers whose masks the scratch holds; its pixel is -1 at first. */
static void sums_part(const pnn_sums *s, const pnn_sums_place at, const sums_scratch t, pnn_range *made) {
  const pnn_problem *p = s->problem;
  const pnn_kernels *kernels = p->kernels;
  const int64_t size = p->real_size, tile = kernels->strip_rows;
  if (at.totals) memset(at.totals + at.first * size, 0, (size_t)((at.end - at.first) * size));
  pnn_columns columns;
  pixel_run runs[PNN_CHUNK];
  pnn_range range;
  int64_t part_first, end;
  pnn_chunks_part(&s->chunks, at.part, &part_first, &end);
  for (int64_t chunk = part_first; chunk < end; chunk++) {
    const pnn_product_mode mode = chunk == part_first ? PNN_PRODUCT_START : PNN_PRODUCT_ADD;
    int64_t first;
    const int64_t count = pnn_chunk_locate(p, &s->chunks, chunk, &range, &first);
    if (range.pixel != made->pixel) {
      *made = range;
      if (at.maps) masks_make(p, &t.masks, at.k0, at.maps, made);
    }
    pnn_columns_set(&columns, made, first, count);
    if (at.maps && p->pairs)
      respond_pairs(s, &at, &t, &columns, first);
    else if (at.maps)
      respond_strips(s, &at, &t, &columns);
    const int64_t run_count = pixel_runs(p, &columns, &p->grad_output, runs);
    const int64_t packed = packed_outputs(p), depth = p->pairs ? (count + 1) / 2 : count;
    pnn_ahead ahead = {.streams = 0};
    for (int64_t o = at.first; o < at.end; o += tile) {
      const int64_t rows = PNN_MIN(tile, at.end - o), number = (o - at.first) % packed / tile;
      const char *outputs = t.outputs + number * (p->pairs ? 1 : PNN_CHUNK) * tile * size;
      if (number == 0) {
        const int64_t side_by_side = PNN_MIN(packed, at.end - o);
        if (p->pairs) {
          const gradient_rows g = gradient_find(p, runs, run_count, o, side_by_side, t.gradient);
          kernels->pair_bfloat16(t.outputs, packed, g.data, g.step, count, side_by_side);
          /* All outputs at once where they are one run of pixels. */
          const int64_t outputs = run_count == 1 ? at.end - o : side_by_side;
          if (at.totals && (o == at.first || run_count > 1))
            kernels->sum_columns_bfloat16(count, g.data, g.step, outputs, at.totals + o * size);
        } else {
          char *const sums = at.totals ? t.totals : NULL;
          if (sums) memset(sums, 0, (size_t)(side_by_side * size));
          const bool more = !s->together && o + packed < at.end;
          gradient_pack(p, runs, run_count, o, side_by_side, more ? packed : 0, t.outputs, sums);
          if (sums) kernels->accumulate(at.totals + o * size, sums, side_by_side);
        }
        ahead = pnn_sums_ahead(s, &at, chunk, end, o, packed);
        pnn_ahead_spread(&ahead, pnn_quotient_up(side_by_side, tile) * (at.maps / kernels->strip_columns + 1) *
                                     (depth / PNN_AHEAD_DEPTH + 1));
      }
      for (int64_t j = 0; j < at.maps; j += kernels->strip_columns) {
        const int64_t maps = PNN_MIN(kernels->strip_columns, at.maps - j);
        char *into = at.products + (o * p->group_maps + at.k + j) * size;
        if (p->pairs)
          kernels->product_rows_pairs(mode, rows, maps, depth, outputs, 2, packed, t.maps + j * size, t.ld, into,
                                      p->group_maps, NULL, false, &ahead);
        else
          kernels->product_rows(mode, rows, maps, depth, outputs, 1, tile, t.maps + j * PNN_CHUNK * size, t.ld, 0, into,
                                p->group_maps, NULL, &ahead);
      }
    }
  }
}

void pnn_rows_sums_item(void *sums, int32_t worker, int64_t item) {
  const pnn_sums *s = sums;
  pnn_arena own = {.base = s->scratch + worker * s->scratch_bytes};
  const sums_scratch t = sums_take(s, &own);
  pnn_range made = {.pixel = -1};
  for (int64_t part = 0; part < s->part_run; part++) sums_part(s, pnn_sums_locate(s, item, part), t, &made);
}

/* ---- backward: input ---- */

typedef struct inputs_scratch {
  char *d; /* da of a run's pixels, of a tile's maps */
  int64_t ld;
  row_masks masks;
} inputs_scratch;

static inputs_scratch inputs_take(const pnn_inputs *in, pnn_arena *arena) {
  const pnn_problem *p = in->problem;
  inputs_scratch s = {.ld = row_length(p, PNN_MIN(in->block, p->tile_columns), p->real_size)};
  s.d = pnn_arena_take(arena, s.ld * in->width, p->real_size);
  s.masks = masks_take(p, p->group_maps, in->deal.pixels, arena);
  return s;
}

void pnn_rows_inputs_scratch(const pnn_inputs *inputs, pnn_arena *arena) { inputs_take(inputs, arena); }

/* A panel's pixels on the way to the input's gradient. */
typedef struct inputs_walk {
  input_walk input;
  const pixel_run *out;
} inputs_walk;

typedef struct inputs_place {
  int64_t columns; /* of one run of the input and of its gradient */
  const char *x, *mask;
  char *dx;
} inputs_place;

/* Where the panel's column and those behind it stand, of map k0. Columns are asked for in ascending order. */
static inputs_place inputs_walk_to(const pnn_inputs *in, const inputs_scratch *s, inputs_walk *w, int64_t mask_k0,
                                   int64_t k0, int64_t column) {
  const pnn_problem *p = in->problem;
  const input_run *run = &w->input.run;
  while (column >= run->column + run->columns) input_walk_on(p, &s->masks, mask_k0, k0, &w->input);
  while (column >= w->out->column + w->out->columns) w->out++;
  const int64_t into = column - run->column, out = column - w->out->column;
  inputs_place place = {.columns = PNN_MIN(run->columns - into, w->out->columns - out)};
  place.x = run->x + into * pixel_step(p, &p->input) * p->native;
  place.mask = run->mask ? run->mask + into * run->mask_step * p->real_size : NULL;
  place.dx = p->grad_input.data + (w->out->offset + out * pixel_step(p, &p->grad_input) + k0) * p->native;
  return place;
}

/* The input's gradient of the maps [j, j + maps) of a block, for the pixels of one run of the outputs' gradient. */
static void inputs_run(const pnn_inputs *in, const inputs_scratch *s, const pixel_run *run, int64_t group,
                       int64_t block, int64_t j, int64_t maps, inputs_walk *walk, pnn_ahead *ahead) {
  const pnn_problem *p = in->problem;
  const pnn_kernels *kernels = p->kernels;
  const int64_t size = p->real_size, strip = in->packing.tile, depth = p->group_outputs;
  const int64_t k_first = group * p->group_maps, k0 = k_first + block * in->block + j;
  const int64_t step = pixel_step(p, &p->grad_output), rows = pnn_rows_tile(p, maps);
  const void *b = pnn_packing_tile(p, &in->packing, in->packed, group, block, pnn_quotient(j, strip), 0);
  const pnn_norm_terms norm_terms = pnn_inputs_norm_terms(in, k0), *norm = in->affine ? &norm_terms : NULL;
  const bool fused = !p->pairs && maps == p->tile_columns && kernels->product_respond_grad_rows[p->activation];
  const int64_t x_step = pixel_step(p, &p->input), dx_step = pixel_step(p, &p->grad_input);
  for (int64_t i = 0, pixels; i < run->columns; i += pixels) {
    const int64_t column = run->column + i;
    const char *a = p->grad_output.data + (run->offset + i * step + group * p->group_outputs) * p->native;
    pixels = run->columns - i;
    if (fused) {
      const inputs_place at = inputs_walk_to(in, s, walk, k_first, k0, column);
      const int64_t whole = pnn_quotient(PNN_MIN(pixels, at.columns), rows) * rows;
      if (whole) {
        kernels->product_respond_grad_rows[p->activation](whole, depth, a, step, b, strip, strip * depth, at.dx,
                                                          dx_step, at.x, x_step, at.mask, walk->input.run.mask_step,
                                                          norm, p->shared, ahead);
        pixels = whole;
        continue;
      }
      pixels = PNN_MIN(pixels, rows); /* a tile that several runs share */
    }
    if (p->pairs)
      kernels->product_rows_pairs(PNN_PRODUCT_START, pixels, maps, depth / 2, a, step, 1, b, strip, s->d, s->ld, NULL,
                                  false, ahead);
    else
      kernels->product_rows(PNN_PRODUCT_START, pixels, maps, depth, a, step, 1, b, strip, strip * depth, s->d, s->ld,
                            NULL, ahead);
    for (int64_t done = 0, count; done < pixels; done += count) {
      const inputs_place at = inputs_walk_to(in, s, walk, k_first, k0, column + done);
      count = PNN_MIN(at.columns, pixels - done);
      (p->pairs ? kernels->respond_grad_rows_bfloat16 : kernels->respond_grad_rows)[p->activation](
          at.dx, dx_step, s->d + done * s->ld * size, s->ld, at.x, x_step, at.mask, walk->input.run.mask_step, norm,
          count, maps, p->shared);
    }
  }
}

void pnn_rows_inputs_item(void *inputs, int32_t worker, int64_t item) {
  const pnn_inputs *in = inputs;
  const pnn_problem *p = in->problem;
  const int64_t pieces = in->deal.ranges * in->deal.cuts, group = pnn_quotient(item, pieces);
  const int64_t k_first = group * p->group_maps, wide = p->tile_columns;
  pnn_range range;
  int64_t column, end;
  pnn_deal_piece(p, &in->deal, pnn_remainder(item, pieces), &range, &column, &end);
  if (column == end) return;
  pnn_arena own = {.base = in->scratch + worker * in->scratch_bytes};
  const inputs_scratch s = inputs_take(in, &own);
  masks_make(p, &s.masks, k_first, p->group_maps, &range);
  pnn_columns columns;
  pixel_run gradient[PNN_WIDEST], out[PNN_WIDEST];
  for (; column < end; column += in->width) {
    pnn_columns_set(&columns, &range, column, PNN_MIN(in->width, end - column));
    const int64_t gradients = pixel_runs(p, &columns, &p->grad_output, gradient);
    pixel_runs(p, &columns, &p->grad_input, out);
    const int64_t next = column + in->width, count = PNN_MIN(in->width, end - next);
    pnn_ahead ahead = {.streams = 0};
    pnn_ahead_add(p, &ahead, &range, next, count, &p->grad_output, group * p->group_outputs, p->group_outputs, false);
    pnn_ahead_add(p, &ahead, &range, next, count, &p->input, group * p->group_channels, p->group_channels, false);
    pnn_ahead_add(p, &ahead, &range, next, count, &p->grad_input, group * p->group_channels, p->group_channels, true);
    pnn_ahead_spread(&ahead, in->packing.blocks * pnn_quotient_up(in->block, wide) *
                                 (pnn_quotient(columns.columns, pnn_rows_tile(p, in->block)) + 1) *
                                 (p->group_outputs / (p->pairs ? 2 : 1) / PNN_AHEAD_DEPTH + 1));
    for (int64_t block = 0; block < in->packing.blocks; block++) {
      const int64_t maps = PNN_MIN(in->block, p->group_maps - block * in->block);
      for (int64_t j = 0; j < maps; j += wide) {
        inputs_walk walk = {.input = {.columns = &columns}, .out = out};
        for (int64_t r = 0; r < gradients; r++)
          inputs_run(in, &s, &gradient[r], group, block, j, PNN_MIN(wide, maps - j), &walk, &ahead);
      }
    }
  }
}

/* ---- moments ---- */

typedef struct moments_scratch {
  char *panel;
  int64_t ld;
  row_masks masks;
} moments_scratch;

static moments_scratch moments_take(const pnn_problem *p, const pnn_moments_plan *plan, pnn_arena *arena) {
  moments_scratch s = {.ld = row_length(p, plan->block, p->real_size)};
  /* Without a panel of all maps: room for a vector of maps that takes a second pass, or for a few pixels. */
  const bool direct = p->kernels->respond_moments_rows[p->activation] != NULL;
  s.panel = pnn_arena_take(arena, direct ? PNN_LANES * PNN_MAX(PNN_CHUNK, s.ld) : s.ld * PNN_CHUNK, p->real_size);
  s.masks = masks_take(p, plan->block, plan->chunks.pixels, arena);
  return s;
}

void pnn_rows_moments_scratch(const pnn_problem *problem, const pnn_moments_plan *plan, pnn_arena *arena) {
  moments_take(problem, plan, arena);
}

void pnn_rows_moments_chunk(const pnn_problem *problem, const pnn_moments_plan *plan, pnn_arena scratch, int64_t k0,
                            int64_t rows, int64_t chunk, int64_t end, pnn_range *made, double *mean, double *m2) {
  const moments_scratch s = moments_take(problem, plan, &scratch);
  pnn_columns columns;
  pnn_range range;
  int64_t first;
  const int64_t count = pnn_chunk_locate(problem, &plan->chunks, chunk, &range, &first);
  if (range.pixel != made->pixel) {
    *made = range;
    masks_make(problem, &s.masks, k0, rows, made);
  }
  pnn_columns_set(&columns, made, first, count);
  pnn_ahead ahead = {.streams = 0};
  if (chunk + 1 < end) {
    const int64_t next = pnn_chunk_locate(problem, &plan->chunks, chunk + 1, &range, &first);
    pnn_ahead_add(problem, &ahead, &range, first, next, &problem->input, k0, rows, false);
  }
  pnn_ahead_spread(&ahead, count);
  const int64_t step = pixel_step(problem, &problem->input);
  if (problem->kernels->respond_moments_rows[problem->activation] && count >= PNN_LANES) {
    pnn_rows_run runs[PNN_CHUNK];
    int64_t run_count = 0;
    input_walk walk = {.columns = &columns};
    while (input_walk_on(problem, &s.masks, k0, k0, &walk))
      runs[run_count++] = (pnn_rows_run){walk.run.x, walk.run.mask, walk.run.columns};
    problem->kernels->respond_moments_rows[problem->activation](s.panel, runs, run_count, step, walk.run.mask_step,
                                                                problem->shared, count, rows, mean, m2, &ahead);
    return;
  }
  respond(problem, &s.masks, k0, &columns, k0, rows, NULL, s.panel, s.ld);
  problem->kernels->moments_rows(s.panel, s.ld, count, rows, mean, m2, &ahead);
}
