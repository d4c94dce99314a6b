/*
 * layer_test.cc - the CUDA kernels, run on the CPU by cuda_on_host.h, against the plain loops of tests/c/reference.h
 * and against libpnn.
 *
 * Tensors, cases and comparisons are those of the C tests; only the calls go to the CUDA entry points. Each case runs
 * under one of the schedules in turn, and a choice of cases under all of them, which must give the same bits.
 */
#include <gtest/gtest.h>

#include "kernels.h"
#include "pnn/pnn_cuda.h"

/* The C tests' Problem calls these; in parentheses, (pnn_forward)(...) is still libpnn's own. */
#define pnn_workspace_size(params, pass, host, bytes, error) \
  (static_cast<void>(host), pnn_cuda_workspace_size(params, pass, bytes, error))
#define pnn_forward(params, host, error) (static_cast<void>(host), pnn_cuda_forward(params, nullptr, error))
#define pnn_backward(params, host, error) (static_cast<void>(host), pnn_cuda_backward(params, nullptr, error))
#include "case.h"

namespace pnn_test {
namespace {

using cuda_on_host::Order;
namespace host = cuda_on_host;

constexpr int kSchedules = 8;

void set_schedule(int i) {
  host::options = {};
  host::options.order = static_cast<Order>(i % 4);
  host::options.lazy_copies = i / 4 % 2 == 0;
  /* What is read too early meets lazy copies and early products, what is overwritten too early the others. */
  host::options.late_products = (i / 4 + i / 8) % 2 != 0;
  host::options.seed = static_cast<unsigned>(i / 8 + 1);
  host::options.tensor_core = i % 3 ? host::TensorCore::HOPPER : host::TensorCore::AMPERE;
}

/* Whether both types' sums are exact on the case's data. */
void check(Case c) {
  static int next = 0;
  set_schedule(next++);
  check_exact(c, 0);
  host::options = {};
}

/* The types of type_pairs(), and float32 with TF32's products. */
constexpr int kTypes = 7, kTf32 = 6;

void set_type(Case &c, int type, bool input_mask = false) {
  c.tf32 = type == kTf32;
  set_types(c, type_pairs()[c.tf32 ? 0 : static_cast<size_t>(type)], input_mask);
}

class CudaTypes : public testing::TestWithParam<int> {
 protected:
  Case base() const {
    Case c;
    set_type(c, GetParam());
    return c;
  }
};

std::string type_name(const testing::TestParamInfo<int> &info) {
  if (info.param == kTf32) return "tf32";
  const TypePair pair = type_pairs()[static_cast<size_t>(info.param)];
  return std::string(name_of(pair.input)) + (pair.input == pair.weight ? "" : std::string("_") + name_of(pair.weight));
}

INSTANTIATE_TEST_SUITE_P(Cuda, CudaTypes, testing::Range(0, kTypes), type_name);

void set_layouts(Case &c, LayoutKind kind) {
  c.input_layout = c.output_layout = c.grad_output_layout = c.grad_input_layout = kind;
}

TEST_P(CudaTypes, Sizes) {
  uint64_t seed = 1;
  for (int64_t columns : {1, 7, 63, 64, 65, 130}) {
    Case c = base();
    c.C = 3, c.T = 5, c.W = columns, c.seed = seed++;
    check(c);
    c.noise = PNN_NOISE_TENSOR, c.M = 2, c.H = 3, c.B = 2, c.seed = seed++;
    check(c);
    c.W = 1, c.H = 1, c.B = columns, c.seed = seed++;
    check(c);
  }
  for (int64_t rows : {1, 8, 31, 33, 64, 67}) {
    Case c = base();
    c.T = rows, c.C = 68 - rows, c.H = 3, c.W = 7, c.seed = seed++;
    check(c);
    c.T = 3, c.C = rows, c.M = 3, c.noise = PNN_NOISE_TENSOR, c.seed = seed++;
    check(c);
  }
}

TEST_P(CudaTypes, AlignedLayouts) {
  /* Pixels or channels in runs of 16 bytes: the paths of cp.async. */
  uint64_t seed = 100;
  for (LayoutKind kind : {LayoutKind::kContiguous, LayoutKind::kChannelsLast})
    for (int64_t M : {1, 2, 3, 4, 16, 40})
      for (int groups : {1, 2}) {
        Case c = base();
        c.placement = Placement::kHeap; /* malloc aligns to 16 bytes */
        set_layouts(c, kind);
        c.B = 3, c.C = M > 4 ? 16 : 48, c.T = 32, c.H = 4, c.W = 8, c.M = M, c.groups = groups, c.seed = seed++;
        c.noise = M == 1 || M == 16 ? PNN_NOISE_UNIFORM : M == 3 ? PNN_NOISE_WAVES : PNN_NOISE_TENSOR;
        check(c);
      }
}

TEST_P(CudaTypes, PlainLayers) {
  /* Whole sixteens of maps, a seed's lattice, relu: the way without branches; and what just misses it. */
  uint64_t seed = 150;
  for (LayoutKind kind : {LayoutKind::kContiguous, LayoutKind::kChannelsLast})
    for (int64_t M : {1, 2, 3, 4, 8, 16, 48, 64}) {
      Case c = base();
      c.placement = Placement::kHeap;
      set_layouts(c, kind);
      c.B = 2, c.C = M > 8 ? 8 : 48, c.T = 40, c.H = 5, c.W = 8, c.M = M, c.level = M % 2 ? 0.5 : -1, c.seed = seed++;
      check(c);
      c.groups = 2, c.T = 16, c.C = M > 16 ? 8 : 16, c.seed = seed++;
      check(c);
    }
}

TEST_P(CudaTypes, InputGradientOfMixedLayouts) {
  /* x, g and dx each contiguous or channels-last: 16 bytes of pixels or of channels wherever they lie so. Tiles that
   * end inside a group, columns that end inside a tile, pixels that a stride leaves out. */
  uint64_t seed = 1500;
  const int64_t masks[] = {1, 3, 4, 2, 8, 5, 1, 16};
  for (unsigned mixture = 0; mixture < 8; mixture++)
    for (int64_t M : {masks[mixture], masks[(mixture + 3) % 8]}) {
      const auto layout = [&](unsigned bit) {
        return mixture & bit ? LayoutKind::kChannelsLast : LayoutKind::kContiguous;
      };
      Case c = base();
      c.placement = Placement::kHeap, c.gradients = kGradInput;
      c.input_layout = layout(1), c.grad_output_layout = layout(2), c.grad_input_layout = layout(4);
      c.M = M, c.B = 2, c.T = 24, c.H = 5, c.W = 8, c.C = M == 1 ? 80 : 48, c.seed = seed++;
      check(c);
      c.groups = 2, c.H = c.W = 9, c.stride_h = c.stride_w = 2, c.C = 32, c.seed = seed++;
      check(c);
    }
  Case c = base(); /* a channel in pieces */
  c.placement = Placement::kHeap, c.gradients = kGradInput;
  set_layouts(c, LayoutKind::kChannelsLast);
  c.B = 2, c.C = 8, c.T = 8, c.H = 5, c.W = 8, c.M = 160, c.seed = seed;
  check(c);
}

TEST_P(CudaTypes, ChannelsLastCopies) {
  /* Images that end inside 16 bytes, some inside 4, and layers with a stride: x and g are copied, or one of them, or,
   * where the copy's channels would not lie in runs of 16 bytes either, none. */
  uint64_t seed = 1700;
  for (auto [height, width, stride] : {std::tuple<int, int, int>{7, 7, 1}, {2, 14, 1}, {9, 7, 2}, {3, 5, 7}})
    for (unsigned mixture = 0; mixture < 8; mixture++) {
      const auto layout = [&](unsigned bit) {
        return mixture & bit ? LayoutKind::kChannelsLast : LayoutKind::kContiguous;
      };
      Case c = base();
      c.placement = Placement::kHeap;
      c.input_layout = layout(1), c.grad_output_layout = layout(2), c.grad_input_layout = layout(4);
      c.B = 5, c.H = height, c.W = width, c.stride_h = c.stride_w = stride;
      c.groups = seed % 3 == 0 ? 2 : 1, c.M = mixture % 4 == 3 ? 3 : 1;
      c.C = seed % 5 == 0 ? 44 : 80, c.T = seed % 7 == 0 ? 36 : 48, c.seed = seed++;
      check(c);
    }
  for (LayoutKind kind : {LayoutKind::kNegative, LayoutKind::kBroadcast, LayoutKind::kPrime, LayoutKind::kSliced}) {
    Case c = base();
    c.input_layout = c.grad_output_layout = kind;
    c.B = 3, c.C = 32, c.H = 4, c.W = 8, c.T = 24, c.M = 2, c.seed = seed++;
    check(c);
  }
  Case c = base(); /* masks with a gradient, of each channel and shared */
  set_type(c, GetParam(), true);
  c.placement = Placement::kHeap, c.noise = PNN_NOISE_TENSOR;
  c.B = 3, c.C = 16, c.H = 5, c.W = 7, c.T = 24, c.M = 2, c.stride_h = 2, c.seed = seed++;
  check(c);
  c.shared = true, c.stride_h = 1, c.seed = seed++;
  check(c);
  c = base(); /* the moments are x's own */
  c.placement = Placement::kHeap, c.noise = PNN_NOISE_TENSOR, c.activation = PNN_ACTIVATION_IDENTITY;
  c.norm = c.training = true, c.fill = Fill::kUnit;
  c.B = 4, c.C = 16, c.H = 2, c.W = 2, c.T = 24, c.seed = seed;
  check(c);
}

TEST_P(CudaTypes, EveryLayout) {
  uint64_t seed = 200;
  for (LayoutKind kind : input_layouts()) {
    Case c = base();
    c.B = 2, c.C = 6, c.H = 5, c.W = 19, c.T = 4, c.M = 2, c.groups = 2, c.noise = PNN_NOISE_TENSOR, c.seed = seed++;
    c.input_layout = c.weight_layout = c.mask_layout = c.vector_layout = c.grad_output_layout = kind;
    c.norm = true;
    if (kind != LayoutKind::kBroadcast)
      c.output_layout = c.grad_input_layout = c.grad_weight_layout = c.grad_mask_layout = kind;
    check(c);
    c.stride_h = 2, c.stride_w = 3, c.norm = false, c.seed = seed++;
    check(c);
  }
}

TEST_P(CudaTypes, MasksOfEveryKind) {
  uint64_t seed = 300;
  for (pnn_noise noise : {PNN_NOISE_NONE, PNN_NOISE_TENSOR, PNN_NOISE_UNIFORM, PNN_NOISE_WAVES})
    for (bool shared : {false, true})
      for (int64_t M : {1, 5, 16, 70}) {
        if (noise == PNN_NOISE_NONE && shared) continue;
        Case c = base();
        set_type(c, GetParam(), seed % 2 == 0);
        c.B = 2, c.C = M == 70 ? 2 : 5, c.H = 3, c.W = 6, c.T = 3, c.M = M, c.noise = noise, c.shared = shared;
        c.level = seed % 3 ? 0.5 : -2, c.seed = seed++;
        check(c);
      }
}

TEST_P(CudaTypes, ManyMasksOfOneChannel) {
  /* More maps to a channel than a tile holds. */
  Case c = base();
  c.B = 2, c.C = 3, c.T = 4, c.H = 2, c.W = 5, c.M = 150, c.noise = PNN_NOISE_TENSOR, c.seed = 401;
  check(c);
  c.shared = true, c.groups = 1, c.norm = true, c.seed = 402;
  check(c);
}

TEST_P(CudaTypes, StridesAndGroups) {
  uint64_t seed = 500;
  for (int64_t stride : {1, 2, 7})
    for (int64_t groups : {1, 3, 6}) {
      Case c = base();
      c.B = 2, c.C = 6, c.H = 7, c.W = 9, c.T = 12, c.M = 2, c.stride_h = stride, c.stride_w = 2, c.groups = groups;
      c.noise = groups == 3 ? PNN_NOISE_UNIFORM : PNN_NOISE_TENSOR, c.norm = groups == 6, c.seed = seed++;
      check(c);
    }
  Case c = base();
  c.B = 2, c.C = 2, c.H = 3, c.W = 3, c.T = 2;
  c.stride_h = c.stride_w = std::numeric_limits<int64_t>::max();
  check(c);
}

TEST_P(CudaTypes, PlainActivations) {
  uint64_t seed = 600;
  for (pnn_activation f : {PNN_ACTIVATION_IDENTITY, PNN_ACTIVATION_RELU, PNN_ACTIVATION_HARDTANH})
    for (bool training : {false, true}) {
      Case c = base();
      c.B = 2, c.C = 5, c.H = 4, c.W = 8, c.T = 6, c.M = 2, c.noise = PNN_NOISE_TENSOR, c.activation = f;
      c.norm = training, c.seed = seed++;
      check(c);
    }
}

TEST_P(CudaTypes, NormalisationInTraining) {
  uint64_t seed = 700;
  for (bool affine : {false, true})
    for (int64_t groups : {1, 2}) {
      Case c = base();
      c.B = 2, c.C = 4, c.H = 4, c.W = 8, c.T = 6, c.M = 2, c.noise = PNN_NOISE_TENSOR, c.groups = groups;
      c.activation = PNN_ACTIVATION_IDENTITY, c.norm = c.training = true, c.affine = affine, c.fill = Fill::kUnit;
      c.seed = seed++;
      check(c);
    }
}

TEST_P(CudaTypes, EmptySizes) {
  for (int which = 0; which < 5; which++) {
    Case c = base();
    c.B = 2, c.C = 3, c.H = 2, c.W = 2, c.T = 2, c.noise = PNN_NOISE_TENSOR;
    (which == 0 ? c.B : which == 1 ? c.C : which == 2 ? c.H : which == 3 ? c.W : c.T) = 0;
    check(c);
    c.norm = true, c.training = true, c.fill = Fill::kUnit;
    check(c);
  }
}

TEST_P(CudaTypes, NoBias) {
  Case c = base();
  c.bias = false, c.B = 2, c.C = 16, c.H = 3, c.W = 8, c.T = 9;
  check(c); /* a plain layer, but of float64 */
  c.C = 3, c.W = 5, c.noise = PNN_NOISE_TENSOR;
  check(c);
}

TEST_P(CudaTypes, SomeGradients) {
  for (unsigned gradients = 0; gradients < 64; gradients += 3) {
    Case c = base();
    c.B = 2, c.C = 3, c.H = 3, c.W = 4, c.T = 4, c.noise = PNN_NOISE_TENSOR, c.gradients = gradients;
    c.norm = gradients % 2 == 0, c.seed = gradients + 800;
    check(c);
  }
}

TEST(CudaSums, SharedByManyLanes) {
  /* Many pieces of a few sums, and sums and pieces that are no multiple of a block's columns and lanes (finish.cu). */
  uint64_t seed = 850;
  for (int type : {0, 1, 2}) {
    Case c;
    set_type(c, type);
    c.noise = PNN_NOISE_TENSOR, c.gradients = kGradWeight | kGradBias, c.activation = PNN_ACTIVATION_IDENTITY;
    c.B = 1, c.C = 3, c.T = 3, c.H = 1, c.W = 33 * 256 + 65, c.seed = seed++; /* 34 splits */
    check(c);
    c.norm = c.training = c.affine = true, c.fill = Fill::kUnit; /* 128 splits, 32 chunks of the moments */
    c.C = 2, c.H = c.W = 128, c.B = 2, c.seed = seed++;
    check(c);
    /* Channels are pieces of the joined masks and, as maps, of the start values, outputs of dgamma and dbeta. */
    for (int64_t channels : {9, 70, 265}) {
      Case d;
      set_type(d, type);
      d.B = 1, d.C = d.T = channels, d.H = 1, d.W = 3, d.shared = d.norm = true, d.noise = PNN_NOISE_TENSOR;
      d.seed = seed++;
      check(d);
    }
    Case e; /* more maps than the start values' lanes load at once */
    set_type(e, type);
    e.B = 1, e.C = 8, e.M = 265, e.T = 2, e.H = 1, e.W = 3, e.shared = e.norm = true, e.noise = PNN_NOISE_TENSOR;
    e.seed = seed++;
    check(e);
  }
}

TEST(CudaLarge, LargeTiles) {
  /* 128 blocks of 128 x 128: enough to be worth the large tiles, in each type, order and pass. The device would run 132
   * of them at once; a CPU takes seconds, so the depth is short. */
  uint64_t seed = 900;
  for (int type : {0, 2, kTf32})
    for (LayoutKind kind : {LayoutKind::kContiguous, LayoutKind::kChannelsLast}) {
      Case c;
      set_type(c, type);
      c.placement = Placement::kHeap;
      set_layouts(c, kind);
      /* Whole sixteens of maps or not: two ways to make the operand. */
      const int64_t more = (seed + seed / 2) % 2 ? 8 : 0;
      c.B = 1, c.C = 8 + more, c.T = 72, c.H = 1, c.W = 127 * 128 + 8, c.seed = seed++, c.gradients = 0;
      check(c);
      /* The input's gradient, and the weight's, whose choice is by outputs and maps alone. */
      c.C = 72, c.T = 8, c.gradients = kGradInput;
      check(c);
      c.C += more, c.T = 72, c.W = 136, c.gradients = kGradWeight | kGradBias;
      check(c);
    }
}

std::vector<std::vector<uint64_t>> results(const Case &c) {
  Problem p(c);
  EXPECT_EQ(p.forward(), PNN_OK) << p.error.message;
  EXPECT_EQ(p.backward(), PNN_OK) << p.error.message;
  std::vector<std::vector<uint64_t>> all;
  for (const Tensor *t : p.tensors())
    if (t->present()) all.push_back(t->bits());
  return all;
}

TEST_P(CudaTypes, EveryScheduleGivesTheSameBits) {
  Case c = base();
  c.placement = Placement::kHeap, c.fill = Fill::kRandom;
  c.B = 2, c.C = 40, c.T = 40, c.H = 4, c.W = 16, c.norm = c.training = true, c.eps = 1e-5;
  for (int variant = 0; variant < 7; variant++) {
    set_layouts(c, variant % 2 == 1 ? LayoutKind::kChannelsLast : LayoutKind::kContiguous);
    if (variant == 2) c.M = 3, c.C = 10, c.noise = PNN_NOISE_TENSOR, c.shared = true, c.W = 15;
    if (variant == 3) /* a plain layer's own way */
      c.M = 2, c.C = 40, c.noise = PNN_NOISE_UNIFORM, c.shared = c.norm = c.training = false, c.W = 16;
    if (variant == 4) c.H = 3, c.W = 7; /* by channels-last copies */
    if (variant > 4)                    /* plain and normalised */
      c.M = 1, c.C = 48, c.noise = PNN_NOISE_UNIFORM, c.shared = false, c.norm = c.training = true, c.H = 4, c.W = 16;
    std::vector<std::vector<uint64_t>> first;
    for (int i = 0; i < 2 * kSchedules; i++) {
      set_schedule(i);
      host::options.tensor_core = host::TensorCore::HOPPER;
      const auto now = results(c);
      if (i == 0) first = now;
      EXPECT_EQ(now, first) << "schedule " << i << ", variant " << variant;
    }
  }
  host::options = {};
}

TEST_P(CudaTypes, ForwardDoesNotDependOnTheBatch) {
  /* Each image by itself gives the bits that it has in the batch. */
  Case c = base();
  c.B = 5, c.C = 19, c.T = 9, c.H = 3, c.W = 7, c.M = 2, c.fill = Fill::kRandom, c.activation = PNN_ACTIVATION_GELU;
  Problem whole(c);
  ASSERT_EQ(whole.forward(), PNN_OK);
  const std::vector<uint64_t> expected = whole.output.bits();
  for (int64_t b = 0; b < c.B; b++) {
    Problem one(c);
    for (pnn_tensor *t : {&one.params.input, &one.params.output, &one.params.grad_output}) {
      t->data = static_cast<char *>(t->data) + b * t->stride[0] * static_cast<int64_t>(bytes_of(t->dtype));
      t->size[0] = 1;
    }
    ASSERT_EQ(one.run(PNN_PASS_FORWARD), PNN_OK) << one.error.message;
    const std::vector<uint64_t> got = one.output.bits();
    const size_t image = expected.size() / static_cast<size_t>(c.B), at = image * static_cast<size_t>(b);
    for (size_t i = at; i < at + image; i++) ASSERT_EQ(got[i], expected[i]);
  }
}

/* What the operands' rounding to TF32, of 11 bits each, adds to a product's error. */
double rounded_operands(const Case &c) { return c.tf32 ? 0x1p-10 + 0x1p-22 : 0; }

/* One result against plain loops: |error| <= ((terms + 2) * u + slack) * sum|terms| + u_out * |result|. A tensor core
 * cuts each term below the 24th bit of the largest, so its unit is 2^-23 and its error one for each term. */
void expect_close(const Tensor &tensor, const Sums<long double> &want, double terms, double slack, const Case &c,
                  const char *name, double *worst) {
  if (!tensor.present()) return;
  const double u = c.input_type == PNN_FLOAT64 ? 0x1p-53 : is_half(c.weight_type) || c.tf32 ? 0x1p-23 : 0x1p-24;
  int64_t wrong = 0;
  for (int64_t i = 0; i < tensor.count(); i++) {
    const long double value = want.value[static_cast<size_t>(i)], size = want.magnitude[static_cast<size_t>(i)];
    const double got = tensor.value(i);
    if (std::isnan(value) || std::isinf(value)) {
      const bool good = c.norm ? !std::isfinite(got) : same_value(got, static_cast<double>(value), false);
      if (!good && wrong++ < 3) ADD_FAILURE() << name << "[" << i << "] is " << got << ", should be " << (double)value;
      continue;
    }
    const long double bound = ((terms + 2) * u + slack) * size + unit_of(tensor.type()) * std::fabs(value) * 1.01L +
                              4 * tiny_of(tensor.type()) + terms * 0x1p-149L;
    if (!(std::fabs(got - value) <= bound) && wrong++ < 3)
      ADD_FAILURE() << name << "[" << i << "] is " << got << ", should be " << static_cast<double>(value) << " +- "
                    << static_cast<double>(bound);
    if (size > 0) {
      const long double beyond = std::max(0.0L, std::fabs(got - value) - unit_of(tensor.type()) * std::fabs(value));
      *worst = std::max(*worst, static_cast<double>(beyond / (u * size)));
    }
  }
  if (wrong > 3) ADD_FAILURE() << name << ": " << wrong << " of " << tensor.count() << " are out of bounds";
}

/* All results against plain loops in long double; the statistics in training, too. */
void check_bounded(const Case &c, double *worst) {
  SCOPED_TRACE(c.describe());
  Problem p(c);
  ASSERT_EQ(p.forward(), PNN_OK) << p.error.message;
  const ReferenceInput in = p.reference_input();
  ASSERT_EQ(p.backward(), PNN_OK) << p.error.message;
  Reference<long double> reference(in);
  ReferenceOutput<long double> out;
  reference.forward(out, &in.mean, &in.variance);
  reference.backward(out, in.mean, in.variance);
  const double u = unit_of(c.statistics_type()), n = static_cast<double>(c.samples());
  double slack = is_exact(c.activation) ? 0 : 24 * u;
  if (is_half(c.weight_type) && (c.norm || !is_exact(c.activation))) slack += 4 * unit_of(c.weight_type);
  /* Where there is normalisation, of sums that were made so too. */
  const double products = rounded_operands(c), again = c.norm ? 2 * products : products;
  const double terms = static_cast<double>(c.columns()), more = c.norm ? n + 16 : 0;
  if (c.training)
    for (int64_t k = 0; k < c.K(); k++) {
      const size_t s = static_cast<size_t>(k);
      EXPECT_LE(std::fabs(p.mean.value(k) - out.mean.value[s]), (16 * u + slack) * out.mean.magnitude[s]);
      EXPECT_LE(std::fabs(p.variance.value(k) - out.variance.value[s]),
                (64 * u + 8 * slack) * (out.variance.value[s] + out.mean.magnitude[s] * out.mean.magnitude[s]));
    }
  expect_close(p.output, out.output, terms + 8, slack + products, c, "output", worst);
  expect_close(p.grad_input, out.grad_input, static_cast<double>(c.T) + 8 + more, 2 * slack + more * u + again, c,
               "grad_input", worst);
  expect_close(p.grad_weight, out.grad_weight, n + 8, slack + more * u + products, c, "grad_weight", worst);
  expect_close(p.grad_bias, out.grad_bias, n, 0, c, "grad_bias", worst);
  expect_close(p.grad_norm_weight, out.grad_norm_weight, n + static_cast<double>(c.T), slack + more * u + products, c,
               "grad_norm_weight", worst);
  expect_close(p.grad_norm_bias, out.grad_norm_bias, n + static_cast<double>(c.T), 0, c, "grad_norm_bias", worst);
  expect_close(p.grad_mask, out.grad_mask, static_cast<double>(c.T) + 8 + more, 2 * slack + more * u + again, c,
               "grad_mask", worst);
}

TEST_P(CudaTypes, BoundedErrors) {
  uint64_t seed = 2000;
  double worst = 0;
  for (Fill fill : {Fill::kRandom, Fill::kCancelling, Fill::kSpecial})
    for (pnn_activation f : {PNN_ACTIVATION_RELU, PNN_ACTIVATION_GELU, PNN_ACTIVATION_SILU, PNN_ACTIVATION_SELU})
      for (bool norm : {false, true}) {
        Case c = base();
        c.B = 2, c.C = 9, c.T = 7, c.H = 5, c.W = 8, c.M = 2, c.fill = fill, c.activation = f, c.seed = seed++;
        c.noise = norm ? PNN_NOISE_TENSOR : PNN_NOISE_NORMAL, c.level = 0.25;
        c.norm = norm, c.training = norm && fill == Fill::kRandom, c.eps = 1e-5;
        set_schedule(static_cast<int>(seed));
        check_bounded(c, &worst);
      }
  std::printf("worst error beyond the last rounding: %.3g u sum|terms|\n", worst);
  host::options = {};
}

TEST_P(CudaTypes, NormalisedPlainLayers) {
  /* Without statistics of its own the layer is exact; in training it has them of chunks of 1024 pixels, of which the
   * last may be short. Pixels in pairs, in channels, one by one. */
  uint64_t seed = 160;
  double worst = 0;
  for (LayoutKind kind : {LayoutKind::kContiguous, LayoutKind::kChannelsLast})
    for (int64_t M : {1, 2, 4, 8, 16, 32}) {
      Case c = base();
      c.placement = Placement::kHeap;
      set_layouts(c, kind);
      c.norm = true, c.affine = M != 2, c.bias = M != 4, c.groups = M == 2 ? 2 : 1;
      c.B = M == 8 ? 3 : 2, c.C = M > 8 ? 8 : 48, c.T = 40, c.H = 5, c.W = M == 8 ? 7 : 8, c.M = M, c.seed = seed++;
      check(c);
      c.training = true, c.fill = Fill::kRandom, c.eps = 1e-5, c.level = 0.25;
      set_schedule(static_cast<int>(seed));
      check_bounded(c, &worst);
      if (M != 1 && M != 4) continue;
      c.B = 3, c.C = c.T = 16, c.H = 19, c.W = M == 1 ? 20 : 21, c.seed = seed++; /* two chunks */
      set_schedule(static_cast<int>(seed));
      check_bounded(c, &worst);
    }
  std::printf("worst error beyond the last rounding: %.3g u sum|terms|\n", worst);
  host::options = {};
}

/* ---- Hopper's asynchronous products (forward_wgmma.cu) ---- */

/* Tiles of 64, 128 and 256 outputs: each is chosen where it would be more than half full, if it is wide enough for one
 * block. */
const int64_t kWgmmaOutputs[] = {40, 72, 136};
int columns_of(int64_t outputs) { return outputs > 128 ? 256 : outputs > 64 ? 128 : 64; }

class CudaWgmma : public testing::TestWithParam<int> {
 protected:
  Case base() const {
    Case c;
    set_type(c, GetParam());
    c.placement = Placement::kHeap, c.gradients = 0, c.wgmma = true;
    return c;
  }
};
INSTANTIATE_TEST_SUITE_P(Cuda, CudaWgmma, testing::Values(2, 3, kTf32), type_name);
/* The costlier tests: bfloat16 differs from float16 in how it is rounded and widened alone. */
class CudaWgmmaTwoTypes : public CudaWgmma {};
INSTANTIATE_TEST_SUITE_P(Cuda, CudaWgmmaTwoTypes, testing::Values(3, kTf32), type_name);

/* The output's bits; `wgmma` tells whether the products must be asynchronous ones. */
std::vector<uint64_t> forward_bits(const Case &c, int schedule, bool wgmma) {
  set_schedule(schedule);
  host::options.tensor_core = host::TensorCore::HOPPER;
  host::options.wanted_blocks = 1;
  host::products = 0;
  Problem p(c);
  EXPECT_EQ(p.forward(), PNN_OK) << p.error.message;
  EXPECT_EQ(host::products > 0, wgmma) << c.describe();
  EXPECT_TRUE(p.output.intact_outside()) << c.describe();
  if (wgmma) {
    EXPECT_EQ(host::product_columns, columns_of(c.T / c.groups)) << c.describe();
  }
  host::options = {};
  return p.output.bits();
}

/* Under the address sanitizer one run shows what a kernel reads and writes; its values are compared without. */
#if defined(PNN_HOST_ASAN)
constexpr bool kValues = false;
#else
constexpr bool kValues = true;
#endif

/* Against the plain loops and against the other kernel, whose sums have another order: exact ones, all the same bits.
 * bits(case, schedule, wgmma): those of what is compared. */
template <class Bits>
void check_both(const Case &c, Bits bits) {
  static int next = 0; /* of each result by itself */
  const int schedule = next++;
  SCOPED_TRACE(c.describe());
  const std::vector<uint64_t> ours = bits(c, schedule, true);
  if (!kValues) return;
  Case other = c;
  other.wgmma = false;
  EXPECT_EQ(ours, bits(other, schedule, false));
  set_schedule(schedule);
  host::options.wanted_blocks = 1;
  check_exact(c, 0);
  host::options = {};
}
void check_wgmma(const Case &c) {
  check_both(c, [](const Case &one, int schedule, bool wgmma) { return forward_bits(one, schedule, wgmma); });
}

TEST_P(CudaWgmma, ExactSums) {
  /* Maps that end inside a step of 64, pixels inside a warpgroup's 64, outputs inside a tile, groups, strides. */
  uint64_t seed = 3000;
  for (LayoutKind kind : {LayoutKind::kContiguous, LayoutKind::kChannelsLast})
    for (int64_t M : {1, 2, 4, 8, 16, 64}) {
      Case c = base();
      set_layouts(c, kind);
      c.B = 2, c.C = M > 8 ? 8 : M == 8 ? 24 : 80, c.H = 5, c.W = 8, c.M = M, c.level = M % 2 ? 0.5 : -1;
      c.T = kWgmmaOutputs[seed % 3], c.bias = seed % 4 != 0, c.seed = seed++;
      check_wgmma(c);
      c.groups = 2, c.C = M > 8 ? 16 : 32, c.T = 2 * kWgmmaOutputs[seed % 3], c.B = 1, c.seed = seed++;
      check_wgmma(c);
    }
}

TEST_P(CudaWgmma, Sizes) {
  uint64_t seed = 3100;
  for (int64_t pixels : {8, 64, 72, 200, 264}) { /* of tiles of 64 and 128 */
    Case c = base();
    c.C = 16, c.W = pixels, c.T = kWgmmaOutputs[seed % 3], c.seed = seed++;
    check_wgmma(c);
    set_layouts(c, LayoutKind::kChannelsLast);
    c.W = pixels - 3, c.T = kWgmmaOutputs[seed % 3], c.seed = seed++;
    check_wgmma(c);
  }
  for (int64_t maps : {16, 48, 64, 112, 320}) { /* one step, the ring's four, more */
    Case c = base();
    c.C = maps, c.W = 8, c.T = kWgmmaOutputs[seed % 3] + 1, c.seed = seed++;
    check_wgmma(c);
  }
  for (int64_t outputs : {33, 64, 65, 128, 129, 256, 300}) {
    Case c = base();
    c.C = 16, c.W = 8, c.T = outputs, c.seed = seed++;
    check_wgmma(c);
  }
}

TEST_P(CudaWgmma, MixedLayouts) {
  /* x along the pixels and y along the channels, and the other way round; weights and biases in any. */
  uint64_t seed = 3200;
  for (bool last : {false, true})
    for (LayoutKind vectors : {LayoutKind::kContiguous, LayoutKind::kNegative}) {
      Case c = base();
      c.input_layout = last ? LayoutKind::kChannelsLast : LayoutKind::kContiguous;
      c.output_layout = last ? LayoutKind::kContiguous : LayoutKind::kChannelsLast;
      c.weight_layout = c.vector_layout = vectors;
      c.B = 3, c.C = 32, c.M = 2, c.H = 4, c.W = 8, c.T = kWgmmaOutputs[seed % 3], c.seed = seed++;
      check_wgmma(c);
    }
  Case c = base(); /* channels-last under a stride */
  set_layouts(c, LayoutKind::kChannelsLast);
  c.B = 2, c.C = 32, c.H = 9, c.W = 11, c.stride_h = c.stride_w = 2, c.T = 72, c.seed = seed;
  check_wgmma(c);
}

TEST_P(CudaWgmmaTwoTypes, PairsAndSinglePixels) {
  /* x and y by words of two pixels where no more lie in a row, by elements where an image ends inside a pair. */
  uint64_t seed = 3250;
  for (auto [height, width] : {std::pair<int, int>{3, 14}, {7, 7}, {1, 1}, {9, 15}})
    for (int64_t M : {1, 2, 4, 8, 16})
      for (int groups : {1, 2}) {
        Case c = base();
        c.B = height * width == 1 ? 70 : 3, c.C = M > 8 ? 6 : 32, c.M = M, c.H = height, c.W = width, c.groups = groups;
        c.T = groups * kWgmmaOutputs[seed % 3] + groups, c.seed = seed++;
        check_wgmma(c);
      }
  for (LayoutKind input : {LayoutKind::kChannelsLast, LayoutKind::kNegative}) { /* y's channels end inside 16 bytes */
    Case c = base();
    c.input_layout = input, c.output_layout = LayoutKind::kChannelsLast;
    c.B = 2, c.C = 32, c.H = 4, c.W = 7, c.T = 44, c.seed = seed++;
    check_wgmma(c);
    c.input_layout = LayoutKind::kChannelsLast, c.groups = 2, c.C = 32 + 8, c.M = 4, c.T = 80; /* x's do, in 16 bits */
    check_wgmma(c);
  }
}

TEST_P(CudaWgmmaTwoTypes, EveryScheduleGivesTheSameBits) {
  for (int64_t outputs : kWgmmaOutputs)
    for (LayoutKind kind : {LayoutKind::kContiguous, LayoutKind::kChannelsLast}) {
      Case c = base();
      set_layouts(c, kind);
      c.fill = Fill::kRandom, c.level = 0.25;
      c.B = 1, c.C = 176, c.M = 2, c.H = 1, c.W = 136, c.T = outputs; /* six steps, the last one ragged */
      if (kind == LayoutKind::kChannelsLast) c.C = 96, c.M = 1, c.W = 72;
      const std::vector<uint64_t> first = forward_bits(c, 0, true);
      for (int i = 1; i < 2 * kSchedules; i++) EXPECT_EQ(forward_bits(c, i, true), first) << "schedule " << i;
    }
}

TEST_P(CudaWgmmaTwoTypes, TheTileDoesNotMatter) {
  for (bool norm : {false, true}) {
    Case c = base();
    c.fill = Fill::kRandom, c.C = 48, c.M = 4, c.W = 200, c.T = 136, c.norm = c.training = norm, c.eps = 1e-5;
    const std::vector<uint64_t> wide = forward_bits(c, 1, true);
    for (int64_t blocks : {3, 100}) { /* two of 128 pixels by 256 outputs, of 64 by 128, of 64 by 64 */
      set_schedule(1);
      host::options.tensor_core = host::TensorCore::HOPPER;
      host::options.wanted_blocks = blocks;
      Problem p(c);
      ASSERT_EQ(p.forward(), PNN_OK) << p.error.message;
      EXPECT_EQ(host::product_columns, blocks == 3 ? 128 : 64);
      EXPECT_EQ(p.output.bits(), wide);
    }
    host::options = {};
  }
}

TEST_P(CudaWgmma, BoundedErrors) {
  /* Infinities and NaN among them, which must reach no sum but their own: x beyond the maps is not read, nor 0 * inf.
   */
  uint64_t seed = 3300;
  double worst = 0;
  for (Fill fill : {Fill::kRandom, Fill::kCancelling, Fill::kSpecial})
    for (LayoutKind kind : {LayoutKind::kContiguous, LayoutKind::kChannelsLast})
      for (int64_t M : {1, 2, 16}) {
        Case c = base();
        set_layouts(c, kind);
        c.B = 2, c.C = M == 16 ? 8 : 48, c.M = M, c.H = 3, c.W = 8, c.T = kWgmmaOutputs[seed % 3], c.fill = fill;
        c.level = fill == Fill::kSpecial ? 1e5 : 0.25, c.seed = seed++; /* infinite as float16 */
        SCOPED_TRACE(c.describe());
        set_schedule(static_cast<int>(seed));
        host::options.wanted_blocks = 1;
        host::products = 0;
        Problem p(c);
        ASSERT_EQ(p.forward(), PNN_OK) << p.error.message;
        EXPECT_GT(host::products, 0);
        const ReferenceInput in = p.reference_input();
        Reference<long double> reference(in);
        ReferenceOutput<long double> out;
        reference.forward(out);
        expect_close(p.output, out.output, static_cast<double>(c.columns()) + 8, rounded_operands(c), c, "output",
                     &worst);
      }
  std::printf("worst error beyond the last rounding: %.3g u sum|terms|\n", worst);
  host::options = {};
}

/* The case with statistics of its own, on random data. */
Case in_training(Case c) {
  c.norm = c.training = true, c.fill = Fill::kRandom, c.eps = 1e-5, c.level = 0.25;
  return c;
}

/* In training, within bounds, with asynchronous products. */
void check_normalised(const Case &one, double *worst) {
  const Case c = in_training(one);
  set_schedule(static_cast<int>(c.seed));
  host::options.wanted_blocks = 1;
  host::products = 0;
  check_bounded(c, worst);
  EXPECT_GT(host::products, 0) << c.describe();
  host::options = {};
}

TEST_P(CudaWgmmaTwoTypes, Normalised) {
  /* Maps that end inside a step of 64; pixels in pairs, in channels, one by one. */
  uint64_t seed = 3350;
  double worst = 0;
  for (LayoutKind kind : {LayoutKind::kContiguous, LayoutKind::kChannelsLast})
    for (int64_t M : {1, 2, 4, 8, 16}) {
      Case c = base();
      set_layouts(c, kind);
      c.norm = true, c.affine = M != 4, c.bias = M != 2, c.groups = M == 8 ? 2 : 1;
      c.B = 2, c.C = M > 8 ? 8 : M == 8 ? 12 : 80, c.H = 5, c.W = seed % 3 ? 8 : 7, c.M = M, c.level = M % 2 ? 0.5 : -1;
      c.T = c.groups * kWgmmaOutputs[seed % 3], c.seed = seed++;
      check_wgmma(c);
      check_normalised(c, &worst);
    }
  for (int64_t outputs : kWgmmaOutputs) {
    Case c = in_training(base());
    c.B = 1, c.C = 176, c.M = 2, c.H = 1, c.W = 136, c.T = outputs;
    const std::vector<uint64_t> first = forward_bits(c, 0, true);
    for (int i = 1; kValues && i < kSchedules; i++) EXPECT_EQ(forward_bits(c, i, true), first) << "schedule " << i;
  }
  std::printf("worst error beyond the last rounding: %.3g u sum|terms|\n", worst);
}

TEST_P(CudaWgmmaTwoTypes, AnInfiniteMeanStaysInItsGroup) {
  /* A group's 48 maps end inside a step of 64; behind them stand the next group's, one of which has an infinite mean.
   */
  Case c = in_training(base());
  c.B = 1, c.C = 96, c.groups = 2, c.H = 1, c.W = 8, c.T = 80;
  host::options.wanted_blocks = 1;
  host::products = 0;
  Problem p(c);
  p.input.set(50 * c.W, HUGE_VAL);
  p.input.seal();
  ASSERT_EQ(p.forward(), PNN_OK) << p.error.message;
  EXPECT_GT(host::products, 0);
  for (int64_t i = 0; i < p.output.count(); i++)
    EXPECT_EQ(std::isfinite(p.output.value(i)), i < p.output.count() / 2) << i;
  host::options = {};
}

TEST_P(CudaWgmma, OtherLayersAreLeftAlone) {
  std::vector<Case> cases(7, base());
  for (Case &c : cases) c.B = 2, c.C = 32, c.H = 4, c.W = 8, c.T = 40;
  cases[0].T = 32;
  cases[1].activation = PNN_ACTIVATION_IDENTITY;
  cases[2].M = 3;
  cases[3].C = 24;
  cases[4].noise = PNN_NOISE_TENSOR;
  set_types(cases[5], {PNN_FLOAT32, cases[5].weight_type});
  set_types(cases[6], {PNN_FLOAT32, PNN_FLOAT32});
  cases[5].tf32 = cases[6].tf32 = false;
  for (const Case &c : cases) forward_bits(c, 0, false);
}

/* ---- the input's gradient by them (input_gradient_wgmma.cu) ---- */

/* Tiles of 64, 128 and 256 maps, chosen as those of outputs are. */
const int64_t kWgmmaMaps[] = {48, 80, 144};

class CudaWgmmaGradient : public CudaWgmma {
 protected:
  Case base() const {
    Case c = CudaWgmma::base();
    c.gradients = kGradInput;
    return c;
  }
};
INSTANTIATE_TEST_SUITE_P(Cuda, CudaWgmmaGradient, testing::Values(2, 3, kTf32), type_name);
class CudaWgmmaGradientTwoTypes : public CudaWgmmaGradient {};
INSTANTIATE_TEST_SUITE_P(Cuda, CudaWgmmaGradientTwoTypes, testing::Values(3, kTf32), type_name);

/* TF32 has no tile of 256 maps. */
int map_columns_of(const Case &c) { return std::min(columns_of(c.K() / c.groups), c.tf32 ? 128 : 256); }

/* dx's bits; `wgmma` tells whether the products must be asynchronous ones. */
std::vector<uint64_t> gradient_bits(const Case &c, int schedule, bool wgmma, int64_t blocks = 1) {
  set_schedule(schedule);
  host::options.tensor_core = host::TensorCore::HOPPER;
  host::options.wanted_blocks = blocks;
  Problem p(c);
  if (c.norm) { /* its statistics */
    EXPECT_EQ(p.forward(), PNN_OK) << p.error.message;
  }
  host::products = 0;
  EXPECT_EQ(p.backward(), PNN_OK) << p.error.message;
  EXPECT_EQ(host::products > 0, wgmma) << c.describe();
  EXPECT_TRUE(p.grad_input.intact_outside()) << c.describe();
  if (wgmma && blocks == 1) {
    EXPECT_EQ(host::product_columns, map_columns_of(c)) << c.describe();
  }
  host::options = {};
  return p.grad_input.bits();
}

void check_gradient(const Case &c) {
  check_both(c, [](const Case &one, int schedule, bool wgmma) { return gradient_bits(one, schedule, wgmma); });
}

TEST_P(CudaWgmmaGradient, ExactSums) {
  /* Outputs that end inside a step of 64, pixels inside a warpgroup's 64, maps inside a tile, groups. */
  uint64_t seed = 3400;
  for (LayoutKind kind : {LayoutKind::kContiguous, LayoutKind::kChannelsLast})
    for (int64_t M : {1, 2, 4, 8, 16, 32, 64}) {
      Case c = base();
      set_layouts(c, kind);
      c.B = 2, c.H = 5, c.W = 8, c.M = M, c.level = M % 2 ? 0.5 : -1;
      c.C = M > 8 ? 8 : (kWgmmaMaps[seed % 3] / M + 7) / 8 * 8, c.T = seed % 2 ? 72 : 40, c.seed = seed++;
      check_gradient(c);
      c.groups = 2, c.C = M > 8 ? 16 : 2 * c.C, c.T = seed % 2 ? 144 : 16, c.B = 1, c.seed = seed++;
      check_gradient(c);
    }
}

TEST_P(CudaWgmmaGradient, Sizes) {
  uint64_t seed = 3500;
  for (int64_t pixels : {8, 64, 72, 200, 264, 520}) { /* of tiles of 64 that warpgroups take in turn */
    Case c = base();
    c.T = 16, c.W = pixels, c.C = kWgmmaMaps[seed % 3], c.seed = seed++;
    check_gradient(c);
    set_layouts(c, LayoutKind::kChannelsLast);
    c.W = pixels - 3, c.C = kWgmmaMaps[seed % 3], c.seed = seed++;
    check_gradient(c);
  }
  for (int64_t outputs : {1, 7, 12, 16, 33, 63, 64, 65, 76, 129, 200, 292}) { /* contiguous, they end anywhere */
    Case c = base();
    c.T = outputs, c.W = 8, c.C = kWgmmaMaps[seed % 3], c.seed = seed++;
    check_gradient(c);
    if (outputs % (c.tf32 ? 4 : 8)) continue;
    set_layouts(c, LayoutKind::kChannelsLast);
    check_gradient(c);
  }
  if (base().tf32) /* up to what shared memory has room for: of 128 maps and, in a narrower tile, of 64 */
    for (int64_t outputs : {448, 449, 896}) {
      Case c = base();
      c.T = outputs, c.W = 8, c.C = 80, c.seed = seed++;
      host::options.wanted_blocks = 1;
      Problem p(c);
      ASSERT_EQ(p.backward(), PNN_OK) << p.error.message;
      EXPECT_EQ(host::product_columns, outputs > 448 ? 64 : 128);
      check_exact(c, 0);
      host::options = {};
    }
  for (int64_t maps : {48, 64, 80, 128, 144, 256, 272, 400}) {
    Case c = base();
    c.T = 16, c.W = 8, c.C = maps, c.seed = seed++;
    check_gradient(c);
  }
}

TEST_P(CudaWgmmaGradient, MixedLayouts) {
  /* x, g and dx each contiguous or channels-last; weights in any layout. */
  uint64_t seed = 3600;
  const int64_t masks[] = {1, 4, 2, 16, 8, 1, 32, 2};
  for (unsigned mixture = 0; mixture < 8; mixture++) {
    const auto layout = [&](unsigned bit) {
      return mixture & bit ? LayoutKind::kChannelsLast : LayoutKind::kContiguous;
    };
    Case c = base();
    c.input_layout = layout(1), c.grad_output_layout = layout(2), c.grad_input_layout = layout(4);
    if (mixture % 2) c.weight_layout = LayoutKind::kNegative;
    c.M = masks[mixture], c.B = 3, c.T = 24, c.H = 4, c.W = 8, c.C = c.M < 8 ? 48 : 8, c.seed = seed++;
    check_gradient(c);
  }
  Case c = base(); /* channels-last under a stride */
  set_layouts(c, LayoutKind::kChannelsLast);
  c.B = 2, c.C = 48, c.H = 9, c.W = 11, c.stride_h = c.stride_w = 2, c.T = 72, c.seed = seed;
  check_gradient(c);
}

TEST_P(CudaWgmmaGradientTwoTypes, AnyLayouts) {
  /* x and g by their channels-last copies; dx by words of two pixels or, where an image ends inside one, by elements.
   */
  uint64_t seed = 3650;
  for (auto [height, width, stride] : {std::tuple<int, int, int>{7, 7, 1}, {2, 14, 1}, {9, 7, 2}})
    for (int64_t M : {1, 2, 4, 8, 16, 32, 64}) {
      Case c = base();
      c.B = 3, c.H = height, c.W = width, c.stride_h = c.stride_w = stride, c.M = M;
      c.C = M > 8 ? 8 : (kWgmmaMaps[seed % 3] / M + 7) / 8 * 8, c.T = seed % 2 ? 72 : 40, c.seed = seed++;
      check_gradient(c);
      c.groups = 2, c.C *= 2, c.T = 80, c.B = 1, c.seed = seed++;
      check_gradient(c);
    }
  for (LayoutKind kind : {LayoutKind::kNegative, LayoutKind::kPermuted, LayoutKind::kSliced}) {
    Case c = base();
    c.grad_output_layout = c.grad_input_layout = kind;
    c.B = 3, c.C = 48, c.H = 4, c.W = 8, c.T = 40, c.seed = seed++;
    check_gradient(c);
  }
  Case c = base(); /* dx's channels end inside 16 bytes */
  c.grad_input_layout = LayoutKind::kChannelsLast, c.B = 2, c.C = 20, c.M = 4, c.H = 4, c.W = 8, c.T = 40;
  check_gradient(c);
}

TEST_P(CudaWgmmaGradientTwoTypes, EveryScheduleGivesTheSameBits) {
  for (int64_t maps : kWgmmaMaps)
    for (LayoutKind kind : {LayoutKind::kContiguous, LayoutKind::kChannelsLast}) {
      Case c = base();
      set_layouts(c, kind);
      c.fill = Fill::kRandom, c.level = 0.25;
      /* Two steps, the last one ragged; of two, three and four warpgroups some have a second tile of pixels. */
      c.B = 1, c.T = 72, c.M = 2, c.H = 1, c.W = maps > 128 ? 136 : maps > 64 ? 200 : 264, c.C = maps / 2;
      const std::vector<uint64_t> first = gradient_bits(c, 0, true);
      for (int i = 1; i < 2 * kSchedules; i++) EXPECT_EQ(gradient_bits(c, i, true), first) << "schedule " << i;
    }
}

TEST_P(CudaWgmmaGradientTwoTypes, TheTileDoesNotMatter) {
  for (int64_t M : {1, 4, 64}) {
    Case c = base();
    c.fill = Fill::kRandom, c.C = 192 / M, c.M = M, c.W = 456, c.T = 72;
    const std::vector<uint64_t> wide = gradient_bits(c, 1, true);
    for (int64_t blocks : {4, 5, 9, 100}) { /* 4 of 128 pixels by 256 maps, 6 of 192 by 128; then of 64 */
      EXPECT_EQ(gradient_bits(c, 1, true, blocks), wide);
      EXPECT_EQ(host::product_columns, blocks == 4 && !c.tf32 ? 256 : blocks <= 5 ? 128 : 64);
    }
  }
}

TEST_P(CudaWgmmaGradient, BoundedErrors) {
  /* Infinities and NaN among them, in x and in g, which must reach no sum but their own. */
  uint64_t seed = 3700;
  double worst = 0;
  for (Fill fill : {Fill::kRandom, Fill::kCancelling, Fill::kSpecial})
    for (LayoutKind kind : {LayoutKind::kContiguous, LayoutKind::kChannelsLast})
      for (int64_t M : {1, 2, 32}) {
        Case c = base();
        set_layouts(c, kind);
        c.B = 2, c.C = M == 32 ? 8 : 48, c.M = M, c.H = 3, c.W = 8, c.T = seed % 2 ? 72 : 24, c.fill = fill;
        c.level = fill == Fill::kSpecial ? 1e5 : 0.25, c.seed = seed++; /* infinite as float16 */
        SCOPED_TRACE(c.describe());
        set_schedule(static_cast<int>(seed));
        host::options.wanted_blocks = 1;
        Problem p(c);
        ASSERT_EQ(p.forward(), PNN_OK) << p.error.message;
        host::products = 0;
        ASSERT_EQ(p.backward(), PNN_OK) << p.error.message;
        EXPECT_GT(host::products, 0);
        const ReferenceInput in = p.reference_input();
        Reference<long double> reference(in);
        ReferenceOutput<long double> out;
        reference.forward(out);
        reference.backward(out, in.mean, in.variance);
        expect_close(p.grad_input, out.grad_input, static_cast<double>(c.T + M) + 8, rounded_operands(c), c,
                     "grad_input", &worst);
      }
  std::printf("worst error beyond the last rounding: %.3g u sum|terms|\n", worst);
  host::options = {};
}

TEST_P(CudaWgmmaGradientTwoTypes, Normalised) {
  /* Without statistics of its own a layer's V has the scale in it, and that is all. */
  uint64_t seed = 3750;
  double worst = 0;
  for (LayoutKind kind : {LayoutKind::kContiguous, LayoutKind::kChannelsLast})
    for (int64_t M : {1, 2, 4, 8, 16, 32}) {
      Case c = base();
      set_layouts(c, kind);
      c.norm = true, c.affine = M != 4;
      c.B = 2, c.H = 5, c.W = seed % 3 ? 8 : 7, c.M = M, c.level = M % 2 ? 0.5 : -1;
      c.C = M > 8 ? 8 : (kWgmmaMaps[seed % 3] / M + 7) / 8 * 8, c.T = 24, c.seed = seed++;
      if (M == 1 || M == 8) c.groups = 2, c.C *= 2, c.T = 48;
      check_gradient(c);
      check_normalised(c, &worst);
    }
  for (int64_t maps : kWgmmaMaps) { /* of two and three warpgroups some have a second tile of pixels */
    Case c = in_training(base());
    c.B = 1, c.T = 72, c.M = 2, c.H = 1, c.W = maps > 64 ? 136 : 200, c.C = maps / 2;
    const std::vector<uint64_t> first = gradient_bits(c, 0, true, 2);
    EXPECT_EQ(host::product_columns, maps > 64 ? 128 : 64);
    EXPECT_EQ(gradient_bits(c, 0, true, 100), first); /* by tiles of 64 */
    EXPECT_EQ(host::product_columns, 64);
    for (int i = 1; kValues && i < kSchedules; i++) EXPECT_EQ(gradient_bits(c, i, true, 2), first) << "schedule " << i;
  }
  std::printf("worst error beyond the last rounding: %.3g u sum|terms|\n", worst);
}

TEST_P(CudaWgmmaGradient, OtherLayersAreLeftAlone) {
  std::vector<Case> cases(12, base());
  for (Case &c : cases) c.B = 2, c.C = 48, c.H = 4, c.W = 8, c.T = 40;
  cases[0].C = 32;
  cases[1].activation = PNN_ACTIVATION_IDENTITY;
  cases[2].M = 3;
  cases[3].H = 3, cases[3].W = 7, cases[3].C = 18,
  cases[3].M = 8; /* nor do the channels of x's copy lie in runs of 16 bytes, */
  cases[4].C = 40;
  cases[5].noise = PNN_NOISE_TENSOR;
  set_types(cases[6], {PNN_FLOAT32, cases[6].weight_type});
  set_types(cases[7], {PNN_FLOAT32, PNN_FLOAT32});
  cases[6].tf32 = cases[7].tf32 = false;
  cases[8].grad_output_layout = LayoutKind::kChannelsLast, cases[8].T = 42; /* g's channels end inside 16 bytes */
  cases[9].H = 3, cases[9].W = 7, cases[9].T = 42;                          /* nor of g's */
  cases[10].C = 1, cases[10].M = 128;
  cases[11].T = cases[11].tf32 ? 897 : 1793, cases[11].W = 16; /* more outputs than shared memory has room for */
  for (const Case &c : cases) gradient_bits(c, 0, false);
  Case c = base(); /* without products, and with x's */
  c.B = 2, c.C = 48, c.H = 4, c.W = 8, c.T = 40, c.gradients = kGradBias;
  Problem p(c);
  ASSERT_EQ(p.forward(), PNN_OK);
  host::products = 0;
  ASSERT_EQ(p.backward(), PNN_OK);
  EXPECT_EQ(host::products, 0);
  c.gradients |= kGradInput;
  check_gradient(c);
}

/* ---- the weight's gradient by asynchronous products (weight_gradient_wgmma.cu) ---- */

class CudaWgmmaWeights : public testing::TestWithParam<int> {
 protected:
  Case base() const {
    Case c;
    set_type(c, GetParam());
    c.placement = Placement::kHeap, c.gradients = kGradWeight | kGradBias, c.wgmma = true;
    return c;
  }
};
INSTANTIATE_TEST_SUITE_P(Cuda, CudaWgmmaWeights, testing::Values(2, 3, kTf32), type_name);
class CudaWgmmaWeightsTwoTypes : public CudaWgmmaWeights {};
INSTANTIATE_TEST_SUITE_P(Cuda, CudaWgmmaWeightsTwoTypes, testing::Values(3, kTf32), type_name);

/* The gradients' bits; `wgmma` tells whether the products must be asynchronous ones. Of tiles of 64 outputs by 64 maps,
 * or of 128 or 256 outputs by 128 maps, the widest are chosen that give `wanted_blocks`. */
std::vector<uint64_t> weight_bits(const Case &c, int schedule, bool wgmma, int64_t wanted_blocks = 1,
                                  int64_t multiprocessors = 132) {
  set_schedule(schedule);
  host::options.tensor_core = host::TensorCore::HOPPER;
  host::options.wanted_blocks = wanted_blocks, host::options.multiprocessors = multiprocessors;
  Problem p(c);
  if (c.norm) { /* its statistics */
    EXPECT_EQ(p.forward(), PNN_OK) << p.error.message;
  }
  host::products = 0;
  EXPECT_EQ(p.backward(), PNN_OK) << p.error.message;
  EXPECT_EQ(host::products > 0, wgmma) << c.describe();
  if (wgmma) {
    const int64_t outputs = c.T / c.groups,
                  tiles = c.groups * ((c.columns() + 127) / 128) * ((c.samples() + 255) / 256);
    const bool wide = outputs > 128 && tiles * ((outputs + 255) / 256) >= wanted_blocks;
    const bool middle = outputs > 64 && tiles * ((outputs + 127) / 128) >= 2 * wanted_blocks;
    EXPECT_EQ(host::product_columns, wide || middle ? 128 : 64) << c.describe();
  }
  host::options = {};
  std::vector<uint64_t> all = p.grad_weight.bits();
  if (p.grad_bias.present()) {
    const std::vector<uint64_t> bias = p.grad_bias.bits();
    all.insert(all.end(), bias.begin(), bias.end());
  }
  return all;
}

/* Against the other kernel, whose sums have another order, and one case of five against the plain loops: exact ones,
 * all the same bits. */
void check_wgmma_weights(const Case &c) {
  static int next = 0;
  const int schedule = next++;
  SCOPED_TRACE(c.describe());
  const std::vector<uint64_t> bits = weight_bits(c, schedule, true);
  if (!kValues) return;
  Case other = c;
  other.wgmma = false;
  EXPECT_EQ(bits, weight_bits(other, schedule, false));
  if (schedule % 5) return;
  set_schedule(schedule);
  host::options.wanted_blocks = 1;
  check_exact(c, 0);
  host::options = {};
}

TEST_P(CudaWgmmaWeights, ExactSums) {
  /* Maps that end inside a tile, pixels inside a step of 64 and inside its halves, outputs inside a tile, groups. */
  uint64_t seed = 5000;
  for (LayoutKind kind : {LayoutKind::kContiguous, LayoutKind::kChannelsLast})
    for (int64_t M : {1, 2, 4, 8, 16, 64}) {
      Case c = base();
      set_layouts(c, kind);
      c.B = 3, c.C = M > 8 ? 8 : M == 8 ? 24 : 80, c.H = 5, c.W = 8, c.M = M, c.level = M % 2 ? 0.5 : -1;
      c.T = kWgmmaOutputs[seed % 3], c.bias = seed % 4 != 0, c.seed = seed++;
      if (!c.bias) c.gradients = kGradWeight;
      check_wgmma_weights(c);
      c.groups = 2, c.C = M > 8 ? 16 : 32, c.T = 2 * kWgmmaOutputs[seed % 3], c.B = 1, c.seed = seed++;
      check_wgmma_weights(c);
    }
}

TEST_P(CudaWgmmaWeights, Sizes) {
  uint64_t seed = 5100;
  for (int64_t pixels : {8, 32, 40, 64, 72, 200, 256}) { /* of one piece: some of a half, a half, both, more steps */
    Case c = base();
    c.C = 16, c.W = pixels, c.T = kWgmmaOutputs[seed % 3], c.seed = seed++;
    check_wgmma_weights(c);
    set_layouts(c, LayoutKind::kChannelsLast);
    c.W = pixels - 3, c.T = kWgmmaOutputs[seed % 3], c.seed = seed++;
    check_wgmma_weights(c);
  }
  for (int64_t pixels : {520, 776}) { /* several pieces, the last one short; images that end anywhere */
    Case c = base();
    c.B = 2, c.C = 16, c.W = pixels, c.T = kWgmmaOutputs[seed % 3], c.seed = seed++;
    check_wgmma_weights(c);
    set_layouts(c, LayoutKind::kChannelsLast);
    c.B = pixels / 7, c.H = 1, c.W = 7, c.T = kWgmmaOutputs[seed % 3], c.seed = seed++;
    check_wgmma_weights(c);
    c.B = pixels, c.W = 1, c.T = kWgmmaOutputs[seed % 3], c.seed = seed++; /* a linear layer */
    check_wgmma_weights(c);
    c.B = 3, c.H = pixels / 3, c.seed = seed++;
    check_wgmma_weights(c);
  }
  for (int64_t maps : {16, 48, 64, 112, 144}) {
    Case c = base();
    c.C = maps, c.W = 72, c.T = kWgmmaOutputs[seed % 3] + 1, c.seed = seed++;
    check_wgmma_weights(c);
  }
  for (int64_t outputs : {33, 63, 64, 65, 128, 129, 256, 300}) {
    Case c = base();
    c.C = 16, c.W = 72, c.T = outputs, c.seed = seed++;
    check_wgmma_weights(c);
  }
  for (int64_t outputs : {44, 76, 140}) { /* where g's channels are contiguous they end behind a run of four */
    Case c = base();
    if (!c.tf32) break;
    set_layouts(c, LayoutKind::kChannelsLast);
    c.C = 16, c.W = 36, c.T = outputs, c.seed = seed++;
    check_wgmma_weights(c);
    c.groups = 2, c.C = 32, c.T = 2 * outputs, c.seed = seed++;
    check_wgmma_weights(c);
  }
}

TEST_P(CudaWgmmaWeights, MixedLayouts) {
  /* x along the pixels and g along the channels, and the other way round; gradients in any. */
  uint64_t seed = 5200;
  for (bool last : {false, true})
    for (LayoutKind vectors : {LayoutKind::kContiguous, LayoutKind::kNegative}) {
      for (int64_t outputs : kWgmmaOutputs) {
        Case c = base();
        c.input_layout = last ? LayoutKind::kChannelsLast : LayoutKind::kContiguous;
        c.grad_output_layout = last ? LayoutKind::kContiguous : LayoutKind::kChannelsLast;
        c.grad_weight_layout = c.vector_layout = vectors;
        c.B = 3, c.C = 32, c.M = 2, c.H = 4, c.W = 8, c.T = outputs, c.seed = seed++;
        check_wgmma_weights(c);
      }
    }
  Case c = base(); /* channels-last under a stride */
  set_layouts(c, LayoutKind::kChannelsLast);
  c.B = 2, c.C = 32, c.H = 9, c.W = 11, c.stride_h = c.stride_w = 2, c.T = 72, c.seed = seed;
  check_wgmma_weights(c);
}

TEST_P(CudaWgmmaWeightsTwoTypes, AnyLayouts) {
  /* By channels-last copies. */
  uint64_t seed = 5250;
  for (auto [height, width, stride] : {std::tuple<int, int, int>{7, 7, 1}, {2, 14, 1}, {9, 7, 2}})
    for (int64_t outputs : kWgmmaOutputs) {
      Case c = base();
      c.B = 7, c.H = height, c.W = width, c.stride_h = c.stride_w = stride;
      c.C = 40, c.M = 2, c.T = outputs, c.seed = seed++;
      check_wgmma_weights(c);
      c.groups = 2, c.C = 32, c.T = 2 * outputs, c.seed = seed++;
      check_wgmma_weights(c);
    }
  for (LayoutKind kind : {LayoutKind::kNegative, LayoutKind::kBroadcast}) {
    Case c = base();
    c.grad_output_layout = kind, c.B = 3, c.C = 32, c.H = 4, c.W = 8, c.T = 40, c.seed = seed++;
    check_wgmma_weights(c);
  }
}

TEST_P(CudaWgmmaWeightsTwoTypes, EveryScheduleGivesTheSameBits) {
  for (int64_t outputs : kWgmmaOutputs)
    for (LayoutKind kind : {LayoutKind::kContiguous, LayoutKind::kChannelsLast}) {
      Case c = base();
      set_layouts(c, kind);
      c.fill = Fill::kRandom, c.level = 0.25;
      c.B = 1, c.C = 80, c.M = 2, c.H = 1, c.W = 456, c.T = outputs; /* eight steps, the first one short */
      if (kind == LayoutKind::kChannelsLast) c.C = 160, c.M = 1, c.W = 453;
      const std::vector<uint64_t> first = weight_bits(c, 0, true, 1, 1);
      for (int i = 1; i < kSchedules; i++) EXPECT_EQ(weight_bits(c, i, true, 1, 1), first) << "schedule " << i;
    }
}

TEST_P(CudaWgmmaWeightsTwoTypes, TheTileDoesNotMatter) {
  for (LayoutKind kind : {LayoutKind::kContiguous, LayoutKind::kChannelsLast}) {
    Case c = base();
    set_layouts(c, kind);
    c.fill = Fill::kRandom, c.C = 160, c.M = 1, c.W = 200, c.T = 136;
    const std::vector<uint64_t> wide = weight_bits(c, 1, true); /* two tiles of 256 by 128 */
    for (int64_t blocks : {3, 100}) { /* four of 128 by 128 are too few for 2 * 3, too: nine of 64 by 64 */
      EXPECT_EQ(weight_bits(c, 2, true, blocks), wide);
    }
  }
}

TEST_P(CudaWgmmaWeights, BoundedErrors) {
  /* Infinities and NaN among them, which must reach no sum but their own: of pixels beyond nothing is read, nor
   * 0 * inf. */
  uint64_t seed = 5300;
  double worst = 0;
  for (Fill fill : {Fill::kRandom, Fill::kCancelling, Fill::kSpecial})
    for (LayoutKind kind : {LayoutKind::kContiguous, LayoutKind::kChannelsLast})
      for (int64_t M : {1, 2, 16}) {
        Case c = base();
        set_layouts(c, kind);
        c.B = 2, c.C = M == 16 ? 3 : 48 / M, c.M = M, c.H = 5, c.W = 16, c.T = kWgmmaOutputs[seed % 3], c.fill = fill;
        if (c.tf32) c.W = 12; /* a first step that is short here, too */
        if (kind == LayoutKind::kChannelsLast && M > 1) c.C = M == 16 ? 8 : 24;
        c.level = fill == Fill::kSpecial ? 1e5 : 0.25, c.seed = seed++; /* infinite as float16 */
        SCOPED_TRACE(c.describe());
        set_schedule(static_cast<int>(seed));
        host::options.wanted_blocks = 1;
        host::products = 0;
        Problem p(c);
        const ReferenceInput in = p.reference_input();
        ASSERT_EQ(p.backward(), PNN_OK) << p.error.message;
        EXPECT_GT(host::products, 0);
        Reference<long double> reference(in);
        ReferenceOutput<long double> out;
        reference.backward(out, in.mean, in.variance);
        const double n = static_cast<double>(c.samples());
        expect_close(p.grad_weight, out.grad_weight, n + 8, rounded_operands(c), c, "grad_weight", &worst);
        expect_close(p.grad_bias, out.grad_bias, n, 0, c, "grad_bias", &worst);
      }
  std::printf("worst error beyond the last rounding: %.3g u sum|terms|\n", worst);
  host::options = {};
}

TEST_P(CudaWgmmaWeightsTwoTypes, Normalised) {
  /* Maps that end inside a tile, a first step that is short. */
  uint64_t seed = 5350;
  double worst = 0;
  for (LayoutKind kind : {LayoutKind::kContiguous, LayoutKind::kChannelsLast})
    for (int64_t M : {1, 2, 4, 8, 16}) {
      Case c = base();
      set_layouts(c, kind);
      c.norm = true, c.affine = M != 4, c.groups = M == 8 ? 2 : 1;
      c.B = 2, c.C = M > 8 ? 8 : M == 8 ? 48 : 80, c.H = 5, c.W = seed % 3 ? 8 : 7, c.M = M, c.level = M % 2 ? 0.5 : -1;
      c.T = c.groups * kWgmmaOutputs[seed % 3] / 8 * 8, c.seed = seed++;
      check_wgmma_weights(c);
      check_normalised(c, &worst);
    }
  for (int64_t outputs : kWgmmaOutputs) {
    Case c = in_training(base());
    c.B = 1, c.C = 80, c.M = 2, c.H = 1, c.W = 200, c.T = outputs;
    const std::vector<uint64_t> first = weight_bits(c, 0, true);
    for (int i = 1; kValues && i < kSchedules; i++) EXPECT_EQ(weight_bits(c, i, true), first) << "schedule " << i;
    EXPECT_EQ(weight_bits(c, 0, true, 100), first); /* by tiles of 64 outputs */
  }
  std::printf("worst error beyond the last rounding: %.3g u sum|terms|\n", worst);
}

TEST_P(CudaWgmmaWeights, OtherLayersAreLeftAlone) {
  std::vector<Case> cases(11, base());
  for (Case &c : cases) c.B = 2, c.C = 32, c.H = 4, c.W = 8, c.T = 40;
  cases[0].T = 32;
  cases[1].activation = PNN_ACTIVATION_IDENTITY;
  cases[2].M = 3;
  cases[3].H = 3, cases[3].W = 7, cases[3].C = 6,
  cases[3].M = 8; /* nor do the channels of x's copy lie in runs of 16 bytes, */
  cases[4].C = 24;
  cases[5].noise = PNN_NOISE_TENSOR;
  cases[6].tf32 = cases[7].tf32 = false;
  set_types(cases[6], {PNN_FLOAT32, cases[6].weight_type});
  set_types(cases[7], {PNN_FLOAT32, PNN_FLOAT32});
  cases[8].grad_output_layout = LayoutKind::kChannelsLast; /* g's channels end inside 16 bytes */
  cases[8].T = 42;
  cases[9].H = 3, cases[9].W = 7, cases[9].T = 42; /* nor of g's */
  cases[10].gradients = kGradBias;                 /* no product at all */
  for (const Case &c : cases) {
    SCOPED_TRACE(c.describe());
    host::options.wanted_blocks = 1;
    Problem p(c);
    ASSERT_EQ(p.forward(), PNN_OK) << p.error.message;
    host::products = 0;
    ASSERT_EQ(p.backward(), PNN_OK) << p.error.message;
    EXPECT_EQ(host::products, 0);
    check_exact(c, 0);
    host::options = {};
  }
  /* Channels-last gradients whose images lie apart: the pixels are not evenly spaced. */
  Case c = base();
  set_layouts(c, LayoutKind::kChannelsLast);
  c.B = 4, c.C = 32, c.H = 4, c.W = 8, c.T = 40;
  Problem p(c);
  for (pnn_tensor *t : {&p.params.input, &p.params.output, &p.params.grad_output}) t->size[0] = 2, t->stride[0] *= 2;
  ASSERT_EQ(p.run(PNN_PASS_FORWARD), PNN_OK) << p.error.message;
  host::products = 0;
  ASSERT_EQ(p.run(PNN_PASS_BACKWARD), PNN_OK) << p.error.message;
  EXPECT_EQ(host::products, 0);
}

/* x to 11 bits, ties to even. */
double to_eleven_bits(double x) {
  int exponent;
  const double fraction = std::frexp(x, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(fraction, 11)), exponent - 11);
}

TEST(CudaWgmmaWeightsTf32, RoundsEachOperandOnce) {
  /* Of one pixel with a gradient, dV is one product of two rounded numbers, and dbias the gradient as it is. */
  for (LayoutKind kind : {LayoutKind::kContiguous, LayoutKind::kChannelsLast})
    for (int64_t outputs : kWgmmaOutputs) {
      Case c;
      set_type(c, kTf32);
      c.placement = Placement::kHeap, c.gradients = kGradWeight | kGradBias, c.wgmma = true;
      set_layouts(c, kind);
      c.fill = Fill::kRandom, c.level = 0, c.B = c.H = 1, c.C = 32, c.W = 68,
      c.T = outputs; /* three steps, one short */
      for (int64_t pixel : {0, 1, 6, 29, 31, 32, 50, 63, 64, 67}) {
        set_schedule(static_cast<int>(pixel));
        host::options.wanted_blocks = 1;
        Problem p(c);
        for (int64_t i = 0; i < p.grad_output.count(); i++)
          if (i % c.W != pixel) p.grad_output.set(i, 0);
        p.grad_output.seal();
        host::products = 0;
        ASSERT_EQ(p.backward(), PNN_OK) << p.error.message;
        EXPECT_GT(host::products, 0);
        int64_t wrong = 0;
        for (int64_t t = 0; t < c.T; t++) {
          const double g = p.grad_output.value(t * c.W + pixel);
          wrong += p.grad_bias.value(t) != g;
          for (int64_t k = 0; k < c.C; k++) {
            const double x = std::max(0.0, p.input.value(k * c.W + pixel));
            wrong += p.grad_weight.value(t * c.C + k) != to_eleven_bits(g) * to_eleven_bits(x);
          }
        }
        EXPECT_EQ(wrong, 0) << c.describe() << ", pixel " << pixel;
        host::options = {};
      }
    }
}

class CudaWgmmaWeightsWavefronts : public CudaWgmmaWeights {};
INSTANTIATE_TEST_SUITE_P(Cuda, CudaWgmmaWeightsWavefronts, testing::Values(2, kTf32), type_name);

TEST_P(CudaWgmmaWeightsWavefronts, TheOperandMeetsNoBankConflicts) {
  for (LayoutKind kind : {LayoutKind::kContiguous, LayoutKind::kChannelsLast})
    for (int64_t outputs : kWgmmaOutputs) {
      Case c;
      set_type(c, GetParam());
      c.placement = Placement::kHeap, c.gradients = kGradWeight, c.wgmma = true;
      set_layouts(c, kind);
      c.C = 128, c.H = 8, c.W = 16, c.T = outputs;
      Problem p(c);
      host::options.wanted_blocks = 1;
      ASSERT_EQ(p.forward(), PNN_OK);
      host::options.count_wavefronts = true;
      host::wavefronts = {};
      host::products = 0;
      ASSERT_EQ(p.run(PNN_PASS_BACKWARD), PNN_OK);
      EXPECT_GT(host::products, 0);
      EXPECT_EQ(host::wavefronts.actual[host::STORE], host::wavefronts.ideal[host::STORE]);
      EXPECT_EQ(host::wavefronts.actual[host::LOAD], host::wavefronts.ideal[host::LOAD]);
      EXPECT_EQ(host::wavefronts.actual[host::MATRIX], host::wavefronts.ideal[host::MATRIX]);
      host::options = {};
    }
}

/* ---- channels-last copies (channels_last.cu) ---- */

TEST(CudaChannelsLast, CopiesAnyStridesWithoutBankConflicts) {
  struct Strides {
    int64_t batch, channel, row, column;
  };
  const int64_t B = 5, H = 3, W = 7, channels[2] = {80, 24}; /* of x and g: tiles that both end inside */
  pnn_cuda::Layer layer = {};
  layer.batch = B, layer.pixels = H * W, layer.columns = B * H * W;
  layer.by_pixels = pnn_cuda::divider_make(H * W), layer.by_width = pnn_cuda::divider_make(W);
  for (pnn_dtype type : {PNN_FLOAT32, PNN_BFLOAT16})
    for (unsigned which : {1u, 2u, 3u}) /* of x and g */
      for (int order = 0; order < 3; order++) {
        set_schedule(order);
        host::options.count_wavefronts = true;
        host::wavefronts = {};
        const size_t size = bytes_of(type);
        pnn_cuda::ChannelsLast copies[2] = {};
        std::vector<char> from[2], to[2];
        Strides strides[2];
        for (int i = 0; i < 2; i++) {
          const int64_t C = channels[i];
          /* The pixels in a row, the channels, neither. */
          strides[i] = order == 0   ? Strides{C * H * W, H * W, W, 1}
                       : order == 1 ? Strides{H * W * (C + 1), 1, W * (C + 1), C + 1}
                                    : Strides{C * H * W * 4, H * W * 4, W * 4, 2};
          from[i].resize(static_cast<size_t>(B * C * H * W) * 5 * size);
          for (size_t at = 0; at < from[i].size(); at++) from[i][at] = static_cast<char>(at * 7919 >> 3);
          to[i].resize(static_cast<size_t>(B * C * H * W) * size + 16, 77);
          if (!(which >> i & 1)) continue;
          const auto [batch, channel, row, column] = strides[i];
          copies[i] = {{from[i].data(), batch, channel, row, column, type}, {to[i].data(), 0, 0, 0, 0, type}, C};
        }
        ASSERT_EQ(pnn_cuda::run_channels_last(layer, copies[0], copies[1], nullptr), pnn_cuda::STATUS_OK);
        EXPECT_EQ(host::wavefronts.actual[host::STORE], host::wavefronts.ideal[host::STORE]);
        EXPECT_EQ(host::wavefronts.actual[host::LOAD], host::wavefronts.ideal[host::LOAD]);
        host::options = {};
        for (int i = 0; i < 2; i++) {
          std::vector<char> expected(to[i].size(), 77);
          size_t at = 0;
          for (int64_t b = 0; b < B && which >> i & 1; b++)
            for (int64_t h = 0; h < H; h++)
              for (int64_t w = 0; w < W; w++)
                for (int64_t c = 0; c < channels[i]; c++, at += size) {
                  const auto [batch, channel, row, column] = strides[i];
                  const int64_t place = b * batch + c * channel + h * row + w * column;
                  std::memcpy(&expected[at], &from[i][static_cast<size_t>(place) * size], size);
                }
          EXPECT_EQ(to[i], expected) << name_of(type) << " tensor " << i << " order " << order;
        }
      }
}

TEST(CudaChannelsLast, SizesAndStridesDecide) {
  /* Whether there is room for the copies, by what contiguous tensors ask for beyond channels-last ones. */
  const auto bytes = [](const Case &c, pnn_pass pass, bool shifted) {
    Problem p(c);
    for (pnn_tensor *t : {&p.params.input, &p.params.grad_output})
      if (shifted) t->data = static_cast<char *>(t->data) + bytes_of(t->dtype);
    size_t count = 0;
    EXPECT_EQ(pnn_cuda_workspace_size(&p.params, pass, &count, &p.error), PNN_OK) << p.error.message;
    return static_cast<int64_t>(count);
  };
  for (int type = 0; type < kTypes; type++)
    for (auto [C, T, width] : {std::tuple<int, int, int>{48, 40, 7}, {48, 40, 4}, {44, 36, 7}, {48, 40, 2}, {6, 5, 7}})
      for (bool shifted : {false, true}) {
        Case c;
        set_type(c, type);
        c.placement = Placement::kHeap, c.B = 3, c.C = C, c.T = T, c.H = width, c.W = width;
        Case last = c;
        set_layouts(last, LayoutKind::kChannelsLast);
        SCOPED_TRACE(c.describe());
        const auto copy = [&](pnn_dtype dtype, int64_t channels) -> int64_t {
          const int64_t size = static_cast<int64_t>(bytes_of(dtype)), run = 16 / size;
          if (size == 8 || width * width % run == 0 || channels % run != 0) return 0;
          return (3 * width * width * channels * size + 63) / 64 * 64;
        };
        const auto more = [&](pnn_pass pass) { return bytes(c, pass, shifted) - bytes(last, pass, shifted); };
        EXPECT_EQ(more(PNN_PASS_FORWARD), copy(c.input_type, C));
        EXPECT_EQ(more(PNN_PASS_BACKWARD), copy(c.input_type, C) + copy(c.weight_type, T));
      }
}

TEST(CudaChannelsLast, NotForForwardByAsynchronousProducts) {
  Case c;
  set_type(c, 2);
  c.placement = Placement::kHeap, c.gradients = 0, c.C = 48, c.T = 40, c.H = c.W = 7;
  for (bool wgmma : {false, true}) {
    c.wgmma = wgmma;
    Problem p(c);
    const int64_t launches = host::launches;
    ASSERT_EQ(p.forward(), PNN_OK);
    EXPECT_EQ(host::launches - launches, 2); /* x's or V's copy, and the product */
  }
}

TEST(CudaMoments, NeitherOverflowNorCancel) {
  /* Values near float's largest, and maps whose spread is a thousandth of their mean. */
  for (Fill fill : {Fill::kHuge, Fill::kNearConstant, Fill::kTiny})
    for (bool plain : {false, true}) {
      Case c;
      c.B = 3, c.C = 4, c.T = 2, c.H = 31, c.W = 33, c.norm = c.training = true, c.fill = fill;
      c.noise = PNN_NOISE_NONE, c.activation = PNN_ACTIVATION_IDENTITY;
      if (plain) {
        c.C = 16, c.noise = PNN_NOISE_UNIFORM, c.activation = PNN_ACTIVATION_RELU;
        c.level = fill == Fill::kTiny ? 1e-38 : 1e-3; /* so that the data are what is hard */
      }
      Problem p(c);
      ASSERT_EQ(p.forward(), PNN_OK);
      const ReferenceInput in = p.reference_input();
      Reference<long double> reference(in);
      ReferenceOutput<long double> out;
      reference.forward(out, &in.mean, &in.variance);
      for (int64_t k = 0; k < c.K(); k++) {
        const size_t s = static_cast<size_t>(k);
        const long double variance = out.variance.value[s];
        EXPECT_LE(std::fabs(p.mean.value(k) - out.mean.value[s]), 0x1p-20L * out.mean.magnitude[s]) << c.describe();
        if (variance > 3.4e38L)
          EXPECT_TRUE(std::isinf(p.variance.value(k)));
        else
          EXPECT_LE(std::fabs(p.variance.value(k) - variance), 0x1p-18L * variance + 0x1p-149L) << c.describe();
      }
    }
}

TEST(CudaMoments, InfiniteAndNanElementsReachTheMeanAndTheVariance) {
  /* Of the maps' 3 * 31 * 33 elements, in three chunks, one or two are special, in the first chunk or in the last. */
  for (pnn_dtype type : {PNN_FLOAT32, PNN_FLOAT64}) {
    Case c;
    c.input_type = c.weight_type = type;
    c.B = 3, c.C = 5, c.T = 2, c.H = 31, c.W = 33, c.norm = c.training = true, c.fill = Fill::kRandom;
    c.noise = PNN_NOISE_NONE, c.activation = PNN_ACTIVATION_IDENTITY;
    Problem p(c);
    const int64_t image = c.H * c.W, last = (2 * c.C + 1) * image - 1; /* channel 0's last pixel */
    p.input.set(5, HUGE_VAL);
    p.input.set(image, -HUGE_VAL);
    p.input.set(last + image * 2, std::nan(""));
    p.input.set(image * 3, HUGE_VAL);
    p.input.set(last + image * 3, -HUGE_VAL);
    p.input.seal();
    ASSERT_EQ(p.forward(), PNN_OK) << p.error.message;
    EXPECT_EQ(p.mean.value(0), HUGE_VAL);
    EXPECT_EQ(p.mean.value(1), -HUGE_VAL);
    EXPECT_TRUE(std::isnan(p.mean.value(2)));
    EXPECT_TRUE(std::isnan(p.mean.value(3)));
    for (int64_t k = 0; k < 4; k++) EXPECT_TRUE(std::isnan(p.variance.value(k))) << k;
    EXPECT_TRUE(std::isfinite(p.mean.value(4)) && std::isfinite(p.variance.value(4)));
  }
}

/* float32 and float64 sum in the CPU's order, so any data give the CPU's bits where the activation does. */
TEST(CudaAndCpu, SameBitsOnAnyData) {
  uint64_t seed = 1000;
  for (pnn_dtype type : {PNN_FLOAT32, PNN_FLOAT64})
    for (pnn_activation f :
         {PNN_ACTIVATION_IDENTITY, PNN_ACTIVATION_RELU, PNN_ACTIVATION_LEAKY_RELU, PNN_ACTIVATION_HARDTANH}) {
      for (pnn_noise noise : {PNN_NOISE_TENSOR, PNN_NOISE_NORMAL}) {
        Case c;
        c.input_type = c.weight_type = c.mask_type = type;
        c.B = 3, c.C = 21, c.T = 11, c.H = 5, c.W = 7, c.M = 3, c.fill = Fill::kRandom, c.activation = f,
        c.noise = noise;
        c.level = 0.1, c.gradients = kGradInput | kGradMask, c.seed = seed++;
        Problem gpu(c), cpu(c);
        set_schedule(static_cast<int>(seed));
        ASSERT_EQ(gpu.forward(), PNN_OK);
        ASSERT_EQ(gpu.backward(), PNN_OK);
        for (pnn_pass pass : {PNN_PASS_FORWARD, PNN_PASS_BACKWARD}) {
          size_t bytes;
          ASSERT_EQ((pnn_workspace_size)(&cpu.params, pass, nullptr, &bytes, nullptr), PNN_OK);
          std::vector<char> workspace(bytes + 1);
          cpu.params.workspace = workspace.data();
          cpu.params.workspace_bytes = bytes;
          ASSERT_EQ((pass == PNN_PASS_FORWARD ? (pnn_forward) : (pnn_backward))(&cpu.params, nullptr, nullptr), PNN_OK);
        }
        EXPECT_EQ(gpu.output.bits(), cpu.output.bits()) << c.describe();
        EXPECT_EQ(gpu.grad_input.bits(), cpu.grad_input.bits()) << c.describe();
        if (!gpu.grad_mask.present()) continue;
        EXPECT_EQ(gpu.grad_mask.bits(), cpu.grad_mask.bits()) << c.describe();
      }
    }
  host::options = {};
}

TEST(CudaWavefronts, OperandsMeetNoBankConflicts) {
  /* Wavefronts of shared memory per wavefront that the bytes need; docs/cuda.md quotes them. */
  static const char *const kinds[] = {"16-byte loads", "16-byte stores", "cp.async", "ldmatrix"};
  for (int type : {0, 2, kTf32})
    for (LayoutKind kind : {LayoutKind::kContiguous, LayoutKind::kChannelsLast})
      for (unsigned gradients : {0u, unsigned{kGradInput}, unsigned{kGradWeight}}) {
        Case c;
        set_type(c, type);
        c.placement = Placement::kHeap, c.gradients = gradients;
        set_layouts(c, kind);
        c.B = 1, c.C = 64, c.T = 64, c.H = 8, c.W = 32;
        host::options = {};
        Problem p(c);
        host::options.count_wavefronts = true;
        host::wavefronts = {};
        const pnn_pass pass = gradients ? PNN_PASS_BACKWARD : PNN_PASS_FORWARD;
        if (gradients) {
          host::options.count_wavefronts = false;
          ASSERT_EQ(p.forward(), PNN_OK);
          host::options.count_wavefronts = true;
        }
        ASSERT_EQ(p.run(pass), PNN_OK);
        std::printf("%-9s %-13s %-15s", c.tf32 ? "tf32" : name_of(c.weight_type), name_of(kind),
                    gradients == 0            ? "forward"
                    : gradients == kGradInput ? "input gradient"
                                              : "weight gradient");
        for (int k = 0; k < host::ACCESS_KINDS; k++) {
          const double ideal = static_cast<double>(host::wavefronts.ideal[k]);
          if (ideal > 0) std::printf("  %s %.2f", kinds[k], static_cast<double>(host::wavefronts.actual[k]) / ideal);
        }
        std::printf("\n");
        EXPECT_EQ(host::wavefronts.actual[host::MATRIX], host::wavefronts.ideal[host::MATRIX]);
        /* TF32 has no ldmatrix where neither operand has its depth in a row. */
        const bool rows = kind == LayoutKind::kContiguous ? gradients == kGradInput : gradients == kGradWeight;
        EXPECT_EQ(host::wavefronts.ideal[host::MATRIX] > 0, type == 2 || (type == kTf32 && !rows));
        /* 16-bit outputs leave the sums' rows by two loads of 16 bytes that lie 32 bytes apart. */
        EXPECT_LE(host::wavefronts.actual[host::LOAD] * 3, host::wavefronts.ideal[host::LOAD] * 5);
      }
  host::options = {};
}

TEST(CudaMaskFill, EqualsTheCpu) {
  const int64_t seed = 0x123456789abcdef;
  for (pnn_dtype type : {PNN_FLOAT32, PNN_FLOAT64, PNN_BFLOAT16, PNN_FLOAT16})
    for (pnn_noise noise : {PNN_NOISE_UNIFORM, PNN_NOISE_NORMAL, PNN_NOISE_WAVES})
      for (LayoutKind kind : {LayoutKind::kContiguous, LayoutKind::kNegative}) {
        Random random(5), same(5);
        Tensor gpu(type, {3, 7, 4, 9}, kind, random, Placement::kZones, Poison::kNan, 3);
        Tensor cpu(type, {3, 7, 4, 9}, kind, same, Placement::kZones, Poison::kNan, 3);
        pnn_error error;
        ASSERT_EQ(pnn_cuda_mask_fill(&gpu.view(), noise, 0, &seed, nullptr, &error), PNN_OK) << error.message;
        ASSERT_EQ(pnn_mask_fill(&cpu.view(), noise, 0, &seed, nullptr, &error), PNN_OK) << error.message;
        EXPECT_EQ(gpu.bits(), cpu.bits());
        EXPECT_TRUE(gpu.intact_outside());
      }
}

TEST(CudaErrors, NothingRunsAfterAFailedCheck) {
  pnn_error error;
  size_t bytes = 7;
  Case c;
  c.C = 3, c.T = 2, c.H = c.W = 4, c.norm = true;
  Problem p(c);
  const int64_t launches = host::launches;
  EXPECT_EQ(pnn_cuda_workspace_size(&p.params, PNN_PASS_FORWARD, nullptr, &error), PNN_ERROR_NULL);
  EXPECT_EQ(pnn_cuda_workspace_size(&p.params, static_cast<pnn_pass>(5), &bytes, &error), PNN_ERROR_VALUE);
  EXPECT_EQ(bytes, 0u);
  EXPECT_EQ(pnn_cuda_workspace_size(&p.params, PNN_PASS_FORWARD, &bytes, &error), PNN_OK);
  EXPECT_GT(bytes, 0u);
  EXPECT_EQ(pnn_cuda_forward(&p.params, nullptr, &error), PNN_ERROR_NULL);
  EXPECT_NE(std::string(error.message).find("workspace is NULL, it should point to"), std::string::npos);
  char one;
  p.params.workspace = &one;
  p.params.workspace_bytes = 1;
  EXPECT_EQ(pnn_cuda_forward(&p.params, nullptr, &error), PNN_ERROR_WORKSPACE);
  p.params.stride[0] = 0;
  EXPECT_EQ(pnn_cuda_backward(&p.params, nullptr, &error), PNN_ERROR_VALUE);
  EXPECT_EQ(pnn_cuda_forward(nullptr, nullptr, &error), PNN_ERROR_NULL);
  const int64_t seed = 1;
  pnn_tensor mask = {};
  EXPECT_EQ(pnn_cuda_mask_fill(nullptr, PNN_NOISE_UNIFORM, 0, &seed, nullptr, &error), PNN_ERROR_NULL);
  EXPECT_EQ(pnn_cuda_mask_fill(&mask, PNN_NOISE_UNIFORM, 0, nullptr, nullptr, &error), PNN_ERROR_NULL);
  EXPECT_EQ(pnn_cuda_mask_fill(&mask, PNN_NOISE_TENSOR, 0, &seed, nullptr, &error), PNN_ERROR_VALUE);
  EXPECT_EQ(pnn_cuda_mask_fill(&mask, PNN_NOISE_WAVES, 0, &seed, nullptr, &error), PNN_ERROR_NULL);
  float value;
  mask = {&value, PNN_FLOAT32, {2, 1, 1, 1}, {1, 1, 1, 1}};
  EXPECT_EQ(pnn_cuda_mask_fill(&mask, PNN_NOISE_WAVES, 1, &seed, nullptr, &error), PNN_ERROR_SHAPE);
  EXPECT_EQ(host::launches, launches);
  EXPECT_STREQ(pnn_cuda_architectures(), "host");
}

}  // namespace
}  // namespace pnn_test
