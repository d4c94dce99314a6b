/*
 * passes.h - the state of each pass, shared by its two forms: panels whose columns are pixels (forward.c, backward.c,
 * moments.c: contiguous tensors and every other stride) and panels whose rows are pixels (channels_last.c).
 *
 * A pass lays out its workspace, prepares what all workers read, and deals out items; the form decides how one item is
 * computed and what scratch a worker needs for it. Outputs, input gradients and mask gradients have the same bits in
 * both forms; weight gradients and moments sum their pixels in another order.
 */
#ifndef PNN_PASSES_H
#define PNN_PASSES_H

#include "internal.h"

typedef void (*pnn_item_fn)(void *pass, int32_t worker, int64_t item);

/* ---- forward ---- */

typedef struct pnn_forward_state {
  const pnn_problem *problem;
  pnn_deal deal;
  pnn_packing packing;
  int64_t block;    /* response maps in a panel */
  int64_t slab;     /* response maps whose masks are there at a time: all of a group, or a panel's */
  int64_t width;    /* columns of a panel */
  int64_t ld;       /* reals from row to row of a panel */
  int64_t sum_rows; /* outputs of a group, in whole tiles */
  int64_t tiles;    /* tiles of outputs whose sums may wait in the workspace at a time */
  bool few;         /* few maps: products with whole runs of pixels, straight to the output */
  void *packed;
  void *bias;       /* where the sums start: [G][sum_rows] */
  const void *mean; /* NULL without normalisation */
  char *scratch;
  int64_t scratch_bytes;
} pnn_forward_state;

/* ---- backward: sums over pixels ---- */

typedef struct pnn_sums {
  const pnn_problem *problem;
  pnn_chunks chunks;
  int64_t block, map_blocks;        /* response maps of an item, and how many such blocks a group has */
  int64_t output_cuts, output_rows; /* outputs of an item */
  int64_t part_run;                 /* parts of an item */
  int64_t workers;
  bool products; /* G is wanted, not h alone */
  bool stores;   /* G is dV */
  bool rows;     /* channels-last form */
  bool together; /* in that form: the gradient of all of an item's outputs is asked for with the next chunk's input */
  const void *mean;
  char *maps_part, *outputs_part; /* G and h of each part: [parts][T][K/G], [parts][T] */
  char *scratch;
  int64_t scratch_bytes;
} pnn_sums;

/* What part `part` of an item stands for. */
typedef struct pnn_sums_place {
  int64_t part, k0, k, maps;      /* response maps [k0, k0 + maps), number k in their group; maps = 0: h alone */
  int64_t first, end;             /* outputs */
  char *products, *totals;        /* this part's G and h; totals NULL where another item sums them */
  int64_t first_chunk, end_chunk; /* of all of the item's parts */
  int64_t next_k0, next_maps;     /* response maps of the worker's next item, if it is over the same pixels; else 0 */
} pnn_sums_place;

pnn_sums_place pnn_sums_locate(const pnn_sums *sums, int64_t item, int64_t part);
/* What the item reads next, while the products of the outputs [output, output + outputs) with `chunk` run: the gradient
 * of the outputs behind them (in the channels-last form their packing asks for it), or, together, of the next chunk; a
 * share of the next chunk's input, and of the masks that are wanted next. */
pnn_ahead pnn_sums_ahead(const pnn_sums *sums, const pnn_sums_place *at, int64_t chunk, int64_t end, int64_t output,
                         int64_t outputs);

/* ---- backward: input and masks ---- */

typedef struct pnn_inputs {
  const pnn_problem *problem;
  pnn_deal deal;
  pnn_packing packing;
  int64_t block;  /* response maps at a time: whole channels */
  int64_t window; /* channels that are loaded and stored at a time: those of one or more blocks */
  int64_t slab;   /* response maps whose masks are there at a time: all of a group, or a window's */
  int64_t depth;  /* outputs whose gradients are in a panel: all of a group, but where there are many beside few maps */
  int64_t width;  /* columns of a panel */
  int64_t ld;     /* reals from row to row of a panel */
  bool masks;     /* grad_mask is wanted: an item takes all groups and the whole batch */
  bool steps;     /* from da to dx in steps, not in one kernel */
  bool rows;      /* channels-last form */
  bool affine;    /* normalised with the batch's own moments: da is affine in c */
  void *packed;
  const void *mean;     /* NULL without normalisation */
  void *offset, *slope; /* [K] reals, where affine */
  char *scratch;
  int64_t scratch_bytes;
  char *mask_gradients; /* with masks, each worker's sums over its range: [masks of all maps][pixels] */
  int64_t mask_gradient_bytes;
} pnn_inputs;

/* What the batch's moments add to da, from response map k0 on; only where affine. */
pnn_norm_terms pnn_inputs_norm_terms(const pnn_inputs *inputs, int64_t k0);

/* ---- the channels-last form ---- */

/* Whether these tensors are of the type that is computed in, with channels next to each other. */
bool pnn_rows_fit(const pnn_problem *problem, const pnn_view *a, const pnn_view *b);

/* Pixels of a product with `columns` outputs or maps. */
int64_t pnn_rows_tile(const pnn_problem *problem, int64_t columns);
/* Pixels of a panel of about `width`: whole tiles. */
int64_t pnn_rows_width(const pnn_problem *problem, int64_t width, int64_t columns);

/* Takes one worker's scratch from the arena. */
void pnn_rows_forward_scratch(const pnn_forward_state *state, pnn_arena *arena);
void pnn_rows_sums_scratch(const pnn_sums *sums, pnn_arena *arena);
void pnn_rows_inputs_scratch(const pnn_inputs *inputs, pnn_arena *arena);
void pnn_rows_moments_scratch(const pnn_problem *problem, const pnn_moments_plan *plan, pnn_arena *arena);

void pnn_rows_forward_item(void *state, int32_t worker, int64_t item);
void pnn_rows_sums_item(void *sums, int32_t worker, int64_t item);
void pnn_rows_inputs_item(void *inputs, int32_t worker, int64_t item);

/* One chunk's moments of the maps [k0, k0 + rows). `made` remembers whose masks the scratch holds; its pixel is -1 at
 * first. */
void pnn_rows_moments_chunk(const pnn_problem *problem, const pnn_moments_plan *plan, pnn_arena scratch, int64_t k0,
                            int64_t rows, int64_t chunk, int64_t end, pnn_range *made, double *mean, double *m2);

#endif
