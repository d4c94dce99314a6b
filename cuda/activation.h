/*
 * activation.h - every activation and its derivative, for one float or double.
 *
 * The formulas are those of csrc/kernels/activations.h, whose opening comment explains them. In float the GPU stays in
 * float, where the CPU goes through double: double precision is slow on most GPUs. Only identity, relu, leaky_relu and
 * hardtanh promise the CPU's bits. Limits in ulp of the exact result, in float: identity, relu, hardtanh 0; leaky_relu
 * 0.5; elu 2; tanh, sigmoid, selu, silu 3; gelu 5; derivatives 5; in double 6, gelu 10. Derivatives of gelu and silu in
 * ulp of 0.125 near their zeros. Tested in tests/cuda/activation_test.cc.
 *
 * Division is ours: the correctly rounded one is a called function on the GPU.
 */
#ifndef PNN_CUDA_ACTIVATION_H
#define PNN_CUDA_ACTIVATION_H

#include "pnn/pnn.h"
#include "ptx.h"

namespace pnn_cuda {

template <class R>
struct Constants;

template <>
struct Constants<float> {
  static constexpr float log2_e = 0x1.715476p+0f, ln_2 = 0x1.62e430p-1f, ln_2_low = -0x1.05c610p-29f;
  static constexpr float density_0 = 0x1.988454p-2f, leaky_slope = 0.01f;
  static constexpr float selu_scale = 1.05070098735548f, selu_scale_alpha = 1.75809934084738f;
  static constexpr float exp_zero = -130.0f; /* below this exp is 0 */
  static constexpr float shifter = 0x1.8p23f + 127, least_exponent = -100, expm1_least = -20;
  static constexpr int exponent_shift = 23;
};
template <>
struct Constants<double> {
  static constexpr double log2_e = 0x1.71547652b82fep+0, ln_2 = 0x1.62e42fefa39efp-1, ln_2_low = 0x1.abc9e3b39803fp-56;
  static constexpr double density_0 = 0x1.9884533d43651p-2, leaky_slope = 0.01;
  static constexpr double selu_scale = 1.0507009873554804934193349852946;
  static constexpr double selu_scale_alpha = 1.0507009873554804934193349852946 * 1.6732632423543772848170429916717;
  static constexpr double exp_zero = -746.0;
  static constexpr double shifter = 0x1.8p52 + 1023, least_exponent = -1000, expm1_least = -40;
  static constexpr int exponent_shift = 52;
};

PNN_DEVICE float real_of_bits(uint32_t bits) { return float_of(bits); }
PNN_DEVICE double real_of_bits(uint64_t bits) { return double_of(bits); }
template <class R>
PNN_DEVICE R magnitude(R x) {
  return real_of_bits(bits_of(x) & (~decltype(bits_of(x)){0} >> 1));
}

/* n / d for 1 <= d <= 2^60. A first guess from the exponent's bits, three steps of Newton, one correction of the
 * quotient; within 1 ulp. Where the numerator is NaN so is the result; it must not be infinite. */
PNN_DEVICE float divide(float n, float d) {
  float r = float_of(0x7ef311c7u - bits_of(d));
#pragma unroll
  for (int i = 0; i < 3; i++) r = fma_(fma_(-d, r, 1.0f), r, r);
  const float q = n * r;
  return fma_(fma_(-q, d, n), r, q);
}
/* The same in double; the last correction rounds as the division would (Markstein, "Computation of elementary functions
 * on the IBM RISC System/6000 processor", 1990). */
PNN_DEVICE double divide(double n, double d) {
  double r = double_of(0x7fde623822fc16e6u - bits_of(d));
#pragma unroll
  for (int i = 0; i < 5; i++) r = fma_(fma_(-d, r, 1.0), r, r);
  const double q = n * r;
  return fma_(fma_(-q, d, n), r, q);
}

/* c[0] + c[1] r + ..., highest first. */
template <class R, int N>
PNN_DEVICE R polynomial(R x, const R (&c)[N]) {
  R p = c[0];
#pragma unroll
  for (int i = 1; i < N; i++) p = fma_(p, x, c[i]);
  return p;
}

/* (exp(r) - 1 - r) / r^2 */
PNN_DEVICE float exp_tail(float r) {
  const float c[] = {0x1.a124e4p-13f, 0x1.6d4316p-10f, 0x1.1110e0p-7f, 0x1.5554eap-5f, 0x1.555556p-3f, 0x1.000000p-1f};
  return polynomial(r, c);
}
PNN_DEVICE double exp_tail(double r) {
  const double c[] = {0x1.1f72fc730b4ffp-29, 0x1.af4ddd84882fep-26, 0x1.27e4db67b4303p-22, 0x1.71de02375656cp-19,
                      0x1.a01a01a6d7808p-16, 0x1.a01a01abe62ddp-13, 0x1.6c16c16c162d6p-10, 0x1.11111111100dfp-7,
                      0x1.5555555555556p-5,  0x1.5555555555557p-3,  0x1.0000000000000p-1};
  return polynomial(r, c);
}

/* The normal distribution's upper tail over exp(-z^2/2), 0 <= z <= 40 */
PNN_DEVICE float normal_tail(float z) {
  const float n[] = {0x1.c48646p-11f, 0x1.75a0aep-7f, 0x1.1fd8e8p-4f, 0x1.fc508cp-3f, 0x1.028a50p-1f, 0x1.000000p-1f};
  const float d[] = {0x1.1b93fcp-9f, 0x1.d44502p-6f, 0x1.6d34c8p-3f, 0x1.4d1e5ap-1f,
                     0x1.7056b2p+0f, 0x1.cecc7ap+0f, 0x1.000000p+0f};
  return divide(polynomial(z, n), polynomial(z, d));
}
PNN_DEVICE double normal_tail(double z) {
  const double n[] = {0x1.d50d5493f64abp-23, 0x1.ca5c9d6be1585p-18, 0x1.b7530dc8b741cp-14, 0x1.0cb7637736ae3p-10,
                      0x1.cd74f7874e3ecp-8,  0x1.21839af918d4bp-5,  0x1.0c81e61f0ec27p-3,  0x1.6c009cb28c501p-2,
                      0x1.5abe52e33fdd9p-1,  0x1.a723039e938e5p-1,  0x1.0000000000000p-1};
  const double d[] = {0x1.25ef4ed08f42fp-21, 0x1.1f3c5366a58d1p-16, 0x1.13e13ddeb90f6p-12, 0x1.5307b0eac3235p-9,
                      0x1.25757d306e4aep-6,  0x1.753c851d18663p-4,  0x1.6210c3b91b08fp-2,  0x1.f305bef9c1f70p-1,
                      0x1.fe557e6d8adfep+0,  0x1.67aa8c82d4867p+1,  0x1.39b2969e9aa07p+1,  0x1.0000000000000p+0};
  return divide(polynomial(z, n), polynomial(z, d));
}

/* 2^n for integers in the normal range. */
template <class R>
PNN_DEVICE R power_of_2(R n) {
  return real_of_bits(bits_of(n + Constants<R>::shifter) << Constants<R>::exponent_shift);
}

/* x + x_low = n ln(2) + (r + *r_low) */
template <class R>
PNN_DEVICE R reduce(R x, R x_low, R *n, R *r_low) {
  using C = Constants<R>;
  *n = fma_(x, C::log2_e, C::shifter) - C::shifter;
  const R exact = fma_(*n, -C::ln_2, x), low = fma_(*n, -C::ln_2_low, x_low), r = exact + low;
  *r_low = (exact - r) + low;
  return r;
}

/* exp(x + x_low) = the result * *rest, x <= 0. rest is 1 but for the smallest results, and 0 where exp is. */
template <class R>
PNN_DEVICE R exponential(R x, R x_low, R *rest) {
  using C = Constants<R>;
  const bool zero = x < C::exp_zero;
  R n, r_low;
  const R r = reduce(zero ? C::exp_zero : x, x_low, &n, &r_low);
  R p = fma_(r * r, exp_tail(r), r_low);
  const R one_r = 1 + r;
  p = one_r + (((1 - one_r) + r) + p);
  const R n_normal = n < C::least_exponent ? C::least_exponent : n;
  *rest = zero ? R(0) : power_of_2(n - n_normal);
  return p * power_of_2(n_normal);
}

/* exp(x) - 1, x <= 0 */
template <class R>
PNN_DEVICE R exponential_minus_1(R x) {
  R n, r_low;
  const R r = reduce(x < Constants<R>::expm1_least ? Constants<R>::expm1_least : x, R(0), &n, &r_low);
  const R scale = power_of_2(n);
  return fma_(scale, r + fma_(r * r, exp_tail(r), r_low), scale - 1);
}

/* exp(-z^2/2), z^2 in two parts. */
template <class R>
PNN_DEVICE R gaussian(R z, R *rest) {
  const R square = z * z;
  return exponential(square * R(-0.5), fma_(z, z, -square) * R(-0.5), rest);
}

/* activation(u); the same branch for all lanes. */
template <class R>
PNN_DEVICE R activate(int activation, R u) {
  using C = Constants<R>;
  R rest, t;
  switch (activation) {
    case PNN_ACTIVATION_RELU: return u < 0 ? R(0) : u;
    case PNN_ACTIVATION_LEAKY_RELU: return u > 0 ? u : u * C::leaky_slope;
    case PNN_ACTIVATION_ELU: return u < 0 ? exponential_minus_1(u) : u;
    case PNN_ACTIVATION_SELU: return u < 0 ? C::selu_scale_alpha * exponential_minus_1(u) : C::selu_scale * u;
    case PNN_ACTIVATION_GELU: {
      const R z = magnitude(u) > 40 ? R(40) : magnitude(u);
      t = gaussian(z, &rest);
      const R tail = (u < 0 ? -u : z) * t * normal_tail(z) * rest;
      return u < 0 ? -tail : u - tail;
    }
    case PNN_ACTIVATION_SILU:
      t = exponential(-magnitude(u), R(0), &rest);
      return u * divide(u < 0 ? t : R(1), 1 + t) * (u < 0 ? rest : R(1));
    case PNN_ACTIVATION_TANH: {
      const R e = exponential_minus_1(magnitude(u) * R(-2)), q = divide(e, 2 + e);
      return real_of_bits(bits_of(magnitude(q)) | (bits_of(u) & ~(~decltype(bits_of(u)){0} >> 1)));
    }
    case PNN_ACTIVATION_SIGMOID:
      t = exponential(-magnitude(u), R(0), &rest);
      return u < 0 ? divide(t, 1 + t) * rest : divide(R(1), 1 + t);
    case PNN_ACTIVATION_HARDTANH: return u < -1 ? R(-1) : u > 1 ? R(1) : u;
    default: return u;
  }
}

/* activation'(u) * d, with PyTorch's choices (pnn.h). */
template <class R>
PNN_DEVICE R activate_gradient(int activation, R u, R d) {
  using C = Constants<R>;
  R rest, t, s;
  switch (activation) {
    case PNN_ACTIVATION_RELU: return u <= 0 ? R(0) : d;
    case PNN_ACTIVATION_LEAKY_RELU: return u > 0 ? d : d * C::leaky_slope;
    case PNN_ACTIVATION_ELU: t = exponential(u > 0 ? R(0) : u, R(0), &rest); return d * (u > 0 ? R(1) : t * rest);
    case PNN_ACTIVATION_SELU:
      t = exponential(u > 0 ? R(0) : u, R(0), &rest);
      return d * (u > 0 ? C::selu_scale : C::selu_scale_alpha * t * rest);
    case PNN_ACTIVATION_GELU: {
      const R z = magnitude(u) > 40 ? R(40) : magnitude(u);
      t = gaussian(z, &rest);
      const R g = t * fma_(magnitude(u), -C::density_0, normal_tail(z)) * rest;
      return d * (u < 0 ? g : 1 - g);
    }
    case PNN_ACTIVATION_SILU: {
      t = exponential(-magnitude(u), R(0), &rest);
      s = 1 + t;
      const R a = u < 0 ? t : R(1), b = u < 0 ? R(1) : t * rest;
      return d * (a * fma_(b, u, s) * divide(R(1), s * s) * (u < 0 ? rest : R(1)));
    }
    case PNN_ACTIVATION_TANH:
      t = exponential(magnitude(u) * R(-2), R(0), &rest);
      s = 1 + t;
      return d * (divide(4 * t, s * s) * rest);
    case PNN_ACTIVATION_SIGMOID:
      t = exponential(-magnitude(u), R(0), &rest);
      s = 1 + t;
      return d * (divide(t, s * s) * rest);
    case PNN_ACTIVATION_HARDTANH: return magnitude(u) >= 1 ? R(0) : d;
    default: return d;
  }
}

}  // namespace pnn_cuda

#endif
