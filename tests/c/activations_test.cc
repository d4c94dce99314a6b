// activations_test.cc - csrc/kernels/activations.h: errors in ulp, equal bits on every instruction set and compiler,
// special values and the choices of the derivatives.
//
// Every check runs on every instruction set that the processor has. float is compared with the math library's double,
// double with its long double (where that has 64 bits or more) and with mpmath's values in activations_table.h.
// PNN_EXHAUSTIVE=1 takes all 2^32 floats and fifty times the doubles. PNN_PRINT_ULP=1 prints the worst error of each
// function and where it is.
#include <gtest/gtest.h>
#include <pnn/pnn.h>

#include <cfloat>
#include <cinttypes>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "activations_kernels.h"

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// ---- the instruction sets ----

struct Set {
  const char* name;
  const pnn_test_activation* table;
};

bool CpuHas(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("fma") != 0;
  if (std::strcmp(name, "avx2") == 0) return fma && __builtin_cpu_supports("avx2");
  if (std::strcmp(name, "avx512") == 0) {
    return fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  }
#elif defined(__aarch64__)
  if (std::strcmp(name, "neon") == 0) return true;
#endif
  return std::strcmp(name, "portable") == 0;
}

// Those that are built and that the processor has, portable first.
const std::vector<Set>& Sets() {
  static const std::vector<Set> sets = [] {
    std::vector<Set> built = {{"portable", pnn_test_activations_portable}};
#if defined(PNN_HAVE_AVX2)
    built.push_back({"avx2", pnn_test_activations_avx2});
#endif
#if defined(PNN_HAVE_AVX512)
    built.push_back({"avx512", pnn_test_activations_avx512});
#endif
#if defined(PNN_HAVE_NEON)
    built.push_back({"neon", pnn_test_activations_neon});
#endif
    std::vector<Set> present;
    for (const Set& set : built) {
      if (CpuHas(set.name)) present.push_back(set);
    }
    return present;
  }();
  return sets;
}

// Without the instruction, portable's fused multiply-add is a slow library function: it gets fewer samples then.
bool SlowPortable() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return !__builtin_cpu_supports("fma");
#else
  return false;
#endif
}

// ---- the exact functions, in double for float results and in long double for double results ----

// The math library's function that fits T.
template <class T>
T Tail(T z) {  // the normal distribution above z >= 0
  if (z > 200) return 0;
  const T y = z * static_cast<T>(0.707106781186547524400844362104849039L);
  // erfc magnifies y's rounding error by 2y^2: exp(y^2 - z^2/2) takes it back.
  const T s = z * z / 2;
  const T excess = std::fma(y, y, -s) - std::fma(z, z / 2, -s);
  return std::erfc(y) / 2 * (1 + excess);
}

template <class T>
T Density(T z) {
  if (std::fabs(z) > 200) return 0;
  const T s = z * z / 2;
  return std::exp(-s) * (1 - std::fma(z, z / 2, -s)) * static_cast<T>(0.398942280401432677939946059934381868L);
}

const double kAlpha = 1.6732632423543772848170429916717, kScale = 1.0507009873554804934193349852946;

template <class T>
T Value(int activation, T u, T slope) {
  switch (activation) {
    case PNN_ACTIVATION_IDENTITY: return u;
    case PNN_ACTIVATION_RELU: return u < 0 ? 0 : u;
    case PNN_ACTIVATION_LEAKY_RELU: return u > 0 ? u : u * slope;
    case PNN_ACTIVATION_ELU: return u > 0 ? u : std::expm1(u);
    case PNN_ACTIVATION_SELU: return T(kScale) * (u > 0 ? u : T(kAlpha) * std::expm1(u));
    case PNN_ACTIVATION_GELU: return u < 0 ? u * Tail(-u) : u * (1 - Tail(u));
    case PNN_ACTIVATION_SILU:
      if (std::isinf(u)) return u > 0 ? u : -u * 0;
      return u < 0 ? u * std::exp(u) / (1 + std::exp(u)) : u / (1 + std::exp(-u));
    case PNN_ACTIVATION_TANH: return std::tanh(u);
    case PNN_ACTIVATION_SIGMOID: return u < 0 ? std::exp(u) / (1 + std::exp(u)) : 1 / (1 + std::exp(-u));
    case PNN_ACTIVATION_HARDTANH: return u < -1 ? -1 : u > 1 ? 1 : u;
  }
  return u;
}

