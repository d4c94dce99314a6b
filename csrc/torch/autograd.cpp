// autograd.cpp - derivatives and autocast of the operators, on classic ATen: built once for each minor version of
// PyTorch, and loaded after torch_pnn_ops, which holds the schemas and the kernels.
//
// The usual way is a torch::autograd::Function around the kernels, which keeps input, weight and mask (with
// normalisation also vectors of one value per map) and calls the backward operator. torch.func's transforms refuse such
// Functions; inside them a node of the graph does the same. Where no kernel can serve, the operators decompose
// (autograd_layer.h): with forward-mode derivatives, and for derivatives of gradients, which torch.func.grad always
// prepares for: without normalisation only once they are computed, with it for the whole backward pass. What vmap does
// with the operators is in python/torch_pnn/_vmap.py.
#include <ATen/FuncTorchTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <functional>
#include <memory>
#include <mutex>

#include "autograd_layer.h"

namespace torch_pnn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Text = std::string_view;

// ---- the operators, as the dispatcher calls them ----

using PlainSignature = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                              const OptionalTensor&, int64_t, bool, Text, double, Text, at::IntArrayRef, int64_t);
using PlainBackwardSignature = PlainGradients(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                              const OptionalTensor&, int64_t, bool, Text, double, Text, at::IntArrayRef,
                                              int64_t, std::array<bool, 4>);
using NormSignature = NormOutputs(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                  const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                  const OptionalTensor&, const OptionalTensor&, bool, double, int64_t, bool, Text,
                                  double, Text, at::IntArrayRef, int64_t);
using NormBackwardSignature = NormGradients(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                            const OptionalTensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                            const OptionalTensor&, bool, double, int64_t, bool, Text, double, Text,
                                            at::IntArrayRef, int64_t, std::array<bool, 6>);
using MaskSignature = Tensor(const Tensor&, int64_t, int64_t, c10::SymInt, c10::SymInt, bool, Text,
                             std::optional<at::ScalarType>);

template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Tensor call_plain(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& mask,
                  const Options& o) {
  static const auto op = find<PlainSignature>("torch_pnn::perturb_conv2d");
  return op.call(input, weight, bias, mask, o.seed, o.masks, o.shared_masks, o.noise, o.level, o.activation, o.stride,
                 o.groups);
}

PlainGradients call_plain_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                   const OptionalTensor& mask, const Options& o, const std::array<bool, 4>& wanted) {
  static const auto op = find<PlainBackwardSignature>("torch_pnn::_perturb_conv2d_backward");
  return op.call(grad_output, input, weight, mask, o.seed, o.masks, o.shared_masks, o.noise, o.level, o.activation,
                 o.stride, o.groups, wanted);
}

NormOutputs call_norm(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& mask,
                      const Norm& n, const Options& o) {
  static const auto op = find<NormSignature>("torch_pnn::perturb_norm_conv2d");
  return op.call(input, weight, bias, n.weight, n.bias, n.mean, n.variance, mask, o.seed, n.training, n.eps, o.masks,
                 o.shared_masks, o.noise, o.level, o.activation, o.stride, o.groups);
}

NormGradients call_norm_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                 const OptionalTensor& mask, const Norm& n, const Options& o,
                                 const std::array<bool, 6>& wanted) {
  static const auto op = find<NormBackwardSignature>("torch_pnn::_perturb_norm_conv2d_backward");
  return op.call(grad_output, input, weight, n.weight, n.bias, *n.mean, *n.variance, mask, o.seed, n.training, n.eps,
                 o.masks, o.shared_masks, o.noise, o.level, o.activation, o.stride, o.groups, wanted);
}

Options make_options(const OptionalTensor& seed, int64_t masks, bool shared_masks, Text noise, double level,
                     Text activation, at::IntArrayRef stride, int64_t groups) {
  TORCH_CHECK(stride.size() == 1 || stride.size() == 2, "torch_pnn: stride has ", stride.size(),
              " values, it should have one or two");
  return {
      seed,  masks, shared_masks, std::string(noise), level, std::string(activation), {stride.front(), stride.back()},
      groups};
}

