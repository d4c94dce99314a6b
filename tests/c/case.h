// case.h - a description of one call (Case), its tensors and memory (Problem), threads to run it on, and comparisons.
#ifndef PNN_TESTS_CASE_H
#define PNN_TESTS_CASE_H

#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "pnn/pnn.h"
#include "reference.h"
#include "tensor.h"

namespace pnn_test {

// How many random cases a test draws: `count` times the environment variable PNN_TEST_SCALE (default 1).
inline int64_t scaled(int64_t count) {
  const char *text = std::getenv("PNN_TEST_SCALE");
  const double scale = text != nullptr ? std::atof(text) : 1.0;
  return std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(count) * (scale > 0 ? scale : 1.0)));
}

// ---- threads --------------------------------------------------------------------------------------------------------

enum class TaskOrder { kAscending, kReversed, kShuffled };

// A parallel-for on std::thread: tasks are handed out one by one in the given order. `before` runs on every worker
// first (to disturb its floating-point environment, say), `after` when its tasks are done.
class ThreadHost {
 public:
  explicit ThreadHost(int32_t threads, TaskOrder order = TaskOrder::kAscending, std::function<void()> before = {},
                      std::function<void()> after = {})
      : threads_(threads), order_(order), before_(std::move(before)), after_(std::move(after)) {
    host_ = {threads, &ThreadHost::run, this};
  }
  const pnn_host *get() const { return &host_; }
  int64_t tasks() const { return tasks_; }

 private:
  static void run(void *context, int64_t count, void (*task)(void *argument, int64_t index), void *argument) {
    ThreadHost *self = static_cast<ThreadHost *>(context);
    self->tasks_ += count;
    std::vector<int64_t> order(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; i++) order[static_cast<size_t>(i)] = i;
    if (self->order_ == TaskOrder::kReversed) std::reverse(order.begin(), order.end());
    if (self->order_ == TaskOrder::kShuffled) {
      Random random(static_cast<uint64_t>(count) + 99);
      for (size_t i = order.size(); i > 1; i--) {
        std::swap(order[i - 1], order[static_cast<size_t>(random.integer(0, static_cast<int64_t>(i) - 1))]);
      }
    }
    std::atomic<size_t> next{0};
    const auto work = [&] {
      if (self->before_) self->before_();
      for (size_t i = next++; i < order.size(); i = next++) task(argument, order[i]);
      if (self->after_) self->after_();
    };
    std::vector<std::thread> workers;
    for (int32_t i = 0; i < self->threads_; i++) workers.emplace_back(work);
    for (std::thread &worker : workers) worker.join();
  }

  int32_t threads_;
  TaskOrder order_;
  std::function<void()> before_, after_;
  std::atomic<int64_t> tasks_{0};
  pnn_host host_;
};

// ---- cases ----------------------------------------------------------------------------------------------------------

// What the tensors hold.
enum class Fill {
  kLattice,     // small integers and multiples of 1/8: every sum is exact
  kUnit,        // the mask and the weights are chosen so that the response maps have mean m_k and variance 4^j exactly
  kRandom,      // uniform in [-1, 1)
  kCancelling,  // large terms in pairs of opposite sign
  kHuge,        // near the largest numbers, sums still finite in float32
  kTiny,        // around and below the smallest normal numbers
  kNearConstant,  // maps whose spread is a thousandth of their mean
  kSpecial,       // random with zeros of both signs, infinities and NaN strewn in
};

inline const char *name_of(Fill fill) {
  static const char *const names[] = {"lattice", "unit", "random",        "cancelling",
                                      "huge",    "tiny", "near-constant", "special"};
  return names[static_cast<int>(fill)];
}

enum Gradient : unsigned {
  kGradInput = 1,
  kGradWeight = 2,
  kGradBias = 4,
  kGradMask = 8,
  kGradNormWeight = 16,
  kGradNormBias = 32,
  kAllGradients = 63,
};

