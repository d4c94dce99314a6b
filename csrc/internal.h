/*
 * internal.h - what the library's own files share: a checked problem, blocks of columns, threads, errors.
 *
 * How a call travels: pnn.h's entry point -> check.c turns the params into a pnn_problem (every size checked and named)
 * -> forward.c or backward.c cuts it into items, one per worker at a time (parallel.c) -> each item fills panels of 64
 * (or, for sums over pixels, 512) columns through columns.c and mask.c -> the kernels' table (kernels/table.h).
 */
#ifndef PNN_INTERNAL_H
#define PNN_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "include/pnn/pnn.h"
#include "kernels/table.h"

#define PNN_MIN(a, b) ((a) < (b) ? (a) : (b))
#define PNN_MAX(a, b) ((a) > (b) ? (a) : (b))

/* ---- errors (error.c) ---- */

/* Fills *error (which may be NULL) with the status and the sentence, and returns the status. */
pnn_status pnn_fail(pnn_error *error, pnn_status status, const char *format, ...) __attribute__((format(printf, 3, 4)));
pnn_status pnn_succeed(pnn_error *error);

#define PNN_FAIL_IF(condition, error, status, ...)                  \
  do {                                                              \
    if (condition) return pnn_fail((error), (status), __VA_ARGS__); \
  } while (0)
#define PNN_FORWARD_IF(expression)           \
  do {                                       \
    const pnn_status status_ = (expression); \
    if (status_ != PNN_OK) return status_;   \
  } while (0)

/* ---- a checked problem (check.c) ---- */

/* A tensor seen from the output's pixels: element (b, channel, i, j) of the grid of computed pixels stands at
 * data + (b*batch + channel*channel + i*row + j*column) elements. For the input and the mask the steps contain the
 * layer's stride. Strides of sizes 0 and 1 are 0. */
typedef struct pnn_view {
  char *data; /* NULL = absent */
  pnn_dtype dtype;
  int64_t element; /* bytes */
  int64_t batch, channel, row, column;
} pnn_view;

typedef struct pnn_problem {
  int64_t batch, channels, height, width;                    /* B, C, H, W */
  int64_t outputs;                                           /* T */
  int64_t masks, maps;                                       /* M, K = C*M */
  int64_t out_height, out_width, pixels;                     /* H', W', P = H'*W' */
  int64_t groups, group_channels, group_maps, group_outputs; /* G, C/G, K/G, T/G */
  int64_t stride[2];

  pnn_noise noise;
  bool shared;
  double level;
  pnn_recipe recipe;
  pnn_activation activation;
  pnn_dtype product_type; /* weight's: 16-bit ones round the product's operands */

  bool norm, training;
  double eps;

  int precision; /* 0 float, 1 double: index of the kernels' table */
  int64_t real_size;
  const pnn_kernels *kernels;
  int64_t near_bytes;              /* pnn_near_bytes() */
  bool rounded;                    /* the product's operands are rounded to 16 bits */
  bool pairs;                      /* products by bfloat16 dot products */
  int64_t tile_rows, tile_columns; /* of the products whose columns are pixels */
  int64_t
      native; /* bytes of the elements that kernels read and write where they stand: of reals, with pairs of bfloat16
               */

  pnn_view input, mask, output, grad_output, grad_input, grad_mask;
  const pnn_params *params;
} pnn_problem;

/* Checks everything but the workspace. On success *problem is filled. */
pnn_status pnn_check(const pnn_params *params, pnn_pass pass, const pnn_host *host, pnn_problem *problem,
                     pnn_error *error);
pnn_status pnn_check_host(const pnn_host *host, pnn_error *error);
/* Checks an output tensor by itself: sizes, address range, no overlap with itself. */
pnn_status pnn_check_output(const pnn_tensor *tensor, const char *name, pnn_error *error);

int64_t pnn_dtype_size(pnn_dtype dtype);
const char *pnn_dtype_name(pnn_dtype dtype);

/* ---- workspace (workspace.c) ---- */

/* Hands out 64-byte aligned pieces. With base NULL it only counts; `overflow` says the sum left size_t. */
typedef struct pnn_arena {
  char *base;
  size_t used, room;
  bool overflow;
} pnn_arena;

