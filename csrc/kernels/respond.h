/*
 * respond.h - from x and masks to response maps, and from their gradients to x's, by themselves and inside the products
 * of product.h and dot.h; a part of kernels.c.
 */
#ifndef PNN_KERNELS_RESPOND_H
#define PNN_KERNELS_RESPOND_H

#if defined(PNN_REAL_F32)
#define PNN_ACTIVATE(name) pnn_##name##_f32
#define PNN_ACTIVATE_GRAD(name) pnn_##name##_grad_f32
#else
#define PNN_ACTIVATE(name) pnn_##name##_f64
#define PNN_ACTIVATE_GRAD(name) pnn_##name##_grad_f64
#endif

#define DEFINE_ACTIVATION(suffix, name)                                                                                \
  static void respond_##name(void *a_, int64_t lda, const pnn_source *source, int64_t rows, int64_t columns) {         \
    const int64_t whole = columns / VR * VR, rest = columns - whole, ldx = source->ldx, ldm = source->ldm;             \
    const int64_t masks = source->masks;                                                                               \
    int64_t m = pnn_remainder(source->k0, masks), channel = 0;                                                         \
    for (int64_t r = 0; r < rows; r++) {                                                                               \
      real *a = (real *)a_ + r * lda;                                                                                  \
      const real *x = (const real *)source->x + channel * ldx;                                                         \
      const real *mask = source->mask ? (const real *)source->mask + (source->shared ? m : r) * ldm : NULL;            \
      /* a - 0 is a, to the bit */                                                                                     \
      const vr mean = vr_set1(source->mean ? ((const real *)source->mean)[r] : 0);                                     \
      if (mask) {                                                                                                      \
        for (int64_t j = 0; j < whole; j += VR)                                                                        \
          vr_store(a + j, PNN_ACTIVATE(name)(vr_load(x + j) + vr_load(mask + j)) - mean);                              \
      } else {                                                                                                         \
        for (int64_t j = 0; j < whole; j += VR) vr_store(a + j, PNN_ACTIVATE(name)(vr_load(x + j)) - mean);            \
      }                                                                                                                \
      if (rest) {                                                                                                      \
        vr u = vr_load_part(x + whole, rest);                                                                          \
        if (mask) u += vr_load_part(mask + whole, rest);                                                               \
        vr_store_part(a + whole, PNN_ACTIVATE(name)(u) - mean, rest);                                                  \
      }                                                                                                                \
      if (++m == masks) m = 0, channel++;                                                                              \
    }                                                                                                                  \
  }                                                                                                                    \
  static void activate_##name(void *a_, int64_t lda, int64_t rows, int64_t columns) {                                  \
    for (int64_t r = 0; r < rows; r++) {                                                                               \
      real *a = (real *)a_ + r * lda;                                                                                  \
      for (int64_t j = 0; j < columns; j += VR) vr_store(a + j, PNN_ACTIVATE(name)(vr_load(a + j)));                   \
    }                                                                                                                  \
  }                                                                                                                    \
  static void activate_grad_##name(void *d_, int64_t ldd, const void *u_, int64_t ldu, int64_t rows,                   \
                                   int64_t columns) {                                                                  \
    for (int64_t r = 0; r < rows; r++) {                                                                               \
      real *d = (real *)d_ + r * ldd;                                                                                  \
      const real *u = (const real *)u_ + r * ldu;                                                                      \
      for (int64_t j = 0; j < columns; j += VR)                                                                        \
        vr_store(d + j, PNN_ACTIVATE_GRAD(name)(vr_load(u + j), vr_load(d + j)));                                      \
    }                                                                                                                  \
  }                                                                                                                    \
  static void respond_grad_##name(void *dx_, int64_t ldx, const void *d_, int64_t ldd, const void *x_, int64_t step,   \
                                  const void *mask_, int64_t ldm, const pnn_norm_terms *norm, int64_t rows,            \
                                  int64_t columns, int64_t masks, int32_t shared) {                                    \
    for (int64_t r = 0; r < rows; r++) {                                                                               \
      real *dx = (real *)dx_ + r * ldx;                                                                                \
      const real *d = (const real *)d_ + r * masks * ldd, *x = (const real *)x_ + r * step;                            \
      const real *mask = mask_ ? (const real *)mask_ + (shared ? 0 : r * masks * ldm) : NULL;                          \
      const real *mean = norm ? (const real *)norm->mean + r * masks : NULL;                                           \
      const real *offset = norm ? (const real *)norm->offset + r * masks : NULL;                                       \
      const real *slope = norm ? (const real *)norm->slope + r * masks : NULL;                                         \
      const int64_t whole = masks == 1 && !norm ? columns / VR * VR : 0; /* the common case, without choices */        \
      if (mask) {                                                                                                      \
        for (int64_t j = 0; j < whole; j += VR)                                                                        \
          vr_store(dx + j, PNN_ACTIVATE_GRAD(name)(vr_load(x + j) + vr_load(mask + j), vr_load(d + j)));               \
      } else {                                                                                                         \
        for (int64_t j = 0; j < whole; j += VR)                                                                        \
          vr_store(dx + j, PNN_ACTIVATE_GRAD(name)(vr_load(x + j), vr_load(d + j)));                                   \
      }                                                                                                                \
      for (int64_t j = whole; j < columns; j += VR) {                                                                  \
        const int64_t n = columns - j;                                                                                 \
        const vr v = load_some(x + j, n);                                                                              \
        vr sum = vr_set1(0);                                                                                           \
        for (int64_t m = 0; m < masks; m++) {                                                                          \
          const vr u = mask ? v + load_some(mask + m * ldm + j, n) : v;                                                \
          vr da = load_some(d + m * ldd + j, n);                                                                       \
          if (norm) da = vr_fma(vr_set1(slope[m]), PNN_ACTIVATE(name)(u) - vr_set1(mean[m]), da + vr_set1(offset[m])); \
          const vr one = PNN_ACTIVATE_GRAD(name)(u, da);                                                               \
          if (m) {                                                                                                     \
            sum += one;                                                                                                \
          } else {                                                                                                     \
            sum = one;                                                                                                 \
          }                                                                                                            \
        }                                                                                                              \
        store_some(dx + j, sum, n);                                                                                    \
      }                                                                                                                \
    }                                                                                                                  \
  }