struct Case {
  pnn_dtype input_type = PNN_FLOAT32;
  pnn_dtype weight_type = PNN_FLOAT32;
  pnn_dtype mask_type = PNN_FLOAT32;
  int64_t B = 1, C = 1, H = 1, W = 1, T = 1, M = 1, groups = 1, stride_h = 1, stride_w = 1;
  pnn_noise noise = PNN_NOISE_UNIFORM;
  bool shared = false;
  double level = 1;
  pnn_activation activation = PNN_ACTIVATION_RELU;
  bool exact = false;
  bool tf32 = false, wgmma = false;
  bool bias = true;
  bool norm = false;
  bool training = false;
  bool affine = true;
  double eps = 0;
  Fill fill = Fill::kLattice;
  unsigned gradients = kAllGradients;
  LayoutKind input_layout = LayoutKind::kContiguous;
  LayoutKind weight_layout = LayoutKind::kContiguous;
  LayoutKind mask_layout = LayoutKind::kContiguous;
  LayoutKind vector_layout = LayoutKind::kContiguous;
  LayoutKind output_layout = LayoutKind::kContiguous;
  LayoutKind grad_output_layout = LayoutKind::kContiguous;
  LayoutKind grad_input_layout = LayoutKind::kContiguous;
  LayoutKind grad_weight_layout = LayoutKind::kContiguous;
  LayoutKind grad_mask_layout = LayoutKind::kContiguous;
  Placement placement = Placement::kZones;
  Poison poison = Poison::kNan;
  uint64_t seed = 1;

  int64_t K() const { return C * M; }
  int64_t columns() const { return C / groups * M; }
  int64_t out_h() const { return H == 0 ? 0 : (H - 1) / stride_h + 1; }
  int64_t out_w() const { return W == 0 ? 0 : (W - 1) / stride_w + 1; }
  int64_t samples() const { return B * out_h() * out_w(); }
  pnn_dtype statistics_type() const { return input_type == PNN_FLOAT64 ? PNN_FLOAT64 : PNN_FLOAT32; }

  std::string describe() const {
    std::ostringstream s;
    s << "x " << name_of(input_type) << " V " << name_of(weight_type) << " N " << name_of(mask_type) << " B" << B
      << " C" << C << " H" << H << " W" << W << " T" << T << " M" << M << " groups " << groups << " stride " << stride_h
      << "," << stride_w << " " << name_of(noise) << (shared ? " shared" : "") << " level " << level << " "
      << name_of(activation) << (bias ? "" : " no bias");
    if (norm) s << (training ? " norm training" : " norm eval") << (affine ? "" : " plain") << " eps " << eps;
    s << (exact ? " exact" : "") << (tf32 ? " tf32" : "") << (wgmma ? " wgmma" : "") << " fill " << name_of(fill)
      << " gradients " << gradients << " layouts x " << name_of(input_layout) << " V " << name_of(weight_layout)
      << " N " << name_of(mask_layout) << " vectors " << name_of(vector_layout) << " y " << name_of(output_layout)
      << " g " << name_of(grad_output_layout) << " dx " << name_of(grad_input_layout) << " dV "
      << name_of(grad_weight_layout) << " dN " << name_of(grad_mask_layout) << " placement "
      << static_cast<int>(placement) << " poison " << static_cast<int>(poison) << " seed " << seed;
    return s.str();
  }
};

// ---- problems -------------------------------------------------------------------------------------------------------

