// autograd_decomposed.cpp - the layer and its gradients in differentiable ATen operators; autograd_layer.h says when.
//
// The backward functions are closed forms, not recordings of the forward ones, so that they work inside any transform;
// in training they compute the moments anew, because a derivative of theirs must see that mean and variance depend on
// the input.
#include "autograd_layer.h"

namespace torch_pnn::decomposed {
namespace {

using c10::SymInt;

// Shapes are changed by reshape alone: flatten has no rule in the older of PyTorch's two vmaps, which
// torch.autograd.grad(is_grads_batched=True) still uses.

// Nothing in here is autocast's business: the operator's own autocast has cast what is to be cast.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

constexpr double kLeakySlope = 0.01;
constexpr double kSeluAlpha = 1.6732632423543772848170429916717;
constexpr double kSeluScale = 1.0507009873554804934193349852946;
constexpr double kNormalDensityAtZero = 0.39894228040143267793994605993438;  // 1/sqrt(2 pi)

Tensor nothing(const Tensor&, const Tensor&) { return {}; }

struct Activation {
  const char* name;
  Tensor (*forward)(const Tensor& u);
  Tensor (*backward)(const Tensor& grad, const Tensor& u);  // grad * activation'(u), itself differentiable
  Tensor (*curve)(const Tensor& grad, const Tensor& u);     // grad * activation''(u), likewise; undefined where 0
};

const Activation kActivations[] = {
    {"identity", [](const Tensor& u) { return u; }, [](const Tensor& grad, const Tensor&) { return grad; }, nothing},
    {"relu", [](const Tensor& u) { return at::relu(u); },
     [](const Tensor& grad, const Tensor& u) { return at::threshold_backward(grad, u, 0); }, nothing},
    {"leaky_relu", [](const Tensor& u) { return at::leaky_relu(u, kLeakySlope); },
     [](const Tensor& grad, const Tensor& u) { return at::leaky_relu_backward(grad, u, kLeakySlope, false); }, nothing},
    {"elu", [](const Tensor& u) { return at::elu(u); },
     [](const Tensor& grad, const Tensor& u) { return at::elu_backward(grad, 1, 1, 1, false, u); },
     [](const Tensor& grad, const Tensor& u) { return at::elu_backward(grad, 1, 1, 1, false, u) * (u < 0); }},
    {"selu", [](const Tensor& u) { return at::selu(u); },
     [](const Tensor& grad, const Tensor& u) { return at::elu_backward(grad, kSeluAlpha, kSeluScale, 1, false, u); },
     [](const Tensor& grad, const Tensor& u) {
       return at::elu_backward(grad, kSeluAlpha, kSeluScale, 1, false, u) * (u < 0);
     }},
    {"gelu", [](const Tensor& u) { return at::gelu(u); },
     [](const Tensor& grad, const Tensor& u) { return at::gelu_backward(grad, u); },
     [](const Tensor& grad, const Tensor& u) {
       const Tensor square = u * u;
       return grad * (2 - square) * at::exp(square * -0.5) * kNormalDensityAtZero;
     }},
    // silu_backward has no derivative of its own.
    {"silu", [](const Tensor& u) { return at::silu(u); },
     [](const Tensor& grad, const Tensor& u) {
       const Tensor s = at::sigmoid(u);
       return grad * s * (1 + u * (1 - s));
     },
     [](const Tensor& grad, const Tensor& u) {
       const Tensor s = at::sigmoid(u);
       return grad * s * (1 - s) * (2 + u * (1 - 2 * s));
     }},
    {"tanh", [](const Tensor& u) { return at::tanh(u); },
     [](const Tensor& grad, const Tensor& u) { return at::tanh_backward(grad, at::tanh(u)); },
     [](const Tensor& grad, const Tensor& u) {
       const Tensor t = at::tanh(u);
       return grad * -2 * t * (1 - t * t);
     }},
    {"sigmoid", [](const Tensor& u) { return at::sigmoid(u); },
     [](const Tensor& grad, const Tensor& u) { return at::sigmoid_backward(grad, at::sigmoid(u)); },
     [](const Tensor& grad, const Tensor& u) {
       const Tensor s = at::sigmoid(u);
       return grad * s * (1 - s) * (1 - 2 * s);
     }},
    {"hardtanh", [](const Tensor& u) { return at::hardtanh(u); },
     [](const Tensor& grad, const Tensor& u) { return at::hardtanh_backward(grad, u, -1, 1); }, nothing},
};

const Activation& find_activation(const std::string& name) {
  for (const Activation& activation : kActivations)
    if (name == activation.name) return activation;
  TORCH_CHECK(false, "torch_pnn: activation is '", name,
              "', it should be one of identity, relu, leaky_relu, elu, selu, gelu, silu, tanh, sigmoid, hardtanh");
}

bool is_narrow(at::ScalarType dtype) { return dtype == at::kBFloat16 || dtype == at::kHalf; }

at::ScalarType compute_dtype(const Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The type of the per-channel algebra: float64 where the device has it.
at::ScalarType wide_dtype(const Tensor& tensor) { return tensor.is_mps() ? at::kFloat : at::kDouble; }

// What broadcasting would hide or ATen would refuse with a sentence about something else.
void check(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& mask,
           const Options& options) {
  TORCH_CHECK(input.dim() == 4, "torch_pnn: input has size ", input.sym_sizes(), ", it should have 4 dimensions");
  TORCH_CHECK(weight.dim() == 4, "torch_pnn: weight has size ", weight.sym_sizes(), ", it should have 4 dimensions");
  const at::ScalarType x = input.scalar_type(), v = weight.scalar_type();
  TORCH_CHECK(x == at::kFloat || x == at::kDouble || is_narrow(x), "torch_pnn: input has type ", x,
              ", it should be float32, float64, bfloat16 or float16");
  TORCH_CHECK(v == x || (x == at::kFloat && is_narrow(v)), "torch_pnn: weight has type ", v,
              ", it should be the input's ", x);
  TORCH_CHECK(!(mask && options.seed), "torch_pnn: mask and seed are both given, it should be one of them");
  TORCH_CHECK(options.stride[0] >= 1 && options.stride[1] >= 1, "torch_pnn: stride is [", options.stride[0], ", ",
              options.stride[1], "], it should be at least 1");
  SymInt masks = options.masks;
  if (mask) {
    const auto size = mask->sym_sizes();
    TORCH_CHECK(size.size() == 4 && (size[0] == 1 || size[0] == input.sym_size(1)) && size[2] == input.sym_size(2) &&
                    size[3] == input.sym_size(3),
                "torch_pnn: mask has size ", size, ", it should be [channels or 1, masks, height, width] of input's ",
                input.sym_sizes());
    TORCH_CHECK(mask->scalar_type() == at::kFloat || mask->scalar_type() == x, "torch_pnn: mask has type ",
                mask->scalar_type(), ", it should be float32 or the input's ", x);
    masks = size[1];
  }
  TORCH_CHECK(masks >= 1, "torch_pnn: masks is ", masks, ", it should be at least 1");
  TORCH_CHECK(
      options.groups >= 1 && input.sym_size(1) % options.groups == 0 && weight.sym_size(0) % options.groups == 0,
      "torch_pnn: groups is ", options.groups, ", it should divide the input's ", input.sym_size(1),
      " channels and the weight's ", weight.sym_size(0), " outputs");
  const SymInt columns = input.sym_size(1) / options.groups * masks;
  TORCH_CHECK(weight.sym_size(1) == columns && weight.sym_size(2) == 1 && weight.sym_size(3) == 1,
              "torch_pnn: weight has size ", weight.sym_sizes(), ", it should be [outputs, ", columns, ", 1, 1]");
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0) && bias->scalar_type() == v),
              "torch_pnn: bias should be one value of the weight's type for each of its ", weight.sym_size(0),
              " outputs");
}

