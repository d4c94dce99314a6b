// params.cpp - tensors become a pnn_params here and nowhere else.
#include "params.h"

#include <torch/headeronly/core/ScalarType.h>

#include <cctype>
#include <cstdlib>
#include <cstring>

#include "backend.h"
#include "settings.h"

namespace torch_pnn {
namespace {

// The order of pnn_activation and pnn_noise; each name is the one that Python uses.
constexpr const char* kActivations[PNN_ACTIVATION_COUNT] = {"identity", "relu", "leaky_relu", "elu",     "selu",
                                                            "gelu",     "silu", "tanh",       "sigmoid", "hardtanh"};
constexpr struct {
  const char* name;
  pnn_noise kind;
} kNoises[] = {{"uniform", PNN_NOISE_UNIFORM}, {"normal", PNN_NOISE_NORMAL}, {"waves", PNN_NOISE_WAVES}};

// Stands for the data of tensors without elements, whose own pointer is null.
char no_elements;

// Planned results lie here until they are allocated: addresses that no process has, far apart, so that libpnn's checks
// of overlap see them as separate whatever their size.
char* planned_address(size_t number) {
  return reinterpret_cast<char*>((uintptr_t{1} << 62) + (uintptr_t{number} << 57));
}

void require(int32_t code, const char* op, const char* what) {
  if (code != 0) fail(op, "PyTorch could not tell ", what);
}

void check_dense_here(const char* op, const char* name, const Tensor& tensor) {
  int32_t layout = 0, device = 0;
  require(aoti_torch_get_layout(tensor.get(), &layout), op, "a tensor's layout");
  require(aoti_torch_get_device_type(tensor.get(), &device), op, "a tensor's device");
  if (layout != aoti_torch_layout_strided())
    fail(op, name, " is sparse or opaque, it should be dense (strided): call to_dense() on it");
  int32_t index = Backend::device_index();
  if (device == Backend::device_type() && device != aoti_torch_device_type_cpu())
    require(aoti_torch_get_device_index(tensor.get(), &index), op, "a tensor's device");
  if (device != Backend::device_type() || index != Backend::device_index())
    fail(op, name, " is not on ", Backend::device_name(), device == Backend::device_type() ? " of the others" : "",
         ", it should be on the same device as the other tensors");
}

std::string size_text(Numbers sizes) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < sizes.size(); i++) text << (i ? ", " : "") << sizes[i];
  text << ']';
  return text.str();
}

void describe_optional(const Layer& layer, const char* name, const std::optional<Tensor>& tensor, size_t dimensions,
                       pnn_tensor* place) {
  if (tensor) *place = describe(layer.op, name, *tensor, dimensions);
}

pnn_activation activation_kind(const Layer& layer) {
  for (int i = 0; i < PNN_ACTIVATION_COUNT; i++)
    if (layer.activation == kActivations[i]) return static_cast<pnn_activation>(i);
  std::string names;
  for (const char* name : kActivations) names += (names.empty() ? "" : ", ") + std::string(name);
  fail(layer.op, "activation is '", layer.activation, "', it should be one of ", names);
}

void describe_masks(const Layer& layer, pnn_params* params) {
  if (layer.mask && layer.seed) fail(layer.op, "mask and seed are both given, it should be one of them");
  params->masks = layer.masks;
  params->shared_masks = layer.shared_masks;
  params->level = layer.level;
  params->noise = PNN_NOISE_NONE;
  if (layer.mask) {
    params->mask = describe(layer.op, "mask", *layer.mask, 4);
    params->masks = params->mask.size[1];
    params->noise = PNN_NOISE_TENSOR;
    return;
  }
  const pnn_noise kind = noise_kind(layer.op, layer.noise);
  if (layer.seed) {
    params->seed = seed_value(layer.op, *layer.seed);
    params->noise = kind;
  }
}

}  // namespace