/* An arena over the caller's workspace of `room` bytes, its start rounded up to the alignment; NULL counts. */
pnn_arena pnn_arena_make(void *workspace, size_t room);
void *pnn_arena_take(pnn_arena *arena, int64_t count, int64_t element);
/* Bytes to ask of the caller, alignment included. */
size_t pnn_arena_bytes(const pnn_arena *arena);
/* Whether the pieces lie within the caller's workspace: until this has been asked, none may be touched. */
bool pnn_arena_fits(const pnn_arena *arena);
/* Where they do not: the caller's workspace against what was taken; `ask` is the function that tells its size. */
pnn_status pnn_arena_check(const pnn_arena *arena, const pnn_params *params, const char *ask, pnn_error *error);

/* ---- threads (parallel.c) ---- */

/* Runs task(argument, worker, item) once for each item; worker < pnn_workers(host, items) names the thread's own
 * scratch. Items are taken in any order: nothing may depend on it. */
void pnn_parallel(const pnn_host *host, int64_t items, void (*task)(void *argument, int32_t worker, int64_t item),
                  void *argument);
int32_t pnn_workers(const pnn_host *host, int64_t items);

/* Round to nearest, no flushing of denormals; returns what stood before, to be given back. */
typedef uint64_t pnn_fpenv;
pnn_fpenv pnn_fpenv_enter(void);
void pnn_fpenv_leave(pnn_fpenv environment);

/* ---- blocks of columns (columns.c) ---- */

/* The columns of every product are pixels. A range is the pixels [pixel, pixel + pixels) of all images, image by image;
 * a panel takes up to 64 or 512 consecutive columns of a range. */
typedef struct pnn_range {
  int64_t pixel, pixels;
} pnn_range;

/* A maximal run of a panel's columns inside one image. */
typedef struct pnn_segment {
  int64_t column, columns, image, pixel;
} pnn_segment;

#define PNN_PANEL 64   /* columns of a panel in the forward pass and the input gradient: a multiple of this, */
#define PNN_WIDEST 256 /* at most so many */
#define PNN_CHUNK 512  /* columns of a panel in sums over pixels; part of their definition */
#define PNN_PAD 64     /* panels are padded to a multiple of this: of PNN_LANES and of every tile's columns */

typedef struct pnn_columns {
  const pnn_range *range;
  int64_t columns; /* in this panel */
  int64_t padded;  /* rounded up to PNN_PAD */
  int64_t segments;
  pnn_segment segment[PNN_CHUNK];
} pnn_columns;

/* Columns of panels of `rows` rows, beside others of `more` rows: the fewer rows, the longer the pieces of a tensor's
 * rows that they take. */
int64_t pnn_panel_columns(const pnn_problem *problem, int64_t rows, int64_t more);

/* Elements of `size` bytes from row to row of a panel whose rows hold `elements`: an odd number of cache lines, so that
 * the same columns of many rows don't all fall into the same few sets of the first-level cache. */
static inline int64_t pnn_odd_lines(int64_t elements, int64_t size) {
  const int64_t line = 64 / size;
  return (pnn_quotient_up(elements, line) | 1) * line;
}

static inline int64_t pnn_panel_ld(const pnn_problem *problem, int64_t width) {
  return pnn_odd_lines(width, problem->real_size);
}

/* The columns [first, first + count) of the range. */
void pnn_columns_set(pnn_columns *columns, const pnn_range *range, int64_t first, int64_t count);

/* The columns [column, end) of a panel whose first is `first` of the range; `end` is the panel's or a multiple of a
 * tile's. */
void pnn_columns_part(pnn_columns *part, const pnn_columns *columns, int64_t first, int64_t column, int64_t end);

/* Where the view's columns [column, column + count) stand for `channel`, if they are next to each other and of the
 * native type: there whole tiles are read and written where they belong. NULL otherwise. */
char *pnn_columns_place(const pnn_problem *problem, const pnn_columns *columns, const pnn_view *view, int64_t channel,
                        int64_t column, int64_t count);

/* Zeroes the padding of a panel's rows, elements of `size` bytes. */
void pnn_columns_pad(const pnn_columns *columns, int64_t rows, void *panel, int64_t ld, int64_t size);

