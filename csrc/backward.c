/*
 * backward.c - the gradients of weight, bias and normalisation (one sum over pixels), then of input and masks (one
 * product with a fused epilogue). Response maps are computed again from x in cache; nothing of their size is stored.
 *
 * Sums over pixels:  G[t,k] = sum g*c,  h[t] = sum g, with c the forward product's operand (a, or a - mean), in the
 *                    order of chunks.c. Without normalisation dV = G and dbias = h.
 * Normalisation:     S1 = V'h, S2 = V'G (per map, in double), dgamma = r*S2, dbeta = S1, dV = alpha*G + h*beta.
 * Input and masks:   da = (V*alpha)'g - alpha*S1/n - alpha*r^2*S2/n * c   (the last two only with the batch's moments),
 *                    d = activation'(u)*da,  dx = sum over m of d,  dN = level * sum over the batch of d.
 */
#include <string.h>

#include "passes.h"

/* Gradients of channels-last layers take rows of channels as they stand where a group has more response maps than this.
 * Fewer leave most of a row's vectors idle: blocks of pixels and channels, turned in registers, are faster. The same
 * for every instruction set, since the two ways sum dV in different orders. */
#define FEW_MAPS 8

/* ---- sums over pixels ---- */

/* A panel's response maps take half of the second-level cache, 128 x 512 floats at most: they stay there beside their
 * masks, and the more there are, the fewer times the gradient is read. In the channels-last form, which packs the
 * gradient as well, twice as many pay, as far as they and their masks leave the rest of a thread's 1 MiB to the
 * gradient and to what turns the masks. */
#define WIDE_BYTES (768 * 1024)
#define OUTPUT_BLOCK 16 /* gradient rows beside it, as many as a vector has lanes: channels-last ones are turned */
#define NEAR_OUTPUTS 8  /* of these, as many as stay in the first-level cache beside a tile of maps */

typedef struct sums_scratch {
  char *maps, *outputs, *totals, *mask, *channels;
  char *map_pairs, *output_pairs; /* the two operands as bfloat16 pairs along the pixels, or NULL */
} sums_scratch;

static sums_scratch sums_take(const pnn_sums *s, pnn_arena *arena) {
  const pnn_problem *p = s->problem;
  const pnn_kernels *kernels = p->kernels;
  sums_scratch t;
  memset(&t, 0, sizeof t);
  t.outputs = pnn_arena_take(arena, pnn_round_up(OUTPUT_BLOCK, kernels->dot_rows) * PNN_CHUNK, p->real_size);
  t.totals = pnn_arena_take(arena, OUTPUT_BLOCK, p->real_size);
  if (p->pairs) t.output_pairs = pnn_arena_take(arena, pnn_round_up(OUTPUT_BLOCK, kernels->dot_rows) * PNN_CHUNK, 2);
  if (!s->products) return t;
  t.maps = pnn_arena_take(arena, pnn_round_up(s->block, kernels->dot_columns) * PNN_CHUNK, p->real_size);
  t.mask = pnn_arena_take(arena, pnn_mask_rows(p, s->block) * pnn_mask_ld(p, s->chunks.pixels), p->real_size);
  if (p->masks > 1) t.channels = pnn_arena_take(arena, pnn_response_channels(p, s->block) * PNN_CHUNK, p->real_size);
  if (p->pairs) t.map_pairs = pnn_arena_take(arena, pnn_round_up(s->block, kernels->dot_columns) * PNN_CHUNK, 2);
  return t;
}

static void add_reals(const pnn_problem *p, void *to, const void *from, int64_t count) {
  p->kernels->accumulate(to, from, count);
}

/* What the first tiles that use a panel make on the way; NULL where the panels are full already. */
typedef struct sums_source {
  const char *gradient;     /* of the block's first output */
  const pnn_source *source; /* of the first response map */
} sums_source;

/* G[t0.., k0..] += outputs * maps' over one chunk, its part's first or not, tile by tile. */
static void sums_products(const pnn_sums *s, const sums_scratch *t, int64_t columns, char *into, int64_t outputs,
                          int64_t maps, bool first, const sums_source *from, pnn_ahead *ahead) {
  const pnn_problem *p = s->problem;
  const pnn_kernels *kernels = p->kernels;
  const int64_t size = p->real_size, ld = p->group_maps, rounds = columns / (p->pairs ? 2 : 1) / PNN_LANES;
  pnn_ahead_spread(ahead, pnn_quotient_up(outputs, kernels->dot_rows) * pnn_quotient_up(maps, kernels->dot_columns));
  const pnn_ahead_run share = pnn_ahead_share(ahead, rounds);
  for (int64_t near = 0, next; near < outputs; near = next) {
    next = PNN_MIN(near + NEAR_OUTPUTS, outputs);
    for (int64_t j = 0; j < maps; j += kernels->dot_columns)
      for (int64_t i = near; i < next; i += kernels->dot_rows) {
        char *const out = into + (i * ld + j) * size, *const a = t->outputs + i * PNN_CHUNK * size;
        char *const b = t->maps + j * PNN_CHUNK * size;
        const pnn_ahead_run run = pnn_ahead_take(ahead, share, a);
        const char *gradient = from->gradient && j == 0 ? from->gradient + i * p->grad_output.channel * size : NULL;
        if (p->pairs) {
          kernels->dot_pairs(columns / 2, t->output_pairs + i * PNN_CHUNK * 2, PNN_CHUNK / 2,
                             t->map_pairs + j * PNN_CHUNK * 2, PNN_CHUNK / 2, outputs - i, maps - j, out, ld, first,
                             &run);
        } else if (gradient || (from->source && i == 0)) {
          pnn_source source;
          if (from->source && i == 0) source = pnn_source_at(p, from->source, j);
          kernels->respond_dot[p->activation](columns, a, PNN_CHUNK, gradient, p->grad_output.channel, b, PNN_CHUNK,
                                              from->source && i == 0 ? &source : NULL, out, ld, first, &run);
        } else {
          kernels->dot(columns, a, PNN_CHUNK, b, PNN_CHUNK, outputs - i, maps - j, out, ld, first, &run);
        }
      }
  }
}

pnn_sums_place pnn_sums_locate(const pnn_sums *s, int64_t item, int64_t part) {
  const pnn_problem *p = s->problem;
  const int64_t cut = item % s->output_cuts, map_block = item / s->output_cuts % s->map_blocks;
  const int64_t runs = s->chunks.parts / s->part_run, run = item / s->output_cuts / s->map_blocks;
  const int64_t group = run / runs;
  pnn_sums_place at = {.part = run % runs * s->part_run + part, .k = map_block * s->block};
  at.k0 = group * p->group_maps + at.k;
  at.maps = s->products ? PNN_MIN(s->block, p->group_maps - at.k) : 0;
  at.first = group * p->group_outputs + cut * s->output_rows;
  at.end = PNN_MAX(at.first, PNN_MIN(at.first + s->output_rows, (group + 1) * p->group_outputs)); /* maybe none */
  if (s->products) at.products = s->maps_part + at.part * p->outputs * p->group_maps * p->real_size;
  if (map_block == 0) at.totals = s->outputs_part + at.part * p->outputs * p->real_size;
  int64_t unused;
  pnn_chunks_part(&s->chunks, at.part - part, &at.first_chunk, &unused);
  pnn_chunks_part(&s->chunks, at.part - part + s->part_run - 1, &unused, &at.end_chunk);
  const int64_t next = at.k + s->workers * s->block; /* workers take items in turn */
  if (s->output_cuts == 1 && next < p->group_maps) {
    at.next_k0 = group * p->group_maps + next;
    at.next_maps = PNN_MIN(s->block, p->group_maps - next);
  }
  return at;
}

