// torch_pnn.h - the operators as C++ functions of tensors, for programs on LibTorch; no Python is needed.
//
//     find_package(torch_pnn REQUIRED)                                   # CMake: LibTorch and the operators
//     target_link_libraries(program PRIVATE torch_pnn::torch_pnn)
//
//     torch_pnn::PerturbOptions options;
//     options.seed = torch_pnn::make_seed(1);
//     options.level = 0.1;
//     at::Tensor y = torch_pnn::perturb_conv2d(x, weight, bias, options);
//
// The functions mirror torch_pnn.functional: same names, same defaults, same results to the bit. They go through
// PyTorch's dispatcher, so autograd, autocast and inference mode act on them as on any other operator, and they may be
// called from any number of threads at once. A wrong call throws std::exception (c10::Error or std::runtime_error) with
// one sentence that names the argument, what it was and what it should be; nothing was written then.
//
// Nothing here is compiled into a library: the header needs ATen alone, and fits every PyTorch from 2.11 on.
#ifndef TORCH_PNN_TORCH_PNN_H
#define TORCH_PNN_TORCH_PNN_H

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

namespace torch_pnn {

// What the layer is, beside input, weight and bias.
struct PerturbOptions {
  std::optional<at::Tensor> mask;                // N, [C or 1, M, H, W], float32 or the input's type; or else
  std::optional<at::Tensor> seed;                // of masks that are computed and never stored: one int64 (make_seed)
  int64_t masks = 1;                             // M, masks per input channel; with `seed`
  bool shared_masks = false;                     // the same M masks for every channel; with `seed`
  std::optional<std::string> noise = "uniform";  // or "normal", "waves"; nullopt = no perturbation, no mask, no seed
  double level = 1.0;                            // factor of the mask
  std::string activation = "relu";         // identity, relu, leaky_relu, elu, selu, gelu, silu, tanh, sigmoid, hardtanh
  std::array<int64_t, 2> stride = {1, 1};  // rows, columns: the result at every stride-th pixel
  int64_t groups = 1;                      // divides the channels and the outputs
};

// The batch normalisation of the response maps; the K = C*M entries of each vector are float32 (float64 beside a
// float64 input). Running statistics are updated in place in training.
struct PerturbNorm {
  std::optional<at::Tensor> weight, bias;               // gamma, beta; nullopt = 1 and 0
  std::optional<at::Tensor> running_mean, running_var;  // needed in evaluation
  double momentum = 0.1;
  double eps = 1e-5;
};

namespace detail {

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  const auto op = c10::Dispatcher::singleton().findSchema({name, ""});
  TORCH_CHECK(op.has_value(), name,
              " is not registered: link torch_pnn::torch_pnn (find_package(torch_pnn) in CMake), or load "
              "libtorch_pnn_ops.so and the libtorch_pnn_autograd that fits this LibTorch with dlopen");
  return op->typed<Signature>();
}

// The seed and kind of noise that an operator takes for these options.
inline std::string_view checked_noise(const PerturbOptions& options) {
  const int given = int(options.mask.has_value()) + int(options.seed.has_value());
  TORCH_CHECK(given == (options.noise ? 1 : 0), "torch_pnn: ", given,
              " of mask and seed are given, it should be exactly one of them, or neither where noise is nullopt");
  return options.noise ? std::string_view(*options.noise) : std::string_view("uniform");
}

inline std::string ask(const char* name) { return find_operator<std::string()>(name).call(); }

}  // namespace detail

// A seed as the layer takes it: 64 bits, kept as two's complement in one int64.
inline at::Tensor make_seed(uint64_t seed, at::Device device = at::kCPU) {
  return at::full({1}, static_cast<int64_t>(seed), at::TensorOptions().dtype(at::kLong).device(device));
}

// y[b, t, q] = bias[t] + sum over k = c*M + m of weight[t, k] * activation(input[b, c, p] + level * N[c, m, p]).
//
//   input    [B, C, H, W] or [C, H, W]; float32, float64, bfloat16 or float16
//   weight   [T, C/groups * M, 1, 1], input's type, or a 16-bit one beside a float32 input
//   bias     [T], weight's type
//   returns  [B, T, ceil(H/stride), ceil(W/stride)] (without B for [C, H, W]) in weight's type, channels_last where the
//            input is
inline at::Tensor perturb_conv2d(const at::Tensor& input, const at::Tensor& weight,
                                 const std::optional<at::Tensor>& bias = std::nullopt,
                                 const PerturbOptions& options = {}) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                               const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, int64_t, bool,
                               std::string_view, double, std::string_view, at::IntArrayRef, int64_t);
  static const auto op = detail::find_operator<Signature>("torch_pnn::perturb_conv2d");
  const std::string_view noise = detail::checked_noise(options);
  const bool image = input.dim() == 3;
  const at::Tensor output =
      op.call(image ? input.unsqueeze(0) : input, weight, bias, options.mask, options.seed, options.masks,
              options.shared_masks, noise, options.level, options.activation, options.stride, options.groups);
  return image ? output.squeeze(0) : output;
}