PNN_ACTIVATION_LIST(DEFINE_ACTIVATION)

/* `product` whose panel is made on the way. */
static inline __attribute__((always_inline)) void respond_product(int64_t depth, int64_t rows, const real *restrict a,
                                                                  real *restrict b, int64_t ldb, real *restrict c,
                                                                  int64_t ldc, const real *start,
                                                                  const pnn_source *source, pnn_ahead *ahead,
                                                                  vr (*activate)(vr), bool masked, bool centred) {
  const int64_t masks = source->masks, ldm = source->ldm, ldx = source->ldx;
  const int64_t mask_back = source->shared ? masks * ldm : 0;
  int64_t m = pnn_remainder(source->k0, masks);
  const real *x = source->x, *mask = source->mask, *mean = source->mean;
  if (masked && source->shared) mask += m * ldm;
  vr sum[TILE_ROWS][TILE_VECTORS];
  tile_begin(TILE_ROWS, sum, rows, c, ldc, start);
  for (int64_t left = depth; left > 0; left -= PNN_AHEAD_DEPTH, pnn_ahead_step(ahead))
    for (int64_t k = 0; k < left && k < PNN_AHEAD_DEPTH; k++, a += TILE_ROWS, b += ldb) {
      vr bv[TILE_VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < TILE_VECTORS; v++) {
        bv[v] = vr_load(x + v * VR);
        if (masked) bv[v] += vr_load(mask + v * VR);
        bv[v] = activate(bv[v]);
        if (centred) bv[v] -= vr_set1(*mean);
        vr_store(b + v * VR, bv[v]);
      }
      tile_step(TILE_ROWS, sum, a, bv);
      if (masked) mask += ldm;
      if (centred) mean++;
      if (++m == masks) {
        m = 0;
        x += ldx;
        if (masked) mask -= mask_back;
      }
    }
  tile_end(TILE_ROWS, sum, rows, c, ldc);
}

/* From a tile of da to dx. All of x is read before the first store: where rows lie a multiple of 4096 bytes apart, a
 * processor takes a row's store for what the next row's load waits for. */
