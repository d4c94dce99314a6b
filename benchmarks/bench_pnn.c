/*
 * bench_pnn.c - times libpnn by itself: GFLOP/s of each case, layout and pass on the instruction set in use.
 *
 *     bench_pnn [--quick] [--json] [--layout contiguous|channels_last] [--pass NAME] [--type float32|bfloat16|float64]
 *               [--noise tensor|uniform|normal|waves] [--norm] [--against LIBPNN] [B,C,H,T,M ...]
 *     PNN_MAX_ISA=avx2 bench_pnn --pass grad_input 32,64,56,64,1
 *
 * Passes: forward and backward by default; grad_input and grad_weight are the two halves of backward alone. --norm puts
 * batch normalisation inside, in training.
 *
 * float32, stored masks (float32 in bfloat16 too), relu, with bias, the library's own threads. A pass's flops are those
 * of its products (2*B*H*W* K*T forward, twice that backward: input and weight gradients); everything else is what the
 * library adds. The figure is the best of the repetitions that fill 0.3 s (0.05 s with --quick). The portable kernels
 * emulate the fused multiply-add where the compiler may not use it, so they run on one image.
 *
 * --against another build's libpnn.so compares the two: calls alternate for 2 s (0.6 with --quick), and behind the
 * figure stands the median over the pairs of this library's time : the other's. On a machine shared with others such
 * ratios repeat within a hundredth where times differ by a tenth.
 */
#define _POSIX_C_SOURCE 200809L
#include <dlfcn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "pnn/pnn.h"

typedef struct bench_case {
  int64_t batch, channels, side, outputs, masks;
} bench_case;

static const bench_case cases[] = {
    {32, 64, 56, 64, 1},  {32, 128, 28, 128, 1},  {32, 256, 14, 256, 1}, {32, 512, 7, 512, 1},
    {128, 64, 32, 64, 1}, {128, 128, 16, 128, 1}, {8, 64, 32, 64, 16},   {4, 64, 32, 64, 64},
};

typedef struct bench_pass {
  const char *name;
  pnn_pass pass;
  double products;
  bool grad_input, grad_weight, usual;
} bench_pass;

static const bench_pass passes[] = {
    {"forward", PNN_PASS_FORWARD, 1, false, false, true},
    {"backward", PNN_PASS_BACKWARD, 2, true, true, true},
    {"grad_input", PNN_PASS_BACKWARD, 1, true, false, false},
    {"grad_weight", PNN_PASS_BACKWARD, 1, false, true, false},
};

typedef struct bench_options {
  bool json;
  double seconds;
  const char *layout, *pass; /* NULL: both layouts, the usual passes */
  pnn_dtype type;
  pnn_noise noise;
  bool norm;
  bool against;
} bench_options;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void *need(size_t bytes) {
  void *p = aligned_alloc(64, (bytes + 63) / 64 * 64 + 64); /* as PyTorch's tensors are */
  if (!p) {
    fprintf(stderr, "bench_pnn: out of memory for %zu bytes\n", bytes);
    exit(1);
  }
  return p;
}

/* A float32, bfloat16 or float64 tensor [a, b, h, w], filled with values in (-1, 1) that repeat in no pattern of the
 * sizes. */
static pnn_tensor tensor(pnn_dtype type, int64_t a, int64_t b, int64_t h, int64_t w, bool channels_last) {
  pnn_tensor t = {.dtype = type, .size = {a, b, h, w}, .stride = {b * h * w, h * w, w, 1}};
  if (channels_last) {
    t.stride[1] = 1;
    t.stride[2] = w * b;
    t.stride[3] = b;
  }
  const int64_t count = a * b * h * w;
  char *data = need((size_t)count * (type == PNN_FLOAT64 ? 8 : type == PNN_FLOAT32 ? 4 : 2));
  uint32_t state = 12345;
  for (int64_t i = 0; i < count; i++) {
    state = state * 1664525u + 1013904223u;
    const float value = (float)(state >> 8) * 0x1p-23f - 1.0f;
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint16_t half = (uint16_t)(bits >> 16); /* as bfloat16, toward 0 */
    const double wide = (double)value;
    if (type == PNN_FLOAT64)
      memcpy(data + i * 8, &wide, sizeof wide);
    else if (type == PNN_FLOAT32)
      memcpy(data + i * 4, &value, sizeof value);
    else
      memcpy(data + i * 2, &half, sizeof half);
  }
  t.data = data;
  return t;
}

