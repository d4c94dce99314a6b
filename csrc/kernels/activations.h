/*
 * activations.h - every activation and its derivative, on vectors of float and double.
 *
 * For each name in PNN_ACTIVATION_LIST there are
 *
 *     vf pnn_<name>_f32(vf u)                  phi(u)
 *     vf pnn_<name>_grad_f32(vf u, vf d)       phi'(u) * d, or the choice between d, slope * d and 0
 *
 * and the same with _f64 on vd. A new activation is one new entry in the list and these four functions.
 *
 * The idea. Nothing is called from a math library, nothing is looked up and no branch depends on data: there is one
 * exponential, one function for the normal distribution's tail, and everything else is made of them by formulas that
 * do not cancel. Every operation is one that IEEE 754 rounds correctly (+ - * / and fma), written in a
 * fixed order, so the bits are the same on every instruction set, compiler and width.
 *
 *     exp(x), x <= 0     x = n ln(2) + r with |r| <= ln(2)/2, exp(x) = 2^n (1 + r + r^2 P(r)). n comes from adding
 *                        and subtracting 1.5 * 2^52, after which the sum's low bits hold n as an integer too. By fma
 *                        x - n ln(2) is exact for ln(2) rounded to double, since both terms are multiples of 2^-54.
 *                        (Cody and Waite's reduction; Muller, "Elementary functions", on the rest.)
 *     expm1(x)           2^n (r + r^2 P(r)) + (2^n - 1)
 *     sigmoid(x)         a / (1 + t), t = exp(-|x|), a = t where x < 0, else 1;      derivative t / (1 + t)^2
 *     silu(x)            x sigmoid(x);      derivative a (1 + t + b x) / (1 + t)^2, b = 1 where x < 0, else t
 *     tanh(x)            sign(x) (-e / (2 + e)), e = expm1(-2|x|);      derivative 4t / (1 + t)^2, t = exp(-2|x|)
 *     elu, selu          expm1 below 0;      derivatives from exp
 *     gelu(x)            -|x| Q where x < 0, else x - |x| Q; Q = exp(-x^2/2) M(|x|) is the normal distribution's upper
 *                        tail (Cody, "Rational Chebyshev approximations for the error function", 1969, splits it so
 *                        too). Derivative G where x < 0, else 1 - G, with G = exp(-x^2/2) (M(|x|) - |x| / sqrt(2 pi)).
 *     M(z)               float: N(z) / D(z); double: F(w) / (1 + 0.796875 z) with w = (z - 5) / (z + 5), after Shepherd
 *                        and Laframboise, "Chebyshev approximation of (1 + 2x) exp(x^2) erfc x", 1981
 *
 * float is computed in double lanes with polynomials of about 2^-32 and rounded once: range and digits to spare make
 * the result all but correctly rounded (denormals included) and need neither scaling nor sums in two parts; that costs
 * no more operations than compensated float would. double carries the low parts of r and x^2 along, and a result
 * below the normal range takes its last factor 2^m (`rest`) at the very end, so that it is rounded there once.
 *
 * The coefficients come from activation_coefficients.py; docs/activations.md has the measured errors. Stated limits
 * in ulp of the exact result, for every input (denormal results too):
 *
 *                        identity, relu, hardtanh  leaky_relu  elu   selu  gelu   silu   tanh  sigmoid
 *     float               0                         0.5         0.51  0.51  0.51   0.51   0.51  0.51
 *     float, derivative   0                         0.5         0.51  0.51  0.51*  0.51*  0.51  0.51
 *     double              0                         0.5         1     2     4.5    3.5    3     2.5
 *     double, derivative  0                         0.5         2     3     6*     5*     3.5   3.5
 *
 * leaky_relu is meant for the slope as it is in that type (0.01f in float), elu and selu for PyTorch's double
 * constants. A derivative's figure is for its product with d; in double a derivative below the normal range is rounded
 * before it meets d. * gelu' and silu' have a zero (near -0.7518 and -1.2785), where no figure of this kind can hold:
 * for u >= -4 theirs count in ulp of 0.125 |d| where the result is smaller.
 *
 * Special values are float64's of the formulas as PyTorch writes them: NaN gives NaN; gelu(-inf), silu(-inf) and
 * gelu', silu' at both infinities are NaN (inf * 0); relu(-0) = -0. The choices of derivatives are PyTorch's: relu'(0)
 * = 0, hardtanh'(+-1) = 0, leaky_relu'(0) = slope; at NaN relu' and hardtanh' are 1, leaky_relu' the slope. elu' and
 * selu' are NaN at NaN (PyTorch's vector and scalar loops disagree there).
 */