bool pnn_dtype_of(int32_t dtype, pnn_dtype* result) {
  if (dtype == aoti_torch_dtype_float32())
    *result = PNN_FLOAT32;
  else if (dtype == aoti_torch_dtype_float64())
    *result = PNN_FLOAT64;
  else if (dtype == aoti_torch_dtype_bfloat16())
    *result = PNN_BFLOAT16;
  else if (dtype == aoti_torch_dtype_float16())
    *result = PNN_FLOAT16;
  else
    return false;
  return true;
}

std::string dtype_name(int32_t dtype) {
  const struct {
    int32_t dtype;
    const char* name;
  } names[] = {
      {aoti_torch_dtype_float32(), "float32"},
      {aoti_torch_dtype_float64(), "float64"},
      {aoti_torch_dtype_bfloat16(), "bfloat16"},
      {aoti_torch_dtype_float16(), "float16"},
      {aoti_torch_dtype_bool(), "bool"},
      {aoti_torch_dtype_uint8(), "uint8"},
      {aoti_torch_dtype_int8(), "int8"},
      {aoti_torch_dtype_int16(), "int16"},
      {aoti_torch_dtype_int32(), "int32"},
      {aoti_torch_dtype_int64(), "int64"},
      {aoti_torch_dtype_complex32(), "complex32"},
      {aoti_torch_dtype_complex64(), "complex64"},
      {aoti_torch_dtype_complex128(), "complex128"},
  };
  for (const auto& entry : names)
    if (entry.dtype == dtype) return entry.name;
  // The shim has no function for the rest. Their numbers are part of every saved file, so they stay as they are.
  std::string name = torch::headeronly::toString(static_cast<torch::headeronly::ScalarType>(dtype));
  for (char& letter : name) letter = static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
  return name == "unknown_scalar" ? "unknown" : name;
}

int32_t dtype_of(const Tensor& tensor) {
  int32_t dtype = 0;
  require(aoti_torch_get_dtype(tensor.get(), &dtype), "operator", "a tensor's type");
  return dtype;
}