Tensor kept_pixels(const Tensor& tensor, const Options& options) {
  Tensor result = tensor;
  for (size_t d = 0; d < 2; d++)
    if (options.stride[d] != 1)
      result = result.slice(result.dim() - 2 + static_cast<int64_t>(d), std::nullopt, std::nullopt, options.stride[d]);
  return result;
}

// The reverse: a gradient at the kept pixels of the last two dimensions, zeros at the others.
Tensor all_pixels(const Tensor& grad, c10::SymIntArrayRef size, const Options& options) {
  Tensor result = grad;
  for (size_t d = 0; d < 2; d++) {
    if (options.stride[d] == 1) continue;
    const int64_t dim = result.dim() - 2 + static_cast<int64_t>(d);
    std::vector<SymInt> full = result.sym_sizes().vec();
    full[dim] = size[size.size() - 2 + d];
    result = at::slice_backward_symint(result, full, dim, 0, full[dim], options.stride[d]);
  }
  return result;
}

// u = x + level N at the kept pixels: [B, C, M, H', W'] in the type that computes.
Tensor perturbed(const Tensor& input, const OptionalTensor& mask, const Options& options) {
  const at::ScalarType compute = compute_dtype(input);
  const Tensor x = kept_pixels(input, options).to(compute).unsqueeze(2);
  Tensor n;
  if (mask)
    n = mask->to(compute);
  else if (options.seed)
    n = call_perturbation_mask(*options.seed, input.size(1), options.masks, input.sym_size(2), input.sym_size(3),
                               options.shared_masks, options.noise, compute);
  if (!n.defined()) return x.expand({-1, -1, options.masks, -1, -1});
  return x + kept_pixels(n, options) * options.level;
}

