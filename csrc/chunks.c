/*
 * chunks.c - the fixed order of sums over pixels (weight gradient, moments).
 *
 * Images of up to 512 pixels are taken whole, larger ones in ranges of 512 pixels; a range's columns, over all images,
 * are cut every 512. Pixels come first so that a range's masks are made once for the whole batch.
 */
#include "internal.h"

pnn_chunks pnn_chunks_make(const pnn_problem *problem) {
  pnn_chunks c = {.pixels = PNN_MIN(problem->pixels, PNN_CHUNK), .ranges = 0, .count = 0, .parts = 1};
  if (problem->pixels == 0 || problem->batch == 0) return c;
  c.ranges = pnn_quotient_up(problem->pixels, c.pixels);
  /* Every range but the last holds c.pixels pixels. */
  const int64_t last = problem->pixels - (c.ranges - 1) * c.pixels;
  c.count = (c.ranges - 1) * ((c.pixels * problem->batch + PNN_CHUNK - 1) / PNN_CHUNK) +
            (last * problem->batch + PNN_CHUNK - 1) / PNN_CHUNK;
  c.parts = PNN_MIN(c.count, PNN_PARTS);
  return c;
}

int64_t pnn_chunks_per_range(const pnn_problem *problem, const pnn_chunks *chunks) {
  return (chunks->pixels * problem->batch + PNN_CHUNK - 1) / PNN_CHUNK;
}

int64_t pnn_chunk_locate(const pnn_problem *problem, const pnn_chunks *chunks, int64_t chunk, pnn_range *range,
                         int64_t *first) {
  const int64_t per_range = pnn_chunks_per_range(problem, chunks);
  const int64_t r = PNN_MIN(pnn_quotient(chunk, per_range), chunks->ranges - 1);
  range->pixel = r * chunks->pixels;
  range->pixels = PNN_MIN(chunks->pixels, problem->pixels - range->pixel);
  *first = (chunk - r * per_range) * PNN_CHUNK;
  return PNN_MIN(PNN_CHUNK, range->pixels * problem->batch - *first);
}

void pnn_chunks_part(const pnn_chunks *chunks, int64_t part, int64_t *first, int64_t *end) {
  *first = pnn_quotient(chunks->count * part, chunks->parts);
  *end = pnn_quotient(chunks->count * (part + 1), chunks->parts);
}