#ifndef PNN_KERNELS_ACTIVATIONS_H
#define PNN_KERNELS_ACTIVATIONS_H

#include "simd.h"

/* X(the suffix of PNN_ACTIVATION_..., the name), in the order of the enum. */
#define PNN_ACTIVATION_LIST(X) \
  X(IDENTITY, identity)        \
  X(RELU, relu)                \
  X(LEAKY_RELU, leaky_relu)    \
  X(ELU, elu)                  \
  X(SELU, selu)                \
  X(GELU, gelu)                \
  X(SILU, silu)                \
  X(TANH, tanh)                \
  X(SIGMOID, sigmoid)          \
  X(HARDTANH, hardtanh)

#define PNN_LEAKY_SLOPE 0.01
#define PNN_SELU_ALPHA 1.6732632423543772848170429916717
#define PNN_SELU_SCALE 1.0507009873554804934193349852946
#define PNN_LOG2_E 0x1.71547652b82fep+0
#define PNN_LN_2 0x1.62e42fefa39efp-1
#define PNN_LN_2_LOW 0x1.abc9e3b39803fp-56 /* ln(2) - PNN_LN_2 */
#define PNN_DENSITY_0 0x1.9884533d43651p-2 /* 1 / sqrt(2 pi) */

/* Added to a number n of magnitude below 2^51, this rounds it to an integer and leaves n + 1023, a double's biased
 * exponent, in the low bits of the sum. */
#define PNN_EXPONENT_BIAS (0x1.8p52 + 1023)

/* Below this, exp(x) and x * exp(x) are 0 in double. */
#define PNN_EXP_ZERO (-760.0)

/* x < bound ? bound : x, so that NaN stays, and -0 beside a bound of 0. The x86 maximum returns its second operand
 * where one is NaN or both are zeros, which is just this. */
static inline vf pnn_at_least_f32(vf x, vf bound) {
#if defined(PNN_ISA_AVX512)
  return (vf)_mm512_max_ps((__m512)bound, (__m512)x);
#elif defined(PNN_ISA_AVX2)
  return (vf)_mm256_max_ps((__m256)bound, (__m256)x);
#else
  return vf_select(x < bound, bound, x);
#endif
}
static inline vd pnn_at_least_f64(vd x, vd bound) {
#if defined(PNN_ISA_AVX512)
  return (vd)_mm512_max_pd((__m512d)bound, (__m512d)x);
#elif defined(PNN_ISA_AVX2)
  return (vd)_mm256_max_pd((__m256d)bound, (__m256d)x);
#else
  return vd_select(x < bound, bound, x);
#endif
}

/* x > bound ? bound : x, likewise. */
static inline vf pnn_at_most_f32(vf x, vf bound) {
#if defined(PNN_ISA_AVX512)
  return (vf)_mm512_min_ps((__m512)bound, (__m512)x);
#elif defined(PNN_ISA_AVX2)
  return (vf)_mm256_min_ps((__m256)bound, (__m256)x);
#else
  return vf_select(x > bound, bound, x);
#endif
}
static inline vd pnn_at_most_f64(vd x, vd bound) {
#if defined(PNN_ISA_AVX512)
  return (vd)_mm512_min_pd((__m512d)bound, (__m512d)x);
#elif defined(PNN_ISA_AVX2)
  return (vd)_mm256_min_pd((__m256d)bound, (__m256d)x);
#else
  return vd_select(x > bound, bound, x);
#endif
}

