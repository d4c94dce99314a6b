/*
 * check.c - checks every size, stride, type, option and address range of a call, before anything is written, and turns
 * the params into a pnn_problem. No binding can go around it, and nothing behind it checks again.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "internal.h"

int64_t pnn_dtype_size(pnn_dtype dtype) {
  switch (dtype) {
    case PNN_FLOAT32: return 4;
    case PNN_FLOAT64: return 8;
    case PNN_BFLOAT16:
    case PNN_FLOAT16: return 2;
  }
  return 0;
}

const char *pnn_dtype_name(pnn_dtype dtype) {
  switch (dtype) {
    case PNN_FLOAT32: return "float32";
    case PNN_FLOAT64: return "float64";
    case PNN_BFLOAT16: return "bfloat16";
    case PNN_FLOAT16: return "float16";
  }
  return "unknown";
}

pnn_status pnn_check_host(const pnn_host *host, pnn_error *error) {
  if (!host) return PNN_OK;
  PNN_FAIL_IF(host->threads < 1, error, PNN_ERROR_VALUE, "host.threads is %d, it should be at least 1",
              (int)host->threads);
  PNN_FAIL_IF(!host->parallel_for, error, PNN_ERROR_NULL, "host.parallel_for is NULL, it should point to a function");
  return PNN_OK;
}

/* The bytes that a tensor's elements span: [low, high), empty for a tensor without elements. */
typedef struct extent {
  uintptr_t low, high;
  const char *name;
  bool output;
} extent;

static pnn_status tensor_extent(const pnn_tensor *t, const char *name, bool output, extent *e, pnn_error *error) {
  int64_t low = 0, high = 0, count = 1;
  const int64_t size = pnn_dtype_size(t->dtype);
  PNN_FAIL_IF(size == 0, error, PNN_ERROR_DTYPE,
              "%s.dtype is %d, it should be PNN_FLOAT32 (0), PNN_FLOAT64 (1), PNN_BFLOAT16 (2) or PNN_FLOAT16 (3)",
              name, (int)t->dtype);
  bool empty = false, overflow = false;
  for (int d = 0; d < 4; d++) {
    PNN_FAIL_IF(t->size[d] < 0, error, PNN_ERROR_SHAPE, "%s.size[%d] is %lld, it should not be negative", name, d,
                (long long)t->size[d]);
    if (t->size[d] == 0) empty = true;
  }
  for (int d = 0; d < 4 && !empty; d++) {
    int64_t span;
    overflow |= __builtin_mul_overflow(count, t->size[d], &count);
    if (t->size[d] == 1) continue;
    overflow |= __builtin_mul_overflow(t->size[d] - 1, t->stride[d], &span);
    if (overflow) break;
    overflow |= span < 0 ? __builtin_add_overflow(low, span, &low) : __builtin_add_overflow(high, span, &high);
  }
  overflow |= __builtin_mul_overflow(count, size, &count);
  overflow |= __builtin_mul_overflow(low, size, &low) || __builtin_add_overflow(high, 1, &high) ||
              __builtin_mul_overflow(high, size, &high);
  const uintptr_t base = (uintptr_t)t->data;
  if (!overflow && !empty && base) {
    overflow |= 0 - (uintptr_t)low > base || (uintptr_t)high > UINTPTR_MAX - base;
  }
  PNN_FAIL_IF(overflow, error, PNN_ERROR_OVERFLOW,
              "%s of size [%lld, %lld, %lld, %lld] and stride [%lld, %lld, %lld, %lld] exceeds what can be addressed",
              name, (long long)t->size[0], (long long)t->size[1], (long long)t->size[2], (long long)t->size[3],
              (long long)t->stride[0], (long long)t->stride[1], (long long)t->stride[2], (long long)t->stride[3]);
  *e = (extent){.low = base + (uintptr_t)low, .high = base + (uintptr_t)high, .name = name, .output = output};
  if (empty || !base) e->low = e->high = 0;
  return PNN_OK;
}