// ---- which way to go ----

// functorch's state stays for the rest of the process after the first transform, so that it exists says nothing:
// whether a transform is active now is what this check of functorch's own answers, by throwing.
bool inside_transform() {
  const auto& functorch = at::functorch::functorchTLSAccessor();
  if (!functorch) return false;
  try {
    functorch->checkSupportsCppAutogradFunction();
  } catch (const c10::Error&) {
    return true;
  }
  return false;
}

bool has_tangent(const Tensor& tensor) { return tensor.defined() && tensor._fw_grad(/*level=*/0).defined(); }
bool has_tangent(const OptionalTensor& tensor) { return tensor && has_tangent(*tensor); }

bool needs_gradient(const Tensor& tensor) { return tensor.requires_grad(); }
bool needs_gradient(const OptionalTensor& tensor) { return tensor && tensor->requires_grad(); }

template <typename... Tensors>
bool must_decompose(const Tensors&... tensors) {
  return (has_tangent(tensors) || ...);
}

template <typename... Tensors>
bool must_record(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (needs_gradient(tensors) || ...);
}

// ---- the Functions ----

// Options as a value that autograd can keep (compiled autograd compares and repacks it).
c10::IValue pack(const Options& o, bool has_bias) {
  return c10::ivalue::Tuple::create(
      {o.masks, o.shared_masks, o.noise, o.level, o.activation, o.stride[0], o.stride[1], o.groups, has_bias});
}

Options unpack(const c10::IValue& packed, const Tensor& seed, bool* has_bias) {
  const c10::ArrayRef<c10::IValue> e = packed.toTupleRef().elements().asArrayRef();
  *has_bias = e[8].toBool();
  return {seed.defined() ? OptionalTensor(seed) : std::nullopt,
          e[0].toInt(),
          e[1].toBool(),
          e[2].toStringRef(),
          e[3].toDouble(),
          e[4].toStringRef(),
          {e[5].toInt(), e[6].toInt()},
          e[7].toInt()};
}

// A seed is kept among the tensors, so that autograd's hooks see it and the options hold none.
Options with_seed(Options options, const Tensor& seed) {
  options.seed = seed.defined() ? OptionalTensor(seed) : std::nullopt;
  return options;
}

OptionalTensor optional(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }
Tensor undefined_or(const OptionalTensor& tensor) { return tensor ? *tensor : Tensor(); }

// Answers for one input after the other whether its gradient is needed; autograd counts those that are given.
class Needs {
 public:
  explicit Needs(AutogradContext* context) : context_(context) {}
  bool next(bool given) { return given && context_->needs_input_grad(edge_++); }

 private:
  AutogradContext* context_;
  size_t edge_ = 0;
};

Tensor if_wanted(bool wanted, const Tensor& gradient) { return wanted ? gradient : Tensor(); }

struct PerturbConv2d : torch::autograd::Function<PerturbConv2d> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* context, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& mask, const Options& options) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor output = call_plain(input, weight, bias, mask, options);
    context->save_for_backward({input, weight, undefined_or(mask), undefined_or(options.seed)});
    context->saved_data["options"] = pack(options, bias.has_value());
    return output;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const variable_list saved = context->get_saved_variables();
    const Tensor &input = saved[0], &weight = saved[1], &mask = saved[2];
    bool has_bias = false;
    const Options options = unpack(context->saved_data["options"], saved[3], &has_bias);
    Needs needs(context);
    const bool x = needs.next(true), v = needs.next(true), b = needs.next(has_bias), n = needs.next(mask.defined());
    const auto [grad_input, grad_weight, grad_bias, grad_mask] =
        call_plain_backward(grads[0], input, weight, optional(mask), options, {x, v, b, n});
    return {if_wanted(x, grad_input), if_wanted(v, grad_weight), if_wanted(b, grad_bias), if_wanted(n, grad_mask),
            Tensor()};
  }
};