Tensor rounded(const Tensor& operand, at::ScalarType dtype) {
  return is_narrow(dtype) ? operand.to(dtype).to(operand.scalar_type()) : operand;
}

// V as [groups, T/groups, K/groups].
Tensor grouped_weight(const Tensor& weight, int64_t groups, at::ScalarType dtype) {
  return weight.to(dtype).reshape_symint({groups, weight.sym_size(0) / groups, weight.sym_size(1)});
}

// [B, R, H', W'] as [B, groups, R/groups, H'*W'].
Tensor grouped(const Tensor& rows, int64_t groups) {
  return rows.reshape_symint(
      {rows.sym_size(0), groups, rows.sym_size(1) / groups, rows.sym_size(2) * rows.sym_size(3)});
}

// The matrix product of each group: left [groups, R, K/groups], right [B, K, H', W'] -> [B, groups*R, H', W'].
Tensor product(const Tensor& left, const Tensor& right, int64_t groups) {
  return at::matmul(left, grouped(right, groups))
      .reshape_symint({right.sym_size(0), left.sym_size(1) * groups, right.sym_size(2), right.sym_size(3)});
}

// Sums over batch and pixels of g a: [B, T, H', W'], [B, K, H', W'] -> [groups, T/groups, K/groups].
Tensor correlation(const Tensor& grad, const Tensor& maps, int64_t groups) {
  const auto rows = [groups](const Tensor& t) {
    return t.transpose(0, 1).reshape_symint(
        {groups, t.sym_size(1) / groups, t.sym_size(0) * t.sym_size(2) * t.sym_size(3)});
  };
  return at::matmul(rows(grad), rows(maps).transpose(1, 2));
}

// [B, C, M, H', W'] as [B, K, H', W'].
Tensor as_maps(const Tensor& u) {
  return u.reshape_symint({u.sym_size(0), u.sym_size(1) * u.sym_size(2), u.sym_size(3), u.sym_size(4)});
}

// A value per map, shaped to be used with [B, K, H', W'].
Tensor per_map(const Tensor& vector) { return vector.unsqueeze(-1).unsqueeze(-1); }

// A value per map as [groups, 1, K/groups], to be used with V.
Tensor per_column(const Tensor& vector, int64_t groups) {
  return vector.reshape_symint({groups, 1, vector.sym_size(0) / groups});
}

Tensor no_gradient(const Tensor& like) { return at::empty({0}, like.options()); }