/* ---- what selects: no arithmetic beyond one product ---- */

static inline vf pnn_identity_f32(vf u) { return u; }
static inline vd pnn_identity_f64(vd u) { return u; }
static inline vf pnn_identity_grad_f32(vf u, vf d) {
  (void)u;
  return d;
}
static inline vd pnn_identity_grad_f64(vd u, vd d) {
  (void)u;
  return d;
}

static inline vf pnn_relu_f32(vf u) { return pnn_at_least_f32(u, vf_set1(0)); }
static inline vd pnn_relu_f64(vd u) { return pnn_at_least_f64(u, vd_set1(0)); }
static inline vf pnn_relu_grad_f32(vf u, vf d) { return (vf)((vi)d & ~(u <= vf_set1(0))); }
static inline vd pnn_relu_grad_f64(vd u, vd d) { return (vd)((vl)d & ~(u <= vd_set1(0))); }

static inline vf pnn_leaky_relu_f32(vf u) { return vf_select(u > vf_set1(0), u, u * vf_set1((float)PNN_LEAKY_SLOPE)); }
static inline vd pnn_leaky_relu_f64(vd u) { return vd_select(u > vd_set1(0), u, u * vd_set1(PNN_LEAKY_SLOPE)); }
static inline vf pnn_leaky_relu_grad_f32(vf u, vf d) {
  return vf_select(u > vf_set1(0), d, d * vf_set1((float)PNN_LEAKY_SLOPE));
}
static inline vd pnn_leaky_relu_grad_f64(vd u, vd d) {
  return vd_select(u > vd_set1(0), d, d * vd_set1(PNN_LEAKY_SLOPE));
}

static inline vf pnn_hardtanh_f32(vf u) { return pnn_at_most_f32(pnn_at_least_f32(u, vf_set1(-1)), vf_set1(1)); }
static inline vd pnn_hardtanh_f64(vd u) { return pnn_at_most_f64(pnn_at_least_f64(u, vd_set1(-1)), vd_set1(1)); }
static inline vf pnn_hardtanh_grad_f32(vf u, vf d) { return (vf)((vi)d & ~(vf_abs(u) >= vf_set1(1))); }
static inline vd pnn_hardtanh_grad_f64(vd u, vd d) { return (vd)((vl)d & ~(vd_abs(u) >= vd_set1(1))); }

/* (1 + t)^2 for 0 <= t <= 1 */
static inline vd pnn_square_of_1_plus(vd t) { return vd_fma(t, vd_set1(2) + t, vd_set1(1)); }

/* ---- for float results, in double lanes: relative errors of about 2^-32 ---- */

/* (exp(r) - 1 - r) / r^2 */
static inline vd pnn_brief_exp_tail(vd r) {
  vd p = vd_set1(0x1.a124e3f154d32p-13);
  p = vd_fma(p, r, vd_set1(0x1.6d431504c53d3p-10));
  p = vd_fma(p, r, vd_set1(0x1.1110e0f726534p-7));
  p = vd_fma(p, r, vd_set1(0x1.5554e9114ecf9p-5));
  p = vd_fma(p, r, vd_set1(0x1.5555555a78232p-3));
  p = vd_fma(p, r, vd_set1(0x1.0000000b8f62bp-1));
  return p;
}

/* x = n ln(2) + r with *scale = 2^n, for x <= 0. Below -708.7 scale is 0: n stays -1023 there, the exponent of zeros.
 */
static inline vd pnn_brief_reduce(vd x, vd *scale) {
  x = pnn_at_least_f64(x, vd_set1(-1023 * PNN_LN_2));
  vd k = vd_fma(x, vd_set1(PNN_LOG2_E), vd_set1(PNN_EXPONENT_BIAS));
  *scale = (vd)((vw)k << 52);
  return vd_fma(k - vd_set1(PNN_EXPONENT_BIAS), vd_set1(-PNN_LN_2), x);
}

/* exp(x), x <= 0; 0 below -708.7 */
static inline vd pnn_brief_exp(vd x) {
  vd scale, r = pnn_brief_reduce(x, &scale);
  return scale * vd_fma(r, vd_fma(r, pnn_brief_exp_tail(r), vd_set1(1)), vd_set1(1));
}

