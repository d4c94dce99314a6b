/*
 * cache.c - how large a core's second-level cache is, asked once, at the first use: the blocks of every pass are
 * parts of it.
 *
 * The C library knows it on x86; where that says nothing (on Arm, say), Linux does. PNN_L2_BYTES says another size.
 */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "internal.h"

/* 0 where nobody knows. */
static int64_t reported(void) {
  const char *said = getenv("PNN_L2_BYTES");
  if (said) {
    char *end;
    const long long bytes = strtoll(said, &end, 10);
    if (end != said && !*end && bytes > 0) return bytes;
  }
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  long kib = 0;
  FILE *file = fopen("/sys/devices/system/cpu/cpu0/cache/index2/size", "r"); /* "512K" */
  if (file) {
    if (fscanf(file, "%ldK", &kib) != 1 || kib < 0 || kib > INT32_MAX) kib = 0;
    fclose(file);
  }
  return (int64_t)kib * 1024;
}

int64_t pnn_near_bytes(void) {
  /* Every thread that gets here first stores the same value. */
  static _Atomic int64_t near = 0;
  int64_t bytes = atomic_load_explicit(&near, memory_order_relaxed);
  if (bytes == 0) {
    bytes = reported();
    bytes = bytes ? PNN_MAX(PNN_MIN(bytes, PNN_NEAR_MOST) / PNN_NEAR_LEAST * PNN_NEAR_LEAST, PNN_NEAR_LEAST)
                  : PNN_NEAR_MOST;
    atomic_store_explicit(&near, bytes, memory_order_relaxed);
  }
  return bytes;
}
