// backend_cpu.cpp - the operators' CPU: libpnn on PyTorch's threads.
#include <torch/csrc/stable/library.h>

#include "backend.h"
#include "host.h"

namespace torch_pnn {

Backend::Backend(const Tensor&) {}
Backend::~Backend() = default;

const char* Backend::device_name() { return "the CPU"; }
int32_t Backend::device_type() { return aoti_torch_device_type_cpu(); }
int32_t Backend::device_index() { return 0; }

pnn_status Backend::workspace_size(const pnn_params* params, pnn_pass pass, size_t* bytes, pnn_error* error) {
  const pnn_host host = current_host(*params);
  return pnn_workspace_size(params, pass, &host, bytes, error);
}

pnn_status Backend::run(const pnn_params* params, pnn_pass pass, pnn_error* error) {
  const pnn_host host = current_host(*params);
  return pass == PNN_PASS_FORWARD ? pnn_forward(params, &host, error) : pnn_backward(params, &host, error);
}

pnn_status Backend::mask_fill(const pnn_tensor* mask, pnn_noise noise, int32_t shared_masks, const int64_t* seed,
                              pnn_error* error) {
  const pnn_host host = current_host();
  return pnn_mask_fill(mask, noise, shared_masks, seed, &host, error);
}

}  // namespace torch_pnn