pnn_ahead pnn_sums_ahead(const pnn_sums *s, const pnn_sums_place *at, int64_t chunk, int64_t end, int64_t output,
                         int64_t outputs) {
  const pnn_problem *p = s->problem;
  pnn_ahead ahead = {.streams = 0};
  if (!at->maps) return ahead;
  pnn_range range;
  int64_t first, count = pnn_chunk_locate(p, &s->chunks, chunk, &range, &first);
  /* The blocks of outputs, of which this is number i, share what is asked for. */
  const int64_t shares = pnn_quotient_up(at->end - at->first, outputs), i = pnn_quotient(output - at->first, outputs);
  if (!s->rows)
    pnn_ahead_add(p, &ahead, &range, first, count, &p->grad_output, output + outputs,
                  PNN_MIN(outputs, at->end - output - outputs), false);
  /* The masks of the item's next range of pixels, or of the next item. */
  const int64_t per_range = pnn_chunks_per_range(p, &s->chunks);
  const int64_t begin = PNN_MAX(pnn_quotient(range.pixel, s->chunks.pixels) * per_range, at->first_chunk);
  const int64_t turn = PNN_MIN(pnn_quotient(begin, per_range) * per_range + per_range, at->end_chunk);
  const bool same_item = turn < at->end_chunk;
  pnn_range masked;
  pnn_chunk_locate(p, &s->chunks, same_item ? turn : at->first_chunk, &masked, &first);
  pnn_mask_ahead(p, &ahead, same_item ? at->k0 : at->next_k0, same_item ? at->maps : at->next_maps, &masked,
                 (chunk - begin) * shares + i, (turn - begin) * shares);
  if (++chunk < end) {
    /* Of the next chunk's input its pixels are shared out, or its channels. */
    int64_t channel = pnn_quotient(at->k0, p->masks);
    int64_t channels = pnn_quotient(at->k0 + at->maps - 1, p->masks) - channel + 1;
    int64_t *from = s->rows ? &first : &channel, *extent = s->rows ? &count : &channels;
    count = pnn_chunk_locate(p, &s->chunks, chunk, &range, &first);
    const int64_t share = pnn_quotient_up(*extent, shares);
    *from += i * share;
    *extent = PNN_MIN(share, *extent - i * share);
    pnn_ahead_add(p, &ahead, &range, first, count, &p->input, channel, channels, false);
    if (s->together)
      pnn_ahead_add(p, &ahead, &range, first, count, &p->grad_output, at->first, at->end - at->first, false);
  }
  return ahead;
}

/* One part's chunks. `masked` remembers whose masks the scratch holds; its pixel is -1 at first. */
static void sums_part(const pnn_sums *s, const pnn_sums_place at, const sums_scratch t, pnn_range *masked) {
  const pnn_problem *p = s->problem;
  const int64_t size = p->real_size;
  const pnn_response response = {.problem = p,
                                 .mask = t.mask,
                                 .mask_ld = pnn_mask_ld(p, s->chunks.pixels),
                                 .mask_k0 = at.k0,
                                 .mean = s->mean,
                                 .channels = t.channels};
  if (at.totals) memset(at.totals + at.first * size, 0, (size_t)((at.end - at.first) * size));
  if (at.maps) { /* rows that a last tile reads beyond the block's end */
    const int64_t more = (pnn_round_up(at.maps, p->kernels->dot_columns) - at.maps) * PNN_CHUNK;
    memset(t.maps + at.maps * PNN_CHUNK * size, 0, (size_t)(more * size));
    if (p->pairs) memset(t.map_pairs + at.maps * PNN_CHUNK * 2, 0, (size_t)(more * 2));
  }
  const bool fused = at.maps && !p->rounded && p->kernels->respond_dot[p->activation];
  /* Pairs of columns as they stand, or turned. */
  const bool copied = p->pairs && (pnn_columns_native(p, &p->grad_output) || pnn_columns_turned(p, &p->grad_output));
  pnn_columns columns;
  pnn_range range;
  int64_t part_first, end;
  pnn_chunks_part(&s->chunks, at.part, &part_first, &end);
  for (int64_t chunk = part_first; chunk < end; chunk++) {
    int64_t first;
    const int64_t count = pnn_chunk_locate(p, &s->chunks, chunk, &range, &first);
    if (range.pixel != masked->pixel) {
      *masked = range;
      if (at.maps) pnn_mask_panel(p, at.k0, at.maps, masked, t.mask, pnn_mask_ld(p, s->chunks.pixels));
    }
    pnn_columns_set(&columns, masked, first, count);
    /* Whole tiles of a chunk within one image are read where they stand, by the first products that use them. */
    const bool whole = fused && columns.columns == columns.padded && at.maps % p->kernels->dot_columns == 0;
    pnn_source source;
    const bool made = !whole || !pnn_response_source(&response, &columns, at.k0, 0, columns.columns, 0, &source);
    if (at.maps && made) {
      if (p->pairs)
        pnn_response_column_pairs(&response, &columns, at.k0, at.maps, t.map_pairs, t.maps, PNN_CHUNK);
      else
        pnn_response_operand(&response, &columns, at.k0, at.maps, t.maps, PNN_CHUNK);
    }
    for (int64_t o = at.first; o < at.end; o += OUTPUT_BLOCK) {
      const int64_t rows = PNN_MIN(OUTPUT_BLOCK, at.end - o), padded = pnn_round_up(rows, p->kernels->dot_rows);
      sums_source from = {.source = !made && o == at.first ? &source : NULL};
      if (whole && rows == padded)
        from.gradient = pnn_columns_place(p, &columns, &p->grad_output, o, 0, columns.columns);
      if (copied) {
        pnn_columns_copy(p, &columns, &p->grad_output, o, rows, t.output_pairs, PNN_CHUNK);
        memset(t.output_pairs + rows * PNN_CHUNK * 2, 0, (size_t)((padded - rows) * PNN_CHUNK * 2));
      } else if (!from.gradient) {
        pnn_columns_load(p, &columns, &p->grad_output, o, rows, t.outputs, PNN_CHUNK);
        memset(t.outputs + rows * PNN_CHUNK * size, 0, (size_t)((padded - rows) * PNN_CHUNK * size));
      }
      if (at.maps && p->pairs && !copied)
        p->kernels->pair_columns(t.output_pairs, PNN_CHUNK / 2, t.outputs, PNN_CHUNK, padded, columns.padded);
      if (from.source && rows != padded) { /* a tile of fewer outputs makes no panels */
        pnn_response_operand(&response, &columns, at.k0, at.maps, t.maps, PNN_CHUNK);
        from.source = NULL;
      }
      if (at.maps) {
        pnn_ahead ahead = pnn_sums_ahead(s, &at, chunk, end, o, OUTPUT_BLOCK);
        sums_products(s, &t, columns.padded, at.products + (o * p->group_maps + at.k) * size, rows, at.maps,
                      chunk == part_first, &from, &ahead);
      }
      if (at.totals) {
        if (copied)
          p->kernels->sum_bfloat16(columns.padded, t.output_pairs, PNN_CHUNK, rows, t.totals);
        else
          p->kernels->sum(columns.padded, t.outputs, PNN_CHUNK, rows, t.totals);
        add_reals(p, at.totals + o * size, t.totals, rows);
      }
    }
  }
}

