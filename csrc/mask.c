/*
 * mask.c - masks: a panel of them for the drivers, and a recipe written out for the caller.
 *
 * A mask panel holds fl(fl(level) * N) for one range of pixels; it is made once and serves every image of the batch.
 */
#include <string.h>

#include "internal.h"

void pnn_recipe_read(pnn_problem *problem) {
  if (problem->noise == PNN_NOISE_NONE || problem->noise == PNN_NOISE_TENSOR) return;
  const uint64_t seed = (uint64_t)*problem->params->seed;
  problem->recipe = (pnn_recipe){.noise = problem->noise, .key = {(uint32_t)seed, (uint32_t)(seed >> 32)}};
}

int64_t pnn_mask_rows(const pnn_problem *problem, int64_t rows) {
  if (problem->noise == PNN_NOISE_NONE) return 0;
  return problem->shared ? problem->masks : rows;
}

int64_t pnn_mask_ld(const pnn_problem *problem, int64_t pixels) {
  const int64_t line = 64 / problem->real_size;
  if (pixels < line) return pixels;
  /* Short rows stay as they are: a further line would weigh more there. */
  return pixels <= 15 * line ? pnn_round_up(pixels, line) : pnn_odd_lines(pixels, problem->real_size);
}

/* Moves one image row's piece between a mask tensor and a panel, for the maps [first, first + rows). In a mask's view
 * `batch` is the step from map to map of a channel; where all maps stand at one step they move in one call. */
static void move_rows(const pnn_problem *problem, const pnn_view *v, bool to_panel, int64_t first, int64_t rows,
                      int64_t i, int64_t j, int64_t count, char *panel, int64_t ld) {
  const int64_t step = problem->masks == 1 ? v->channel : v->batch;
  const bool even = v->channel == problem->masks * step;
  for (int64_t k = first, left = rows; left > 0;) {
    const int64_t c = k / problem->masks, m = k % problem->masks;
    const int64_t run = even ? left : PNN_MIN(problem->masks - m, left);
    char *data = v->data + (c * v->channel + m * v->batch + i * v->row + j * v->column) * v->element;
    if (to_panel)
      problem->kernels->load[v->dtype](panel, ld, data, run, step, count, v->column);
    else
      problem->kernels->store[v->dtype](data, step, v->column, panel, ld, run, count);
    panel += run * ld * problem->real_size;
    k += run;
    left -= run;
  }
}

void pnn_mask_panel(const pnn_problem *problem, int64_t k0, int64_t rows, const pnn_range *range, void *panel,
                    int64_t ld) {
  const int64_t width = problem->out_width, end = range->pixel + range->pixels;
  const int64_t mask_rows = pnn_mask_rows(problem, rows), first = problem->shared ? 0 : k0;
  if (!mask_rows) return;
  if (problem->noise != PNN_NOISE_TENSOR) {
    const pnn_grid grid = {range->pixel, range->pixels, width, problem->stride[0], problem->stride[1]};
    problem->kernels->recipe(panel, ld, &problem->recipe, problem->level, first, mask_rows, &grid);
    return;
  }
  /* A tensor's rows may follow each other without a gap. */
  const pnn_view *v = &problem->mask;
  const bool joined = v->row == width * v->column;
  for (int64_t pixel = range->pixel; pixel < end;) {
    const int64_t i = pixel / width, j = pixel % width, count = joined ? end - pixel : PNN_MIN(width - j, end - pixel);
    char *dst = (char *)panel + (pixel - range->pixel) * problem->real_size;
    move_rows(problem, v, true, first, mask_rows, i, j, count, dst, ld);
    problem->kernels->scale(dst, ld, problem->level, mask_rows, count);
    pixel += count;
  }
}

void pnn_mask_ahead(const pnn_problem *problem, pnn_ahead *ahead, int64_t k0, int64_t rows, const pnn_range *range,
                    int64_t share, int64_t shares) {
  const pnn_view *v = &problem->mask;
  const int64_t step = problem->masks == 1 ? v->channel : v->batch, each = pnn_quotient_up(rows, shares);
  const int64_t first = PNN_MIN(share * each, rows), count = PNN_MIN(each, rows - first);
  const bool joined = v->column == 1 && v->row == problem->out_width && v->channel == problem->masks * step;
  if (problem->noise != PNN_NOISE_TENSOR || problem->shared || !joined || count <= 0) return;
  if (ahead->streams == PNN_AHEAD_STREAMS) return;
  ahead->stream[ahead->streams++] =
      (pnn_ahead_stream){.data = v->data + ((k0 + first) * step + range->pixel) * v->element,
                         .stride = step * v->element,
                         .bytes = range->pixels * v->element,
                         .rows = count,
                         .far = problem->maps * problem->pixels * v->element > PNN_AHEAD_PAGES * PNN_AHEAD_PAGE};
}