/* The functions of a libpnn that are timed. */
typedef struct library {
  pnn_status (*workspace_size)(const pnn_params *, pnn_pass, const pnn_host *, size_t *, pnn_error *);
  pnn_status (*forward)(const pnn_params *, const pnn_host *, pnn_error *);
  pnn_status (*backward)(const pnn_params *, const pnn_host *, pnn_error *);
  const pnn_host *(*host)(void);
} library;

static const library ours = {pnn_workspace_size, pnn_forward, pnn_backward, pnn_default_host};
static library theirs; /* --against */

static bool library_open(const char *path, library *l) {
  void *const handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (handle) {
    *(void **)&l->workspace_size = dlsym(handle, "pnn_workspace_size");
    *(void **)&l->forward = dlsym(handle, "pnn_forward");
    *(void **)&l->backward = dlsym(handle, "pnn_backward");
    *(void **)&l->host = dlsym(handle, "pnn_default_host");
  }
  if (handle && l->workspace_size && l->forward && l->backward && l->host) return true;
  fprintf(stderr, "bench_pnn: --against %s: %s\n", path, handle ? "not a libpnn" : dlerror());
  return false;
}

static pnn_status prepare(const library *l, pnn_params *p, pnn_pass pass, pnn_error *error) {
  size_t bytes = 0;
  const pnn_status status = l->workspace_size(p, pass, l->host(), &bytes, error);
  p->workspace = need(bytes);
  p->workspace_bytes = bytes;
  return status;
}

/* Seconds of one call, or a negative number after an error. */
static double call(const library *l, const pnn_params *p, pnn_pass pass, pnn_error *error) {
  const double before = now();
  const pnn_status status = (pass == PNN_PASS_FORWARD ? l->forward : l->backward)(p, l->host(), error);
  return status == PNN_OK ? now() - before : -1;
}

static int ascending(const void *a, const void *b) {
  const double x = *(const double *)a, y = *(const double *)b;
  return x < y ? -1 : x > y;
}

#define MOST_PAIRS 10000

/* Seconds of the fastest of the calls that fill `seconds`, or a negative number after an error was printed; `ratio`
 * (or NULL): calls alternate with the other library's, and the median of ours : theirs is left there. */
static double measure(const pnn_params *params, pnn_pass pass, double seconds, double *ratio) {
  static double ratios[MOST_PAIRS];
  pnn_error error;
  pnn_params mine = *params, other = *params;
  bool good = prepare(&ours, &mine, pass, &error) == PNN_OK;
  if (ratio) good = good && prepare(&theirs, &other, pass, &error) == PNN_OK;
  double best = -1;
  const double start = now();
  int calls = 0;
  for (; good && calls < MOST_PAIRS && (calls < 2 || now() - start < seconds); calls++) {
    double took[2];
    for (int i = 0; good && i < (ratio ? 2 : 1); i++) {
      const int which = ratio ? (i + calls) % 2 : 0; /* each goes first in turn */
      took[which] = call(which ? &theirs : &ours, which ? &other : &mine, pass, &error);
      good = took[which] >= 0;
    }
    if (!good) break;
    if (best < 0 || took[0] < best) best = took[0];
    if (ratio) ratios[calls] = took[0] / took[1];
  }
  free(mine.workspace);
  if (ratio) {
    free(other.workspace);
    qsort(ratios, (size_t)calls, sizeof *ratios, ascending);
    *ratio = calls ? ratios[calls / 2] : 0;
  }
  if (good) return best;
  fprintf(stderr, "bench_pnn: %s\n", error.message);
  return -1;
}

