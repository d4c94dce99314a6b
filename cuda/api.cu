/*
 * api.cu - the entry points of pnn_cuda.h: check (csrc/check.c), lay the workspace out, enqueue.
 */
#include "pnn/pnn_cuda.h"

#include "kernels.h"

extern "C" {
#include "internal.h"
}

namespace pnn_cuda {
namespace {

Vector vector_of(const pnn_tensor &t) { return {t.data, static_cast<int>(t.dtype), t.size[0] > 1 ? t.stride[0] : 0}; }
Matrix matrix_of(const pnn_tensor &t) {
  return {t.data, static_cast<int>(t.dtype), {t.size[0] > 1 ? t.stride[0] : 0, t.size[1] > 1 ? t.stride[1] : 0}};
}
View view_of(const pnn_view &v) { return {v.data, v.batch, v.channel, v.row, v.column, static_cast<int>(v.dtype)}; }

bool multiple(int64_t step, int64_t of) { return step % of == 0; }

/* log2 of a power of two; -1 for other numbers. */
int shift_of(int64_t n) {
  int shift = 0;
  while (shift < 62 && (int64_t{1} << shift) < n) shift++;
  return (int64_t{1} << shift) == n ? shift : -1;
}

/* Whether the pixels, or the channels, of a tensor lie in aligned runs of 16 bytes, the pixels also of 4, that no
 * group or image ends inside. */
int staging_of(const pnn_problem &p, const pnn_view &v, int64_t channels, int64_t group_channels) {
  if (channels == 0) return STAGE_ELEMENTS;
  const bool joined =
      p.out_width > 1 ? v.column == 1 && (p.out_height == 1 || v.row == p.out_width) : p.out_height > 1 && v.row == 1;
  const auto aligned = [&](int64_t bytes) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(v.data) % 16) % bytes == 0;
  };
  const auto pixels = [&](int64_t bytes) {
    const int64_t run = bytes / v.element;
    return joined && aligned(bytes) && run >= 1 && multiple(p.pixels, run) && multiple(v.channel, run) &&
           multiple(v.batch, run);
  };
  if (pixels(16)) return STAGE_PIXELS;
  const int64_t run = 16 / v.element;
  if (aligned(16) && v.channel == 1 && (p.groups == 1 || multiple(group_channels, run)) && multiple(v.batch, run) &&
      multiple(v.row, run) && multiple(v.column, run))
    return STAGE_CHANNELS;
  return pixels(4) ? STAGE_WORDS : STAGE_ELEMENTS;
}

/* A tensor as its dense channels-last copy at `data`. */
pnn_view channels_last_of(const pnn_problem &p, const pnn_view &v, int64_t channels, char *data) {
  return {data, v.dtype, v.element, p.pixels * channels, 1, p.out_width * channels, channels};
}

/* The elements of the channels-last copy that the kernels read instead of a tensor, or 0 where they read the tensor:
 * only where neither its pixels nor its channels lie in runs of 16 bytes, and the copy's channels do. Wherever the
 * tensor begins, the answer is the same: the workspace's size depends on it. */
int64_t copied_elements(const pnn_problem &p, const pnn_view &v, int64_t channels, int64_t group_channels) {
  int64_t count;
  if (v.element > 4 || __builtin_mul_overflow(p.batch * p.pixels, channels, &count) || count == 0) return 0;
  const auto staging = [&](const pnn_view &of) { return staging_of(p, of, channels, group_channels); };
  pnn_view aligned = v;
  aligned.data = nullptr;
  const int own = staging(aligned);
  if (own == STAGE_PIXELS || own == STAGE_CHANNELS) return 0;
  return staging(channels_last_of(p, v, channels, nullptr)) == STAGE_CHANNELS ? count : 0;
}