Tensor input_gradient(const Tensor& grad_u, const Tensor& input, const Options& options) {
  return all_pixels(grad_u.sum(2), input.sym_sizes(), options).to(input.scalar_type());
}

Tensor mask_gradient(const Tensor& grad_u, const Tensor& mask, const Options& options) {
  const Tensor sum = mask.sym_size(0) == 1 ? grad_u.sum(at::IntArrayRef{0, 1}).unsqueeze(0) : grad_u.sum(0);
  return all_pixels(sum * options.level, mask.sym_sizes(), options).to(mask.scalar_type());
}

void check_wanted_mask(bool wanted, const OptionalTensor& mask) {
  TORCH_CHECK(!wanted || mask,
              "torch_pnn: output_mask asks for the gradient of mask, which is None, it should be False");
}

struct Moments {
  Tensor mean, variance;  // [K], in the type of the per-channel algebra
};

SymInt pixel_count(const Tensor& maps) { return maps.sym_size(0) * maps.sym_size(2) * maps.sym_size(3); }

Moments moments_of(const Tensor& maps) {
  const Tensor wide = maps.to(wide_dtype(maps));
  if (pixel_count(maps) == 0) {
    return {at::zeros_symint({maps.sym_size(1)}, wide.options()), at::ones_symint({maps.sym_size(1)}, wide.options())};
  }
  const Tensor mean = wide.mean({0, 2, 3});
  return {mean, (wide - per_map(mean)).square().mean({0, 2, 3})};
}

// The moments that the pass normalises with: this batch's in training, else the given ones.
Moments moments_for(const Tensor& maps, const Norm& norm) {
  if (norm.training) return moments_of(maps);
  TORCH_CHECK(norm.mean && norm.variance,
              "torch_pnn: running_mean and running_var should be given when training is False");
  return {norm.mean->to(wide_dtype(maps)), norm.variance->to(wide_dtype(maps))};
}

}  // namespace

Tensor perturb_conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& mask,
                      const Options& options) {
  const NoAutocast no_autocast;
  check(input, weight, bias, mask, options);
  const Tensor u = perturbed(input, mask, options);
  const Tensor maps = rounded(as_maps(find_activation(options.activation).forward(u)), weight.scalar_type());
  Tensor y = product(grouped_weight(weight, options.groups, u.scalar_type()), maps, options.groups);
  if (bias) y = y + per_map(bias->to(u.scalar_type()));
  return y.to(weight.scalar_type());
}

PlainGradients perturb_conv2d_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                       const OptionalTensor& mask, const Options& options,
                                       const std::array<bool, 4>& wanted) {
  const NoAutocast no_autocast;
  check(input, weight, std::nullopt, mask, options);
  check_wanted_mask(wanted[3], mask);
  const Activation& activation = find_activation(options.activation);
  const Tensor u = perturbed(input, mask, options);
  const Tensor grad = grad_output.to(u.scalar_type());
  Tensor grad_input = no_gradient(input), grad_weight = no_gradient(weight), grad_bias = no_gradient(weight);
  Tensor grad_mask = no_gradient(mask ? *mask : input);
  if (wanted[0] || wanted[3]) {
    const Tensor v = grouped_weight(weight, options.groups, u.scalar_type());
    const Tensor grad_a = product(v.transpose(1, 2), grad, options.groups).reshape_symint(u.sym_sizes());
    const Tensor grad_u = activation.backward(grad_a, u);
    if (wanted[0]) grad_input = input_gradient(grad_u, input, options);
    if (wanted[3]) grad_mask = mask_gradient(grad_u, *mask, options);
  }
  if (wanted[1]) {
    const Tensor maps = rounded(as_maps(activation.forward(u)), weight.scalar_type());
    grad_weight = correlation(grad, maps, options.groups).reshape_symint(weight.sym_sizes()).to(weight.scalar_type());
  }
  if (wanted[2]) grad_bias = grad.sum({0, 2, 3}).to(weight.scalar_type());
  return {grad_input, grad_weight, grad_bias, grad_mask};
}

