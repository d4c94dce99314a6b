// workspace_test.cc - the promise on memory: a pass needs at most (1 MiB + 4 x the bytes of dV) per thread and the
// packed weights, and nothing that grows with the batch or, from some size on, with the image.
//
// dV's bytes are counted in the type that is computed in (float32 for the 16-bit types). Where masks are trained, each
// thread also sums 64 pixels' gradients of all masks.
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "pnn/pnn.h"

namespace {

struct Sizes {
  int64_t B, C, H, W, T, M, groups = 1;
};

struct Options {
  pnn_dtype type = PNN_FLOAT32;
  bool channels_last = false, norm = false, training = true, train_masks = false, by_seed = false, shared = false;
  int32_t threads = 2;
};

// Data are never read when a workspace is asked for: any distinct addresses will do.
class Addresses {
 public:
  pnn_tensor tensor(pnn_dtype type, std::vector<int64_t> size, bool channels_last = false) {
    pnn_tensor t = {};
    next_ += uintptr_t{1} << 52;
    t.data = reinterpret_cast<void *>(next_);
    t.dtype = type;
    size.resize(4, 1);
    int64_t step = 1;
    const size_t order[2][4] = {{3, 2, 1, 0}, {1, 3, 2, 0}};
    for (const size_t d : order[channels_last]) {
      t.size[d] = size[d];
      t.stride[d] = step;
      step *= t.size[d];
    }
    return t;
  }
  // A vector or matrix: sizes and strides of its own dimensions come first.
  pnn_tensor dense(pnn_dtype type, int64_t rows, int64_t columns) {
    pnn_tensor t = tensor(type, {rows, columns});
    t.stride[0] = columns;
    return t;
  }