Layer layer_of(const pnn_problem &p) {
  const pnn_params &params = *p.params;
  Layer l = {};
  l.batch = p.batch;
  l.pixels = p.pixels;
  l.columns = p.batch * p.pixels;
  l.groups = p.groups;
  l.group_channels = p.group_channels;
  l.group_maps = p.group_maps;
  l.group_outputs = p.group_outputs;
  l.channels = p.channels;
  l.maps = p.maps;
  l.outputs = p.outputs;
  l.masks = p.masks;
  l.stride_row = p.stride[0];
  l.stride_column = p.stride[1];
  l.by_pixels = divider_make(p.pixels);
  l.by_width = divider_make(p.out_width);
  l.by_masks = divider_make(p.masks);
  l.masks_reciprocal = p.masks <= 32 ? 65536 / static_cast<uint32_t>(p.masks) + 1 : 0;
  l.masks_shift = shift_of(p.masks);
  l.input = view_of(p.input);
  l.mask = view_of(p.mask);
  l.output = view_of(p.output);
  l.grad_output = view_of(p.grad_output);
  l.grad_input = view_of(p.grad_input);
  l.grad_mask = view_of(p.grad_mask);
  l.input_staging = staging_of(p, p.input, p.channels, p.group_channels);
  if (p.grad_output.data) l.grad_output_staging = staging_of(p, p.grad_output, p.outputs, p.group_outputs);
  if (p.output.data) l.output_staging = staging_of(p, p.output, p.outputs, p.group_outputs);
  if (p.grad_input.data) l.grad_input_staging = staging_of(p, p.grad_input, p.channels, p.group_channels);
  l.input_float = p.input.dtype == PNN_FLOAT32 && p.product_type != PNN_FLOAT32;
  l.output_channels_fastest = p.outputs > 1 && p.output.channel == 1 && p.output.column != 1;
  l.input_channels_fastest = p.channels > 1 && p.grad_input.channel == 1 && p.grad_input.column != 1;
  l.noise = p.noise;
  l.activation = p.activation;
  l.shared = p.shared;
  l.level = p.level;
  l.level_float = static_cast<float>(p.level);
  l.seed = p.noise == PNN_NOISE_NONE || p.noise == PNN_NOISE_TENSOR ? nullptr : params.seed;
  l.splits = 1;
  l.split_columns = l.columns;
  return l;
}

/* The pieces of the workspace; all of them NULL while only its size is asked. */
struct Pieces {
  uint32_t *waves;
  void *weight, *start, *parts;
  Norm norm;
  void *offset, *slope, *products, *totals, *mask_parts;
  ChannelsLast input, grad_output;
};

struct Plan {
  Layer layer;
  int product; /* what the products are made of */
  Pieces pieces;
  bool direct; /* the weight is read where it is */
  bool inputs, affine, want_products, want_totals;
};

/* The number of pieces that the sums over pixels are cut into: as many blocks as run at a time on a large GPU (132
 * multiprocessors, four small ones or two large ones to each), by the sizes alone. Layers whose products may be
 * asynchronous have the same number where, by their addresses or on this device, they are not. */
void split(Layer &l, bool products, bool is_double, bool wgmma) {
  const auto cut = [&](int64_t tiles, int64_t blocks) {
    const int64_t wanted = PNN_MAX(1, PNN_MIN(ceil_div(l.columns, 256), blocks / PNN_MAX(1, tiles)));
    l.split_columns = PNN_MAX(64, ceil_div(ceil_div(l.columns, wanted), 64) * 64);
    l.splits = PNN_MAX(1, ceil_div(l.columns, l.split_columns));
  };
#if defined(PNN_CUDA_WGMMA)
  if (wgmma) {
    const WgmmaTiles asynchronous = weight_gradient_wgmma_tiles(l);
    return cut(asynchronous.tiles, asynchronous.blocks);
  }
#else
  static_cast<void>(wgmma);
#endif
  const bool large = products && !is_double && weight_gradient_is_large(l);
  const int64_t rows = large ? 128 : Small::rows, columns = large ? 128 : Small::columns, blocks = large ? 264 : 528;
  const int64_t outputs = ceil_div(l.group_outputs, rows);
  const int64_t maps = products ? ceil_div(l.group_maps, columns) : 1;
  cut(outputs * maps * l.groups, blocks);
}

