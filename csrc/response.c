/*
 * response.c - from input rows to response maps: perturb, activate, subtract the mean, round to the product's type.
 *
 * Every pass computes its response maps here, panel by panel in cache; none ever stores them. Where the input's pixels
 * are contiguous and of the type that is computed in, the kernel reads them where they stand.
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

/* panel[r][column] = activation(u) - mean[r] of response map k0 + r; the padding is left as it is. */
static void respond(const pnn_response *response, const pnn_columns *columns, int64_t k0, int64_t rows,
                    pnn_activation activation, const char *mean, char *panel, int64_t ld) {
  const pnn_problem *p = response->problem;
  const pnn_view *v = &p->input;
  if (!rows) return;
  const int64_t size = p->real_size, channel = k0 / p->masks, width = p->out_width;
  const char *mask = p->noise == PNN_NOISE_NONE ? NULL : response->mask;
  if (mask && !p->shared) mask += (k0 - response->mask_k0) * response->mask_ld * size;
  const bool in_place = v->element == size && (v->column == 1 || width == 1);
  /* Where the width is 1 its stride says nothing (it is 0): the rows themselves must be neighbours. */
  const bool rows_join = p->out_height == 1 || v->row == (width == 1 ? 1 : width * v->column);
  char *x = panel;
  if (!in_place) {
    /* With one mask a channel its row is loaded to where its response goes. */
    x = p->masks == 1 ? panel : response->channels;
    pnn_columns_load(p, columns, v, channel, (k0 + rows - 1) / p->masks - channel + 1, x, ld);
  }
  for (int64_t i = 0; i < columns->segments; i++) {
    const pnn_segment *s = &columns->segment[i];
    for (int64_t done = 0, count; done < s->columns; done += count) {
      const int64_t pixel = s->pixel + done, row = pixel / width, from = pixel % width;
      count = in_place && !rows_join ? PNN_MIN(width - from, s->columns - done) : s->columns - done;
      const int64_t column = s->column + done;
      pnn_source source = {.x = x + column * size,
                           .ldx = ld,
                           .mask = mask ? mask + (pixel - columns->range->pixel) * size : NULL,
                           .ldm = response->mask_ld,
                           .mean = mean,
                           .k0 = k0,
                           .masks = p->masks,
                           .shared = p->shared};
      if (in_place) {
        source.x = v->data + (s->image * v->batch + channel * v->channel + row * v->row + from * v->column) * size;
        source.ldx = v->channel;
      }
      p->kernels->respond[activation](panel + column * size, ld, &source, rows, count);
    }
  }
}

void pnn_response_perturbed(const pnn_response *response, const pnn_columns *columns, int64_t k0, int64_t rows, void *u,
                            int64_t ld) {
  respond(response, columns, k0, rows, PNN_ACTIVATION_IDENTITY, NULL, u, ld);
  zero_padding(response->problem, columns, rows, u, ld);
}

void pnn_response_activated(const pnn_response *response, const pnn_columns *columns, int64_t k0, int64_t rows, void *a,
                            int64_t ld) {
  respond(response, columns, k0, rows, response->problem->activation, NULL, a, ld);
  zero_padding(response->problem, columns, rows, a, ld);
}

void pnn_response_operand(const pnn_response *response, const pnn_columns *columns, int64_t k0, int64_t rows, void *a,
                          int64_t ld) {
  const pnn_problem *p = response->problem;
  const char *mean = response->mean;
  if (mean) mean += k0 * p->real_size;
  respond(response, columns, k0, rows, p->activation, mean, a, ld);
  zero_padding(p, columns, rows, a, ld);
  if ((p->product_type == PNN_BFLOAT16 && !p->pairs) || p->product_type == PNN_FLOAT16)
    p->kernels->round16(p->product_type, a, ld, rows, columns->padded);
}

bool pnn_response_source(const pnn_response *response, const pnn_columns *columns, int64_t k0, int64_t column,
                         int64_t count, pnn_source *source) {
  const pnn_problem *p = response->problem;
  const int64_t size = p->real_size;
  const char *x = pnn_columns_place(p, columns, &p->input, k0 / p->masks, column, count), *mask = NULL;
  if (!x) return false;
  if (p->noise != PNN_NOISE_NONE) {
    int64_t i = 0;
    while (columns->segment[i].column + columns->segment[i].columns <= column) i++;
    const int64_t pixel = columns->segment[i].pixel + column - columns->segment[i].column - columns->range->pixel;
    const int64_t row = p->shared ? 0 : k0 - response->mask_k0;
    mask = (const char *)response->mask + (row * response->mask_ld + pixel) * size;
  }
  *source = (pnn_source){.x = x,
                         .ldx = p->input.channel,
                         .mask = mask,
                         .ldm = response->mask_ld,
                         .mean = response->mean ? (const char *)response->mean + k0 * size : NULL,
                         .k0 = k0,
                         .masks = p->masks,
                         .shared = p->shared};
  return true;
}

pnn_source pnn_source_at(const pnn_problem *problem, const pnn_source *source, int64_t rows) {
  const int64_t size = problem->real_size, channel = source->k0 / source->masks;
  pnn_source at = *source;
  at.k0 += rows;
  at.x = (const char *)at.x + (at.k0 / at.masks - channel) * at.ldx * size;
  if (at.mask && !at.shared) at.mask = (const char *)at.mask + rows * at.ldm * size;
  if (at.mean) at.mean = (const char *)at.mean + rows * size;
  return at;
}