class Problem {
 public:
  explicit Problem(const Case &c) : c_(c), random_(c.seed * 7919 + 17) {
    pnn_params_init(&params);
    seed_ = static_cast<int64_t>(random_.bits());
    const pnn_dtype statistics = c.statistics_type();
    make(input, c.input_type, {c.B, c.C, c.H, c.W}, c.input_layout);
    make(weight, c.weight_type, {c.T, c.columns()}, c.weight_layout);
    if (c.bias) make(bias, c.weight_type, {c.T}, c.vector_layout);
    if (c.noise == PNN_NOISE_TENSOR) make(mask, c.mask_type, {c.shared ? 1 : c.C, c.M, c.H, c.W}, c.mask_layout);
    if (c.norm && c.affine) {
      make(norm_weight, statistics, {c.K()}, c.vector_layout);
      make(norm_bias, statistics, {c.K()}, c.vector_layout);
    }
    if (c.norm) {
      // Written in training: not with strides of zero.
      const LayoutKind layout =
          c.training && c.vector_layout == LayoutKind::kBroadcast ? LayoutKind::kPrime : c.vector_layout;
      make(mean, statistics, {c.K()}, layout);
      make(variance, statistics, {c.K()}, layout);
    }
    make(output, c.weight_type, {c.B, c.T, c.out_h(), c.out_w()}, c.output_layout);
    make(grad_output, c.weight_type, {c.B, c.T, c.out_h(), c.out_w()}, c.grad_output_layout);
    const LayoutKind vectors = c.vector_layout == LayoutKind::kBroadcast ? LayoutKind::kNegative : c.vector_layout;
    if (c.gradients & kGradInput) make(grad_input, c.input_type, {c.B, c.C, c.H, c.W}, c.grad_input_layout);
    if (c.gradients & kGradWeight) make(grad_weight, c.weight_type, {c.T, c.columns()}, c.grad_weight_layout);
    if (c.gradients & kGradBias) make(grad_bias, c.weight_type, {c.T}, vectors);
    if ((c.gradients & kGradMask) && c.noise == PNN_NOISE_TENSOR) {
      make(grad_mask, c.mask_type, {c.shared ? 1 : c.C, c.M, c.H, c.W}, c.grad_mask_layout);
    }
    if (c.norm && (c.gradients & kGradNormWeight)) make(grad_norm_weight, statistics, {c.K()}, vectors);
    if (c.norm && (c.gradients & kGradNormBias)) make(grad_norm_bias, statistics, {c.K()}, vectors);
    fill();

    params.input = input.view();
    params.weight = weight.view();
    params.bias = bias.view();
    params.noise = c.noise;
    params.shared_masks = c.noise >= PNN_NOISE_UNIFORM && c.shared;
    params.masks = c.M;
    params.mask = mask.view();
    params.seed = c.noise >= PNN_NOISE_UNIFORM ? &seed_ : nullptr;
    params.level = c.level;
    params.activation = c.activation;
    params.exact = c.exact;
    params.allow_tf32 = c.tf32;
    params.allow_wgmma = c.wgmma;
    params.stride[0] = c.stride_h;
    params.stride[1] = c.stride_w;
    params.groups = c.groups;
    params.norm = c.norm;
    params.norm_training = c.training;
    params.norm_eps = c.eps;
    params.norm_weight = norm_weight.view();
    params.norm_bias = norm_bias.view();
    params.mean = mean.view();
    params.variance = variance.view();
    params.output = output.view();
    params.grad_output = grad_output.view();
    params.grad_input = grad_input.view();
    params.grad_weight = grad_weight.view();
    params.grad_bias = grad_bias.view();
    params.grad_mask = grad_mask.view();
    params.grad_norm_weight = grad_norm_weight.view();
    params.grad_norm_bias = grad_norm_bias.view();
  }
  Problem(const Problem &) = delete;
  Problem &operator=(const Problem &) = delete;

  const Case &description() const { return c_; }
  uint64_t mask_seed() const { return static_cast<uint64_t>(seed_); }
  void set_mask_seed(int64_t seed) { seed_ = seed; }

