"""Cases for the operators' tests, and the layer in plain loops over NumPy float64 arrays to compare with."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torch_pnn import _library

OPS = torch.ops.torch_pnn

needs_compiled = pytest.mark.skipif(_library.status().ops != "loaded", reason="the compiled operators are not loaded")
needs_derivatives = pytest.mark.skipif(
    _library.status().autograd != "loaded", reason="the compiled derivatives are not loaded"
)

ACTIVATIONS = ("identity", "relu", "leaky_relu", "elu", "selu", "gelu", "silu", "tanh", "sigmoid", "hardtanh")
SMOOTH = ("identity", "gelu", "silu", "tanh", "sigmoid")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: sizes, options, types, layouts.

    Attributes:
        mask: "none", "seed", "shared seed", "tensor" or "shared tensor".
        norm: None, "train" or "eval".
        layout: "contiguous", "channels_last", "expanded" (zero strides), "sliced" (steps, an offset) or "transposed".
    """

    batch: int = 2
    channels: int = 3
    masks: int = 1
    height: int = 5
    width: int = 4
    outputs: int = 4
    groups: int = 1
    stride: tuple[int, int] = (1, 1)
    mask: str = "seed"
    noise: str = "uniform"
    level: float = 0.5
    activation: str = "relu"
    bias: bool = True
    dtype: torch.dtype = torch.float64
    weight_dtype: torch.dtype | None = None
    layout: str = "contiguous"
    norm: str | None = None

    @property
    def name(self) -> str:
        """The options that differ from the defaults, for pytest."""
        parts = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(f"{field.name}={str(value).removeprefix('torch.').replace(' ', '')}")
        return ",".join(parts) or "default"


CASES = [
    Case(),
    Case(bias=False, mask="none"),
    Case(masks=3, mask="seed", noise="normal"),
    Case(masks=2, mask="shared seed", noise="waves", activation="gelu"),
    Case(masks=2, mask="tensor", activation="tanh"),
    Case(masks=3, mask="shared tensor", activation="silu", channels=2),
    Case(channels=6, outputs=4, groups=2, masks=2),
    Case(channels=4, outputs=4, groups=4, mask="tensor"),
    Case(stride=(2, 3), height=7, width=7, mask="tensor"),
    Case(stride=(3, 1), channels=4, groups=2, masks=2, mask="shared seed", activation="elu"),
    Case(layout="channels_last", mask="tensor"),
    Case(layout="channels_last", stride=(2, 2), masks=2),
    Case(layout="expanded", masks=2),
    Case(layout="sliced", mask="tensor"),
    Case(layout="transposed"),
    Case(batch=0, mask="tensor"),
    Case(batch=1, height=1, width=1),
    Case(batch=1, channels=1, outputs=1, layout="channels_last", height=3),
    Case(height=0),
    Case(outputs=0),
    Case(channels=0),
    Case(batch=5, channels=17, height=13, width=9, outputs=9, masks=2),
]
NORM_CASES = [
    Case(norm="train"),
    Case(norm="eval"),
    Case(norm="train", bias=False, masks=2, mask="tensor", activation="gelu"),
    Case(norm="eval", bias=False, masks=2, mask="shared tensor", activation="tanh"),
    Case(norm="train", channels=4, groups=2, stride=(2, 1), masks=2, layout="channels_last"),
    Case(norm="eval", channels=4, groups=2, stride=(2, 2), mask="shared seed", masks=3, noise="waves"),
    Case(norm="train", mask="none", activation="sigmoid"),
    Case(norm="train", batch=0),
    Case(norm="eval", batch=0),
    Case(norm="train", layout="sliced", activation="hardtanh"),
]