Plan plan_make(const pnn_problem &p, pnn_pass pass, pnn_arena *arena) {
  const pnn_params &params = *p.params;
  Plan plan = {};
  Layer &l = plan.layer;
  Pieces &w = plan.pieces;
  l = layer_of(p);
  plan.product = p.product_type == PNN_FLOAT32 && params.allow_tf32 ? PRODUCT_TF32 : static_cast<int>(p.product_type);
  const int64_t element = pnn_dtype_size(p.product_type), run = 16 / element;
  const bool backward = pass == PNN_PASS_BACKWARD;
  plan.inputs = backward && (params.grad_input.data || params.grad_mask.data);
  plan.affine = p.training && plan.inputs;
  if (backward) {
    plan.want_products = params.grad_weight.data || plan.affine || (p.norm && params.grad_norm_weight.data);
    plan.want_totals = plan.want_products || params.grad_bias.data || (p.norm && params.grad_norm_bias.data);
  }
  if (p.noise == PNN_NOISE_WAVES)
    w.waves = static_cast<uint32_t *>(pnn_arena_take(arena, p.shared ? p.masks : p.maps, 16));
  if (p.norm) {
    w.norm.scale = static_cast<double *>(pnn_arena_take(arena, p.maps, 8));
    w.norm.inverse = static_cast<double *>(pnn_arena_take(arena, p.maps, 8));
    w.norm.beta = static_cast<double *>(pnn_arena_take(arena, p.maps, 8));
    w.norm.mean = pnn_arena_take(arena, p.maps + NO_MAPS, p.real_size);
  }
  const Matrix weight = matrix_of(params.weight);
  plan.direct = !p.norm && reinterpret_cast<uintptr_t>(params.weight.data) % 16 == 0 &&
                (p.group_maps <= 1 || weight.step[1] == 1) && multiple(weight.step[0], run);
  if (!backward || plan.inputs) {
    l.weight_step = plan.direct ? weight.step[0] : ceil_div(p.group_maps, run) * run;
    /* Room for the weight's copy whether it is needed or not: the answer must not depend on where the weight lies. */
    int64_t count;
    if (__builtin_mul_overflow(p.outputs, ceil_div(p.group_maps, run) * run, &count)) count = INT64_MAX;
#if defined(PNN_CUDA_WGMMA)
    if (params.allow_wgmma && (element == 2 || plan.product == PRODUCT_TF32)) {
      if (!backward) count = PNN_MAX(count, wgmma_weight_elements(p.groups, p.group_outputs, p.group_maps));
      if (backward && params.grad_input.data)
        count = PNN_MAX(count, wgmma_weight_elements(p.groups, p.group_maps, p.group_outputs));
    }
#endif
    w.weight = pnn_arena_take(arena, count, element);
  }
  if (!backward && p.norm) w.start = pnn_arena_take(arena, p.outputs, p.real_size);
  if (!backward && p.training)
    w.parts = pnn_arena_take(arena, ceil_div(l.columns, MOMENTS_COLUMNS) * MOMENTS_NUMBERS * p.maps, p.real_size);
  if (plan.affine) {
    w.offset = pnn_arena_take(arena, p.maps, p.real_size);
    w.slope = pnn_arena_take(arena, p.maps, p.real_size);
  }
  if (plan.want_totals) {
    bool wgmma = false;
#if defined(PNN_CUDA_WGMMA)
    wgmma = params.allow_wgmma && plan.want_products && weight_gradient_wgmma_may_fit(l, plan.product);
#endif
    split(l, plan.want_products, p.product_type == PNN_FLOAT64, wgmma);
    w.totals = pnn_arena_take(arena, l.splits * p.outputs, p.real_size);
  }
  if (plan.want_products) {
    int64_t count;
    if (__builtin_mul_overflow(l.splits * p.outputs, p.group_maps, &count)) count = INT64_MAX;
    w.products = pnn_arena_take(arena, count, p.real_size);
  }
  if (backward && params.grad_mask.data && p.shared) {
    int64_t count;
    if (__builtin_mul_overflow(p.maps, p.pixels, &count)) count = INT64_MAX;
    w.mask_parts = pnn_arena_take(arena, count, p.real_size);
  }
  const auto channels_last = [&](const pnn_view &v, int64_t channels, int64_t group_channels) -> ChannelsLast {
    const int64_t count = copied_elements(p, v, channels, group_channels);
    if (count == 0) return {};
    char *const data = static_cast<char *>(pnn_arena_take(arena, count, v.element));
    return {view_of(v), view_of(channels_last_of(p, v, channels, data)), channels};
  };
  /* Forward by asynchronous products reads x where it is, but the answer must not depend on the device. */
  if (!backward || plan.want_products || plan.inputs) w.input = channels_last(p.input, p.channels, p.group_channels);
  if (plan.want_totals || plan.inputs) w.grad_output = channels_last(p.grad_output, p.outputs, p.group_outputs);
  l.waves = w.waves;
  l.mean = p.norm ? w.norm.mean : nullptr;
  l.weight = static_cast<const char *>(plan.direct ? params.weight.data : w.weight);
  l.start = w.start;
  l.bias = static_cast<const char *>(params.bias.data);
  l.bias_step = vector_of(params.bias).step;
  return plan;
}

