/*
 * program.c - a C program that uses the CUDA half of an installed libpnn: one forward pass whose result is known.
 *
 * x = 1, 2, 3, 4 on a 2x2 image, no noise, relu, V = 2, bias = 0.5: y = 2.5, 4.5, 6.5, 8.5. Without a GPU the call must
 * say PNN_ERROR_DEVICE, in the CUDA runtime's words.
 */
#include <cuda_runtime_api.h>
#include <pnn/pnn_cuda.h>
#include <stdio.h>
#include <string.h>

static pnn_tensor view(float *data) {
  pnn_tensor tensor = {data, PNN_FLOAT32, {1, 1, 1, 1}, {1, 1, 1, 1}};
  return tensor;
}

static pnn_tensor image(float *data) {
  pnn_tensor tensor = {data, PNN_FLOAT32, {1, 1, 2, 2}, {4, 4, 2, 1}};
  return tensor;
}

int main(void) {
  float host[10] = {1, 2, 3, 4, 2, 0.5f}; /* x, V, bias, then y */
  float *device = host;
  void *workspace = NULL;
  int devices = 0;
  const int gpu = cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
  if (strncmp(pnn_cuda_architectures(), "sm_", 3) != 0) return 1;
  if (gpu && (cudaMalloc((void **)&device, sizeof host) != cudaSuccess ||
              cudaMemcpy(device, host, sizeof host, cudaMemcpyHostToDevice) != cudaSuccess))
    return 1;

  pnn_params params;
  pnn_params_init(&params);
  params.input = image(device);
  params.weight = view(device + 4);
  params.bias = view(device + 5);
  params.output = image(device + 6);
  pnn_error error;
  size_t bytes = 0;
  if (pnn_cuda_workspace_size(&params, PNN_PASS_FORWARD, &bytes, &error) != PNN_OK) {
    fprintf(stderr, "%s: %s\n", pnn_status_string(error.status), error.message);
    return 1;
  }
  char none[1024];
  if (gpu && cudaMalloc(&workspace, bytes + 1) != cudaSuccess) return 1;
  params.workspace = gpu ? workspace : none;
  params.workspace_bytes = bytes;
  const pnn_status status = pnn_cuda_forward(&params, NULL, &error);
  if (!gpu) {
    if (status != PNN_ERROR_DEVICE || error.message[0] == '\0') {
      fprintf(stderr, "without a GPU the status is %d (%s), it should be PNN_ERROR_DEVICE\n", (int)status,
              error.message);
      return 1;
    }
    printf("libpnn %s for %s: no GPU, and it says so: %s\n", pnn_version(), pnn_cuda_architectures(), error.message);
    return 0;
  }
  if (status != PNN_OK || cudaMemcpy(host, device, sizeof host, cudaMemcpyDeviceToHost) != cudaSuccess) {
    fprintf(stderr, "%s: %s\n", pnn_status_string(status), error.message);
    return 1;
  }
  for (int i = 0; i < 4; i++) {
    if (host[6 + i] != 2 * host[i] + 0.5f) {
      fprintf(stderr, "y[%d] is %g, it should be %g\n", i, (double)host[6 + i], (double)(2 * host[i] + 0.5f));
      return 1;
    }
  }
  printf("libpnn %s for %s: right\n", pnn_version(), pnn_cuda_architectures());
  return 0;
}