// Mean and variance leave through a pointer: they carry no gradients, and an output marked as such would keep the node
// out of compiled autograd.
struct NormMoments {
  Tensor mean, variance;
};

struct PerturbNormConv2d : torch::autograd::Function<PerturbNormConv2d> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* context, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, const OptionalTensor& mask,
                        const Norm& norm, const Options& options, NormMoments* moments) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    Tensor output;
    std::tie(output, moments->mean, moments->variance) = call_norm(input, weight, bias, mask, norm, options);
    context->save_for_backward({input, weight, undefined_or(norm_weight), undefined_or(norm_bias), undefined_or(mask),
                                undefined_or(options.seed), moments->mean, moments->variance});
    context->saved_data["options"] = pack(options, bias.has_value());
    context->saved_data["training"] = norm.training;
    context->saved_data["eps"] = norm.eps;
    return output;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const variable_list saved = context->get_saved_variables();
    const Tensor &input = saved[0], &weight = saved[1], &gamma = saved[2], &beta = saved[3], &mask = saved[4];
    const Norm norm = {optional(gamma),
                       optional(beta),
                       optional(saved[6]),
                       optional(saved[7]),
                       context->saved_data["training"].toBool(),
                       context->saved_data["eps"].toDouble()};
    bool has_bias = false;
    const Options options = unpack(context->saved_data["options"], saved[5], &has_bias);
    Needs needs(context);
    const bool x = needs.next(true), v = needs.next(true), b = needs.next(has_bias);
    const bool ga = needs.next(gamma.defined()), be = needs.next(beta.defined()), n = needs.next(mask.defined());
    const auto [grad_input, grad_weight, grad_bias, grad_gamma, grad_beta, grad_mask] =
        call_norm_backward(grads[0], input, weight, optional(mask), norm, options, {x, v, b, ga, be, n});
    return {if_wanted(x, grad_input),
            if_wanted(v, grad_weight),
            if_wanted(b, grad_bias),
            if_wanted(ga, grad_gamma),
            if_wanted(be, grad_beta),
            if_wanted(n, grad_mask),
            Tensor(),
            Tensor(),
            Tensor()};
  }
};

// ---- nodes of the graph, as PyTorch's own operators have them ----

using NodePointer = decltype(torch::autograd::Edge().function);  // PyTorch 2.13 changed what it is

// What autograd calls for the gradients of one call. The tensors that it keeps are handed to `gradients` with the
// incoming gradients and, for each input, whether its gradient is needed.
struct CallNode final : torch::autograd::Node {
  using Gradients = std::function<variable_list(const variable_list& saved, const variable_list& grads,
                                                const std::vector<bool>& needed)>;

  std::string label;
  std::vector<torch::autograd::SavedVariable> saved;
  Gradients gradients;

  std::string name() const override { return label; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : saved) variable.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    variable_list values;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (const auto& variable : saved) values.push_back(variable.unpack());
    }
    std::vector<bool> needed(num_outputs());
    for (size_t i = 0; i < needed.size(); i++) needed[i] = task_should_compute_output(i);
    for (const Tensor& grad : grads)
      if (grad.defined()) return gradients(values, grads, needed);
    return variable_list(needed.size());
  }
};

// Records a call: its outputs are those that have gradients, an undefined one standing for each that has none; its
// inputs stand in the order in which `gradients` returns theirs.
template <typename... Inputs>
void record(std::string label, const variable_list& outputs, const variable_list& saved, CallNode::Gradients gradients,
            const Inputs&... inputs) {
  auto node = std::make_unique<CallNode>();
  node->label = std::move(label);
  node->gradients = std::move(gradients);
  for (const Tensor& tensor : saved) node->saved.emplace_back(tensor, /*is_output=*/false);
  node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
  torch::autograd::set_history(outputs, NodePointer(std::move(node)));
}