/* An output's elements must be apart: each dimension's step exceeds what the smaller steps span together. */
static pnn_status check_no_self_overlap(const pnn_tensor *t, const char *name, pnn_error *error) {
  int64_t size[4], step[4];
  int n = 0;
  for (int d = 0; d < 4; d++)
    if (t->size[d] == 0) return PNN_OK; /* and its strides may be anything */
  for (int d = 0; d < 4; d++) {
    if (t->size[d] == 1) continue;
    const int64_t s = t->stride[d] < 0 ? -t->stride[d] : t->stride[d];
    int at = n++;
    for (; at > 0 && step[at - 1] > s; at--) {
      step[at] = step[at - 1];
      size[at] = size[at - 1];
    }
    step[at] = s;
    size[at] = t->size[d];
  }
  int64_t span = 0;
  for (int d = 0; d < n; d++) {
    PNN_FAIL_IF(step[d] <= span, error, PNN_ERROR_ALIAS,
                "%s of size [%lld, %lld, %lld, %lld] and stride [%lld, %lld, %lld, %lld] overlaps itself, its elements "
                "should be apart",
                name, (long long)t->size[0], (long long)t->size[1], (long long)t->size[2], (long long)t->size[3],
                (long long)t->stride[0], (long long)t->stride[1], (long long)t->stride[2], (long long)t->stride[3]);
    span += (size[d] - 1) * step[d];
  }
  return PNN_OK;
}

pnn_status pnn_check_output(const pnn_tensor *tensor, const char *name, pnn_error *error) {
  extent e;
  PNN_FAIL_IF(!tensor->data, error, PNN_ERROR_NULL, "%s.data is NULL, it should point to the elements", name);
  PNN_FORWARD_IF(tensor_extent(tensor, name, true, &e, error));
  return check_no_self_overlap(tensor, name, error);
}

static pnn_status check_size(const pnn_tensor *t, const char *name, int64_t s0, int64_t s1, int64_t s2, int64_t s3,
                             const char *meaning, pnn_error *error) {
  PNN_FAIL_IF(t->size[0] != s0 || t->size[1] != s1 || t->size[2] != s2 || t->size[3] != s3, error, PNN_ERROR_SHAPE,
              "%s has size [%lld, %lld, %lld, %lld], it should be [%lld, %lld, %lld, %lld]: %s", name,
              (long long)t->size[0], (long long)t->size[1], (long long)t->size[2], (long long)t->size[3], (long long)s0,
              (long long)s1, (long long)s2, (long long)s3, meaning);
  return PNN_OK;
}

static pnn_status check_dtype(const pnn_tensor *t, const char *name, pnn_dtype expected, const char *meaning,
                              pnn_error *error) {
  PNN_FAIL_IF(t->dtype != expected, error, PNN_ERROR_DTYPE, "%s has type %s, it should be %s: %s", name,
              pnn_dtype_name(t->dtype), pnn_dtype_name(expected), meaning);
  return PNN_OK;
}

static pnn_view view_make(const pnn_tensor *t, int64_t stride_h, int64_t stride_w) {
  pnn_view v = {.data = t->data, .dtype = t->dtype, .element = pnn_dtype_size(t->dtype)};
  if (!t->size[0] || !t->size[1] || !t->size[2] || !t->size[3]) return v; /* its strides were not checked */
  v.batch = t->size[0] > 1 ? t->stride[0] : 0;
  v.channel = t->size[1] > 1 ? t->stride[1] : 0;
  /* A stride beyond the image reads one row or column only: its step is never used, and its product could overflow. */
  v.row = t->size[2] > stride_h ? t->stride[2] * stride_h : 0;
  v.column = t->size[3] > stride_w ? t->stride[3] * stride_w : 0;
  return v;
}

/* Everything that one pass reads or writes, gathered for the checks that concern all of them alike. */
typedef struct operands {
  extent item[20];
  int count;
} operands;

static pnn_status operand(operands *o, const pnn_tensor *t, const char *name, bool output, pnn_error *error) {
  if (!t->data) return PNN_OK;
  PNN_FORWARD_IF(tensor_extent(t, name, output, &o->item[o->count], error));
  o->count++;
  return output ? check_no_self_overlap(t, name, error) : PNN_OK;
}

static pnn_status check_alias(const operands *o, pnn_error *error) {
  for (int i = 0; i < o->count; i++)
    for (int j = 0; j < i; j++) {
      const extent *a = &o->item[i], *b = &o->item[j];
      PNN_FAIL_IF((a->output || b->output) && a->low < b->high && b->low < a->high, error, PNN_ERROR_ALIAS,
                  "%s overlaps %s in memory, an output should be apart from every other tensor",
                  a->output ? a->name : b->name, a->output ? b->name : a->name);
    }
  return PNN_OK;
}

