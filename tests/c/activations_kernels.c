/*
 * activations_kernels.c - csrc/kernels/activations.h on arrays, compiled once per instruction set for the test.
 */
#include "activations_kernels.h"

#include <pnn/pnn.h>

#include "kernels/activations.h"

#if defined(PNN_ISA_AVX512)
#define TABLE pnn_test_activations_avx512
#elif defined(PNN_ISA_AVX2)
#define TABLE pnn_test_activations_avx2
#elif defined(PNN_ISA_NEON)
#define TABLE pnn_test_activations_neon
#else
#define TABLE pnn_test_activations_portable
#endif

_Static_assert((int)PNN_TEST_ACTIVATIONS == (int)PNN_ACTIVATION_COUNT, "the test's table has every activation");

/* The last, partial vector goes through a buffer that is filled up with zeros. */
#define DEFINE_ARRAYS(name, suffix, scalar, vector, lanes)                                  \
  static void name##_value_##suffix(scalar *y, const scalar *u, size_t n) {                 \
    for (size_t i = 0; i < n; i += lanes) {                                                 \
      size_t bytes = (n - i < lanes ? n - i : lanes) * sizeof(scalar);                      \
      vector vu = {0}, vy;                                                                  \
      memcpy(&vu, u + i, bytes);                                                            \
      vy = pnn_##name##_##suffix(vu);                                                       \
      memcpy(y + i, &vy, bytes);                                                            \
    }                                                                                       \
  }                                                                                         \
  static void name##_grad_##suffix(scalar *y, const scalar *u, const scalar *d, size_t n) { \
    for (size_t i = 0; i < n; i += lanes) {                                                 \
      size_t bytes = (n - i < lanes ? n - i : lanes) * sizeof(scalar);                      \
      vector vu = {0}, vdy = {0}, vy;                                                       \
      memcpy(&vu, u + i, bytes);                                                            \
      memcpy(&vdy, d + i, bytes);                                                           \
      vy = pnn_##name##_grad_##suffix(vu, vdy);                                             \
      memcpy(y + i, &vy, bytes);                                                            \
    }                                                                                       \
  }

#define DEFINE_ACTIVATION(NAME, name)         \
  DEFINE_ARRAYS(name, f32, float, vf, PNN_VF) \
  DEFINE_ARRAYS(name, f64, double, vd, PNN_VD)
PNN_ACTIVATION_LIST(DEFINE_ACTIVATION)

#define ENTRY(NAME, name) \
  [PNN_ACTIVATION_##NAME] = {#name, name##_value_f32, name##_grad_f32, name##_value_f64, name##_grad_f64},
const pnn_test_activation TABLE[PNN_TEST_ACTIVATIONS] = {PNN_ACTIVATION_LIST(ENTRY)};
