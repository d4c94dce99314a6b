// isa_hashes.h - many results of the library, each as a hash of its bits, for comparison between instruction sets,
// machines and compilers. Without GoogleTest, so that it builds for an emulated machine as well.
#ifndef PNN_TESTS_ISA_HASHES_H
#define PNN_TESTS_ISA_HASHES_H

#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "pnn/pnn.h"
#include "tensor.h"

namespace pnn_test {

// FNV-1a over the elements' bits.
inline uint64_t hash_bits(uint64_t hash, const std::vector<uint64_t> &values) {
  for (uint64_t v : values) {
    for (int byte = 0; byte < 8; byte++) hash = (hash ^ ((v >> (8 * byte)) & 255)) * 0x100000001b3u;
  }
  return hash;
}
constexpr uint64_t kHashStart = 0xcbf29ce484222325u;

struct IsaCase {
  const char *name;
  int64_t B, C, H, W, T, M, groups, stride;
  pnn_noise noise;
  bool shared;
  bool norm, training;
  LayoutKind layout;
};

inline const std::vector<IsaCase> &isa_cases() {
  static const std::vector<IsaCase> list = {
      {"plain", 2, 7, 9, 13, 11, 1, 1, 1, PNN_NOISE_UNIFORM, false, false, false, LayoutKind::kContiguous},
      {"wide", 1, 33, 1, 517, 17, 1, 1, 1, PNN_NOISE_NORMAL, false, false, false, LayoutKind::kContiguous},
      {"deep", 1, 300, 3, 7, 5, 4, 1, 1, PNN_NOISE_WAVES, false, false, false, LayoutKind::kContiguous},
      {"small images", 37, 6, 3, 3, 7, 2, 1, 1, PNN_NOISE_UNIFORM, true, false, false, LayoutKind::kContiguous},
      {"strided groups", 3, 12, 11, 15, 18, 3, 3, 2, PNN_NOISE_TENSOR, false, false, false, LayoutKind::kContiguous},
      {"shared mask", 3, 12, 11, 15, 18, 3, 3, 1, PNN_NOISE_TENSOR, true, false, false, LayoutKind::kSliced},
      {"channels last", 2, 19, 6, 10, 21, 1, 1, 1, PNN_NOISE_UNIFORM, false, false, false, LayoutKind::kChannelsLast},
      {"channels last, few", 2, 4, 6, 10, 3, 1, 1, 1, PNN_NOISE_UNIFORM, false, false, false,
       LayoutKind::kChannelsLast},
      {"channels last, many", 2, 70, 5, 7, 37, 1, 1, 1, PNN_NOISE_UNIFORM, false, false, false,
       LayoutKind::kChannelsLast},
      {"many stored masks", 2, 64, 8, 8, 5, 16, 1, 1, PNN_NOISE_TENSOR, false, false, false, LayoutKind::kContiguous},
      {"many chunks", 5, 6, 23, 29, 5, 2, 1, 1, PNN_NOISE_UNIFORM, false, false, false, LayoutKind::kContiguous},
      {"many chunks, channels last", 3, 12, 23, 29, 9, 1, 1, 1, PNN_NOISE_UNIFORM, false, false, false,
       LayoutKind::kChannelsLast},
      {"no noise", 2, 8, 5, 5, 8, 1, 1, 1, PNN_NOISE_NONE, false, false, false, LayoutKind::kPrime},
      {"norm training", 3, 10, 9, 21, 6, 2, 1, 1, PNN_NOISE_UNIFORM, false, true, true, LayoutKind::kContiguous},
      {"norm training last", 3, 10, 9, 21, 6, 2, 1, 2, PNN_NOISE_TENSOR, false, true, true, LayoutKind::kChannelsLast},
      {"norm training, rows", 3, 19, 9, 21, 18, 1, 1, 1, PNN_NOISE_UNIFORM, false, true, true,
       LayoutKind::kChannelsLast},
      {"norm evaluation", 2, 9, 7, 9, 12, 1, 3, 1, PNN_NOISE_NORMAL, false, true, false, LayoutKind::kNegative},
  };
  return list;
}

// Runs forward and backward; the hash covers every output and the status.
inline uint64_t isa_hash(const IsaCase &c, pnn_dtype type, pnn_activation activation) {
  Random random(static_cast<uint64_t>(c.C * 1009 + activation));
  const auto make = [&](pnn_dtype of, std::vector<int64_t> size, LayoutKind layout, double scale, double offset = 0) {
    Tensor t(of, std::move(size), layout, random, Placement::kZones, Poison::kNan, random.integer(0, 15));
    t.fill([&] { return offset + scale * random.uniform(); });
    return t;
  };
  const auto tensor = [&](std::vector<int64_t> size, LayoutKind layout, double scale) {
    return make(type, std::move(size), layout, scale);
  };
  const pnn_dtype statistics = type == PNN_FLOAT64 ? PNN_FLOAT64 : PNN_FLOAT32;
  const LayoutKind plain = LayoutKind::kContiguous;
  const int64_t out_h = (c.H - 1) / c.stride + 1;
  const int64_t out_w = (c.W - 1) / c.stride + 1;
  const int64_t K = c.C * c.M;
  Tensor input = tensor({c.B, c.C, c.H, c.W}, c.layout, 3);
  Tensor weight = tensor({c.T, K / c.groups}, plain, 1);
  Tensor bias = tensor({c.T}, plain, 1);
  Tensor mask = tensor({c.shared ? 1 : c.C, c.M, c.H, c.W}, c.layout, 1);
  Tensor gamma = make(statistics, {K}, plain, 2);
  Tensor beta = make(statistics, {K}, plain, 1);
  Tensor mean = make(statistics, {K}, plain, 0.5);
  Tensor variance = make(statistics, {K}, plain, 0.5, 1);
  Tensor output = tensor({c.B, c.T, out_h, out_w}, c.layout, 0);
  Tensor grad_output = tensor({c.B, c.T, out_h, out_w}, c.layout, 1);
  Tensor grad_input = tensor({c.B, c.C, c.H, c.W}, c.layout, 0);
  Tensor grad_weight = tensor({c.T, K / c.groups}, plain, 0);
  Tensor grad_bias = tensor({c.T}, plain, 0);
  Tensor grad_mask = tensor({c.shared ? 1 : c.C, c.M, c.H, c.W}, c.layout, 0);
  Tensor grad_gamma = make(statistics, {K}, plain, 0);
  Tensor grad_beta = make(statistics, {K}, plain, 0);

  pnn_params p;
  pnn_params_init(&p);
  const int64_t seed = 0x1234567890abcdef;
  p.input = input.view();
  p.weight = weight.view();
  p.bias = bias.view();
  p.noise = c.noise;
  p.masks = c.M;
  if (c.noise == PNN_NOISE_TENSOR) {
    p.mask = mask.view();
    p.grad_mask = grad_mask.view();
  } else if (c.noise != PNN_NOISE_NONE) {
    p.seed = &seed;
    p.shared_masks = c.shared;
  }
  p.level = 0.3;
  p.activation = activation;
  p.exact = 1;
  p.stride[0] = p.stride[1] = c.stride;
  p.groups = c.groups;
  p.norm = c.norm;
  p.norm_training = c.training;
  if (c.norm) {
    p.norm_weight = gamma.view();
    p.norm_bias = beta.view();
    p.mean = mean.view();
    p.variance = variance.view();
    p.grad_norm_weight = grad_gamma.view();
    p.grad_norm_bias = grad_beta.view();
  }
  p.output = output.view();
  p.grad_output = grad_output.view();
  p.grad_input = grad_input.view();
  p.grad_weight = grad_weight.view();
  p.grad_bias = grad_bias.view();

  uint64_t hash = kHashStart;
  for (pnn_pass pass : {PNN_PASS_FORWARD, PNN_PASS_BACKWARD}) {
    size_t bytes = 0;
    pnn_status status = pnn_workspace_size(&p, pass, nullptr, &bytes, nullptr);
    std::vector<unsigned char> workspace(bytes + 1);
    p.workspace = workspace.data();
    p.workspace_bytes = bytes;
    if (status == PNN_OK)
      status = pass == PNN_PASS_FORWARD ? pnn_forward(&p, nullptr, nullptr) : pnn_backward(&p, nullptr, nullptr);
    hash = hash_bits(hash, {static_cast<uint64_t>(status)});
  }
  for (const Tensor *t : {&output, &mean, &variance, &grad_input, &grad_weight, &grad_bias})
    hash = hash_bits(hash, t->bits());
  if (c.noise == PNN_NOISE_TENSOR) hash = hash_bits(hash, grad_mask.bits());
  if (c.norm) hash = hash_bits(hash_bits(hash, grad_gamma.bits()), grad_beta.bits());
  return hash;
}

// Name and hash of each result; bfloat16 in its exact form, which alone promises these bits.
inline std::vector<std::pair<std::string, uint64_t>> isa_hashes() {
  std::vector<std::pair<std::string, uint64_t>> result;
  for (pnn_dtype type : {PNN_FLOAT32, PNN_FLOAT64, PNN_BFLOAT16, PNN_FLOAT16}) {
    for (int activation = 0; activation < PNN_ACTIVATION_COUNT; activation++) {
      for (const IsaCase &c : isa_cases()) {
        // Every case with ReLU, and every activation on the first, in channels-last, and on normalised ones.
        const bool chosen = activation == PNN_ACTIVATION_RELU || &c == &isa_cases().front() || c.training ||
                            c.layout == LayoutKind::kChannelsLast;
        if (!chosen) continue;
        const std::string name =
            std::string(name_of(type)) + " activation " + std::to_string(activation) + " " + c.name;
        result.emplace_back(name, isa_hash(c, type, static_cast<pnn_activation>(activation)));
      }
    }
  }
  for (pnn_noise noise : {PNN_NOISE_UNIFORM, PNN_NOISE_NORMAL, PNN_NOISE_WAVES}) {
    for (pnn_dtype type : {PNN_FLOAT32, PNN_FLOAT64, PNN_BFLOAT16, PNN_FLOAT16}) {
      Random random(3);
      Tensor mask(type, {5, 7, 11, 37}, LayoutKind::kContiguous, random, Placement::kZones, Poison::kNan, 3);
      const int64_t seed = 77;
      const pnn_status status = pnn_mask_fill(&mask.view(), noise, 0, &seed, nullptr, nullptr);
      const uint64_t hash = hash_bits(hash_bits(kHashStart, {static_cast<uint64_t>(status)}), mask.bits());
      result.emplace_back("mask " + std::to_string(noise) + " " + name_of(type), hash);
    }
  }
  return result;
}

// "isa <name>", then a line for each result.
inline void print_isa_hashes(std::FILE *file) {
  std::fprintf(file, "isa %s\n", pnn_isa_name());
  for (const auto &entry : isa_hashes()) {
    std::fprintf(file, "%016llx %s\n", static_cast<unsigned long long>(entry.second), entry.first.c_str());
  }
}

}  // namespace pnn_test

#endif