def ids(cases: list[Case]) -> list[str]:
    """Names for pytest.mark.parametrize."""
    return [case.name for case in cases]


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values (but "expanded" repeats the first image) in another layout."""
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "expanded":
        return values[:1].expand_as(values) if values.shape[0] else values
    if layout == "sliced":
        batch, channels, height, width = values.shape
        wide = values.new_full((batch + 1, channels, height + 2, 2 * width + 1), 7.0)
        view = wide[1:, :, 2:, 1::2]
        view.copy_(values)
        return view
    if layout == "transposed":
        return values.transpose(2, 3).contiguous().transpose(2, 3)
    return values


def tensors(case: Case, seed: int = 0) -> dict[str, Any]:
    """The tensors of a call by the operators' argument names."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64).to(dtype)

    weight_dtype = case.weight_dtype or case.dtype
    maps = case.channels * case.masks
    result: dict[str, Any] = {
        "input": laid_out(normal(case.batch, case.channels, case.height, case.width, dtype=case.dtype), case.layout),
        "weight": normal(case.outputs, maps // case.groups, 1, 1, dtype=weight_dtype),
        "bias": normal(case.outputs, dtype=weight_dtype) if case.bias else None,
        "mask": None,
        "seed": None,
    }
    if case.mask.endswith("tensor"):
        channels = 1 if case.mask.startswith("shared") else case.channels
        result["mask"] = normal(channels, case.masks, case.height, case.width, dtype=case.dtype)
    elif case.mask.endswith("seed"):
        result["seed"] = torch.tensor([-1234567890123 + seed])
    if case.norm:
        statistics = torch.float64 if case.dtype == torch.float64 else torch.float32
        result["norm_weight"] = normal(maps, dtype=statistics) if case.bias else None
        result["norm_bias"] = normal(maps, dtype=statistics) if case.bias else None
        given = case.norm == "eval"
        result["running_mean"] = normal(maps, dtype=statistics) if given else None
        result["running_var"] = normal(maps, dtype=statistics).square() + 0.1 if given else None
    return result


def options(case: Case) -> dict[str, Any]:
    """The arguments of a call that are not tensors."""
    result: dict[str, Any] = {
        "masks": case.masks,
        "shared_masks": case.mask == "shared seed",
        "noise": case.noise,
        "level": case.level,
        "activation": case.activation,
        "stride": list(case.stride),
        "groups": case.groups,
    }
    if case.norm:
        result |= {"training": case.norm == "train", "eps": 1e-3}
    return result


def operator(case: Case) -> Any:
    """The forward operator that the case calls."""
    return OPS.perturb_norm_conv2d.default if case.norm else OPS.perturb_conv2d.default


def forward(case: Case, given: dict[str, Any]) -> Any:
    """Calls the forward operator; with normalisation the result is (output, mean, variance)."""
    return operator(case)(**given, **options(case))


def backward_arguments(case: Case, given: dict[str, Any], grad: Tensor, wanted: list[bool]) -> tuple[Any, ...]:
    """The positional arguments of the case's backward operator; mean and variance come from a forward call."""
    tail = [case.masks, case.mask == "shared seed", case.noise, case.level, case.activation, list(case.stride)]
    tail += [case.groups, wanted]
    if not case.norm:
        return (grad, given["input"], given["weight"], given["mask"], given["seed"], *tail)
    _, mean, variance = forward(case, given)
    head = [grad, given["input"], given["weight"], given["norm_weight"], given["norm_bias"], mean, variance]
    return (*head, given["mask"], given["seed"], case.norm == "train", 1e-3, *tail)


def backward_operator(case: Case) -> Any:
    """The backward operator that belongs to the case."""
    return OPS._perturb_norm_conv2d_backward.default if case.norm else OPS._perturb_conv2d_backward.default


def scalar_activation(name: str, u: float) -> float:
    """One activation of one number."""
    if name == "identity":
        return u
    if name == "relu":
        return u if u > 0 else 0.0
    if name == "leaky_relu":
        return u if u > 0 else 0.01 * u
    if name == "elu":
        return u if u > 0 else math.expm1(u)
    if name == "selu":
        scale, alpha = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
        return scale * (u if u > 0 else alpha * math.expm1(u))
    if name == "gelu":
        return 0.5 * u * (1 + math.erf(u / math.sqrt(2)))
    if name == "silu":
        return u / (1 + math.exp(-u))
    if name == "tanh":
        return math.tanh(u)
    if name == "sigmoid":
        return 1 / (1 + math.exp(-u))
    return min(max(u, -1.0), 1.0)


@dataclasses.dataclass
class Naive:
    """What the loops found.

    Attributes:
        output: [B, T, H', W'], float64.
        scale: the same size; the sum of the absolute values of each output's summands.
        mean: [K]; the moments used, where there is normalisation.
        variance: [K], biased.
    """

    output: np.ndarray
    scale: np.ndarray
    mean: np.ndarray | None = None
    variance: np.ndarray | None = None


def naive(case: Case, given: dict[str, Any]) -> Naive:
    """The layer's definition in loops: float64, but u = x + level*N as its definition rounds it in float32."""
    x = given["input"].double().numpy()
    weight = given["weight"].double().numpy()
    batch, channels, height, width = x.shape
    real = np.float64 if case.dtype == torch.float64 else np.float32
    mask = None
    if given["mask"] is not None:
        mask = given["mask"].double().numpy()
    elif given["seed"] is not None:
        written = OPS.perturbation_mask(
            given["seed"], channels, case.masks, height, width, case.mask == "shared seed", case.noise, torch.float64
        )
        mask = written.numpy()
    rows, columns = range(0, height, case.stride[0]), range(0, width, case.stride[1])
    maps = channels * case.masks
    a = np.zeros((batch, maps, len(rows), len(columns)))
    for b in range(batch):
        for c in range(channels):
            for m in range(case.masks):
                for i, row in enumerate(rows):
                    for j, column in enumerate(columns):
                        u = real(x[b, c, row, column])
                        if mask is not None:
                            n = mask[0 if mask.shape[0] == 1 else c, m, row, column]
                            u = real(u + real(real(case.level) * real(n)))
                        a[b, c * case.masks + m, i, j] = scalar_activation(case.activation, float(u))
    result = Naive(np.zeros((batch, case.outputs, len(rows), len(columns))), np.zeros(0))
    gamma = beta = None
    if case.norm:
        if case.norm == "eval":
            result.mean, result.variance = given["running_mean"].double().numpy(), given["running_var"].double().numpy()
        elif a[:, 0].size == 0:
            result.mean, result.variance = np.zeros(maps), np.ones(maps)
        else:
            result.mean, result.variance = a.mean((0, 2, 3)), a.var((0, 2, 3))
        gamma = np.ones(maps) if given["norm_weight"] is None else given["norm_weight"].double().numpy()
        beta = np.zeros(maps) if given["norm_bias"] is None else given["norm_bias"].double().numpy()
        factor = gamma / np.sqrt(result.variance + 1e-3)
        a = (a - result.mean[:, None, None]) * factor[:, None, None]
    result.scale = np.zeros_like(result.output)
    for t in range(case.outputs):
        group = t // (case.outputs // case.groups)
        for k in range(maps // case.groups):
            whole = group * (maps // case.groups) + k
            term = weight[t, k, 0, 0] * a[:, whole]
            result.output[:, t] += term
            result.scale[:, t] += abs(term)
            if beta is not None:
                result.output[:, t] += weight[t, k, 0, 0] * beta[whole]
                result.scale[:, t] += abs(weight[t, k, 0, 0] * beta[whole])
        if given["bias"] is not None:
            result.output[:, t] += given["bias"].double().numpy()[t]
            result.scale[:, t] += abs(given["bias"].double().numpy()[t])
    return result


def suggested_format(tensor: Tensor) -> torch.memory_format:
    """What PyTorch itself would lay an output out in, asked through an operator that keeps it."""
    like = torch.nn.functional.conv2d(
        tensor.detach().float() if tensor.dtype != torch.float64 else tensor.detach(),
        torch.zeros(2, tensor.shape[1], 1, 1, dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32),
    )
    return torch.channels_last if not like.is_contiguous() else torch.contiguous_format


def bits(*values: Any) -> list[bytes]:
    """The bits of tensors, in logical order, so that equality means bitwise equality."""
    return [value.detach().contiguous().view(torch.uint8).numpy().tobytes() for value in values]