static void sums_item(void *sums_, int32_t worker, int64_t item) {
  const pnn_sums *s = sums_;
  pnn_arena own = {.base = s->scratch + worker * s->scratch_bytes};
  const sums_scratch t = sums_take(s, &own);
  pnn_range masked = {.pixel = -1};
  for (int64_t part = 0; part < s->part_run; part++) sums_part(s, pnn_sums_locate(s, item, part), t, &masked);
}

/* The parts' tree, left in part 0, for the outputs [t, t + count). */
static void join_parts(const pnn_sums *s, char *parts, int64_t width, int64_t t, int64_t count) {
  const pnn_problem *p = s->problem;
  const int64_t part = p->outputs * width * p->real_size;
  char *first = parts + t * width * p->real_size;
  if (s->chunks.parts > 1) add_reals(p, first, first + part, count * width);
  if (s->chunks.parts > 3) add_reals(p, first + 2 * part, first + 3 * part, count * width);
  if (s->chunks.parts > 2) add_reals(p, first, first + 2 * part, count * width);
}

/* dV = G for the outputs [t, t + count). */
static void weight_store(const pnn_sums *s, int64_t t, int64_t count) {
  const pnn_problem *p = s->problem;
  const pnn_tensor *out = &p->params->grad_weight;
  const int64_t step = p->outputs > 1 ? out->stride[0] : 0;
  p->kernels->store[out->dtype]((char *)out->data + t * step * pnn_dtype_size(out->dtype), step,
                                p->group_maps > 1 ? out->stride[1] : 1, s->maps_part + t * p->group_maps * p->real_size,
                                p->group_maps, count, p->group_maps);
}

#define JOIN_OUTPUTS 16

static void join_item(void *sums_, int32_t worker, int64_t item) {
  (void)worker;
  const pnn_sums *s = sums_;
  const int64_t t = item * JOIN_OUTPUTS, count = PNN_MIN(JOIN_OUTPUTS, s->problem->outputs - t);
  join_parts(s, s->outputs_part, 1, t, count);
  if (s->products) join_parts(s, s->maps_part, s->problem->group_maps, t, count);
  if (s->stores) weight_store(s, t, count);
}

/* Response maps of an item. */
static int64_t sums_maps(const pnn_sums *s, int64_t threads) {
  const pnn_problem *p = s->problem;
  const int64_t wide = p->near_bytes / PNN_CHUNK / p->real_size, strip = p->kernels->strip_columns;
  const int64_t few = PNN_MAX(PNN_MIN(p->group_maps, wide / 2), 1);
  if (!s->rows || p->pairs) return few;
  const int64_t one = (PNN_CHUNK + (p->shared ? 0 : pnn_mask_rows(p, 1) * s->chunks.pixels)) * p->real_size;
  const int64_t most = PNN_MIN(wide, WIDE_BYTES / one) / strip * strip;
  const int64_t blocks = pnn_quotient_up(p->group_maps, PNN_MAX(most, few));
  const int64_t many = PNN_MIN(pnn_round_up(pnn_quotient_up(p->group_maps, blocks), strip), p->group_maps);
  /* Not where fewer items would leave threads idle. */
  const int64_t parts = p->groups * s->chunks.parts, few_blocks = pnn_quotient_up(p->group_maps, few);
  const bool even =
      pnn_quotient_up(parts * blocks, threads) * many <= pnn_quotient_up(parts * few_blocks, threads) * few;
  return even ? PNN_MAX(many, few) : few;
}

static pnn_sums sums_prepare(const pnn_problem *p, const pnn_host *host, bool products, pnn_arena *arena) {
  pnn_sums s = {.problem = p, .chunks = pnn_chunks_make(p), .products = products};
  s.stores = p->params->grad_weight.data && !p->norm;
  s.rows = p->group_maps > FEW_MAPS && pnn_rows_fit(p, &p->grad_output, NULL);
  const int64_t threads = host ? host->threads : 1, wanted = 2 * threads;
  s.block = sums_maps(&s, threads);
  s.map_blocks = products ? PNN_MAX(pnn_quotient_up(p->group_maps, s.block), 1) : 1;
  /* Outputs are split only where parts and maps leave threads idle: each split computes the response maps again. */
  const int64_t have = p->groups * s.chunks.parts * s.map_blocks;
  /* Parts over the same pixels share the making of their masks where that leaves enough items to deal out evenly. */
  s.part_run = 1;
  while (s.part_run * 2 <= s.chunks.parts && s.chunks.parts % (s.part_run * 2) == 0 &&
         have / (s.part_run * 2) >= 4 * wanted)
    s.part_run *= 2;
  s.output_cuts = PNN_MAX(1, PNN_MIN(pnn_quotient_up(wanted, have), p->group_outputs / OUTPUT_BLOCK));
  s.output_rows = pnn_round_up(pnn_quotient_up(p->group_outputs, s.output_cuts), OUTPUT_BLOCK);
  /* The outputs that are packed at a time are but a line or two of a pixel's row: those of all come with the input
   * where they fit; with pairs always, since they are less than a line. */
  s.together = s.rows && (p->pairs || s.output_rows * PNN_CHUNK * p->native <= p->near_bytes / 2);
  s.outputs_part = pnn_arena_take(arena, s.chunks.parts * p->outputs, p->real_size);
  if (products) {
    int64_t count;
    if (__builtin_mul_overflow(s.chunks.parts * p->outputs, p->group_maps, &count)) count = INT64_MAX;
    s.maps_part = pnn_arena_take(arena, count, p->real_size);
  }
  return s;
}

static int64_t sums_items(const pnn_sums *s) {
  return s->chunks.count ? s->problem->groups * (s->chunks.parts / s->part_run) * s->map_blocks * s->output_cuts : 0;
}

