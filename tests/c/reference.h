// reference.h - the layer and all its gradients as plain loops in double or long double: what the tests compare with.
//
// Nothing here is shared with the library: Philox, the mask kinds, the activations and their derivatives (standard
// library, long double) are written again from the formulas, and batch normalisation is differentiated by the textbook
// (Ioffe, Szegedy, ICML 2015, section 3). Only the roundings that the definition fixes are made: per-element arithmetic
// u = fl(x + fl(fl(level) * N)), the activation and the centring in float32 (float64 for float64 input), and with
// 16-bit weights the operands of the product once to that type. Sums and results are left unrounded.
#ifndef PNN_TESTS_REFERENCE_H
#define PNN_TESTS_REFERENCE_H

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "pnn/pnn.h"
#include "tensor.h"

namespace pnn_test {

// ---- masks ----------------------------------------------------------------------------------------------------------

// Philox4x32-10: Salmon, Moraes, Dror, Shaw, SC 2011, section 3.3.
inline std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed);
  uint32_t key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t product0 = uint64_t{0xD2511F53} * counter[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key0, static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key1, static_cast<uint32_t>(product0)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

inline int philox_byte(const std::array<uint32_t, 4> &words, int i) {
  return static_cast<int>((words[static_cast<size_t>(i / 4)] >> (8 * (i % 4))) & 255u);
}

// The value of a recipe at response map k (with shared masks: m), row i, column j.
inline double recipe_value(pnn_noise noise, uint64_t seed, int64_t k, int64_t row, int64_t column) {
  const auto word = [](int64_t v) { return static_cast<uint32_t>(v); };
  if (noise == PNN_NOISE_UNIFORM) {
    const int u = philox_byte(philox({word(column), word(row), word(k / 16), 0}, seed), static_cast<int>(k % 16));
    return (2.0 * u - 255.0) / 256.0;
  }
  if (noise == PNN_NOISE_NORMAL) {
    const std::array<uint32_t, 4> words = philox({word(column), word(row), word(k / 2), 2}, seed);
    int sum = 0;
    for (int i = 0; i < 8; i++) sum += philox_byte(words, static_cast<int>(k % 2) * 8 + i);
    const float scale = static_cast<float>(1.0L / std::sqrt(43690.0L));
    return static_cast<double>(static_cast<float>(static_cast<double>(sum - 1020) * static_cast<double>(scale)));
  }
  const std::array<uint32_t, 4> words = philox({word(k), 0, 0, 1}, seed);
  const auto frequency = [](uint32_t w) {
    const uint32_t magnitude = ((uint32_t{1} << 29) + (w >> 3)) >> (w % 4);
    return (w & 4) ? 0u - magnitude : magnitude;
  };
  const uint32_t phase = frequency(words[0]) * word(row) + frequency(words[1]) * word(column) + words[2];
  const int t = static_cast<int>(phase >> 23);
  const int u = t < 256 ? t : 511 - t;
  return (2.0 * u - 255.0) / 256.0;
}

// ---- activations ----------------------------------------------------------------------------------------------------

constexpr long double kSeluAlpha = 1.6732632423543772848170429916717L;
constexpr long double kSeluScale = 1.0507009873554804934193349852946L;

// These have no rounding of their own beyond at most one multiplication: their results are known bit by bit.
inline bool is_exact(pnn_activation f) {
  return f == PNN_ACTIVATION_IDENTITY || f == PNN_ACTIVATION_RELU || f == PNN_ACTIVATION_LEAKY_RELU ||
         f == PNN_ACTIVATION_HARDTANH;
}

inline const char *name_of(pnn_activation f) {
  static const char *const names[] = {"identity", "relu", "leaky_relu", "elu",     "selu",
                                      "gelu",     "silu", "tanh",       "sigmoid", "hardtanh"};
  return names[f];
}

inline const char *name_of(pnn_noise n) {
  static const char *const names[] = {"none", "tensor", "uniform", "normal", "waves"};
  return names[n];
}

// The slope in the type that the arithmetic is done in.
inline double leaky_slope(bool wide) { return wide ? 0.01 : static_cast<double>(0.01f); }

// The activation of u, unrounded; `wide` tells float64 arithmetic. As PyTorch's formulas have it, gelu and silu are NaN
// at -infinity (0 times infinity), their derivatives at both infinities.
inline long double activate(pnn_activation f, long double u, bool wide) {
  const long double half_root = std::sqrt(0.5L);
  switch (f) {
    case PNN_ACTIVATION_RELU: return u < 0 ? 0 : u;
    case PNN_ACTIVATION_LEAKY_RELU: return u > 0 ? u : static_cast<long double>(leaky_slope(wide)) * u;
    case PNN_ACTIVATION_ELU: return u > 0 ? u : std::expm1(u);
    case PNN_ACTIVATION_SELU: return kSeluScale * (u > 0 ? u : kSeluAlpha * std::expm1(u));
    case PNN_ACTIVATION_GELU: return 0.5L * u * std::erfc(-u * half_root);
    case PNN_ACTIVATION_SILU: return u / (1 + std::exp(-u));
    case PNN_ACTIVATION_TANH: return std::tanh(u);
    case PNN_ACTIVATION_SIGMOID: return 1 / (1 + std::exp(-u));
    case PNN_ACTIVATION_HARDTANH: return u < -1 ? -1 : u > 1 ? 1 : u;
    default: return u;
  }
}

// The derivative at u.
inline long double derivative(pnn_activation f, long double u, bool wide) {
  const long double half_root = std::sqrt(0.5L);
  const long double pi = 3.14159265358979323846264338327950288L;
  switch (f) {
    case PNN_ACTIVATION_RELU: return u <= 0 ? 0 : 1;
    case PNN_ACTIVATION_LEAKY_RELU: return u > 0 ? 1 : static_cast<long double>(leaky_slope(wide));
    case PNN_ACTIVATION_ELU: return u > 0 ? 1 : std::exp(u);
    case PNN_ACTIVATION_SELU: return kSeluScale * (u > 0 ? 1 : kSeluAlpha * std::exp(u));
    case PNN_ACTIVATION_GELU: return 0.5L * std::erfc(-u * half_root) + u * std::exp(-0.5L * u * u) / std::sqrt(2 * pi);
    case PNN_ACTIVATION_SILU: {
      const long double s = 1 / (1 + std::exp(-u));
      return s + u * s * (1 / (1 + std::exp(u)));
    }
    case PNN_ACTIVATION_TANH: {
      if (std::fabs(u) > 5000) return 0;
      const long double c = std::cosh(u);
      return 1 / (c * c);
    }
    case PNN_ACTIVATION_SIGMOID: return (1 / (1 + std::exp(-u))) * (1 / (1 + std::exp(u)));
    case PNN_ACTIVATION_HARDTANH: return u <= -1 || u >= 1 ? 0 : 1;
    default: return 1;
  }
}

// The derivative at u times g, selected where the derivative is a step (0 times infinity does not arise).
template <class R>
R chain(pnn_activation f, R u, R slope, R g) {
  switch (f) {
    case PNN_ACTIVATION_IDENTITY: return g;
    case PNN_ACTIVATION_RELU: return u <= 0 ? R{0} : g;
    case PNN_ACTIVATION_HARDTANH: return u <= -1 || u >= 1 ? R{0} : g;
    case PNN_ACTIVATION_LEAKY_RELU: return u > 0 ? g : slope * g;
    default: return slope * g;
  }
}

// ---- the layer ------------------------------------------------------------------------------------------------------

// The arguments, dense and in row-major order. Empty vectors are absent arguments.
struct ReferenceInput {
  pnn_dtype input_type = PNN_FLOAT32;
  pnn_dtype weight_type = PNN_FLOAT32;
  int64_t B = 0, C = 0, H = 0, W = 0, T = 0, M = 1, groups = 1, stride_h = 1, stride_w = 1;
  pnn_noise noise = PNN_NOISE_NONE;
  bool shared = false;  // one set of masks for all channels
  uint64_t seed = 0;
  double level = 1;
  pnn_activation activation = PNN_ACTIVATION_RELU;
  bool norm = false;
  bool training = false;
  double eps = 0;
  bool has_bias = false;
  std::vector<double> x, weight, bias, mask, gamma, beta, mean, variance, grad_output;
};

// value: the result before its one rounding; magnitude: the sum of the terms' magnitudes, which error bounds multiply.
template <class R>
struct Sums {
  std::vector<R> value;
  std::vector<R> magnitude;
  void resize(int64_t n) {
    value.assign(static_cast<size_t>(n), 0);
    magnitude.assign(static_cast<size_t>(n), 0);
  }
  void add(int64_t i, R term, R size) {
    value[static_cast<size_t>(i)] += term;
    magnitude[static_cast<size_t>(i)] += size;
  }
  void add(int64_t i, R term) { add(i, term, std::fabs(term)); }
};

template <class R>
struct ReferenceOutput {
  Sums<R> output, mean, variance;
  Sums<R> grad_input, grad_weight, grad_bias, grad_mask, grad_norm_weight, grad_norm_bias;
};

template <class R>
class Reference {
 public:
  explicit Reference(const ReferenceInput &in) : in_(in) {
    K_ = in.C * in.M;
    columns_ = in.C / in.groups * in.M;
    out_h_ = in.H == 0 ? 0 : (in.H - 1) / in.stride_h + 1;
    out_w_ = in.W == 0 ? 0 : (in.W - 1) / in.stride_w + 1;
    wide_ = in.input_type == PNN_FLOAT64;
    compute_ = wide_ ? PNN_FLOAT64 : PNN_FLOAT32;
    perturb();
  }

  // Computes output, and with norm in training mean and variance. The moments used are those of `given` where it is
  // not null (a library's own, already rounded), else the computed ones rounded once to the statistics' type.
  void forward(ReferenceOutput<R> &out, const std::vector<double> *given_mean = nullptr,
               const std::vector<double> *given_variance = nullptr) {
    if (in_.norm && in_.training) moments(out);
    std::vector<double> mean = in_.mean;
    std::vector<double> variance = in_.variance;
    if (in_.norm && in_.training) {
      mean = given_mean ? *given_mean : rounded(out.mean.value);
      variance = given_variance ? *given_variance : rounded(out.variance.value);
    }
    prepare(mean, variance);
    out.output.resize(in_.B * in_.T * out_h_ * out_w_);
    for (int64_t b = 0; b < in_.B; b++) {
      for (int64_t t = 0; t < in_.T; t++) {
        for (int64_t i = 0; i < out_h_; i++) {
          for (int64_t j = 0; j < out_w_; j++) {
            const int64_t q = index_output(b, t, i, j);
            if (in_.has_bias) out.output.add(q, static_cast<R>(in_.bias[static_cast<size_t>(t)]));
            for (int64_t column = 0; column < columns_; column++) {
              const int64_t k = map_of(t, column);
              const int64_t p = index_map(b, k, i * in_.stride_h, j * in_.stride_w);
              const R v = product_weight(t, column, k);
              out.output.add(q, v * operand_[p], std::fabs(v) * operand_size(p));
              if (in_.norm) out.output.add(q, weight(t, column) * beta(k));
            }
          }
        }
      }
    }
  }

  // Computes every gradient; mean and variance are the arguments that backward is given.
  void backward(ReferenceOutput<R> &out, const std::vector<double> &mean, const std::vector<double> &variance) {
    prepare(mean, variance);
    const R n = static_cast<R>(in_.B * out_h_ * out_w_);
    out.grad_input.resize(in_.B * in_.C * in_.H * in_.W);
    out.grad_weight.resize(in_.T * columns_);
    out.grad_bias.resize(in_.T);
    out.grad_mask.resize(in_.noise == PNN_NOISE_TENSOR ? mask_channels() * in_.M * in_.H * in_.W : 0);
    out.grad_norm_weight.resize(in_.norm ? K_ : 0);
    out.grad_norm_bias.resize(in_.norm ? K_ : 0);

    // dz: the gradient at the product's other operand (after normalisation where there is one).
    Sums<R> dz;
    dz.resize(in_.B * K_ * in_.H * in_.W);
    each_output([&](int64_t b, int64_t t, int64_t i, int64_t j, R g) {
      out.grad_bias.add(t, g);
      for (int64_t column = 0; column < columns_; column++) {
        const int64_t k = map_of(t, column);
        const int64_t p = index_map(b, k, i * in_.stride_h, j * in_.stride_w);
        dz.add(p, weight(t, column) * g);
        const R scale = in_.norm ? gamma(k) * r_[static_cast<size_t>(k)] : R{1};
        out.grad_weight.add(t * columns_ + column, g * scale * operand_[p], std::fabs(g * scale) * operand_size(p));
        if (in_.norm) out.grad_weight.add(t * columns_ + column, g * beta(k));
      }
    });

    if (in_.norm) {
      each_map([&](int64_t b, int64_t k, int64_t i, int64_t j) {
        if (!kept(i, j)) return;
        const size_t p = static_cast<size_t>(index_map(b, k, i, j));
        const R normal = operand_[p] * r_[static_cast<size_t>(k)];
        out.grad_norm_bias.add(k, dz.value[p], dz.magnitude[p]);
        const R size = operand_size(static_cast<int64_t>(p)) * r_[static_cast<size_t>(k)];
        out.grad_norm_weight.add(k, dz.value[p] * normal, dz.magnitude[p] * size);
      });
    }

    each_map([&](int64_t b, int64_t k, int64_t i, int64_t j) {
      if (!kept(i, j)) return;
      const size_t p = static_cast<size_t>(index_map(b, k, i, j));
      R da = dz.value[p];
      R size = dz.magnitude[p];
      if (in_.norm) {
        const size_t s = static_cast<size_t>(k);
        const R scale = gamma(k) * r_[s];
        if (in_.training) {
          const R normal = operand_[p] * r_[s];
          da = scale / n * (n * da - out.grad_norm_bias.value[s] - normal * out.grad_norm_weight.value[s]);
          const R normal_size = operand_size(static_cast<int64_t>(p)) * r_[s];
          size += (out.grad_norm_bias.magnitude[s] + normal_size * out.grad_norm_weight.magnitude[s]) / n;
        } else {
          da = scale * da;
        }
        size *= std::fabs(scale);
      }
      const R u = u_[p];
      const R slope = slope_[p];
      const R term = chain(in_.activation, u, slope, da);
      // A smooth derivative may pass through zero: its error is relative to its pieces, which are of the order of 1.
      const R steep = is_exact(in_.activation) ? std::fabs(slope) : std::max(std::fabs(slope), soft_[p]);
      const R term_size = is_exact(in_.activation) ? chain(in_.activation, u, steep, size) : steep * size;
      const int64_t c = k / in_.M;
      out.grad_input.add(index_input(b, c, i, j), term, term_size);
      if (in_.noise == PNN_NOISE_TENSOR) {
        out.grad_mask.add(index_mask(c, k % in_.M, i, j), term, term_size);
      }
    });
    const R level = static_cast<R>(round_to(compute_, in_.level));
    for (R &v : out.grad_mask.value) v *= level;
    for (R &v : out.grad_mask.magnitude) v *= std::fabs(level);
  }

  int64_t outputs() const { return in_.B * in_.T * out_h_ * out_w_; }
  int64_t samples() const { return in_.B * out_h_ * out_w_; }
  R map_value(int64_t index) const { return a_[static_cast<size_t>(index)]; }

 private:
  int64_t mask_channels() const { return in_.shared ? 1 : in_.C; }
  int64_t index_input(int64_t b, int64_t c, int64_t i, int64_t j) const {
    return ((b * in_.C + c) * in_.H + i) * in_.W + j;
  }
  int64_t index_map(int64_t b, int64_t k, int64_t i, int64_t j) const { return ((b * K_ + k) * in_.H + i) * in_.W + j; }
  int64_t index_output(int64_t b, int64_t t, int64_t i, int64_t j) const {
    return ((b * in_.T + t) * out_h_ + i) * out_w_ + j;
  }
  int64_t index_mask(int64_t c, int64_t m, int64_t i, int64_t j) const {
    return (((in_.shared ? 0 : c) * in_.M + m) * in_.H + i) * in_.W + j;
  }
  int64_t map_of(int64_t t, int64_t column) const { return t / (in_.T / in_.groups) * columns_ + column; }
  bool kept(int64_t i, int64_t j) const { return i % in_.stride_h == 0 && j % in_.stride_w == 0; }
  R weight(int64_t t, int64_t column) const {
    return static_cast<R>(in_.weight[static_cast<size_t>(t * columns_ + column)]);
  }
  R gamma(int64_t k) const { return in_.gamma.empty() ? R{1} : static_cast<R>(in_.gamma[static_cast<size_t>(k)]); }
  R beta(int64_t k) const { return in_.beta.empty() ? R{0} : static_cast<R>(in_.beta[static_cast<size_t>(k)]); }

  // What errors of the operand are relative to: an activation that is not exact errs relative to a, not to a - mean.
  R operand_size(int64_t p) const {
    const R size = std::fabs(operand_[p]);
    return is_exact(in_.activation) ? size : std::max(size, std::fabs(a_[static_cast<size_t>(p)]));
  }

  // V, or with norm V*alpha, rounded to a 16-bit weight's type.
  R product_weight(int64_t t, int64_t column, int64_t k) const {
    R v = weight(t, column);
    if (in_.norm) v *= gamma(k) * r_[static_cast<size_t>(k)];
    return is_half(in_.weight_type) ? round_to(in_.weight_type, v) : v;
  }

  std::vector<double> rounded(const std::vector<R> &values) const {
    std::vector<double> result;
    for (R v : values) result.push_back(static_cast<double>(round_to(compute_, v)));
    return result;
  }

  template <class F>
  void each_map(F f) const {
    for (int64_t b = 0; b < in_.B; b++) {
      for (int64_t k = 0; k < K_; k++) {
        for (int64_t i = 0; i < in_.H; i++) {
          for (int64_t j = 0; j < in_.W; j++) f(b, k, i, j);
        }
      }
    }
  }

  template <class F>
  void each_output(F f) const {
    for (int64_t b = 0; b < in_.B; b++) {
      for (int64_t t = 0; t < in_.T; t++) {
        for (int64_t i = 0; i < out_h_; i++) {
          for (int64_t j = 0; j < out_w_; j++) {
            f(b, t, i, j, static_cast<R>(in_.grad_output[static_cast<size_t>(index_output(b, t, i, j))]));
          }
        }
      }
    }
  }

  // u, a and the derivative of every map at every pixel.
  void perturb() {
    const size_t size = static_cast<size_t>(in_.B * K_ * in_.H * in_.W);
    u_.assign(size, 0);
    a_.assign(size, 0);
    slope_.assign(size, 0);
    soft_.assign(size, 0);
    const double level = static_cast<double>(round_to(compute_, in_.level));
    each_map([&](int64_t b, int64_t k, int64_t i, int64_t j) {
      const int64_t c = k / in_.M;
      double u = in_.x[static_cast<size_t>(index_input(b, c, i, j))];
      if (in_.noise != PNN_NOISE_NONE) {
        const double mask = in_.noise == PNN_NOISE_TENSOR
                                ? in_.mask[static_cast<size_t>(index_mask(c, k % in_.M, i, j))]
                                : recipe_value(in_.noise, in_.seed, in_.shared ? k % in_.M : k, i, j);
        // In float32 both roundings are of exact or correctly double-rounded results: 53 >= 2 * 24 + 2.
        volatile double perturbation = level * mask;
        volatile double sum = u + round_to(compute_, static_cast<double>(perturbation));
        u = round_to(compute_, static_cast<double>(sum));
      }
      const size_t p = static_cast<size_t>(index_map(b, k, i, j));
      const long double wide = static_cast<long double>(u);
      u_[p] = static_cast<R>(u);
      // The leaky slope is one product, rounded once: long double would round twice.
      if (in_.activation == PNN_ACTIVATION_LEAKY_RELU && !(u > 0)) {
        a_[p] = static_cast<R>(round_to(compute_, leaky_slope(wide_) * u));
      } else {
        a_[p] = static_cast<R>(round_to(compute_, activate(in_.activation, wide, wide_)));
      }
      const long double slope = derivative(in_.activation, wide, wide_);
      slope_[p] = static_cast<R>(is_exact(in_.activation) ? slope : round_to(compute_, slope));
      if (!is_exact(in_.activation)) {
        soft_[p] = static_cast<R>(std::fabs(u) < 20 ? std::exp(-std::fabs(u)) * (1 + std::fabs(u)) : 0);
      }
    });
  }

  // Mean and biased variance of every map over the kept pixels, in two passes. Their magnitudes are those of the
  // largest |a| and of the variance itself.
  void moments(ReferenceOutput<R> &out) const {
    const R n = static_cast<R>(samples());
    out.mean.resize(K_);
    out.variance.resize(K_);
    if (samples() == 0) {
      std::fill(out.variance.value.begin(), out.variance.value.end(), R{1});
      return;
    }
    each_map([&](int64_t b, int64_t k, int64_t i, int64_t j) {
      if (kept(i, j)) out.mean.add(k, a_[static_cast<size_t>(index_map(b, k, i, j))] / n);
    });
    each_map([&](int64_t b, int64_t k, int64_t i, int64_t j) {
      if (!kept(i, j)) return;
      const R d = a_[static_cast<size_t>(index_map(b, k, i, j))] - out.mean.value[static_cast<size_t>(k)];
      out.variance.add(k, d * d / n);
    });
  }

  // r and the operand of the product.
  void prepare(const std::vector<double> &mean, const std::vector<double> &variance) {
    operand_ = a_;
    r_.assign(static_cast<size_t>(K_), 1);
    if (in_.norm) {
      for (size_t k = 0; k < r_.size(); k++) {
        r_[k] = 1 / std::sqrt(static_cast<R>(variance[k]) + static_cast<R>(in_.eps));
      }
      each_map([&](int64_t b, int64_t k, int64_t i, int64_t j) {
        R &o = operand_[index_map(b, k, i, j)];
        o = round_to(compute_, o - static_cast<R>(mean[static_cast<size_t>(k)]));
      });
    }
    if (is_half(in_.weight_type)) {
      for (R &o : operand_.data) o = round_to(in_.weight_type, o);
    }
  }

  // A vector that is indexed by int64_t.
  struct Maps {
    std::vector<R> data;
    Maps &operator=(const std::vector<R> &from) {
      data = from;
      return *this;
    }
    R &operator[](int64_t i) { return data[static_cast<size_t>(i)]; }
    const R &operator[](int64_t i) const { return data[static_cast<size_t>(i)]; }
    R &operator[](size_t i) { return data[i]; }
    const R &operator[](size_t i) const { return data[i]; }
  };

  const ReferenceInput &in_;
  int64_t K_ = 0;
  int64_t columns_ = 0;  // of V
  int64_t out_h_ = 0;
  int64_t out_w_ = 0;
  bool wide_ = false;
  pnn_dtype compute_ = PNN_FLOAT32;
  std::vector<R> u_, a_, slope_, soft_, r_;
  Maps operand_;
};

}  // namespace pnn_test

#endif