/* panel[r][column] = view at channel + r, for `rows` channels; padding becomes zero. */
void pnn_columns_load(const pnn_problem *problem, const pnn_columns *columns, const pnn_view *view, int64_t channel,
                      int64_t rows, void *panel, int64_t ld);
void pnn_columns_store(const pnn_problem *problem, const pnn_columns *columns, const pnn_view *view, int64_t channel,
                       int64_t rows, const void *panel, int64_t ld);

/* Whether all of the view's columns have such places, within each image. */
bool pnn_columns_native(const pnn_problem *problem, const pnn_view *view);
/* Whether, with pairs, its channels are neighbours instead: panels are turned from it. */
bool pnn_columns_turned(const pnn_problem *problem, const pnn_view *view);
/* With pairs, of a native or turned view: panel[r][column] as bfloat16, and panel[r/2][column] as pairs of neighbouring
 * channels (behind an odd last one 0); padding becomes zero. */
void pnn_columns_copy(const pnn_problem *problem, const pnn_columns *columns, const pnn_view *view, int64_t channel,
                      int64_t rows, void *panel, int64_t ld);
void pnn_columns_pair(const pnn_problem *problem, const pnn_columns *columns, const pnn_view *view, int64_t channel,
                      int64_t rows, void *panel, int64_t ld);

/* Whether the processor walks the page tables for the page behind one that is read from end to end (dispatch.c):
 * Intel's do, and asking for a line of each in advance costs them a twentieth of a pass. */
bool pnn_pages_foreseen(void);

/* What blocks are sized for (cache.c): the bytes of a core's second-level cache, in steps of PNN_NEAR_LEAST, as far as
 * larger blocks were found to pay. Only speed and the workspace depend on it. */
#define PNN_NEAR_LEAST (128 * 1024)
#define PNN_NEAR_MOST (512 * 1024)
int64_t pnn_near_bytes(void);

/* Adds to what is asked for ahead (kernels/ahead.h) the first run of the panel at `column` of the range, `count`
 * columns, for `channels` channels from `channel` on; nothing where there are none or the view has other strides. */
void pnn_ahead_add(const pnn_problem *problem, pnn_ahead *ahead, const pnn_range *range, int64_t column, int64_t count,
                   const pnn_view *view, int64_t channel, int64_t channels, bool write);

/* How the columns are dealt out to the workers: ranges of up to `pixels` pixels, each cut into `cuts` pieces that
 * differ by at most `unit` columns. Only speed depends on it. */
typedef struct pnn_deal {
  int64_t ranges, pixels, cuts, unit;
} pnn_deal;

/* Ranges are whole panels of `width` columns, unless their masks would take too much memory; pieces are whole units of
 * columns. `mask_rows` rows of masks are kept per range, and `share` (groups, say) multiplies the number of items. */
pnn_deal pnn_deal_columns(const pnn_problem *problem, const pnn_host *host, int64_t width, int64_t unit,
                          int64_t mask_rows, int64_t share, bool whole_batch);
/* Piece i, 0 <= i < ranges * cuts; *end may equal *first (nothing to do). */
void pnn_deal_piece(const pnn_problem *problem, const pnn_deal *deal, int64_t i, pnn_range *range, int64_t *first,
                    int64_t *end);

/* ---- masks (mask.c) ---- */

/* Reads the seed. The only look at it, so that nothing else depends on where it lives. */
void pnn_recipe_read(pnn_problem *problem);
/* Rows of a mask panel for `rows` response maps: as many, M where the masks are shared, 0 without noise. */
int64_t pnn_mask_rows(const pnn_problem *problem, int64_t rows);
/* Reals from row to row of a mask panel for `pixels` pixels. */
int64_t pnn_mask_ld(const pnn_problem *problem, int64_t pixels);
/* panel[r][p] = fl(fl(level) * N) of response map k0 + r (of mask r where shared) at the range's pixels. */
void pnn_mask_panel(const pnn_problem *problem, int64_t k0, int64_t rows, const pnn_range *range, void *panel,
                    int64_t ld);
/* Adds to what is asked for ahead a share of the mask tensor's rows that pnn_mask_panel will read. */
void pnn_mask_ahead(const pnn_problem *problem, pnn_ahead *ahead, int64_t k0, int64_t rows, const pnn_range *range,
                    int64_t share, int64_t shares);
