// program.cpp - the operators from C++: functions of tensors, a module of one's own that trains, autocast, threads and
// refused calls. Values are compared with what Python computed, to the bit.
//
//     program DATA
//     without MODEL      the same program, linked without the operators: what it says on a call, and of a scripted
//     model
//
// DATA is a dictionary of tensors; each function below says which it reads.
#include <ATen/autocast_mode.h>
#include <torch/nn.h>
#include <torch/optim.h>
#include <torch/script.h>
#include <torch/serialize.h>
#include <torch_pnn/torch_pnn.h>

#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <thread>

namespace {

using Data = c10::Dict<std::string, at::Tensor>;

int failures = 0;

void expect(bool holds, const std::string& what) {
  std::cout << (holds ? "ok    " : "WRONG ") << what << std::endl;
  if (!holds) failures++;
}

bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor x = a.detach().contiguous(), y = b.detach().contiguous();
  return x.sizes() == y.sizes() && x.scalar_type() == y.scalar_type() &&
         std::memcmp(x.const_data_ptr(), y.const_data_ptr(), x.nbytes()) == 0;
}

Data read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  Data result;
  for (const auto& entry : torch::pickle_load(bytes).toGenericDict())
    result.insert(entry.key().toStringRef(), entry.value().toTensor());
  return result;
}

// ---- functions: input, weight, bias, mask -> by_seed, by_mask, plain, image, written; gradients of by_seed ----

void functions(const Data& data) {
  const at::Tensor input = data.at("input").clone().requires_grad_(), bias = data.at("bias");
  const at::Tensor weight = data.at("weight").clone().requires_grad_();
  torch_pnn::PerturbOptions by_seed;
  by_seed.seed = torch_pnn::make_seed(18446744073709551613u);
  by_seed.masks = 2;
  by_seed.noise = "waves";
  by_seed.level = 0.5;
  by_seed.activation = "silu";
  by_seed.stride = {1, 2};
  const at::Tensor y = torch_pnn::perturb_conv2d(input, weight, bias, by_seed);
  expect(same_bits(y, data.at("by_seed")), "a layer by seed");
  y.square().sum().backward();
  expect(same_bits(input.grad(), data.at("by_seed.input")), "the input's gradient");
  expect(same_bits(weight.grad(), data.at("by_seed.weight")), "the weight's gradient");

  torch_pnn::PerturbOptions by_mask;
  by_mask.mask = data.at("mask");
  expect(same_bits(torch_pnn::perturb_conv2d(input, weight, bias, by_mask), data.at("by_mask")), "a layer by mask");
  torch_pnn::PerturbOptions plain;
  plain.noise = std::nullopt;
  plain.masks = 2;
  expect(same_bits(torch_pnn::perturb_conv2d(input, weight, {}, plain), data.at("plain")), "one without perturbation");
  expect(same_bits(torch_pnn::perturb_conv2d(input[0], weight, bias, by_seed), data.at("image")), "one image");
  const at::Tensor last = input.detach().contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor z = torch_pnn::perturb_conv2d(last, weight, bias, by_seed);
  expect(z.is_contiguous(at::MemoryFormat::ChannelsLast) && same_bits(z, y), "channels_last stays");
  expect(same_bits(torch_pnn::perturbation_mask(*by_seed.seed, 3, 2, 5, 4, true, "normal", at::kDouble),
                   data.at("written")),
         "a seed's masks");

  c10::InferenceMode inference;
  std::vector<at::Tensor> results(4);
  std::vector<std::thread> threads;
  for (at::Tensor& result : results)
    threads.emplace_back([&] {
      const c10::InferenceMode inner;
      result = torch_pnn::perturb_conv2d(data.at("input"), data.at("weight"), bias, by_seed);
    });
  for (std::thread& thread : threads) thread.join();
  bool same = true;
  for (const at::Tensor& result : results) same = same && same_bits(result, data.at("by_seed"));
  expect(same, "four threads at once, in inference mode");
}

void autocast(const Data& data) {
  torch_pnn::PerturbOptions options;
  options.seed = torch_pnn::make_seed(5);
  options.masks = 2;
  at::autocast::set_autocast_enabled(at::kCPU, true);
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  const at::Tensor y = torch_pnn::perturb_conv2d(data.at("input"), data.at("weight"), data.at("bias"), options);
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
  expect(same_bits(y, data.at("autocast")), "under autocast");
}

// ---- a module of one's own: train.input, train.target, train.weight, train.bias -> after.* ----

struct Layer : torch::nn::Module {
  torch_pnn::PerturbOptions options;
  torch_pnn::PerturbNorm norm;
  at::Tensor weight, bias;

