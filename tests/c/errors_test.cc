// errors_test.cc - every wrong call is refused with the right status and a sentence that names the argument, what it
// was and what it should be; nothing is written. Every right call at the edge of what is allowed is taken.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>

#include "case.h"

namespace pnn_test {
namespace {

constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
constexpr int64_t kMin = std::numeric_limits<int64_t>::min();

enum Pass : unsigned { kForward = 1, kBackward = 2, kBoth = 3 };

struct Mistake {
  const char *name;
  unsigned passes;
  std::function<void(Problem &)> make;
  pnn_status status;
  std::vector<std::string> words;  // that the message must hold
};

// All tensors present: a mask tensor, normalisation in evaluation, every gradient.
Case full() {
  Case c;
  c.B = 2, c.C = 4, c.H = 5, c.W = 6, c.T = 6, c.M = 3, c.groups = 2, c.stride_h = 2, c.noise = PNN_NOISE_TENSOR;
  c.norm = true, c.eps = 1e-5;
  return c;
}

// The three ways in that check a pass: the question for the workspace, and the pass itself.
void expect_refused(Problem &problem, pnn_pass pass, pnn_status status, const std::vector<std::string> &words) {
  const auto check = [&](pnn_status got, const pnn_error &error, const char *who) {
    EXPECT_EQ(got, status) << who << ": " << pnn_status_string(got) << ": " << error.message;
    EXPECT_EQ(error.status, got) << who;
    for (const std::string &word : words) {
      EXPECT_NE(std::string(error.message).find(word), std::string::npos)
          << who << ": no '" << word << "' in: " << error.message;
    }
    EXPECT_LT(strnlen(error.message, sizeof error.message), sizeof error.message);
    problem.check_memory({});
  };
  pnn_error error = {};
  size_t bytes = 12345;
  check(pnn_workspace_size(&problem.params, pass, nullptr, &bytes, &error), error, "pnn_workspace_size");
  EXPECT_EQ(bytes, 0u);
  std::vector<unsigned char> workspace(1 << 20, 0x5a);
  const pnn_params saved = problem.params;
  if (problem.params.workspace == nullptr) {
    problem.params.workspace = workspace.data();
    problem.params.workspace_bytes = workspace.size();
  }
  const auto run = pass == PNN_PASS_FORWARD ? pnn_forward : pnn_backward;
  error = {};
  check(run(&problem.params, nullptr, &error), error, "the pass");
  for (unsigned char byte : workspace) ASSERT_EQ(byte, 0x5a) << "the workspace was written";
  // The error is optional.
  EXPECT_EQ(run(&problem.params, nullptr, nullptr), status);
  EXPECT_EQ(pnn_workspace_size(&problem.params, pass, nullptr, &bytes, nullptr), status);
  problem.check_memory({});
  problem.params = saved;
}

std::vector<Mistake> mistakes() {
  std::vector<Mistake> list = {
      {"struct_size", kBoth, [](Problem &p) { p.params.struct_size = 8; }, PNN_ERROR_VERSION, {"struct_size", "8"}},
      {"struct_size 0", kBoth, [](Problem &p) { p.params.struct_size = 0; }, PNN_ERROR_VERSION, {"struct_size", "0"}},
      {"no input", kBoth, [](Problem &p) { p.params.input.data = nullptr; }, PNN_ERROR_NULL, {"input", "NULL"}},
      {"no weight", kBoth, [](Problem &p) { p.params.weight.data = nullptr; }, PNN_ERROR_NULL, {"weight", "NULL"}},
      {"no mask", kBoth, [](Problem &p) { p.params.mask.data = nullptr; }, PNN_ERROR_NULL, {"mask", "NULL"}},
      {"no seed",
       kBoth,
       [](Problem &p) {
         p.params.noise = PNN_NOISE_UNIFORM;
         p.params.grad_mask.data = nullptr;
       },
       PNN_ERROR_NULL,
       {"seed", "NULL"}},
      {"no mean", kBoth, [](Problem &p) { p.params.mean.data = nullptr; }, PNN_ERROR_NULL, {"mean", "NULL"}},
      {"no variance",
       kBoth,
       [](Problem &p) { p.params.variance.data = nullptr; },
       PNN_ERROR_NULL,
       {"variance", "NULL"}},
      {"no output", kForward, [](Problem &p) { p.params.output.data = nullptr; }, PNN_ERROR_NULL, {"output", "NULL"}},
      {"no grad_output",
       kBackward,
       [](Problem &p) { p.params.grad_output.data = nullptr; },
       PNN_ERROR_NULL,
       {"grad_output", "NULL"}},
      // Options.
      {"noise -1",
       kBoth,
       [](Problem &p) { p.params.noise = static_cast<pnn_noise>(-1); },
       PNN_ERROR_VALUE,
       {"noise", "-1"}},
      {"noise 5", kBoth, [](Problem &p) { p.params.noise = PNN_NOISE_COUNT; }, PNN_ERROR_VALUE, {"noise", "5"}},
      {"activation -1",
       kBoth,
       [](Problem &p) { p.params.activation = static_cast<pnn_activation>(-1); },
       PNN_ERROR_VALUE,
       {"activation", "-1"}},
      {"allow_tf32 2",
       kBoth,
       [](Problem &p) { p.params.allow_tf32 = 2; },
       PNN_ERROR_VALUE,
       {"allow_tf32", "2", "0 or 1"}},
      {"allow_tf32 -1", kBoth, [](Problem &p) { p.params.allow_tf32 = -1; }, PNN_ERROR_VALUE, {"allow_tf32", "-1"}},
      {"allow_wgmma 2",
       kBoth,
       [](Problem &p) { p.params.allow_wgmma = 2; },
       PNN_ERROR_VALUE,
       {"allow_wgmma", "2", "0 or 1"}},
      {"activation 10",
       kBoth,
       [](Problem &p) { p.params.activation = PNN_ACTIVATION_COUNT; },
       PNN_ERROR_VALUE,
       {"activation", "10"}},
      {"level infinite",
       kBoth,
       [](Problem &p) { p.params.level = INFINITY; },
       PNN_ERROR_VALUE,
       {"level", "inf", "finite"}},
      {"level NaN", kBoth, [](Problem &p) { p.params.level = NAN; }, PNN_ERROR_VALUE, {"level", "nan", "finite"}},
      {"stride 0", kBoth, [](Problem &p) { p.params.stride[0] = 0; }, PNN_ERROR_VALUE, {"stride[0]", "0", "1"}},
      {"stride -2", kBoth, [](Problem &p) { p.params.stride[1] = -2; }, PNN_ERROR_VALUE, {"stride[1]", "-2", "1"}},
      {"groups 0", kBoth, [](Problem &p) { p.params.groups = 0; }, PNN_ERROR_VALUE, {"groups", "0"}},
      {"groups -1", kBoth, [](Problem &p) { p.params.groups = -1; }, PNN_ERROR_VALUE, {"groups", "-1"}},
      {"groups 3", kBoth, [](Problem &p) { p.params.groups = 3; }, PNN_ERROR_VALUE, {"groups", "3", "4", "6"}},
      {"groups 4", kBoth, [](Problem &p) { p.params.groups = 4; }, PNN_ERROR_VALUE, {"groups", "4", "6"}},
      {"groups huge",
       kBoth,
       [](Problem &p) { p.params.groups = kMax; },
       PNN_ERROR_VALUE,
       {"groups", "9223372036854775807"}},
      {"masks 0", kBoth, [](Problem &p) { p.params.masks = 0; }, PNN_ERROR_VALUE, {"masks", "0", "1"}},
      {"masks -3", kBoth, [](Problem &p) { p.params.masks = -3; }, PNN_ERROR_VALUE, {"masks", "-3", "1"}},
      {"masks huge",
       kBoth,
       [](Problem &p) { p.params.masks = kMax; },
       PNN_ERROR_OVERFLOW,
       {"masks", "9223372036854775807"}},
      {"eps negative", kBoth, [](Problem &p) { p.params.norm_eps = -1e-5; }, PNN_ERROR_VALUE, {"norm_eps", "-1e-05"}},
      {"eps NaN", kBoth, [](Problem &p) { p.params.norm_eps = NAN; }, PNN_ERROR_VALUE, {"norm_eps", "nan"}},
      {"eps infinite", kBoth, [](Problem &p) { p.params.norm_eps = INFINITY; }, PNN_ERROR_VALUE, {"norm_eps", "inf"}},
      // Shapes.
      {"masks not the weight's", kBoth, [](Problem &p) { p.params.masks = 2; }, PNN_ERROR_SHAPE, {"weight", "6", "4"}},
      {"weight's columns",
       kBoth,
       [](Problem &p) { p.params.weight.size[1] = 5; },
       PNN_ERROR_SHAPE,
       {"weight", "5", "6"}},
      {"weight of four dimensions",
       kBoth,
       [](Problem &p) { p.params.weight.size[2] = 3, p.params.weight.stride[2] = 0; },
       PNN_ERROR_SHAPE,
       {"weight", "3", "1"}},
      {"mask's channels", kBoth, [](Problem &p) { p.params.mask.size[0] = 3; }, PNN_ERROR_SHAPE, {"mask", "3", "4"}},
      {"mask's M", kBoth, [](Problem &p) { p.params.mask.size[1] = 2; }, PNN_ERROR_SHAPE, {"mask", "2", "3"}},
      {"mask's height", kBoth, [](Problem &p) { p.params.mask.size[2] = 4; }, PNN_ERROR_SHAPE, {"mask", "4", "5"}},
      {"mask's width", kBoth, [](Problem &p) { p.params.mask.size[3] = 7; }, PNN_ERROR_SHAPE, {"mask", "7", "6"}},
      {"mask of one pixel",
       kBoth,
       [](Problem &p) { p.params.mask.size[2] = p.params.mask.size[3] = 1; },
       PNN_ERROR_SHAPE,
       {"mask", "1", "5"}},
      {"bias", kForward, [](Problem &p) { p.params.bias.size[0] = 5; }, PNN_ERROR_SHAPE, {"bias", "5", "6"}},
      {"output's batch",
       kForward,
       [](Problem &p) { p.params.output.size[0] = 1; },
       PNN_ERROR_SHAPE,
       {"output", "1", "2"}},
      {"output's channels",
       kForward,
       [](Problem &p) { p.params.output.size[1] = 4; },
       PNN_ERROR_SHAPE,
       {"output", "4", "6"}},
      {"output's height",
       kForward,
       [](Problem &p) { p.params.output.size[2] = 5; },
       PNN_ERROR_SHAPE,
       {"output", "5", "3"}},
      {"output's width",
       kForward,
       [](Problem &p) { p.params.output.size[3] = 5; },
       PNN_ERROR_SHAPE,
       {"output", "5", "6"}},
      {"grad_output's height",
       kBackward,
       [](Problem &p) { p.params.grad_output.size[2] = 2; },
       PNN_ERROR_SHAPE,
       {"grad_output", "2", "3"}},
      {"grad_input",
       kBackward,
       [](Problem &p) { p.params.grad_input.size[3] = 5; },
       PNN_ERROR_SHAPE,
       {"grad_input", "5", "6"}},
      {"grad_weight",
       kBackward,
       [](Problem &p) { p.params.grad_weight.size[0] = 5; },
       PNN_ERROR_SHAPE,
       {"grad_weight", "5", "6"}},
      {"grad_bias",
       kBackward,
       [](Problem &p) { p.params.grad_bias.size[0] = 7; },
       PNN_ERROR_SHAPE,
       {"grad_bias", "7", "6"}},
      {"grad_mask",
       kBackward,
       [](Problem &p) { p.params.grad_mask.size[0] = 1; },
       PNN_ERROR_SHAPE,
       {"grad_mask", "1", "4"}},
      {"norm_weight",
       kBoth,
       [](Problem &p) { p.params.norm_weight.size[0] = 4; },
       PNN_ERROR_SHAPE,
       {"norm_weight", "4", "12"}},
      {"norm_bias",
       kBoth,
       [](Problem &p) { p.params.norm_bias.size[1] = 2; },
       PNN_ERROR_SHAPE,
       {"norm_bias", "2", "12"}},
      {"mean", kBoth, [](Problem &p) { p.params.mean.size[0] = 13; }, PNN_ERROR_SHAPE, {"mean", "13", "12"}},
      {"variance", kBoth, [](Problem &p) { p.params.variance.size[0] = 1; }, PNN_ERROR_SHAPE, {"variance", "1", "12"}},
      {"grad_norm_weight",
       kBackward,
       [](Problem &p) { p.params.grad_norm_weight.size[0] = 11; },
       PNN_ERROR_SHAPE,
       {"grad_norm_weight", "11", "12"}},
      {"grad_norm_bias",
       kBackward,
       [](Problem &p) { p.params.grad_norm_bias.size[0] = 11; },
       PNN_ERROR_SHAPE,
       {"grad_norm_bias", "11", "12"}},
      {"one value to normalise over",
       kForward,
       [](Problem &p) {
         p.params.norm_training = 1;
         p.params.input.size[0] = p.params.output.size[0] = 1;
         p.params.stride[0] = p.params.stride[1] = 100;
         p.params.output.size[2] = p.params.output.size[3] = 1;
       },
       PNN_ERROR_SHAPE,
       {"one value", "training"}},
      // Types.
      {"input's type",
       kBoth,
       [](Problem &p) { p.params.input.dtype = static_cast<pnn_dtype>(4); },
       PNN_ERROR_DTYPE,
       {"input", "4"}},
      {"input's type -1",
       kBoth,
       [](Problem &p) { p.params.input.dtype = static_cast<pnn_dtype>(-1); },
       PNN_ERROR_DTYPE,
       {"input", "-1"}},
      {"weight's type",
       kBoth,
       [](Problem &p) { p.params.weight.dtype = static_cast<pnn_dtype>(99); },
       PNN_ERROR_DTYPE,
       {"weight", "99"}},
      {"weight float64",
       kBoth,
       [](Problem &p) { p.params.weight.dtype = PNN_FLOAT64; },
       PNN_ERROR_DTYPE,
       {"weight", "float64", "float32"}},
      {"mask float16",
       kBoth,
       [](Problem &p) { p.params.mask.dtype = PNN_FLOAT16; },
       PNN_ERROR_DTYPE,
       {"mask", "float16", "float32"}},
      {"mask's type",
       kBoth,
       [](Problem &p) { p.params.mask.dtype = static_cast<pnn_dtype>(7); },
       PNN_ERROR_DTYPE,
       {"mask", "float32"}},
      {"bias float64",
       kForward,
       [](Problem &p) { p.params.bias.dtype = PNN_FLOAT64; },
       PNN_ERROR_DTYPE,
       {"bias", "float64", "float32"}},
      {"output bfloat16",
       kForward,
       [](Problem &p) { p.params.output.dtype = PNN_BFLOAT16; },
       PNN_ERROR_DTYPE,
       {"output", "bfloat16", "float32"}},
      {"grad_output float16",
       kBackward,
       [](Problem &p) { p.params.grad_output.dtype = PNN_FLOAT16; },
       PNN_ERROR_DTYPE,
       {"grad_output", "float16", "float32"}},
      {"grad_input",
       kBackward,
       [](Problem &p) { p.params.grad_input.dtype = PNN_FLOAT64; },
       PNN_ERROR_DTYPE,
       {"grad_input", "float64", "float32"}},
      {"grad_weight",
       kBackward,
       [](Problem &p) { p.params.grad_weight.dtype = PNN_BFLOAT16; },
       PNN_ERROR_DTYPE,
       {"grad_weight", "bfloat16", "float32"}},
      {"grad_bias",
       kBackward,
       [](Problem &p) { p.params.grad_bias.dtype = PNN_BFLOAT16; },
       PNN_ERROR_DTYPE,
       {"grad_bias", "bfloat16", "float32"}},
      {"grad_mask",
       kBackward,
       [](Problem &p) { p.params.grad_mask.dtype = PNN_FLOAT64; },
       PNN_ERROR_DTYPE,
       {"grad_mask", "float64", "float32"}},
      {"norm_weight",
       kBoth,
       [](Problem &p) { p.params.norm_weight.dtype = PNN_FLOAT64; },
       PNN_ERROR_DTYPE,
       {"norm_weight", "float64", "float32"}},
      {"norm_bias",
       kBoth,
       [](Problem &p) { p.params.norm_bias.dtype = PNN_FLOAT16; },
       PNN_ERROR_DTYPE,
       {"norm_bias", "float16", "float32"}},
      {"mean",
       kBoth,
       [](Problem &p) { p.params.mean.dtype = PNN_FLOAT64; },
       PNN_ERROR_DTYPE,
       {"mean", "float64", "float32"}},
      {"variance",
       kBoth,
       [](Problem &p) { p.params.variance.dtype = PNN_BFLOAT16; },
       PNN_ERROR_DTYPE,
       {"variance", "bfloat16", "float32"}},
      {"grad_norm_weight",
       kBackward,
       [](Problem &p) { p.params.grad_norm_weight.dtype = PNN_FLOAT64; },
       PNN_ERROR_DTYPE,
       {"grad_norm_weight"}},
      {"grad_norm_bias",
       kBackward,
       [](Problem &p) { p.params.grad_norm_bias.dtype = static_cast<pnn_dtype>(-7); },
       PNN_ERROR_DTYPE,
       {"grad_norm_bias"}},
      // A gradient of what is no tensor.
      {"grad_mask of a recipe",
       kBackward,
       [](Problem &p) {
         static const int64_t seed = 1;
         p.params.noise = PNN_NOISE_UNIFORM;
         p.params.seed = &seed;
       },
       PNN_ERROR_VALUE,
       {"grad_mask"}},
      {"grad_mask of no noise",
       kBackward,
       [](Problem &p) { p.params.noise = PNN_NOISE_NONE; },
       PNN_ERROR_VALUE,
       {"grad_mask"}},
  };
  // Negative sizes and strides beyond the address range, for every tensor.
  struct Slot {
    const char *name;
    pnn_tensor pnn_params::*tensor;
    unsigned passes;
  };
  static const std::vector<Slot> slots = {
      {"input", &pnn_params::input, kBoth},
      {"weight", &pnn_params::weight, kBoth},
      {"bias", &pnn_params::bias, kForward},
      {"mask", &pnn_params::mask, kBoth},
      {"norm_weight", &pnn_params::norm_weight, kBoth},
      {"norm_bias", &pnn_params::norm_bias, kBoth},
      {"mean", &pnn_params::mean, kBoth},
      {"variance", &pnn_params::variance, kBoth},
      {"output", &pnn_params::output, kForward},
      {"grad_output", &pnn_params::grad_output, kBackward},
      {"grad_input", &pnn_params::grad_input, kBackward},
      {"grad_weight", &pnn_params::grad_weight, kBackward},
      {"grad_bias", &pnn_params::grad_bias, kBackward},
      {"grad_mask", &pnn_params::grad_mask, kBackward},
      {"grad_norm_weight", &pnn_params::grad_norm_weight, kBackward},
      {"grad_norm_bias", &pnn_params::grad_norm_bias, kBackward},
  };
  for (const Slot &slot : slots) {
    const auto tensor = slot.tensor;
    for (int64_t size : {int64_t{-1}, kMin}) {
      list.push_back({slot.name,
                      slot.passes,
                      [=](Problem &p) { (p.params.*tensor).size[0] = size; },
                      PNN_ERROR_SHAPE,
                      {slot.name, std::to_string(size)}});
    }
    for (int64_t stride : {kMax, kMin, kMax / 4, kMin / 4, int64_t{1} << 61, -(int64_t{1} << 61)}) {
      list.push_back({slot.name,
                      slot.passes,
                      [=](Problem &p) { (p.params.*tensor).stride[0] = stride; },
                      PNN_ERROR_OVERFLOW,
                      {slot.name, std::to_string(stride)}});
    }
  }
  // Outputs that overlap themselves.
  for (const Slot &slot : slots) {
    const bool written = slot.tensor == &pnn_params::output || std::string(slot.name).rfind("grad_", 0) == 0;
    if (!written || slot.tensor == &pnn_params::grad_output) continue;
    const auto tensor = slot.tensor;
    list.push_back({slot.name,
                    slot.passes,
                    [=](Problem &p) { (p.params.*tensor).stride[0] = 0; },
                    PNN_ERROR_ALIAS,
                    {slot.name, "overlaps itself"}});
    if (tensor == &pnn_params::output || tensor == &pnn_params::grad_input || tensor == &pnn_params::grad_mask) {
      list.push_back({slot.name,
                      slot.passes,
                      [=](Problem &p) { (p.params.*tensor).stride[2] = 1; },
                      PNN_ERROR_ALIAS,
                      {slot.name, "overlaps itself"}});
      list.push_back({slot.name,
                      slot.passes,
                      [=](Problem &p) { (p.params.*tensor).stride[1] = -1; },
                      PNN_ERROR_ALIAS,
                      {slot.name, "overlaps itself"}});
    }
  }
  return list;
}

TEST(Errors, EveryMistake) {
  int64_t cases = 0;
  for (const Mistake &mistake : mistakes()) {
    for (pnn_pass pass : {PNN_PASS_FORWARD, PNN_PASS_BACKWARD}) {
      if (!(mistake.passes & (1u << pass))) continue;
      SCOPED_TRACE(std::string(mistake.name) + (pass == PNN_PASS_FORWARD ? ", forward" : ", backward"));
      Problem problem(full());
      mistake.make(problem);
      expect_refused(problem, pass, mistake.status, mistake.words);
      cases++;
    }
  }
  EXPECT_GT(cases, 250);
}

TEST(Errors, TheUnspoiledCallIsTaken) {
  Problem problem(full());
  EXPECT_EQ(problem.forward(), PNN_OK) << problem.error.message;
  EXPECT_EQ(problem.backward(), PNN_OK) << problem.error.message;
}

// What one pass does not read may hold anything.
TEST(Errors, ForeignArgumentsAreLeftAlone) {
  Problem problem(full());
  const pnn_params saved = problem.params;
  pnn_tensor wild = {};
  wild.data = &wild;
  wild.dtype = static_cast<pnn_dtype>(77);
  wild.size[0] = -5;
  for (pnn_tensor *t :
       {&problem.params.grad_output, &problem.params.grad_input, &problem.params.grad_weight, &problem.params.grad_bias,
        &problem.params.grad_mask, &problem.params.grad_norm_weight, &problem.params.grad_norm_bias}) {
    *t = wild;
  }
  EXPECT_EQ(problem.run(PNN_PASS_FORWARD), PNN_OK) << problem.error.message;
  problem.params = saved;
  problem.params.output = problem.params.bias = wild;
  EXPECT_EQ(problem.run(PNN_PASS_BACKWARD), PNN_OK) << problem.error.message;
  // Without a mask tensor the mask is not read, without norm its arguments are not.
  static const int64_t seed = 3;
  problem.params = saved;
  problem.params.noise = PNN_NOISE_UNIFORM;
  problem.params.seed = &seed;
  problem.params.grad_mask.data = nullptr;
  problem.params.mask = wild;
  problem.params.norm = 0;
  problem.params.norm_eps = -1;
  problem.params.norm_weight = problem.params.norm_bias = problem.params.mean = problem.params.variance = wild;
  problem.params.grad_norm_weight = problem.params.grad_norm_bias = wild;
  EXPECT_EQ(problem.run(PNN_PASS_FORWARD), PNN_OK) << problem.error.message;
  EXPECT_EQ(problem.run(PNN_PASS_BACKWARD), PNN_OK) << problem.error.message;
}

// Every output laid over every other tensor and over the workspace.
TEST(Errors, Aliasing) {
  struct Member {
    const char *name;
    pnn_tensor pnn_params::*tensor;
  };
  const std::vector<Member> forward_inputs = {
      {"input", &pnn_params::input}, {"weight", &pnn_params::weight},           {"bias", &pnn_params::bias},
      {"mask", &pnn_params::mask},   {"norm_weight", &pnn_params::norm_weight}, {"norm_bias", &pnn_params::norm_bias}};
  const std::vector<Member> forward_outputs = {
      {"output", &pnn_params::output}, {"mean", &pnn_params::mean}, {"variance", &pnn_params::variance}};
  const std::vector<Member> backward_inputs = {
      {"input", &pnn_params::input},         {"weight", &pnn_params::weight},
      {"mask", &pnn_params::mask},           {"norm_weight", &pnn_params::norm_weight},
      {"norm_bias", &pnn_params::norm_bias}, {"mean", &pnn_params::mean},
      {"variance", &pnn_params::variance},   {"grad_output", &pnn_params::grad_output}};
  const std::vector<Member> backward_outputs = {{"grad_input", &pnn_params::grad_input},
                                                {"grad_weight", &pnn_params::grad_weight},
                                                {"grad_bias", &pnn_params::grad_bias},
                                                {"grad_mask", &pnn_params::grad_mask},
                                                {"grad_norm_weight", &pnn_params::grad_norm_weight},
                                                {"grad_norm_bias", &pnn_params::grad_norm_bias}};
  int64_t cases = 0;
  for (pnn_pass pass : {PNN_PASS_FORWARD, PNN_PASS_BACKWARD}) {
    const auto &inputs = pass == PNN_PASS_FORWARD ? forward_inputs : backward_inputs;
    const auto &outputs = pass == PNN_PASS_FORWARD ? forward_outputs : backward_outputs;
    for (const Member &output : outputs) {
      std::vector<Member> others = inputs;
      for (const Member &other : outputs) {
        if (other.tensor != output.tensor) others.push_back(other);
      }
      for (const Member &other : others) {
        SCOPED_TRACE(std::string(output.name) + " over " + other.name);
        Case c = full();
        c.training = true;
        // Exactly on top, one element in common at either end, and just behind, in memory that nothing else uses.
        Problem problem(c);
        pnn_tensor &o = problem.params.*output.tensor;
        pnn_tensor &t = problem.params.*other.tensor;
        const auto reach = [](const pnn_tensor &tensor) {
          int64_t last = 0;
          for (int d = 0; d < 4; d++) last += tensor.size[d] > 1 ? (tensor.size[d] - 1) * tensor.stride[d] : 0;
          return last;
        };
        std::vector<float> room(16384);
        float *const place = room.data() + 8192;
        t.data = place;
        for (int64_t offset : {int64_t{0}, reach(t), -reach(o)}) {
          o.data = place + offset;
          expect_refused(problem, pass, PNN_ERROR_ALIAS, {output.name, other.name, "overlaps"});
          cases++;
        }
        for (int64_t offset : {reach(t) + 1, -reach(o) - 1}) {
          o.data = place + offset;
          size_t bytes = 0;
          pnn_error error = {};
          EXPECT_EQ(pnn_workspace_size(&problem.params, pass, nullptr, &bytes, &error), PNN_OK) << error.message;
        }
      }
      // Over the workspace.
      Problem problem(full());
      if (!(problem.params.*output.tensor).data || (pass == PNN_PASS_FORWARD && output.tensor != &pnn_params::output))
        continue;
      SCOPED_TRACE(std::string(output.name) + " over the workspace");
      std::vector<unsigned char> workspace(1 << 20);
      problem.params.workspace = workspace.data();
      problem.params.workspace_bytes = workspace.size();
      (problem.params.*output.tensor).data = workspace.data() + 4096;
      expect_refused(problem, pass, PNN_ERROR_ALIAS, {output.name, "workspace", "overlaps"});
      cases++;
    }
  }
  EXPECT_GT(cases, 100);
}

// Inputs may share memory in any way.
TEST(Errors, InputsMayOverlap) {
  Case c;
  c.B = 2, c.C = 4, c.H = 3, c.W = 8, c.T = 4, c.noise = PNN_NOISE_TENSOR;
  Problem problem(c);
  problem.params.mask.data = problem.params.input.data;
  problem.params.weight.data = problem.params.input.data;
  problem.params.bias.data = problem.params.input.data;
  problem.params.grad_output.data = problem.params.input.data;
  EXPECT_EQ(problem.run(PNN_PASS_FORWARD), PNN_OK) << problem.error.message;
  EXPECT_EQ(problem.run(PNN_PASS_BACKWARD), PNN_OK) << problem.error.message;
}

TEST(Errors, InputsOverlapTheWorkspace) {
  Problem problem(full());
  std::vector<unsigned char> workspace(1 << 20);
  problem.params.workspace = workspace.data();
  problem.params.workspace_bytes = workspace.size();
  problem.params.input.data = workspace.data() + 64;
  expect_refused(problem, PNN_PASS_FORWARD, PNN_ERROR_ALIAS, {"workspace", "input"});
}

TEST(Errors, NullParams) {
  pnn_error error = {};
  size_t bytes = 7;
  EXPECT_EQ(pnn_forward(nullptr, nullptr, &error), PNN_ERROR_NULL);
  EXPECT_NE(std::string(error.message).find("params"), std::string::npos);
  EXPECT_EQ(pnn_backward(nullptr, nullptr, &error), PNN_ERROR_NULL);
  EXPECT_EQ(pnn_workspace_size(nullptr, PNN_PASS_FORWARD, nullptr, &bytes, &error), PNN_ERROR_NULL);
  EXPECT_EQ(bytes, 0u);
  EXPECT_EQ(pnn_forward(nullptr, nullptr, nullptr), PNN_ERROR_NULL);
  pnn_params_init(nullptr);
  Problem problem(full());
  EXPECT_EQ(pnn_workspace_size(&problem.params, PNN_PASS_FORWARD, nullptr, nullptr, &error), PNN_ERROR_NULL);
  EXPECT_NE(std::string(error.message).find("bytes"), std::string::npos);
  EXPECT_EQ(pnn_workspace_size(&problem.params, static_cast<pnn_pass>(2), nullptr, &bytes, &error), PNN_ERROR_VALUE);
  EXPECT_NE(std::string(error.message).find("pass"), std::string::npos);
}

TEST(Errors, Host) {
  for (pnn_pass pass : {PNN_PASS_FORWARD, PNN_PASS_BACKWARD}) {
    Problem problem(full());
    pnn_host host = *ThreadHost(2).get();
    size_t bytes = 0;
    host.threads = 0;
    EXPECT_EQ(pnn_workspace_size(&problem.params, pass, &host, &bytes, &problem.error), PNN_ERROR_VALUE);
    EXPECT_NE(std::string(problem.error.message).find("threads is 0"), std::string::npos) << problem.error.message;
    host.threads = -4;
    EXPECT_EQ(pnn_workspace_size(&problem.params, pass, &host, &bytes, &problem.error), PNN_ERROR_VALUE);
    host.threads = 2;
    host.parallel_for = nullptr;
    EXPECT_EQ(pnn_workspace_size(&problem.params, pass, &host, &bytes, &problem.error), PNN_ERROR_NULL);
    EXPECT_NE(std::string(problem.error.message).find("parallel_for"), std::string::npos) << problem.error.message;
    problem.check_memory({});
  }
  // Any number of threads can be asked about.
  Problem problem(full());
  pnn_host host = *ThreadHost(2).get();
  host.threads = std::numeric_limits<int32_t>::max();
  size_t bytes = 0;
  const pnn_status status = pnn_workspace_size(&problem.params, PNN_PASS_BACKWARD, &host, &bytes, &problem.error);
  EXPECT_TRUE(status == PNN_OK || status == PNN_ERROR_OVERFLOW) << problem.error.message;
}

TEST(Errors, Workspace) {
  for (pnn_pass pass : {PNN_PASS_FORWARD, PNN_PASS_BACKWARD}) {
    for (int32_t threads : {0, 1, 3}) {
      Problem problem(full());
      ThreadHost thread_host(std::max(threads, 1));
      const pnn_host *host = threads ? thread_host.get() : nullptr;
      size_t bytes = 0;
      ASSERT_EQ(pnn_workspace_size(&problem.params, pass, host, &bytes, &problem.error), PNN_OK);
      ASSERT_GT(bytes, 0u);
      const auto run = pass == PNN_PASS_FORWARD ? pnn_forward : pnn_backward;
      std::vector<unsigned char> memory(bytes + 64);
      problem.params.workspace = memory.data();
      for (size_t less : {bytes - 1, bytes / 2, size_t{1}, size_t{0}}) {
        problem.params.workspace_bytes = less;
        EXPECT_EQ(run(&problem.params, host, &problem.error), PNN_ERROR_WORKSPACE) << less << " of " << bytes;
        EXPECT_NE(std::string(problem.error.message).find(std::to_string(less)), std::string::npos)
            << problem.error.message;
        EXPECT_NE(std::string(problem.error.message).find(std::to_string(bytes)), std::string::npos)
            << problem.error.message;
      }
      problem.params.workspace = nullptr;
      problem.params.workspace_bytes = bytes;
      EXPECT_EQ(run(&problem.params, host, &problem.error), PNN_ERROR_NULL);
      EXPECT_NE(std::string(problem.error.message).find("workspace"), std::string::npos) << problem.error.message;
      problem.check_memory({});
      // Exactly enough, at every alignment, with guards on both sides.
      for (size_t offset = 0; offset < 64; offset++) {
        memory.assign(bytes + 64, 0xa5);
        problem.params.workspace = memory.data() + offset;
        problem.params.workspace_bytes = bytes;
        ASSERT_EQ(run(&problem.params, host, &problem.error), PNN_OK) << problem.error.message;
        for (size_t i = 0; i < offset; i++) ASSERT_EQ(memory[i], 0xa5);
        for (size_t i = offset + bytes; i < memory.size(); i++) ASSERT_EQ(memory[i], 0xa5);
      }
    }
  }
}

// Sizes near the ends of int64: refused, or (where there are no elements) taken; never wrong.
TEST(Errors, EnormousSizes) {
  Case c;
  c.B = 1, c.C = 1, c.H = 1, c.W = 1, c.T = 1, c.noise = PNN_NOISE_NONE;
  c.gradients = kGradInput | kGradWeight | kGradBias;
  Random random(4);
  const std::vector<int64_t> sizes = {0,    1,        2,       3, int64_t{1} << 31, int64_t{1} << 32, int64_t{1} << 62,
                                      kMax, kMax - 1, kMax / 2};
  int64_t refused = 0;
  int64_t taken = 0;
  for (int64_t i = 0; i < scaled(20000); i++) {
    Problem problem(c);
    pnn_params &p = problem.params;
    const int64_t B = random.pick(sizes), C = random.pick(sizes), H = random.pick(sizes), W = random.pick(sizes);
    const int64_t T = random.pick(sizes);
    p.stride[0] = random.pick(std::vector<int64_t>{1, 2, kMax});
    p.stride[1] = random.pick(std::vector<int64_t>{1, 3, kMax - 1});
    p.masks = random.pick(std::vector<int64_t>{1, 2, int64_t{1} << 33, kMax});
    if (C == 0 && T == 0) p.groups = random.pick(sizes);
    if (p.groups == 0) p.groups = kMax;
    const auto sized = [](pnn_tensor &t, int64_t a, int64_t b, int64_t d, int64_t e) {
      t.size[0] = a, t.size[1] = b, t.size[2] = d, t.size[3] = e;
      for (int64_t &s : t.stride) s = 0;
    };
    const auto product = [](int64_t a, int64_t b) {
      return static_cast<int64_t>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
    };
    const int64_t h = H ? (H - 1) / p.stride[0] + 1 : 0;
    const int64_t w = W ? (W - 1) / p.stride[1] + 1 : 0;
    sized(p.input, B, C, H, W);
    sized(p.grad_input, B, C, H, W);
    sized(p.weight, T, product(C, p.masks), 1, 1);
    sized(p.grad_weight, T, product(C, p.masks), 1, 1);
    sized(p.bias, T, 1, 1, 1);
    sized(p.grad_bias, T, 1, 1, 1);
    sized(p.output, B, T, h, w);
    sized(p.grad_output, B, T, h, w);
    for (pnn_pass pass : {PNN_PASS_FORWARD, PNN_PASS_BACKWARD}) {
      size_t bytes = 1;
      const pnn_status status = pnn_workspace_size(&p, pass, nullptr, &bytes, &problem.error);
      if (status != PNN_OK) {
        EXPECT_EQ(bytes, 0u);
        EXPECT_TRUE(status == PNN_ERROR_OVERFLOW || status == PNN_ERROR_ALIAS || status == PNN_ERROR_SHAPE)
            << problem.error.message;
        refused++;
      } else {
        // Outputs with strides of zero hold one element at most: no size is above 1, or one is 0.
        const bool forward = pass == PNN_PASS_FORWARD;
        const int64_t sizes[] = {B, forward ? T : C, forward ? h : H, forward ? w : W};
        const bool empty = std::count(sizes, sizes + 4, 0) > 0;
        EXPECT_TRUE(empty || *std::max_element(sizes, sizes + 4) <= 1);
        taken++;
      }
    }
  }
  EXPECT_GT(refused, 10);
  EXPECT_GT(taken, 10);
}

// Strides just inside what can be addressed must not overflow on the way to being refused or taken.
TEST(Errors, StridesAtTheEdgeOfOverflow) {
  for (pnn_dtype type : {PNN_FLOAT32, PNN_FLOAT64, PNN_BFLOAT16, PNN_FLOAT16}) {
    const int64_t element = static_cast<int64_t>(bytes_of(type));
    for (int64_t bytes : {kMax, kMin, kMax / 2, kMin / 2}) {
      for (int64_t nudge : {-1, 0, 1}) {
        const int64_t stride = bytes / element + nudge;
        Case c;
        c.input_type = c.weight_type = type;
        c.B = 2, c.C = 2, c.H = 2, c.W = 2, c.T = 2;
        Problem problem(c);
        problem.params.input.stride[0] = stride;
        size_t size = 0;
        const pnn_status status = pnn_workspace_size(&problem.params, PNN_PASS_FORWARD, nullptr, &size, &problem.error);
        // Half of all addresses may hold a tensor; so far back there are none, and further on none at all.
        EXPECT_TRUE(status == PNN_ERROR_OVERFLOW || (stride > 0 && (status == PNN_OK || status == PNN_ERROR_ALIAS)))
            << problem.error.message;
        // Tensors without elements may have any strides.
        problem.params.input.size[0] = problem.params.output.size[0] = 0;
        problem.params.input.stride[2] = problem.params.input.stride[3] = stride;
        EXPECT_EQ(pnn_workspace_size(&problem.params, PNN_PASS_FORWARD, nullptr, &size, &problem.error), PNN_OK);
      }
    }
    pnn_tensor mask = {};
    char memory[64] = {};
    mask.data = memory;
    mask.dtype = type;
    const int64_t seed = 1;
    for (int64_t stride : {kMax, kMin, kMax / element + 1, kMin / element, kMin / element - 1}) {
      mask.size[0] = 2, mask.size[1] = mask.size[2] = mask.size[3] = 1, mask.stride[0] = stride;
      EXPECT_EQ(pnn_mask_fill(&mask, PNN_NOISE_UNIFORM, 0, &seed, nullptr, nullptr), PNN_ERROR_OVERFLOW) << stride;
    }
  }
}

// Without elements the strides mean nothing, in outputs as well.
TEST(Errors, StridesOfEmptyTensors) {
  for (int d = 0; d < 4; d++) {
    Case c;
    c.B = 2, c.C = 2, c.H = 2, c.W = 2, c.T = 2, c.noise = PNN_NOISE_TENSOR;
    (d == 0 ? c.B : d == 1 ? c.C : d == 2 ? c.H : c.W) = 0;
    if (d == 1) c.T = 0;
    Problem problem(c);
    pnn_params &p = problem.params;
    for (pnn_tensor *t : {&p.input, &p.mask, &p.output, &p.grad_output, &p.grad_input, &p.grad_mask}) {
      if (d == 0 && (t == &p.mask || t == &p.grad_mask)) continue;
      for (int64_t &stride : t->stride) stride = kMin;
    }
    EXPECT_EQ(problem.run(PNN_PASS_FORWARD), PNN_OK) << problem.error.message;
    EXPECT_EQ(problem.run(PNN_PASS_BACKWARD), PNN_OK) << problem.error.message;
  }
}

TEST(Errors, MaskFill) {
  const int64_t seed = 5;
  Random random(1);
  Tensor tensor(PNN_FLOAT32, {2, 3, 4, 5}, LayoutKind::kContiguous, random, Placement::kZones, Poison::kNan, 1);
  const auto refused = [&](const pnn_tensor *mask, pnn_noise noise, int32_t shared, const int64_t *from,
                           const pnn_host *host, pnn_status status, const std::vector<std::string> &words) {
    pnn_error error = {};
    EXPECT_EQ(pnn_mask_fill(mask, noise, shared, from, host, &error), status) << error.message;
    for (const std::string &word : words)
      EXPECT_NE(std::string(error.message).find(word), std::string::npos) << error.message;
    EXPECT_EQ(pnn_mask_fill(mask, noise, shared, from, host, nullptr), status);
    EXPECT_TRUE(tensor.intact());
  };
  const pnn_tensor good = tensor.view();
  refused(nullptr, PNN_NOISE_UNIFORM, 0, &seed, nullptr, PNN_ERROR_NULL, {"mask", "NULL"});
  refused(&good, PNN_NOISE_UNIFORM, 0, nullptr, nullptr, PNN_ERROR_NULL, {"seed", "NULL"});
  refused(&good, PNN_NOISE_NONE, 0, &seed, nullptr, PNN_ERROR_VALUE, {"noise", "0"});
  refused(&good, PNN_NOISE_TENSOR, 0, &seed, nullptr, PNN_ERROR_VALUE, {"noise", "1"});
  refused(&good, PNN_NOISE_COUNT, 0, &seed, nullptr, PNN_ERROR_VALUE, {"noise", "5"});
  refused(&good, static_cast<pnn_noise>(-9), 0, &seed, nullptr, PNN_ERROR_VALUE, {"noise", "-9"});
  refused(&good, PNN_NOISE_UNIFORM, 1, &seed, nullptr, PNN_ERROR_SHAPE, {"mask", "2", "1", "shared_masks"});
  pnn_tensor bad = good;
  bad.data = nullptr;
  refused(&bad, PNN_NOISE_UNIFORM, 0, &seed, nullptr, PNN_ERROR_NULL, {"mask", "NULL"});
  bad = good;
  bad.dtype = static_cast<pnn_dtype>(12);
  refused(&bad, PNN_NOISE_UNIFORM, 0, &seed, nullptr, PNN_ERROR_DTYPE, {"mask", "12"});
  for (int d = 0; d < 4; d++) {
    bad = good;
    bad.size[d] = -2;
    refused(&bad, PNN_NOISE_NORMAL, 0, &seed, nullptr, PNN_ERROR_SHAPE, {"mask", "-2"});
    bad = good;
    bad.stride[d] = 0;
    refused(&bad, PNN_NOISE_WAVES, 0, &seed, nullptr, PNN_ERROR_ALIAS, {"mask", "overlaps itself"});
    bad = good;
    bad.stride[d] = kMin;
    refused(&bad, PNN_NOISE_WAVES, 0, &seed, nullptr, PNN_ERROR_OVERFLOW, {"mask"});
    bad = good;
    bad.size[d] = kMax;
    refused(&bad, PNN_NOISE_WAVES, 0, &seed, nullptr, PNN_ERROR_OVERFLOW, {"mask", "9223372036854775807"});
  }
  pnn_host host = {0, nullptr, nullptr};
  refused(&good, PNN_NOISE_UNIFORM, 0, &seed, &host, PNN_ERROR_VALUE, {"threads"});
  host.threads = 1;
  refused(&good, PNN_NOISE_UNIFORM, 0, &seed, &host, PNN_ERROR_NULL, {"parallel_for"});
  // Without elements there is nothing to write and nothing to refuse, however large the other sizes.
  for (int d = 0; d < 4; d++) {
    bad = good;
    for (int64_t &size : bad.size) size = kMax;
    bad.size[d] = 0;
    EXPECT_EQ(pnn_mask_fill(&bad, PNN_NOISE_UNIFORM, 0, &seed, nullptr, nullptr), PNN_OK);
  }
  EXPECT_TRUE(tensor.intact());
}

TEST(Errors, StatusNames) {
  EXPECT_STREQ(pnn_status_string(PNN_OK), "PNN_OK");
  EXPECT_STREQ(pnn_status_string(PNN_ERROR_NULL), "PNN_ERROR_NULL");
  EXPECT_STREQ(pnn_status_string(PNN_ERROR_VERSION), "PNN_ERROR_VERSION");
  EXPECT_STREQ(pnn_status_string(PNN_ERROR_SHAPE), "PNN_ERROR_SHAPE");
  EXPECT_STREQ(pnn_status_string(PNN_ERROR_DTYPE), "PNN_ERROR_DTYPE");
  EXPECT_STREQ(pnn_status_string(PNN_ERROR_VALUE), "PNN_ERROR_VALUE");
  EXPECT_STREQ(pnn_status_string(PNN_ERROR_OVERFLOW), "PNN_ERROR_OVERFLOW");
  EXPECT_STREQ(pnn_status_string(PNN_ERROR_ALIAS), "PNN_ERROR_ALIAS");
  EXPECT_STREQ(pnn_status_string(PNN_ERROR_WORKSPACE), "PNN_ERROR_WORKSPACE");
  EXPECT_STREQ(pnn_status_string(PNN_ERROR_UNSUPPORTED), "PNN_ERROR_UNSUPPORTED");
  EXPECT_STREQ(pnn_status_string(PNN_ERROR_DEVICE), "PNN_ERROR_DEVICE");
  for (int number : {-1, 11, 1000, std::numeric_limits<int>::max(), std::numeric_limits<int>::min()}) {
    EXPECT_STREQ(pnn_status_string(static_cast<pnn_status>(number)), "unknown status");
  }
  // Pinned for ever.
  EXPECT_EQ(PNN_OK, 0);
  EXPECT_EQ(PNN_ERROR_NULL, 1);
  EXPECT_EQ(PNN_ERROR_VERSION, 2);
  EXPECT_EQ(PNN_ERROR_SHAPE, 3);
  EXPECT_EQ(PNN_ERROR_DTYPE, 4);
  EXPECT_EQ(PNN_ERROR_VALUE, 5);
  EXPECT_EQ(PNN_ERROR_OVERFLOW, 6);
  EXPECT_EQ(PNN_ERROR_ALIAS, 7);
  EXPECT_EQ(PNN_ERROR_WORKSPACE, 8);
  EXPECT_EQ(PNN_ERROR_UNSUPPORTED, 9);
  EXPECT_EQ(PNN_ERROR_DEVICE, 10);
}

TEST(Errors, VersionAndDefaults) {
  EXPECT_EQ(std::string(pnn_version()), std::to_string(PNN_VERSION_MAJOR) + "." + std::to_string(PNN_VERSION_MINOR) +
                                            "." + std::to_string(PNN_VERSION_PATCH));
  pnn_params p;
  std::memset(&p, 0xff, sizeof p);
  pnn_params_init(&p);
  EXPECT_EQ(p.struct_size, sizeof p);
  EXPECT_EQ(p.masks, 1);
  EXPECT_EQ(p.level, 1.0);
  EXPECT_EQ(p.stride[0], 1);
  EXPECT_EQ(p.stride[1], 1);
  EXPECT_EQ(p.groups, 1);
  EXPECT_EQ(p.activation, PNN_ACTIVATION_RELU);
  EXPECT_EQ(p.noise, PNN_NOISE_NONE);
  EXPECT_EQ(p.norm_eps, 1e-5);
  EXPECT_EQ(p.seed, nullptr);
  EXPECT_EQ(p.workspace, nullptr);
  for (const pnn_tensor *t : {&p.input, &p.weight, &p.bias, &p.mask, &p.output, &p.grad_input, &p.mean})
    EXPECT_EQ(t->data, nullptr);
}

// After an error the same structs serve for a right call, and the error is emptied.
TEST(Errors, RecoveryAfterAnError) {
  Problem problem(full());
  problem.params.groups = 0;
  EXPECT_EQ(problem.run(PNN_PASS_FORWARD), PNN_ERROR_VALUE);
  EXPECT_NE(problem.error.message[0], '\0');
  problem.params.groups = 2;
  std::vector<unsigned char> workspace(1 << 20);
  problem.params.workspace = workspace.data();
  problem.params.workspace_bytes = workspace.size();
  EXPECT_EQ(pnn_forward(&problem.params, nullptr, &problem.error), PNN_OK);
  EXPECT_EQ(problem.error.status, PNN_OK);
  EXPECT_STREQ(problem.error.message, "");
}

}  // namespace
}  // namespace pnn_test
