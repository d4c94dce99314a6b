// operators.cpp - the registered operators: their schemas, and their kernels on libpnn, for one device (backend.h).
//
// Written against LibTorch's stable ABI (target 2.11): one binary for every PyTorch from 2.11 on. Each kernel reads its
// arguments, plans its results, and lets libpnn check and run the pass.
#include <torch/csrc/stable/library.h>

#include "backend.h"
#include "params.h"
#include "settings.h"
#include "torch_pnn_schemas.h"

namespace torch_pnn {
namespace {

void put(StableIValue* stack, size_t at, Tensor tensor) { stack[at] = torch::stable::detail::from(tensor.release()); }

void read_masks(Arguments& arguments, Layer& layer) {
  layer.mask = arguments.optional_tensor();
  layer.seed = arguments.optional_tensor();
}

void read_options(Arguments& arguments, Layer& layer) {
  layer.masks = arguments.integer();
  layer.shared_masks = arguments.boolean();
  layer.noise = arguments.string();
  layer.level = arguments.real();
  layer.activation = arguments.string();
  layer.stride = arguments.integers();
  layer.groups = arguments.integer();
}

void check_output_mask(const Layer& layer, const std::vector<bool>& output_mask, size_t count) {
  if (output_mask.size() != count)
    fail(layer.op, "output_mask has ", output_mask.size(), " values, it should have ", count);
  if (output_mask.back() && !layer.mask)
    fail(layer.op, "output_mask asks for the gradient of mask, which is None, it should be False there");
}

// Plans the gradients that both layers have: input, weight, bias. The gradient of the mask comes last in the schemas.
void plan_gradients(const Layer& layer, const std::vector<bool>& wanted, pnn_params& params, Results& results) {
  const Shape input(layer.input.sizes()), weight(layer.weight.sizes());
  const int32_t input_dtype = dtype_of(layer.input), weight_dtype = dtype_of(layer.weight);
  wanted[0] ? results.plan(&params.grad_input, input, strides_like(layer.input, input), input_dtype)
            : results.skip(input_dtype);
  wanted[1] ? results.plan(&params.grad_weight, weight, contiguous_strides(weight), weight_dtype)
            : results.skip(weight_dtype);
  wanted[2] ? results.plan(&params.grad_bias, {weight[0]}, {1}, weight_dtype) : results.skip(weight_dtype);
}

void plan_mask_gradient(const Layer& layer, bool wanted, pnn_params& params, Results& results) {
  if (!wanted) {
    results.skip(dtype_of(layer.mask ? *layer.mask : layer.input));
    return;
  }
  const Shape mask(layer.mask->sizes());
  results.plan(&params.grad_mask, mask, contiguous_strides(mask), dtype_of(*layer.mask));
}

void perturb_conv2d(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Layer layer("perturb_conv2d", arguments);
  const Backend backend(layer.input);
  layer.bias = arguments.optional_tensor();
  read_masks(arguments, layer);
  read_options(arguments, layer);

  pnn_params params = make_params(layer);
  Results results(layer.op, params);
  const Shape sizes = output_sizes(layer);
  results.plan(&params.output, sizes, strides_like(layer.input, sizes), dtype_of(layer.weight));
  results.run(PNN_PASS_FORWARD);
  put(stack, 0, results.take(0));
}

void perturb_conv2d_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Tensor grad_output = arguments.tensor();
  Layer layer("_perturb_conv2d_backward", arguments);
  const Backend backend(layer.input);
  layer.grad_output = std::move(grad_output);
  read_masks(arguments, layer);
  read_options(arguments, layer);
  const std::vector<bool> output_mask = arguments.booleans();

