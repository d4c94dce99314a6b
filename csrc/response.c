/*
 * response.c - from input rows to response maps: perturb, activate, subtract the mean, round to the product's type.
 *
 * Every pass computes its response maps here, panel by panel in cache; none ever stores them. Where the input's pixels
 * are contiguous and of the type that is computed in, the kernel reads them where they stand.
 */
#include <string.h>

#include "internal.h"

int64_t pnn_response_channels(const pnn_problem *problem, int64_t rows) {
  return PNN_MIN(pnn_quotient(rows, problem->masks) + 2, problem->channels);
}

/* Whether the input's elements are of `element` bytes with columns next to each other. */
static bool reads_in_place(const pnn_problem *p, int64_t element) {
  return p->input.element == element && (p->input.column == 1 || p->out_width == 1);
}

/* Whether pairs are made from bfloat16 values, where they stand or turned. */
static bool reads_bfloat16(const pnn_problem *p) {
  return reads_in_place(p, p->native) || (p->masks > 1 && pnn_columns_turned(p, &p->input));
}

/* The channels of the response maps [k0, k0 + rows) as rows of elements of `element` bytes. */
static void load_channels(const pnn_problem *p, const pnn_columns *columns, int64_t k0, int64_t rows, int64_t element,
                          void *panel, int64_t ld) {
  const int64_t channel = pnn_quotient(k0, p->masks);
  const int64_t channels = pnn_quotient(k0 + rows - 1, p->masks) - channel + 1;
  if (element == p->real_size)
    pnn_columns_load(p, columns, &p->input, channel, channels, panel, ld);
  else
    pnn_columns_copy(p, columns, &p->input, channel, channels, panel, ld);
}

/* Makes response map k0 + r in the panel's row r by `kernel`, which reads elements of `element` bytes and writes `cell`
 * bytes a column; the padding is left as it is. An input of another type or of other strides is loaded first, as
 * reals or turned. */
static void respond(const pnn_response *response, const pnn_columns *columns, int64_t k0, int64_t rows,
                    pnn_respond_fn kernel, int64_t element, int64_t cell, const char *mean, char *panel, int64_t ld) {
  const pnn_problem *p = response->problem;
  const pnn_view *v = &p->input;
  if (!rows) return;
  const int64_t size = p->real_size, channel = pnn_quotient(k0, p->masks), width = p->out_width;
  const char *mask = p->noise == PNN_NOISE_NONE ? NULL : response->mask;
  if (mask && !p->shared) mask += (k0 - response->mask_k0) * response->mask_ld * size;
  const bool in_place = reads_in_place(p, element);
  /* Where the width is 1 its stride says nothing (it is 0): the rows themselves must be neighbours. */
  const bool rows_join = p->out_height == 1 || v->row == (width == 1 ? 1 : width * v->column);
  char *x = panel;
  if (!in_place) {
    /* With one mask a channel its row is loaded to where its response goes. */
    x = p->masks == 1 ? panel : response->channels;
    load_channels(p, columns, k0, rows, element, x, ld);
  }
  for (int64_t i = 0; i < columns->segments; i++) {
    const pnn_segment *s = &columns->segment[i];
    for (int64_t done = 0, count; done < s->columns; done += count) {
      const int64_t pixel = s->pixel + done, row = pnn_quotient(pixel, width), from = pnn_remainder(pixel, width);
      count = in_place && !rows_join ? PNN_MIN(width - from, s->columns - done) : s->columns - done;
      const int64_t column = s->column + done;
      pnn_source source = {.x = x + column * element,
                           .ldx = ld,
                           .mask = mask ? mask + (pixel - columns->range->pixel) * size : NULL,
                           .ldm = response->mask_ld,
                           .mean = mean,
                           .k0 = k0,
                           .masks = p->masks,
                           .shared = p->shared};
      if (in_place) {
        source.x = v->data + (s->image * v->batch + channel * v->channel + row * v->row + from * v->column) * element;
        source.ldx = v->channel;
      }
      kernel(panel + column * cell, ld, &source, rows, count);
    }
  }
}

void pnn_response_perturbed(const pnn_response *response, const pnn_columns *columns, int64_t k0, int64_t rows, void *u,
                            int64_t ld) {
  const pnn_problem *p = response->problem;
  respond(response, columns, k0, rows, p->kernels->respond[PNN_ACTIVATION_IDENTITY], p->real_size, p->real_size, NULL,
          u, ld);
  pnn_columns_pad(columns, rows, u, ld, p->real_size);
}

