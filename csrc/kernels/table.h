/*
 * table.h - the kernels of one instruction set and one precision, as a table of functions.
 *
 * The drivers (forward.c, backward.c, moments.c, mask.c) hold the blocking and the threads and know nothing of
 * instruction sets; everything that touches many elements goes through this table. kernels.c is compiled once per
 * (instruction set, precision) and fills one table each; a hand-tuned kernel overrides its entry there.
 *
 * `real` is float or double, the type that the table computes in. A panel is a matrix of reals in the workspace,
 * [rows][ld] with ld a multiple of PNN_LANES, its columns being pixels (of one or several images). Columns behind the
 * last one, up to the next multiple of PNN_LANES, are padding: kernels may read and write them, and what stands there
 * is finite or harmless. Rows never alias.
 */
#ifndef PNN_KERNELS_TABLE_H
#define PNN_KERNELS_TABLE_H

#include <stdint.h>

#include "../include/pnn/pnn.h"
#include "ahead.h"

/* Part of the definition of every sum over pixels (weight gradient, moments): 16 partial sums, column j in number
 * j mod 16, added as the tree (i, i+8), (i, i+4), (i, i+2), (0, 1). Independent of the vector width. */
#define PNN_LANES 16

/* Bytes between rows that a tensor kernel walks are given in elements of the tensor. */
typedef void (*pnn_load_fn)(void *dst, int64_t ld, const void *src, int64_t rows, int64_t row_stride, int64_t columns,
                            int64_t column_stride);
typedef void (*pnn_store_fn)(void *dst, int64_t row_stride, int64_t column_stride, const void *src, int64_t ld,
                             int64_t rows, int64_t columns);

/* Makes response maps in a panel: see respond and respond_rows. */
typedef struct pnn_source pnn_source;
typedef void (*pnn_respond_fn)(void *a, int64_t lda, const pnn_source *source, int64_t rows, int64_t columns);

typedef void (*pnn_respond_rows_fn)(void *a, int64_t lda, const void *x, int64_t ldx, const void *mask, int64_t ldm,
                                    const void *mean, int64_t pixels, int64_t rows, int32_t shared);

/* What a mask recipe needs to compute any of its values. */
typedef struct pnn_recipe {
  pnn_noise noise;
  uint32_t key[2]; /* the seed: low word, high word */
} pnn_recipe;

/* Pixels first, ..., first + count - 1 of a grid with `width` pixels a row: pixel p stands in the masks' row p / width
 * * row_step and column p mod width * column_step. */
typedef struct pnn_grid {
  int64_t first, count, width, row_step, column_step;
} pnn_grid;

/* What the batch's own moments add to da, a real for each response map (backward.c). */
typedef struct pnn_norm_terms {
  const void *mean, *offset, *slope;
} pnn_norm_terms;

typedef void (*pnn_respond_grad_rows_fn)(void *dx, int64_t ldx, const void *d, int64_t ldd, const void *x, int64_t step,
                                         const void *mask, int64_t ldm, const pnn_norm_terms *norm, int64_t pixels,
                                         int64_t rows, int32_t shared);

/* Where the response maps k0, k0 + 1, ... come from: u[r][j] = x[r'][j] + mask[r''][j], where r' = (k0 + r)/masks -
 * k0/masks counts channels, and r'' is r, or (k0 + r) mod masks where the masks are shared. mask NULL: nothing is
 * added; mean NULL: nothing is subtracted, else mean[r]. x holds reals, for the kernels on pairs bfloat16. */
struct pnn_source {
  const void *x, *mask, *mean;
  int64_t ldx, ldm;
  int64_t k0, masks;
  int32_t shared;
};

/* Pixels whose inputs and masks stand at one step each. mask NULL: nothing is added. */
typedef struct pnn_rows_run {
  const void *x, *mask;
  int64_t pixels;
} pnn_rows_run;

typedef enum pnn_product_mode { PNN_PRODUCT_START, PNN_PRODUCT_CONTINUE, PNN_PRODUCT_ADD } pnn_product_mode;