  pnn_params params = make_params(layer);
  check_output_mask(layer, output_mask, 4);
  Results results(layer.op, params);
  plan_gradients(layer, output_mask, params, results);
  plan_mask_gradient(layer, output_mask[3], params, results);
  results.run(PNN_PASS_BACKWARD);
  for (size_t i = 0; i < 4; i++) put(stack, i, results.take(i));
}

void perturb_norm_conv2d(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Layer layer("perturb_norm_conv2d", arguments);
  const Backend backend(layer.input);
  layer.norm = true;
  layer.bias = arguments.optional_tensor();
  layer.norm_weight = arguments.optional_tensor();
  layer.norm_bias = arguments.optional_tensor();
  layer.mean = arguments.optional_tensor();
  layer.variance = arguments.optional_tensor();
  read_masks(arguments, layer);
  layer.training = arguments.boolean();
  layer.eps = arguments.real();
  read_options(arguments, layer);
  if (layer.training) {  // this batch's moments are written instead
    layer.mean.reset();
    layer.variance.reset();
  }

  pnn_params params = make_params(layer);
  Results results(layer.op, params);
  const Shape sizes = output_sizes(layer);
  results.plan(&params.output, sizes, strides_like(layer.input, sizes), dtype_of(layer.weight));
  if (layer.training) {
    int64_t maps = 0;
    if (__builtin_mul_overflow(layer.input.sizes()[1], params.masks, &maps) || maps < 0) maps = 0;
    results.plan(&params.mean, {maps}, {1}, statistics_dtype(layer.input));
    results.plan(&params.variance, {maps}, {1}, statistics_dtype(layer.input));
  }
  results.run(PNN_PASS_FORWARD);
  put(stack, 0, results.take(0));
  put(stack, 1, layer.training ? results.take(1) : layer.mean->clone());
  put(stack, 2, layer.training ? results.take(2) : layer.variance->clone());
}

void perturb_norm_conv2d_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Tensor grad_output = arguments.tensor();
  Layer layer("_perturb_norm_conv2d_backward", arguments);
  const Backend backend(layer.input);
  layer.norm = true;
  layer.grad_output = std::move(grad_output);
  layer.norm_weight = arguments.optional_tensor();
  layer.norm_bias = arguments.optional_tensor();
  layer.mean = arguments.tensor();
  layer.variance = arguments.tensor();
  read_masks(arguments, layer);
  layer.training = arguments.boolean();
  layer.eps = arguments.real();
  read_options(arguments, layer);
  const std::vector<bool> output_mask = arguments.booleans();

  pnn_params params = make_params(layer);
  check_output_mask(layer, output_mask, 6);
  Results results(layer.op, params);
  plan_gradients(layer, output_mask, params, results);
  const Shape maps(layer.mean->sizes());
  const int32_t statistics = statistics_dtype(layer.input);
  output_mask[3] ? results.plan(&params.grad_norm_weight, maps, {1}, statistics) : results.skip(statistics);
  output_mask[4] ? results.plan(&params.grad_norm_bias, maps, {1}, statistics) : results.skip(statistics);
  plan_mask_gradient(layer, output_mask[5], params, results);
  results.run(PNN_PASS_BACKWARD);
  for (size_t i = 0; i < 6; i++) put(stack, i, results.take(i));
}

void perturbation_mask(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "perturbation_mask";
  Arguments arguments(stack);
  const Tensor seed = arguments.tensor();
  const Backend backend(seed);
  const int64_t channels = arguments.integer(), masks = arguments.integer();
  const int64_t height = arguments.integer(), width = arguments.integer();
  const bool shared_masks = arguments.boolean();
  const std::string noise = arguments.string();
  const int32_t dtype = arguments.optional_dtype().value_or(aoti_torch_dtype_float32());

  const struct {
    const char* name;
    int64_t value;
  } sizes[] = {{"channels", channels}, {"masks", masks}, {"height", height}, {"width", width}};
  for (const auto& size : sizes)
    if (size.value < 0) fail(op, size.name, " is ", size.value, ", it should not be negative");
  const pnn_noise kind = noise_kind(op, noise);
  const int64_t* const value = seed_value(op, seed);
  pnn_tensor view = {};
  if (!pnn_dtype_of(dtype, &view.dtype))
    fail(op, "dtype is ", dtype_name(dtype), ", it should be float32, float64, bfloat16 or float16");

  const Shape size = {shared_masks ? 1 : channels, masks, height, width};
  Tensor result = allocate(op, size, contiguous_strides(size), dtype);
  if (result.numel() > 0) {
    const Numbers strides = result.strides();
    view.data = data_of(op, result);
    for (size_t d = 0; d < 4; d++) {
      view.size[d] = size[d];
      view.stride[d] = strides[d];
    }
    pnn_error error;
    check(op, Backend::mask_fill(&view, kind, shared_masks, value, &error), error);
  }
  put(stack, 0, std::move(result));
}

