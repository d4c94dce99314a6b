/*
 * columns.c - which pixels are a panel's columns, and moving them between tensors and panels.
 *
 * A panel may span several images, so that small images (7x7, 4x4) leave no lanes idle. Where a tensor's pixels stand
 * at one constant step, whole rows and images move in one call.
 */
#include <string.h>

#include "internal.h"

int64_t pnn_panel_columns(const pnn_problem *problem, int64_t rows, int64_t more) {
  /* The rest of the second-level cache is left to the masks and the weights. */
  const int64_t near = problem->near_bytes / problem->real_size;
  const int64_t a = pnn_quotient(near / 8, PNN_MAX(rows, 1)), b = pnn_quotient(near / 2, PNN_MAX(more, 1));
  return PNN_MAX(PNN_PANEL, PNN_MIN(PNN_MIN(a, b) / PNN_PANEL * PNN_PANEL, PNN_WIDEST));
}

void pnn_columns_set(pnn_columns *columns, const pnn_range *range, int64_t first, int64_t count) {
  columns->range = range;
  columns->columns = count;
  columns->padded = (count + PNN_PAD - 1) / PNN_PAD * PNN_PAD;
  columns->segments = 0;
  int64_t image = pnn_quotient(first, range->pixels), pixel = pnn_remainder(first, range->pixels);
  for (int64_t column = 0; column < count;) {
    const int64_t run = PNN_MIN(range->pixels - pixel, count - column);
    columns->segment[columns->segments++] =
        (pnn_segment){.column = column, .columns = run, .image = image, .pixel = range->pixel + pixel};
    column += run;
    pixel = 0;
    image++;
  }
}

void pnn_columns_pad(const pnn_columns *columns, int64_t rows, void *panel, int64_t ld, int64_t size) {
  const int64_t padding = columns->padded - columns->columns;
  for (int64_t r = 0; padding && r < rows; r++)
    memset((char *)panel + (r * ld + columns->columns) * size, 0, (size_t)(padding * size));
}

typedef enum move_kind { LOAD, STORE, TURN, TURN_PAIRS } move_kind;

typedef struct mover {
  const pnn_problem *problem;
  const pnn_view *view;
  int64_t channel, rows, ld;
  char *panel;
  move_kind kind;
} mover;

static void move(const mover *m, int64_t offset, int64_t column, int64_t count, int64_t step) {
  char *data = m->view->data + (offset + m->channel * m->view->channel) * m->view->element;
  const pnn_kernels *kernels = m->problem->kernels;
  char *panel = m->panel + column * (m->kind == TURN ? m->problem->native : m->problem->real_size);
  switch (m->kind) {
    case LOAD: kernels->load[m->view->dtype](panel, m->ld, data, m->rows, m->view->channel, count, step); return;
    case STORE: kernels->store[m->view->dtype](data, m->view->channel, step, panel, m->ld, m->rows, count); return;
    case TURN: kernels->turn_bfloat16(panel, m->ld, data, step, m->rows, count); return;
    case TURN_PAIRS: kernels->turn_pairs(panel, m->ld, data, step, m->rows, count); return;
  }
}

static void move_all(const mover *m, const pnn_columns *columns) {
  const pnn_view *v = m->view;
  const int64_t width = m->problem->out_width, pixels = m->problem->pixels;
  const bool rows_join = m->problem->out_height == 1 || v->row == width * v->column;
  const bool one_pixel = pixels == 1;
  const int64_t step = one_pixel ? v->batch : width == 1 ? v->row : v->column;
  const bool step_holds = one_pixel || width == 1 || rows_join;
  if (columns->range->pixels == pixels && step_holds && v->batch == pixels * step) {
    const pnn_segment *s = &columns->segment[0];
    move(m, s->image * v->batch + s->pixel * step, 0, columns->columns, step);
    return;
  }
  for (int64_t i = 0; i < columns->segments; i++) {
    const pnn_segment *s = &columns->segment[i];
    const int64_t image = s->image * v->batch;
    if (step_holds) {
      move(m, image + s->pixel * step, s->column, s->columns, step);
      continue;
    }
    int64_t pixel = s->pixel, column = s->column;
    const int64_t end = s->pixel + s->columns;
    while (pixel < end) {
      const int64_t row = pnn_quotient(pixel, width), from = pnn_remainder(pixel, width);
      const int64_t count = PNN_MIN(width - from, end - pixel);
      move(m, image + row * v->row + from * v->column, column, count, v->column);
      pixel += count;
      column += count;
    }
  }
}