/* Writes level * panel to the range's pixels of grad_mask; the panel holds all maps (masks where shared). */
void pnn_mask_grad_store(const pnn_problem *problem, const pnn_range *range, void *panel, int64_t ld);

/* ---- response maps (response.c) ---- */

/* What turns input rows into response maps, for one worker. */
typedef struct pnn_response {
  const pnn_problem *problem;
  const void *mask; /* mask panel, from response map mask_k0 on (from mask 0 where shared) */
  int64_t mask_ld, mask_k0;
  const void *mean; /* [K] reals, or NULL: nothing is subtracted */
  void *channels;   /* scratch: [pnn_response_channels(rows)][ld], where M > 1 */
} pnn_response;

/* Channels that `rows` response maps can touch. */
int64_t pnn_response_channels(const pnn_problem *problem, int64_t rows);
/* u[r][column] = the perturbed input of response map k0 + r; padding is zero. */
void pnn_response_perturbed(const pnn_response *response, const pnn_columns *columns, int64_t k0, int64_t rows, void *u,
                            int64_t ld);
/* a = activation(u), likewise. */
void pnn_response_activated(const pnn_response *response, const pnn_columns *columns, int64_t k0, int64_t rows, void *a,
                            int64_t ld);
/* The product's operand: activation(u), minus the mean where there is one, rounded to the product's type (left to the
 * pairs' own rounding where there are pairs). */
void pnn_response_operand(const pnn_response *response, const pnn_columns *columns, int64_t k0, int64_t rows, void *a,
                          int64_t ld);

/* The operand as bfloat16 pairs: of neighbouring maps, pairs[r/2][column], and of neighbouring columns,
 * pairs[r][column/2] (ld counts columns in both). `panel` is scratch of the operand's size. */
void pnn_response_map_pairs(const pnn_response *response, const pnn_columns *columns, int64_t k0, int64_t rows,
                            void *pairs, void *panel, int64_t ld);
void pnn_response_column_pairs(const pnn_response *response, const pnn_columns *columns, int64_t k0, int64_t rows,
                               void *pairs, void *panel, int64_t ld);

/* Turns the channels of `rows` response maps into response->channels, rows of the native type and of length ld; false
 * where the input's columns are neighbours already, or there is one mask a channel and so nothing to gain. */
bool pnn_response_turn(const pnn_response *response, const pnn_columns *columns, int64_t k0, int64_t rows, int64_t ld);
/* Where the kernels find the response maps from k0 on of the panel's columns [column, column + count); false unless the
 * input has a place for them (pnn_columns_place). turned_ld not 0: they were turned, k0 the first one, to that ld. */
bool pnn_response_source(const pnn_response *response, const pnn_columns *columns, int64_t k0, int64_t column,
                         int64_t count, int64_t turned_ld, pnn_source *source);

/* The same from `rows` response maps further on. */
pnn_source pnn_source_at(const pnn_problem *problem, const pnn_source *source, int64_t rows);

/* ---- weights and per-map algebra (weights.c) ---- */

/* The weight as reals, dense [T][K/G]: the tensor itself where it is just that, else read into `room`. */
const void *pnn_weights_read(const pnn_problem *problem, void *room);
/* scaled = weights with the column of map k times scale[k], rounded once to the product's type; may be `weights`. */
void pnn_weights_scale(const pnn_problem *problem, const pnn_host *host, const void *weights, const double *scale,
                       void *scaled);
/* The host, or NULL for a weight matrix that one thread is done with before a second has woken. */
const pnn_host *pnn_weights_host(const pnn_problem *problem, const pnn_host *host);

/* A packed operand of a product: per group, rows in blocks of `block` (each padded to whole tiles), tile by tile
 * [depth][tile]. Forward: rows are outputs, depth is maps. Backward: rows are maps, depth is outputs. `tile` is the
 * problem's tile_rows where pixels are a panel's columns, the kernels' strip_columns where they are its rows. */
typedef struct pnn_packing {
  int64_t rows, depth, block, tile; /* per group */
  int64_t block_tiles, blocks;
  bool transposed; /* rows are the weight's columns */
  bool pairs;      /* bfloat16 pairs along the depth, [(depth + 1)/2][tile][2] */
} pnn_packing;