/* exp(x) - 1, x <= 0 */
static inline vd pnn_brief_expm1(vd x) {
  vd scale, r = pnn_brief_reduce(x, &scale);
  return vd_fma(scale, vd_fma(r * r, pnn_brief_exp_tail(r), r), scale - vd_set1(1));
}

/* M(z), 0 <= z */
static inline vd pnn_brief_normal_tail(vd z) {
  vd n = vd_set1(0x1.c4864657dc18ap-11);
  n = vd_fma(n, z, vd_set1(0x1.75a0ae79484f5p-7));
  n = vd_fma(n, z, vd_set1(0x1.1fd8e7ec425adp-4));
  n = vd_fma(n, z, vd_set1(0x1.fc508b3a19cd9p-3));
  n = vd_fma(n, z, vd_set1(0x1.028a509c7e808p-1));
  n = vd_fma(n, z, vd_set1(0x1.ffffffffb23a2p-2));
  vd d = vd_set1(0x1.1b93fc8db0307p-9);
  d = vd_fma(d, z, vd_set1(0x1.d44502108bfe3p-6));
  d = vd_fma(d, z, vd_set1(0x1.6d34c756b5904p-3));
  d = vd_fma(d, z, vd_set1(0x1.4d1e5abc9076cp-1));
  d = vd_fma(d, z, vd_set1(0x1.7056b14bd12a8p+0));
  d = vd_fma(d, z, vd_set1(0x1.cecc7a29f2783p+0));
  d = vd_fma(d, z, vd_set1(0x1.0000000000000p+0));
  return n / d;
}

static inline vd pnn_brief_elu(vd u) { return vd_select(u < vd_set1(0), pnn_brief_expm1(u), u); }
static inline vd pnn_brief_elu_grad(vd u) { return vd_select(u > vd_set1(0), vd_set1(1), pnn_brief_exp(u)); }

static inline vd pnn_brief_selu(vd u) {
  return vd_select(u < vd_set1(0), vd_set1(PNN_SELU_SCALE * PNN_SELU_ALPHA) * pnn_brief_expm1(u),
                   vd_set1(PNN_SELU_SCALE) * u);
}
static inline vd pnn_brief_selu_grad(vd u) {
  return vd_select(u > vd_set1(0), vd_set1(PNN_SELU_SCALE),
                   vd_set1(PNN_SELU_SCALE * PNN_SELU_ALPHA) * pnn_brief_exp(u));
}

/* At +inf the tail's factor must stay finite (0 * 40); at -inf it must not (0 * inf is NaN). */
static inline vd pnn_brief_gelu(vd u) {
  vd z = vd_abs(pnn_at_most_f64(u, vd_set1(40)));
  vd tail = z * pnn_brief_exp(z * z * vd_set1(-0.5)) * pnn_brief_normal_tail(z);
  return vd_select(u < vd_set1(0), -tail, u - tail);
}
static inline vd pnn_brief_gelu_grad(vd u) {
  vd z = vd_abs(u);
  vd g = pnn_brief_exp(z * z * vd_set1(-0.5)) * vd_fma(z, vd_set1(-PNN_DENSITY_0), pnn_brief_normal_tail(z));
  return vd_select(u < vd_set1(0), g, vd_set1(1) - g);
}

static inline vd pnn_brief_sigmoid(vd u) {
  vd t = pnn_brief_exp(-vd_abs(u));
  return vd_select(u < vd_set1(0), t, vd_set1(1)) / (vd_set1(1) + t);
}
static inline vd pnn_brief_sigmoid_grad(vd u) {
  vd t = pnn_brief_exp(-vd_abs(u));
  return t / pnn_square_of_1_plus(t);
}

