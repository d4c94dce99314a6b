"""The operators written in standard ATen operators, for graphs that should not need this library.

Values are those of `torch_pnn.reference`, whose masks, activations and derivatives these use; unlike it they end in a
convolution, so that an exporter finds one, and they ask nothing of a size, which may be symbolic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference

__all__ = ["DECOMPOSITIONS"]


def _pair(stride: Sequence[int]) -> tuple[int, int]:
    return stride[0], stride[-1]


def _perturbation_mask(
    seed: Tensor,
    channels: int,
    masks: int,
    height: Any,
    width: Any,
    shared_masks: bool = False,
    noise: str = "uniform",
    dtype: torch.dtype | None = None,
) -> Tensor:
    rows = 1 if shared_masks else channels
    dtype = torch.float32 if dtype is None else dtype
    if rows * masks == 0:
        return torch.empty((rows, masks, height, width), dtype=dtype, device=seed.device)
    values = reference.mask_values(seed, rows * masks, height, width, noise)
    return values.reshape(rows, masks, height, width).to(dtype)


def _response_maps(
    input: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    masks: int,
    shared_masks: bool,
    noise: str,
    level: float,
    activation: str,
    stride: tuple[int, int],
) -> Tensor:
    """The maps a = activation(x + level * N) at the computed pixels: [B, K, H', W'] in the type that computes."""
    compute = torch.float64 if input.dtype == torch.float64 else torch.float32
    channels, height, width = input.shape[1:]
    if seed is not None:
        mask = _perturbation_mask(seed, channels, masks, height, width, shared_masks, noise)
    x = input if stride == (1, 1) else input[:, :, :: stride[0], :: stride[1]]
    u = x.to(compute)
    count = masks if mask is None else mask.shape[1]
    if mask is not None:
        n = mask if stride == (1, 1) else mask[:, :, :: stride[0], :: stride[1]]
        n = n.to(compute) * level
        # With one mask a channel the maps are the channels: [1, C or 1, H', W'] needs no fifth dimension.
        u = u + n.transpose(0, 1) if count == 1 else u.unsqueeze(2) + n.unsqueeze(0)
    elif count != 1:
        u = u.unsqueeze(2).expand(-1, -1, count, -1, -1)
    a = reference.ACTIVATIONS[activation](u)
    return a if count == 1 else a.flatten(1, 2)


def _mixed(maps: Tensor, weight: Tensor, offset: Tensor | None, groups: int) -> Tensor:
    """The 1x1 convolution that ends the layer, in the type that computes."""
    return F.conv2d(maps, weight, None if offset is None else offset.to(maps.dtype), groups=groups)


def _perturb_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    seed: Tensor | None = None,
    masks: int = 1,
    shared_masks: bool = False,
    noise: str = "uniform",
    level: float = 1.0,
    activation: str = "relu",
    stride: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    a = _response_maps(input, mask, seed, masks, shared_masks, noise, level, activation, _pair(stride))
    a = reference.rounded(a, weight.dtype)
    return _mixed(a, weight.to(a.dtype), bias, groups).to(weight.dtype)


def _perturb_norm_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mask: Tensor | None = None,
    seed: Tensor | None = None,
    training: bool = True,
    eps: float = 1e-5,
    masks: int = 1,
    shared_masks: bool = False,
    noise: str = "uniform",
    level: float = 1.0,
    activation: str = "relu",
    stride: Sequence[int] = (1, 1),
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    a = _response_maps(input, mask, seed, masks, shared_masks, noise, level, activation, _pair(stride))
    wide = reference.wide_dtype(a)
    if training:
        wide_mean = a.to(wide).mean((0, 2, 3))
        wide_variance = (a.to(wide) - wide_mean.view(-1, 1, 1)).square().mean((0, 2, 3))
        mean, variance = wide_mean.to(a.dtype), wide_variance.to(a.dtype)
    else:
        if running_mean is None or running_var is None:
            raise RuntimeError("running_mean or running_var is None, both should be given when training is False")
        mean, variance = running_mean.clone(), running_var.clone()
        wide_variance = variance.to(wide)
    centred = reference.rounded(a - mean.view(-1, 1, 1), weight.dtype)
    scale = (wide_variance + eps).rsqrt()
    if norm_weight is not None:
        scale = scale * norm_weight.to(wide)
    # The weight as [groups, T/groups, K/groups], beside vectors over the maps as [groups, 1, K/groups].
    outputs, columns = weight.shape[0], weight.shape[1]
    v = weight.to(wide).reshape(groups, outputs // groups, columns)
    scaled = (v * scale.reshape(groups, 1, columns)).reshape(outputs, columns)
    offset = None if bias is None else bias.to(wide)
    if norm_bias is not None:
        shift = (v * norm_bias.to(wide).reshape(groups, 1, columns)).sum(2).reshape(outputs)
        offset = shift if offset is None else offset + shift
    operand = reference.scaled_weight(scaled, a.dtype, weight.dtype).reshape(outputs, columns, 1, 1)
    return _mixed(centred, operand, offset, groups).to(weight.dtype), mean, variance


DECOMPOSITIONS: dict[str, Callable[..., Any]] = {
    "perturb_conv2d": _perturb_conv2d,
    "_perturb_conv2d_backward": reference.OPERATORS["_perturb_conv2d_backward"],
    "perturb_norm_conv2d": _perturb_norm_conv2d,
    "_perturb_norm_conv2d_backward": reference.OPERATORS["_perturb_norm_conv2d_backward"],
    "perturbation_mask": _perturbation_mask,
}
"""Each operator in standard ATen operators, with the operator's own signature, by its name."""