template <typename Tuple, size_t size>
variable_list wanted_only(const Tuple& gradients, const std::array<bool, size>& wanted) {
  return std::apply(
      [&wanted](const auto&... gradient) {
        size_t i = 0;
        return variable_list{if_wanted(wanted[i++], gradient)...};
      },
      gradients);
}

// ---- Autograd kernels ----

// A nested tensor has no sizes, and what asks for them first is PyTorch's bookkeeping of gradients.
void refuse_nested(const char* op, const Tensor& input) {
  TORCH_CHECK(!input.is_nested(), "torch_pnn::", op,
              ": input is a nested tensor, it should be a dense one: give the layer one image at a time, or pad them "
              "with torch.nested.to_padded_tensor");
}

Tensor perturb_conv2d_autograd(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                               const OptionalTensor& mask, const OptionalTensor& seed, int64_t masks, bool shared_masks,
                               Text noise, double level, Text activation, at::IntArrayRef stride, int64_t groups) {
  refuse_nested("perturb_conv2d", input);
  const Options options = make_options(seed, masks, shared_masks, noise, level, activation, stride, groups);
  if (must_decompose(input, weight, bias, mask)) return decomposed::perturb_conv2d(input, weight, bias, mask, options);
  const bool recorded = must_record(input, weight, bias, mask);
  if (recorded && !inside_transform()) return PerturbConv2d::apply(input, weight, bias, mask, options);
  const Tensor output = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call_plain(input, weight, bias, mask, options);
  }();
  if (recorded) {
    auto gradients = [options = with_seed(options, Tensor())](const variable_list& saved, const variable_list& grads,
                                                              const std::vector<bool>& needed) {
      const std::array<bool, 4> wanted = {needed[0], needed[1], needed[2], needed[3]};
      return wanted_only(
          call_plain_backward(grads[0], saved[0], saved[1], optional(saved[2]), with_seed(options, saved[3]), wanted),
          wanted);
    };
    record("PerturbConv2dBackward", {output}, {input, weight, undefined_or(mask), undefined_or(seed)}, gradients, input,
           weight, bias, mask);
  }
  return output;
}

PlainGradients perturb_conv2d_backward_autograd(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                                const OptionalTensor& mask, const OptionalTensor& seed, int64_t masks,
                                                bool shared_masks, Text noise, double level, Text activation,
                                                at::IntArrayRef stride, int64_t groups, std::array<bool, 4> wanted) {
  const Options options = make_options(seed, masks, shared_masks, noise, level, activation, stride, groups);
  if (must_decompose(grad_output, input, weight, mask))
    return decomposed::perturb_conv2d_backward(grad_output, input, weight, mask, options, wanted);
  const PlainGradients result = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call_plain_backward(grad_output, input, weight, mask, options, wanted);
  }();
  if (must_record(grad_output, input, weight, mask)) {
    auto gradients = [options = with_seed(options, Tensor())](const variable_list& saved, const variable_list& grads,
                                                              const std::vector<bool>& needed) {
      return decomposed::perturb_conv2d_double_backward({grads[0], grads[1], grads[2], grads[3]}, saved[0], saved[1],
                                                        saved[2], optional(saved[3]), with_seed(options, saved[4]),
                                                        {needed[0], needed[1], needed[2], needed[3]});
    };
    record("PerturbConv2dBackwardBackward", wanted_only(result, wanted),
           {grad_output, input, weight, undefined_or(mask), undefined_or(seed)}, gradients, grad_output, input, weight,
           mask);
  }
  return result;
}