void pnn_columns_load(const pnn_problem *problem, const pnn_columns *columns, const pnn_view *view, int64_t channel,
                      int64_t rows, void *panel, int64_t ld) {
  const mover m = {problem, view, channel, rows, ld, panel, LOAD};
  move_all(&m, columns);
  pnn_columns_pad(columns, rows, panel, ld, problem->real_size);
}

void pnn_columns_store(const pnn_problem *problem, const pnn_columns *columns, const pnn_view *view, int64_t channel,
                       int64_t rows, const void *panel, int64_t ld) {
  const mover m = {problem, view, channel, rows, ld, (char *)(uintptr_t)panel, STORE};
  move_all(&m, columns);
}

bool pnn_columns_native(const pnn_problem *problem, const pnn_view *view) {
  const bool joined = problem->out_height == 1 || view->row == problem->out_width * view->column;
  return view->element == problem->native && view->column == 1 && joined;
}

bool pnn_columns_turned(const pnn_problem *problem, const pnn_view *view) {
  return problem->pairs && view->element == problem->native && view->channel == 1 && view->column != 1;
}

void pnn_columns_copy(const pnn_problem *problem, const pnn_columns *columns, const pnn_view *view, int64_t channel,
                      int64_t rows, void *panel, int64_t ld) {
  const int64_t size = problem->native;
  if (pnn_columns_turned(problem, view)) {
    const mover m = {problem, view, channel, rows, ld, panel, TURN};
    move_all(&m, columns);
    pnn_columns_pad(columns, rows, panel, ld, size);
    return;
  }
  for (int64_t i = 0; i < columns->segments; i++) {
    const pnn_segment *s = &columns->segment[i];
    const char *from = view->data + (s->image * view->batch + channel * view->channel + s->pixel) * size;
    for (int64_t r = 0; r < rows; r++)
      memcpy((char *)panel + (r * ld + s->column) * size, from + r * view->channel * size, (size_t)(s->columns * size));
  }
  pnn_columns_pad(columns, rows, panel, ld, size);
}

void pnn_columns_pair(const pnn_problem *problem, const pnn_columns *columns, const pnn_view *view, int64_t channel,
                      int64_t rows, void *panel, int64_t ld) {
  if (pnn_columns_turned(problem, view)) {
    const mover m = {problem, view, channel, rows, ld, panel, TURN_PAIRS};
    move_all(&m, columns);
    pnn_columns_pad(columns, (rows + 1) / 2, panel, ld, 4);
    return;
  }
  for (int64_t i = 0; i < columns->segments; i++) {
    const pnn_segment *s = &columns->segment[i];
    const char *from = view->data + (s->image * view->batch + channel * view->channel + s->pixel) * problem->native;
    problem->kernels->pair_bfloat16((char *)panel + s->column * 4, ld, from, view->channel, rows, s->columns);
  }
  pnn_columns_pad(columns, (rows + 1) / 2, panel, ld, 4);
}

char *pnn_columns_place(const pnn_problem *problem, const pnn_columns *columns, const pnn_view *view, int64_t channel,
                        int64_t column, int64_t count) {
  const pnn_view *v = view;
  if (!pnn_columns_native(problem, v)) return NULL;
  for (int64_t i = 0; i < columns->segments; i++) {
    const pnn_segment *s = &columns->segment[i];
    if (column >= s->column + s->columns) continue;
    if (column + count > s->column + s->columns) return NULL;
    return v->data + (s->image * v->batch + channel * v->channel + s->pixel + column - s->column) * v->element;
  }
  return NULL;
}

void pnn_columns_part(pnn_columns *part, const pnn_columns *columns, int64_t first, int64_t column, int64_t end) {
  pnn_columns_set(part, columns->range, first + column, end - column);
  part->padded = (end == columns->columns ? columns->padded : end) - column;
}

