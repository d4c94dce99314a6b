/* list_kernels.cc - prints each tiled kernel's name, threads and shared memory, a line each: what gates.py can't read
 * from the machine code. */
#include <cstdio>

#include "kernels.h"

static void print(const char *kernel, int threads, int64_t shared_bytes) {
  std::printf("%s\t%d\t%lld\n", kernel, threads, static_cast<long long>(shared_bytes));
}

int main() {
  pnn_cuda::list_forward(print);
  pnn_cuda::list_forward_wgmma(print);
  pnn_cuda::list_input_gradient(print);
  pnn_cuda::list_input_gradient_wgmma(print);
  pnn_cuda::list_weight_gradient(print);
  pnn_cuda::list_weight_gradient_wgmma(print);
  pnn_cuda::list_moments(print);
  pnn_cuda::list_channels_last(print);
  return 0;
}