  Layer(const at::Tensor& weight_, const at::Tensor& bias_, int64_t maps) {
    options.seed = register_buffer("mask_seed", torch_pnn::make_seed(7));
    options.masks = 2;
    options.level = 0.1;
    weight = register_parameter("weight", weight_.clone());
    bias = register_parameter("bias", bias_.clone());
    norm.weight = register_parameter("norm_weight", at::ones(maps));
    norm.bias = register_parameter("norm_bias", at::zeros(maps));
    norm.running_mean = register_buffer("running_mean", at::zeros(maps));
    norm.running_var = register_buffer("running_var", at::ones(maps));
  }

  at::Tensor forward(const at::Tensor& x) {
    return torch_pnn::perturb_norm_conv2d(x, weight, bias, norm, is_training(), options);
  }
};

void train(const Data& data) {
  const at::Tensor input = data.at("train.input"), target = data.at("train.target");
  Layer layer(data.at("train.weight"), data.at("train.bias"), 2 * input.size(1));
  torch::optim::SGD optimiser(layer.parameters(), torch::optim::SGDOptions(0.1));
  double first = 0, last = 0;
  for (int step = 0; step < 5; step++) {
    optimiser.zero_grad();
    const at::Tensor loss = at::mse_loss(layer.forward(input), target);
    loss.backward();
    optimiser.step();
    (step == 0 ? first : last) = loss.item<double>();
  }
  expect(last < first, "the loss falls");
  for (const auto& entry : layer.named_parameters())
    expect(same_bits(entry.value(), data.at("after." + entry.key())), "after five steps: " + entry.key());
  for (const char* name : {"running_mean", "running_var"})
    expect(same_bits(layer.named_buffers()[name], data.at("after." + std::string(name))), name);
  layer.eval();
  const at::NoGradGuard guard;
  expect(same_bits(layer.forward(input), data.at("after.output")), "in evaluation");
}

// ---- refused calls, printed for Python to compare ----

template <typename Call>
void refused(const Call& call) {
  try {
    call();
    expect(false, "a wrong call is refused");
  } catch (const c10::Error& error) {
    std::cout << "refused: " << error.what_without_backtrace() << std::endl;
  } catch (const std::exception& error) {
    std::cout << "refused: " << error.what() << std::endl;
  }
}

void refusals() {
  const at::Tensor x = at::zeros({1, 3, 4, 4}), weight = at::zeros({2, 3, 1, 1});
  torch_pnn::PerturbOptions options;
  refused([&] { torch_pnn::perturb_conv2d(x, weight, {}, options); });
  options.seed = torch_pnn::make_seed(1);
  refused([&] { torch_pnn::perturb_conv2d(x.to(at::kLong), weight, {}, options); });
  refused([&] { torch_pnn::perturb_conv2d(x.to_sparse(), weight, {}, options); });
  refused([&] { torch_pnn::perturb_conv2d(x, weight.slice(1, 0, 2), {}, options); });
  refused([&] { torch_pnn::perturb_norm_conv2d(x, weight, {}, {}, false, options); });
  options.noise = "pink";
  refused([&] { torch_pnn::perturb_conv2d(x, weight, {}, options); });
}

int without(const char* model) {
  expect(!torch_pnn::has_derivatives(), "no derivatives are loaded");
  refused([] { torch_pnn::perturb_conv2d(at::zeros({1, 1, 1, 1}), at::zeros({1, 1, 1, 1})); });
  refused([&] { torch::jit::load(model); });
  return failures == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 2) {
    std::cerr << "usage: program DATA, or without MODEL" << std::endl;
    return 2;
  }
  if (std::string_view(argv[0]).find("without") != std::string_view::npos) return without(argv[1]);
  expect(torch_pnn::has_derivatives(), "derivatives are loaded");
  TORCH_CHECK(!torch_pnn::tf32_allowed(), "TF32 is allowed, it should not be until it is asked for");
  torch_pnn::allow_tf32(true);
  TORCH_CHECK(torch_pnn::tf32_allowed(), "TF32 is not allowed, it should be");
  torch_pnn::allow_tf32(false);
  TORCH_CHECK(torch_pnn::wgmma_allowed(), "wgmma is not allowed, it should be until it is forbidden");
  torch_pnn::allow_wgmma(false);
  TORCH_CHECK(!torch_pnn::wgmma_allowed(), "wgmma is allowed, it should not be");
  torch_pnn::allow_wgmma(true);
  std::cout << "libpnn " << torch_pnn::library_version() << " on " << torch_pnn::isa_name() << std::endl;
  const Data data = read(argv[1]);
  functions(data);
  autocast(data);
  train(data);
  refusals();
  return failures == 0 ? 0 : 1;
} catch (const std::exception& error) {
  std::cerr << error.what() << std::endl;
  return 3;
}