// With grad_grads as a direction in which input, weight, bias and mask move, <grad_grads, gradients> is
// <grad_output, the output's movement>, so the gradient for grad_output is that movement
//     V (phi'(u) u_dot) + V_dot phi(u) + bias_dot,  u_dot = input_dot + level mask_dot,
// and the others are the gradients of that inner product.
std::vector<Tensor> perturb_conv2d_double_backward(const std::array<Tensor, 4>& grad_grads, const Tensor& grad_output,
                                                   const Tensor& input, const Tensor& weight,
                                                   const OptionalTensor& mask, const Options& options,
                                                   const std::array<bool, 4>& wanted) {
  const NoAutocast no_autocast;
  const Activation& activation = find_activation(options.activation);
  const int64_t groups = options.groups;
  const Tensor u = perturbed(input, mask, options);
  const at::ScalarType compute = u.scalar_type();
  const Tensor grad = grad_output.to(compute), v = grouped_weight(weight, groups, compute);
  const auto& [input_dot, weight_dot, bias_dot, mask_dot] = grad_grads;
  const auto add = [](Tensor& sum, const Tensor& term) {
    if (term.defined()) sum = sum.defined() ? sum + term : term;
  };

  Tensor u_dot, v_dot, slope;
  if (input_dot.defined()) u_dot = kept_pixels(input_dot, options).to(compute).unsqueeze(2);
  if (mask_dot.defined()) add(u_dot, kept_pixels(mask_dot.to(compute), options) * options.level);
  if (u_dot.defined()) {
    u_dot = u_dot.expand_symint(u.sym_sizes());
    slope = as_maps(activation.backward(u_dot, u));
  }
  if (weight_dot.defined()) v_dot = grouped_weight(weight_dot, groups, compute);

  std::vector<Tensor> result(4);
  if (wanted[0]) {
    Tensor& movement = result[0];
    if (u_dot.defined()) movement = product(v, slope, groups);
    if (v_dot.defined())
      add(movement, product(v_dot, rounded(as_maps(activation.forward(u)), weight.scalar_type()), groups));
    if (bias_dot.defined()) add(movement, per_map(bias_dot.to(compute)).expand_symint(grad_output.sym_sizes()));
    if (movement.defined()) movement = movement.to(grad_output.scalar_type());
  }
  if (wanted[1] || wanted[3]) {
    const auto pulled_back = [&](const Tensor& left) {
      return product(left.transpose(1, 2), grad, groups).reshape_symint(u.sym_sizes());
    };
    Tensor grad_u;
    if (u_dot.defined()) add(grad_u, activation.curve(pulled_back(v) * u_dot, u));
    if (v_dot.defined()) add(grad_u, activation.backward(pulled_back(v_dot), u));
    if (grad_u.defined() && wanted[1]) result[1] = input_gradient(grad_u, input, options);
    if (grad_u.defined() && wanted[3]) result[3] = mask_gradient(grad_u, *mask, options);
  }
  if (wanted[2] && u_dot.defined())
    result[2] = correlation(grad, slope, groups).reshape_symint(weight.sym_sizes()).to(weight.scalar_type());
  return result;
}

NormOutputs perturb_norm_conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                const OptionalTensor& mask, const Norm& norm, const Options& options) {
  const NoAutocast no_autocast;
  check(input, weight, bias, mask, options);
  const Tensor maps = as_maps(find_activation(options.activation).forward(perturbed(input, mask, options)));
  TORCH_CHECK(
      !norm.training || pixel_count(maps) != 1,
      "torch_pnn: input has one value per channel to normalise over, it should have none or more when training");
  const at::ScalarType compute = maps.scalar_type();
  const Moments moments = moments_for(maps, norm);
  const Tensor centred = rounded(maps - per_map(moments.mean.to(compute)), weight.scalar_type());
  Tensor scale = (moments.variance + norm.eps).rsqrt();
  if (norm.weight) scale = scale * norm.weight->to(scale.scalar_type());
  const Tensor v = grouped_weight(weight, options.groups, scale.scalar_type());
  const Tensor scaled = (v * per_column(scale, options.groups)).to(compute);
  Tensor y = product(rounded(scaled, weight.scalar_type()), centred, options.groups);
  if (bias || norm.bias) {
    Tensor offset = at::zeros_symint({weight.sym_size(0)}, scale.options());
    if (bias) offset = offset + bias->to(scale.scalar_type());
    if (norm.bias)
      offset = offset + (v * per_column(norm.bias->to(scale.scalar_type()), options.groups)).sum(2).reshape({-1});
    y = y + per_map(offset.to(compute));
  }
  // Mean and variance carry no gradients, as with torch.nn.functional.batch_norm.
  return {y.to(weight.scalar_type()), moments.mean.to(compute).detach(), moments.variance.to(compute).detach()};
}