#if !defined(TORCH_PNN_CUDA)
void isa_name(StableIValue* stack, uint64_t, uint64_t) {
  stack[0] = torch::stable::detail::from(std::string(pnn_isa_name()));
}

void library_version(StableIValue* stack, uint64_t, uint64_t) {
  stack[0] = torch::stable::detail::from(std::string(pnn_version()));
}

void allow_tf32(StableIValue* stack, uint64_t, uint64_t) {
  if (const std::optional<bool> value = Arguments(stack).optional_boolean()) torch_pnn_allow_tf32(*value);
  stack[0] = torch::stable::detail::from(torch_pnn_tf32_allowed());
}
void allow_wgmma(StableIValue* stack, uint64_t, uint64_t) {
  if (const std::optional<bool> value = Arguments(stack).optional_boolean()) torch_pnn_allow_wgmma(*value);
  stack[0] = torch::stable::detail::from(torch_pnn_wgmma_allowed());
}
#endif

void register_kernels(torch::stable::detail::StableLibrary& library) {
  library.impl("perturb_conv2d", perturb_conv2d);
  library.impl("_perturb_conv2d_backward", perturb_conv2d_backward);
  library.impl("perturb_norm_conv2d", perturb_norm_conv2d);
  library.impl("_perturb_norm_conv2d_backward", perturb_norm_conv2d_backward);
  library.impl("perturbation_mask", perturbation_mask);
}

}  // namespace
}  // namespace torch_pnn

#if defined(TORCH_PNN_CUDA)

STABLE_TORCH_LIBRARY_IMPL(torch_pnn, CUDA, library) { torch_pnn::register_kernels(library); }
STABLE_TORCH_LIBRARY_IMPL(torch_pnn, SparseCUDA, library) { torch_pnn::register_kernels(library); }
STABLE_TORCH_LIBRARY_IMPL(torch_pnn, SparseCsrCUDA, library) { torch_pnn::register_kernels(library); }

#else

STABLE_TORCH_LIBRARY(torch_pnn, library) {
  for (const char* schema : torch_pnn::schemas::kSchemas) library.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(torch_pnn, CPU, library) { torch_pnn::register_kernels(library); }

// Tensors that are on the CPU but not dense come here, so that the kernels' own checks refuse them by name.
STABLE_TORCH_LIBRARY_IMPL(torch_pnn, SparseCPU, library) { torch_pnn::register_kernels(library); }
STABLE_TORCH_LIBRARY_IMPL(torch_pnn, SparseCsrCPU, library) { torch_pnn::register_kernels(library); }
STABLE_TORCH_LIBRARY_IMPL(torch_pnn, MkldnnCPU, library) { torch_pnn::register_kernels(library); }
STABLE_TORCH_LIBRARY_IMPL(torch_pnn, QuantizedCPU, library) { torch_pnn::register_kernels(library); }

// Functions without a tensor argument have no device.
STABLE_TORCH_LIBRARY_IMPL(torch_pnn, CompositeExplicitAutograd, library) {
  library.impl("_isa_name", torch_pnn::isa_name);
  library.impl("_library_version", torch_pnn::library_version);
  library.impl("_allow_tf32", torch_pnn::allow_tf32);
  library.impl("_allow_wgmma", torch_pnn::allow_wgmma);
}

#endif