#define PNN_STOP_IF(expression)               \
  do {                                        \
    const Status status_ = (expression);      \
    if (status_ != STATUS_OK) return status_; \
  } while (0)

/* Makes the channels-last copies, which the layer's kernels read from here on. */
Status copy_channels_last(Plan &plan, Stream stream) {
  Layer &l = plan.layer;
  const Pieces &w = plan.pieces;
  PNN_STOP_IF(run_channels_last(l, w.input, w.grad_output, stream));
  if (w.input.channels) l.input = w.input.to, l.input_staging = STAGE_CHANNELS;
  if (w.grad_output.channels) l.grad_output = w.grad_output.to, l.grad_output_staging = STAGE_CHANNELS;
  return STATUS_OK;
}

Status forward(const pnn_problem &p, Plan &plan, Stream stream) {
  const pnn_params &params = *p.params;
  const bool is_double = p.precision == 1;
  Layer &l = plan.layer;
  const Pieces &w = plan.pieces;
  if (w.waves) PNN_STOP_IF(run_waves(l, p.shared ? p.masks : p.maps, w.waves, stream));
  if (p.training) {
    if (l.columns > 0) PNN_STOP_IF(run_moments(l, p.input.dtype, w.parts, stream));
    PNN_STOP_IF(run_moments_finish(l, is_double, w.parts, vector_of(params.mean), vector_of(params.variance), stream));
  }
  const Matrix weight = matrix_of(params.weight);
  if (p.norm) {
    PNN_STOP_IF(run_norm(l, is_double, vector_of(params.mean), vector_of(params.variance),
                         vector_of(params.norm_weight), vector_of(params.norm_bias), p.eps, w.norm, stream));
    PNN_STOP_IF(run_start(l, is_double, weight, vector_of(params.bias), w.norm.beta, w.start, stream));
  }
#if defined(PNN_CUDA_WGMMA)
  if (params.allow_wgmma && forward_wgmma_fits(l, plan.product))
    return run_forward_wgmma(l, plan.product, weight, w.norm.scale, w.weight, stream);
#endif
  PNN_STOP_IF(copy_channels_last(plan, stream));
  if (!plan.direct) PNN_STOP_IF(run_weight(l, weight, w.norm.scale, w.weight, stream));
  return run_forward(l, plan.product, stream);
}