static pnn_status required(const pnn_tensor *t, const char *name, const char *why, pnn_error *error) {
  PNN_FAIL_IF(!t->data, error, PNN_ERROR_NULL, "%s.data is NULL, it should point to the elements%s", name, why);
  return PNN_OK;
}

/* Options first, so that the sizes derived from them mean something. */
static pnn_status check_options(const pnn_params *p, pnn_pass pass, pnn_error *error) {
  PNN_FAIL_IF(pass != PNN_PASS_FORWARD && pass != PNN_PASS_BACKWARD, error, PNN_ERROR_VALUE,
              "pass is %d, it should be PNN_PASS_FORWARD (0) or PNN_PASS_BACKWARD (1)", (int)pass);
  PNN_FAIL_IF((int)p->noise < 0 || p->noise >= PNN_NOISE_COUNT, error, PNN_ERROR_VALUE,
              "noise is %d, it should be from PNN_NOISE_NONE (0) to PNN_NOISE_WAVES (4)", (int)p->noise);
  PNN_FAIL_IF((int)p->activation < 0 || p->activation >= PNN_ACTIVATION_COUNT, error, PNN_ERROR_VALUE,
              "activation is %d, it should be from PNN_ACTIVATION_IDENTITY (0) to PNN_ACTIVATION_HARDTANH (9)",
              (int)p->activation);
  PNN_FAIL_IF(!isfinite(p->level), error, PNN_ERROR_VALUE, "level is %g, it should be finite", p->level);
  PNN_FAIL_IF(p->allow_tf32 != 0 && p->allow_tf32 != 1, error, PNN_ERROR_VALUE, "allow_tf32 is %d, it should be 0 or 1",
              (int)p->allow_tf32);
  PNN_FAIL_IF(p->allow_wgmma != 0 && p->allow_wgmma != 1, error, PNN_ERROR_VALUE,
              "allow_wgmma is %d, it should be 0 or 1", (int)p->allow_wgmma);
  PNN_FAIL_IF(p->masks < 1, error, PNN_ERROR_VALUE, "masks is %lld, it should be at least 1", (long long)p->masks);
  for (int d = 0; d < 2; d++)
    PNN_FAIL_IF(p->stride[d] < 1, error, PNN_ERROR_VALUE, "stride[%d] is %lld, it should be at least 1", d,
                (long long)p->stride[d]);
  PNN_FAIL_IF(p->groups < 1, error, PNN_ERROR_VALUE, "groups is %lld, it should be at least 1", (long long)p->groups);
  PNN_FAIL_IF(p->norm && !(p->norm_eps >= 0 && isfinite(p->norm_eps)), error, PNN_ERROR_VALUE,
              "norm_eps is %g, it should be finite and not negative", p->norm_eps);
  return PNN_OK;
}

/* The most pixels, images, maps or outputs: far beyond any memory, and small enough that no product of one of them with
 * a block's size overflows, in a call without elements either. */
#define MOST (INT64_C(1) << 44)

static pnn_status check_sizes(const pnn_params *p, pnn_problem *q, pnn_error *error) {
  const pnn_tensor *x = &p->input, *w = &p->weight;
  q->batch = x->size[0];
  q->channels = x->size[1];
  q->height = x->size[2];
  q->width = x->size[3];
  q->outputs = w->size[0];
  q->masks = p->masks;
  q->groups = p->groups;
  q->stride[0] = p->stride[0];
  q->stride[1] = p->stride[1];
  PNN_FAIL_IF(q->channels % q->groups || q->outputs % q->groups, error, PNN_ERROR_VALUE,
              "groups is %lld, it should divide the input's %lld channels and the weight's %lld outputs",
              (long long)q->groups, (long long)q->channels, (long long)q->outputs);
  q->out_height = q->height ? (q->height - 1) / q->stride[0] + 1 : 0;
  q->out_width = q->width ? (q->width - 1) / q->stride[1] + 1 : 0;
  int64_t columns;
  PNN_FAIL_IF(q->masks > MOST || __builtin_mul_overflow(q->channels, q->masks, &q->maps) || q->maps > MOST, error,
              PNN_ERROR_OVERFLOW, "masks is %lld, with %lld channels this exceeds what can be addressed",
              (long long)q->masks, (long long)q->channels);
  PNN_FAIL_IF(q->batch > MOST || q->channels > MOST ||
                  __builtin_mul_overflow(q->out_height, q->out_width, &q->pixels) || q->pixels > MOST ||
                  __builtin_mul_overflow(q->pixels, q->batch, &columns) || columns > MOST,
              error, PNN_ERROR_OVERFLOW, "input of size [%lld, %lld, %lld, %lld] exceeds what can be addressed",
              (long long)q->batch, (long long)q->channels, (long long)q->height, (long long)q->width);
  PNN_FAIL_IF(q->outputs > MOST, error, PNN_ERROR_OVERFLOW,
              "weight of size [%lld, %lld, %lld, %lld] exceeds what can be addressed", (long long)w->size[0],
              (long long)w->size[1], (long long)w->size[2], (long long)w->size[3]);
  if (q->channels == 0 && q->outputs == 0) q->groups = 1; /* which any number divides */
  q->group_channels = q->channels / q->groups;
  q->group_maps = q->maps / q->groups;
  q->group_outputs = q->outputs / q->groups;
  return check_size(w, "weight", q->outputs, q->group_maps, 1, 1, "[outputs, channels / groups * masks]", error);
}