int32_t statistics_dtype(const Tensor& input) {
  return dtype_of(input) == aoti_torch_dtype_float64() ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

pnn_tensor describe(const char* op, const char* name, const Tensor& tensor, size_t dimensions) {
  check_dense_here(op, name, tensor);
  pnn_tensor view = {};
  const int32_t dtype = dtype_of(tensor);
  if (!pnn_dtype_of(dtype, &view.dtype)) {
    constexpr const char* wanted = "it should be float32, float64, bfloat16 or float16";
    const std::string found = dtype_name(dtype);
    if (found.rfind("qint", 0) == 0 || found.rfind("quint", 0) == 0)
      fail(op, name, " is quantized (", found, "), ", wanted, ": call dequantize() on it");
    fail(op, name, " has type ", found, ", ", wanted);
  }
  const Numbers sizes = tensor.sizes();
  if (sizes.size() != dimensions)
    fail(op, name, " has size ", size_text(sizes), ", it should have ", dimensions,
         dimensions == 1 ? " dimension" : " dimensions");
  const Numbers strides = tensor.strides();
  for (size_t d = 0; d < 4; d++) {
    view.size[d] = d < dimensions ? sizes[d] : 1;
    view.stride[d] = d < dimensions ? strides[d] : 1;
  }
  const void* data = nullptr;
  require(torch_get_const_data_ptr(tensor.get(), &data), op, "where a tensor's data lie");
  view.data = data ? const_cast<void*>(data) : &no_elements;
  return view;
}

const int64_t* seed_value(const char* op, const Tensor& seed) {
  check_dense_here(op, "seed", seed);
  const int32_t dtype = dtype_of(seed);
  if (dtype != aoti_torch_dtype_int64() || seed.numel() != 1)
    fail(op, "seed is ", dtype_name(dtype), " of size ", size_text(seed.sizes()), ", it should be one int64");
  const void* data = nullptr;
  require(torch_get_const_data_ptr(seed.get(), &data), op, "where the seed lies");
  return static_cast<const int64_t*>(data);
}

pnn_noise noise_kind(const char* op, const std::string& name) {
  for (const auto& entry : kNoises)
    if (name == entry.name) return entry.kind;
  fail(op, "noise is '", name, "', it should be one of uniform, normal, waves");
}

// Whether TORCH_PNN_EXACT asks for bfloat16 with the same bits on every instruction set; read once.
static bool exact_wanted() {
  static const bool wanted = [] {
    const char* value = std::getenv("TORCH_PNN_EXACT");
    return value != nullptr && *value != '\0' && std::strcmp(value, "0") != 0;
  }();
  return wanted;
}

pnn_params make_params(const Layer& layer) {
  pnn_params params;
  pnn_params_init(&params);
  params.exact = exact_wanted();
  params.allow_tf32 = torch_pnn_tf32_allowed();
  params.allow_wgmma = torch_pnn_wgmma_allowed();
  params.input = describe(layer.op, "input", layer.input, 4);
  params.weight = describe(layer.op, "weight", layer.weight, 4);
  describe_optional(layer, "bias", layer.bias, 1, &params.bias);
  describe_masks(layer, &params);
  params.activation = activation_kind(layer);
  if (layer.stride.empty() || layer.stride.size() > 2)
    fail(layer.op, "stride has ", layer.stride.size(), " values, it should have one or two");
  params.stride[0] = layer.stride.front();
  params.stride[1] = layer.stride.back();
  params.groups = layer.groups;
  if (layer.norm) {
    params.norm = 1;
    params.norm_training = layer.training;
    params.norm_eps = layer.eps;
    const bool running = !layer.training && !layer.grad_output;
    if (running && !(layer.mean && layer.variance))
      fail(layer.op, layer.mean ? "running_var" : "running_mean",
           " is None, it should be given when training is False");
    describe_optional(layer, "norm_weight", layer.norm_weight, 1, &params.norm_weight);
    describe_optional(layer, "norm_bias", layer.norm_bias, 1, &params.norm_bias);
    describe_optional(layer, running ? "running_mean" : "mean", layer.mean, 1, &params.mean);
    describe_optional(layer, running ? "running_var" : "variance", layer.variance, 1, &params.variance);
  }
  describe_optional(layer, "grad_output", layer.grad_output, 4, &params.grad_output);
  return params;
}

Shape output_sizes(const Layer& layer) {
  const Numbers input = layer.input.sizes();
  Shape sizes = {input[0], layer.weight.sizes()[0], 0, 0};
  for (size_t d = 0; d < 2; d++) {
    const int64_t stride = d == 0 ? layer.stride.front() : layer.stride.back();
    if (stride >= 1 && input[2 + d] > 0) sizes[2 + d] = (input[2 + d] - 1) / stride + 1;
  }
  return sizes;
}

// Products wrap where they overflow: libpnn then refuses the sizes, and `allocate` does so where it is not asked.
static int64_t multiply(int64_t a, int64_t b) {
  return static_cast<int64_t>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
}

Shape contiguous_strides(const Shape& sizes) {
  Shape strides = sizes;
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    step = multiply(step, sizes[d] > 0 ? sizes[d] : 1);
  }
  return strides;
}

Shape strides_like(const Tensor& like, const Shape& sizes) {
  const Numbers size = like.sizes();
  const Numbers stride = like.strides();
  bool channels_last = stride[1] != 0;
  int64_t step = 0;
  for (const size_t d : {1, 3, 2, 0}) {
    channels_last = channels_last && size[d] != 0 && stride[d] >= step && !(d == 0 && step == stride[1]);
    if (!channels_last) return contiguous_strides(sizes);
    step = multiply(stride[d], size[d]);
  }
  return {multiply(multiply(sizes[1], sizes[3]), sizes[2]), 1, multiply(sizes[1], sizes[3]), sizes[1]};
}