Status backward(const pnn_problem &p, Plan &plan, Stream stream) {
  const pnn_params &params = *p.params;
  const bool is_double = p.precision == 1;
  Layer &l = plan.layer;
  const Pieces &w = plan.pieces;
  const Matrix weight = matrix_of(params.weight);
  if (w.waves) PNN_STOP_IF(run_waves(l, p.shared ? p.masks : p.maps, w.waves, stream));
  if (p.norm)
    PNN_STOP_IF(run_norm(l, is_double, vector_of(params.mean), vector_of(params.variance),
                         vector_of(params.norm_weight), vector_of(params.norm_bias), p.eps, w.norm, stream));
  PNN_STOP_IF(copy_channels_last(plan, stream));
  if (plan.want_totals) {
    l.totals = w.totals;
    l.products = plan.want_products ? w.products : nullptr;
    bool done = false;
#if defined(PNN_CUDA_WGMMA)
    done = params.allow_wgmma && weight_gradient_wgmma_fits(l, plan.product);
    if (done) PNN_STOP_IF(run_weight_gradient_wgmma(l, plan.product, stream));
#endif
    if (!done) PNN_STOP_IF(run_weight_gradient(l, plan.product, stream));
    if (p.norm) PNN_STOP_IF(run_join(l, is_double, stream));
    if (params.grad_weight.data || params.grad_bias.data)
      PNN_STOP_IF(run_weight_store(l, is_double, p.norm ? &w.norm : nullptr, matrix_of(params.grad_weight),
                                   vector_of(params.grad_bias), stream));
    if (p.norm)
      PNN_STOP_IF(run_norm_gradient(l, is_double, weight, w.norm, vector_of(params.grad_norm_weight),
                                    vector_of(params.grad_norm_bias), w.offset, w.slope, stream));
  }
  if (!plan.inputs) return STATUS_OK;
  /* Pixels that a stride leaves out, and gradients of an empty batch. */
  if (p.stride[0] != 1 || p.stride[1] != 1 || p.batch == 0) {
    if (params.grad_input.data)
      PNN_STOP_IF(run_clear(params.grad_input, pnn_dtype_size(params.grad_input.dtype), stream));
    if (params.grad_mask.data) PNN_STOP_IF(run_clear(params.grad_mask, pnn_dtype_size(params.grad_mask.dtype), stream));
  }
  if (l.columns == 0) return STATUS_OK;
  l.offset = w.offset;
  l.slope = w.slope;
#if defined(PNN_CUDA_WGMMA)
  if (params.grad_input.data && params.allow_wgmma && input_gradient_wgmma_fits(l, plan.product)) /* no mask tensor */
    return run_input_gradient_wgmma(l, plan.product, weight, w.norm.scale, w.weight, stream);
#endif
  /* Unless x and dx both lie along the channels, a warp of mma.sync's kernels reads x along the pixels. */
  if (w.input.channels && l.grad_input_staging != STAGE_CHANNELS)
    l.input = w.input.from, l.input_staging = STAGE_ELEMENTS;
  if (!plan.direct) PNN_STOP_IF(run_weight(l, weight, w.norm.scale, w.weight, stream));
  if (params.grad_input.data) PNN_STOP_IF(run_input_gradient(l, plan.product, false, stream));
  if (params.grad_mask.data) {
    l.mask_parts = w.mask_parts;
    PNN_STOP_IF(run_input_gradient(l, plan.product, true, stream));
    if (p.shared) PNN_STOP_IF(run_mask_join(l, is_double, stream));
  }
  return STATUS_OK;
}

pnn_status result(Status status, pnn_error *error) {
#if defined(__CUDACC__)
  if (status != STATUS_OK)
    return pnn_fail(error, PNN_ERROR_DEVICE, "the CUDA runtime refused a launch: %s", cudaGetErrorString(status));
#else
  (void)status;
#endif
  return pnn_succeed(error);
}

/* The plan in the caller's workspace, or, to count its bytes, in none. No kernel reads a host pointer: the arena's
 * start is rounded up on the host, as an address only. */