// The same with the maps batch-normalised before the weight mixes them (the authors' published layer): in training by
// the moments of this batch over the computed pixels, else by the running ones. One pixel in all is refused in
// training.
inline at::Tensor perturb_norm_conv2d(const at::Tensor& input, const at::Tensor& weight,
                                      const std::optional<at::Tensor>& bias, const PerturbNorm& norm, bool training,
                                      const PerturbOptions& options = {}) {
  using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
      const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
      const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, bool, double, int64_t, bool, std::string_view,
      double, std::string_view, at::IntArrayRef, int64_t);
  static const auto op = detail::find_operator<Signature>("torch_pnn::perturb_norm_conv2d");
  const std::string_view noise = detail::checked_noise(options);
  const std::optional<at::Tensor> none;
  const bool image = input.dim() == 3;
  // In training the running statistics stay out of the call: they are about to change, and what autograd keeps for the
  // backward pass must not.
  const auto [output, mean, variance] = op.call(
      image ? input.unsqueeze(0) : input, weight, bias, norm.weight, norm.bias, training ? none : norm.running_mean,
      training ? none : norm.running_var, options.mask, options.seed, training, norm.eps, options.masks,
      options.shared_masks, noise, options.level, options.activation, options.stride, options.groups);
  const int64_t pixels = output.size(0) * output.size(2) * output.size(3);
  if (training && pixels > 1) {
    const at::NoGradGuard guard;
    const double unbiased = static_cast<double>(pixels) / static_cast<double>(pixels - 1);
    if (norm.running_mean) at::Tensor(*norm.running_mean).mul_(1.0 - norm.momentum).add_(mean, norm.momentum);
    if (norm.running_var)
      at::Tensor(*norm.running_var).mul_(1.0 - norm.momentum).add_(variance, norm.momentum * unbiased);
  }
  return image ? output.squeeze(0) : output;
}

// A seed's masks, written out: [C, M, height, width], or [1, M, height, width] where they are shared, on the seed's
// device. A larger image's masks continue a smaller one's.
inline at::Tensor perturbation_mask(const at::Tensor& seed, int64_t channels, int64_t masks, int64_t height,
                                    int64_t width, bool shared_masks = false, std::string_view noise = "uniform",
                                    at::ScalarType dtype = at::kFloat) {
  using Signature = at::Tensor(const at::Tensor&, int64_t, int64_t, c10::SymInt, c10::SymInt, bool, std::string_view,
                               std::optional<at::ScalarType>);
  static const auto op = detail::find_operator<Signature>("torch_pnn::perturbation_mask");
  return op.call(seed, channels, masks, height, width, shared_masks, noise, dtype);
}

// The instruction set whose kernels run, for example "avx2", and the version of libpnn.
inline std::string isa_name() { return detail::ask("torch_pnn::_isa_name"); }
inline std::string library_version() { return detail::ask("torch_pnn::_library_version"); }

// Whether float32 products on CUDA may be the tensor cores', of operands rounded to TF32: for the whole process, false
// until it is set here, in Python (torch_pnn.backends.cuda.allow_tf32) or by TORCH_PNN_ALLOW_TF32=1 in the environment.
inline bool tf32_allowed() {
  return detail::find_operator<bool(std::optional<bool>)>("torch_pnn::_allow_tf32").call(std::nullopt);
}
inline void allow_tf32(bool allowed) {
  detail::find_operator<bool(std::optional<bool>)>("torch_pnn::_allow_tf32").call(allowed);
}

// Whether bfloat16 and float16 layers, and float32 ones where TF32 is allowed, may use a Hopper GPU's asynchronous
// products: for the whole process, true until it is set here, in Python (torch_pnn.backends.cuda.allow_wgmma) or by
// TORCH_PNN_ALLOW_WGMMA=0 in the environment.
inline bool wgmma_allowed() {
  return detail::find_operator<bool(std::optional<bool>)>("torch_pnn::_allow_wgmma").call(std::nullopt);
}
inline void allow_wgmma(bool allowed) {
  detail::find_operator<bool(std::optional<bool>)>("torch_pnn::_allow_wgmma").call(allowed);
}

// Whether libtorch_pnn_autograd for this LibTorch is loaded. Without it models run, but no gradient passes the layer.
inline bool has_derivatives() {
  const auto op = c10::Dispatcher::singleton().findSchema({"torch_pnn::perturb_conv2d", ""});
  return op.has_value() && op->hasKernelForDispatchKey(c10::DispatchKey::Autograd);
}

}  // namespace torch_pnn

#endif
