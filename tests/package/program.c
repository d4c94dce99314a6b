/*
 * program.c - a C program that uses an installed libpnn: one forward pass whose result is known.
 *
 * x = 1, 2, 3, 4 on a 2x2 image, no noise, relu, V = 2, bias = 0.5: y = 2.5, 4.5, 6.5, 8.5.
 */
#include <pnn/pnn.h>
#include <stdio.h>
#include <stdlib.h>

static pnn_tensor view(float *data, int64_t a, int64_t b, int64_t c, int64_t d) {
  pnn_tensor tensor = {data, PNN_FLOAT32, {a, b, c, d}, {b * c * d, c * d, d, 1}};
  return tensor;
}

int main(void) {
  float x[4] = {1, 2, 3, 4}, v[1] = {2}, bias[1] = {0.5f}, y[4] = {0, 0, 0, 0};
  pnn_params params;
  pnn_params_init(&params);
  params.input = view(x, 1, 1, 2, 2);
  params.weight = view(v, 1, 1, 1, 1);
  params.bias = view(bias, 1, 1, 1, 1);
  params.output = view(y, 1, 1, 2, 2);

  pnn_error error;
  size_t bytes = 0;
  if (pnn_workspace_size(&params, PNN_PASS_FORWARD, pnn_default_host(), &bytes, &error) == PNN_OK) {
    params.workspace = malloc(bytes + 1);
    params.workspace_bytes = bytes;
    pnn_forward(&params, pnn_default_host(), &error);
    free(params.workspace);
  }
  if (error.status != PNN_OK) {
    fprintf(stderr, "%s: %s\n", pnn_status_string(error.status), error.message);
    return 1;
  }
  for (int i = 0; i < 4; i++) {
    if (y[i] != 2 * x[i] + 0.5f) {
      fprintf(stderr, "y[%d] is %g, it should be %g\n", i, (double)y[i], (double)(2 * x[i] + 0.5f));
      return 1;
    }
  }
  printf("libpnn %s on %s: right\n", pnn_version(), pnn_isa_name());
  return 0;
}