template <class T>
T Derivative(int activation, T u, T slope) {
  const T t = std::exp(-std::fabs(u)), s = 1 + t;
  switch (activation) {
    case PNN_ACTIVATION_IDENTITY: return 1;
    case PNN_ACTIVATION_RELU: return u <= 0 ? 0 : 1;
    case PNN_ACTIVATION_LEAKY_RELU: return u > 0 ? 1 : slope;
    case PNN_ACTIVATION_ELU: return u > 0 ? 1 : std::exp(u);
    case PNN_ACTIVATION_SELU: return T(kScale) * (u > 0 ? T(1) : T(kAlpha) * std::exp(u));
    case PNN_ACTIVATION_GELU:
      if (std::isinf(u)) return u * 0;
      return u < 0 ? Tail(-u) + u * Density(u) : 1 - Tail(u) + u * Density(u);
    case PNN_ACTIVATION_SILU:
      if (std::isinf(u)) return u * 0;
      return u < 0 ? t * (1 + u / s) / s : (1 + u * (t / s)) / s;
    case PNN_ACTIVATION_TANH: {
      const T t2 = std::exp(-2 * std::fabs(u));
      return 4 * t2 / ((1 + t2) * (1 + t2));
    }
    case PNN_ACTIVATION_SIGMOID: return t / (s * s);
    case PNN_ACTIVATION_HARDTANH: return u <= -1 || u >= 1 ? 0 : 1;
  }
  return 1;
}

// ---- the stated limits, in the order of pnn_activation: the table at the top of activations.h ----

struct Limits {
  double value_f32, grad_f32, value_f64, grad_f64;
  double floor;  // derivatives below it are judged in ulp of it: those that have a zero
};
const Limits kLimits[PNN_ACTIVATION_COUNT] = {
    {0, 0, 0, 0, 0},              // identity
    {0, 0, 0, 0, 0},              // relu
    {0.5, 0.5, 0.5, 0.5, 0},      // leaky_relu
    {0.51, 0.51, 1, 2, 0},        // elu
    {0.51, 0.51, 2, 3, 0},        // selu
    {0.51, 0.51, 4.5, 6, 0.125},  // gelu
    {0.51, 0.51, 3.5, 5, 0.125},  // silu
    {0.51, 0.51, 3, 3.5, 0},      // tanh
    {0.51, 0.51, 2.5, 3.5, 0},    // sigmoid
    {0, 0, 0, 0, 0},              // hardtanh
};

// Below it no derivative has a zero, so that its own size counts again.
constexpr double kBelowZeros = -4;

// |got - exact| in units of the last place of a T as large as exact (or as `floor`).
template <class T, class Exact>
double Ulps(T got, Exact exact, double floor = 0) {
  if (std::isnan(exact) || std::isnan(got)) return std::isnan(exact) && std::isnan(got) ? 0 : kInf;
  if (std::isinf(exact)) return static_cast<Exact>(got) == exact ? 0 : kInf;
  const Exact size = std::fmax(std::fabs(exact), static_cast<Exact>(floor));
  int exponent = std::numeric_limits<T>::min_exponent;
  if (size > std::numeric_limits<T>::min()) std::frexp(size, &exponent);
  if (std::isinf(got)) {  // right where the exact value rounds to infinity
    const Exact half = std::ldexp(Exact(1), std::numeric_limits<T>::max_exponent - std::numeric_limits<T>::digits - 1);
    const bool overflows = std::fabs(exact) >= static_cast<Exact>(std::numeric_limits<T>::max()) + half;
    return overflows && std::signbit(exact) == std::signbit(got) ? 0 : kInf;
  }
  const Exact error = std::fabs(static_cast<Exact>(got) - exact);
  return static_cast<double>(std::ldexp(error, std::numeric_limits<T>::digits - exponent));
}

// The worst error seen, and where.
struct Worst {
  double ulps = 0, u = 0, d = 1;
  void Add(double error, double at, double with = 1) {
    if (!(error <= ulps)) ulps = error, u = at, d = with;
  }
  void Check(const std::string& what, double limit) const {
    if (std::getenv("PNN_PRINT_ULP")) std::printf("worst  %-40s %.4f ulp at %a\n", what.c_str(), ulps, u);
    EXPECT_LE(ulps, limit) << what << ", worst at u = " << std::hexfloat << u << ", d = " << d;
  }
};

// ---- inputs ----

