/*
 * activation_test.cc - the GPU's activations: float against long double in ulp, double against the CPU's bits, and the
 * special values.
 */
#include <gtest/gtest.h>

#include "activation.h"
#include "case.h"

namespace pnn_test {
namespace {

/* The limits that cuda/activation.h states. */
double limit_of(pnn_activation f, bool gradient) {
  switch (f) {
    case PNN_ACTIVATION_IDENTITY:
    case PNN_ACTIVATION_RELU:
    case PNN_ACTIVATION_HARDTANH: return 0;
    case PNN_ACTIVATION_LEAKY_RELU: return 0.5;
    case PNN_ACTIVATION_ELU: return gradient ? 5 : 2;
    case PNN_ACTIVATION_GELU: return 5;
    default: return gradient ? 5 : 3;
  }
}

double ulp_of(double x, double least, pnn_dtype type = PNN_FLOAT32) {
  const Format format = format_of(type);
  const double m = std::max(std::fabs(x), std::max(least, std::ldexp(1.0, format.low)));
  return std::ldexp(1.0, std::ilogb(m) - format.precision + 1);
}

class Activation : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Cuda, Activation, testing::Range(0, static_cast<int>(PNN_ACTIVATION_COUNT)),
                         [](const testing::TestParamInfo<int> &i) {
                           return name_of(static_cast<pnn_activation>(i.param));
                         });

TEST_P(Activation, FloatWithinItsLimit) {
  const pnn_activation f = static_cast<pnn_activation>(GetParam());
  double worst = 0, worst_gradient = 0;
  float at = 0, at_gradient = 0;
  const bool crosses = f == PNN_ACTIVATION_GELU || f == PNN_ACTIVATION_SILU; /* derivatives with a zero */
  const auto test = [&](float u) {
    const long double exact = activate(f, u, false), slope = derivative(f, u, false);
    const double value = static_cast<double>(pnn_cuda::activate(f, u));
    const double gradient = static_cast<double>(pnn_cuda::activate_gradient(f, u, 1.0f));
    if (std::fabs(static_cast<double>(exact)) <= 3.4e38) {
      const double e = static_cast<double>(std::fabs(value - exact)) / ulp_of(static_cast<double>(exact), 0);
      if (!(e <= worst)) worst = e, at = u;
    }
    const double least = crosses && u < 0 && u > -4 ? 0.125 : 0;
    const double e = static_cast<double>(std::fabs(gradient - slope)) / ulp_of(static_cast<double>(slope), least);
    if (!(e <= worst_gradient)) worst_gradient = e, at_gradient = u;
  };
  /* Every exponent, a few hundred fractions of each, and the range where they bend more densely. */
  for (uint32_t bits = 0; bits < 0x7f800000u; bits += 15487) {
    test(pnn_cuda::float_of(bits));
    test(pnn_cuda::float_of(bits | 0x80000000u));
  }
  for (int i = -110000; i <= 20000; i++) test(static_cast<float>(i) * 0.00099999f);
  std::printf("%-10s worst %.3f ulp at %a, derivative %.3f ulp at %a\n", name_of(f), worst, static_cast<double>(at),
              worst_gradient, static_cast<double>(at_gradient));
  EXPECT_LE(worst, limit_of(f, false));
  EXPECT_LE(worst_gradient, limit_of(f, true));
}

TEST_P(Activation, DoubleWithinItsLimit) {
  const pnn_activation f = static_cast<pnn_activation>(GetParam());
  const bool crosses = f == PNN_ACTIVATION_GELU || f == PNN_ACTIVATION_SILU;
  double worst = 0, worst_gradient = 0;
  Random random(11);
  for (int i = 0; i < 60000; i++) {
    /* Down to where results still have all their digits. */
    const double u =
        i % 3 == 0 ? std::ldexp(random.uniform(), static_cast<int>(random.integer(-60, 5))) : 20 * random.uniform();
    const long double exact = activate(f, u, true), slope = derivative(f, u, true);
    const double least = crosses && u < 0 && u > -4 ? 0.125 : 0;
    worst = std::max(worst, static_cast<double>(std::fabs(pnn_cuda::activate(f, u) - exact)) /
                                ulp_of(static_cast<double>(exact), 0, PNN_FLOAT64));
    worst_gradient =
        std::max(worst_gradient, static_cast<double>(std::fabs(pnn_cuda::activate_gradient(f, u, 1.0) - slope)) /
                                     ulp_of(static_cast<double>(slope), least, PNN_FLOAT64));
  }
  std::printf("%-10s double: worst %.3f ulp, derivative %.3f ulp\n", name_of(f), worst, worst_gradient);
  EXPECT_LE(worst, f == PNN_ACTIVATION_GELU ? 10 : 6);
  EXPECT_LE(worst_gradient, 6);
}

TEST_P(Activation, SpecialValues) {
  const pnn_activation f = static_cast<pnn_activation>(GetParam());
  const float inf = HUGE_VALF;
  for (float u : {inf, -inf, 0.0f, -0.0f, 1.0f, -1.0f, NAN, 1e-40f, -1e-40f, 3e38f, -3e38f}) {
    const double got = static_cast<double>(pnn_cuda::activate(f, u));
    long double want = activate(f, u, false);
    /* As PyTorch's formulas have it: silu(-inf) = -inf * 0. */
    if (f == PNN_ACTIVATION_SILU && u == -inf) want = NAN;
    if (std::isnan(want) || std::isinf(want)) {
      EXPECT_TRUE(same_value(got, static_cast<double>(want))) << u << ": " << got;
    }
    EXPECT_TRUE(!std::isnan(u) || std::isnan(got));
    EXPECT_TRUE(!std::isnan(want) || std::isnan(pnn_cuda::activate(f, static_cast<double>(u)))) << u;
  }
  EXPECT_EQ(pnn_cuda::activate_gradient(PNN_ACTIVATION_RELU, 0.0f, 3.0f), 0.0f);
  EXPECT_EQ(pnn_cuda::activate_gradient(PNN_ACTIVATION_RELU, NAN, 3.0f), 3.0f);
  EXPECT_EQ(pnn_cuda::activate_gradient(PNN_ACTIVATION_HARDTANH, 1.0f, 3.0f), 0.0f);
  EXPECT_EQ(pnn_cuda::activate_gradient(PNN_ACTIVATION_HARDTANH, NAN, 3.0f), 3.0f);
  EXPECT_EQ(pnn_cuda::activate_gradient(PNN_ACTIVATION_LEAKY_RELU, NAN, 1.0f), 0.01f);
  EXPECT_TRUE(std::signbit(pnn_cuda::activate(PNN_ACTIVATION_TANH, -0.0f)));
}

TEST(Divide, CloseInFloatAndRoundedInDouble) {
  Random random(3);
  double worst = 0;
  int64_t differ = 0;
  for (int i = 0; i < 200000; i++) {
    const float n = static_cast<float>(random.uniform()),
                d = static_cast<float>(std::ldexp(1 + std::fabs(random.uniform()), i % 30));
    const double exact = static_cast<double>(n) / static_cast<double>(d);
    worst = std::max(worst, std::fabs(static_cast<double>(pnn_cuda::divide(n, d)) - exact) / ulp_of(exact, 0));
    const double x = random.uniform(), y = std::ldexp(1 + std::fabs(random.uniform()), i % 30);
    differ += pnn_cuda::divide(x, y) != x / y;
  }
  EXPECT_LE(worst, 1.0);
  EXPECT_EQ(differ, 0);
}

}  // namespace
}  // namespace pnn_test