static void sums_scratch_prepare(pnn_sums *s, const pnn_host *host, pnn_arena *arena) {
  pnn_arena one = {.base = NULL};
  if (s->rows)
    pnn_rows_sums_scratch(s, &one);
  else
    sums_take(s, &one);
  s->scratch_bytes = (int64_t)one.used;
  s->workers = pnn_workers(host, sums_items(s));
  s->scratch = pnn_arena_take(arena, s->workers, s->scratch_bytes);
  arena->overflow |= one.overflow;
}

static void sums_run(pnn_sums *s, const pnn_host *host) {
  const pnn_problem *p = s->problem;
  if (sums_items(s) == 0) { /* no pixels: the sums are 0 */
    memset(s->outputs_part, 0, (size_t)(s->chunks.parts * p->outputs * p->real_size));
    if (s->products) memset(s->maps_part, 0, (size_t)(s->chunks.parts * p->outputs * p->group_maps * p->real_size));
  }
  pnn_parallel(host, sums_items(s), s->rows ? pnn_rows_sums_item : sums_item, s);
  pnn_parallel(pnn_weights_host(p, host), (p->outputs + JOIN_OUTPUTS - 1) / JOIN_OUTPUTS, join_item, s);
}

/* ---- input and masks ---- */

#define INPUT_MAPS 64      /* response maps at a time, at least one channel's */
#define INPUT_OUTPUTS 1024 /* outputs at a time, where all maps' sums can wait for the next ones */

typedef struct inputs_scratch {
  char *gradient, *pairs, *d, *u, *c, *mask, *channels, *mask_gradient;
} inputs_scratch;

static inputs_scratch inputs_take(const pnn_inputs *in, pnn_arena *arena) {
  const pnn_problem *p = in->problem;
  const int64_t size = p->real_size;
  inputs_scratch s;
  memset(&s, 0, sizeof s);
  s.gradient = pnn_arena_take(arena, in->depth * in->ld, size);
  if (p->pairs) s.pairs = pnn_arena_take(arena, (in->depth + 1) / 2 * in->ld, 4);
  s.d = pnn_arena_take(arena, in->packing.block_tiles * in->packing.tile * in->ld, size);
  s.u = pnn_arena_take(arena, in->block * in->ld, size);
  if (in->affine && in->steps) s.c = pnn_arena_take(arena, in->block * in->ld, size);
  s.mask = pnn_arena_take(arena, pnn_mask_rows(p, in->slab) * pnn_mask_ld(p, in->deal.pixels), size);
  if (p->masks > 1)
    s.channels = pnn_arena_take(arena, PNN_MAX(pnn_response_channels(p, in->block), in->window) * in->ld, size);
  return s;
}

/* Where the products of da start; as many as any tile has rows. */
static const double zero_start[16];

/* Whether a tensor's rows of pixels can be read and written where they stand. */
static bool in_place(const pnn_problem *p, const pnn_view *v) {
  return v->element == p->real_size && v->column == 1 && (p->out_height == 1 || v->row == p->out_width);
}

pnn_norm_terms pnn_inputs_norm_terms(const pnn_inputs *in, int64_t k0) {
  pnn_norm_terms terms = {NULL, NULL, NULL};
  if (!in->affine) return terms;
  const int64_t from = k0 * in->problem->real_size;
  terms.mean = (const char *)in->mean + from;
  terms.offset = (const char *)in->offset + from;
  terms.slope = (const char *)in->slope + from;
  return terms;
}

/* From da to the gradient of the block's channels in one go, for columns that begin at `first` of the panels. An input
 * that can't be read where it stands is loaded, and a gradient stored, a window of channels at a time: turned in
 * registers where they are neighbours. */
static void inputs_block(const pnn_inputs *in, const inputs_scratch *s, const pnn_columns *columns, int64_t first,
                         int64_t k, int64_t k0, int64_t maps) {
  const pnn_problem *p = in->problem;
  const pnn_view *x = &p->input, *dx = &p->grad_input;
  const int64_t size = p->real_size, channel = k0 / p->masks, channels = maps / p->masks;
  const int64_t at = k / p->masks % in->window, left = p->group_channels - k / p->masks; /* in the window; group */
  const bool read = in_place(p, x), write = in_place(p, dx);
  char *const d_panel = s->d + first * size, *const x_panel = s->u + (at * in->ld + first) * size;
  /* Beside the products of its later blocks. */
  char *const dx_window = in->window > in->block / p->masks ? s->channels + first * size : d_panel;
  char *const dx_panel = dx_window + at * in->ld * size;
  const pnn_norm_terms norm = pnn_inputs_norm_terms(in, k0);
  if (!read && at == 0) pnn_columns_load(p, columns, x, channel, PNN_MIN(in->window, left), x_panel, in->ld);
  const int64_t mask_row = p->shared ? 0 : k % in->slab;
  const char *mask = p->noise == PNN_NOISE_NONE ? NULL : s->mask + mask_row * pnn_mask_ld(p, in->deal.pixels) * size;
  for (int64_t i = 0; i < columns->segments; i++) {
    const pnn_segment *g = &columns->segment[i];
    char *d = d_panel + g->column * size, *from = x_panel + g->column * size, *to = dx_panel + g->column * size;
    if (read) from = x->data + (g->image * x->batch + channel * x->channel + g->pixel) * size;
    if (write) to = dx->data + (g->image * dx->batch + channel * dx->channel + g->pixel) * size;
    const char *n = mask ? mask + (g->pixel - columns->range->pixel) * size : NULL;
    const int64_t to_ld = write ? dx->channel : in->ld, from_ld = read ? x->channel : in->ld;
    p->kernels->respond_grad[p->activation](to, to_ld, d, in->ld, from, from_ld, n, pnn_mask_ld(p, in->deal.pixels),
                                            in->affine ? &norm : NULL, channels, g->columns, p->masks, p->shared);
  }
  if (!write && (at + channels == in->window || channels == left))
    pnn_columns_store(p, columns, dx, channel - at, at + channels, dx_window, in->ld);
}

/* The same in steps, where d is wanted for the gradient of the masks too, or c has to be rounded on the way. */
static void inputs_block_in_steps(const pnn_inputs *in, const inputs_scratch *s, const pnn_response *response,
                                  const pnn_columns *columns, int64_t k0, int64_t maps) {
  const pnn_problem *p = in->problem;
  const pnn_kernels *kernels = p->kernels;
  const int64_t size = p->real_size;
  pnn_response_perturbed(response, columns, k0, maps, s->u, in->ld);
  if (in->affine) {
    pnn_response_operand(response, columns, k0, maps, s->c, in->ld);
    kernels->affine(s->d, in->ld, s->c, in->ld, (const char *)in->offset + k0 * size,
                    (const char *)in->slope + k0 * size, maps, columns->padded);
  }
  kernels->activate_grad[p->activation](s->d, in->ld, s->u, in->ld, maps, columns->padded);
  if (in->masks)
    for (int64_t r = 0; r < maps; r++) {
      const int64_t row = p->shared ? (k0 + r) % p->masks : k0 + r;
      for (int64_t i = 0; i < columns->segments; i++) {
        const pnn_segment *g = &columns->segment[i];
        add_reals(p,
                  s->mask_gradient + (row * pnn_mask_ld(p, in->deal.pixels) + g->pixel - columns->range->pixel) * size,
                  s->d + (r * in->ld + g->column) * size, g->columns);
      }
    }
  if (!p->grad_input.data) return;
  const int64_t channels = maps / p->masks;
  for (int64_t c = 0; c < channels && p->masks > 1; c++) {
    char *first = s->d + c * p->masks * in->ld * size;
    for (int64_t m = 1; m < p->masks; m++) add_reals(p, first, first + m * in->ld * size, columns->columns);
  }
  pnn_columns_store(p, columns, &p->grad_input, k0 / p->masks, channels, s->d, p->masks * in->ld);
}

