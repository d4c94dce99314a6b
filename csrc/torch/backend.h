// backend.h - what differs between the devices' operators: where memory comes from and which half of libpnn runs.
//
// operators.cpp and params.cpp are compiled twice: with backend_cpu.cpp into torch_pnn_ops, with cuda/backend_cuda.cpp
// into torch_pnn_cuda.
#ifndef TORCH_PNN_BACKEND_H
#define TORCH_PNN_BACKEND_H

#include <pnn/pnn.h>

#include "tensor.h"

namespace torch_pnn {

// For one call of an operator: makes the tensor's device the current one, and finds its stream.
class Backend {
 public:
  explicit Backend(const Tensor& tensor);
  ~Backend();
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;

  // A pass that needs no more bytes than this gets them from the stack: an allocation costs a tenth of a small call.
  // 0 where a pass cannot read the caller's stack.
#if defined(TORCH_PNN_CUDA)
  static constexpr size_t kStackWorkspace = 0;
#else
  static constexpr size_t kStackWorkspace = 64 * 1024;
#endif

  // "the CPU" or "a CUDA device"
  static const char* device_name();
  static int32_t device_type();
  static int32_t device_index();

  static pnn_status workspace_size(const pnn_params* params, pnn_pass pass, size_t* bytes, pnn_error* error);
  static pnn_status run(const pnn_params* params, pnn_pass pass, pnn_error* error);
  static pnn_status mask_fill(const pnn_tensor* mask, pnn_noise noise, int32_t shared_masks, const int64_t* seed,
                              pnn_error* error);

 private:
  void* guard_ = nullptr;
};

}  // namespace torch_pnn

#endif
