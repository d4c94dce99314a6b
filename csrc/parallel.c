/*
 * parallel.c - runs items over the host's threads, and the floating-point environment that they compute in.
 *
 * Workers take the next item from a counter. Which worker runs which item is left to chance, so items never share
 * what they write, and every sum's order is fixed elsewhere.
 */
#include <stdatomic.h>

#include "internal.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif !defined(__aarch64__)
#include <fenv.h>
#endif
#if defined(PNN_HAVE_OPENMP)
#include <omp.h>
#include <unistd.h>
#endif

pnn_fpenv pnn_fpenv_enter(void) {
#if defined(__x86_64__) || defined(__i386__)
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x1f80); /* round to nearest, denormals kept, no traps */
  return before;
#elif defined(__aarch64__)
  uint64_t before;
  __asm__ volatile("mrs %0, fpcr" : "=r"(before));
  __asm__ volatile("msr fpcr, %0" : : "r"(UINT64_C(0)));
  return before;
#else
  const int before = fegetround();
  fesetround(FE_TONEAREST);
  return (pnn_fpenv)before;
#endif
}

void pnn_fpenv_leave(pnn_fpenv environment) {
#if defined(__x86_64__) || defined(__i386__)
  _mm_setcsr((unsigned)environment);
#elif defined(__aarch64__)
  __asm__ volatile("msr fpcr, %0" : : "r"(environment));
#else
  fesetround((int)environment);
#endif
}

typedef struct job {
  atomic_llong next;
  int64_t items;
  void (*task)(void *argument, int32_t worker, int64_t item);
  void *argument;
} job;

static void work(void *job_, int64_t worker) {
  job *j = job_;
  const pnn_fpenv environment = pnn_fpenv_enter();
  for (;;) {
    const int64_t item = atomic_fetch_add_explicit(&j->next, 1, memory_order_relaxed);
    if (item >= j->items) break;
    j->task(j->argument, (int32_t)worker, item);
  }
  pnn_fpenv_leave(environment);
}

int32_t pnn_workers(const pnn_host *host, int64_t items) {
  if (!host || host->threads < 2 || items < 2) return 1;
  return items < host->threads ? (int32_t)items : host->threads;
}

void pnn_parallel(const pnn_host *host, int64_t items, void (*task)(void *argument, int32_t worker, int64_t item),
                  void *argument) {
  if (items <= 0) return;
  job j = {.items = items, .task = task, .argument = argument};
  atomic_init(&j.next, 0);
  const int32_t workers = pnn_workers(host, items);
  if (workers == 1)
    work(&j, 0);
  else
    host->parallel_for(host->context, workers, work, &j);
}

#if defined(PNN_HAVE_OPENMP)
static void openmp_for(void *context, int64_t count, void (*task)(void *argument, int64_t index), void *argument) {
  (void)context;
#pragma omp parallel for schedule(static, 1)
  for (int64_t i = 0; i < count; i++) task(argument, i);
}

const pnn_host *pnn_default_host(void) {
  /* OpenMP's threads do not survive a fork, and waiting for them hangs: a child computes by itself. */
  static atomic_int first_process;
  int process = 0;
  if (!atomic_compare_exchange_strong(&first_process, &process, (int)getpid()) && process != (int)getpid()) return NULL;
  static _Thread_local pnn_host host;
  host = (pnn_host){.threads = omp_get_max_threads(), .parallel_for = openmp_for, .context = NULL};
  return &host;
}
#else
const pnn_host *pnn_default_host(void) { return NULL; }
#endif