NormOutputs perturb_norm_conv2d_autograd(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                         const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                         const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                         const OptionalTensor& mask, const OptionalTensor& seed, bool training,
                                         double eps, int64_t masks, bool shared_masks, Text noise, double level,
                                         Text activation, at::IntArrayRef stride, int64_t groups) {
  refuse_nested("perturb_norm_conv2d", input);
  const Options options = make_options(seed, masks, shared_masks, noise, level, activation, stride, groups);
  const Norm norm = {norm_weight, norm_bias, running_mean, running_var, training, eps};
  if (must_decompose(input, weight, bias, norm_weight, norm_bias, mask))
    return decomposed::perturb_norm_conv2d(input, weight, bias, mask, norm, options);
  const bool recorded = must_record(input, weight, bias, norm_weight, norm_bias, mask);
  if (recorded && !inside_transform()) {
    NormMoments moments;
    Tensor output =
        PerturbNormConv2d::apply(input, weight, bias, norm_weight, norm_bias, mask, norm, options, &moments);
    return {std::move(output), std::move(moments.mean), std::move(moments.variance)};
  }
  const NormOutputs outputs = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call_norm(input, weight, bias, mask, norm, options);
  }();
  if (recorded) {
    auto gradients = [options = with_seed(options, Tensor()), training, eps](
                         const variable_list& saved, const variable_list& grads, const std::vector<bool>& needed) {
      const Norm kept = {optional(saved[2]), optional(saved[3]), saved[6], saved[7], training, eps};
      const std::array<bool, 6> wanted = {needed[0], needed[1], needed[2], needed[3], needed[4], needed[5]};
      return wanted_only(call_norm_backward(grads[0], saved[0], saved[1], optional(saved[4]), kept,
                                            with_seed(options, saved[5]), wanted),
                         wanted);
    };
    const auto& [output, mean, variance] = outputs;
    record("PerturbNormConv2dBackward", {output},
           {input, weight, undefined_or(norm_weight), undefined_or(norm_bias), undefined_or(mask), undefined_or(seed),
            mean, variance},
           gradients, input, weight, bias, norm_weight, norm_bias, mask);
  }
  return outputs;
}

NormGradients perturb_norm_conv2d_backward_autograd(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, const Tensor& mean, const Tensor& variance, const OptionalTensor& mask,
    const OptionalTensor& seed, bool training, double eps, int64_t masks, bool shared_masks, Text noise, double level,
    Text activation, at::IntArrayRef stride, int64_t groups, std::array<bool, 6> wanted) {
  const Options options = make_options(seed, masks, shared_masks, noise, level, activation, stride, groups);
  const Norm norm = {norm_weight, norm_bias, mean, variance, training, eps};
  if (must_decompose(grad_output, input, weight, norm_weight, norm_bias, mask) ||
      must_record(grad_output, input, weight, norm_weight, norm_bias, mask))
    return decomposed::perturb_norm_conv2d_backward(grad_output, input, weight, mask, norm, options, wanted);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_norm_backward(grad_output, input, weight, mask, norm, options, wanted);
}

// ---- the boxed front ----

bool needs_autograd(const Tensor& tensor) {
  return has_tangent(tensor) || (at::GradMode::is_enabled() && needs_gradient(tensor));
}

