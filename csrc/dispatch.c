/*
 * dispatch.c - chooses the instruction set, once, at the first use.
 *
 * A set is taken when the build has it, the processor has it, and the operating system saves its registers
 * (__builtin_cpu_supports asks XGETBV for that). PNN_MAX_ISA caps the choice by name.
 */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

#define DECLARE_TABLES(isa) extern const pnn_kernels pnn_kernels_##isa##_f32, pnn_kernels_##isa##_f64;
DECLARE_TABLES(portable)
#if defined(PNN_HAVE_AVX2)
DECLARE_TABLES(avx2)
static bool have_avx2(void) {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif
#if defined(PNN_HAVE_AVX512)
DECLARE_TABLES(avx512)
static bool have_avx512(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
#endif
#if defined(PNN_HAVE_NEON)
DECLARE_TABLES(neon)
static bool have_neon(void) { return true; } /* part of every 64-bit Arm processor */
#endif
static bool have_portable(void) { return true; }

typedef struct isa {
  bool (*available)(void);
  const pnn_kernels *table[2];
} isa;

/* Best first; the last one runs everywhere. */
static const isa isas[] = {
#if defined(PNN_HAVE_AVX512)
    {have_avx512, {&pnn_kernels_avx512_f32, &pnn_kernels_avx512_f64}},
#endif
#if defined(PNN_HAVE_AVX2)
    {have_avx2, {&pnn_kernels_avx2_f32, &pnn_kernels_avx2_f64}},
#endif
#if defined(PNN_HAVE_NEON)
    {have_neon, {&pnn_kernels_neon_f32, &pnn_kernels_neon_f64}},
#endif
    {have_portable, {&pnn_kernels_portable_f32, &pnn_kernels_portable_f64}},
};
#define ISA_COUNT (int)(sizeof isas / sizeof isas[0])

static int choose(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
#endif
  int best = 0;
  while (!isas[best].available()) best++;
  const char *cap = getenv("PNN_MAX_ISA");
  if (cap)
    for (int i = best; i < ISA_COUNT; i++)
      if (strcmp(cap, isas[i].table[0]->isa) == 0 && isas[i].available()) return i;
  return best;
}

static const isa *chosen(void) {
  /* Every thread that gets here first stores the same value. */
  static atomic_int index = -1;
  int i = atomic_load_explicit(&index, memory_order_relaxed);
  if (i < 0) {
    i = choose();
    atomic_store_explicit(&index, i, memory_order_relaxed);
  }
  return &isas[i];
}

bool pnn_pages_foreseen(void) {
#if defined(__x86_64__) || defined(__i386__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

int pnn_kernels_pairs(const pnn_kernels *kernels) {
#if defined(PNN_HAVE_AVX512) && !defined(PNN_EMULATE_PAIRS)
  return kernels->product_pairs && __builtin_cpu_supports("avx512bf16");
#else
  return kernels->product_pairs != NULL;
#endif
}

const pnn_kernels *pnn_kernels_get(int precision) { return chosen()->table[precision]; }

const char *pnn_isa_name(void) { return chosen()->table[0]->isa; }