typedef struct pnn_kernels {
  const char *isa;
  int32_t tile_rows;     /* of `product`: rows of a packed A */
  int32_t tile_columns;  /* of `product` */
  int32_t strip_rows;    /* of products on pairs, and of those with at most strip_columns outputs or maps as columns */
  int32_t strip_columns; /* tile_columns or a part of it */
  int32_t packed_tiles;  /* of strip_rows outputs whose gradient is best packed at a time */
  int32_t dot_rows;      /* of `dot` */
  int32_t dot_columns;

  /* dst[r*ld + j] = src[r*row_stride + j*column_stride] as real, exactly; by pnn_dtype. Nothing is padded. */
  pnn_load_fn load[4];
  /* The inverse, rounded to nearest even where the tensor's type is narrower. */
  pnn_store_fn store[4];

  /* C[rows][tile_columns] = start + A * B, rows <= tile_rows, each element one chain of fused multiply-adds in
   * ascending k that begins at its row's `start`, or at C itself where start is NULL. a: packed [depth][tile_rows];  b:
   * panel rows, [depth][ldb];  c: [rows][ldc];  start: [tile_rows];  ahead: what to ask for on the way. */
  void (*product)(int64_t depth, int64_t rows, const void *a, const void *b, int64_t ldb, void *c, int64_t ldc,
                  const void *start, pnn_ahead *ahead);

  /* `product` of one tile of outputs with `columns` columns, any number, for few maps: C[rows][columns] = start + A * B
   * with rows <= tile_rows. b is readable to the last tile's end; nothing behind C's columns is touched. */
  void (*product_run)(int64_t depth, int64_t rows, int64_t columns, const void *a, const void *b, int64_t ldb, void *c,
                      int64_t ldc, const void *start, pnn_ahead *ahead);

  /* out[i*ldo + j] += sum over columns of a[i][.] * b[j][.] in PNN_LANES partial sums, each a chain of fused
   * multiply-adds, for i < rows and j < width; first: out is set, not added to. columns is a multiple of PNN_LANES;
   * dot_rows rows of a and dot_columns rows of b are read. */
  void (*dot)(int64_t columns, const void *a, int64_t lda, const void *b, int64_t ldb, int64_t rows, int64_t width,
              void *out, int64_t ldo, int32_t first, const pnn_ahead_run *ahead);

  /* out[r] = sum over columns of a[r][.], in the same order as dot with ones. */
  void (*sum)(int64_t columns, const void *a, int64_t lda, int64_t rows, void *out);

  /* a[r][j] = activation(u[r][j]) - mean[r] for `columns` columns. The input itself may stand for x. a may be x if
   * masks is 1. `respond[IDENTITY]` only perturbs. */
  pnn_respond_fn respond[PNN_ACTIVATION_COUNT];
  /* `product` with b as an output: the first tile of outputs makes the tile_columns columns of the panel as it goes, so
   * that the prologue runs beside the products. NULL where an activation takes more registers than the sums leave;
   * never for the identity. */
  void (*respond_product[PNN_ACTIVATION_COUNT])(int64_t depth, int64_t rows, const void *a, void *b, int64_t ldb,
                                                void *c, int64_t ldc, const void *start, const pnn_source *source,
                                                pnn_ahead *ahead);

  /* a = activation(a), in place over rows x columns (a multiple of PNN_LANES). */
  void (*activate[PNN_ACTIVATION_COUNT])(void *a, int64_t lda, int64_t rows, int64_t columns);
  /* d = activation'(u) * d, with PyTorch's selection. */
  void (*activate_grad[PNN_ACTIVATION_COUNT])(void *d, int64_t ldd, const void *u, int64_t ldu, int64_t rows,
                                              int64_t columns);

  /* dx[r][j] = sum over m, ascending, of activation'(u) * da, with u = x[r][j] + mask[r*masks + m][j] (mask[m][j] where
   * shared; NULL: nothing is added), for `columns` columns, any number. da is d[r*masks + m][j]; with `norm`, first d +
   * offset, then fused + slope * (activation(u) - mean). dx may be d. */
  void (*respond_grad[PNN_ACTIVATION_COUNT])(void *dx, int64_t ldx, const void *d, int64_t ldd, const void *x,
                                             int64_t step, const void *mask, int64_t ldm, const pnn_norm_terms *norm,
                                             int64_t rows, int64_t columns, int64_t masks, int32_t shared);

  /* `dot` of a whole tile whose panels are made on the way: the rows of a are copied from g, those of b are the
   * response maps source->k0, ...; either may be NULL, where the panel holds them already. NULL as in respond_product.
   */
  void (*respond_dot[PNN_ACTIVATION_COUNT])(int64_t columns, void *a, int64_t lda, const void *g, int64_t ldg, void *b,
                                            int64_t ldb, const pnn_source *source, void *out, int64_t ldo,
                                            int32_t first, const pnn_ahead_run *ahead);

  /* `product` from 0 with respond_grad as its epilogue, one mask a channel: dx of the `rows` response maps source->k0,
   * ... of a tile, tile_columns columns. g not NULL: the panel's rows stand there, [depth][ldg], and are copied to b on
   * the way. NULL as in respond_product. */
  void (*product_respond_grad[PNN_ACTIVATION_COUNT])(int64_t depth, const void *a, const void *g, int64_t ldg, void *b,
                                                     int64_t ldb, void *dx, int64_t ldo, int64_t rows,
                                                     const pnn_source *source, const pnn_norm_terms *norm,
                                                     pnn_ahead *ahead);

  /* d[r][j] = d[r][j] + offset[r], then fused + slope[r]*c[r][j]. */
  void (*affine)(void *d, int64_t ldd, const void *c, int64_t ldc, const void *offset, const void *slope, int64_t rows,
                 int64_t columns);
  /* a *= factor. */
  void (*scale)(void *a, int64_t lda, double factor, int64_t rows, int64_t columns);
  /* s[r] += a[r] for `columns` columns, any number. */
  void (*accumulate)(void *s, const void *a, int64_t columns);
  /* Rounds to bfloat16 (which = PNN_BFLOAT16) or float16 and back, in place. */
  void (*round16)(pnn_dtype which, void *a, int64_t lda, int64_t rows, int64_t columns);

  /* Mean and sum of squared deviations of each row's first n columns, n >= 1. Overwrites the padding. */
  void (*moments)(void *a, int64_t lda, int64_t rows, int64_t n, double *mean, double *m2, pnn_ahead *ahead);
  /* The same, to the bit, of the response maps source->k0, ..., whose mean is not subtracted, for n >= 64 columns, a
   * multiple of PNN_LANES. a: room for n reals. NULL as in respond_product. */
  void (*respond_moments[PNN_ACTIVATION_COUNT])(void *a, const pnn_source *source, int64_t rows, int64_t n,
                                                double *mean, double *m2, pnn_ahead *ahead);

  /* dst[r*ld + p] = fl(fl(level) * N) of response map k0 + r at pixel p of the grid's. */
  void (*recipe)(void *dst, int64_t ld, const pnn_recipe *recipe, double level, int64_t k0, int64_t rows,
                 const pnn_grid *grid);

  /* ---- bfloat16 dot products; NULL where the instruction set has none (pnn_kernels_pairs) ---- */

  /* A pair is two bfloat16 values in 32 bits, the even one low. `product` and `dot` on pairs: the same layouts with
   * `depth` and `columns` in pairs, tiles of strip_rows x strip_columns; A is packed [depth][strip_rows] pairs along
   * the depth. out not NULL: the sums are rounded to bfloat16 and stored there, [strip_rows][ldo], instead of to c,
   * which is read only where start is NULL. */
  void (*product_pairs)(int64_t depth, const void *a, const void *b, int64_t ldb, void *c, int64_t ldc,
                        const void *start, void *out, int64_t ldo, pnn_ahead *ahead);
  void (*dot_pairs)(int64_t columns, const void *a, int64_t lda, const void *b, int64_t ldb, int64_t rows,
                    int64_t width, void *out, int64_t ldo, int32_t first, const pnn_ahead_run *ahead);
  /* dst[r/2][j] = (a[r][j], a[r+1][j]) rounded to bfloat16; behind an odd last row stands 0. columns: a multiple of
   * PNN_LANES. */
  void (*pair_rows)(void *dst, const void *a, int64_t ld, int64_t rows, int64_t columns);
  /* dst[r][j/2] = (a[r][j], a[r][j+1]); ldd in pairs; columns: a multiple of 2 * PNN_LANES. */
  void (*pair_columns)(void *dst, int64_t ldd, const void *a, int64_t lda, int64_t rows, int64_t columns);
  /* pair_rows of a bfloat16 tensor's rows, for any number of columns. */
  void (*pair_bfloat16)(void *dst, int64_t ld, const void *src, int64_t row_stride, int64_t rows, int64_t columns);
  /* The same panels of a bfloat16 tensor whose rows (channels) are neighbours and whose columns stand column_stride
   * apart: dst[r][j] = src[j*column_stride + r], and its pairs of rows, dst[r/2][j]. For any number of columns. */
  void (*turn_bfloat16)(void *dst, int64_t ld, const void *src, int64_t column_stride, int64_t rows, int64_t columns);
  void (*turn_pairs)(void *dst, int64_t ld, const void *src, int64_t column_stride, int64_t rows, int64_t columns);
  /* `sum` of rows of bfloat16 values. */
  void (*sum_bfloat16)(int64_t columns, const void *a, int64_t lda, int64_t rows, void *out);
  /* `respond` from a bfloat16 x to pairs of neighbouring maps, a[r/2][j] = (map r, map r+1), behind an odd last map 0;
   * and to bfloat16 values a[r][j], pairs of neighbouring columns. Rounded once, as by pair_rows. */
  pnn_respond_fn respond_pairs[PNN_ACTIVATION_COUNT];
  pnn_respond_fn respond_bfloat16[PNN_ACTIVATION_COUNT];
  /* respond_product on pairs, with a bfloat16 x; the depth is counted in maps. NULL as there. */
  void (*respond_product_pairs[PNN_ACTIVATION_COUNT])(int64_t maps, const void *a, void *b, int64_t ldb, void *c,
                                                      int64_t ldc, const void *start, void *out, int64_t ldo,
                                                      const pnn_source *source, pnn_ahead *ahead);
  /* product_respond_grad on pairs, x and dx bfloat16, without normalisation's terms and with the panel made before. */
  void (*product_pairs_respond_grad[PNN_ACTIVATION_COUNT])(int64_t depth, const void *a, const void *b, int64_t ldb,
                                                           void *dx, int64_t ldo, int64_t rows,
                                                           const pnn_source *source, pnn_ahead *ahead);

  /* ---- panels whose rows are pixels, [pixels][ld], for channels-last tensors ---- */

  /* C[rows][columns], at most tile_columns columns, by tiles of tile_rows or, up to strip_columns, of strip_rows; each
   * element one chain of fused multiply-adds over depth:
   *   a: element (i, k) at a[i*a_row + k*a_step];  b: strips of columns, `strip` reals apart, [depth][ldb] each,
   *   readable to whole strips;  c: [rows][ldc].
   * PNN_PRODUCT_START: the chain begins at start[column], or at 0 where start is NULL. PNN_PRODUCT_CONTINUE: at C.
   * PNN_PRODUCT_ADD: at 0, and the sum is added to C. */
  void (*product_rows)(pnn_product_mode mode, int64_t rows, int64_t columns, int64_t depth, const void *a,
                       int64_t a_row, int64_t a_step, const void *b, int64_t ldb, int64_t strip, void *c, int64_t ldc,
                       const void *start, pnn_ahead *ahead);
  /* product_rows from `start` for any number of rows and columns, for few maps: b holds the strips one after the other,
   * [depth][strip_columns] each, and start whole strips. */
  void (*product_rows_run)(int64_t rows, int64_t columns, int64_t depth, const void *a, int64_t a_row, const void *b,
                           void *c, int64_t ldc, const void *start, pnn_ahead *ahead);
  /* Tiles of strip_rows rows, `tile_step` reals apart: tile[i / strip_rows][p][i mod strip_rows] = src[p*step + i] for
   * i < rows; behind them 0. sums not NULL: the chain sums[i] goes on over src[p*step + i]. What stands `further` reals
   * behind the whole tiles' rows is asked for. */
  void (*pack_gradient)(void *dst, int64_t tile_step, const void *src, int64_t step, int64_t pixels, int64_t rows,
                        int64_t further, void *sums);
  /* a[p][r] = activation(x[p][r] + mask[p][r]) - mean[r], one mask a channel; where shared, mask[p][0]. mask NULL:
   * nothing is added; mean NULL: nothing is subtracted. */
  pnn_respond_rows_fn respond_rows[PNN_ACTIVATION_COUNT];
  /* respond_grad, one mask a channel; where shared, mask[p][0]. */
  pnn_respond_grad_rows_fn respond_grad_rows[PNN_ACTIVATION_COUNT];
  /* product_rows from 0 of `pixels` rows, whole tiles of tile_rows x tile_columns, with respond_grad_rows as its
   * epilogue. NULL as in respond_product. */
  void (*product_respond_grad_rows[PNN_ACTIVATION_COUNT])(int64_t pixels, int64_t depth, const void *a, int64_t a_row,
                                                          const void *b, int64_t ldb, int64_t strip, void *dx,
                                                          int64_t ldx, const void *x, int64_t step, const void *mask,
                                                          int64_t ldm, const pnn_norm_terms *norm, int32_t shared,
                                                          pnn_ahead *ahead);
  /* Mean and sum of squared deviations of each of `rows` columns over n >= 1 pixels. */
  void (*moments_rows)(const void *a, int64_t lda, int64_t n, int64_t rows, double *mean, double *m2, pnn_ahead *ahead);

  /* The same, to the bit, of the response maps of the pixels of `count` runs, n >= PNN_LANES altogether, ldx and ldm
   * from pixel to pixel; where shared, mask[p][0] belongs to all maps of a pixel. All runs have masks, or none. a: room
   * for n * PNN_LANES reals. NULL as in respond_product. */
  void (*respond_moments_rows[PNN_ACTIVATION_COUNT])(void *a, const pnn_rows_run *run, int64_t count, int64_t ldx,
                                                     int64_t ldm, int32_t shared, int64_t n, int64_t rows, double *mean,
                                                     double *m2, pnn_ahead *ahead);

  /* The same on bfloat16 tensors and panels, with pairs along the depth; NULL as above. */

  /* product_rows of one strip: pair (i, k) of a stands at a[i*a_row + 2*k*a_step], counted in bfloat16 values; b:
   * [depth][ldb] pairs. Never PNN_PRODUCT_CONTINUE. to_bfloat16, with PNN_PRODUCT_START only: c holds bfloat16 values.
   */
  void (*product_rows_pairs)(pnn_product_mode mode, int64_t rows, int64_t columns, int64_t depth, const void *a,
                             int64_t a_row, int64_t a_step, const void *b, int64_t ldb, void *c, int64_t ldc,
                             const void *start, int32_t to_bfloat16, pnn_ahead *ahead);
  /* a and x, or dx and x, hold bfloat16 values; norm is NULL. */
  pnn_respond_rows_fn respond_rows_bfloat16[PNN_ACTIVATION_COUNT];
  pnn_respond_grad_rows_fn respond_grad_rows_bfloat16[PNN_ACTIVATION_COUNT];
  /* out[j] += sum over depth of a[k][j], one chain from 0. */
  void (*sum_columns_bfloat16)(int64_t depth, const void *a, int64_t lda, int64_t columns, void *out);
} pnn_kernels;

/* The tables of the instruction set in use; precision 0 is float, 1 is double. */
const pnn_kernels *pnn_kernels_get(int precision);
/* Whether the table's pair kernels may be called: they are there, and the processor has the instructions. */
int pnn_kernels_pairs(const pnn_kernels *kernels);

#endif
