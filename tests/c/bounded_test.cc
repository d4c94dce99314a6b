// bounded_test.cc - the bounded tier: on any data the error stays within what the type and the number of terms allow.
//
// |error| <= gamma_n * sum|terms| + u_out * |result|, against plain loops in long double on the same rounded operands
// (Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.1). Random, cancelling, huge, tiny and
// nearly constant data, and infinities and NaN, which must come out where the same formula in double has them. The
// worst and the mean of error / (u * sum|terms|) are printed per type and result; in float32, on this fixed seed, a
// ratio above 8 raises an alarm long before the bound is met.
#include <gtest/gtest.h>

#include <cstdio>

#include "case.h"

namespace pnn_test {
namespace {

constexpr double kAlarm = 8;

struct Ratio {
  double worst = 0;
  double sum = 0;
  int64_t count = 0;
  void add(double r) {
    worst = std::max(worst, r);
    sum += r;
    count++;
  }
};

class Ledger {
 public:
  Ratio &at(const Case &c, const char *what) {
    std::string types = name_of(c.input_type);
    if (c.input_type != c.weight_type) types += std::string("/") + name_of(c.weight_type);
    if (c.exact) types += " exact";
    return ratios_[types + " " + what];
  }
  void print(const char *title) const {
    std::printf("error / (u * sum|terms|), %s\n", title);
    for (const auto &entry : ratios_) {
      if (entry.second.count == 0) continue;
      std::printf("  %-36s worst %9.3g  mean %9.3g  of %lld\n", entry.first.c_str(), entry.second.worst,
                  entry.second.sum / static_cast<double>(entry.second.count),
                  static_cast<long long>(entry.second.count));
    }
  }
  const std::map<std::string, Ratio> &ratios() const { return ratios_; }

