// program.cpp - loads a scripted model and what Python computed with it, and compares bits: in evaluation, inside a
// parallel region of PyTorch's, in a forked child, and over a few steps of training. No Python is in the process.
//
//     program MODEL DATA
//
// DATA is a dictionary of tensors: input, expected (the output in evaluation), forked (whether to fork: PyTorch's own
// convolutions wait for ever for their threads in a child), rate (of plain gradient descent), steps, input_gradient (of
// the first step), and one parameter.<name> for each parameter after the last step.
#include <ATen/Parallel.h>
#include <dlfcn.h>
#include <sys/wait.h>
#include <torch/script.h>
#include <torch/serialize.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>

namespace {

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

c10::Dict<std::string, at::Tensor> read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  c10::Dict<std::string, at::Tensor> result;
  for (const auto& entry : torch::pickle_load(bytes).toGenericDict())
    result.insert(entry.key().toStringRef(), entry.value().toTensor());
  return result;
}

bool python_is_loaded() {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);)
    if (line.find("libpython") != std::string::npos) return true;
  return dlsym(RTLD_DEFAULT, "Py_IsInitialized") != nullptr;
}

std::string ask(const char* op) {
  torch::jit::Stack stack;
  c10::Dispatcher::singleton().findSchemaOrThrow(op, "").callBoxed(stack);
  return stack.at(0).toStringRef();
}

void evaluate(torch::jit::Module model, const at::Tensor& input, const at::Tensor& expected, bool forked) {
  model.eval();
  const c10::InferenceMode inference;
  const auto run = [&] { return same_bits(model.forward({input}).toTensor(), expected); };
  expect(run() && run(), "the output has the bits that Python computed");

  std::atomic<int> right{0};
  at::parallel_for(0, 4, 1, [&](int64_t begin, int64_t end) {
    const c10::InferenceMode inner;
    for (int64_t i = begin; i < end; i++) right += same_bits(model.forward({input}).toTensor(), expected);
  });
  expect(right == 4, "inside a parallel region too");

  if (!forked) return;
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);  // a child that hangs ends by this signal
    _exit(run() ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "in a forked child too");
}

void train(torch::jit::Module model, const c10::Dict<std::string, at::Tensor>& data) {
  model.train();
  const double rate = data.at("rate").item<double>();
  const int64_t steps = data.at("steps").item<int64_t>();
  bool changed = true;
  for (int64_t step = 0; step < steps; step++) {
    const at::Tensor input = data.at("input").clone().requires_grad_();
    model.forward({input}).toTensor().square().mean().backward();
    expect(input.grad().defined() && input.grad().abs().sum().item<double>() > 0, "the input has a gradient");
    if (step == 0) expect(same_bits(input.grad(), data.at("input_gradient")), "with the bits that Python computed");
    const at::NoGradGuard guard;
    for (at::Tensor parameter : model.parameters()) {
      changed = changed && parameter.grad().defined() && parameter.grad().abs().sum().item<double>() > 0;
      parameter.sub_(parameter.grad() * rate);
      parameter.mutable_grad() = at::Tensor();
    }
  }
  expect(changed, "every parameter has a gradient in every step");
  size_t compared = 0;
  bool equal = true;
  for (const auto& parameter : model.named_parameters()) {
    equal = equal && same_bits(parameter.value, data.at("parameter." + parameter.name));
    compared++;
  }
  expect(equal && compared > 0,
         "after " + std::to_string(steps) + " steps all parameters have the bits that Python computed");
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 3) {
    std::cerr << "usage: program MODEL DATA" << std::endl;
    return 2;
  }
  expect(!python_is_loaded(), "no Python is loaded");
  std::cout << "libpnn " << ask("torch_pnn::_library_version") << " on " << ask("torch_pnn::_isa_name") << std::endl;
  const auto data = read(argv[2]);
  evaluate(torch::jit::load(argv[1]), data.at("input"), data.at("expected"), data.at("forked").item<bool>());
  train(torch::jit::load(argv[1]), data);
  try {
    torch::jit::load(argv[1]).forward({data.at("input").slice(1, 0, 1)});
    expect(false, "a wrong input is refused");
  } catch (const std::exception& error) {
    expect(std::strstr(error.what(), "torch_pnn") != nullptr, "a wrong input is refused in our own words");
  }
  expect(!python_is_loaded(), "still no Python is loaded");
  return failures == 0 ? 0 : 1;
} catch (const std::exception& error) {
  std::cerr << error.what() << std::endl;
  return 3;
}
