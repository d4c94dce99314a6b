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

}  // namespace

pnn_host current_host() {
  uint32_t threads = 1;
  if (forked.load(std::memory_order_relaxed) || torch_get_num_threads(&threads) != 0 || threads < 2)
    return {1, serial_for, nullptr};
  return {static_cast<int32_t>(threads), parallel_for, nullptr};
}

}  // namespace torch_pnn