static inline vd pnn_brief_silu(vd u) {
  vd t = pnn_brief_exp(-vd_abs(u));
  return u * vd_select(u < vd_set1(0), t, vd_set1(1)) / (vd_set1(1) + t);
}
static inline vd pnn_brief_silu_grad(vd u) {
  vd t = pnn_brief_exp(-vd_abs(u)), s = vd_set1(1) + t;
  vl negative = u < vd_set1(0);
  vd a = vd_select(negative, t, vd_set1(1)), b = vd_select(negative, vd_set1(1), t);
  return a * vd_fma(b, u, s) / pnn_square_of_1_plus(t);
}

static inline vd pnn_brief_tanh(vd u) {
  vd e = pnn_brief_expm1(vd_abs(u) * vd_set1(-2));
  return vd_copysign(e / (vd_set1(2) + e), u);
}
static inline vd pnn_brief_tanh_grad(vd u) {
  vd t = pnn_brief_exp(vd_abs(u) * vd_set1(-2));
  return vd_set1(4) * t / pnn_square_of_1_plus(t);
}

/* The float functions: both halves in double, the product with d too, then one rounding. */
#define PNN_FROM_BRIEF(name)                                                                         \
  static inline vf pnn_##name##_f32(vf u) {                                                          \
    vd low, high;                                                                                    \
    vf_to_vd(u, &low, &high);                                                                        \
    return vf_from_vd(pnn_brief_##name(low), pnn_brief_##name(high));                                \
  }                                                                                                  \
  static inline vf pnn_##name##_grad_f32(vf u, vf d) {                                               \
    vd low, high, d_low, d_high;                                                                     \
    vf_to_vd(u, &low, &high);                                                                        \
    vf_to_vd(d, &d_low, &d_high);                                                                    \
    return vf_from_vd(d_low * pnn_brief_##name##_grad(low), d_high * pnn_brief_##name##_grad(high)); \
  }

PNN_FROM_BRIEF(elu)
PNN_FROM_BRIEF(selu)
PNN_FROM_BRIEF(gelu)
PNN_FROM_BRIEF(silu)
PNN_FROM_BRIEF(tanh)
PNN_FROM_BRIEF(sigmoid)

#undef PNN_FROM_BRIEF

/* ---- for double results ---- */

/* (exp(r) - 1 - r) / r^2 */
static inline vd pnn_exp_tail(vd r) {
  vd p = vd_set1(0x1.1f72fc730b4ffp-29);
  p = vd_fma(p, r, vd_set1(0x1.af4ddd84882fep-26));
  p = vd_fma(p, r, vd_set1(0x1.27e4db67b4303p-22));
  p = vd_fma(p, r, vd_set1(0x1.71de02375656cp-19));
  p = vd_fma(p, r, vd_set1(0x1.a01a01a6d7808p-16));
  p = vd_fma(p, r, vd_set1(0x1.a01a01abe62ddp-13));
  p = vd_fma(p, r, vd_set1(0x1.6c16c16c162d6p-10));
  p = vd_fma(p, r, vd_set1(0x1.11111111100dfp-7));
  p = vd_fma(p, r, vd_set1(0x1.5555555555556p-5));
  p = vd_fma(p, r, vd_set1(0x1.5555555555557p-3));
  p = vd_fma(p, r, vd_set1(0x1.0000000000000p-1));
  return p;
}

/* 2^n for integers n of -1022 to 1023. */
static inline vd pnn_power_of_2(vd n) { return (vd)((vw)(n + vd_set1(PNN_EXPONENT_BIAS)) << 52); }

/* x + x_low = n ln(2) + (r + *r_low), for -1100 <= x <= 0, x_low tiny beside x; outside the results are of no use. */
static inline vd pnn_reduce(vd x, vd x_low, vd *n, vd *r_low) {
  vd k = vd_fma(x, vd_set1(PNN_LOG2_E), vd_set1(PNN_EXPONENT_BIAS));
  *n = k - vd_set1(PNN_EXPONENT_BIAS);
  vd exact = vd_fma(*n, vd_set1(-PNN_LN_2), x);
  vd low = vd_fma(*n, vd_set1(-PNN_LN_2_LOW), x_low);
  vd r = exact + low;
  *r_low = (exact - r) + low;
  return r;
}