static inline __attribute__((always_inline)) void tile_respond_grad(int most, vr sum[][TILE_VECTORS], real *restrict dx,
                                                                    int64_t ldo, int64_t rows, const real *restrict x,
                                                                    int64_t ldx, const real *restrict mask, int64_t ldm,
                                                                    bool masked, const pnn_norm_terms *norm,
                                                                    vr (*activate)(vr), vr (*activate_grad)(vr, vr)) {
  /* Else x would be loaded once for all three calls, ahead of them, and so to the stack. */
  KEEP_POINTER(x);
#pragma GCC unroll 8
  for (int i = 0; i < most; i++) {
    if (i >= rows) break;
#pragma GCC unroll 4
    for (int v = 0; v < TILE_VECTORS; v++) {
      vr u = vr_load(x + i * ldx + v * VR), da = sum[i][v];
      if (masked) u += vr_load(mask + i * ldm + v * VR);
      if (norm) {
        const real *mean = norm->mean, *offset = norm->offset, *slope = norm->slope;
        da = vr_fma(vr_set1(slope[i]), activate(u) - vr_set1(mean[i]), da + vr_set1(offset[i]));
      }
      sum[i][v] = activate_grad(u, da);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < most; i++) {
    if (i >= rows) break;
#pragma GCC unroll 4
    for (int v = 0; v < TILE_VECTORS; v++) vr_store(dx + i * ldo + v * VR, sum[i][v]);
  }
}

/* The sums of a tile through the activation to the gradient of the input, one mask a channel; g NULL: b holds the panel
 * already. */
static inline __attribute__((always_inline)) void product_respond_grad(
    int most, int64_t depth, const real *restrict a, const real *restrict g, int64_t ldg, real *restrict b, int64_t ldb,
    real *restrict dx, int64_t ldo, int64_t rows, const pnn_source *source, const pnn_norm_terms *norm,
    pnn_ahead *ahead, vr (*activate)(vr), vr (*activate_grad)(vr, vr)) {
  const real *x = source->x, *mask = source->mask;
  const int64_t ldx = source->ldx, ldm = source->shared ? 0 : source->ldm;
  for (int64_t i = 0; i < rows; i++)
    for (int v = 0; v < TILE_VECTORS; v++) {
      __builtin_prefetch(x + i * ldx + v * VR);
      if (mask) __builtin_prefetch(mask + i * ldm + v * VR);
    }
  vr sum[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < most; i++)
#pragma GCC unroll 4
    for (int v = 0; v < TILE_VECTORS; v++) sum[i][v] = vr_set1(0);
  if (g) {
    for (int64_t left = depth; left > 0; left -= PNN_AHEAD_DEPTH, pnn_ahead_step(ahead))
      for (int64_t k = 0; k < left && k < PNN_AHEAD_DEPTH; k++, a += TILE_ROWS, b += ldb, g += ldg) {
        vr bv[TILE_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < TILE_VECTORS; v++) {
          bv[v] = vr_load(g + v * VR);
          vr_store(b + v * VR, bv[v]);
        }
        tile_step(most, sum, a, bv);
      }
  } else {
    tile_products(most, depth, sum, a, b, ldb, ahead);
  }
  if (norm)
    tile_respond_grad(most, sum, dx, ldo, rows, x, ldx, mask, ldm, mask != NULL, norm, activate, activate_grad);
  else if (mask)
    tile_respond_grad(most, sum, dx, ldo, rows, x, ldx, mask, ldm, true, NULL, activate, activate_grad);
  else
    tile_respond_grad(most, sum, dx, ldo, rows, x, ldx, NULL, 0, false, NULL, activate, activate_grad);
}

/* Activations of a few instructions, which leave the registers to the sums. The portable kernels gain nothing from it
 * (and GCC 12 fails on their selections of doubles here). */
#if defined(PNN_ISA_PORTABLE)
#define CHEAP_ACTIVATIONS(X) X(IDENTITY, identity)
#else
#define CHEAP_ACTIVATIONS(X) X(IDENTITY, identity) X(RELU, relu) X(LEAKY_RELU, leaky_relu) X(HARDTANH, hardtanh)
#endif

#define DEFINE_RESPOND_PRODUCT(suffix, name)                                                                          \
  static void respond_product_##name(int64_t depth, int64_t rows, const void *a, void *b, int64_t ldb, void *c,       \
                                     int64_t ldc, const void *start, const pnn_source *source, pnn_ahead *ahead) {    \
    if (source->mask && source->mean)                                                                                 \
      respond_product(depth, rows, a, b, ldb, c, ldc, start, source, ahead, PNN_ACTIVATE(name), true, true);          \
    else if (source->mask)                                                                                            \
      respond_product(depth, rows, a, b, ldb, c, ldc, start, source, ahead, PNN_ACTIVATE(name), true, false);         \
    else if (source->mean)                                                                                            \
      respond_product(depth, rows, a, b, ldb, c, ldc, start, source, ahead, PNN_ACTIVATE(name), false, true);         \
    else                                                                                                              \
      respond_product(depth, rows, a, b, ldb, c, ldc, start, source, ahead, PNN_ACTIVATE(name), false, false);        \
  }                                                                                                                   \
  static void respond_dot_##name(int64_t columns, void *a, int64_t lda, const void *g, int64_t ldg, void *b,          \
                                 int64_t ldb, const pnn_source *source, void *out, int64_t ldo, int32_t first,        \
                                 const pnn_ahead_run *ahead) {                                                        \
    if (g && source)                                                                                                  \
      dot_tile(columns, a, lda, g, ldg, b, ldb, source, DOT_ROWS, DOT_COLUMNS, out, ldo, first, ahead,                \
               PNN_ACTIVATE(name));                                                                                   \
    else if (source)                                                                                                  \
      dot_tile(columns, a, lda, NULL, 0, b, ldb, source, DOT_ROWS, DOT_COLUMNS, out, ldo, first, ahead,               \
               PNN_ACTIVATE(name));                                                                                   \
    else                                                                                                              \
      dot_tile(columns, a, lda, g, ldg, b, ldb, NULL, DOT_ROWS, DOT_COLUMNS, out, ldo, first, ahead,                  \
               PNN_ACTIVATE(name));                                                                                   \
  }                                                                                                                   \
  static void product_respond_grad_##name(int64_t depth, const void *a, const void *g, int64_t ldg, void *b,          \
                                          int64_t ldb, void *dx, int64_t ldo, int64_t rows, const pnn_source *source, \
                                          const pnn_norm_terms *norm, pnn_ahead *ahead) {                             \
    if (rows > 4)                                                                                                     \
      product_respond_grad(TILE_ROWS, depth, a, g, ldg, b, ldb, dx, ldo, rows, source, norm, ahead,                   \
                           PNN_ACTIVATE(name), PNN_ACTIVATE_GRAD(name));                                              \
    else                                                                                                              \
      product_respond_grad(4, depth, a, g, ldg, b, ldb, dx, ldo, rows, source, norm, ahead, PNN_ACTIVATE(name),       \
                           PNN_ACTIVATE_GRAD(name));                                                                  \
  }