 private:
  std::map<std::string, Ratio> ratios_;
};

long double gamma_bound(double terms, double u) { return terms * u / (1 - terms * u); }

// Compares one result. `terms`: how many roundings its longest chain makes. `slack`: further relative errors of the
// terms, in units of 1.
void expect_bounded(const Tensor &tensor, const Sums<long double> &expected, double terms, double slack, const Case &c,
                    const char *name, Ledger &ledger) {
  if (!tensor.present()) return;
  ASSERT_EQ(static_cast<size_t>(tensor.count()), expected.value.size()) << name;
  const pnn_dtype compute = c.statistics_type();
  const double u = unit_of(compute);
  const double u_out = unit_of(tensor.type());
  const long double underflow = (4 * terms + 8) * tiny_of(compute) + 2 * tiny_of(tensor.type());
  const long double largest = static_cast<long double>(tensor.type() == PNN_FLOAT64 ? std::numeric_limits<double>::max()
                                                       : tensor.type() == PNN_FLOAT16 ? 65504.0
                                                                                      : 3.38e38);
  Ratio &ratio = ledger.at(c, name);
  int64_t wrong = 0;
  for (int64_t i = 0; i < tensor.count(); i++) {
    const long double want = expected.value[static_cast<size_t>(i)];
    const long double size = expected.magnitude[static_cast<size_t>(i)];
    const double got = tensor.value(i);
    bool good;
    if (std::isnan(want) || std::isinf(want)) {
      good = std::isnan(want) ? std::isnan(got) : got == static_cast<double>(want);
      // With normalisation the sums are arranged otherwise (V times a sum of g, not a sum of V * g): infinity may be
      // NaN there and the other way round, but never a number.
      if (c.norm) good = !std::isfinite(got);
    } else {
      const long double bound = (gamma_bound(terms, u) + slack) * size + u_out * std::fabs(want) * 1.01L + underflow;
      if (std::fabs(want) + bound >= largest) {
        good = std::isinf(got) || std::fabs(got - want) <= bound;
      } else {
        const long double error = std::fabs(got - want);
        good = error <= bound;  // false for NaN
        if (good && u * size > underflow) {
          const long double beyond = tensor.type() == compute ? error : std::max(0.0L, error - u_out * std::fabs(want));
          ratio.add(static_cast<double>(beyond / (u * size)));
        }
      }
    }
    if (!good && wrong++ < 3) {
      ADD_FAILURE() << name << "[" << i << "] is " << got << ", should be " << static_cast<double>(want)
                    << ", sum|terms| " << static_cast<double>(size) << ", error/(u*sum) "
                    << static_cast<double>(std::fabs(got - want) / (u * size));
    }
  }
  if (wrong > 3) ADD_FAILURE() << name << ": " << wrong << " of " << tensor.count() << " elements are out of bounds";
}

void check_bounded(const Case &c, Ledger &ledger) {
  SCOPED_TRACE(c.describe());
  Problem problem(c);
  ASSERT_EQ(problem.forward(), PNN_OK) << problem.error.message;
  const ReferenceInput in = problem.reference_input();  // with the moments that forward wrote
  ASSERT_EQ(problem.backward(), PNN_OK) << problem.error.message;
  Reference<long double> reference(in);
  ReferenceOutput<long double> out;
  reference.forward(out, &in.mean, &in.variance);
  reference.backward(out, in.mean, in.variance);

  const double u = unit_of(c.statistics_type());
  const bool exact = is_exact(c.activation);
  // The activations' own limits (docs/activations.md), and rounding a 16-bit operand to the other side.
  double slack = exact ? 0 : 8 * u;
  if (is_half(c.weight_type) && (c.norm || !exact)) slack += 4 * unit_of(c.weight_type);
  // bfloat16 dot products round each pair of terms more than once.
  const double rounding = c.weight_type == PNN_BFLOAT16 && !c.exact ? 2 : 1;
  const double n = static_cast<double>(c.samples());
  const double depth = static_cast<double>(c.columns());
  const double outputs = static_cast<double>(c.T / std::max<int64_t>(c.groups, 1));
  const double channels = c.shared ? static_cast<double>(c.C) : 1;
  const double norm_terms = c.norm ? n + outputs + 8 : 0;

  if (c.norm && c.training) {
    // A chunk of pixels is summed in lanes, chunks in double: the terms of one chain do not grow with n.
    const double u_sum = std::min(n + 8, 64.0) * u;
    for (int64_t k = 0; k < c.K(); k++) {
      const size_t s = static_cast<size_t>(k);
      const long double mean = out.mean.value[s];
      const long double variance = out.variance.value[s];
      if (std::isnan(mean) || std::isinf(mean)) {
        EXPECT_TRUE(same_value(problem.mean.value(k), static_cast<double>(mean))) << "mean[" << k << "]";
        EXPECT_TRUE(same_value(problem.variance.value(k), static_cast<double>(variance))) << "variance[" << k << "]";
        continue;
      }
      const long double size = out.mean.magnitude[s];
      const long double mean_error = std::fabs(problem.mean.value(k) - mean);
      EXPECT_LE(mean_error, u * std::fabs(mean) + (u_sum + slack) * size + tiny_of(c.statistics_type()))
          << "mean[" << k << "]";
      const long double variance_error = std::fabs(problem.variance.value(k) - variance);
      // The centre that deviations are taken from is known to u * size; in float64 the chunks' means are, too.
      const long double blur = u * size;
      const long double joint = c.input_type == PNN_FLOAT64 ? 2 * blur * std::sqrt(variance) : 0;
      ledger.at(c, "mean").add(static_cast<double>(mean_error / (u * size + tiny_of(c.statistics_type()))));
      if (variance > 0) ledger.at(c, "variance").add(static_cast<double>(variance_error / (u * variance)));
      EXPECT_LE(variance_error, u * variance + u_sum * variance + blur * blur + joint +
                                    4 * slack * std::sqrt(variance) * size + tiny_of(c.statistics_type()))
          << "variance[" << k << "] is " << problem.variance.value(k) << ", should be "
          << static_cast<double>(variance);
    }
  }
  expect_bounded(problem.output, out.output, rounding * depth + (c.norm ? 8 : 2), slack, c, "output", ledger);
  expect_bounded(problem.grad_input, out.grad_input, rounding * outputs + static_cast<double>(c.M) + 4 + norm_terms,
                 slack, c, "grad_input", ledger);
  expect_bounded(problem.grad_weight, out.grad_weight, rounding * n + (c.norm ? 8 : 2), slack, c, "grad_weight",
                 ledger);
  expect_bounded(problem.grad_bias, out.grad_bias, n + 2, 0, c, "grad_bias", ledger);
  expect_bounded(problem.grad_mask, out.grad_mask,
                 rounding * outputs + static_cast<double>(c.B) * channels + 4 + norm_terms, slack, c, "grad_mask",
                 ledger);
  expect_bounded(problem.grad_norm_weight, out.grad_norm_weight, rounding * n + outputs + 8, slack, c,
                 "grad_norm_weight", ledger);
  expect_bounded(problem.grad_norm_bias, out.grad_norm_bias, n + outputs + 8, slack, c, "grad_norm_bias", ledger);
}

// Float32 and float64 ratios that a right implementation stays well below.
void alarm(const Ledger &ledger) {
  for (const auto &entry : ledger.ratios()) {
    if (entry.first.rfind("float32 ", 0) == 0) {
      EXPECT_LE(entry.second.worst, kAlarm) << entry.first << ": within the bound, but more than it ever was";
    }
  }
}

TEST(Bounded, LongSumsOnAFixedSeed) {
  // The alarm's own data: an exact activation, so that only the sums err.
  Ledger ledger;
  for (const TypePair pair : type_pairs()) {
    for (int64_t C : {1, 64, 1024, 32768}) {
      Case c;
      set_types(c, pair);
      c.C = C, c.T = 4, c.H = 3, c.W = 7, c.fill = Fill::kRandom, c.level = 0.1, c.seed = 20180618;
      check_bounded(c, ledger);
    }
    for (int64_t pixels : {64, 4096, 100000}) {
      Case c;
      set_types(c, pair);
      c.C = 3, c.T = 4, c.H = 1, c.W = pixels, c.fill = Fill::kRandom, c.level = 0.1, c.seed = 20180619;
      check_bounded(c, ledger);
    }
  }
  ledger.print("long sums");
  alarm(ledger);
}

TEST(Bounded, EveryActivation) {
  Ledger ledger;
  for (const TypePair pair : type_pairs()) {
    for (int f = 0; f < PNN_ACTIVATION_COUNT; f++) {
      for (bool norm : {false, true}) {
        for (double level : {0.1, 3.0}) {
          Case c;
          set_types(c, pair);
          c.B = 2, c.C = 6, c.T = 5, c.M = 2, c.H = 7, c.W = 9, c.fill = Fill::kRandom, c.level = level;
          c.activation = static_cast<pnn_activation>(f), c.norm = norm, c.training = norm, c.eps = 1e-5;
          c.noise = level > 1 ? PNN_NOISE_TENSOR : PNN_NOISE_NORMAL, c.seed = static_cast<uint64_t>(f) + 31;
          check_bounded(c, ledger);
          c.input_layout = c.output_layout = c.grad_output_layout = c.grad_input_layout = LayoutKind::kChannelsLast;
          check_bounded(c, ledger);
          // Few maps: rows of channels-last panels shorter than a vector.
          c.C = 2, c.T = 3;
          check_bounded(c, ledger);
        }
      }
    }
  }
  ledger.print("every activation");
}

TEST(Bounded, RandomCombinations) {
  Ledger ledger;
  const int64_t count = scaled(300);
  for (int64_t i = 0; i < count; i++) {
    Random random(static_cast<uint64_t>(i) + 5000);
    Case c;
    set_types(c, type_pairs()[static_cast<size_t>(i) % type_pairs().size()], random.flip());
    c.seed = random.bits() >> 1;
    c.M = random.pick(std::vector<int64_t>{1, 1, 2, 5});
    c.C = random.pick(std::vector<int64_t>{1, 2, 6, 16, 40});
    c.T = random.pick(std::vector<int64_t>{1, 6, 16, 20});
    c.groups = random_groups(random, c.C, c.T);
    c.B = random.integer(1, 4);
    c.H = random.integer(1, 9);
    c.W = random.pick(std::vector<int64_t>{2, 7, 16, 33});
    c.stride_h = random.integer(1, 2);
    c.stride_w = random.integer(1, 2);
    c.noise = static_cast<pnn_noise>(random.integer(0, PNN_NOISE_COUNT - 1));
    c.shared = c.noise != PNN_NOISE_NONE && random.flip();
    c.level = random.pick(std::vector<double>{0.1, 1, -0.7, 4});
    c.activation = static_cast<pnn_activation>(random.integer(0, PNN_ACTIVATION_COUNT - 1));
    c.fill = random.pick(std::vector<Fill>{Fill::kRandom, Fill::kRandom, Fill::kCancelling, Fill::kHuge, Fill::kTiny});
    // The processor's bfloat16 dot products take denormals for zeros.
    if (c.fill == Fill::kTiny) c.exact = true;
    c.norm = (c.fill == Fill::kRandom || c.fill == Fill::kCancelling) && random.flip();
    c.training = c.norm && c.samples() > 1 && random.flip();
    c.eps = random.pick(std::vector<double>{1e-5, 1e-3, 1});
    // 1000 +- 1 has few values in 16 bits, and a saturating activation none: spread is what normalisation needs.
    if (c.fill == Fill::kCancelling && c.norm) c.activation = PNN_ACTIVATION_RELU;
    c.affine = random.flip();
    c.bias = random.flip();
    c.input_layout = random.pick(input_layouts());
    c.output_layout = random.pick(output_layouts());
    c.grad_output_layout = random.pick(input_layouts());
    c.grad_input_layout = random.pick(output_layouts());
    if (random.integer(0, 2) == 0) {
      c.input_layout = c.output_layout = c.grad_output_layout = c.grad_input_layout = LayoutKind::kChannelsLast;
    }
    check_bounded(c, ledger);
    if (testing::Test::HasFailure()) break;
  }
  ledger.print("random combinations");
}

TEST(Bounded, NearlyConstantMaps) {
  // The uncentred folding of the normalisation would lose ten bits here.
  Ledger ledger;
  for (const TypePair pair : type_pairs()) {
    if (is_half(pair.input)) continue;  // cannot hold such data
    for (pnn_activation f : {PNN_ACTIVATION_RELU, PNN_ACTIVATION_IDENTITY}) {
      for (bool training : {false, true}) {
        Case c;
        set_types(c, pair);
        c.B = 3, c.C = 16, c.T = 8, c.H = 16, c.W = 16, c.level = 0.0001, c.activation = f;
        c.norm = true, c.training = training, c.eps = 1e-12, c.fill = Fill::kNearConstant, c.seed = 77;
        check_bounded(c, ledger);
      }
    }
    // Exactly constant: the variance is 0, and eps alone scales.
    Case c;
    set_types(c, pair);
    c.B = 2, c.C = 3, c.T = 4, c.H = 4, c.W = 4, c.noise = PNN_NOISE_NONE, c.norm = c.training = true, c.eps = 1e-5;
    Problem problem(c);
    problem.input.fill([] { return 0.1; });
    problem.bias.fill([] { return 0.0; });
    problem.norm_bias.fill([] { return 0.0; });
    ASSERT_EQ(problem.forward(), PNN_OK) << problem.error.message;
    for (int64_t k = 0; k < c.K(); k++) EXPECT_EQ(problem.variance.value(k), 0.0);
    for (int64_t i = 0; i < problem.output.count(); i++) EXPECT_EQ(problem.output.value(i), 0.0);
  }
  ledger.print("nearly constant maps");
  alarm(ledger);
}

// Windows of channels, the last one shorter, whose masks are read one window at a time where they are many.
TEST(Bounded, ManyMasks) {
  Ledger ledger;
  for (const TypePair pair : type_pairs()) {
    const bool pairs = pair.input == PNN_BFLOAT16 && !pair.exact;  // beside float32, what has its own way there
    if (!pairs && (pair.input != PNN_FLOAT32 || pair.weight != PNN_FLOAT32)) continue;
    for (int64_t masks : {5, 64}) {
      Case c;
      set_types(c, pair);
      c.B = 2, c.C = masks == 5 ? 100 : 36, c.T = 6, c.M = masks, c.H = 9, c.W = 8, c.noise = PNN_NOISE_TENSOR;
      c.fill = Fill::kRandom, c.level = 0.1, c.seed = 404;
      c.gradients = kAllGradients & ~static_cast<unsigned>(kGradMask);
      check_bounded(c, ledger);
      c.input_layout = c.grad_input_layout = LayoutKind::kChannelsLast;
      check_bounded(c, ledger);
      c.output_layout = c.grad_output_layout = LayoutKind::kChannelsLast;
      check_bounded(c, ledger);
    }
  }
  ledger.print("many masks");
}

// Moments are summed about a guess from a few of a chunk's values; where it is far off, or a value is infinite, again.
void check_far_guesses(pnn_dtype type, int64_t side, LayoutKind layout, int64_t M, pnn_activation f) {
  Case c;
  set_types(c, {type, type});
  c.B = 3, c.C = 5, c.T = 2, c.H = c.W = side, c.M = M, c.activation = f, c.input_layout = layout;
  c.noise = PNN_NOISE_NONE, c.norm = c.training = true, c.eps = 1e-5;
  Problem problem(c);
  Random random(static_cast<uint64_t>(side));
  const int64_t pixels = side * side, infinite = (c.C + 1) * pixels + 20; /* channel 1 of image 1 */
  int64_t next = 0;
  problem.input.fill([&] {
    const int64_t i = next++, pixel = i % pixels, column = i / (c.C * pixels) * pixels + pixel;
    if (i == infinite) return HUGE_VAL;
    // What is looked at: four runs of 16 of 512; in channels-last 16 pixels of 512, 256 or all 243.
    const bool guessed = layout == LayoutKind::kChannelsLast && M == 1
                             ? (side == 9 ? column % 15 == 0 : pixel % (side == 16 ? 16 : 32) == 0)
                             : pixel % 128 < 16;
    return guessed ? 4.0 : static_cast<double>(random.integer(-1000, 1000)) * 0.001;
  });
  ASSERT_EQ(problem.forward(), PNN_OK) << problem.error.message;
  const double n = static_cast<double>(c.B * pixels), u = unit_of(type);
  for (int64_t k = 0; k < c.K(); k++) {
    long double sum = 0, squares = 0;
    const auto value = [&](int64_t j) {
      const double x = problem.input.value((j / pixels * c.C + k / M) * pixels + j % pixels);
      return f == PNN_ACTIVATION_RELU ? std::max(x, 0.0) : f == PNN_ACTIVATION_SIGMOID ? 1 / (1 + std::exp(-x)) : x;
    };
    for (int64_t j = 0; j < c.B * pixels; j++) sum += value(j);
    const double mean = static_cast<double>(sum / n);
    for (int64_t j = 0; j < c.B * pixels; j++) squares += (value(j) - sum / n) * (value(j) - sum / n);
    const double variance = static_cast<double>(squares / n);
    const std::string where = c.describe() + ", map " + std::to_string(k);
    if (std::isinf(mean)) {
      EXPECT_TRUE(same_value(problem.mean.value(k), mean)) << where;
      EXPECT_TRUE(std::isnan(problem.variance.value(k))) << where;
      continue;
    }
    EXPECT_NEAR(problem.mean.value(k), mean, 16 * u) << where;
    EXPECT_NEAR(problem.variance.value(k), variance, 64 * u * variance) << where;
  }
}

TEST(Bounded, MomentsWhoseGuessIsFarOff) {
  for (pnn_dtype type : {PNN_FLOAT32, PNN_FLOAT64})
    for (int64_t side : {9, 16, 32})  // chunks that span images, and chunks that lie in one
      for (LayoutKind layout : {LayoutKind::kContiguous, LayoutKind::kChannelsLast})
        for (int64_t M : {1, 2})
          for (pnn_activation f : {PNN_ACTIVATION_RELU, PNN_ACTIVATION_IDENTITY, PNN_ACTIVATION_SIGMOID})
            check_far_guesses(type, side, layout, M, f);
}

TEST(Bounded, SpecialValues) {
  Ledger ledger;
  for (int64_t i = 0; i < scaled(600); i++) {
    Random random(static_cast<uint64_t>(i) + 9000);
    Case c;
    set_types(c, type_pairs()[static_cast<size_t>(i) % type_pairs().size()]);
    c.seed = random.bits() >> 1;
    c.M = random.integer(1, 2);
    c.C = random.pick(std::vector<int64_t>{1, 3, 6});
    c.T = random.pick(std::vector<int64_t>{1, 6, 9});
    c.groups = random_groups(random, c.C, c.T);
    c.B = random.integer(1, 2);
    c.H = random.integer(1, 3);
    c.W = random.pick(std::vector<int64_t>{1, 7, 16, 21});
    c.noise = static_cast<pnn_noise>(random.integer(0, PNN_NOISE_COUNT - 1));
    c.shared = c.noise != PNN_NOISE_NONE && random.flip();
    c.activation = static_cast<pnn_activation>(i / 6 % PNN_ACTIVATION_COUNT);
    c.fill = Fill::kSpecial;
    c.norm = random.integer(0, 3) == 0;
    c.training = c.norm && c.samples() > 1 && random.flip();
    c.eps = 1e-5;
    check_bounded(c, ledger);
    if (testing::Test::HasFailure()) break;
  }
}

// Denormal numbers pass through as they are.
TEST(Bounded, DenormalsAreNotFlushed) {
  for (const TypePair pair : type_pairs()) {
    if (pair.input != pair.weight) continue;
    Case c;
    set_types(c, pair);
    c.exact = true;
    c.C = 1, c.T = 1, c.W = 40, c.noise = PNN_NOISE_NONE, c.activation = PNN_ACTIVATION_IDENTITY, c.bias = false;
    Problem problem(c);
    const Format f = format_of(pair.input);
    const double smallest = std::ldexp(1.0, f.low - f.precision + 1);
    int64_t next = -20;
    problem.input.fill([&] { return smallest * static_cast<double>(next++); });
    problem.weight.fill([] { return 1.0; });
    problem.grad_output.fill([&] { return smallest * static_cast<double>(next--); });
    ASSERT_EQ(problem.forward(), PNN_OK);
    ASSERT_EQ(problem.backward(), PNN_OK);
    for (int64_t i = 0; i < 40; i++) {
      EXPECT_EQ(problem.output.value(i), problem.input.value(i)) << name_of(pair.input);
      EXPECT_EQ(problem.grad_input.value(i), problem.grad_output.value(i)) << name_of(pair.input);
    }
  }
}

}  // namespace
}  // namespace pnn_test
