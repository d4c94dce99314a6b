"""One function that makes a layer of any kind that is compared: `make_layer`.

The kinds: "perturb" (`PerturbConv2d`), "conv" (`nn.Conv2d`), "lbc" (`LBConv2d`) and "conv1x1" (a plain 1x1 convolution
with the same geometry and pooling as "perturb", and nothing in front of it).
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

from torch import nn

from .modules import LBConv2d, PerturbConv2d
from .presets import build_perturbation

__all__ = ["LAYERS", "make_layer"]


def _conv1x1(*arguments: Any, downsample: str = "max", **options: Any) -> PerturbConv2d:
    """Without perturbation and with the identity as activation the layer is a 1x1 convolution."""
    return PerturbConv2d(*arguments, noise=None, activation="identity", downsample=downsample, **options)


def _lbc(
    in_channels: int,
    out_channels: int,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int],
    padding: int | tuple[int, int] | str,
    dilation: int | tuple[int, int],
    groups: int,
    bias: bool,
    **options: Any,
) -> LBConv2d:
    if groups != 1:
        raise ValueError(f"groups is {groups}, it should be 1 for the layer 'lbc'")
    return LBConv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, bias, **options)


_MAKERS: dict[str, Callable[..., nn.Module]] = {
    "perturb": build_perturbation,
    "conv": nn.Conv2d,
    "lbc": _lbc,
    "conv1x1": _conv1x1,
}
_OPTIONS = MappingProxyType(
    {
        "perturb": (
            "masks",
            "level",
            "noise",
            "activation",
            "seed",
            "shared_masks",
            "mask",
            "mask_size",
            "train_masks",
            "norm",
            "downsample",
            "mixing",
        ),
        "conv": (),
        "lbc": ("anchors", "sparsity", "activation", "seed"),
        "conv1x1": ("downsample",),
    }
)

LAYERS = tuple(_MAKERS)
"""The kinds of layer."""


def make_layer(
    kind: str,
    in_channels: int,
    out_channels: int,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    bias: bool = True,
    **options: Any,
) -> nn.Module:
    """A layer of any kind; all kinds give the output sizes of `nn.Conv2d`.

    Args:
        kind: "perturb", "conv", "lbc" or "conv1x1".
        in_channels: C.
        out_channels: T.
        kernel_size: as `nn.Conv2d`, as for the next five.
        stride: see there.
        padding: see there.
        dilation: see there.
        groups: see there; 1 for "lbc".
        bias: see there.
        **options: the keywords of `PerturbConv2d` and `mixing` for "perturb"; anchors, sparsity, activation and seed
            for "lbc"; downsample for "conv1x1"; none for "conv"; device and dtype for all.

    Returns:
        The layer.

    Raises:
        TypeError: an option does not belong to this kind.
        ValueError: the kind is unknown, or the layer refuses an argument.

    Example:
        >>> import torch
        >>> for kind in LAYERS:
        ...     layer = make_layer(kind, 4, 8, 3, stride=2, padding=1)
        ...     print(kind, list(layer(torch.zeros(1, 4, 9, 9)).shape), sum(p.numel() for p in layer.parameters()))
        perturb [1, 8, 5, 5] 40
        conv [1, 8, 5, 5] 296
        lbc [1, 8, 5, 5] 72
        conv1x1 [1, 8, 5, 5] 40
    """
    if kind not in _MAKERS:
        raise ValueError(f"layer is {kind!r}, it should be one of {', '.join(map(repr, LAYERS))}")
    for name in options:
        if name not in (*_OPTIONS[kind], "device", "dtype"):
            known = ", ".join(_OPTIONS[kind]) or "none"
            raise TypeError(f"option {name!r} doesn't belong to the layer {kind!r}, its options are: {known}")
    return _MAKERS[kind](in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **options)
