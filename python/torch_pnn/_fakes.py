"""Shape functions of the operators: what sizes, strides and types a call gives, without computing anything.

torch.compile and torch.export trace with them, and tensors on the meta device run on them. Sizes may be symbolic.
Wrong calls are refused here as well, so that a model fails where it is traced and not where it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["FAKES", "register", "suggest_memory_format"]

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def suggest_memory_format(tensor: Tensor) -> torch.memory_format:
    """channels_last where the strides of a 4-d tensor are ordered so, else contiguous, as convolutions choose.

    Shapes that are both (one channel, or one pixel) count as contiguous unless their strides say otherwise.

    Example:
        >>> suggest_memory_format(torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last))
        torch.channels_last
        >>> suggest_memory_format(torch.empty(2, 3, 1, 1))
        torch.contiguous_format
    """
    sizes, strides = tensor.shape, tensor.stride()
    if strides[1] == 0:
        return torch.contiguous_format
    step = 0
    for d in (1, 3, 2, 0):
        if sizes[d] == 0 or strides[d] < step or (d == 0 and step == strides[1]):
            return torch.contiguous_format
        step = strides[d] * sizes[d]
    return torch.channels_last


def _empty(like: Tensor, size: Sequence[Any], dtype: torch.dtype, format_of: Tensor | None = None) -> Tensor:
    memory_format = torch.contiguous_format if format_of is None else suggest_memory_format(format_of)
    return torch.empty(size, dtype=dtype, device=like.device, memory_format=memory_format)


def _statistics_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _output_size(input: Tensor, weight: Tensor, stride: Sequence[int]) -> list[Any]:
    pair = list(stride) if len(stride) == 2 else [stride[0], stride[0]]
    torch._check(min(pair) >= 1, lambda: f"stride is {pair}, it should be at least 1")
    spatial = [size if step == 1 else (size + step - 1) // step for size, step in zip(input.shape[2:], pair)]
    return [input.shape[0], weight.shape[0], *spatial]


def _check_layer(
    name: str,
    input: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    masks: int,
    groups: int,
    *others: Tensor | None,
) -> Any:
    """Refuses what the kernels refuse about types, devices and sizes; returns K = C*M, the number of response maps."""
    at = f"torch_pnn::{name}: "
    for tensor in (weight, mask, seed, *others):
        torch._check(
            tensor is None or tensor.device == input.device,
            lambda: f"{at}input is on {input.device}, all tensors should be on the same device",
        )
    torch._check(input.dim() == 4, lambda: f"{at}input has {input.dim()} dimensions, it should have 4: [B, C, H, W]")
    torch._check(
        input.dtype in _FLOATING,
        lambda: f"{at}input has type {input.dtype}, it should be float32, float64, bfloat16 or float16",
    )
    torch._check(
        weight.dtype == input.dtype or (input.dtype == torch.float32 and weight.dtype in _SIXTEEN_BITS),
        lambda: (
            f"{at}weight has type {weight.dtype}, it should be input's {input.dtype}, or a 16-bit one beside float32"
        ),
    )
    torch._check(mask is None or seed is None, lambda: f"{at}mask and seed are both given, it should be one of them")
    channels = input.shape[1]
    if mask is not None:
        torch._check(
            mask.dim() == 4, lambda: f"{at}mask has {mask.dim()} dimensions, it should have 4: [C or 1, M, H, W]"
        )
        torch._check(
            mask.dtype in (torch.float32, input.dtype),
            lambda: f"{at}mask has type {mask.dtype}, it should be float32 or input's {input.dtype}",
        )
        torch._check(
            mask.shape[2] == input.shape[2] and mask.shape[3] == input.shape[3],
            lambda: f"{at}mask has size {list(mask.shape)}, it should end in input's {list(input.shape[2:])}",
        )
        torch._check(
            mask.shape[0] == 1 or mask.shape[0] == channels,
            lambda: f"{at}mask has size {list(mask.shape)}, it should begin with 1 or input's {channels} channels",
        )
        masks = mask.shape[1]
    torch._check(masks >= 1, lambda: f"{at}masks is {masks}, it should be at least 1")
    torch._check(
        groups >= 1 and channels % groups == 0 and weight.shape[0] % groups == 0,
        lambda: (
            f"{at}groups is {groups}, it should divide input's {channels} channels and weight's "
            f"{weight.shape[0]} outputs"
        ),
    )
    columns = channels // groups * masks
    torch._check(
        weight.dim() == 4 and weight.shape[1] == columns and weight.shape[2] == 1 and weight.shape[3] == 1,
        lambda: f"{at}weight has size {list(weight.shape)}, it should be [T, {columns}, 1, 1]",
    )
    return channels * masks


def _gradient(asked: bool, like: Tensor, size: Sequence[Any], dtype: torch.dtype, format_of: Tensor | None) -> Tensor:
    return _empty(like, size, dtype, format_of) if asked else _empty(like, [0], dtype)


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
    _check_layer("perturb_conv2d", input, weight, mask, seed, masks, groups, bias)
    return _empty(input, _output_size(input, weight, stride), weight.dtype, input)


def _perturb_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    masks: int,
    shared_masks: bool,
    noise: str,
    level: float,
    activation: str,
    stride: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_layer("_perturb_conv2d_backward", input, weight, mask, seed, masks, groups, grad_output)
    shape, dtype = (input.shape, input.dtype) if mask is None else (mask.shape, mask.dtype)
    return (
        _gradient(output_mask[0], input, input.shape, input.dtype, input),
        _gradient(output_mask[1], input, weight.shape, weight.dtype, None),
        _gradient(output_mask[2], input, weight.shape[:1], weight.dtype, None),
        _gradient(output_mask[3], input, shape, dtype, None),
    )


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
    vectors = (bias, norm_weight, norm_bias, running_mean, running_var)
    maps = _check_layer("perturb_norm_conv2d", input, weight, mask, seed, masks, groups, *vectors)
    statistics = _statistics_dtype(input)
    return (
        _empty(input, _output_size(input, weight, stride), weight.dtype, input),
        _empty(input, [maps], statistics),
        _empty(input, [maps], statistics),
    )


def _perturb_norm_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    training: bool,
    eps: float,
    masks: int,
    shared_masks: bool,
    noise: str,
    level: float,
    activation: str,
    stride: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    others = (grad_output, norm_weight, norm_bias, mean, variance)
    maps = _check_layer("_perturb_norm_conv2d_backward", input, weight, mask, seed, masks, groups, *others)
    statistics = _statistics_dtype(input)
    shape, dtype = (input.shape, input.dtype) if mask is None else (mask.shape, mask.dtype)
    return (
        _gradient(output_mask[0], input, input.shape, input.dtype, input),
        _gradient(output_mask[1], input, weight.shape, weight.dtype, None),
        _gradient(output_mask[2], input, weight.shape[:1], weight.dtype, None),
        _gradient(output_mask[3], input, [maps], statistics, None),
        _gradient(output_mask[4], input, [maps], statistics, None),
        _gradient(output_mask[5], input, shape, dtype, None),
    )


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
    size = [1 if shared_masks else channels, masks, height, width]
    return _empty(seed, size, torch.float32 if dtype is None else dtype)


FAKES: dict[str, Callable[..., Any]] = {
    "perturb_conv2d": _perturb_conv2d,
    "_perturb_conv2d_backward": _perturb_conv2d_backward,
    "perturb_norm_conv2d": _perturb_norm_conv2d,
    "_perturb_norm_conv2d_backward": _perturb_norm_conv2d_backward,
    "perturbation_mask": _perturbation_mask,
}
"""Each operator's shape function by the operator's name."""


def register(library: torch.library.Library) -> None:
    """Registers the shape functions of all operators that take tensors, and that these take any memory layout.

    Without the tag torch.compile hands an operator the strides that it saw while tracing: where it lays convolutions
    out as channels_last, that copies every layer's input and gradient.
    """
    for name, fake in FAKES.items():
        torch.library.register_fake(f"torch_pnn::{name}", fake, lib=library)
        # The stable ABI defines operators with tags from 2.12 on only; torch.compile reads this list.
        tags = getattr(torch.ops.torch_pnn, name).default.tags
        if isinstance(tags, list) and torch.Tag.flexible_layout not in tags:
            tags.append(torch.Tag.flexible_layout)