static bool bench(const bench_case *c, bool channels_last, const bench_options *options) {
  const char *const layout = channels_last ? "channels_last" : "contiguous";
  if (options->layout && strcmp(options->layout, layout) != 0) return true;
  const char *const isa = pnn_isa_name();
  const int64_t batch = strcmp(isa, "portable") == 0 ? 1 : c->batch, maps = c->channels * c->masks;
  const pnn_dtype type = options->type, real = type == PNN_FLOAT64 ? PNN_FLOAT64 : PNN_FLOAT32;
  const int64_t seed = 7;
  pnn_params p;
  pnn_params_init(&p);
  p.input = tensor(type, batch, c->channels, c->side, c->side, channels_last);
  p.weight = tensor(type, c->outputs, maps, 1, 1, false);
  p.bias = tensor(type, c->outputs, 1, 1, 1, false);
  p.noise = options->noise;
  p.masks = c->masks;
  p.seed = p.noise == PNN_NOISE_TENSOR ? NULL : &seed;
  if (p.noise == PNN_NOISE_TENSOR) p.mask = tensor(real, c->channels, c->masks, c->side, c->side, false);
  p.level = 0.1;
  p.output = tensor(type, batch, c->outputs, c->side, c->side, channels_last);
  p.grad_output = tensor(type, batch, c->outputs, c->side, c->side, channels_last);
  const pnn_tensor grad_input = tensor(type, batch, c->channels, c->side, c->side, channels_last);
  const pnn_tensor grad_weight = tensor(type, c->outputs, maps, 1, 1, false);
  const pnn_tensor grad_bias = tensor(type, c->outputs, 1, 1, 1, false);

  p.norm = options->norm;
  p.norm_training = options->norm;
  pnn_tensor *const vectors[] = {&p.norm_weight, &p.norm_bias, &p.mean, &p.variance};
  for (size_t i = 0; p.norm && i < 4; i++) *vectors[i] = tensor(real, maps, 1, 1, 1, false);
  for (int64_t k = 0; p.norm && k < maps; k++) { /* until forward writes it */
    if (real == PNN_FLOAT64)
      ((double *)p.variance.data)[k] = 1;
    else
      ((float *)p.variance.data)[k] = 1;
  }

  const pnn_host *const host = pnn_default_host();
  bool good = true;
  for (size_t i = 0; good && i < sizeof passes / sizeof passes[0]; i++) {
    const bench_pass *const pass = &passes[i];
    if (options->pass ? strcmp(options->pass, pass->name) != 0 : !pass->usual) continue;
    p.grad_input = grad_input;
    p.grad_weight = grad_weight;
    p.grad_bias = grad_bias;
    if (!pass->grad_input) p.grad_input.data = NULL;
    if (!pass->grad_weight) p.grad_weight.data = p.grad_bias.data = NULL;
    double ratio = 0;
    const double best = measure(&p, pass->pass, options->seconds, options->against ? &ratio : NULL);
    good = best > 0;
    const double flops = 2 * pass->products * (double)(batch * c->side * c->side) * (double)(maps * c->outputs);
    if (!good) break;
    printf(options->json ? "{\"isa\": \"%s\", \"threads\": %d, \"case\": \"(%lld,%lld,%lld,%lld,%lld)\", "
                           "\"layout\": \"%s\", \"pass\": \"%s\", \"seconds\": %.6g, \"gflops\": %.4g"
                         : "%-9s %2d threads  (%lld,%lld,%lld,%lld,%lld)  %-14s %-11s %10.3e s %8.1f GFLOP/s",
           isa, host ? (int)host->threads : 1, (long long)batch, (long long)c->channels, (long long)c->side,
           (long long)c->outputs, (long long)c->masks, layout, pass->name, best, flops / best * 1e-9);
    if (options->against) printf(options->json ? ", \"against\": %.4g" : "  %6.3f of the other's time", ratio);
    printf(options->json ? "}\n" : "\n");
  }
  const pnn_tensor *const all[] = {&p.input,       &p.weight,   &p.bias,      &p.mask,    &p.output,
                                   &p.grad_output, &grad_input, &grad_weight, &grad_bias, &p.norm_weight,
                                   &p.norm_bias,   &p.mean,     &p.variance};
  for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]->data);
  return good;
}