 private:
  uintptr_t next_ = 1 << 20;
};

void no_threads(void *, int64_t, void (*)(void *, int64_t), void *) {}

int64_t workspace(const Sizes &s, const Options &o, pnn_pass pass) {
  Addresses at;
  const int64_t K = s.C * s.M, seed = 1;
  const pnn_dtype statistics = o.type == PNN_FLOAT64 ? PNN_FLOAT64 : PNN_FLOAT32;
  const std::vector<int64_t> x = {s.B, s.C, s.H, s.W}, y = {s.B, s.T, s.H, s.W},
                             n = {o.shared ? 1 : s.C, s.M, s.H, s.W};
  pnn_params p;
  pnn_params_init(&p);
  p.input = at.tensor(o.type, x, o.channels_last);
  p.weight = at.dense(o.type, s.T, K / s.groups);
  p.bias = at.dense(o.type, s.T, 1);
  p.masks = s.M;
  p.groups = s.groups;
  if (o.by_seed) {
    p.noise = PNN_NOISE_UNIFORM;
    p.seed = &seed;
    p.shared_masks = o.shared;
  } else {
    p.noise = PNN_NOISE_TENSOR;
    p.mask = at.tensor(PNN_FLOAT32, n);
  }
  p.norm = o.norm;
  p.norm_training = o.training;
  if (o.norm)
    for (pnn_tensor *t : {&p.norm_weight, &p.norm_bias, &p.mean, &p.variance}) *t = at.dense(statistics, K, 1);
  if (pass == PNN_PASS_FORWARD) {
    p.output = at.tensor(o.type, y, o.channels_last);
  } else {
    p.grad_output = at.tensor(o.type, y, o.channels_last);
    p.grad_input = at.tensor(o.type, x, o.channels_last);
    p.grad_weight = at.dense(o.type, s.T, K / s.groups);
    p.grad_bias = at.dense(o.type, s.T, 1);
    if (o.train_masks && !o.by_seed) p.grad_mask = at.tensor(PNN_FLOAT32, n);
    if (o.norm)
      for (pnn_tensor *t : {&p.grad_norm_weight, &p.grad_norm_bias}) *t = at.dense(statistics, K, 1);
  }
  const pnn_host host = {o.threads, no_threads, nullptr};
  size_t bytes = 0;
  pnn_error error;
  EXPECT_EQ(pnn_workspace_size(&p, pass, &host, &bytes, &error), PNN_OK) << error.message;
  return static_cast<int64_t>(bytes);
}

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

int64_t limit(const Sizes &s, const Options &o) {
  const int64_t real = o.type == PNN_FLOAT64 ? 8 : 4;
  const int64_t maps = s.C / s.groups * s.M;
  const int64_t packed = s.groups * round_up(s.T / s.groups, 32) * round_up(maps, 32) * real;
  const int64_t mask_gradients = o.train_masks ? 64 * s.groups * maps * real : 0;
  return o.threads * (1024 * 1024 + 4 * s.T * maps * real + mask_gradients) + packed;
}

std::string describe(const Sizes &s, const Options &o, pnn_pass pass) {
  std::string text = pass == PNN_PASS_FORWARD ? "forward" : "backward";
  for (const int64_t value : {s.B, s.C, s.H, s.W, s.T, s.M, s.groups}) text += " " + std::to_string(value);
  text += ", type " + std::to_string(o.type) + ", threads " + std::to_string(o.threads);
  for (const auto &flag : {std::make_pair(o.channels_last, ", channels last"), std::make_pair(o.norm, ", norm"),
                           std::make_pair(o.train_masks, ", masks trained"), std::make_pair(o.by_seed, ", by seed"),
                           std::make_pair(o.shared, ", shared")})
    if (flag.first) text += flag.second;
  return text;
}

template <class Visit>
void for_each_option(const Visit &visit) {
  for (const pnn_dtype type : {PNN_FLOAT32, PNN_FLOAT64, PNN_BFLOAT16, PNN_FLOAT16})
    for (const int32_t threads : {1, 2, 7, 64})
      for (int flags = 0; flags < 32; flags++) {
        Options o;
        o.type = type;
        o.threads = threads;
        o.channels_last = flags & 1;
        o.norm = flags & 2;
        o.train_masks = flags & 4;
        o.by_seed = flags & 8;
        o.shared = flags & 16;
        if (o.by_seed && o.train_masks) continue;
        visit(o);
      }
}

// The benchmarks' cases, and sizes that lean on one buffer each: many maps, many outputs, large and single images,
// groups.
const std::vector<Sizes> kSizes = {
    {32, 64, 56, 56, 64, 1},    {32, 128, 28, 28, 128, 1},  {32, 256, 14, 14, 256, 1}, {32, 512, 7, 7, 512, 1},
    {128, 64, 32, 32, 64, 1},   {128, 128, 16, 16, 128, 1}, {8, 64, 32, 32, 64, 16},   {4, 64, 32, 32, 64, 64},
    {1, 16, 8, 8, 16, 1},       {8, 3, 57, 57, 100, 1},     {8, 17, 13, 13, 100, 1},   {32, 100, 7, 7, 17, 1},
    {1, 16, 512, 512, 16, 8},   {64, 512, 1, 1, 1000, 1},   {16, 2048, 7, 7, 512, 1},  {16, 512, 7, 7, 2048, 1},
    {2, 64, 9, 9, 32, 64},      {2, 3, 224, 224, 1024, 1},  {2, 1024, 9, 9, 1, 1},     {4, 512, 14, 14, 512, 1, 512},
    {4, 256, 14, 14, 256, 4, 4}};

TEST(Workspace, StaysBelowItsLimit) {
  int checked = 0;
  for (const Sizes &s : kSizes)
    for_each_option([&](const Options &o) {
      for (const pnn_pass pass : {PNN_PASS_FORWARD, PNN_PASS_BACKWARD}) {
        EXPECT_LE(workspace(s, o, pass), limit(s, o)) << describe(s, o, pass);
        checked++;
      }
    });
  EXPECT_GT(checked, 1000);
}

TEST(Workspace, StaysBelowItsLimitInLopsidedLayers) {
  // Few outputs beside many maps, many outputs beside few: what a worker keeps of each map, or output, counts most.
  int64_t checked = 0;
  for (const int64_t T : {1, 2, 3, 8, 16, 31, 32, 33, 64, 1024, 1026, 4096, 20000, 100000})
    for (const int64_t C : {1, 2, 3, 15, 16, 17, 64, 65, 512, 1024, 1026, 4096, 20000, 100000})
      for (const int64_t M : {1, 4})
        for (const int64_t groups : {1, 2})
          for (const Sizes &image : {Sizes{64, 0, 56, 56, 0, 0}, Sizes{8, 0, 7, 7, 0, 0}}) {
            if (C % groups || T % groups || T * C > 20000000) continue;
            const Sizes s = {image.B, C, image.H, image.W, T, M, groups};
            for_each_option([&](const Options &o) {
              if (o.threads > 2) return;
              for (const pnn_pass pass : {PNN_PASS_FORWARD, PNN_PASS_BACKWARD}) {
                const int64_t bytes = workspace(s, o, pass), most = limit(s, o);
                if (bytes > most) ADD_FAILURE() << describe(s, o, pass) << ": " << bytes << ", at most " << most;
                checked++;
              }
            });
          }
  EXPECT_GT(checked, 50000);
}

TEST(Workspace, DoesNotGrowWithBatchOrImage) {
  for (const Sizes &base : kSizes)
    for_each_option([&](const Options &o) {
      for (const pnn_pass pass : {PNN_PASS_FORWARD, PNN_PASS_BACKWARD}) {
        Sizes s = base;
        s.B = 4096;
        const int64_t many = workspace(s, o, pass);
        s.B = 1 << 14;
        EXPECT_EQ(workspace(s, o, pass), many) << describe(s, o, pass);
        s = base;
        s.H = s.W = 4096;
        const int64_t large = workspace(s, o, pass);
        s.H = s.W = 16384;
        EXPECT_EQ(workspace(s, o, pass), large) << describe(s, o, pass);
      }
    });
}

TEST(Workspace, NeedsOneMebibyteForTwoThreadsInTheBenchmarksCases) {
  // With two threads and float32 the whole of it stays below 1 MiB + 4 x dV a thread, the stricter reading.
  for (size_t i = 0; i < 8; i++)
    for (const bool channels_last : {false, true})
      for (const bool norm : {false, true})
        for (const pnn_pass pass : {PNN_PASS_FORWARD, PNN_PASS_BACKWARD}) {
          Options o;
          o.channels_last = channels_last;
          o.norm = norm;
          EXPECT_LE(workspace(kSizes[i], o, pass), limit(kSizes[i], o) - 1024 * 1024) << describe(kSizes[i], o, pass);
        }
}

}  // namespace