void pnn_mask_grad_store(const pnn_problem *problem, const pnn_range *range, void *panel, int64_t ld) {
  const int64_t width = problem->out_width, end = range->pixel + range->pixels;
  const int64_t rows = pnn_mask_rows(problem, problem->maps);
  problem->kernels->scale(panel, ld, problem->level, rows, range->pixels);
  for (int64_t pixel = range->pixel; pixel < end;) {
    const int64_t i = pixel / width, j = pixel % width, count = PNN_MIN(width - j, end - pixel);
    move_rows(problem, &problem->grad_mask, false, 0, rows, i, j, count,
              (char *)panel + (pixel - range->pixel) * problem->real_size, ld);
    pixel += count;
  }
}

typedef struct fill {
  const pnn_tensor *mask;
  const pnn_kernels *kernels;
  pnn_recipe recipe;
} fill;

/* One image row of 16 response maps: what one generator call covers. */
static void fill_item(void *fill_, int32_t worker, int64_t item) {
  (void)worker;
  const fill *f = fill_;
  const pnn_tensor *t = f->mask;
  const int64_t masks = t->size[1], height = t->size[2], width = t->size[3], maps = t->size[0] * masks;
  const int64_t row = item % height, k0 = item / height * 16, rows = PNN_MIN(16, maps - k0);
  const int64_t size = pnn_dtype_size(t->dtype);
  union { /* as the kernels compute in */
    float f32[16 * PNN_PANEL];
    double f64[16 * PNN_PANEL];
  } values;
  const int64_t real_size = t->dtype == PNN_FLOAT64 ? 8 : 4;
  for (int64_t column = 0; column < width; column += PNN_PANEL) {
    const int64_t count = PNN_MIN(PNN_PANEL, width - column);
    const pnn_grid grid = {row * width + column, count, width, 1, 1};
    f->kernels->recipe(&values, PNN_PANEL, &f->recipe, 1.0, k0, rows, &grid);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t c = (k0 + r) / masks, m = (k0 + r) % masks;
      char *dst =
          (char *)t->data + (c * t->stride[0] + m * t->stride[1] + row * t->stride[2] + column * t->stride[3]) * size;
      f->kernels->store[t->dtype](dst, 0, t->stride[3], (char *)&values + r * PNN_PANEL * real_size, PNN_PANEL, 1,
                                  count);
    }
  }
}

pnn_status pnn_mask_fill(const pnn_tensor *mask, pnn_noise noise, int32_t shared_masks, const int64_t *seed,
                         const pnn_host *host, pnn_error *error) {
  PNN_FAIL_IF(!mask, error, PNN_ERROR_NULL, "mask is NULL, it should point to a tensor");
  PNN_FORWARD_IF(pnn_check_host(host, error));
  PNN_FAIL_IF(!seed, error, PNN_ERROR_NULL, "seed is NULL, it should point to one int64");
  PNN_FAIL_IF(noise != PNN_NOISE_UNIFORM && noise != PNN_NOISE_NORMAL && noise != PNN_NOISE_WAVES, error,
              PNN_ERROR_VALUE,
              "noise is %d, it should be PNN_NOISE_UNIFORM (2), PNN_NOISE_NORMAL (3) or "
              "PNN_NOISE_WAVES (4)",
              (int)noise);
  PNN_FORWARD_IF(pnn_check_output(mask, "mask", error));
  PNN_FAIL_IF(shared_masks && mask->size[0] > 1, error, PNN_ERROR_SHAPE,
              "mask.size[0] is %lld, it should be 1 where shared_masks is set", (long long)mask->size[0]);
  for (int d = 0; d < 4; d++)
    if (mask->size[d] == 0) return pnn_succeed(error); /* the other sizes' products were not checked */
  const int precision = mask->dtype == PNN_FLOAT64;
  fill f = {.mask = mask, .kernels = pnn_kernels_get(precision)};
  const uint64_t key = (uint64_t)*seed;
  f.recipe = (pnn_recipe){.noise = noise, .key = {(uint32_t)key, (uint32_t)(key >> 32)}};
  const int64_t maps = mask->size[0] * mask->size[1];
  pnn_parallel(host, (maps + 15) / 16 * mask->size[2], fill_item, &f);
  return pnn_succeed(error);
}
