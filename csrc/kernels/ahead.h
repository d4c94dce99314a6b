/*
 * ahead.h - asks for memory that the next panel will need while the products of this one run.
 *
 * A panel takes short pieces of many rows, which no processor's own prefetcher foresees. Asking for all of them at once
 * would fill the processor's list of open misses and stall it, so the products ask for a few lines every
 * PNN_AHEAD_DEPTH steps of their depth. Nothing but time depends on it.
 *
 * Rows on pages of their own cost a walk through the page tables each, some hundred cycles of which a processor does
 * several at a time, but only as far apart as its window of instructions is long. So of tensors with more pages than it
 * keeps in mind a line of each page is asked for at once, before the products: the walks overlap. A processor that
 * walks ahead by itself along a run without gaps (pnn_pages_foreseen) is left to it there.
 */
#ifndef PNN_KERNELS_AHEAD_H
#define PNN_KERNELS_AHEAD_H

#include <stdbool.h>
#include <stdint.h>

#include "quotient.h"

#define PNN_AHEAD_DEPTH 8
#define PNN_AHEAD_STREAMS 12
#define PNN_AHEAD_PAGE 4096
#define PNN_AHEAD_PAGES 2048 /* fewer than a second-level TLB holds */

typedef struct pnn_ahead_stream {
  const char *data;
  int64_t stride, bytes, rows; /* bytes from row to row, and of a row */
  int32_t write;               /* to be written */
  int32_t far;                 /* of a tensor of more than PNN_AHEAD_PAGES pages, which are asked for one by one */
} pnn_ahead_stream;

typedef struct pnn_ahead {
  pnn_ahead_stream stream[PNN_AHEAD_STREAMS]; /* one after the other */
  int32_t streams, current;
  int64_t row;            /* rows of the current stream that were begun */
  const char *line, *end; /* what is left of the last one */
  int64_t pace;           /* lines a step */
  bool long_rows;         /* every row takes many steps */
} pnn_ahead;

/* Begins the next row; 0 where there is none. */
static inline int pnn_ahead_next(pnn_ahead *ahead) {
  while (ahead->current < ahead->streams) {
    const pnn_ahead_stream *s = &ahead->stream[ahead->current];
    if (ahead->row < s->rows) {
      const char *row = s->data + ahead->row++ * s->stride;
      ahead->line = row - (uintptr_t)row % 64;
      ahead->end = row + s->bytes;
      return 1;
    }
    ahead->current++;
    ahead->row = 0;
  }
  return 0;
}

static inline void pnn_ahead_step(pnn_ahead *ahead) {
  for (int64_t i = 0; i < ahead->pace; i++) {
    if (ahead->line >= ahead->end && !pnn_ahead_next(ahead)) {
      ahead->pace = 0;
      return;
    }
    if (ahead->stream[ahead->current].write)
      __builtin_prefetch(ahead->line, 1, 2);
    else
      __builtin_prefetch(ahead->line, 0, 2);
    ahead->line += 64;
  }
}

/* The same for loops whose tensors have channels next to each other, hence long rows; those in whole steps. */
static inline void pnn_ahead_step_rows(pnn_ahead *ahead) {
  if (!ahead->long_rows) {
    pnn_ahead_step(ahead);
    return;
  }
  if (ahead->line >= ahead->end && !pnn_ahead_next(ahead)) {
    ahead->long_rows = false, ahead->pace = 0;
    return;
  }
  const char *line = ahead->line, *const end = line + 64 * ahead->pace; /* no look at the row's end */
  if (ahead->stream[ahead->current].write)
    for (; line < end; line += 64) __builtin_prefetch(line, 1, 2);
  else
    for (; line < end; line += 64) __builtin_prefetch(line, 0, 2);
  ahead->line = end;
}

/* One step's share for a loop that asks for a line each time round: at data, data + step, ... */
typedef struct pnn_ahead_run {
  const char *data;
  int64_t step, bytes;
} pnn_ahead_run;

/* What each of several loops of `rounds` asks for: at most a line each time round. */
static inline pnn_ahead_run pnn_ahead_share(const pnn_ahead *ahead, int64_t rounds) {
  const int64_t bytes = 64 * (ahead->pace < rounds ? ahead->pace : rounds);
  const pnn_ahead_run share = {0, pnn_quotient_up(bytes, rounds), bytes};
  return share;
}

/* The next loop's share; `otherwise`, which is in cache, where nothing is left. */
static inline pnn_ahead_run pnn_ahead_take(pnn_ahead *ahead, pnn_ahead_run share, const void *otherwise) {
  if (!ahead->pace || (ahead->line >= ahead->end && !pnn_ahead_next(ahead))) {
    share.data = (const char *)otherwise;
    share.step = 0;
    return share;
  }
  share.data = ahead->line;
  ahead->line += share.bytes;
  return share;
}

/* Spreads what was added over `steps` steps. */
static inline void pnn_ahead_spread(pnn_ahead *ahead, int64_t steps) {
  int64_t lines = 0;
  for (int i = 0; i < ahead->streams; i++) {
    const pnn_ahead_stream *s = &ahead->stream[i];
    lines += s->rows * (s->bytes / 64 + 1);
    const int64_t page = s->stride < PNN_AHEAD_PAGE && s->stride > 0 ? PNN_AHEAD_PAGE / s->stride : 1; /* rows on one */
    for (int64_t r = 0; s->far && r < s->rows; r += page) __builtin_prefetch(s->data + r * s->stride, 0, 2);
  }
  ahead->pace = steps > 0 ? pnn_quotient_up(lines, steps) : 0;
  ahead->long_rows = ahead->pace > 0;
  for (int i = 0; i < ahead->streams; i++) ahead->long_rows &= ahead->stream[i].bytes >= 8 * 64 * ahead->pace;
}

#endif
