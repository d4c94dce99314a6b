/*
 * occupancy.cc - how many blocks of a kernel fit on a multiprocessor, by NVIDIA's own cuda_occupancy.h, without a
 * device.
 *
 * Reads lines of "compute capability times ten, registers a thread, threads a block, bytes of dynamic shared memory"
 * and prints the number of blocks of each. gates.py calls it.
 */
#include <cuda_occupancy.h>

#include <cstdio>

/* What cudaGetDeviceProperties would say (CUDA C++ programming guide, "Compute Capabilities"). */
static bool properties_of(int capability, cudaOccDeviceProp *device) {
  struct Known {
    int capability, threads, shared_kib;
  };
  static const Known known[] = {{80, 2048, 164}, {86, 1536, 100},  {89, 1536, 100},
                                {90, 2048, 228}, {100, 2048, 228}, {120, 1536, 100}};
  for (const Known &k : known) {
    if (k.capability != capability) continue;
    device->computeMajor = capability / 10;
    device->computeMinor = capability % 10;
    device->maxThreadsPerBlock = 1024;
    device->maxThreadsPerMultiprocessor = k.threads;
    device->regsPerBlock = device->regsPerMultiprocessor = 65536;
    device->warpSize = 32;
    device->sharedMemPerBlock = 48 * 1024;
    device->sharedMemPerMultiprocessor = static_cast<size_t>(k.shared_kib) * 1024;
    device->reservedSharedMemPerBlock = 1024;
    device->sharedMemPerBlockOptin = device->sharedMemPerMultiprocessor - device->reservedSharedMemPerBlock;
    device->numSms = 1;
    return true;
  }
  return false;
}

int main() {
  int capability, registers, threads;
  unsigned long shared;
  while (std::scanf("%d %d %d %lu", &capability, &registers, &threads, &shared) == 4) {
    cudaOccDeviceProp device;
    if (!properties_of(capability, &device)) {
      std::fprintf(stderr, "occupancy: no figures of compute capability %d.%d here: add its line to occupancy.cc\n",
                   capability / 10, capability % 10);
      return 1;
    }
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = threads;
    kernel.numRegs = registers;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = shared;
    cudaOccDeviceState state;
    cudaOccResult result;
    const cudaOccError error =
        cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared);
    if (error != CUDA_OCC_SUCCESS && error != CUDA_OCC_ERROR_INVALID_INPUT) {
      std::fprintf(stderr, "occupancy: cuda_occupancy.h refused sm_%d, error %d\n", capability, error);
      return 1;
    }
    /* More shared memory than any configuration has is an invalid input to it. */
    std::printf("%d\n", error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : 0);
  }
  return 0;
}