static pnn_status check_mask(const pnn_params *p, pnn_problem *q, pnn_error *error) {
  q->noise = p->noise;
  q->shared = p->shared_masks != 0;
  q->level = p->level;
  if (p->noise == PNN_NOISE_TENSOR) {
    PNN_FORWARD_IF(required(&p->mask, "mask", " where noise is PNN_NOISE_TENSOR", error));
    q->shared = p->mask.size[0] == 1;
    PNN_FORWARD_IF(check_size(&p->mask, "mask", q->shared ? 1 : q->channels, q->masks, q->height, q->width,
                              "[channels or 1, masks, height, width]", error));
    PNN_FAIL_IF(p->mask.dtype != PNN_FLOAT32 && p->mask.dtype != p->input.dtype, error, PNN_ERROR_DTYPE,
                "mask has type %s, it should be float32 or the input's %s", pnn_dtype_name(p->mask.dtype),
                pnn_dtype_name(p->input.dtype));
  } else if (p->noise != PNN_NOISE_NONE) {
    PNN_FAIL_IF(!p->seed, error, PNN_ERROR_NULL, "seed is NULL, it should point to one int64 where masks are a recipe");
  }
  return PNN_OK;
}

static pnn_status check_types(const pnn_params *p, pnn_problem *q, pnn_error *error) {
  const pnn_dtype x = p->input.dtype, w = p->weight.dtype;
  PNN_FAIL_IF(pnn_dtype_size(x) == 0 || pnn_dtype_size(w) == 0, error, PNN_ERROR_DTYPE,
              "%s.dtype is %d, it should be PNN_FLOAT32 (0), PNN_FLOAT64 (1), PNN_BFLOAT16 (2) or PNN_FLOAT16 (3)",
              pnn_dtype_size(x) == 0 ? "input" : "weight", (int)(pnn_dtype_size(x) == 0 ? x : w));
  const bool narrow = w == PNN_BFLOAT16 || w == PNN_FLOAT16;
  PNN_FAIL_IF(w != x && !(x == PNN_FLOAT32 && narrow), error, PNN_ERROR_DTYPE,
              "weight has type %s, it should be the input's %s%s", pnn_dtype_name(w), pnn_dtype_name(x),
              x == PNN_FLOAT32 ? ", bfloat16 or float16" : "");
  q->product_type = w;
  q->precision = x == PNN_FLOAT64;
  q->real_size = x == PNN_FLOAT64 ? 8 : 4;
  return PNN_OK;
}