/* exp(x + x_low) = the result * *rest, x <= 0. rest is 1 but for the results below 2^-1000, and 0 where exp is. */
static inline vd pnn_exp(vd x, vd x_low, vd *rest) {
  vl zero = x < vd_set1(PNN_EXP_ZERO);
  vd n, r_low, r = pnn_reduce(pnn_at_least_f64(x, vd_set1(PNN_EXP_ZERO)), x_low, &n, &r_low);
  vd p = vd_fma(r * r, pnn_exp_tail(r), r_low);
  vd one_r = vd_set1(1) + r;
  p = one_r + (((vd_set1(1) - one_r) + r) + p);
  vd n_normal = pnn_at_least_f64(n, vd_set1(-1000));
  *rest = (vd)((vl)pnn_power_of_2(n - n_normal) & ~zero);
  return p * pnn_power_of_2(n_normal);
}

/* exp(x) - 1, x <= 0 */
static inline vd pnn_expm1(vd x) {
  vd n, r_low, r = pnn_reduce(pnn_at_least_f64(x, vd_set1(-40)), vd_set1(0), &n, &r_low);
  vd scale = pnn_power_of_2(n);
  return vd_fma(scale, r + vd_fma(r * r, pnn_exp_tail(r), r_low), scale - vd_set1(1));
}

/* M(z) = the result / *divisor, 0 <= z <= 40 */
static inline vd pnn_normal_tail(vd z, vd *divisor) {
  vd w = (z - vd_set1(5)) / (z + vd_set1(5));
  vd f = vd_set1(-0x1.f11b606e7f555p-33);
  f = vd_fma(f, w, vd_set1(-0x1.9b9a4528a0876p-35));
  f = vd_fma(f, w, vd_set1(0x1.c90a3db16205cp-29));
  f = vd_fma(f, w, vd_set1(0x1.5c8bc8c2fd398p-29));
  f = vd_fma(f, w, vd_set1(-0x1.98ed8ba00b140p-26));
  f = vd_fma(f, w, vd_set1(-0x1.7d2fa5d90ff9ep-26));
  f = vd_fma(f, w, vd_set1(0x1.404858eac7757p-23));
  f = vd_fma(f, w, vd_set1(0x1.f5bc9d1277578p-24));
  f = vd_fma(f, w, vd_set1(-0x1.0a972482dcc9fp-20));
  f = vd_fma(f, w, vd_set1(-0x1.9e2539c03ed01p-23));
  f = vd_fma(f, w, vd_set1(0x1.d3356389f4417p-18));
  f = vd_fma(f, w, vd_set1(-0x1.b6a655fe9873ap-18));
  f = vd_fma(f, w, vd_set1(-0x1.64b6540c4b527p-15));
  f = vd_fma(f, w, vd_set1(0x1.16f8497daa2f0p-13));
  f = vd_fma(f, w, vd_set1(0x1.18e237cd7a887p-15));
  f = vd_fma(f, w, vd_set1(-0x1.526f25d25c29fp-10));
  f = vd_fma(f, w, vd_set1(0x1.34f012c78ad43p-8));
  f = vd_fma(f, w, vd_set1(-0x1.504887f62d46dp-7));
  f = vd_fma(f, w, vd_set1(0x1.e4ddc36271c2cp-7));
  f = vd_fma(f, w, vd_set1(-0x1.72dbdaea5120fp-7));
  f = vd_fma(f, w, vd_set1(-0x1.152e815faffefp-7));
  f = vd_fma(f, w, vd_set1(0x1.8bb46a5e7a7e8p-5));
  f = vd_fma(f, w, vd_set1(-0x1.a22eeef83407ep-4));
  f = vd_fma(f, w, vd_set1(0x1.88989c2544936p-2));
  *divisor = vd_fma(z, vd_set1(0.796875), vd_set1(1));
  return f;
}

/* exp(-z^2/2) as pnn_exp gives it; z^2 in two parts, since its rounding error would be multiplied by z^2. */
static inline vd pnn_gaussian(vd z, vd *rest) {
  vd square = z * z;
  return pnn_exp(square * vd_set1(-0.5), vd_fma(z, z, -square) * vd_set1(-0.5), rest);
}