pnn_packing pnn_packing_forward(const pnn_problem *problem, int64_t tile);
pnn_packing pnn_packing_backward(const pnn_problem *problem, int64_t tile, int64_t block);
int64_t pnn_packing_bytes(const pnn_problem *problem, const pnn_packing *packing); /* all groups */
void pnn_packing_fill(const pnn_problem *problem, const pnn_host *host, const pnn_packing *packing, const void *weights,
                      void *packed);
/* The tile `tile` of block `block` of a group, from the depth `k` on (even, with pairs). */
const void *pnn_packing_tile(const pnn_problem *problem, const pnn_packing *packing, const void *packed, int64_t group,
                             int64_t block, int64_t tile, int64_t k);

/* A vector tensor to doubles (absent ones give `absent`) and back. */
void pnn_vector_load(const pnn_tensor *tensor, int64_t count, double absent, double *dst);
void pnn_vector_store(const pnn_tensor *tensor, int64_t count, const double *src);
/* doubles to reals, rounded once. */
void pnn_reals_store(const pnn_problem *problem, int64_t count, const double *src, void *dst);
/* In place, so that loops over it become loops over one type. */
static inline double pnn_real_get(const pnn_problem *problem, const void *reals, int64_t i) {
  return problem->precision ? ((const double *)reals)[i] : (double)((const float *)reals)[i];
}

/* Normalisation's per-map constants, in double. */
typedef struct pnn_norm {
  double *mean, *variance, *gamma, *beta;
  double *scale;    /* alpha = gamma / sqrt(variance + eps) */
  double *inverse;  /* r = 1 / sqrt(variance + eps) */
  void *mean_reals; /* fl(mean) */
} pnn_norm;

void pnn_norm_plan(const pnn_problem *problem, pnn_arena *arena, pnn_norm *norm);
/* mean and variance are given; fills the rest. */
void pnn_norm_fill(const pnn_problem *problem, pnn_norm *norm);

/* ---- the chunks of sums over pixels (chunks.c) ---- */

/* Sums over pixels are cut into chunks of up to PNN_CHUNK columns; the chunks, in order, into at most PNN_PARTS parts.
 * A chunk is summed in lanes, a part in the chunks' order, the parts as the tree (0 + 1) + (2 + 3). The sizes alone
 * determine this order. */
#define PNN_PARTS 4

typedef struct pnn_chunks {
  int64_t pixels; /* of a range */
  int64_t ranges;
  int64_t count;
  int64_t parts;
} pnn_chunks;

pnn_chunks pnn_chunks_make(const pnn_problem *problem);
/* Chunks of every range but the last, which may have fewer. */
int64_t pnn_chunks_per_range(const pnn_problem *problem, const pnn_chunks *chunks);
/* The chunk's range and its first column there; returns its number of columns. */
int64_t pnn_chunk_locate(const pnn_problem *problem, const pnn_chunks *chunks, int64_t chunk, pnn_range *range,
                         int64_t *first);
/* The part's chunks [*first, *end). */
void pnn_chunks_part(const pnn_chunks *chunks, int64_t part, int64_t *first, int64_t *end);

/* ---- moments (moments.c) ---- */

typedef struct pnn_moments_plan {
  pnn_chunks chunks;
  bool rows;             /* the channels-last form */
  int64_t block, blocks; /* response maps at a time */
  int64_t near;          /* of these, what is made at a time */
  int64_t part_run;      /* parts of an item: over the same pixels they share their masks */
  double *partial;       /* [parts][K][2] */
  char *scratch;
  int64_t scratch_bytes; /* per worker */
} pnn_moments_plan;

pnn_moments_plan pnn_moments_prepare(const pnn_problem *problem, const pnn_host *host, pnn_arena *arena);
/* Mean and biased variance of each response map over the batch; 0 and 1 where there are no pixels. */
void pnn_moments_run(const pnn_problem *problem, const pnn_host *host, const pnn_moments_plan *plan, double *mean,
                     double *variance);

/* ---- the passes (forward.c, backward.c) ---- */

/* Lays out the pass's workspace in the arena and, where `run` is set and the arena has the room, runs it. */
void pnn_forward_pass(const pnn_problem *problem, const pnn_host *host, pnn_arena *arena, bool run);
void pnn_backward_pass(const pnn_problem *problem, const pnn_host *host, pnn_arena *arena, bool run);

#endif