static pnn_status check_norm(const pnn_params *p, pnn_pass pass, pnn_problem *q, operands *o, pnn_error *error) {
  q->norm = p->norm != 0;
  q->training = q->norm && p->norm_training != 0;
  q->eps = p->norm_eps;
  if (!q->norm) return PNN_OK;
  const pnn_dtype type = q->precision ? PNN_FLOAT64 : PNN_FLOAT32;
  const bool writes_moments = pass == PNN_PASS_FORWARD && q->training;
  const struct {
    const pnn_tensor *t;
    const char *name;
    bool needed, output;
  } vectors[] = {{&p->norm_weight, "norm_weight", false, false},
                 {&p->norm_bias, "norm_bias", false, false},
                 {&p->mean, "mean", true, writes_moments},
                 {&p->variance, "variance", true, writes_moments},
                 {&p->grad_norm_weight, "grad_norm_weight", false, true},
                 {&p->grad_norm_bias, "grad_norm_bias", false, true}};
  const int count = pass == PNN_PASS_FORWARD ? 4 : 6;
  for (int i = 0; i < count; i++) {
    if (vectors[i].needed) PNN_FORWARD_IF(required(vectors[i].t, vectors[i].name, " where norm is set", error));
    if (!vectors[i].t->data) continue;
    PNN_FORWARD_IF(check_size(vectors[i].t, vectors[i].name, q->maps, 1, 1, 1, "[channels * masks]", error));
    PNN_FORWARD_IF(check_dtype(vectors[i].t, vectors[i].name, type,
                               "statistics are float64 beside a float64 input, "
                               "else float32",
                               error));
    PNN_FORWARD_IF(operand(o, vectors[i].t, vectors[i].name, vectors[i].output, error));
  }
  PNN_FAIL_IF(writes_moments && q->batch * q->pixels == 1, error, PNN_ERROR_SHAPE,
              "input has one value per channel to normalise over (size [%lld, %lld, %lld, %lld]), it should have none "
              "or more than one when training",
              (long long)q->batch, (long long)q->channels, (long long)q->height, (long long)q->width);
  return PNN_OK;
}

static pnn_status check_forward(const pnn_params *p, pnn_problem *q, operands *o, pnn_error *error) {
  if (p->bias.data) {
    PNN_FORWARD_IF(check_size(&p->bias, "bias", q->outputs, 1, 1, 1, "[outputs]", error));
    PNN_FORWARD_IF(check_dtype(&p->bias, "bias", q->product_type, "the weight's type", error));
    PNN_FORWARD_IF(operand(o, &p->bias, "bias", false, error));
  }
  PNN_FORWARD_IF(required(&p->output, "output", "", error));
  PNN_FORWARD_IF(check_size(&p->output, "output", q->batch, q->outputs, q->out_height, q->out_width,
                            "[batch, outputs, height', width']", error));
  PNN_FORWARD_IF(check_dtype(&p->output, "output", q->product_type, "the weight's type", error));
  PNN_FORWARD_IF(operand(o, &p->output, "output", true, error));
  q->output = view_make(&p->output, 1, 1);
  return PNN_OK;
}

static pnn_status check_backward(const pnn_params *p, pnn_problem *q, operands *o, pnn_error *error) {
  PNN_FORWARD_IF(required(&p->grad_output, "grad_output", "", error));
  PNN_FORWARD_IF(check_size(&p->grad_output, "grad_output", q->batch, q->outputs, q->out_height, q->out_width,
                            "[batch, outputs, height', width']", error));
  PNN_FORWARD_IF(check_dtype(&p->grad_output, "grad_output", q->product_type, "the weight's type", error));
  PNN_FORWARD_IF(operand(o, &p->grad_output, "grad_output", false, error));
  q->grad_output = view_make(&p->grad_output, 1, 1);
  const struct {
    const pnn_tensor *t, *like;
    const char *name, *meaning;
  } gradients[] = {{&p->grad_input, &p->input, "grad_input", "the input's size and type"},
                   {&p->grad_weight, &p->weight, "grad_weight", "the weight's size and type"},
                   {&p->grad_mask, &p->mask, "grad_mask", "the mask's size and type"}};
  for (int i = 0; i < 3; i++) {
    const pnn_tensor *t = gradients[i].t, *like = gradients[i].like;
    if (!t->data) continue;
    PNN_FAIL_IF(like == &p->mask && q->noise != PNN_NOISE_TENSOR, error, PNN_ERROR_VALUE,
                "grad_mask is given, it should be absent where the mask is not a tensor");
    PNN_FORWARD_IF(check_size(t, gradients[i].name, like->size[0], like->size[1], like->size[2], like->size[3],
                              gradients[i].meaning, error));
    PNN_FORWARD_IF(check_dtype(t, gradients[i].name, like->dtype, gradients[i].meaning, error));
    PNN_FORWARD_IF(operand(o, t, gradients[i].name, true, error));
  }
  if (p->grad_bias.data) {
    PNN_FORWARD_IF(check_size(&p->grad_bias, "grad_bias", q->outputs, 1, 1, 1, "[outputs]", error));
    PNN_FORWARD_IF(check_dtype(&p->grad_bias, "grad_bias", q->product_type, "the weight's type", error));
    PNN_FORWARD_IF(operand(o, &p->grad_bias, "grad_bias", true, error));
  }
  q->grad_input = view_make(&p->grad_input, q->stride[0], q->stride[1]);
  return PNN_OK;
}

