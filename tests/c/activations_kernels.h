// activations_kernels.h - the activations of one instruction set, on arrays: what activations_kernels.c gives the test.
#ifndef PNN_TESTS_ACTIVATIONS_KERNELS_H
#define PNN_TESTS_ACTIVATIONS_KERNELS_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { PNN_TEST_ACTIVATIONS = 10 };

// Each writes n results; the arrays may not overlap.
typedef struct pnn_test_activation {
  const char *name;
  void (*value_f32)(float *y, const float *u, size_t n);
  void (*grad_f32)(float *y, const float *u, const float *d, size_t n);
  void (*value_f64)(double *y, const double *u, size_t n);
  void (*grad_f64)(double *y, const double *u, const double *d, size_t n);
} pnn_test_activation;

extern const pnn_test_activation pnn_test_activations_portable[PNN_TEST_ACTIVATIONS];
extern const pnn_test_activation pnn_test_activations_avx2[PNN_TEST_ACTIVATIONS];
extern const pnn_test_activation pnn_test_activations_avx512[PNN_TEST_ACTIVATIONS];
extern const pnn_test_activation pnn_test_activations_neon[PNN_TEST_ACTIVATIONS];

#ifdef __cplusplus
}
#endif

#endif