static inline vd pnn_elu_f64(vd u) { return vd_select(u < vd_set1(0), pnn_expm1(u), u); }
static inline vd pnn_elu_grad_f64(vd u, vd d) {
  vd rest, t = pnn_exp(u, vd_set1(0), &rest);
  return d * vd_select(u > vd_set1(0), vd_set1(1), t * rest);
}

static inline vd pnn_selu_f64(vd u) {
  return vd_select(u < vd_set1(0), vd_set1(PNN_SELU_SCALE * PNN_SELU_ALPHA) * pnn_expm1(u),
                   vd_set1(PNN_SELU_SCALE) * u);
}
static inline vd pnn_selu_grad_f64(vd u, vd d) {
  vd rest, t = pnn_exp(u, vd_set1(0), &rest);
  return d * vd_select(u > vd_set1(0), vd_set1(PNN_SELU_SCALE), vd_set1(PNN_SELU_SCALE * PNN_SELU_ALPHA) * t * rest);
}

/* At +inf the tail's factor must stay finite (0 * 40); at -inf it must not (0 * inf is NaN). */
static inline vd pnn_gelu_f64(vd u) {
  vd z = pnn_at_most_f64(vd_abs(u), vd_set1(40));
  vd rest, t = pnn_gaussian(z, &rest);
  vd divisor, f = pnn_normal_tail(z, &divisor);
  vd tail = vd_select(u < vd_set1(0), -u, z) * t * f / divisor * rest;
  return vd_select(u < vd_set1(0), -tail, u - tail);
}
static inline vd pnn_gelu_grad_f64(vd u, vd d) {
  vd z = pnn_at_most_f64(vd_abs(u), vd_set1(40));
  vd rest, t = pnn_gaussian(z, &rest);
  vd divisor, f = pnn_normal_tail(z, &divisor);
  vd g = t * vd_fma(vd_abs(u), vd_set1(-PNN_DENSITY_0), f / divisor) * rest;
  return d * vd_select(u < vd_set1(0), g, vd_set1(1) - g);
}

static inline vd pnn_sigmoid_f64(vd u) {
  vd rest, t = pnn_exp(-vd_abs(u), vd_set1(0), &rest);
  vd s = vd_set1(1) + t;
  return vd_select(u < vd_set1(0), t / s * rest, vd_set1(1) / s);
}
static inline vd pnn_sigmoid_grad_f64(vd u, vd d) {
  vd rest, t = pnn_exp(-vd_abs(u), vd_set1(0), &rest);
  return d * (t / pnn_square_of_1_plus(t) * rest);
}

static inline vd pnn_silu_f64(vd u) {
  vd rest, t = pnn_exp(-vd_abs(u), vd_set1(0), &rest);
  vl negative = u < vd_set1(0);
  return u * vd_select(negative, t, vd_set1(1)) / (vd_set1(1) + t) * vd_select(negative, rest, vd_set1(1));
}
static inline vd pnn_silu_grad_f64(vd u, vd d) {
  vd rest, t = pnn_exp(-vd_abs(u), vd_set1(0), &rest);
  vd s = vd_set1(1) + t;
  vl negative = u < vd_set1(0);
  vd a = vd_select(negative, t, vd_set1(1)), b = vd_select(negative, vd_set1(1), t * rest);
  return d * (a * vd_fma(b, u, s) / pnn_square_of_1_plus(t) * vd_select(negative, rest, vd_set1(1)));
}

static inline vd pnn_tanh_f64(vd u) {
  vd e = pnn_expm1(vd_abs(u) * vd_set1(-2));
  return vd_copysign(e / (vd_set1(2) + e), u);
}
static inline vd pnn_tanh_grad_f64(vd u, vd d) {
  vd rest, t = pnn_exp(vd_abs(u) * vd_set1(-2), vd_set1(0), &rest);
  return d * (vd_set1(4) * t / pnn_square_of_1_plus(t) * rest);
}

#endif
