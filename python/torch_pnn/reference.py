"""The perturbation layer in plain PyTorch: the definition that every other implementation is compared with.

It stores the M times larger response maps and is slow; what it has is clarity. Everything here is made of standard
differentiable operators, so it also works under ``torch.compile``, ``torch.func`` and forward-mode differentiation,
on any device and in float64. The formulas stand in docs/masks.md (the generator) and in the header
``csrc/include/pnn/pnn.h`` (the layer); the layer is that of Juefei-Xu, Boddeti and Savvides, "Perturbative Neural
Networks", CVPR 2018.

Arithmetic: float32, bfloat16 and float16 compute in float32, float64 in float64. Where the weight has a 16-bit type
the two operands of the product are rounded to it once, products accumulate in float32, and the result is rounded
once.

The functions that users call (`perturb_conv2d`, `perturb_norm_conv2d`, `perturbation_mask`) have the signatures of
`torch_pnn.functional`; `OPERATORS` holds functions with the signatures of the registered operators, by their names.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "NOISES", "OPERATORS", "perturb_conv2d", "perturb_norm_conv2d", "perturbation_mask", "philox"]

NOISES = ("uniform", "normal", "waves")
"""The kinds of masks that a seed gives."""

SELU_ALPHA = 1.6732632423543772848170429916717
SELU_SCALE = 1.0507009873554804934193349852946


def _gelu(u: Tensor) -> Tensor:
    """The exact GELU, u times the normal distribution function; PyTorch's own gives NaN or infinity at +infinity."""
    return u * (0.5 * torch.erfc(u * -math.sqrt(0.5)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda u: u,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "gelu": _gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardtanh": F.hardtanh,
}
"""Each activation by its name, with PyTorch's default parameters; gelu is the exact one."""

# grad * activation'(u), selecting where PyTorch's own derivative selects (relu'(0) = 0 drops an infinite gradient).
_ACTIVATION_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": lambda grad, u: grad,
    "relu": lambda grad, u: torch.ops.aten.threshold_backward(grad, u, 0),
    "leaky_relu": lambda grad, u: torch.ops.aten.leaky_relu_backward(grad, u, 0.01, False),
    "elu": lambda grad, u: torch.ops.aten.elu_backward(grad, 1.0, 1.0, 1.0, False, u),
    "selu": lambda grad, u: torch.ops.aten.elu_backward(grad, SELU_ALPHA, SELU_SCALE, 1.0, False, u),
    "gelu": lambda grad, u: torch.ops.aten.gelu_backward(grad, u),
    "silu": lambda grad, u: torch.ops.aten.silu_backward(grad, u),
    "tanh": lambda grad, u: torch.ops.aten.tanh_backward(grad, torch.tanh(u)),
    "sigmoid": lambda grad, u: torch.ops.aten.sigmoid_backward(grad, torch.sigmoid(u)),
    "hardtanh": lambda grad, u: torch.ops.aten.hardtanh_backward(grad, u, -1.0, 1.0),
}

# --------------------------------------------------------------------------------------------------------------------
# Masks from a seed
# --------------------------------------------------------------------------------------------------------------------

_WORD = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
# 1/sqrt(43690) rounded to float32; 43690 = 8 * (256**2 - 1) / 12 is the variance of a sum of eight uniform bytes.
_NORMAL_SCALE = float.fromhex("0x1.39897ep-8")


