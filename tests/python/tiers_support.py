"""What the exact and the bounded tier share: float64 (or wider) results of the same rounded operands, and bounds."""

from __future__ import annotations

import dataclasses

import torch

from torch_pnn import reference

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Unit roundoff: half the distance from 1 to the next number."""

TYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]
"""Types of input and weight."""

RATIOS: dict[tuple[str, str], list[float]] = {}
"""The worst |error| / bound, their sum and their number, by what was compared and the type; conftest.py prints them."""


@dataclasses.dataclass
class Case:
    """One call: the tensors in the types of the call, and its options."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    grad: torch.Tensor
    mask: torch.Tensor
    level: float = 1.0
    activation: str = "relu"
    stride: tuple[int, int] = (1, 1)
    groups: int = 1
    seed: torch.Tensor | None = None
    noise: str = "uniform"
    norm: tuple[torch.Tensor, ...] | None = None  # gamma, beta, mean, variance
    eps: float = 0.0

    @property
    def masks(self) -> int:
        return self.mask.shape[1]

    @property
    def options(self) -> tuple:
        shared = self.mask.shape[0] == 1 and self.x.shape[1] != 1
        return self.masks, shared, self.noise, self.level, self.activation, list(self.stride), self.groups

    @property
    def source(self) -> tuple:
        return (self.mask, None) if self.seed is None else (None, self.seed)

    def forward(self):
        ops = torch.ops.torch_pnn
        if self.norm is None:
            return ops.perturb_conv2d(self.x, self.weight, self.bias, *self.source, *self.options)
        gamma, beta, mean, variance = self.norm
        return ops.perturb_norm_conv2d(
            self.x, self.weight, self.bias, gamma, beta, mean, variance, *self.source, False, self.eps, *self.options
        )[0]

    def backward(self):
        ops = torch.ops.torch_pnn
        wants_mask = self.seed is None
        if self.norm is None:
            return ops._perturb_conv2d_backward(
                self.grad, self.x, self.weight, *self.source, *self.options, [True, True, True, wants_mask]
            )
        gamma, beta, mean, variance = self.norm
        asked = [True] * 5 + [wants_mask]
        return ops._perturb_norm_conv2d_backward(
            self.grad,
            self.x,
            self.weight,
            gamma,
            beta,
            mean,
            variance,
            *self.source,
            False,
            self.eps,
            *self.options,
            asked,
        )


@dataclasses.dataclass
class Expected:
    """Results in float64 of the operands that the operator multiplies, and the sums of the terms' magnitudes."""

    y: torch.Tensor
    y_terms: torch.Tensor
    grad_input: torch.Tensor
    grad_input_terms: torch.Tensor
    grad_weight: torch.Tensor
    grad_weight_terms: torch.Tensor
    grad_bias: torch.Tensor
    grad_bias_terms: torch.Tensor
    grad_mask: torch.Tensor
    grad_mask_terms: torch.Tensor
    grad_gamma: torch.Tensor | None = None
    grad_beta: torch.Tensor | None = None