/* The tiles of a panel's columns, and where they go. */
typedef struct inputs_tile {
  const char *gradient; /* where the tensor holds the group's first output of these columns, or NULL */
  bool fused;           /* from the products to the input's gradient in one kernel */
} inputs_tile;

/* Finds what can be read and written where it stands, and loads the rest of the gradient's panel, outputs [first, first
 * + depth) of the group. */
static void inputs_tiles(const pnn_inputs *in, const inputs_scratch *s, const pnn_columns *columns, int64_t column,
                         int64_t group, int64_t first, int64_t depth, inputs_tile *tiles) {
  const pnn_problem *p = in->problem;
  const int64_t tile = p->tile_columns, t = group * p->group_outputs + first, channel = group * p->group_channels;
  const bool kernel = p->pairs ? p->kernels->product_pairs_respond_grad[p->activation] != NULL
                               : !p->rounded && p->kernels->product_respond_grad[p->activation];
  const bool fused = p->masks == 1 && !in->steps && kernel && depth == p->group_outputs;
  const bool paired = p->pairs && (pnn_columns_native(p, &p->grad_output) || pnn_columns_turned(p, &p->grad_output));
  for (int64_t j = 0, next; j < columns->columns; j = next) {
    for (next = j; next < columns->columns; next += tile) {
      inputs_tile *at = &tiles[pnn_quotient(next, tile)];
      at->fused = fused && pnn_columns_place(p, columns, &p->input, channel, next, tile) &&
                  pnn_columns_place(p, columns, &p->grad_input, channel, next, tile);
      at->gradient = p->pairs || !p->group_maps ? NULL : pnn_columns_place(p, columns, &p->grad_output, t, next, tile);
      if (at->gradient) break;
    }
    if (next > j) {
      pnn_columns part;
      pnn_columns_part(&part, columns, column, j, PNN_MIN(next, columns->columns));
      if (paired)
        pnn_columns_pair(p, &part, &p->grad_output, t, depth, s->pairs + j * 4, in->ld);
      else
        pnn_columns_load(p, &part, &p->grad_output, t, depth, s->gradient + j * p->real_size, in->ld);
    }
    next += tile;
  }
  if (p->pairs && !paired) p->kernels->pair_rows(s->pairs, s->gradient, in->ld, depth, columns->padded);
}

/* One tile of da over `depth` outputs, from `start` or going on, from the gradient's columns from j on; `gradient`
 * NULL: they are in the panel already. */
static void inputs_product(const pnn_inputs *in, const inputs_scratch *s, const void *a, int64_t depth, int64_t rows,
                           const void *start, const char *gradient, int64_t j, char *to, pnn_ahead *ahead) {
  const pnn_problem *p = in->problem;
  char *const panel = s->gradient + j * p->real_size;
  if (p->pairs) {
    p->kernels->product_pairs((depth + 1) / 2, a, s->pairs + j * 4, in->ld, to, in->ld, start, NULL, 0, ahead);
  } else if (gradient) {
    const pnn_source source = {.x = gradient, .ldx = p->grad_output.channel, .masks = 1};
    p->kernels->respond_product[PNN_ACTIVATION_IDENTITY](depth, rows, a, panel, in->ld, to, in->ld, start, &source,
                                                         ahead);
  } else {
    p->kernels->product(depth, rows, a, panel, in->ld, to, in->ld, start, ahead);
  }
}

/* The response maps k0, ... of a tile, to the end. */
static void inputs_fused(const pnn_inputs *in, const inputs_scratch *s, const pnn_source *source, const void *a,
                         const char *gradient, int64_t j, char *dx, int64_t k0, int64_t maps, pnn_ahead *ahead) {
  const pnn_problem *p = in->problem;
  if (p->pairs) {
    p->kernels->product_pairs_respond_grad[p->activation]((p->group_outputs + 1) / 2, a, s->pairs + j * 4, in->ld, dx,
                                                          p->grad_input.channel, maps, source, ahead);
    return;
  }
  const pnn_norm_terms norm = pnn_inputs_norm_terms(in, k0);
  p->kernels->product_respond_grad[p->activation](p->group_outputs, a, gradient, p->grad_output.channel,
                                                  s->gradient + j * p->real_size, in->ld, dx, p->grad_input.channel,
                                                  maps, source, in->affine ? &norm : NULL, ahead);
}

/* The products of one block of maps with the outputs [first, first + depth) of the group; `copies`: the first tile
 * copies the gradient to the panel. */
static void inputs_products(const pnn_inputs *in, const inputs_scratch *s, const pnn_response *response,
                            const pnn_columns *columns, const inputs_tile *tiles, int64_t group, int64_t block,
                            bool copies, int64_t first, int64_t depth, pnn_ahead *ahead) {
  const pnn_problem *p = in->problem;
  const int64_t k = block * in->block, k0 = group * p->group_maps + k, maps = PNN_MIN(in->block, p->group_maps - k);
  const int64_t rows = p->tile_rows, wide = p->tile_columns;
  pnn_source source[PNN_WIDEST / 4]; /* of a fused tile's first response maps, and where its gradient goes */
  char *dx[PNN_WIDEST / 4];
  for (int64_t j = 0, n = 0; j < columns->columns; j += wide, n++)
    if (tiles[n].fused) { /* one mask a channel */
      pnn_response_source(response, columns, k0, j, wide, 0, &source[n]);
      dx[n] = pnn_columns_place(p, columns, &p->grad_input, k0, j, wide);
    }
  for (int64_t i = 0, tile = 0; i < maps; i += rows, tile++) {
    const void *a = pnn_packing_tile(p, &in->packing, in->packed, group, block, tile, first);
    for (int64_t j = 0, n = 0; j < columns->columns; j += wide, n++) {
      const inputs_tile *at = &tiles[n];
      const char *gradient = copies && i == 0 ? at->gradient : NULL;
      if (at->fused) {
        const pnn_source from = pnn_source_at(p, &source[n], i);
        inputs_fused(in, s, &from, a, gradient, j, dx[n] + i * p->grad_input.channel * p->native, k0 + i,
                     PNN_MIN(rows, maps - i), ahead);
      } else {
        inputs_product(in, s, a, depth, PNN_MIN(rows, maps - i), first ? NULL : zero_start, gradient, j,
                       s->d + (i * in->ld + j) * p->real_size, ahead);
      }
    }
  }
}