  // Runs one pass with exactly the workspace that was asked for, at an odd address, poisoned, with guards behind.
  pnn_status run(pnn_pass pass, const pnn_host *host = nullptr) {
    size_t bytes = 0;
    error = {};
    pnn_status status = pnn_workspace_size(&params, pass, host, &bytes, &error);
    if (status != PNN_OK) return status;
    const bool page = c_.placement == Placement::kEndsAtPage;
    const size_t front = page ? 0 : 1 + static_cast<size_t>(random_.integer(0, 14)) * 2;
    const size_t back = page || c_.placement == Placement::kHeap ? 0 : 64;
    Memory workspace(front + bytes + back, page ? Placement::kEndsAtPage : Placement::kHeap);
    if (workspace.size() > 0) std::memset(workspace.begin(), c_.poison == Poison::kNan ? 0xff : 0x7e, workspace.size());
    params.workspace = workspace.begin() + front;
    params.workspace_bytes = bytes;
    status = pass == PNN_PASS_FORWARD ? pnn_forward(&params, host, &error) : pnn_backward(&params, host, &error);
    const unsigned char filler = c_.poison == Poison::kNan ? 0xff : 0x7e;
    for (size_t i = 0; i < front; i++) EXPECT_EQ(workspace.begin()[i], filler) << "before the workspace";
    for (size_t i = 0; i < back; i++) EXPECT_EQ(workspace.begin()[front + bytes + i], filler) << "behind the workspace";
    params.workspace = nullptr;
    params.workspace_bytes = 0;
    if (status == PNN_OK) {
      EXPECT_STREQ(error.message, "");
    }
    return status;
  }

  pnn_status forward(const pnn_host *host = nullptr) {
    const pnn_status status = run(PNN_PASS_FORWARD, host);
    std::vector<const Tensor *> written = {&output};
    if (c_.norm && c_.training) {
      written.push_back(&mean);
      written.push_back(&variance);
    }
    check_memory(written);
    if (c_.norm && c_.training) {
      mean.seal();
      variance.seal();
    }
    output.seal();
    return status;
  }

  pnn_status backward(const pnn_host *host = nullptr) {
    const pnn_status status = run(PNN_PASS_BACKWARD, host);
    check_memory({&grad_input, &grad_weight, &grad_bias, &grad_mask, &grad_norm_weight, &grad_norm_bias});
    return status;
  }

  // Nothing but the elements of `written` may have changed since the tensors were sealed.
  void check_memory(const std::vector<const Tensor *> &written) const {
    const std::vector<const Tensor *> all = tensors();
    for (size_t i = 0; i < all.size(); i++) {
      if (!all[i]->present()) continue;
      const bool output_of_pass = std::find(written.begin(), written.end(), all[i]) != written.end();
      if (output_of_pass) {
        EXPECT_TRUE(all[i]->intact_outside()) << tensor_names()[i] << ": written outside its elements";
      } else {
        EXPECT_TRUE(all[i]->intact()) << tensor_names()[i] << ": changed by a pass that does not write it";
      }
    }
  }

  std::vector<const Tensor *> tensors() const {
    return {&input,    &weight,     &bias,        &mask,      &norm_weight, &norm_bias,        &mean,
            &variance, &grad_input, &grad_weight, &grad_bias, &grad_mask,   &grad_norm_weight, &grad_norm_bias,
            &output,   &grad_output};
  }
  static const std::vector<const char *> &tensor_names() {
    static const std::vector<const char *> names = {
        "input",    "weight",     "bias",        "mask",      "norm_weight", "norm_bias",        "mean",
        "variance", "grad_input", "grad_weight", "grad_bias", "grad_mask",   "grad_norm_weight", "grad_norm_bias",
        "output",   "grad_output"};
    return names;
  }

  // The bits of everything that forward and backward write, one after another.
  std::vector<uint64_t> result_bits() const {
    std::vector<uint64_t> all;
    std::vector<const Tensor *> results = {&output,    &grad_input,       &grad_weight,   &grad_bias,
                                           &grad_mask, &grad_norm_weight, &grad_norm_bias};
    if (c_.norm && c_.training) {
      results.push_back(&mean);
      results.push_back(&variance);
    }
    for (const Tensor *t : results) {
      const std::vector<uint64_t> bits = t->bits();
      all.insert(all.end(), bits.begin(), bits.end());
    }
    return all;
  }

