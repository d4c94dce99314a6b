/*
 * backend_test.cc - the CUDA operators' device and stream, without CUDA: csrc/torch/cuda/backend_cuda.cpp against
 * stand-ins for the functions of PyTorch and of libpnn that it calls, which note what they were asked.
 */
#include <gtest/gtest.h>
#include <pnn/pnn_cuda.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <string>
#include <vector>

#include "backend.h"

namespace {

/* What the stand-ins were called with, in order; and which one is to fail. */
std::vector<std::string> calls;
std::string failing;
int32_t tensor_device = 0;
pnn_cuda_stream stream_seen = nullptr;
int guards = 0;

void *stream_of(int32_t device) { return reinterpret_cast<void *>(uintptr_t{0x1000} + static_cast<unsigned>(device)); }

int32_t note(const std::string &name, int32_t device) {
  if (name == failing) return AOTI_TORCH_FAILURE;
  calls.push_back(name + " " + std::to_string(device));
  return AOTI_TORCH_SUCCESS;
}

}  // namespace

extern "C" {
struct CUDAGuardOpaque;
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t *device) {
  *device = tensor_device;
  return note("device of the tensor", tensor_device);
}
AOTITorchError aoti_torch_create_device_guard(int32_t device, DeviceGuardHandle *guard) {
  const int32_t status = note("guard", device);
  if (status == AOTI_TORCH_SUCCESS) {
    guards++;
    *guard = reinterpret_cast<DeviceGuardHandle>(&guards);
  }
  return status;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard) {
  EXPECT_EQ(reinterpret_cast<int *>(guard), &guards);
  guards--;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void **stream) {
  *stream = stream_of(device);
  return note("stream", device);
}
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle) { return AOTI_TORCH_SUCCESS; }
int32_t aoti_torch_device_type_cuda() { return 1; }

pnn_status pnn_cuda_workspace_size(const pnn_params *, pnn_pass, size_t *bytes, pnn_error *) {
  *bytes = 5;
  return PNN_OK;
}
pnn_status pnn_cuda_forward(const pnn_params *, pnn_cuda_stream stream, pnn_error *) {
  stream_seen = stream;
  return PNN_OK;
}
pnn_status pnn_cuda_backward(const pnn_params *, pnn_cuda_stream stream, pnn_error *) {
  stream_seen = stream;
  return PNN_ERROR_DEVICE;
}
pnn_status pnn_cuda_mask_fill(const pnn_tensor *, pnn_noise, int32_t, const int64_t *, pnn_cuda_stream stream,
                              pnn_error *) {
  stream_seen = stream;
  return PNN_OK;
}
}

namespace torch_pnn {
namespace {

class CudaBackend : public testing::Test {
 protected:
  void SetUp() override {
    calls.clear();
    failing.clear();
    guards = 0;
  }
  int handle = 0;
  Tensor tensor{reinterpret_cast<AtenTensorHandle>(&handle)};
};

TEST_F(CudaBackend, TakesTheTensorsDeviceAndItsCurrentStream) {
  for (int32_t device : {0, 3}) {
    calls.clear();
    tensor_device = device;
    {
      Backend backend(tensor);
      EXPECT_EQ(guards, 1);
      EXPECT_EQ(Backend::device_index(), device);
      const std::string number = std::to_string(device);
      EXPECT_EQ(calls,
                (std::vector<std::string>{"device of the tensor " + number, "guard " + number, "stream " + number}));
      const auto expected = static_cast<pnn_cuda_stream>(stream_of(device));
      EXPECT_EQ(Backend::run(nullptr, PNN_PASS_FORWARD, nullptr), PNN_OK);
      EXPECT_EQ(stream_seen, expected);
      stream_seen = nullptr;
      EXPECT_EQ(Backend::run(nullptr, PNN_PASS_BACKWARD, nullptr), PNN_ERROR_DEVICE);
      EXPECT_EQ(stream_seen, expected);
      stream_seen = nullptr;
      EXPECT_EQ(Backend::mask_fill(nullptr, PNN_NOISE_UNIFORM, 0, nullptr, nullptr), PNN_OK);
      EXPECT_EQ(stream_seen, expected);
    }
    EXPECT_EQ(guards, 0) << "the device that was current before is set again";
  }
}

TEST_F(CudaBackend, FailuresOfPytorchAreErrorsAndLeaveNoGuard) {
  tensor_device = 2;
  for (const char *name : {"device of the tensor", "guard", "stream"}) {
    failing = name;
    EXPECT_THROW(Backend backend(tensor), std::runtime_error) << name;
    EXPECT_EQ(guards, 0) << name;
  }
}

TEST_F(CudaBackend, IsCuda) {
  EXPECT_EQ(Backend::device_type(), 1);
  EXPECT_STREQ(Backend::device_name(), "a CUDA device");
  size_t bytes = 0;
  EXPECT_EQ(Backend::workspace_size(nullptr, PNN_PASS_FORWARD, &bytes, nullptr), PNN_OK);
  EXPECT_EQ(bytes, 5u);
  EXPECT_EQ(Backend::kStackWorkspace, 0u) << "a kernel can't read the caller's stack";
}

}  // namespace
}  // namespace torch_pnn