void pnn_response_activated(const pnn_response *response, const pnn_columns *columns, int64_t k0, int64_t rows, void *a,
                            int64_t ld) {
  const pnn_problem *p = response->problem;
  respond(response, columns, k0, rows, p->kernels->respond[p->activation], p->real_size, p->real_size, NULL, a, ld);
  pnn_columns_pad(columns, rows, a, ld, p->real_size);
}

static const char *mean_from(const pnn_response *response, int64_t k0) {
  return response->mean ? (const char *)response->mean + k0 * response->problem->real_size : NULL;
}

void pnn_response_operand(const pnn_response *response, const pnn_columns *columns, int64_t k0, int64_t rows, void *a,
                          int64_t ld) {
  const pnn_problem *p = response->problem;
  respond(response, columns, k0, rows, p->kernels->respond[p->activation], p->real_size, p->real_size,
          mean_from(response, k0), a, ld);
  pnn_columns_pad(columns, rows, a, ld, p->real_size);
  if (p->rounded && !p->pairs) p->kernels->round16(p->product_type, a, ld, rows, columns->padded);
}

void pnn_response_map_pairs(const pnn_response *response, const pnn_columns *columns, int64_t k0, int64_t rows,
                            void *pairs, void *panel, int64_t ld) {
  const pnn_problem *p = response->problem;
  if (!reads_bfloat16(p)) {
    pnn_response_operand(response, columns, k0, rows, panel, ld);
    p->kernels->pair_rows(pairs, panel, ld, rows, columns->padded);
    return;
  }
  respond(response, columns, k0, rows, p->kernels->respond_pairs[p->activation], p->native, 4, mean_from(response, k0),
          pairs, ld);
  pnn_columns_pad(columns, (rows + 1) / 2, pairs, ld, 4);
}

void pnn_response_column_pairs(const pnn_response *response, const pnn_columns *columns, int64_t k0, int64_t rows,
                               void *pairs, void *panel, int64_t ld) {
  const pnn_problem *p = response->problem;
  if (!reads_bfloat16(p)) {
    pnn_response_operand(response, columns, k0, rows, panel, ld);
    p->kernels->pair_columns(pairs, ld / 2, panel, ld, rows, columns->padded);
    return;
  }
  respond(response, columns, k0, rows, p->kernels->respond_bfloat16[p->activation], p->native, p->native,
          mean_from(response, k0), pairs, ld);
  pnn_columns_pad(columns, rows, pairs, ld, p->native);
}

bool pnn_response_turn(const pnn_response *response, const pnn_columns *columns, int64_t k0, int64_t rows, int64_t ld) {
  const pnn_problem *p = response->problem;
  if (!rows || p->masks == 1 || reads_in_place(p, p->native)) return false;
  if (p->pairs && !pnn_columns_turned(p, &p->input)) return false;
  load_channels(p, columns, k0, rows, p->native, response->channels, ld);
  return true;
}

bool pnn_response_source(const pnn_response *response, const pnn_columns *columns, int64_t k0, int64_t column,
                         int64_t count, int64_t turned_ld, pnn_source *source) {
  const pnn_problem *p = response->problem;
  const int64_t size = p->real_size;
  int64_t i = 0; /* the run that the columns should lie in */
  while (columns->segment[i].column + columns->segment[i].columns <= column) i++;
  if (column + count > columns->segment[i].column + columns->segment[i].columns) return false;
  const char *x = (const char *)response->channels + column * p->native, *mask = NULL;
  if (!turned_ld) x = pnn_columns_place(p, columns, &p->input, pnn_quotient(k0, p->masks), column, count);
  if (!x) return false;
  if (p->noise != PNN_NOISE_NONE) {
    const int64_t pixel = columns->segment[i].pixel + column - columns->segment[i].column - columns->range->pixel;
    const int64_t row = p->shared ? 0 : k0 - response->mask_k0;
    mask = (const char *)response->mask + (row * response->mask_ld + pixel) * size;
  }
  *source = (pnn_source){.x = x,
                         .ldx = turned_ld ? turned_ld : p->input.channel,
                         .mask = mask,
                         .ldm = response->mask_ld,
                         .mean = mean_from(response, k0),
                         .k0 = k0,
                         .masks = p->masks,
                         .shared = p->shared};
  return true;
}

pnn_source pnn_source_at(const pnn_problem *problem, const pnn_source *source, int64_t rows) {
  const int64_t size = problem->real_size, channel = pnn_quotient(source->k0, source->masks);
  pnn_source at = *source;
  at.k0 += rows;
  at.x = (const char *)at.x + (pnn_quotient(at.k0, at.masks) - channel) * at.ldx * problem->native;
  if (at.mask && !at.shared) at.mask = (const char *)at.mask + rows * at.ldm * size;
  if (at.mean) at.mean = (const char *)at.mean + rows * size;
  return at;
}