  ReferenceInput reference_input() const {
    ReferenceInput in;
    in.input_type = c_.input_type;
    in.weight_type = c_.weight_type;
    in.B = c_.B, in.C = c_.C, in.H = c_.H, in.W = c_.W, in.T = c_.T, in.M = c_.M, in.groups = c_.groups;
    in.stride_h = c_.stride_h, in.stride_w = c_.stride_w;
    in.noise = c_.noise;
    in.shared = c_.shared;
    in.seed = mask_seed();
    in.level = c_.level;
    in.activation = c_.activation;
    in.norm = c_.norm;
    in.training = c_.training;
    in.eps = c_.eps;
    in.has_bias = c_.bias;
    in.x = input.values();
    in.weight = weight.values();
    in.bias = bias.values();
    in.mask = mask.values();
    in.gamma = norm_weight.values();
    in.beta = norm_bias.values();
    in.mean = mean.values();
    in.variance = variance.values();
    in.grad_output = grad_output.values();
    return in;
  }

  pnn_params params;
  pnn_error error = {};
  Tensor input, weight, bias, mask, norm_weight, norm_bias, mean, variance, output, grad_output;
  Tensor grad_input, grad_weight, grad_bias, grad_mask, grad_norm_weight, grad_norm_bias;

 private:
  void make(Tensor &tensor, pnn_dtype type, std::vector<int64_t> size, LayoutKind layout) {
    tensor = Tensor(type, std::move(size), layout, random_, c_.placement, c_.poison, random_.integer(0, 15));
  }

  void fill() {
    const auto eighths = [this](int64_t limit) {
      return [this, limit] { return static_cast<double>(random_.integer(-limit, limit)) / 8; };
    };
    const auto integers = [this](int64_t limit) {
      return [this, limit] { return static_cast<double>(random_.integer(-limit, limit)); };
    };
    const auto scaled_uniform = [this](double scale) { return [this, scale] { return scale * random_.uniform(); }; };
    const auto fixed = [](std::vector<double> values, Random &random) {
      return [values, &random] { return random.pick(values); };
    };
    // Moments for the passes that are given them; training writes its own.
    mean.fill(scaled_uniform(0.5));
    variance.fill([this] { return 0.25 + std::fabs(random_.uniform()); });
    norm_weight.fill(scaled_uniform(2));
    norm_bias.fill(scaled_uniform(1));
    mask.fill(scaled_uniform(1));
    weight.fill(scaled_uniform(1));
    bias.fill(scaled_uniform(1));
    grad_output.fill(scaled_uniform(1));
    switch (c_.fill) {
      case Fill::kLattice:
        input.fill(eighths(16));
        weight.fill(integers(4));
        bias.fill(integers(8));
        mask.fill(eighths(8));
        grad_output.fill(integers(2));
        mean.fill(eighths(8));
        variance.fill(fixed({0.25, 1, 4}, random_));
        norm_weight.fill(fixed({-1, -0.5, 0, 0.5, 1, 2}, random_));
        norm_bias.fill(eighths(8));
        break;
      case Fill::kUnit: fill_unit(); break;
      case Fill::kRandom: input.fill(scaled_uniform(2)); break;
      case Fill::kCancelling: {
        // Every other weight is the negative of its neighbour, and the input is nearly constant: what remains of the
        // sum is far smaller than its terms.
        input.fill([this] { return 1000 + random_.uniform(); });
        double last = 0;
        bool second = false;
        weight.fill([&] {
          last = second ? -last : random_.uniform();
          second = !second;
          return last;
        });
        grad_output.fill([&] {
          last = second ? -last : random_.uniform();
          second = !second;
          return last;
        });
        break;
      }
      case Fill::kHuge: {
        const double scale = is_half(c_.input_type) && c_.input_type == PNN_FLOAT16 ? 3e4
                             : c_.input_type == PNN_FLOAT64                         ? 1e307
                                                                                    : 1e37;
        input.fill(scaled_uniform(scale));
        weight.fill(scaled_uniform(c_.weight_type == PNN_FLOAT16 ? 0.015625 : 1.0 / 64));
        grad_output.fill(scaled_uniform(c_.weight_type == PNN_FLOAT16 ? 0.015625 : 1.0 / 64));
        break;
      }
      case Fill::kTiny: {
        const Format f = format_of(c_.input_type);
        const double scale = std::ldexp(1.0, f.low + 2);
        input.fill([this, scale] { return scale * random_.uniform() * (random_.flip() ? 1 : 1.0 / 64); });
        mask.fill([this, scale] { return scale * random_.uniform(); });
        break;
      }
      case Fill::kNearConstant: input.fill([this] { return 3 + 0.001 * random_.uniform(); }); break;
      case Fill::kSpecial: {
        input.fill(scaled_uniform(2));
        strew(input);
        strew(weight);
        strew(grad_output);
        strew(bias);
        strew(mask);
        break;
      }
    }
  }