void pnn_ahead_add(const pnn_problem *problem, pnn_ahead *ahead, const pnn_range *range, int64_t column, int64_t count,
                   const pnn_view *view, int64_t channel, int64_t channels, bool write) {
  const pnn_view *v = view;
  const bool pixels_joined = problem->out_height == 1 || v->row == problem->out_width * v->column;
  if (count <= 0 || channels <= 0 || !pixels_joined || (v->column != 1 && v->channel != 1)) return;
  const bool pixels = v->column == 1;
  /* Channels-last images without a gap are one. */
  const bool images_joined = !pixels && range->pixels == problem->pixels && v->batch == problem->pixels * v->column;
  for (int64_t run; count > 0 && ahead->streams < PNN_AHEAD_STREAMS; column += run, count -= run) {
    const int64_t image = pnn_quotient(column, range->pixels), pixel = pnn_remainder(column, range->pixels);
    run = images_joined ? count : PNN_MIN(count, range->pixels - pixel);
    pnn_ahead_stream *s = &ahead->stream[ahead->streams++];
    *s = (pnn_ahead_stream){
        .data = v->data + (image * v->batch + channel * v->channel + (range->pixel + pixel) * v->column) * v->element,
        .stride = (pixels ? v->channel : v->column) * v->element,
        .bytes = (pixels ? run : channels) * v->element,
        .rows = pixels ? channels : run,
        .write = write,
        .far = (problem->batch - 1) * v->batch * v->element > PNN_AHEAD_PAGES * PNN_AHEAD_PAGE};
    if (s->stride != s->bytes) continue;
    /* Without gaps: one row, or rows of a page. */
    const int64_t bytes = s->rows * s->bytes;
    s->far &= !pnn_pages_foreseen();
    s->rows = s->far ? PNN_MAX(bytes / PNN_AHEAD_PAGE, 1) : 1;
    s->stride = s->bytes = pnn_quotient_up(bytes, s->rows);
  }
}

/* A range's masks should stay in the second-level cache beside the panels, in half of it, and may take this and once
 * dV's bytes, where not even a panel's columns would fit (few outputs, many maps). */
#define LEAST_MASK_BYTES (128 * 1024)

pnn_deal pnn_deal_columns(const pnn_problem *problem, const pnn_host *host, int64_t width, int64_t unit,
                          int64_t mask_rows, int64_t share, bool whole_batch) {
  const int64_t pixels = problem->pixels, images = problem->batch;
  /* Four pieces a thread even out what the threads lose to other work. */
  const int64_t wanted = pnn_quotient_up(4 * (int64_t)(host ? host->threads : 1), PNN_MAX(share, 1));
  int64_t most = mask_rows ? pnn_quotient(problem->near_bytes / 2 / problem->real_size, mask_rows) : pixels;
  if (whole_batch || images < wanted) {
    const int64_t ranges = whole_batch ? wanted : pnn_quotient_up(wanted, PNN_MAX(images, 1));
    most = PNN_MIN(most, pnn_quotient_up(pixels, ranges));
  }
  const int64_t group_rows = PNN_MIN(pnn_mask_rows(problem, problem->group_maps), mask_rows);
  const int64_t room = LEAST_MASK_BYTES / problem->real_size + problem->outputs * problem->group_maps;
  int64_t least = group_rows ? PNN_MAX(PNN_MIN(pnn_quotient(room, group_rows), width), 1) : width;
  if (least > PNN_LANES) least = least / PNN_LANES * PNN_LANES; /* whole cache lines */
  const int64_t step = most < width ? least : width;
  most = PNN_MAX(pnn_round_up(most, step), step);
  pnn_deal deal = {.ranges = pnn_quotient_up(pixels, most)};
  deal.pixels = deal.ranges ? PNN_MIN(pnn_round_up(pnn_quotient_up(pixels, deal.ranges), step), pixels) : 0;
  deal.ranges = deal.pixels ? pnn_quotient_up(pixels, deal.pixels) : 0;
  /* No piece without columns: it would wake a thread for nothing. */
  const int64_t panels = PNN_MAX(pnn_quotient_up(deal.pixels * images, width), 1);
  deal.cuts = whole_batch || !deal.ranges ? 1 : PNN_MIN(pnn_quotient_up(wanted, deal.ranges), panels);
  deal.unit = unit;
  return deal;
}

void pnn_deal_piece(const pnn_problem *problem, const pnn_deal *deal, int64_t i, pnn_range *range, int64_t *first,
                    int64_t *end) {
  range->pixel = pnn_quotient(i, deal->cuts) * deal->pixels;
  range->pixels = PNN_MIN(deal->pixels, problem->pixels - range->pixel);
  const int64_t total = range->pixels * problem->batch, cut = pnn_remainder(i, deal->cuts);
  const int64_t units = pnn_quotient_up(total, deal->unit);
  *first = PNN_MIN(pnn_quotient(units * cut, deal->cuts) * deal->unit, total);
  *end = PNN_MIN(pnn_quotient(units * (cut + 1), deal->cuts) * deal->unit, total);
}
