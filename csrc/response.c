/*
 * response.c - from input rows to response maps: perturb, activate, subtract the mean, round to the product's type.
 *
 * Every pass computes its response maps here, panel by panel in cache; none ever stores them.
 */
#include <string.h>

#include "internal.h"

int64_t pnn_response_channels(const pnn_problem *problem, int64_t rows) {
  return PNN_MIN(rows / problem->masks + 2, problem->channels);
}

static void zero_padding(const pnn_problem *problem, const pnn_columns *columns, int64_t rows, void *panel,
                         int64_t ld) {
  const int64_t padding = columns->padded - columns->columns, size = problem->real_size;
  if (!padding) return;
  for (int64_t r = 0; r < rows; r++)
    memset((char *)panel + (r * ld + columns->columns) * size, 0, (size_t)(padding * size));
}

void pnn_response_perturbed(const pnn_response *response, const pnn_columns *columns, int64_t k0, int64_t rows,
                            void *u, int64_t ld) {
  const pnn_problem *p = response->problem;
  const int64_t size = p->real_size, channel = k0 / p->masks;
  /* With one mask a channel its row is perturbed in place. */
  char *x = p->masks == 1 ? u : response->channels;
  pnn_columns_load(p, columns, &p->input, channel, (k0 + rows - 1) / p->masks - channel + 1, x, ld);
  if (p->noise == PNN_NOISE_NONE) {
    if (p->masks > 1)
      for (int64_t r = 0; r < rows; r++)
        memcpy((char *)u + r * ld * size, x + ((k0 + r) / p->masks - channel) * ld * size,
               (size_t)(columns->padded * size));
    return;
  }
  const char *mask = response->mask;
  if (!p->shared) mask += (k0 - response->mask_k0) * response->mask_ld * size;
  for (int64_t i = 0; i < columns->segments; i++) {
    const pnn_segment *s = &columns->segment[i];
    p->kernels->perturb((char *)u + s->column * size, ld, x + s->column * size, ld,
                        mask + (s->pixel - columns->range->pixel) * size, response->mask_ld, rows, s->columns, k0,
                        p->masks, p->shared);
  }
  if (p->masks > 1) zero_padding(p, columns, rows, u, ld);
}

void pnn_response_activate(const pnn_response *response, const pnn_columns *columns, int64_t k0, int64_t rows, void *a,
                           int64_t ld) {
  const pnn_problem *p = response->problem;
  p->kernels->activate[p->activation](a, ld, rows, columns->padded);
  if (response->mean)
    p->kernels->center(a, ld, (const char *)response->mean + k0 * p->real_size, rows, columns->padded);
  if (p->product_type == PNN_BFLOAT16 || p->product_type == PNN_FLOAT16)
    p->kernels->round16(p->product_type, a, ld, rows, columns->padded);
  zero_padding(p, columns, rows, a, ld);
}