  // Every map of one channel is the same pattern of +-2^j around a constant, so that mean and variance are exact.
  void fill_unit() {
    const auto integers = [this](int64_t limit) {
      return [this, limit] { return static_cast<double>(random_.integer(-limit, limit)); };
    };
    std::vector<int> exponent;
    for (int64_t i = 0; i < c_.C; i++) exponent.push_back(static_cast<int>(random_.integer(-1, 1)));
    std::vector<int64_t> met(static_cast<size_t>(c_.C), 0);
    int64_t index = 0;
    input.fill([&] {
      const int64_t pixel = index % (c_.H * c_.W);
      const size_t channel = static_cast<size_t>(index / (c_.H * c_.W) % c_.C);
      index++;
      const bool kept = pixel / c_.W % c_.stride_h == 0 && pixel % c_.W % c_.stride_w == 0;
      if (!kept) return 0.5;
      const double sign = met[channel]++ % 2 == 0 ? 1 : -1;
      return std::ldexp(sign, exponent[channel]);
    });
    index = 0;
    double constant = 0;
    mask.fill([&] {
      if (index++ % (c_.H * c_.W) == 0) constant = static_cast<double>(random_.integer(-8, 8)) / 8;
      return constant;
    });
    weight.fill(integers(2));
    bias.fill(integers(4));
    grad_output.fill(integers(2));
    norm_weight.fill([this] { return random_.pick(std::vector<double>{-1, -0.5, 0, 0.5, 1, 2}); });
    norm_bias.fill([this] { return static_cast<double>(random_.integer(-4, 4)) / 4; });
  }

  void strew(Tensor &tensor) {
    const double inf = std::numeric_limits<double>::infinity();
    const std::vector<double> values = {0.0, -0.0, inf, -inf, std::numeric_limits<double>::quiet_NaN()};
    for (int64_t i = 0; i < tensor.count(); i++) {
      if (random_.integer(0, 19) == 0) tensor.set(i, random_.pick(values));
    }
    tensor.seal();
  }

  Case c_;
  Random random_;
  int64_t seed_ = 0;
};

// ---- comparisons ----------------------------------------------------------------------------------------------------

// Whether a and b have the same bits, any NaN being equal to any NaN. Zeros of either sign are equal where `signs` is
// false.
inline bool same_value(double a, double b, bool signs = true) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return a == b && (!signs || std::signbit(a) == std::signbit(b));
}

// Every element of the tensor must be the reference's value, rounded once.
template <class R>
void expect_exact(const Tensor &tensor, const Sums<R> &expected, const char *name, bool signs = true) {
  if (!tensor.present()) return;
  ASSERT_EQ(static_cast<size_t>(tensor.count()), expected.value.size()) << name;
  int64_t wrong = 0;
  for (int64_t i = 0; i < tensor.count(); i++) {
    const double want = static_cast<double>(round_to(tensor.type(), expected.value[static_cast<size_t>(i)]));
    const double got = tensor.value(i);
    if (!same_value(got, want, signs) && wrong++ < 3) {
      ADD_FAILURE() << name << "[" << i << "] is " << std::hexfloat << got << ", should be " << want
                    << std::defaultfloat << " (" << got << " and " << want << ")";
    }
  }
  if (wrong > 3) ADD_FAILURE() << name << ": " << wrong << " of " << tensor.count() << " elements differ";
}