struct Random {  // splitmix64
  uint64_t state;
  uint64_t Bits() {
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  double Uniform(double low, double high) { return low + (high - low) * static_cast<double>(Bits() >> 11) * 0x1p-53; }
};

float FloatOf(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
double DoubleOf(uint64_t bits) {
  double f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

float Float16(uint32_t h) {
  const float sign = h >> 15 ? -1.0f : 1.0f;
  const int exponent = static_cast<int>(h >> 10 & 31);
  const int fraction = static_cast<int>(h & 1023);
  if (exponent == 31) return fraction ? std::numeric_limits<float>::quiet_NaN() : sign * static_cast<float>(kInf);
  return sign * std::ldexp(static_cast<float>(exponent ? fraction + 1024 : fraction), (exponent ? exponent : 1) - 25);
}

// Every bfloat16 and every float16 value.
std::vector<float> All16Bit() {
  std::vector<float> u;
  for (uint32_t h = 0; h < 65536; h++) u.push_back(FloatOf(h << 16));
  for (uint32_t h = 0; h < 65536; h++) u.push_back(Float16(h));
  return u;
}

// Every sign and exponent, the ends of each binade among them; then evenly where the functions bend, and their zeros.
std::vector<float> DenseFloats() {
  std::vector<float> u;
  Random random{1};
  for (uint32_t top = 0; top < 512; top++) {
    for (uint32_t fraction : {0u, 1u, 2u, 0x3fffffu, 0x400000u, 0x7ffffeu, 0x7fffffu}) {
      u.push_back(FloatOf(top << 23 | fraction));
    }
    for (int i = 0; i < 250; i++) u.push_back(FloatOf(top << 23 | static_cast<uint32_t>(random.Bits() >> 41)));
  }
  for (int i = 0; i < 60000; i++) u.push_back(static_cast<float>(random.Uniform(-110, 20)));
  for (int i = 0; i < 60000; i++) u.push_back(static_cast<float>(random.Uniform(-3, 3)));
  for (float zero : {-0.7517915f, -1.2784645f}) {
    for (int i = -200; i <= 200; i++) u.push_back(zero + static_cast<float>(i) * 6e-8f);
  }
  return u;
}

bool Exhaustive() {
  const char* wanted = std::getenv("PNN_EXHAUSTIVE");
  return wanted && std::strcmp(wanted, "1") == 0;
}

std::vector<double> DenseDoubles() {
  const int times = Exhaustive() ? 50 : 1;
  std::vector<double> u;
  Random random{2};
  for (uint64_t top = 0; top < 4096; top++) {
    for (uint64_t fraction : {uint64_t{0}, uint64_t{1}, (uint64_t{1} << 52) - 1}) {
      u.push_back(DoubleOf(top << 52 | fraction));
    }
    u.push_back(DoubleOf(top << 52 | random.Bits() >> 12));
  }
  for (int i = 0; i < 20000 * times; i++) u.push_back(random.Uniform(-3, 3));
  for (int i = 0; i < 10000 * times; i++) u.push_back(random.Uniform(-40, 40));
  for (int i = 0; i < 6000 * times; i++) u.push_back(random.Uniform(-750, 0));
  for (int i = 0; i < 2000 * times; i++) u.push_back(random.Uniform(0, 750));
  for (int i = 0; i < 2000 * times; i++) u.push_back(random.Uniform(-746, -705));
  return u;
}

// Raw bits, so NaNs, infinities, denormals and both zeros too, and an even spread of exponents.
template <class T>
std::vector<T> AnyBits(size_t n, uint64_t seed) {
  static const T special[] = {T(0),
                              T(-0.0),
                              T(1),
                              T(-1),
                              T(kInf),
                              T(-kInf),
                              T(kNan),
                              std::numeric_limits<T>::max(),
                              std::numeric_limits<T>::lowest(),
                              std::numeric_limits<T>::denorm_min(),
                              -std::numeric_limits<T>::denorm_min(),
                              std::numeric_limits<T>::min()};
  std::vector<T> u;
  Random random{seed};
  for (size_t i = 0; i < n; i++) {
    const uint64_t bits = random.Bits();
    if (i % 16 == 0) {
      u.push_back(special[bits % (sizeof special / sizeof special[0])]);
    } else if (i % 2) {
      u.push_back(static_cast<T>(Random{bits}.Uniform(i % 4 == 1 ? -4 : -800, i % 4 == 1 ? 4 : 100)));
    } else {
      u.push_back(static_cast<T>(sizeof(T) == 4 ? static_cast<double>(FloatOf(static_cast<uint32_t>(bits >> 32)))
                                                : DoubleOf(bits)));
    }
  }
  return u;
}

template <class T>
bool SameBits(T a, T b) {
  return (std::isnan(a) && std::isnan(b)) || std::memcmp(&a, &b, sizeof a) == 0;
}

// FNV-1a over the values' bits, lowest byte first, every NaN as the same one.
template <class T>
uint64_t Hash(const std::vector<T>& values) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (T value : values) {
    uint64_t bits = 0;
    uint32_t word;
    if (sizeof(T) == 4) {
      const float f = static_cast<float>(value);
      std::memcpy(&word, &f, 4);
      bits = word;
    } else {
      const double f = static_cast<double>(value);
      std::memcpy(&bits, &f, 8);
    }
    if (std::isnan(value)) bits = 0x7fc0;
    for (size_t i = 0; i < sizeof(T); i++) hash = (hash ^ (bits >> 8 * i & 255)) * 0x100000001b3u;
  }
  return hash;
}

// Both float functions of one set over u, against double.
void CheckFloats(const Set& set, int activation, const std::vector<float>& u, Worst* value, Worst* grad) {
  const pnn_test_activation& kernel = set.table[activation];
  std::vector<float> d(u.size()), y(u.size()), g(u.size());
  Random random{3};
  for (float& each : d)
    each = static_cast<float>(std::ldexp(random.Uniform(-2, 2), static_cast<int>(random.Bits() % 41) - 20));
  kernel.value_f32(y.data(), u.data(), u.size());
  kernel.grad_f32(g.data(), u.data(), d.data(), u.size());
  const double slope = static_cast<double>(0.01f);
  for (size_t i = 0; i < u.size(); i++) {
    if (std::isnan(u[i])) {
      EXPECT_TRUE(std::isnan(y[i])) << kernel.name;
      continue;
    }
    const double x = static_cast<double>(u[i]), dx = static_cast<double>(d[i]);
    value->Add(Ulps<float, double>(y[i], Value<double>(activation, x, slope)), x);
    const double floor = x < kBelowZeros ? 0 : kLimits[activation].floor * std::fabs(dx);
    grad->Add(Ulps<float, double>(g[i], dx * Derivative<double>(activation, x, slope), floor), x, dx);
  }
}

// ---- one test per activation ----

class Activations : public testing::TestWithParam<int> {
 protected:
  static void SetUpTestSuite() {
    std::printf("instruction sets:");
    for (const Set& set : Sets()) std::printf(" %s", set.name);
    std::printf("\n");
  }
  int activation() const { return GetParam(); }
  std::string name() const { return Sets()[0].table[GetParam()].name; }
  const Limits& limits() const { return kLimits[GetParam()]; }
};

INSTANTIATE_TEST_SUITE_P(Each, Activations, testing::Range(0, static_cast<int>(PNN_ACTIVATION_COUNT)),
                         [](const testing::TestParamInfo<int>& info) {
                           return std::string(pnn_test_activations_portable[info.param].name);
                         });

TEST_P(Activations, FloatErrorsStayBelowTheStatedLimit) {
  for (const Set& set : Sets()) {
    Worst value, grad;
    std::vector<float> u = All16Bit();
    const std::vector<float> dense = DenseFloats();
    u.insert(u.end(), dense.begin(), dense.end());
    if (SlowPortable() && std::strcmp(set.name, "portable") == 0) {
      std::vector<float> some;
      for (size_t i = 0; i < u.size(); i += 13) some.push_back(u[i]);
      u = some;
    }
    CheckFloats(set, activation(), u, &value, &grad);
    value.Check(name() + " f32 " + set.name, limits().value_f32);
    grad.Check(name() + "' f32 " + set.name, limits().grad_f32);
  }
}

// All floats in the order of their bits: every one of them, or one in 4093 (a prime).
TEST_P(Activations, FloatsFromEndToEnd) {
  const uint64_t step = Exhaustive() ? 1 : 4093, end = uint64_t{1} << 32;
  const Set& best = Sets().back();  // the others are compared with it, bit for bit
  Worst value, grad;
  std::vector<float> u, y, other;
  int block = 0;
  for (uint64_t start = 0; start < end; block++) {
    u.clear();
    for (; start < end && u.size() < 65536; start += step) u.push_back(FloatOf(static_cast<uint32_t>(start)));
    CheckFloats(best, activation(), u, &value, &grad);
    y.resize(u.size());
    other.resize(u.size());
    best.table[activation()].value_f32(y.data(), u.data(), u.size());
    for (const Set& set : Sets()) {
      // portable calls a function for each fused multiply-add: every 64th block will do there.
      if (&set == &Sets()[0] && block % 64 != 0) continue;
      set.table[activation()].value_f32(other.data(), u.data(), u.size());
      for (size_t i = 0; i < u.size(); i++) {
        ASSERT_TRUE(SameBits(y[i], other[i])) << set.name << " at " << std::hexfloat << u[i];
      }
    }
  }
  value.Check(name() + " f32 end to end", limits().value_f32);
  grad.Check(name() + "' f32 end to end", limits().grad_f32);
}

TEST_P(Activations, DoubleErrorsStayBelowTheStatedLimit) {
  if (LDBL_MANT_DIG < 64) GTEST_SKIP() << "long double is double here: only mpmath's table judges double results";
  const std::vector<double> u = DenseDoubles();
  std::vector<double> ones(u.size(), 1), d(u.size()), y(u.size()), g(u.size()), gd(u.size());
  std::vector<long double> exact, exact_grad;
  Random random{4};
  for (double& each : d) each = random.Uniform(1, 2);
  for (double x : u) {
    exact.push_back(Value<long double>(activation(), x, 0.01));
    exact_grad.push_back(Derivative<long double>(activation(), x, 0.01));
  }
  for (const Set& set : Sets()) {
    const pnn_test_activation& kernel = set.table[activation()];
    kernel.value_f64(y.data(), u.data(), u.size());
    kernel.grad_f64(g.data(), u.data(), ones.data(), u.size());
    kernel.grad_f64(gd.data(), u.data(), d.data(), u.size());
    Worst value, grad;
    for (size_t i = 0; i < u.size(); i++) {
      if (std::isnan(u[i])) continue;
      const double floor = u[i] < kBelowZeros ? 0 : limits().floor;
      value.Add(Ulps<double, long double>(y[i], exact[i]), u[i]);
      grad.Add(Ulps<double, long double>(g[i], exact_grad[i], floor), u[i]);
      // A denormal derivative is rounded before it meets d.
      if (std::fabs(exact_grad[i]) < DBL_MIN) continue;
      grad.Add(Ulps<double, long double>(gd[i], d[i] * exact_grad[i], floor * d[i]), u[i], d[i]);
    }
    value.Check(name() + " f64 " + set.name, limits().value_f64);
    grad.Check(name() + "' f64 " + set.name, limits().grad_f64);
  }
}

// Random bits in, the same bits out: on every set, and as recorded (so for every compiler and processor too).
TEST_P(Activations, BitsAreTheSameEverywhere) {
  struct Recorded {
    uint64_t value_f32, grad_f32, value_f64, grad_f64;
  };
  static const Recorded recorded[PNN_ACTIVATION_COUNT] = {
#include "activations_hashes.h"
  };
  const size_t n = SlowPortable() ? 5003 : 40009;  // a partial vector at the end
  const std::vector<float> u = AnyBits<float>(n, 5), d = AnyBits<float>(n, 6);
  const std::vector<double> wide_u = AnyBits<double>(n, 7), wide_d = AnyBits<double>(n, 8);
  std::vector<float> y[2], g[2];
  std::vector<double> wide_y[2], wide_g[2];
  for (const Set& set : Sets()) {
    const pnn_test_activation& kernel = set.table[activation()];
    const int now = &set != &Sets()[0];
    y[now].assign(n, 0), g[now].assign(n, 0), wide_y[now].assign(n, 0), wide_g[now].assign(n, 0);
    kernel.value_f32(y[now].data(), u.data(), n);
    kernel.grad_f32(g[now].data(), u.data(), d.data(), n);
    kernel.value_f64(wide_y[now].data(), wide_u.data(), n);
    kernel.grad_f64(wide_g[now].data(), wide_u.data(), wide_d.data(), n);
    for (size_t i = 0; now && i < n; i++) {
      ASSERT_TRUE(SameBits(y[0][i], y[1][i])) << set.name << std::hexfloat << " " << u[i];
      ASSERT_TRUE(SameBits(g[0][i], g[1][i])) << set.name << std::hexfloat << " " << u[i] << " " << d[i];
      ASSERT_TRUE(SameBits(wide_y[0][i], wide_y[1][i])) << set.name << std::hexfloat << " " << wide_u[i];
      ASSERT_TRUE(SameBits(wide_g[0][i], wide_g[1][i])) << set.name << std::hexfloat << " " << wide_u[i];
    }
  }
  for (auto* values : {&y[0], &g[0]}) values->resize(5003);
  for (auto* values : {&wide_y[0], &wide_g[0]}) values->resize(5003);
  const Recorded& expected = recorded[activation()];
  const Recorded found = {Hash(y[0]), Hash(g[0]), Hash(wide_y[0]), Hash(wide_g[0])};
  char line[200];
  std::snprintf(line, sizeof line, "{0x%016" PRIx64 ", 0x%016" PRIx64 ", 0x%016" PRIx64 ", 0x%016" PRIx64 "},  // %s",
                found.value_f32, found.grad_f32, found.value_f64, found.grad_f64, name().c_str());
  EXPECT_TRUE(expected.value_f32 == found.value_f32 && expected.grad_f32 == found.grad_f32 &&
              expected.value_f64 == found.value_f64 && expected.grad_f64 == found.grad_f64)
      << "other bits than recorded; if the functions were meant to change, activations_hashes.h needs the line\n"
      << line;
}

// ---- mpmath's values ----

TEST(ActivationTable, DoubleAndFloatMeetMpmath) {
  if (LDBL_MANT_DIG < 64) GTEST_SKIP() << "long double is double here and can't hold the table's digits";
  struct Row {
    const char* name;
    double u;
    long double value, derivative;
  };
  static const Row rows[] = {
#include "activations_table.h"
  };
  int tried = 0;
  for (const Set& set : Sets()) {
    for (const Row& row : rows) {
      for (int a = 0; a < PNN_ACTIVATION_COUNT; a++) {
        const pnn_test_activation& kernel = set.table[a];
        if (std::strcmp(kernel.name, row.name) != 0) continue;
        const double one = 1;
        double y, g;
        kernel.value_f64(&y, &row.u, 1);
        kernel.grad_f64(&g, &row.u, &one, 1);
        const double floor = row.u < kBelowZeros ? 0 : kLimits[a].floor;
        EXPECT_LE((Ulps<double, long double>(y, row.value)), kLimits[a].value_f64) << row.name << " " << row.u;
        EXPECT_LE((Ulps<double, long double>(g, row.derivative, floor)), kLimits[a].grad_f64)
            << row.name << "' " << row.u;
        const float u = static_cast<float>(row.u), d = 1;
        if (static_cast<double>(u) == row.u) {
          float narrow, narrow_g;
          kernel.value_f32(&narrow, &u, 1);
          kernel.grad_f32(&narrow_g, &u, &d, 1);
          EXPECT_LE((Ulps<float, long double>(narrow, row.value)), kLimits[a].value_f32) << row.name << " " << u;
          EXPECT_LE((Ulps<float, long double>(narrow_g, row.derivative, floor)), kLimits[a].grad_f32)
              << row.name << "' " << u;
        }
        tried++;
      }
    }
  }
  EXPECT_EQ(tried, static_cast<int>(Sets().size() * (sizeof rows / sizeof rows[0])));
}

// ---- special values ----

struct Special {
  pnn_activation activation;
  double u, value, derivative;
};
// What PyTorch's float64 gives for value and derivative (elu' and selu' at NaN as its vector loop has them).
const double kNegative = kScale * kAlpha;
const Special kSpecial[] = {
    {PNN_ACTIVATION_IDENTITY, -kInf, -kInf, 1},
    {PNN_ACTIVATION_IDENTITY, -0.0, -0.0, 1},
    {PNN_ACTIVATION_IDENTITY, kNan, kNan, 1},
    {PNN_ACTIVATION_RELU, -kInf, 0, 0},
    {PNN_ACTIVATION_RELU, -1, 0, 0},
    {PNN_ACTIVATION_RELU, -1e-40, 0, 0},
    {PNN_ACTIVATION_RELU, -0.0, -0.0, 0},
    {PNN_ACTIVATION_RELU, 0, 0, 0},
    {PNN_ACTIVATION_RELU, 0x1p-149, 0x1p-149, 1},
    {PNN_ACTIVATION_RELU, kInf, kInf, 1},
    {PNN_ACTIVATION_RELU, kNan, kNan, 1},
    {PNN_ACTIVATION_ELU, -kInf, -1, 0},
    {PNN_ACTIVATION_ELU, -1e30, -1, 0},
    {PNN_ACTIVATION_ELU, -0.0, -0.0, 1},
    {PNN_ACTIVATION_ELU, 0, 0, 1},
    {PNN_ACTIVATION_ELU, -0x1p-149, -0x1p-149, 1},
    {PNN_ACTIVATION_ELU, kInf, kInf, 1},
    {PNN_ACTIVATION_ELU, kNan, kNan, kNan},
    {PNN_ACTIVATION_SELU, -kInf, -kNegative, 0},
    {PNN_ACTIVATION_SELU, -0.0, -0.0, kNegative},
    {PNN_ACTIVATION_SELU, 0, 0, kNegative},
    {PNN_ACTIVATION_SELU, 1, kScale, kScale},
    {PNN_ACTIVATION_SELU, kInf, kInf, kScale},
    {PNN_ACTIVATION_SELU, kNan, kNan, kNan},
    {PNN_ACTIVATION_GELU, -kInf, kNan, kNan},
    {PNN_ACTIVATION_GELU, -1e30, -0.0, 0},
    {PNN_ACTIVATION_GELU, -0.0, -0.0, 0.5},
    {PNN_ACTIVATION_GELU, 0, 0, 0.5},
    {PNN_ACTIVATION_GELU, 1e30, 1e30, 1},
    {PNN_ACTIVATION_GELU, kInf, kInf, kNan},
    {PNN_ACTIVATION_GELU, kNan, kNan, kNan},
    {PNN_ACTIVATION_SILU, -kInf, kNan, kNan},
    {PNN_ACTIVATION_SILU, -1e30, -0.0, 0},
    {PNN_ACTIVATION_SILU, -0.0, -0.0, 0.5},
    {PNN_ACTIVATION_SILU, 0, 0, 0.5},
    {PNN_ACTIVATION_SILU, 1e30, 1e30, 1},
    {PNN_ACTIVATION_SILU, kInf, kInf, kNan},
    {PNN_ACTIVATION_SILU, kNan, kNan, kNan},
    {PNN_ACTIVATION_TANH, -kInf, -1, 0},
    {PNN_ACTIVATION_TANH, -1e30, -1, 0},
    {PNN_ACTIVATION_TANH, -0.0, -0.0, 1},
    {PNN_ACTIVATION_TANH, 0, 0, 1},
    {PNN_ACTIVATION_TANH, 0x1p-149, 0x1p-149, 1},
    {PNN_ACTIVATION_TANH, kInf, 1, 0},
    {PNN_ACTIVATION_TANH, kNan, kNan, kNan},
    {PNN_ACTIVATION_SIGMOID, -kInf, 0, 0},
    {PNN_ACTIVATION_SIGMOID, -1e30, 0, 0},
    {PNN_ACTIVATION_SIGMOID, -0.0, 0.5, 0.25},
    {PNN_ACTIVATION_SIGMOID, 0, 0.5, 0.25},
    {PNN_ACTIVATION_SIGMOID, 1e30, 1, 0},
    {PNN_ACTIVATION_SIGMOID, kInf, 1, 0},
    {PNN_ACTIVATION_SIGMOID, kNan, kNan, kNan},
    {PNN_ACTIVATION_HARDTANH, -kInf, -1, 0},
    {PNN_ACTIVATION_HARDTANH, -1, -1, 0},
    {PNN_ACTIVATION_HARDTANH, -0.5, -0.5, 1},
    {PNN_ACTIVATION_HARDTANH, -0.0, -0.0, 1},
    {PNN_ACTIVATION_HARDTANH, 1, 1, 0},
    {PNN_ACTIVATION_HARDTANH, 1e30, 1, 0},
    {PNN_ACTIVATION_HARDTANH, kInf, 1, 0},
    {PNN_ACTIVATION_HARDTANH, kNan, kNan, 1},
    {PNN_ACTIVATION_LEAKY_RELU, -0.0, -0.0, 0.01},
    {PNN_ACTIVATION_LEAKY_RELU, 0, 0, 0.01},
    {PNN_ACTIVATION_LEAKY_RELU, -kInf, -kInf, 0.01},
    {PNN_ACTIVATION_LEAKY_RELU, -100, -100 * 0.01, 0.01},
    {PNN_ACTIVATION_LEAKY_RELU, kInf, kInf, 1},
    {PNN_ACTIVATION_LEAKY_RELU, kNan, kNan, 0.01},
};

template <class T>
std::string Text(T value) {
  char text[64];
  std::snprintf(text, sizeof text, "%.17g", static_cast<double>(value));
  return text;
}

// The value with its zero's sign; for derivatives any zero will do.
template <class T>
void ExpectSpecial(const char* what, const Set& set, const Special& row, T value, T derivative) {
  const std::string where =
      std::string(set.name) + " " + set.table[row.activation].name + " " + what + " at " + Text(row.u);
  EXPECT_TRUE(SameBits(value, static_cast<T>(row.value)))
      << where << ": " << Text(value) << ", not " << Text(row.value);
  const T expected = static_cast<T>(row.derivative);
  EXPECT_TRUE(SameBits(derivative, expected) || derivative == expected)
      << where << ": derivative " << Text(derivative) << ", not " << Text(row.derivative);
}

TEST(ActivationSpecialValues, AreThoseOfFloat64InPyTorch) {
  for (const Set& set : Sets()) {
    for (const Special& row : kSpecial) {
      const pnn_test_activation& kernel = set.table[row.activation];
      const double one = 1;
      double y, g;
      kernel.value_f64(&y, &row.u, 1);
      kernel.grad_f64(&g, &row.u, &one, 1);
      ExpectSpecial("f64", set, row, y, g);
      const float u = static_cast<float>(row.u), d = 1;
      float narrow, narrow_g;
      kernel.value_f32(&narrow, &u, 1);
      kernel.grad_f32(&narrow_g, &u, &d, 1);
      ExpectSpecial("f32", set, row, narrow, narrow_g);
    }
  }
}

// Where a derivative selects, the other side's d is dropped, even an infinite or a NaN one; where it passes, d is kept.
TEST(ActivationDerivatives, SelectWhereTheyDoNotMultiply) {
  const float ds[] = {2.5f,  -0.0f, static_cast<float>(kInf), static_cast<float>(-kInf), static_cast<float>(kNan),
                      1e-45f};
  struct Choice {
    pnn_activation activation;
    float u;
    int keeps;  // 1: d, 0: zero, -1: slope * d
  };
  const float inf = static_cast<float>(kInf), nan = static_cast<float>(kNan);
  const Choice choices[] = {
      {PNN_ACTIVATION_IDENTITY, nan, 1},     {PNN_ACTIVATION_IDENTITY, -inf, 1},
      {PNN_ACTIVATION_RELU, -1, 0},          {PNN_ACTIVATION_RELU, 0.0f, 0},
      {PNN_ACTIVATION_RELU, -0.0f, 0},       {PNN_ACTIVATION_RELU, -inf, 0},
      {PNN_ACTIVATION_RELU, 1e-45f, 1},      {PNN_ACTIVATION_RELU, inf, 1},
      {PNN_ACTIVATION_RELU, nan, 1},         {PNN_ACTIVATION_HARDTANH, -1, 0},
      {PNN_ACTIVATION_HARDTANH, 1, 0},       {PNN_ACTIVATION_HARDTANH, inf, 0},
      {PNN_ACTIVATION_HARDTANH, -inf, 0},    {PNN_ACTIVATION_HARDTANH, -0.0f, 1},
      {PNN_ACTIVATION_HARDTANH, nan, 1},     {PNN_ACTIVATION_HARDTANH, 0.9999999f, 1},
      {PNN_ACTIVATION_LEAKY_RELU, 1, 1},     {PNN_ACTIVATION_LEAKY_RELU, inf, 1},
      {PNN_ACTIVATION_LEAKY_RELU, 0.0f, -1}, {PNN_ACTIVATION_LEAKY_RELU, nan, -1},
      {PNN_ACTIVATION_LEAKY_RELU, -2, -1},   {PNN_ACTIVATION_LEAKY_RELU, -inf, -1},
  };
  for (const Set& set : Sets()) {
    for (const Choice& choice : choices) {
      for (float d : ds) {
        const pnn_test_activation& kernel = set.table[choice.activation];
        float g;
        kernel.grad_f32(&g, &choice.u, &d, 1);
        const float expected = choice.keeps > 0 ? d : choice.keeps == 0 ? 0.0f : d * 0.01f;
        EXPECT_TRUE(SameBits(g, expected)) << set.name << " " << kernel.name << "' f32 " << choice.u << " " << d;
        const double wide_u = static_cast<double>(choice.u), wide_d = static_cast<double>(d);
        double wide_g;
        kernel.grad_f64(&wide_g, &wide_u, &wide_d, 1);
        const double wide = choice.keeps > 0 ? wide_d : choice.keeps == 0 ? 0.0 : wide_d * 0.01;
        EXPECT_TRUE(SameBits(wide_g, wide)) << set.name << " " << kernel.name << "' f64 " << choice.u << " " << d;
      }
    }
  }
}

// A vanished derivative times an infinite d is NaN, as in the formula; a finite one leaves it infinite.
TEST(ActivationDerivatives, MultiplyInfinitiesAsTheFormulaDoes) {
  for (const Set& set : Sets()) {
    for (int a : {PNN_ACTIVATION_ELU, PNN_ACTIVATION_SELU, PNN_ACTIVATION_TANH, PNN_ACTIVATION_SIGMOID}) {
      const pnn_test_activation& kernel = set.table[a];
      const float u[] = {static_cast<float>(-kInf), -1e30f, -1, 0}, d[] = {INFINITY, INFINITY, INFINITY, INFINITY};
      float g[4];
      kernel.grad_f32(g, u, d, 4);
      EXPECT_TRUE(std::isnan(g[0]) && std::isnan(g[1]) && std::isinf(g[2]) && std::isinf(g[3])) << kernel.name;
      const double wide_u[] = {-kInf, -1e300, -1, 0}, wide_d[] = {kInf, kInf, kInf, kInf};
      double wide_g[4];
      kernel.grad_f64(wide_g, wide_u, wide_d, 4);
      EXPECT_TRUE(std::isnan(wide_g[0]) && std::isnan(wide_g[1]) && std::isinf(wide_g[2]) && std::isinf(wide_g[3]))
          << kernel.name;
    }
  }
}

// ---- the sets themselves ----

TEST(ActivationSets, EveryInstructionSetOfThisProcessorIsTried) {
  for (const char* name : {"portable", "avx2", "avx512", "neon"}) {
    bool tried = false;
    for (const Set& set : Sets()) tried = tried || std::strcmp(set.name, name) == 0;
    EXPECT_EQ(tried, CpuHas(name)) << name;
  }
  for (const Set& set : Sets()) {
    for (int a = 0; a < PNN_ACTIVATION_COUNT; a++) EXPECT_STREQ(set.table[a].name, Sets()[0].table[a].name);
  }
}

}  // namespace