CHEAP_ACTIVATIONS(DEFINE_RESPOND_PRODUCT)

static void affine(void *d_, int64_t ldd, const void *c_, int64_t ldc, const void *offset_, const void *slope_,
                   int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r++) {
    real *d = (real *)d_ + r * ldd;
    const real *c = (const real *)c_ + r * ldc;
    const vr offset = vr_set1(((const real *)offset_)[r]), slope = vr_set1(((const real *)slope_)[r]);
    for (int64_t j = 0; j < columns; j += VR) vr_store(d + j, vr_fma(slope, vr_load(c + j), vr_load(d + j) + offset));
  }
}

static void scale(void *a_, int64_t lda, double factor, int64_t rows, int64_t columns) {
  const real f = (real)factor;
  for (int64_t r = 0; r < rows; r++) {
    real *a = (real *)a_ + r * lda;
    for (int64_t j = 0; j < columns; j++) a[j] *= f;
  }
}

static void accumulate(void *s_, const void *a_, int64_t columns) {
  real *restrict s = s_;
  const real *restrict a = a_;
  for (int64_t j = 0; j < columns; j++) s[j] += a[j];
}

static void round16(pnn_dtype which, void *a_, int64_t lda, int64_t rows, int64_t columns) {
#if defined(PNN_REAL_F32)
  for (int64_t r = 0; r < rows; r++) {
    real *a = (real *)a_ + r * lda;
    uint16_t half[VR];
    int64_t j = 0;
    if (which == PNN_BFLOAT16) {
      for (; j + VR <= columns; j += VR) vr_store(a + j, (vr)(upper_half(vr_load(a + j)) & 0xffff0000u));
      for (; j < columns; j++) a[j] = from_bfloat16(to_bfloat16(a[j]));
    } else {
      for (; j + VR <= columns; j += VR) {
        store_vector_float16(half, vr_load(a + j));
        vr_store(a + j, load_vector_float16(half));
      }
      for (; j < columns; j++) a[j] = from_float16(to_float16(a[j]));
    }
  }
#else
  (void)which, (void)a_, (void)lda, (void)rows, (void)columns; /* double products have no 16-bit operands */
#endif
}

#endif