// Forward and backward, bit for bit against the reference in double. The data must be such that all sums are exact;
// `quantum` (0: not checked) is the unit they are multiples of, and this is checked to suffice.
inline void check_exact(const Case &c, double quantum, const pnn_host *host = nullptr) {
  SCOPED_TRACE(c.describe());
  Problem problem(c);
  ASSERT_EQ(problem.forward(host), PNN_OK) << problem.error.message;
  ASSERT_EQ(problem.backward(host), PNN_OK) << problem.error.message;
  const ReferenceInput in = problem.reference_input();
  Reference<double> reference(in);
  ReferenceOutput<double> out;
  reference.forward(out);
  reference.backward(out, in.mean, in.variance);
  if (quantum > 0) {
    const double limit = quantum * std::ldexp(1.0, c.input_type == PNN_FLOAT64 ? 53 : 24);
    for (const Sums<double> *sums : {&out.output, &out.grad_input, &out.grad_weight, &out.grad_bias, &out.grad_mask}) {
      for (double m : sums->magnitude) ASSERT_LE(m, limit) << "the test's own data are not exact";
    }
  }
  // The sign of a zero is a matter of the order of summation where scales may be negative.
  const bool signs = !c.norm;
  if (c.norm && c.training) {
    expect_exact(problem.mean, out.mean, "mean", false);
    expect_exact(problem.variance, out.variance, "variance");
  }
  expect_exact(problem.output, out.output, "output", signs);
  expect_exact(problem.grad_input, out.grad_input, "grad_input", signs);
  expect_exact(problem.grad_weight, out.grad_weight, "grad_weight", signs);
  expect_exact(problem.grad_bias, out.grad_bias, "grad_bias", signs);
  expect_exact(problem.grad_mask, out.grad_mask, "grad_mask", signs);
  expect_exact(problem.grad_norm_weight, out.grad_norm_weight, "grad_norm_weight", signs);
  expect_exact(problem.grad_norm_bias, out.grad_norm_bias, "grad_norm_bias", signs);
}

// The pairs of types that the library takes; bfloat16 in its two ways of computing.
struct TypePair {
  pnn_dtype input, weight;
  bool exact = false;
};
inline const std::vector<TypePair> &type_pairs() {
  static const std::vector<TypePair> list = {{PNN_FLOAT32, PNN_FLOAT32},         {PNN_FLOAT64, PNN_FLOAT64},
                                             {PNN_BFLOAT16, PNN_BFLOAT16},       {PNN_FLOAT16, PNN_FLOAT16},
                                             {PNN_FLOAT32, PNN_BFLOAT16},        {PNN_FLOAT32, PNN_FLOAT16},
                                             {PNN_BFLOAT16, PNN_BFLOAT16, true}, {PNN_FLOAT32, PNN_BFLOAT16, true}};
  return list;
}
inline void set_types(Case &c, TypePair pair, bool input_mask = false) {
  c.input_type = pair.input;
  c.weight_type = pair.weight;
  c.exact = pair.exact;
  c.mask_type = input_mask ? pair.input : PNN_FLOAT32;
}

// Groups that divide both numbers of channels.
inline int64_t random_groups(Random &random, int64_t C, int64_t T) {
  std::vector<int64_t> list;
  for (int64_t g = 1; g <= std::max(C, T); g++) {
    if (C % g == 0 && T % g == 0 && g <= 8) list.push_back(g);
  }
  return list.empty() ? 1 : random.pick(list);
}

}  // namespace pnn_test

#endif