def _multiply_words(a: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product of 32-bit words kept in int64, without overflow."""
    high = a * (multiplier >> 16)
    low = a * (multiplier & 0xFFFF)
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & _WORD


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw (SC 2011), ten rounds.

    Args:
        counter: four int64 tensors that broadcast together, each value a 32-bit word.
        key: two int64 tensors, likewise: the low and the high word of a 64-bit seed.

    Returns:
        Four int64 tensors of 32-bit words.

    Example:
        >>> zero = torch.zeros(1, dtype=torch.int64)
        >>> " ".join(f"{word.item():08x}" for word in philox([zero] * 4, [zero] * 2))
        '6627e8d5 e169c58d bc57ac4c 9b00dbd8'
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply_words(c0, _PHILOX_MULTIPLIERS[0])
        high1, low1 = _multiply_words(c2, _PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + _PHILOX_WEYL[0]) & _WORD
        k1 = (k1 + _PHILOX_WEYL[1]) & _WORD
    return list(torch.broadcast_tensors(c0, c1, c2, c3))


def _bytes_of(words: Sequence[Tensor]) -> Tensor:
    """The bytes of words [..., H, W], little-endian and word by word, as [..., 4 * len(words), H, W]."""
    return torch.stack([(word >> shift) & 0xFF for word in words for shift in (0, 8, 16, 24)], dim=-3)


def _lattice(u: Tensor) -> Tensor:
    """The symmetric lattice of 256 values in (-1, 1): (2u - 255) / 256 for bytes u."""
    return (2 * u - 255).to(torch.float32) * 2.0**-8


def mask_values(seed: Tensor, maps: int, height: int, width: int, noise: str) -> Tensor:
    """Values of the response maps 0 <= k < maps as a float32 tensor [maps, height, width]; nothing is checked.

    Args:
        seed: an int64 tensor of one element.
        maps: K, at least 1.
        height: rows.
        width: columns.
        noise: "uniform", "normal" or "waves".
    """
    seed = seed.reshape(())
    key = (seed & _WORD, (seed >> 32) & _WORD)
    device = seed.device
    row = torch.arange(height, device=device).view(1, -1, 1)
    column = torch.arange(width, device=device).view(1, 1, -1)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    if noise == "uniform":
        block = torch.arange((maps + 15) // 16, device=device).view(-1, 1, 1)
        words = philox([column, row, block, zero], key)
        return _lattice(_bytes_of(words).reshape(-1, height, width)[:maps])
    if noise == "normal":
        block = torch.arange((maps + 1) // 2, device=device).view(-1, 1, 1)
        words = philox([column, row, block, zero + 2], key)
        sums = torch.stack([_bytes_of(words[:2]).sum(-3), _bytes_of(words[2:]).sum(-3)], dim=-3)
        return (sums.reshape(-1, height, width)[:maps] - 1020).to(torch.float32) * _NORMAL_SCALE
    k = torch.arange(maps, device=device).view(-1, 1, 1)
    w0, w1, w2, _ = philox([k, zero, zero, zero + 1], key)
    phase = (_wave_frequency(w0) * row + _wave_frequency(w1) * column + w2) & _WORD
    t = phase >> 23
    return _lattice(torch.where(t < 256, t, 511 - t))


def _wave_frequency(word: Tensor) -> Tensor:
    """A signed frequency in 2**-32 periods a pixel: wavelengths of 4 to 64 pixels, bit 2 is the sign."""
    magnitude = (2**29 + (word >> 3)) >> (word & 3)
    return torch.where((word & 4) != 0, -magnitude, magnitude)


def _as_seed(seed: Tensor | int, device: torch.device | None = None) -> Tensor:
    """A seed as an int64 tensor of one element; ints are kept as two's complement."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed has type {seed.dtype}, it should be int64")
        if seed.numel() != 1:
            raise ValueError(f"seed has size {list(seed.shape)}, it should have exactly one element")
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed is {type(seed).__name__}, it should be an int or an int64 tensor with one element")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}, it should be in [-2**63, 2**64)")
    return torch.tensor([seed - 2**64 if seed >= 2**63 else seed], dtype=torch.int64, device=device)