/* The response maps [slab, slab + in->slab) of the group, for the piece [begin, end). */
static void inputs_slab(const pnn_inputs *in, const inputs_scratch *s, int64_t group, int64_t slab,
                        const pnn_range *range, int64_t begin, int64_t end) {
  const pnn_problem *p = in->problem;
  const int64_t k_first = group * p->group_maps, width = p->tile_columns;
  const int64_t slab_maps = PNN_MIN(in->slab, p->group_maps - slab), slab_end = slab + slab_maps;
  const int64_t first_block = slab / PNN_MAX(in->block, 1);
  const int64_t end_block = in->slab < p->group_maps ? pnn_quotient_up(slab_end, in->block) : in->packing.blocks;
  const int64_t channel = (k_first + slab) / p->masks, channels = slab_maps / p->masks;
  const pnn_response response = {.problem = p,
                                 .mask = s->mask,
                                 .mask_ld = pnn_mask_ld(p, in->deal.pixels),
                                 .mask_k0 = k_first + slab,
                                 .mean = in->mean,
                                 .channels = s->channels};
  pnn_mask_panel(p, k_first + slab, slab_maps, range, s->mask, pnn_mask_ld(p, in->deal.pixels));
  pnn_columns columns;
  inputs_tile tiles[PNN_WIDEST / 4];
  /* The gradient of a mask that many maps share adds up image by image, and in an image map by map, however few pixels
   * a range has: no panel has a pixel twice. */
  const int64_t panel = in->masks && p->shared ? PNN_MIN(in->width, range->pixels) : in->width;
  for (int64_t column = begin; column < end; column += panel) {
    pnn_columns_set(&columns, range, column, PNN_MIN(panel, end - column));
    const int64_t next = column + panel, count = PNN_MIN(panel, end - next);
    const int64_t tile_steps = p->group_outputs / (p->pairs ? 2 : 1) / PNN_AHEAD_DEPTH + 1;
    pnn_ahead ahead = {.streams = 0};
    if (p->grad_input.data)
      pnn_ahead_add(p, &ahead, range, column, columns.columns, &p->grad_input, channel, channels, true);
    pnn_ahead_add(p, &ahead, range, next, count, &p->grad_output, group * p->group_outputs, p->group_outputs, false);
    pnn_ahead_add(p, &ahead, range, next, count, &p->input, channel, channels, false);
    pnn_mask_ahead(p, &ahead, k_first + slab_end, PNN_MIN(in->slab, p->group_maps - slab_end), range,
                   pnn_quotient(column - begin, panel), pnn_quotient_up(end - begin, panel));
    pnn_ahead_spread(
        &ahead, (end_block - first_block) * in->packing.block_tiles * pnn_quotient(columns.padded, width) * tile_steps);
    /* But for the last outputs there is one block of maps, whose sums wait for the next ones. */
    int64_t first = 0, depth = in->depth;
    for (; first + depth < p->group_outputs; first += depth) {
      inputs_tiles(in, s, &columns, column, group, first, depth, tiles);
      inputs_products(in, s, &response, &columns, tiles, group, 0, true, first, depth, &ahead);
    }
    depth = p->group_outputs - first;
    inputs_tiles(in, s, &columns, column, group, first, depth, tiles);
    for (int64_t block = first_block; block < end_block; block++) {
      const int64_t k = block * in->block, maps = PNN_MIN(in->block, p->group_maps - k);
      inputs_products(in, s, &response, &columns, tiles, group, block, block == first_block, first, depth, &ahead);
      if (in->steps) {
        inputs_block_in_steps(in, s, &response, &columns, k_first + k, maps);
        continue;
      }
      for (int64_t j = 0, rest; j < columns.columns; j = rest) {
        for (rest = j; rest < columns.columns && !tiles[pnn_quotient(rest, width)].fused; rest += width) continue;
        if (rest > j) {
          pnn_columns part;
          pnn_columns_part(&part, &columns, column, j, PNN_MIN(rest, columns.columns));
          inputs_block(in, s, &part, j, k, k_first + k, maps);
        }
        rest += width;
      }
    }
  }
}

static void inputs_group(const pnn_inputs *in, const inputs_scratch *s, int64_t group, const pnn_range *range,
                         int64_t column, int64_t end) {
  const int64_t maps = in->problem->group_maps;
  for (int64_t slab = 0; slab < maps || slab == 0; slab += PNN_MAX(in->slab, 1))
    inputs_slab(in, s, group, slab, range, column, end);
}

static void inputs_item(void *inputs_, int32_t worker, int64_t item) {
  const pnn_inputs *in = inputs_;
  const pnn_problem *p = in->problem;
  const int64_t pieces = in->deal.ranges * in->deal.cuts;
  pnn_range range;
  int64_t column, end;
  pnn_deal_piece(p, &in->deal, item % pieces, &range, &column, &end);
  pnn_arena own = {.base = in->scratch + worker * in->scratch_bytes};
  inputs_scratch s = inputs_take(in, &own);
  if (!in->masks) {
    if (column < end) inputs_group(in, &s, item / pieces, &range, column, end);
    return;
  }
  s.mask_gradient = in->mask_gradients + worker * in->mask_gradient_bytes;
  memset(s.mask_gradient, 0, (size_t)in->mask_gradient_bytes);
  for (int64_t group = 0; group < p->groups; group++) inputs_group(in, &s, group, &range, column, end);
  pnn_mask_grad_store(p, &range, s.mask_gradient, pnn_mask_ld(p, in->deal.pixels));
}

/* Response maps at a time: whole channels, of which a last block of few would be packed at the size of a whole one. */
static int64_t input_maps(const pnn_problem *p, bool rows) {
  const int64_t most = PNN_MIN(p->masks * PNN_MAX(1, INPUT_MAPS / p->masks), p->group_maps);
  if (rows || most == 0) return most;
  const int64_t blocks = pnn_quotient_up(p->group_maps, most), even = pnn_quotient_up(p->group_maps, blocks);
  return PNN_MIN(pnn_round_up(even, p->masks == 1 ? p->tile_rows : p->masks), most);
}