def rounded_once(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 values rounded to a 16-bit type in one step, which PyTorch's own conversion takes by way of float32."""
    near = exact.to(dtype)
    neighbours = [near]
    for direction in (-1, 1):
        bits = near.view(torch.int16)
        away = torch.where(near.double() == 0, 0, bits + direction).to(torch.int16)
        neighbours.append(away.view(dtype))
    candidates = torch.stack([candidate.double() for candidate in neighbours])
    distance = (candidates - exact).abs().nan_to_num(torch.inf, torch.inf)
    # Of two equally near ones the even one; the first candidate only loses to a nearer or an even one.
    odd = torch.stack([(candidate.view(torch.int16) & 1).double() for candidate in neighbours])
    best = (distance * 2 + odd * distance * 1e-12).argmin(0, keepdim=True)
    return torch.where(near.double() == 0, near.double(), candidates.gather(0, best)[0])


def expected(case: Case) -> Expected:
    """What a call gives but for its accumulation: operands rounded as the operator does, the rest in float64."""
    compute = torch.float64 if case.x.dtype == torch.float64 else torch.float32
    sixteen = case.weight.dtype in (torch.bfloat16, torch.float16)
    batch, channels = case.x.shape[:2]
    outputs, columns = case.weight.shape[:2]
    groups, masks = case.groups, case.masks
    rows, cols = slice(None, None, case.stride[0]), slice(None, None, case.stride[1])
    x = case.x.to(compute)[:, :, rows, cols].unsqueeze(2)
    n = case.mask.to(compute)[:, :, rows, cols]
    u = x + n * torch.tensor(case.level, dtype=compute)
    a = reference.ACTIVATIONS[case.activation](u)
    pixels = u.shape[-2:]
    scale = torch.ones(channels * masks, dtype=torch.float64)
    shift = torch.zeros(channels * masks, dtype=torch.float64)
    if case.norm is not None:
        gamma, beta, mean, variance = case.norm
        a = a - mean.to(compute).view(channels, masks, 1, 1)
        inverse = (variance.double() + case.eps).rsqrt()
        scale, shift = gamma.double() * inverse, beta.double()
    if sixteen:
        a = a.to(case.weight.dtype)
    a = a.double().reshape(batch, groups, columns, *pixels)
    v = case.weight.double().reshape(groups, outputs // groups, columns)
    alpha = scale.reshape(groups, 1, columns)
    scaled = v * alpha
    if case.norm is not None:
        scaled = rounded_once(scaled, case.weight.dtype) if sixteen else scaled.to(compute).double()
    g = case.grad.double().reshape(batch, groups, outputs // groups, *pixels)

    def size(tensor):
        return tensor.reshape(batch, outputs, *pixels)

    offset, offset_terms = case.bias.double(), case.bias.double().abs()
    if case.norm is not None:
        shifted = v * shift.reshape(groups, 1, columns)
        offset = offset + shifted.sum(-1).reshape(-1)
        offset_terms = offset_terms + shifted.abs().sum(-1).reshape(-1)
    y = size(torch.einsum("gtk,bgkij->bgtij", scaled, a)) + offset.view(-1, 1, 1)
    y_terms = size(torch.einsum("gtk,bgkij->bgtij", scaled.abs(), a.abs())) + offset_terms.view(-1, 1, 1)

    def to_maps(weights, gradient):
        return torch.einsum("gtk,bgtij->bgkij", weights, gradient).reshape(u.shape)

    derivative = reference._ACTIVATION_GRADIENTS[case.activation]
    du = derivative(to_maps(scaled, g), u.double())
    slope = derivative(torch.ones_like(u).double(), u.double()).abs()
    if case.activation in ("gelu", "silu"):
        slope = slope.clamp(min=1 / 16)  # These derivatives have a zero, where no relative error can be promised.
    du_terms = slope * to_maps(scaled.abs(), g.abs())

    def to_image(gradient):
        full = torch.zeros(case.x.shape, dtype=torch.float64)
        full[:, :, rows, cols] = gradient.sum(2)
        return full

    def to_mask(gradient):
        full = torch.zeros(case.mask.shape, dtype=torch.float64)
        over = (0, 1) if case.mask.shape[0] == 1 else (0,)
        full[:, :, rows, cols] = gradient.sum(over).reshape(full[:, :, rows, cols].shape) * abs(case.level)
        return full if case.level >= 0 else -full

    correlation = torch.einsum("bgtij,bgkij->gtk", g, a)
    correlation_terms = torch.einsum("bgtij,bgkij->gtk", g.abs(), a.abs())
    sums = g.sum((0, 3, 4)).unsqueeze(2)
    sums_terms = g.abs().sum((0, 3, 4)).unsqueeze(2)
    grad_weight, grad_weight_terms = alpha * correlation, alpha.abs() * correlation_terms
    if case.norm is not None:
        beta_rows = shift.reshape(groups, 1, columns)
        grad_weight = grad_weight + sums * beta_rows
        grad_weight_terms = grad_weight_terms + sums_terms * beta_rows.abs()
    weight_shape = case.weight.shape
    result = Expected(
        y,
        y_terms,
        to_image(du),
        to_image(du_terms),
        grad_weight.reshape(weight_shape),
        grad_weight_terms.reshape(weight_shape),
        sums.reshape(-1),
        sums_terms.reshape(-1),
        to_mask(du),
        to_mask(du_terms).abs(),
    )
    if case.norm is not None:
        result.grad_gamma = inverse * (v * correlation).sum(1).reshape(-1)
        result.grad_beta = (v * sums).sum(1).reshape(-1)
    return result


def check_bounded(name, found, exact, terms, summands, compute, flushed=0.0):
    """|error| <= gamma_n * sum|terms| + u * |result| + a few steps of the least number; notes the ratios.

    `flushed` is what operands that count as zero may amount to: bfloat16 dot products have no denormal numbers.
    """
    unit = UNIT[compute]
    assert summands * unit < 0.1
    gamma = summands * unit / (1 - summands * unit)
    least = torch.finfo(found.dtype).smallest_normal * torch.finfo(found.dtype).eps
    slack = 4 * max(least, 0.0) + 4 * summands * torch.finfo(compute).smallest_normal * torch.finfo(compute).eps
    bound = gamma * terms + UNIT[found.dtype] * (1 + gamma) * exact.abs() + slack + flushed
    error = (found.double() - exact).abs()
    finite = exact.abs() <= torch.finfo(found.dtype).max
    assert torch.equal(found.double().isnan(), exact.isnan()), name
    ratio = (error / bound)[finite & exact.isfinite()]
    if ratio.numel():
        seen = RATIOS.setdefault((name, str(found.dtype).removeprefix("torch.")), [0.0, 0.0, 0])
        seen[:] = [max(seen[0], ratio.max().item()), seen[1] + ratio.sum().item(), seen[2] + ratio.numel()]
        assert ratio.max() <= 1, f"{name}: error is {ratio.max():.3g} times its bound"
    return error