def perturbation_mask(
    seed: Tensor | int,
    channels: int,
    masks: int,
    height: int,
    width: int,
    *,
    shared_masks: bool = False,
    noise: str = "uniform",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """A seed's masks, written out.

    Args:
        seed: an int in [-2**63, 2**64) or an int64 tensor of one element.
        channels: C, input channels.
        masks: M, masks per input channel.
        height: rows.
        width: columns.
        shared_masks: whether all channels share the same M masks.
        noise: "uniform" (256 values in (-1, 1), variance 1/3), "normal" (variance 1, |N| < 4.89) or "waves" (the 256
            values as a triangle wave per map).
        dtype: of the result; values are float32 values, rounded once to it.
        device: of the result; by default the seed's, or PyTorch's default device for an int.

    Returns:
        [C, M, height, width], or [1, M, height, width] with shared masks.

    Example:
        >>> perturbation_mask(7, channels=1, masks=1, height=1, width=3).flatten() * 256
        tensor([-165.,   55.,  129.])
    """
    _check_noise(noise)
    for name, size in (("channels", channels), ("masks", masks), ("height", height), ("width", width)):
        if size < 0:
            raise ValueError(f"{name} is {size}, it should not be negative")
    if dtype not in _FLOATING:
        raise TypeError(f"dtype is {dtype}, it should be float32, float64, bfloat16 or float16")
    seed = _as_seed(seed, None if device is None else torch.device(device))
    if device is not None:
        seed = seed.to(device)
    rows = 1 if shared_masks else channels
    if rows * masks == 0 or height == 0 or width == 0:
        return torch.empty((rows, masks, height, width), dtype=dtype, device=seed.device)
    return mask_values(seed, rows * masks, height, width, noise).reshape(rows, masks, height, width).to(dtype)


# --------------------------------------------------------------------------------------------------------------------
# Checks
# --------------------------------------------------------------------------------------------------------------------

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def _check_noise(noise: str) -> None:
    if noise not in NOISES:
        raise ValueError(f'noise is {noise!r}, it should be "uniform", "normal" or "waves"')


def _pair(name: str, value: Any) -> tuple[int, int]:
    if isinstance(value, (tuple, list, torch.Size)):
        if len(value) == 1:
            return value[0], value[0]
        if len(value) != 2:
            raise ValueError(f"{name} is {value!r}, it should be one int or two")
        return value[0], value[1]
    return value, value


def _check_layer(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    masks: int,
    shared_masks: bool,
    noise: str,
    level: float,
    activation: str,
    stride: tuple[int, int],
    groups: int,
) -> int:
    """Checks a call of the operator and returns M, the masks per channel."""
    if input.dim() != 4:
        raise ValueError(f"input has size {list(input.shape)}, it should be [B, C, H, W]")
    if input.dtype not in _FLOATING:
        raise TypeError(f"input has type {input.dtype}, it should be float32, float64, bfloat16 or float16")
    if weight.dtype != input.dtype and not (input.dtype == torch.float32 and weight.dtype in _SIXTEEN_BITS):
        raise TypeError(
            f"weight has type {weight.dtype}, it should be input's {input.dtype}, or a 16-bit one beside float32"
        )
    if bias is not None and bias.dtype != weight.dtype:
        raise TypeError(f"bias has type {bias.dtype}, it should be weight's {weight.dtype}")
    if mask is not None and seed is not None:
        raise ValueError("mask and seed are both given, it should be one of them")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, it should be one of {', '.join(ACTIVATIONS)}")
    if mask is None:
        _check_noise(noise)
    if not math.isfinite(level):
        raise ValueError(f"level is {level}, it should be finite")
    if stride[0] < 1 or stride[1] < 1:
        raise ValueError(f"stride is {list(stride)}, it should be at least 1")
    channels, height, width = input.shape[1:]
    if mask is not None:
        if mask.dim() != 4:
            raise ValueError(f"mask has size {list(mask.shape)}, it should be [C or 1, M, H, W]")
        if mask.dtype not in (torch.float32, input.dtype):
            raise TypeError(f"mask has type {mask.dtype}, it should be float32 or input's {input.dtype}")
        if mask.shape[0] not in (1, channels) or mask.shape[2] != height or mask.shape[3] != width:
            raise ValueError(
                f"mask has size {list(mask.shape)}, it should be [{channels} or 1, M, {height}, {width}] for an input "
                f"of size {list(input.shape)}"
            )
        masks = mask.shape[1]
    if masks < 1:
        raise ValueError(f"masks is {masks}, it should be at least 1")
    outputs = weight.shape[0] if weight.dim() > 0 else 0
    if groups < 1 or channels % groups != 0 or outputs % groups != 0:
        raise ValueError(
            f"groups is {groups}, it should divide input's {channels} channels and weight's {outputs} outputs"
        )
    columns = channels // groups * masks
    if weight.dim() != 4 or weight.shape[1] != columns or weight.shape[2] != 1 or weight.shape[3] != 1:
        raise ValueError(
            f"weight has size {list(weight.shape)}, it should be [T, {columns}, 1, 1]: {channels} channels / {groups} "
            f"groups * {masks} masks"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise ValueError(f"bias has size {list(bias.shape)}, it should be [{weight.shape[0]}]")
    for name, tensor in (("weight", weight), ("bias", bias), ("mask", mask), ("seed", seed)):
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"{name} is on {tensor.device}, it should be on input's {input.device}")
    if seed is not None:
        _as_seed(seed)
    return masks


def _check_norm(input: Tensor, channels: int, eps: float, vectors: dict[str, Tensor | None]) -> None:
    """Checks the arguments that only the layer with normalisation has; `channels` is K = C*M."""
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps is {eps}, it should be finite and not negative")
    statistics = torch.float64 if input.dtype == torch.float64 else torch.float32
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.dtype != statistics:
            raise TypeError(f"{name} has type {vector.dtype}, it should be {statistics} beside a {input.dtype} input")
        if vector.dim() != 1 or vector.shape[0] != channels:
            raise ValueError(f"{name} has size {list(vector.shape)}, it should be [{channels}]: one value a map")
        if vector.device != input.device:
            raise ValueError(f"{name} is on {vector.device}, it should be on input's {input.device}")


# --------------------------------------------------------------------------------------------------------------------
# The layer
# --------------------------------------------------------------------------------------------------------------------


def _compute_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """The type of the per-channel algebra: float64 where the device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def rounded(operand: Tensor, dtype: torch.dtype) -> Tensor:
    """An operand of the product, rounded once to the weight's type where that has 16 bits."""
    return operand.to(dtype).to(operand.dtype) if dtype in _SIXTEEN_BITS else operand


def scaled_weight(wide: Tensor, compute: torch.dtype, dtype: torch.dtype) -> Tensor:
    """V times the normalisation's scale as an operand of the product: in the type that computes, or rounded to 16 bits.

    Rounding goes to 16 bits at once, not to float32 first: float32 takes the odd one of two neighbours where it is not
    exact, after which the second rounding gives what a single one would (Boldo, Melquiond, 2005).
    """
    operand = wide.to(compute)
    if dtype not in _SIXTEEN_BITS:
        return operand
    exact, near = wide.detach(), operand.detach()
    even = (near.view(torch.int32) & 1) == 0
    beyond = torch.nextafter(near, torch.where(near.to(exact.dtype) < exact, math.inf, -math.inf).to(near.dtype))
    to_odd = torch.where(
        near.isfinite() & even & (near.to(exact.dtype) != exact), beyond - near, torch.zeros_like(near)
    )
    return rounded(operand + to_odd, dtype)


def _perturbed(
    input: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    masks: int,
    shared_masks: bool,
    noise: str,
    level: float,
    stride: tuple[int, int],
) -> Tensor:
    """The perturbed input u = x + level * N at the computed pixels: [B, C, M, H', W'] in the type that computes."""
    compute = _compute_dtype(input)
    x = input[:, :, :: stride[0], :: stride[1]].to(compute).unsqueeze(2)
    if seed is not None:
        channels, height, width = input.shape[1:]
        mask = perturbation_mask(seed, channels, masks, height, width, shared_masks=shared_masks, noise=noise)
    if mask is None:
        return x.expand(-1, -1, masks, -1, -1)
    n = mask[:, :, :: stride[0], :: stride[1]].to(compute)
    return x + n * level


def _product(weight: Tensor, maps: Tensor, groups: int) -> Tensor:
    """V a per group: weight [T, K/groups], maps [B, K, H', W'] -> [B, T, H', W']."""
    batch, channels, height, width = maps.shape
    grouped = maps.reshape(batch, groups, channels // groups, height * width)
    result = torch.matmul(weight.reshape(groups, weight.shape[0] // groups, weight.shape[1]), grouped)
    return result.reshape(batch, weight.shape[0], height, width)


def _transposed_product(weight: Tensor, grad: Tensor, groups: int) -> Tensor:
    """V^T g per group: weight [T, K/groups], grad [B, T, H', W'] -> [B, K, H', W']."""
    batch, outputs, height, width = grad.shape
    grouped = grad.reshape(batch, groups, outputs // groups, height * width)
    v = weight.reshape(groups, outputs // groups, weight.shape[1])
    return torch.matmul(v.transpose(1, 2), grouped).reshape(batch, groups * weight.shape[1], height, width)


def _correlation(grad: Tensor, maps: Tensor, groups: int) -> Tensor:
    """Sums over batch and pixels of g a per group: [B, T, H', W'], [B, K, H', W'] -> [T, K/groups]."""
    batch, outputs, height, width = grad.shape
    channels = maps.shape[1]
    g = grad.transpose(0, 1).reshape(groups, outputs // groups, batch * height * width)
    a = maps.transpose(0, 1).reshape(groups, channels // groups, batch * height * width)
    return torch.matmul(g, a.transpose(1, 2)).reshape(outputs, channels // groups)


def _group_sums(weight: Tensor, rows: Tensor, groups: int) -> Tensor:
    """Sums over t of V[t, k] r[t] (rows [T]) or V[t, k] r[t, k] (rows [T, K/groups]), as a vector over all K maps."""
    terms = weight * (rows.unsqueeze(1) if rows.dim() == 1 else rows)
    return terms.reshape(groups, weight.shape[0] // groups, weight.shape[1]).sum(1).reshape(-1)


def _group_columns(vector: Tensor, outputs: int, groups: int) -> Tensor:
    """A vector over all K maps as the rows [T, K/groups] that pair with V."""
    rows = vector.reshape(groups, 1, -1)
    return rows.expand(groups, outputs // groups, rows.shape[2]).reshape(outputs, rows.shape[2])


def _maps(u: Tensor, activation: str) -> Tensor:
    """The response maps a = activation(u) as [B, K, H', W']."""
    batch, channels, masks, height, width = u.shape
    return ACTIVATIONS[activation](u).reshape(batch, channels * masks, height, width)


def _matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """V as [T, K/groups] in another type."""
    return weight.reshape(weight.shape[0], weight.shape[1]).to(dtype)


def _plain_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    masks: int,
    shared_masks: bool,
    noise: str,
    level: float,
    activation: str,
    stride: tuple[int, int],
    groups: int,
) -> Tensor:
    masks = _check_layer(input, weight, bias, mask, seed, masks, shared_masks, noise, level, activation, stride, groups)
    u = _perturbed(input, mask, seed, masks, shared_masks, noise, level, stride)
    a = rounded(_maps(u, activation), weight.dtype)
    y = _product(_matrix(weight, a.dtype), a, groups)
    if bias is not None:
        y = y + bias.to(y.dtype).view(-1, 1, 1)
    return y.to(weight.dtype)


def _moments(a: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each map over batch and pixels, in the type of the per-channel algebra."""
    wide = a.to(wide_dtype(a))
    if a.shape[0] * a.shape[2] * a.shape[3] == 0:
        return wide.new_zeros(a.shape[1]), wide.new_ones(a.shape[1])
    mean = wide.mean((0, 2, 3))
    return mean, (wide - mean.view(-1, 1, 1)).square().mean((0, 2, 3))


def _norm_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    training: bool,
    eps: float,
    masks: int,
    shared_masks: bool,
    noise: str,
    level: float,
    activation: str,
    stride: tuple[int, int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    masks = _check_layer(input, weight, bias, mask, seed, masks, shared_masks, noise, level, activation, stride, groups)
    vectors = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    vectors |= {"running_mean": running_mean, "running_var": running_var}
    _check_norm(input, input.shape[1] * masks, eps, vectors)
    u = _perturbed(input, mask, seed, masks, shared_masks, noise, level, stride)
    a = _maps(u, activation)
    if training:
        if a.shape[0] * a.shape[2] * a.shape[3] == 1:
            raise ValueError("input has one value a map to normalise over, it should have more than one when training")
        wide_mean, wide_variance = _moments(a)
        mean, variance = wide_mean.to(a.dtype), wide_variance.to(a.dtype)
    else:
        if running_mean is None or running_var is None:
            raise ValueError("running_mean or running_var is None, both should be given when training is False")
        mean, variance = running_mean.clone(), running_var.clone()
        wide_variance = variance.to(wide_dtype(a))
    centred = rounded(a - mean.view(-1, 1, 1), weight.dtype)
    scale = (wide_variance + eps).rsqrt()
    if norm_weight is not None:
        scale = scale * norm_weight.to(scale.dtype)
    v = _matrix(weight, scale.dtype)
    scaled = v * _group_columns(scale, weight.shape[0], groups)
    y = _product(scaled_weight(scaled, a.dtype, weight.dtype), centred, groups)
    offset = None if bias is None else bias.to(scale.dtype)
    if norm_bias is not None:
        shift = (v * _group_columns(norm_bias.to(scale.dtype), weight.shape[0], groups)).sum(1)
        offset = shift if offset is None else offset + shift
    if offset is not None:
        y = y + offset.to(y.dtype).view(-1, 1, 1)
    return y.to(weight.dtype), mean, variance


def perturb_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    seed: Tensor | int | None = None,
    masks: int = 1,
    shared_masks: bool = False,
    noise: str | None = "uniform",
    level: float = 1.0,
    activation: str = "relu",
    stride: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """The perturbation layer in plain PyTorch; see `torch_pnn.functional.perturb_conv2d` for the arguments.

    With neither `mask` nor `seed` nothing is added: u = x.

    Example:
        >>> x, weight = torch.tensor([[[[1.0, -2.0]]]]), torch.tensor([[[[3.0]]]])
        >>> perturb_conv2d(x, weight, mask=torch.tensor([[[[0.5, 2.5]]]]))
        tensor([[[[4.5000, 1.5000]]]])
    """
    batched = input.dim() != 3
    result = _plain_forward(
        input if batched else input.unsqueeze(0),
        weight,
        bias,
        mask,
        None if seed is None else _as_seed(seed, input.device),
        masks,
        shared_masks,
        "uniform" if noise is None else noise,
        level,
        activation,
        _pair("stride", stride),
        groups,
    )
    return result if batched else result.squeeze(0)


def perturb_norm_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    mask: Tensor | None = None,
    seed: Tensor | int | None = None,
    masks: int = 1,
    shared_masks: bool = False,
    noise: str | None = "uniform",
    level: float = 1.0,
    activation: str = "relu",
    stride: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """The layer with batch normalisation inside; see `torch_pnn.functional.perturb_norm_conv2d` for the arguments.

    Running statistics are updated in place when training, as `torch.nn.functional.batch_norm` does.

    Example:
        >>> x, weight = torch.tensor([[[[0.0, 2.0]]]]), torch.ones(1, 1, 1, 1)
        >>> perturb_norm_conv2d(x, weight, None, None, None, None, None, training=True, eps=0.0)
        tensor([[[[-1.,  1.]]]])
    """
    batched = input.dim() != 3
    stride = _pair("stride", stride)
    result, mean, variance = _norm_forward(
        input if batched else input.unsqueeze(0),
        weight,
        bias,
        norm_weight,
        norm_bias,
        running_mean,
        running_var,
        mask,
        None if seed is None else _as_seed(seed, input.device),
        training,
        eps,
        masks,
        shared_masks,
        "uniform" if noise is None else noise,
        level,
        activation,
        stride,
        groups,
    )
    if training:
        pixels = (1 if input.dim() == 3 else input.shape[0]) * result.shape[-2] * result.shape[-1]
        update_running_statistics(running_mean, running_var, mean, variance, pixels, momentum)
    return result if batched else result.squeeze(0)


def update_running_statistics(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    pixels: int,
    momentum: float,
) -> None:
    """Moves running statistics towards a batch's, in place: the variance with n/(n - 1), nothing where n is 0.

    Args:
        running_mean: [K], or None.
        running_var: [K], or None.
        mean: [K], of the batch.
        variance: [K], biased, of the batch.
        pixels: n, the number of values behind each map's moments.
        momentum: the weight of the new values.
    """
    if pixels < 2:
        return
    with torch.no_grad():
        if running_mean is not None:
            running_mean.mul_(1 - momentum).add_(mean.detach(), alpha=momentum)
        if running_var is not None:
            running_var.mul_(1 - momentum).add_(variance.detach() * (pixels / (pixels - 1)), alpha=momentum)


# --------------------------------------------------------------------------------------------------------------------
# The functions behind the registered operators
# --------------------------------------------------------------------------------------------------------------------


def _empty(like: Tensor) -> Tensor:
    """What stands for a gradient that nobody asked for."""
    return like.new_empty((0,))


def _gradient_to_pixels(grad: Tensor, input: Tensor, stride: tuple[int, int]) -> Tensor:
    """A gradient at the computed pixels spread over the input's pixels; 0 where none is computed."""
    return _spread(grad.to(input.dtype), input.shape, stride)


def _spread(grad: Tensor, shape: Sequence[int], stride: tuple[int, int]) -> Tensor:
    """Values at every stride-th pixel of the last two dimensions of `shape`, zeros elsewhere.

    Written out of place, so that it may stand in a functional graph.
    """
    for dim, step in ((2, stride[0]), (3, stride[1])):
        if step != 1:
            size = [*grad.shape]
            size[dim] = shape[dim]
            grad = torch.slice_scatter(grad.new_zeros(size), grad, dim, step=step)
    return grad


def _mask_gradient(grad_u: Tensor, mask: Tensor, level: float, stride: tuple[int, int]) -> Tensor:
    """The mask's gradient from du [B, C, M, H', W']: summed over the batch, and over channels that share masks."""
    grad = grad_u.sum((0, 1), keepdim=True).squeeze(0) if mask.shape[0] == 1 else grad_u.sum(0)
    return _spread(grad * level, mask.shape, stride).to(mask.dtype)


def _operator_perturb_conv2d(
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
    pair = _pair("stride", stride)
    return _plain_forward(input, weight, bias, mask, seed, masks, shared_masks, noise, level, activation, pair, groups)


def _check_grad_output(grad_output: Tensor, input: Tensor, weight: Tensor, stride: tuple[int, int]) -> None:
    batch, _, height, width = input.shape
    shape = [batch, weight.shape[0], -(-height // stride[0]), -(-width // stride[1])]
    if list(grad_output.shape) != shape:
        raise ValueError(f"grad_output has size {list(grad_output.shape)}, it should be {shape}")
    if grad_output.dtype != weight.dtype:
        raise TypeError(f"grad_output has type {grad_output.dtype}, it should be weight's {weight.dtype}")


def _operator_perturb_conv2d_backward(
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
    pair = _pair("stride", stride)
    masks = _check_layer(input, weight, None, mask, seed, masks, shared_masks, noise, level, activation, pair, groups)
    _check_grad_output(grad_output, input, weight, pair)
    u = _perturbed(input, mask, seed, masks, shared_masks, noise, level, pair)
    grad = grad_output.to(u.dtype)
    v = _matrix(weight, u.dtype)
    grad_input, grad_weight, grad_bias, grad_mask = _empty(input), _empty(weight), _empty(weight), _empty(input)
    if output_mask[0] or output_mask[3]:
        grad_u = _ACTIVATION_GRADIENTS[activation](_transposed_product(v, grad, groups).reshape(u.shape), u)
        if output_mask[0]:
            grad_input = _gradient_to_pixels(grad_u.sum(2), input, pair)
        if output_mask[3] and mask is not None:
            grad_mask = _mask_gradient(grad_u, mask, level, pair)
    if output_mask[1]:
        a = rounded(_maps(u, activation), weight.dtype)
        grad_weight = _correlation(grad, a, groups).reshape(weight.shape).to(weight.dtype)
    if output_mask[2]:
        grad_bias = grad.sum((0, 2, 3)).to(weight.dtype)
    return grad_input, grad_weight, grad_bias, grad_mask


def _operator_perturb_norm_conv2d(
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
    return _norm_forward(
        input,
        weight,
        bias,
        norm_weight,
        norm_bias,
        running_mean,
        running_var,
        mask,
        seed,
        training,
        eps,
        masks,
        shared_masks,
        noise,
        level,
        activation,
        _pair("stride", stride),
        groups,
    )


def _operator_perturb_norm_conv2d_backward(
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
    pair = _pair("stride", stride)
    masks = _check_layer(input, weight, None, mask, seed, masks, shared_masks, noise, level, activation, pair, groups)
    vectors = {"norm_weight": norm_weight, "norm_bias": norm_bias, "mean": mean, "variance": variance}
    _check_norm(input, input.shape[1] * masks, eps, vectors)
    _check_grad_output(grad_output, input, weight, pair)
    u = _perturbed(input, mask, seed, masks, shared_masks, noise, level, pair)
    a = _maps(u, activation)
    outputs, pixels = weight.shape[0], a.shape[0] * a.shape[2] * a.shape[3]
    wide = wide_dtype(a)
    inverse = (variance.to(wide) + eps).rsqrt()
    scale = inverse if norm_weight is None else inverse * norm_weight.to(wide)
    v = _matrix(weight, wide)
    centred = a - mean.view(-1, 1, 1)
    grad = grad_output.to(a.dtype)
    grad_sum = grad.to(wide).sum((0, 2, 3))
    correlation = _correlation(grad, rounded(centred, weight.dtype), groups).to(wide)
    s1 = _group_sums(v, grad_sum, groups)
    s2 = _group_sums(v, correlation, groups)

    grad_input, grad_weight, grad_bias = _empty(input), _empty(weight), _empty(weight)
    grad_norm_weight, grad_norm_bias, grad_mask = _empty(mean), _empty(mean), _empty(input)
    if output_mask[0] or output_mask[5]:
        scaled = scaled_weight(v * _group_columns(scale, outputs, groups), a.dtype, weight.dtype)
        grad_a = _transposed_product(scaled, grad, groups)
        if training and pixels > 0:
            constant = (scale * s1 / pixels).to(a.dtype)
            slope = (scale * inverse.square() * s2 / pixels).to(a.dtype)
            grad_a = grad_a - constant.view(-1, 1, 1) - slope.view(-1, 1, 1) * centred
        grad_u = _ACTIVATION_GRADIENTS[activation](grad_a.reshape(u.shape), u)
        if output_mask[0]:
            grad_input = _gradient_to_pixels(grad_u.sum(2), input, pair)
        if output_mask[5] and mask is not None:
            grad_mask = _mask_gradient(grad_u, mask, level, pair)
    if output_mask[1]:
        result = _group_columns(scale, outputs, groups) * correlation
        if norm_bias is not None:
            result = result + grad_sum.unsqueeze(1) * _group_columns(norm_bias.to(wide), outputs, groups)
        grad_weight = result.reshape(weight.shape).to(weight.dtype)
    if output_mask[2]:
        grad_bias = grad_sum.to(weight.dtype)
    if output_mask[3]:
        grad_norm_weight = (inverse * s2).to(mean.dtype)
    if output_mask[4]:
        grad_norm_bias = s1.to(mean.dtype)
    return grad_input, grad_weight, grad_bias, grad_norm_weight, grad_norm_bias, grad_mask


def _operator_perturbation_mask(
    seed: Tensor,
    channels: int,
    masks: int,
    height: int,
    width: int,
    shared_masks: bool = False,
    noise: str = "uniform",
    dtype: torch.dtype | None = None,
) -> Tensor:
    return perturbation_mask(
        seed, channels, masks, height, width, shared_masks=shared_masks, noise=noise, dtype=dtype or torch.float32
    )


def _as_operator(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with errors of the one type that operators have."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise RuntimeError(str(error)) from error

    return wrapped


OPERATORS: dict[str, Callable[..., Any]] = {
    "perturb_conv2d": _as_operator(_operator_perturb_conv2d),
    "_perturb_conv2d_backward": _as_operator(_operator_perturb_conv2d_backward),
    "perturb_norm_conv2d": _as_operator(_operator_perturb_norm_conv2d),
    "_perturb_norm_conv2d_backward": _as_operator(_operator_perturb_norm_conv2d_backward),
    "perturbation_mask": _as_operator(_operator_perturbation_mask),
}
"""Functions with the signatures of schemas.txt, by the operators' names. Their errors are RuntimeError."""