pnn_status prepare(const pnn_params *params, pnn_pass pass, bool count, pnn_problem *problem, pnn_arena *arena,
                   Plan *plan, pnn_error *error) {
  PNN_FORWARD_IF(pnn_check(params, pass, nullptr, problem, error));
  *arena = count ? pnn_arena_make(nullptr, 0) : pnn_arena_make(params->workspace, params->workspace_bytes);
  *plan = plan_make(*problem, pass, arena);
  PNN_FAIL_IF(arena->overflow, error, PNN_ERROR_OVERFLOW,
              "the workspace for %lld outputs and %lld response maps exceeds what can be addressed",
              static_cast<long long>(problem->outputs), static_cast<long long>(problem->maps));
  return PNN_OK;
}

pnn_status run(const pnn_params *params, pnn_pass pass, pnn_cuda_stream stream, pnn_error *error) {
  pnn_problem problem;
  Plan plan;
  pnn_arena arena;
  PNN_FORWARD_IF(prepare(params, pass, false, &problem, &arena, &plan, error));
  PNN_FORWARD_IF(pnn_arena_check(&arena, params, "pnn_cuda_workspace_size", error));
  return result((pass == PNN_PASS_FORWARD ? forward : backward)(problem, plan, stream), error);
}

}  // namespace
}  // namespace pnn_cuda

pnn_status pnn_cuda_workspace_size(const pnn_params *params, pnn_pass pass, size_t *bytes, pnn_error *error) {
  pnn_problem problem;
  PNN_FAIL_IF(!bytes, error, PNN_ERROR_NULL, "bytes is NULL, it should point to a size_t");
  *bytes = 0;
  pnn_cuda::Plan plan;
  pnn_arena arena;
  PNN_FORWARD_IF(pnn_cuda::prepare(params, pass, true, &problem, &arena, &plan, error));
  *bytes = pnn_arena_bytes(&arena);
  return pnn_succeed(error);
}

pnn_status pnn_cuda_forward(const pnn_params *params, pnn_cuda_stream stream, pnn_error *error) {
  return pnn_cuda::run(params, PNN_PASS_FORWARD, stream, error);
}

pnn_status pnn_cuda_backward(const pnn_params *params, pnn_cuda_stream stream, pnn_error *error) {
  return pnn_cuda::run(params, PNN_PASS_BACKWARD, stream, error);
}

pnn_status pnn_cuda_mask_fill(const pnn_tensor *mask, pnn_noise noise, int32_t shared_masks, const int64_t *seed,
                              pnn_cuda_stream stream, pnn_error *error) {
  PNN_FAIL_IF(!mask, error, PNN_ERROR_NULL, "mask is NULL, it should point to a tensor");
  PNN_FAIL_IF(!seed, error, PNN_ERROR_NULL, "seed is NULL, it should point to one int64");
  PNN_FAIL_IF(noise != PNN_NOISE_UNIFORM && noise != PNN_NOISE_NORMAL && noise != PNN_NOISE_WAVES, error,
              PNN_ERROR_VALUE,
              "noise is %d, it should be PNN_NOISE_UNIFORM (2), PNN_NOISE_NORMAL (3) or PNN_NOISE_WAVES (4)",
              static_cast<int>(noise));
  PNN_FORWARD_IF(pnn_check_output(mask, "mask", error));
  PNN_FAIL_IF(shared_masks && mask->size[0] > 1, error, PNN_ERROR_SHAPE,
              "mask.size[0] is %lld, it should be 1 where shared_masks is set", static_cast<long long>(mask->size[0]));
  return pnn_cuda::result(pnn_cuda::run_mask_fill(*mask, noise, seed, stream), error);
}

#if !defined(PNN_CUDA_ARCHITECTURES)
#define PNN_CUDA_ARCHITECTURES host
#endif
#define PNN_TEXT_(x) #x
#define PNN_TEXT(x) PNN_TEXT_(x)
const char *pnn_cuda_architectures(void) { return PNN_TEXT(PNN_CUDA_ARCHITECTURES); }