NormGradients perturb_norm_conv2d_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                           const OptionalTensor& mask, const Norm& norm, const Options& options,
                                           const std::array<bool, 6>& wanted) {
  const NoAutocast no_autocast;
  check(input, weight, std::nullopt, mask, options);
  check_wanted_mask(wanted[5], mask);
  const int64_t groups = options.groups;
  const Activation& activation = find_activation(options.activation);
  const Tensor u = perturbed(input, mask, options);
  const Tensor maps = as_maps(activation.forward(u));
  const at::ScalarType compute = maps.scalar_type();
  const Moments moments = moments_for(maps, norm);
  const Tensor inverse = (moments.variance + norm.eps).rsqrt();
  const at::ScalarType wide = inverse.scalar_type();
  const Tensor scale = norm.weight ? inverse * norm.weight->to(wide) : inverse;
  const Tensor v = grouped_weight(weight, groups, wide);
  const Tensor centred = maps - per_map(moments.mean.to(compute));
  const Tensor grad = grad_output.to(compute);
  const Tensor grad_sum = grad.to(wide).sum({0, 2, 3});
  const Tensor rows = grad_sum.reshape_symint({groups, weight.sym_size(0) / groups, 1});
  const Tensor g = correlation(grad, rounded(centred, weight.scalar_type()), groups).to(wide);
  const Tensor s1 = (v * rows).sum(1).reshape({-1}), s2 = (v * g).sum(1).reshape({-1});

  Tensor grad_input = no_gradient(input), grad_weight = no_gradient(weight), grad_bias = no_gradient(weight);
  Tensor grad_norm_weight = at::empty({0}, maps.options()), grad_norm_bias = at::empty({0}, maps.options());
  Tensor grad_mask = no_gradient(mask ? *mask : input);
  if (wanted[0] || wanted[5]) {
    Tensor grad_a = per_map(scale.to(compute)) * product(v.to(compute).transpose(1, 2), grad, groups);
    const SymInt pixels = pixel_count(maps);
    if (norm.training && pixels != 0) {
      const at::Scalar count(pixels);
      const Tensor constant = (scale * s1).div(count), slope = (scale * inverse.square() * s2).div(count);
      grad_a = grad_a - per_map(constant.to(compute)) - per_map(slope.to(compute)) * centred;
    }
    const Tensor grad_u = activation.backward(grad_a.reshape_symint(u.sym_sizes()), u);
    if (wanted[0]) grad_input = input_gradient(grad_u, input, options);
    if (wanted[5]) grad_mask = mask_gradient(grad_u, *mask, options);
  }
  if (wanted[1]) {
    Tensor grad_v = per_column(scale, groups) * g;
    if (norm.bias) grad_v = grad_v + rows * per_column(norm.bias->to(wide), groups);
    grad_weight = grad_v.reshape_symint(weight.sym_sizes()).to(weight.scalar_type());
  }
  if (wanted[2]) grad_bias = grad_sum.to(weight.scalar_type());
  if (wanted[3]) grad_norm_weight = (inverse * s2).to(compute);
  if (wanted[4]) grad_norm_bias = s1.to(compute);
  return {grad_input, grad_weight, grad_bias, grad_norm_weight, grad_norm_bias, grad_mask};
}

}  // namespace torch_pnn::decomposed