/* Which of the names, separated by spaces, `name` is. */
static bool choose(const char *name, const char *names, int *choice) {
  const size_t length = strlen(name);
  for (*choice = 0; *names; ++*choice) {
    const size_t here = strcspn(names, " ");
    if (here == length && strncmp(names, name, here) == 0) return true;
    names += here + (names[here] == ' ');
  }
  return false;
}

int main(int count, char **arguments) {
  bench_options options = {.type = PNN_FLOAT32, .noise = PNN_NOISE_TENSOR};
  bool good = true, quick = false;
  int first = 1, choice = 0;
  for (; first < count && strncmp(arguments[first], "--", 2) == 0; first++) {
    if (strcmp(arguments[first], "--json") == 0) {
      options.json = true;
    } else if (strcmp(arguments[first], "--norm") == 0) {
      options.norm = true;
    } else if (strcmp(arguments[first], "--type") == 0 && first + 1 < count &&
               choose(arguments[first + 1], "float32 bfloat16 float64", &choice)) {
      options.type = (pnn_dtype[]){PNN_FLOAT32, PNN_BFLOAT16, PNN_FLOAT64}[choice];
      first++;
    } else if (strcmp(arguments[first], "--noise") == 0 && first + 1 < count &&
               choose(arguments[first + 1], "tensor uniform normal waves", &choice)) {
      options.noise = (pnn_noise)(PNN_NOISE_TENSOR + choice);
      first++;
    } else if (strcmp(arguments[first], "--against") == 0 && first + 1 < count) {
      if (!library_open(arguments[++first], &theirs)) return 2;
      options.against = true;
    } else if (strcmp(arguments[first], "--quick") == 0) {
      quick = true;
    } else if (strcmp(arguments[first], "--layout") == 0 && first + 1 < count) {
      options.layout = arguments[++first];
    } else if (strcmp(arguments[first], "--pass") == 0 && first + 1 < count) {
      options.pass = arguments[++first];
    } else {
      fprintf(stderr,
              "usage: bench_pnn [--quick] [--json] [--layout contiguous|channels_last] "
              "[--pass forward|backward|grad_input|grad_weight] [--type float32|bfloat16|float64] "
              "[--noise tensor|uniform|normal|waves] [--norm] [--against LIBPNN] [B,C,H,T,M ...]\n");
      return 2;
    }
  }
  options.seconds = options.against ? quick ? 0.6 : 2 : quick ? 0.05 : 0.3;
  for (int i = first; i < count; i++) {
    long long v[5];
    char rest;
    if (sscanf(arguments[i], "%lld,%lld,%lld,%lld,%lld%c", &v[0], &v[1], &v[2], &v[3], &v[4], &rest) != 5 || v[0] < 1 ||
        v[1] < 1 || v[2] < 1 || v[3] < 1 || v[4] < 1) {
      fprintf(stderr, "bench_pnn: %s should be five positive integers: B,C,H,T,M\n", arguments[i]);
      return 2;
    }
    const bench_case c = {v[0], v[1], v[2], v[3], v[4]};
    for (int last = 0; last < 2; last++) good &= bench(&c, last, &options);
  }
  for (size_t i = 0; first == count && i < sizeof cases / sizeof cases[0]; i++)
    for (int last = 0; last < 2; last++) good &= bench(&cases[i], last, &options);
  return !good;
}
