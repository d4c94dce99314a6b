// backend_cuda.cpp - the operators' CUDA device: libpnn's CUDA half on PyTorch's current stream.
//
// The stream comes from libtorch_cuda's own function: the stable ABI's getCurrentStream gives the native handle only
// from PyTorch 2.13 on.
#define USE_CUDA  // makes the header below declare what libtorch_cuda exports
#include <pnn/pnn_cuda.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <stdexcept>

#include "backend.h"

namespace torch_pnn {
namespace {

// Of the call that this thread is in.
thread_local int32_t current_device = 0;
thread_local pnn_cuda_stream current_stream = nullptr;

void require(AOTITorchError code, const char* what) {
  if (code != AOTI_TORCH_SUCCESS) throw std::runtime_error(std::string("torch_pnn: PyTorch could not ") + what);
}

}  // namespace

Backend::Backend(const Tensor& tensor) {
  require(aoti_torch_get_device_index(tensor.get(), &current_device), "tell a tensor's device");
  DeviceGuardHandle guard = nullptr;
  require(aoti_torch_create_device_guard(current_device, &guard), "make a tensor's device the current one");
  void* stream = nullptr;
  const AOTITorchError told = aoti_torch_get_current_cuda_stream(current_device, &stream);
  if (told != AOTI_TORCH_SUCCESS) aoti_torch_delete_device_guard(guard);  // no destructor runs for this object
  require(told, "tell the current stream");
  guard_ = guard;
  current_stream = static_cast<pnn_cuda_stream>(stream);
}
Backend::~Backend() {
  if (guard_) aoti_torch_delete_device_guard(static_cast<DeviceGuardHandle>(guard_));
}

const char* Backend::device_name() { return "a CUDA device"; }
int32_t Backend::device_type() { return aoti_torch_device_type_cuda(); }
int32_t Backend::device_index() { return current_device; }

pnn_status Backend::workspace_size(const pnn_params* params, pnn_pass pass, size_t* bytes, pnn_error* error) {
  return pnn_cuda_workspace_size(params, pass, bytes, error);
}

pnn_status Backend::run(const pnn_params* params, pnn_pass pass, pnn_error* error) {
  return pass == PNN_PASS_FORWARD ? pnn_cuda_forward(params, current_stream, error)
                                  : pnn_cuda_backward(params, current_stream, error);
}

pnn_status Backend::mask_fill(const pnn_tensor* mask, pnn_noise noise, int32_t shared_masks, const int64_t* seed,
                              pnn_error* error) {
  return pnn_cuda_mask_fill(mask, noise, shared_masks, seed, current_stream, error);
}

}  // namespace torch_pnn
