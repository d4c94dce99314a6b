// program.cpp - loads an AOTInductor package and compares what it computes with what Python computed, at every size
// that it is given. No Python is in the process.
//
//     program PACKAGE DATA
//
// DATA is a dictionary of tensors: input.<n> and expected.<n> for n = 0, 1, ..., and tolerance (0 = the same bits).
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/serialize.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>

namespace {

int failures = 0;

void expect(bool holds, const std::string& what) {
  std::cout << (holds ? "ok    " : "WRONG ") << what << std::endl;
  if (!holds) failures++;
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

bool close(const at::Tensor& found, const at::Tensor& expected, double tolerance) {
  if (found.sizes() != expected.sizes() || found.scalar_type() != expected.scalar_type()) return false;
  return tolerance == 0 ? at::equal(found, expected) : at::allclose(found, expected, tolerance, tolerance);
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 3) {
    std::cerr << "usage: program PACKAGE DATA" << std::endl;
    return 2;
  }
  const c10::InferenceMode inference;
  const auto data = read(argv[2]);
  const double tolerance = data.at("tolerance").item<double>();
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  for (int n = 0; data.contains("input." + std::to_string(n)); n++) {
    const at::Tensor input = data.at("input." + std::to_string(n));
    const std::vector<at::Tensor> found = model.run({input});
    std::ostringstream size;
    size << input.sizes();
    expect(found.size() == 1 && close(found[0], data.at("expected." + std::to_string(n)), tolerance),
           "an image of " + size.str() + " gives what Python computed");
  }
  expect(!python_is_loaded(), "no Python is loaded");
  return failures == 0 ? 0 : 1;
} catch (const std::exception& error) {
  std::cerr << error.what() << std::endl;
  return 3;
}
