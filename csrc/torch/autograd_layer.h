// autograd_layer.h - the operators as classic ATen calls them, and the same layer written in differentiable operators.
#ifndef TORCH_PNN_AUTOGRAD_LAYER_H
#define TORCH_PNN_AUTOGRAD_LAYER_H

#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace torch_pnn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The arguments behind the tensors that have gradients, alike for both layers and both directions.
struct Options {
  OptionalTensor seed;
  int64_t masks;
  bool shared_masks;
  std::string noise;
  double level;
  std::string activation;
  std::array<int64_t, 2> stride;
  int64_t groups;
};

// What normalisation inside adds.
struct Norm {
  OptionalTensor weight, bias;    // gamma, beta
  OptionalTensor mean, variance;  // the running ones, or what the forward pass returned; not read when training
  bool training;
  double eps;
};

using PlainGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using NormOutputs = std::tuple<Tensor, Tensor, Tensor>;
using NormGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The layer, as `torch_pnn.reference` computes it: for what a single kernel cannot serve (torch.func transforms,
// forward-mode derivatives, derivatives of derivatives). It stores the M times larger response maps. Types and rounding
// are those of the kernels; autocast is off inside.
namespace decomposed {

Tensor perturb_conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& mask,
                      const Options& options);
PlainGradients perturb_conv2d_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                       const OptionalTensor& mask, const Options& options,
                                       const std::array<bool, 4>& wanted);
// The gradients of the gradients: grad_grads are those with respect to the four that perturb_conv2d_backward returns,
// undefined where there is none; the results, with respect to grad_output, input, weight and mask, where wanted.
std::vector<Tensor> perturb_conv2d_double_backward(const std::array<Tensor, 4>& grad_grads, const Tensor& grad_output,
                                                   const Tensor& input, const Tensor& weight,
                                                   const OptionalTensor& mask, const Options& options,
                                                   const std::array<bool, 4>& wanted);
NormOutputs perturb_norm_conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                const OptionalTensor& mask, const Norm& norm, const Options& options);
NormGradients perturb_norm_conv2d_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                           const OptionalTensor& mask, const Norm& norm, const Options& options,
                                           const std::array<bool, 6>& wanted);

}  // namespace decomposed

// A call of the registered operator through the dispatcher.
Tensor call_perturbation_mask(const Tensor& seed, int64_t channels, int64_t masks, c10::SymInt height,
                              c10::SymInt width, bool shared_masks, const std::string& noise, at::ScalarType dtype);

}  // namespace torch_pnn

#endif