/* `spare` (or NULL) offers spare_bytes that the packed weights may take. */
static pnn_inputs inputs_prepare(const pnn_problem *p, const pnn_host *host, bool affine, void *spare,
                                 int64_t spare_bytes, pnn_arena *arena) {
  pnn_inputs in = {.problem = p, .masks = p->grad_mask.data != NULL, .affine = affine};
  in.steps = in.masks || (affine && p->rounded);
  in.rows = !in.steps && p->group_maps > FEW_MAPS && pnn_rows_fit(p, &p->grad_output, &p->grad_input);
  in.block = input_maps(p, in.rows);
  /* Blocks of few channels share a window, since fewer than a vector's lanes can't be turned. */
  const int64_t block_channels = PNN_MAX(in.block / p->masks, 1);
  in.window = in.block < p->group_maps ? block_channels * PNN_MAX(1, PNN_LANES / block_channels) : block_channels;
  /* With more than one mask a channel the response maps outweigh the tensors, and their masks want short ranges. */
  in.width =
      p->masks == 1 && !in.masks ? pnn_panel_columns(p, PNN_MAX(p->group_outputs, in.block), p->group_maps) : PNN_PANEL;
  int64_t unit = PNN_PANEL;
  if (in.rows) {
    unit = pnn_rows_tile(p, in.block);
    in.width = pnn_rows_width(p, in.width, in.block);
  }
  in.ld = pnn_panel_ld(p, in.width);
  in.packing = pnn_packing_backward(p, in.rows ? p->kernels->strip_columns : p->tile_rows, in.block);
  in.slab = p->group_maps;
  in.deal = pnn_deal_columns(p, host, in.rows ? PNN_PANEL : in.width, unit,
                             in.masks ? p->maps : pnn_mask_rows(p, p->group_maps), in.masks ? 1 : p->groups, in.masks);
  /* With many maps a panel's masks would fill the second-level cache. A channel's gradient needs its own maps only, so
   * the maps become the outermost loop: a window's masks serve the whole piece while the next ones are on their way. */
  const int64_t slab = in.block ? in.window / block_channels * in.block : 0;
  if (!in.masks && p->masks > 1 && !p->shared && p->noise == PNN_NOISE_TENSOR && slab < p->group_maps &&
      pnn_columns_native(p, &p->grad_output) && /* else each slab would turn it again */
      pnn_mask_rows(p, p->group_maps) * in.deal.pixels * p->real_size > p->near_bytes) {
    in.slab = slab;
    in.deal = pnn_deal_columns(p, host, in.width, PNN_PANEL, pnn_mask_rows(p, slab), p->groups, true);
  }
  in.depth = in.packing.blocks == 1 ? PNN_MIN(p->group_outputs, INPUT_OUTPUTS) : p->group_outputs;
  const int64_t bytes = pnn_packing_bytes(p, &in.packing);
  in.packed = spare_bytes > 0 && bytes <= spare_bytes ? spare : pnn_arena_take(arena, 1, bytes);
  if (affine) {
    in.offset = pnn_arena_take(arena, p->maps, p->real_size);
    in.slope = pnn_arena_take(arena, p->maps, p->real_size);
  }
  return in;
}

static int64_t inputs_items(const pnn_inputs *in) {
  return in->deal.ranges * in->deal.cuts * (in->masks ? 1 : in->problem->groups);
}

/* `spare` (or NULL) offers spare_bytes that the scratch may take. */
static void inputs_scratch_prepare(pnn_inputs *in, const pnn_host *host, void *spare, int64_t spare_bytes,
                                   pnn_arena *arena) {
  pnn_arena one = {.base = NULL};
  if (in->rows)
    pnn_rows_inputs_scratch(in, &one);
  else
    inputs_take(in, &one);
  in->scratch_bytes = (int64_t)one.used;
  const int64_t workers = pnn_workers(host, inputs_items(in));
  in->scratch = in->scratch_bytes <= spare_bytes / PNN_MAX(workers, 1)
                    ? spare
                    : pnn_arena_take(arena, workers, in->scratch_bytes);
  if (in->masks) {
    pnn_arena sums = {.base = NULL};
    pnn_arena_take(&sums, pnn_mask_rows(in->problem, in->problem->maps) * pnn_mask_ld(in->problem, in->deal.pixels),
                   in->problem->real_size);
    in->mask_gradient_bytes = (int64_t)sums.used;
    in->mask_gradients = pnn_arena_take(arena, workers, in->mask_gradient_bytes);
    arena->overflow |= sums.overflow;
  }
  arena->overflow |= one.overflow;
}

/* ---- pixels that a stride leaves out ---- */

typedef struct zeros {
  const pnn_tensor *tensor;
} zeros;

static void zeros_item(void *zeros_, int32_t worker, int64_t item) {
  (void)worker;
  const pnn_tensor *t = ((const zeros *)zeros_)->tensor;
  const int64_t size = pnn_dtype_size(t->dtype), a = item / t->size[1], b = item % t->size[1];
  for (int64_t i = 0; i < t->size[2]; i++) {
    char *row = (char *)t->data + (a * t->stride[0] + b * t->stride[1] + i * t->stride[2]) * size;
    if (t->stride[3] == 1)
      memset(row, 0, (size_t)(t->size[3] * size));
    else
      for (int64_t j = 0; j < t->size[3]; j++) memset(row + j * t->stride[3] * size, 0, (size_t)size);
  }
}

/* An output that the products will not write in full: cleared first. */
static void clear(const pnn_problem *p, const pnn_host *host, const pnn_tensor *tensor) {
  if (!tensor->data) return;
  if (p->stride[0] == 1 && p->stride[1] == 1 && p->batch > 0) return;
  zeros z = {tensor};
  if (tensor->size[2] > 0 && tensor->size[3] > 0) pnn_parallel(host, tensor->size[0] * tensor->size[1], zeros_item, &z);
}

/* ---- the pass ---- */

typedef struct algebra {
  double *s1, *s2; /* [K] */
} algebra;

typedef struct algebra_job {
  const pnn_problem *problem;
  const pnn_sums *sums;
  const pnn_norm *norm;
  const void *weights;
  algebra *algebra;
} algebra_job;

#define ALGEBRA_MAPS 64
#define ALGEBRA_OUTPUTS 16

/* S1 and S2 of up to 64 maps. */
static void normalisation_item(void *job_, int32_t worker, int64_t item) {
  (void)worker;
  const algebra_job *job = job_;
  const pnn_problem *p = job->problem;
  const int64_t blocks = (p->group_maps + ALGEBRA_MAPS - 1) / ALGEBRA_MAPS, group = item / blocks;
  const int64_t first = item % blocks * ALGEBRA_MAPS, end = PNN_MIN(first + ALGEBRA_MAPS, p->group_maps);
  double *s1 = job->algebra->s1 + group * p->group_maps, *s2 = job->algebra->s2 + group * p->group_maps;
  for (int64_t k = first; k < end; k++) s1[k] = s2[k] = 0;
  for (int64_t t = group * p->group_outputs; t < (group + 1) * p->group_outputs; t++) {
    const double h = pnn_real_get(p, job->sums->outputs_part, t);
    for (int64_t k = first; k < end; k++) {
      const double v = pnn_real_get(p, job->weights, t * p->group_maps + k);
      s1[k] += v * h;
      if (job->sums->products) s2[k] += v * pnn_real_get(p, job->sums->maps_part, t * p->group_maps + k);
    }
  }
}

