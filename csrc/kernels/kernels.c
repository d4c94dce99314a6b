/*
 * kernels.c - every kernel of the table, compiled once per instruction set and precision.
 *
 * Written on the vectors of real.h: one source gives the portable, AVX2, AVX-512 and NEON kernels, and each gives the
 * same bits, since a lane's arithmetic does not depend on the width (simd.h) and the order of every sum is fixed in
 * the contract (table.h). Only the sizes in tiles.h are chosen per instruction set. The parts below need those above
 * them, in this order.
 */
#include <stdbool.h>

#include "real.h"

#include "activations.h"
#include "philox.h"
#include "table.h"

/* clang-format off */
#include "tiles.h"
#include "load_store.h"
#include "product.h"
#include "dot.h"
#include "respond.h"
#include "rows.h"
#include "moments.h"
#include "recipes.h"
/* clang-format on */

#if defined(PNN_ISA_AVX512) && defined(PNN_REAL_F32)
#include "pairs.h"
#endif

#define RESPOND_ROWS_ENTRY(suffix, name) [PNN_ACTIVATION_##suffix] = respond_rows_##name,
#define RESPOND_ENTRY(suffix, name) [PNN_ACTIVATION_##suffix] = respond_##name,
#define RESPOND_PRODUCT_ENTRY(suffix, name) [PNN_ACTIVATION_##suffix] = respond_product_##name,
#define RESPOND_DOT_ENTRY(suffix, name) [PNN_ACTIVATION_##suffix] = respond_dot_##name,
#define PRODUCT_RESPOND_GRAD_ENTRY(suffix, name) [PNN_ACTIVATION_##suffix] = product_respond_grad_##name,
#define PRODUCT_RESPOND_GRAD_ROWS_ENTRY(suffix, name) [PNN_ACTIVATION_##suffix] = product_respond_grad_rows_##name,
#define RESPOND_MOMENTS_ENTRY(suffix, name) [PNN_ACTIVATION_##suffix] = respond_moments_##name,
#define RESPOND_MOMENTS_ROWS_ENTRY(suffix, name) [PNN_ACTIVATION_##suffix] = respond_moments_rows_##name,
#define ACTIVATE_ENTRY(suffix, name) [PNN_ACTIVATION_##suffix] = activate_##name,
#define RESPOND_GRAD_ROWS_ENTRY(suffix, name) [PNN_ACTIVATION_##suffix] = respond_grad_rows_##name,
#define RESPOND_GRAD_ENTRY(suffix, name) [PNN_ACTIVATION_##suffix] = respond_grad_##name,
#define ACTIVATE_GRAD_ENTRY(suffix, name) [PNN_ACTIVATION_##suffix] = activate_grad_##name,

const pnn_kernels PNN_KERNEL_NAME(pnn_kernels);
const pnn_kernels PNN_KERNEL_NAME(pnn_kernels) = {
    .isa = PNN_STRING(PNN_ISA_SUFFIX),
    .tile_rows = TILE_ROWS,
    .tile_columns = TILE_COLUMNS,
    .strip_rows = STRIP_ROWS,
    .strip_columns = STRIP_COLUMNS,
    .packed_tiles = PACKED_TILES,
    .dot_rows = DOT_ROWS,
    .dot_columns = DOT_COLUMNS,
#if defined(PNN_REAL_F32)
    .load = {[PNN_FLOAT32] = load_real, [PNN_BFLOAT16] = load_bfloat16, [PNN_FLOAT16] = load_float16},
    .store = {[PNN_FLOAT32] = store_real, [PNN_BFLOAT16] = store_bfloat16, [PNN_FLOAT16] = store_float16},
#else
    .load = {[PNN_FLOAT64] = load_real, [PNN_FLOAT32] = load_float},
    .store = {[PNN_FLOAT64] = store_real, [PNN_FLOAT32] = store_float},
#endif
    .product = product,
    .product_run = product_run,
    .dot = dot,
    .sum = sum_rows,
    .respond = {PNN_ACTIVATION_LIST(RESPOND_ENTRY)},
    .respond_product = {CHEAP_ACTIVATIONS(RESPOND_PRODUCT_ENTRY)},
    .respond_dot = {CHEAP_ACTIVATIONS(RESPOND_DOT_ENTRY)},
    .product_respond_grad = {CHEAP_ACTIVATIONS(PRODUCT_RESPOND_GRAD_ENTRY)},
    .activate = {PNN_ACTIVATION_LIST(ACTIVATE_ENTRY)},
    .activate_grad = {PNN_ACTIVATION_LIST(ACTIVATE_GRAD_ENTRY)},
    .respond_grad = {PNN_ACTIVATION_LIST(RESPOND_GRAD_ENTRY)},
    .affine = affine,
    .scale = scale,
    .accumulate = accumulate,
    .round16 = round16,
    .moments = moments,
    .respond_moments = {CHEAP_ACTIVATIONS(RESPOND_MOMENTS_ENTRY)},
    .recipe = recipe_fill,
#if defined(HAVE_PAIRS)
    .product_pairs = product_pairs,
    .dot_pairs = dot_pairs,
    .pair_rows = pair_rows,
    .pair_columns = pair_columns,
    .pair_bfloat16 = pair_bfloat16,
    .turn_bfloat16 = turn_bfloat16,
    .turn_pairs = turn_pairs,
    .sum_bfloat16 = sum_bfloat16,
    .respond_pairs = {PNN_ACTIVATION_LIST(RESPOND_PAIRS_ENTRY)},
    .respond_bfloat16 = {PNN_ACTIVATION_LIST(RESPOND_BFLOAT16_ENTRY)},
    .respond_product_pairs = {CHEAP_ACTIVATIONS(RESPOND_PRODUCT_PAIRS_ENTRY)},
    .product_rows_pairs = product_rows_pairs,
    .respond_rows_bfloat16 = {PNN_ACTIVATION_LIST(RESPOND_ROWS_BFLOAT16_ENTRY)},
    .respond_grad_rows_bfloat16 = {PNN_ACTIVATION_LIST(RESPOND_GRAD_ROWS_BFLOAT16_ENTRY)},
    .sum_columns_bfloat16 = sum_columns_bfloat16,
    .product_pairs_respond_grad = {CHEAP_ACTIVATIONS(PRODUCT_PAIRS_RESPOND_GRAD_ENTRY)},
#endif
    .product_rows = product_rows,
    .product_rows_run = product_rows_run,
    .pack_gradient = pack_gradient,
    .respond_rows = {PNN_ACTIVATION_LIST(RESPOND_ROWS_ENTRY)},
    .respond_grad_rows = {PNN_ACTIVATION_LIST(RESPOND_GRAD_ROWS_ENTRY)},
    .product_respond_grad_rows = {CHEAP_ACTIVATIONS(PRODUCT_RESPOND_GRAD_ROWS_ENTRY)},
    .moments_rows = moments_rows,
    .respond_moments_rows = {CHEAP_ACTIVATIONS(RESPOND_MOMENTS_ROWS_ENTRY)},
};