/* In a mask's view `batch` is the step from map to map of one channel, `channel` from channel to channel. */
static pnn_view mask_view(const pnn_tensor *t, const pnn_problem *q) {
  pnn_view v = view_make(t, q->stride[0], q->stride[1]);
  const int64_t channel = v.batch;
  v.batch = v.channel;
  v.channel = channel;
  return v;
}

pnn_status pnn_check(const pnn_params *params, pnn_pass pass, const pnn_host *host, pnn_problem *problem,
                     pnn_error *error) {
  PNN_FAIL_IF(!params, error, PNN_ERROR_NULL, "params is NULL, it should point to a pnn_params");
  PNN_FAIL_IF(params->struct_size != sizeof *params, error, PNN_ERROR_VERSION,
              "params.struct_size is %zu, it should be %zu: call pnn_params_init first, and compile against the header "
              "of this library",
              params->struct_size, sizeof *params);
  PNN_FORWARD_IF(pnn_check_host(host, error));
  PNN_FORWARD_IF(check_options(params, pass, error));
  pnn_problem q;
  memset(&q, 0, sizeof q);
  q.params = params;
  q.activation = params->activation;
  operands o = {.count = 0};
  PNN_FORWARD_IF(required(&params->input, "input", "", error));
  PNN_FORWARD_IF(required(&params->weight, "weight", "", error));
  PNN_FORWARD_IF(check_types(params, &q, error));
  PNN_FORWARD_IF(operand(&o, &params->input, "input", false, error));
  PNN_FORWARD_IF(operand(&o, &params->weight, "weight", false, error));
  PNN_FORWARD_IF(check_sizes(params, &q, error));
  PNN_FORWARD_IF(check_mask(params, &q, error));
  if (q.noise == PNN_NOISE_TENSOR) PNN_FORWARD_IF(operand(&o, &params->mask, "mask", false, error));
  PNN_FORWARD_IF(check_norm(params, pass, &q, &o, error));
  PNN_FORWARD_IF(pass == PNN_PASS_FORWARD ? check_forward(params, &q, &o, error)
                                          : check_backward(params, &q, &o, error));
  if (params->workspace && params->workspace_bytes) {
    const uintptr_t base = (uintptr_t)params->workspace;
    PNN_FAIL_IF(params->workspace_bytes > UINTPTR_MAX - base, error, PNN_ERROR_OVERFLOW,
                "workspace_bytes is %zu, it exceeds what can be addressed", params->workspace_bytes);
    o.item[o.count++] =
        (extent){.low = base, .high = base + params->workspace_bytes, .name = "workspace", .output = true};
  }
  PNN_FORWARD_IF(check_alias(&o, error));
  q.input = view_make(&params->input, q.stride[0], q.stride[1]);
  if (q.noise == PNN_NOISE_TENSOR) {
    q.mask = mask_view(&params->mask, &q);
    if (pass == PNN_PASS_BACKWARD) q.grad_mask = mask_view(&params->grad_mask, &q);
  }
  q.kernels = pnn_kernels_get(q.precision);
  q.near_bytes = pnn_near_bytes();
  q.rounded = q.product_type == PNN_BFLOAT16 || q.product_type == PNN_FLOAT16;
  q.pairs = q.product_type == PNN_BFLOAT16 && !params->exact && pnn_kernels_pairs(q.kernels);
  q.tile_rows = q.pairs ? q.kernels->strip_rows : q.kernels->tile_rows;
  q.tile_columns = q.pairs ? q.kernels->strip_columns : q.kernels->tile_columns;
  q.native = q.pairs ? pnn_dtype_size(PNN_BFLOAT16) : q.real_size;
  *problem = q;
  return PNN_OK;
}

void pnn_params_init(pnn_params *params) {
  if (!params) return;
  memset(params, 0, sizeof *params);
  params->struct_size = sizeof *params;
  params->masks = 1;
  params->level = 1;
  params->stride[0] = params->stride[1] = 1;
  params->groups = 1;
  params->activation = PNN_ACTIVATION_RELU;
  params->norm_eps = 1e-5;
  params->allow_wgmma = 1;
}
