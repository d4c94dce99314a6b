/*
 * quotient.h - division of counts, for what is divided once a tile or a panel.
 *
 * Processors of before 2019 take 40 to 90 cycles for a 64-bit integer division and 26 for a 32-bit one; the products of
 * a tile can be as few as 800. Almost every count fits 32 bits.
 */
#ifndef PNN_KERNELS_QUOTIENT_H
#define PNN_KERNELS_QUOTIENT_H

#include <stdint.h>

/* a / b and a % b for 0 <= a, 0 < b. */
static inline int64_t pnn_quotient(int64_t a, int64_t b) {
  return (uint64_t)(a | b) >> 32 ? a / b : (int64_t)((uint32_t)a / (uint32_t)b);
}

static inline int64_t pnn_remainder(int64_t a, int64_t b) {
  return (uint64_t)(a | b) >> 32 ? a % b : (int64_t)((uint32_t)a % (uint32_t)b);
}

/* Rounded up. */
static inline int64_t pnn_quotient_up(int64_t a, int64_t b) { return pnn_quotient(a + b - 1, b); }

/* The least multiple of b that is not below a. */
static inline int64_t pnn_round_up(int64_t a, int64_t b) { return pnn_quotient_up(a, b) * b; }

#endif