Tensor allocate(const char* op, const Shape& sizes, const Shape& strides, int32_t dtype) {
  int64_t bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
  for (const int64_t size : sizes)
    if (__builtin_mul_overflow(bytes, size, &bytes))
      fail(op, "a result of size ", size_text(sizes.numbers()), " exceeds what can be addressed");
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype,
                               Backend::device_type(), Backend::device_index(), &handle) != 0)
    fail(op, "out of memory: PyTorch's allocator has no ", bytes, " bytes for a tensor of size ",
         size_text(sizes.numbers()));
  return Tensor(handle);
}

void* data_of(const char* op, const Tensor& result) {
  void* data = nullptr;
  require(torch_get_mutable_data_ptr(result.get(), &data), op, "where a result lies");
  return data;
}

void check(const char* op, pnn_status status, const pnn_error& error, bool running_statistics) {
  if (status == PNN_OK) return;
  // libpnn's names for arguments that the operators call otherwise; and it speaks of a vector's four sizes.
  const struct {
    const char *libpnn, *schema;
    bool vector;
  } names[] = {{"mean ", running_statistics ? "running_mean " : "mean ", true},
               {"variance ", running_statistics ? "running_var " : "variance ", true},
               {"norm_eps ", "eps ", false},
               {"bias ", "bias ", true},
               {"norm_weight ", "norm_weight ", true},
               {"norm_bias ", "norm_bias ", true}};
  std::string message = error.message;
  for (const auto& name : names) {
    if (message.rfind(name.libpnn, 0) != 0) continue;
    message.replace(0, std::strlen(name.libpnn), name.schema);
    constexpr const char* ones = ", 1, 1, 1]";
    for (size_t at = 0; name.vector && (at = message.find(ones, at)) != std::string::npos;)
      message.replace(at, std::strlen(ones), "]");
    break;
  }
  fail(op, message);
}

Results::Result& Results::add(pnn_tensor* place, const Shape& sizes, const Shape& strides, int32_t dtype) {
  return results_[count_++].emplace(Result{place, sizes, strides, dtype, std::nullopt});
}

size_t Results::plan(pnn_tensor* place, const Shape& sizes, const Shape& strides, int32_t dtype) {
  *place = {};
  place->data = planned_address(count_);
  pnn_dtype_of(dtype, &place->dtype);
  for (size_t d = 0; d < 4; d++) {
    place->size[d] = d < sizes.size() ? sizes[d] : 1;
    place->stride[d] = d < sizes.size() ? strides[d] : 1;
  }
  add(place, sizes, strides, dtype);
  return count_ - 1;
}

size_t Results::skip(int32_t dtype) {
  add(nullptr, {0}, {1}, dtype);
  return count_ - 1;
}

void Results::run(pnn_pass pass) {
  const bool running = params_.norm && !params_.norm_training && pass == PNN_PASS_FORWARD;
  pnn_error error;
  size_t bytes = 0;
  check(op_, Backend::workspace_size(&params_, pass, &bytes, &error), error, running);
  for (size_t i = 0; i < count_; i++) {
    Result& result = *results_[i];
    result.tensor = allocate(op_, result.sizes, result.strides, result.dtype);
    if (!result.place) continue;
    void* const data = data_of(op_, *result.tensor);
    result.place->data = data ? data : &no_elements;
  }
  params_.workspace_bytes = bytes;
  if (Backend::kStackWorkspace > 0 && bytes <= Backend::kStackWorkspace) {
    alignas(64) char workspace[Backend::kStackWorkspace > 0 ? Backend::kStackWorkspace : 1];
    params_.workspace = workspace;
    check(op_, Backend::run(&params_, pass, &error), error, running);
    return;
  }
  const Tensor workspace = allocate(op_, {static_cast<int64_t>(bytes)}, {1}, aoti_torch_dtype_uint8());
  params_.workspace = data_of(op_, workspace);
  check(op_, Backend::run(&params_, pass, &error), error, running);
}

}  // namespace torch_pnn
