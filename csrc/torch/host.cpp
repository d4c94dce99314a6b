// host.cpp - PyTorch's intra-op threads as libpnn's host. Results never depend on their number.
#include "host.h"

#include <pthread.h>
#include <torch/csrc/stable/c/shim.h>

#include <atomic>

namespace torch_pnn {
namespace {

std::atomic<bool> forked{false};

// Registered once, when the library is loaded.
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

struct Job {
  void (*task)(void* argument, int64_t index);
  void* argument;
  std::atomic<bool> started{false};
};

void run_range(int64_t begin, int64_t end, void* job_) {
  Job* job = static_cast<Job*>(job_);
  job->started.store(true, std::memory_order_relaxed);
  for (int64_t i = begin; i < end; i++) job->task(job->argument, i);
}

// No exception may pass through libpnn's C frames: where PyTorch cannot start its threads (it fails before the first
// task; the tasks themselves never do), the calling thread does the work.
void parallel_for(void*, int64_t count, void (*task)(void* argument, int64_t index), void* argument) {
  Job job{task, argument};
  if (torch_parallel_for(0, count, 1, run_range, &job) != 0 && !job.started.load()) run_range(0, count, &job);
}

void serial_for(void*, int64_t count, void (*task)(void* argument, int64_t index), void* argument) {
  for (int64_t i = 0; i < count; i++) task(argument, i);
}

constexpr pnn_host kAlone = {1, serial_for, nullptr};

// Whether a second thread would not have woken before the call is done: that takes some microseconds, far longer where
// its processor is busy, and half a million multiply-adds take as long. Making a response map counts as 32 of them.
bool is_small(const pnn_params& params) {
  const pnn_tensor &input = params.input, &weight = params.weight;
  double maps = static_cast<double>(params.masks) * static_cast<double>(input.size[1]);
  for (const int d : {0, 2, 3}) maps *= static_cast<double>(input.size[d]);
  for (const int64_t step : params.stride) maps /= static_cast<double>(step > 0 ? step : 1);
  const double outputs =
      static_cast<double>(weight.size[0]) / static_cast<double>(params.groups > 0 ? params.groups : 1);
  return maps * (outputs + 32) < 1 << 19;
}

}  // namespace

pnn_host current_host() {
  uint32_t threads = 1;
  if (forked.load(std::memory_order_relaxed) || torch_get_num_threads(&threads) != 0 || threads < 2) return kAlone;
  return {static_cast<int32_t>(threads), parallel_for, nullptr};
}

pnn_host current_host(const pnn_params& params) { return is_small(params) ? kAlone : current_host(); }

}  // namespace torch_pnn
