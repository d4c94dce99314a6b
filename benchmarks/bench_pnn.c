/*
 * bench_pnn.c - times libpnn by itself: GFLOP/s of each case, layout and pass on the instruction set in use.
 *
 *     bench_pnn [--quick] [--json] [B,C,H,T,M ...]
 *     PNN_MAX_ISA=avx2 bench_pnn 32,64,56,64,1
 *
 * float32, stored masks, relu, with bias, the library's own threads. A pass's flops are those of its products (2*B*H*W*
 * K*T forward, twice that backward: input and weight gradients); everything else is what the library adds. The figure
 * is the best of the repetitions that fill 0.3 s (0.05 s with --quick). The portable kernels emulate the fused
 * multiply-add where the compiler may not use it, so they run on one image.
 */
#define _POSIX_C_SOURCE 200809L
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

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void *need(size_t bytes) {
  void *p = malloc(bytes ? bytes : 1);
  if (!p) {
    fprintf(stderr, "bench_pnn: out of memory for %zu bytes\n", bytes);
    exit(1);
  }
  return p;
}

/* A float32 tensor [a, b, h, w], filled with values in (-1, 1) that repeat in no pattern of the sizes. */
static pnn_tensor tensor(int64_t a, int64_t b, int64_t h, int64_t w, bool channels_last) {
  pnn_tensor t = {.dtype = PNN_FLOAT32, .size = {a, b, h, w}, .stride = {b * h * w, h * w, w, 1}};
  if (channels_last) {
    t.stride[1] = 1;
    t.stride[2] = w * b;
    t.stride[3] = b;
  }
  const int64_t count = a * b * h * w;
  float *data = need((size_t)count * sizeof *data);
  uint32_t state = 12345;
  for (int64_t i = 0; i < count; i++) {
    state = state * 1664525u + 1013904223u;
    data[i] = (float)(state >> 8) * 0x1p-23f - 1.0f;
  }
  t.data = data;
  return t;
}

static pnn_status run(pnn_params *p, pnn_pass pass, pnn_error *error) {
  return pass == PNN_PASS_FORWARD ? pnn_forward(p, pnn_default_host(), error)
                                  : pnn_backward(p, pnn_default_host(), error);
}

/* Seconds of the fastest of the calls that fill `seconds`, or a negative number after an error was printed. */
static double measure(pnn_params *p, pnn_pass pass, double seconds) {
  pnn_error error;
  size_t bytes = 0;
  pnn_status status = pnn_workspace_size(p, pass, pnn_default_host(), &bytes, &error);
  p->workspace = need(bytes);
  p->workspace_bytes = bytes;
  double best = -1;
  const double start = now();
  for (int i = 0; status == PNN_OK && (i < 2 || now() - start < seconds); i++) {
    const double before = now();
    status = run(p, pass, &error);
    const double took = now() - before;
    if (best < 0 || took < best) best = took;
  }
  free(p->workspace);
  if (status == PNN_OK) return best;
  fprintf(stderr, "bench_pnn: %s\n", error.message);
  return -1;
}

static bool bench(const bench_case *c, bool channels_last, bool json, double seconds) {
  const char *const isa = pnn_isa_name();
  const int64_t batch = strcmp(isa, "portable") == 0 ? 1 : c->batch, maps = c->channels * c->masks;
  pnn_params p;
  pnn_params_init(&p);
  p.input = tensor(batch, c->channels, c->side, c->side, channels_last);
  p.weight = tensor(c->outputs, maps, 1, 1, false);
  p.bias = tensor(c->outputs, 1, 1, 1, false);
  p.noise = PNN_NOISE_TENSOR;
  p.masks = c->masks;
  p.mask = tensor(c->channels, c->masks, c->side, c->side, false);
  p.level = 0.1;
  p.output = tensor(batch, c->outputs, c->side, c->side, channels_last);
  p.grad_output = tensor(batch, c->outputs, c->side, c->side, channels_last);
  p.grad_input = tensor(batch, c->channels, c->side, c->side, channels_last);
  p.grad_weight = tensor(c->outputs, maps, 1, 1, false);
  p.grad_bias = tensor(c->outputs, 1, 1, 1, false);

  const pnn_host *const host = pnn_default_host();
  const char *const layout = channels_last ? "channels_last" : "contiguous";
  bool good = true;
  for (int pass = PNN_PASS_FORWARD; good && pass <= PNN_PASS_BACKWARD; pass++) {
    const double best = measure(&p, (pnn_pass)pass, seconds);
    good = best > 0;
    const double flops =
        (pass == PNN_PASS_FORWARD ? 2.0 : 4.0) * (double)(batch * c->side * c->side) * (double)(maps * c->outputs);
    const char *const name = pass == PNN_PASS_FORWARD ? "forward" : "backward";
    const char *const format =
        json ? "{\"isa\": \"%s\", \"threads\": %d, \"case\": \"(%lld,%lld,%lld,%lld,%lld)\", \"layout\": \"%s\", "
               "\"pass\": \"%s\", \"seconds\": %.6g, \"gflops\": %.4g}\n"
             : "%-9s %2d threads  (%lld,%lld,%lld,%lld,%lld)  %-14s %-9s %10.3e s %8.1f GFLOP/s\n";
    if (good)
      printf(format, isa, host ? (int)host->threads : 1, (long long)batch, (long long)c->channels, (long long)c->side,
             (long long)c->outputs, (long long)c->masks, layout, name, best, flops / best * 1e-9);
  }
  const pnn_tensor *const all[] = {&p.input,       &p.weight,     &p.bias,        &p.mask,     &p.output,
                                   &p.grad_output, &p.grad_input, &p.grad_weight, &p.grad_bias};
  for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]->data);
  return good;
}

int main(int count, char **arguments) {
  bool json = false, good = true;
  double seconds = 0.3;
  int first = 1;
  for (; first < count && strncmp(arguments[first], "--", 2) == 0; first++) {
    if (strcmp(arguments[first], "--json") == 0) {
      json = true;
    } else if (strcmp(arguments[first], "--quick") == 0) {
      seconds = 0.05;
    } else {
      fprintf(stderr, "usage: bench_pnn [--quick] [--json] [B,C,H,T,M ...]\n");
      return 2;
    }
  }
  for (int i = first; i < count; i++) {
    long long v[5];
    char rest;
    if (sscanf(arguments[i], "%lld,%lld,%lld,%lld,%lld%c", &v[0], &v[1], &v[2], &v[3], &v[4], &rest) != 5 || v[0] < 1 ||
        v[1] < 1 || v[2] < 1 || v[3] < 1 || v[4] < 1) {
      fprintf(stderr, "bench_pnn: %s should be five positive integers: B,C,H,T,M\n", arguments[i]);
      return 2;
    }
    const bench_case c = {v[0], v[1], v[2], v[3], v[4]};
    for (int last = 0; last < 2; last++) good &= bench(&c, last, json, seconds);
  }
  for (size_t i = 0; first == count && i < sizeof cases / sizeof cases[0]; i++)
    for (int last = 0; last < 2; last++) good &= bench(&cases[i], last, json, seconds);
  return !good;
}