// Python and TorchScript bring an operator's arguments on a stack, and the kernels take them from there. Where there is
// nothing to record or to decompose the stack goes on as it is: to unbox it all and box it again costs a tenth of a
// small call.
template <auto kernel>
void front(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  bool wanted = inside_transform();
  for (const c10::IValue& argument : torch::jit::last(*stack, op.schema().arguments().size()))
    wanted = wanted || (argument.isTensor() && needs_autograd(argument.toTensor()));
  if (wanted) {
    static const auto unboxed = c10::KernelFunction::makeFromUnboxedRuntimeFunction(kernel);
    unboxed.callBoxed(op, keys, stack);
    return;
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
}

template <auto kernel>
torch::CppFunction boxed() {
  return torch::CppFunction::makeFromBoxedFunction<&front<kernel>>();
}

// ---- autocast: weight and bias take the device's autocast type, everything else stays as it is ----

// The kernels take every floating-point input beside a 16-bit weight but the other 16-bit type: that one follows the
// weight, as a convolution's input does.
Tensor beside_weight(at::ScalarType dtype, const Tensor& input, at::DeviceType device) {
  const bool other = at::isReducedFloatingType(input.scalar_type()) && input.scalar_type() != dtype;
  return other ? at::autocast::cached_cast(dtype, input, device) : input;
}

// A mask in the type that the input had goes to float32, which every input takes and which changes none of its values.
OptionalTensor beside_input(const OptionalTensor& mask, const Tensor& before, const Tensor& now) {
  const bool other = mask && mask->scalar_type() == before.scalar_type() && before.scalar_type() != now.scalar_type();
  return other ? OptionalTensor(mask->to(at::kFloat)) : mask;
}

template <at::DeviceType device>
struct Autocast {
  static Tensor perturb_conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                               const OptionalTensor& mask, const OptionalTensor& seed, int64_t masks, bool shared_masks,
                               Text noise, double level, Text activation, at::IntArrayRef stride, int64_t groups) {
    const c10::impl::ExcludeDispatchKeyGuard guard(at::autocast::get_autocast_dispatch_key_from_device_type(device));
    const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
    const Tensor x = beside_weight(dtype, input, device);
    return call_plain(x, at::autocast::cached_cast(dtype, weight, device),
                      at::autocast::cached_cast(dtype, bias, device), beside_input(mask, input, x),
                      make_options(seed, masks, shared_masks, noise, level, activation, stride, groups));
  }

  static NormOutputs perturb_norm_conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                         const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                         const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                         const OptionalTensor& mask, const OptionalTensor& seed, bool training,
                                         double eps, int64_t masks, bool shared_masks, Text noise, double level,
                                         Text activation, at::IntArrayRef stride, int64_t groups) {
    const c10::impl::ExcludeDispatchKeyGuard guard(at::autocast::get_autocast_dispatch_key_from_device_type(device));
    const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
    const Tensor x = beside_weight(dtype, input, device);
    return call_norm(x, at::autocast::cached_cast(dtype, weight, device),
                     at::autocast::cached_cast(dtype, bias, device), beside_input(mask, input, x),
                     {norm_weight, norm_bias, running_mean, running_var, training, eps},
                     make_options(seed, masks, shared_masks, noise, level, activation, stride, groups));
  }
};

}  // namespace

Tensor call_perturbation_mask(const Tensor& seed, int64_t channels, int64_t masks, c10::SymInt height,
                              c10::SymInt width, bool shared_masks, const std::string& noise, at::ScalarType dtype) {
  static const auto op = find<MaskSignature>("torch_pnn::perturbation_mask");
  return op.call(seed, channels, masks, std::move(height), std::move(width), shared_masks, noise, dtype);
}

}  // namespace torch_pnn

TORCH_LIBRARY_IMPL(torch_pnn, Autograd, library) {
  library.impl("perturb_conv2d", torch_pnn::boxed<&torch_pnn::perturb_conv2d_autograd>());
  library.impl("_perturb_conv2d_backward", torch_pnn::boxed<&torch_pnn::perturb_conv2d_backward_autograd>());
  library.impl("perturb_norm_conv2d", torch_pnn::boxed<&torch_pnn::perturb_norm_conv2d_autograd>());
  library.impl("_perturb_norm_conv2d_backward", torch_pnn::boxed<&torch_pnn::perturb_norm_conv2d_backward_autograd>());
  // A seed is an integer: there is nothing to record.
  library.impl("perturbation_mask", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(torch_pnn, AutocastCPU, library) {
  library.impl("perturb_conv2d", torch_pnn::Autocast<at::kCPU>::perturb_conv2d);
  library.impl("perturb_norm_conv2d", torch_pnn::Autocast<at::kCPU>::perturb_norm_conv2d);
}

TORCH_LIBRARY_IMPL(torch_pnn, AutocastCUDA, library) {
  library.impl("perturb_conv2d", torch_pnn::Autocast<at::kCUDA>::perturb_conv2d);
  library.impl("perturb_norm_conv2d", torch_pnn::Autocast<at::kCUDA>::perturb_norm_conv2d);
}