static void normalisation_sums(const pnn_problem *p, const pnn_host *host, const pnn_sums *s, const void *weights,
                               algebra *a) {
  algebra_job job = {.problem = p, .sums = s, .weights = weights, .algebra = a};
  const int64_t blocks = (p->group_maps + ALGEBRA_MAPS - 1) / ALGEBRA_MAPS;
  pnn_parallel(pnn_weights_host(p, host), p->groups * blocks, normalisation_item, &job);
}

/* dV with normalisation's algebra, for up to 16 outputs. */
static void weight_store_item(void *job_, int32_t worker, int64_t item) {
  (void)worker;
  const algebra_job *job = job_;
  const pnn_problem *p = job->problem;
  pnn_tensor out = p->params->grad_weight;
  const int64_t size = pnn_dtype_size(out.dtype), columns = p->group_maps;
  const int64_t step = p->outputs > 1 ? out.stride[0] : 0, column_step = columns > 1 ? out.stride[1] : 1;
  const int64_t end = PNN_MIN((item + 1) * ALGEBRA_OUTPUTS, p->outputs);
  char *const data = out.data;
  out.stride[0] = column_step;
  double piece[ALGEBRA_MAPS];
  for (int64_t t = item * ALGEBRA_OUTPUTS; t < end; t++) {
    const int64_t base = t / p->group_outputs * columns;
    const double h = pnn_real_get(p, job->sums->outputs_part, t);
    for (int64_t first = 0; first < columns; first += ALGEBRA_MAPS) {
      const int64_t count = PNN_MIN(ALGEBRA_MAPS, columns - first);
      for (int64_t i = 0; i < count; i++) {
        const double g = pnn_real_get(p, job->sums->maps_part, t * columns + first + i);
        piece[i] = job->norm->scale[base + first + i] * g + h * job->norm->beta[base + first + i];
      }
      out.data = data + (t * step + first * column_step) * size;
      pnn_vector_store(&out, count, piece);
    }
  }
}

static void weight_store_norm(const pnn_problem *p, const pnn_host *host, const pnn_sums *s, const pnn_norm *norm) {
  algebra_job job = {.problem = p, .sums = s, .norm = norm};
  pnn_parallel(pnn_weights_host(p, host), (p->outputs + ALGEBRA_OUTPUTS - 1) / ALGEBRA_OUTPUTS, weight_store_item,
               &job);
}

void pnn_backward_pass(const pnn_problem *problem, const pnn_host *host, pnn_arena *arena, bool run) {
  const pnn_problem *p = problem;
  const pnn_params *params = p->params;
  const bool want_inputs = params->grad_input.data || params->grad_mask.data;
  const bool affine = p->training && want_inputs;
  const bool want_products = params->grad_weight.data || affine || (p->norm && params->grad_norm_weight.data);
  const bool want_sums = want_products || params->grad_bias.data || (p->norm && params->grad_norm_bias.data);

  double *row = pnn_arena_take(arena, p->outputs, 8);
  pnn_norm norm = {NULL, NULL, NULL, NULL, NULL, NULL, NULL};
  algebra a = {NULL, NULL};
  if (p->norm) {
    pnn_norm_plan(p, arena, &norm);
    a.s1 = pnn_arena_take(arena, p->maps, 8);
    a.s2 = pnn_arena_take(arena, p->maps, 8);
  }
  pnn_sums s;
  pnn_inputs in;
  if (want_sums) s = sums_prepare(p, host, want_products, arena);
  /* The weights are read and packed after the sums, when the parts of G but the first are free, each as large as they.
   * Packed weights keep to the workspace's alignment. Then the other parts are free for the workers. */
  int64_t part;
  if (__builtin_mul_overflow(p->outputs * p->group_maps, p->real_size, &part)) part = 0; /* the arena reports it */
  const int64_t parts = want_products ? s.chunks.parts : 1;
  char *const free_parts = parts > 1 && arena->base ? s.maps_part + part : NULL;
  void *room = parts > 1 ? free_parts : pnn_arena_take(arena, p->outputs * p->group_maps, p->real_size);
  const bool reuse = parts > 3 && part % 64 == 0 && part <= INT64_MAX / 2;
  if (want_inputs)
    in = inputs_prepare(p, host, affine, free_parts ? free_parts + part : NULL, reuse ? 2 * part : 0, arena);
  /* One after the other, the two share their workers' scratch. */
  pnn_arena sums_arena = *arena;
  if (want_sums) sums_scratch_prepare(&s, host, &sums_arena);
  const int64_t spare_parts = parts > 1 && part <= INT64_MAX / 4 ? (reuse ? 2 : parts) : 0;
  if (want_inputs) inputs_scratch_prepare(&in, host, free_parts ? s.maps_part : NULL, spare_parts * part, arena);
  arena->used = PNN_MAX(arena->used, sums_arena.used);
  arena->overflow |= sums_arena.overflow;
  if (!run || !pnn_arena_fits(arena)) return;

  const int64_t n = p->batch * p->pixels;
  if (p->norm) {
    pnn_vector_load(&params->mean, p->maps, 0, norm.mean);
    pnn_vector_load(&params->variance, p->maps, 0, norm.variance);
    pnn_norm_fill(p, &norm);
  }
  if (want_sums) {
    s.mean = norm.mean_reals;
    sums_run(&s, host);
  }
  const void *weights = pnn_weights_read(p, room);
  if (want_sums) {
    for (int64_t t = 0; t < p->outputs; t++) row[t] = pnn_real_get(p, s.outputs_part, t);
    pnn_vector_store(&params->grad_bias, p->outputs, row);
    if (p->norm) {
      normalisation_sums(p, host, &s, weights, &a);
      pnn_vector_store(&params->grad_norm_bias, p->maps, a.s1);
      if (params->grad_norm_weight.data) {
        /* dgamma = r * S2, in place of gamma, which is not read again. */
        for (int64_t k = 0; k < p->maps; k++) norm.gamma[k] = norm.inverse[k] * a.s2[k];
        pnn_vector_store(&params->grad_norm_weight, p->maps, norm.gamma);
      }
    }
    if (params->grad_weight.data && p->norm) weight_store_norm(p, host, &s, &norm);
  }
  if (!want_inputs) return;
  clear(p, host, &params->grad_input);
  clear(p, host, &params->grad_mask);
  if (n == 0) return;
  if (affine) {
    for (int64_t k = 0; k < p->maps; k++) {
      const double alpha = norm.scale[k], r = norm.inverse[k];
      norm.gamma[k] = -alpha * a.s1[k] / (double)n;
      norm.beta[k] = -alpha * r * r * a.s2[k] / (double)n;
    }
    pnn_reals_store(p, p->maps, norm.gamma, in.offset);
    pnn_reals_store(p, p->maps, norm.beta, in.slope);
  }
  if (p->norm) {
    pnn_weights_scale(p, host, weights, norm.scale, room);
    weights = room;
    in.mean = norm.mean_reals;
  }
  pnn_packing_fill(p, host, &in.packing, weights, in.packed);
  pnn_parallel(host, inputs_items(&in), in.rows ? pnn_rows_inputs_item : inputs_item, &in);
}
