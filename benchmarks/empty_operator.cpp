// empty_operator.cpp - an operator with the schema of perturb_conv2d that computes nothing: what PyTorch's dispatcher,
// the way through the stable ABI and an output's allocation cost by themselves. For benchmarks/run.py.
#include "arguments.h"
#include "torch_pnn_schemas.h"

namespace {

using torch_pnn::Arguments;
using torch_pnn::Tensor;

void perturb_conv2d(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor input = arguments.tensor(), weight = arguments.tensor();
  for (int i = 0; i < 3; i++) arguments.optional_tensor();
  arguments.integer();
  arguments.boolean();
  arguments.string();
  arguments.real();
  arguments.string();
  arguments.integers();
  arguments.integer();

  const torch_pnn::Numbers x = input.sizes();
  const int64_t sizes[] = {x[0], weight.sizes()[0], x[2], x[3]};
  const int64_t strides[] = {sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3], 1};
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(4, sizes, strides, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0,
                               &handle) != 0)
    torch_pnn::fail("empty", "out of memory");
  stack[0] = torch::stable::detail::from(handle);
}

}  // namespace

STABLE_TORCH_LIBRARY(torch_pnn_benchmark, library) { library.def(torch_pnn::schemas::kPerturbConv2d); }
STABLE_TORCH_LIBRARY_IMPL(torch_pnn_benchmark, CPU, library) { library.impl("perturb_conv2d", perturb_conv2d); }
