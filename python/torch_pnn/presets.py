"""The published variants of the perturbation layer, by name, so that results compare.

A preset is a dictionary of options that `torch_pnn.convert` and `torch_pnn.models` take; options given beside it win.
The three variants differ in where the normalisation stands, how many masks a channel has and how maps are mixed:

===============  ====================================================================================================
``paper``        perturb -> ReLU -> 1x1, as the text and Figure 1 of the paper describe the layer.
``juefeix2018``  perturb -> ReLU -> BatchNorm -> 1x1 at level 0.1, one mask a channel; the network strides by max
                 pooling after the layer. This is what the authors published as code (`NoiseLayer`).
``klachko2018``  64 masks a channel -> ReLU -> 1x1 over each channel's own maps -> BatchNorm -> ReLU -> a second,
                 mixing 1x1; BatchNorm again after it, which is the network's. Michael Klachko's reimplementation.
===============  ====================================================================================================

Sources: Juefei-Xu, Boddeti, Savvides, "Perturbative Neural Networks", CVPR 2018 (arXiv 1806.01817); the authors' code,
github.com/juefeix/pnn.pytorch (models/naiveresnet.py, config.py); github.com/michaelklachko/pnn.pytorch (models.py,
main.py and the README's experiments 6 to 8: `--nmasks 64 --unique_masks --mix_maps`, level 0.5 by default).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from .modules import PerturbConv2d

__all__ = ["LAYER_OPTIONS", "PRESETS", "PerturbMixConv2d", "Preset", "build_perturbation", "layer_options"]

LAYER_OPTIONS = (
    "masks",
    "level",
    "noise",
    "activation",
    "shared_masks",
    "mask_size",
    "train_masks",
    "norm",
    "downsample",
    "mixing",
)
"""The options that a whole network's perturbation layers share: `PerturbConv2d`'s keywords without `mask` and `seed`,
which belong to one layer, and `mixing` (see `PerturbMixConv2d`)."""


@dataclass(frozen=True)
class Preset:
    """A published variant: its options and where they come from.

    Attributes:
        name: What users type.
        summary: The chain of operations in one line.
        source: Where the variant was published.
        options: Keywords for `convert`, `models` and (without `mixing`) `PerturbConv2d`; read-only.
    """

    name: str
    summary: str
    source: str
    options: Mapping[str, Any]


def _preset(name: str, summary: str, source: str, **options: Any) -> Preset:
    return Preset(name, summary, source, MappingProxyType(options))


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        preset.name: preset
        for preset in (
            _preset(
                "paper",
                "perturb -> ReLU -> 1x1",
                "arXiv 1806.01817, section 3",
                masks=1,
                level=0.1,
                noise="uniform",
                activation="relu",
                shared_masks=False,
                norm=False,
                downsample="max",
                mixing=False,
            ),
            _preset(
                "juefeix2018",
                "perturb -> ReLU -> BatchNorm -> 1x1, stride by max pooling",
                "github.com/juefeix/pnn.pytorch, models/naiveresnet.py",
                masks=1,
                level=0.1,
                noise="uniform",
                activation="relu",
                shared_masks=False,
                norm=True,
                downsample="max",
                mixing=False,
            ),
            _preset(
                "klachko2018",
                "64 masks a channel -> ReLU -> grouped 1x1 -> BatchNorm -> ReLU -> mixing 1x1",
                "github.com/michaelklachko/pnn.pytorch, models.py and README, experiment 6",
                masks=64,
                level=0.5,
                noise="uniform",
                activation="relu",
                shared_masks=False,
                norm=False,
                downsample="max",
                mixing=True,
            ),
        )
    }
)
"""All presets by name."""


def layer_options(preset: str | None = None, **options: Any) -> dict[str, Any]:
    """A preset's options with `options` over them.

    Args:
        preset: A name in `PRESETS`, or None for the layer's own defaults.
        **options: Any of `LAYER_OPTIONS`.

    Returns:
        A new dictionary.

    Raises:
        ValueError: The preset is unknown.
        TypeError: An option is unknown, or belongs to a single layer (`mask`, `seed`).

    Examples:
        >>> layer_options("juefeix2018", level=0.2)["norm"], layer_options("juefeix2018", level=0.2)["level"]
        (True, 0.2)
        >>> layer_options("juefei2018")
        Traceback (most recent call last):
            ...
        ValueError: preset is 'juefei2018', should be one of 'paper', 'juefeix2018', 'klachko2018' or None
    """
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        names = ", ".join(repr(name) for name in PRESETS)
        raise ValueError(f"preset is {preset!r}, should be one of {names} or None")
    for name in options:
        if name in LAYER_OPTIONS:
            continue
        if name == "mask":
            raise TypeError(
                "option 'mask' is one layer's tensor and can't serve every layer of a network; give 'mask_size' "
                "(masks held as tensors of one size), or set the layers' masks one by one"
            )
        near = difflib.get_close_matches(name, LAYER_OPTIONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"unknown option {name!r}, should be one of {', '.join(LAYER_OPTIONS)}{hint}")
    merged = dict(PRESETS[preset].options) if preset is not None else {}
    merged.update(options)
    return merged


_ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = MappingProxyType(
    {
        "relu": nn.ReLU,
        "identity": nn.Identity,
        "leaky_relu": nn.LeakyReLU,
        "elu": nn.ELU,
        "selu": nn.SELU,
        "gelu": nn.GELU,
        "silu": nn.SiLU,
        "tanh": nn.Tanh,
        "sigmoid": nn.Sigmoid,
        "hardtanh": nn.Hardtanh,
    }
)


class PerturbMixConv2d(nn.Module):
    """Perturbation layer with a 1x1 over each channel's own maps and a second 1x1 that mixes them.

    The chain is: perturb (M masks a channel) -> activation -> grouped 1x1 -> BatchNorm -> activation -> 1x1. It is the
    published `--mix_maps` variant without its last BatchNorm and activation, which the network around it has. The first
    1x1 has as many groups as there are input channels where they divide `out_channels` (the published code asks for
    that), else the greatest common divisor of both numbers.

    Args:
        in_channels: Channels C of the input.
        out_channels: Channels T of the output.
        kernel_size: As `torch.nn.Conv2d`; with stride, padding and dilation it sets the output's size.
        stride: As `torch.nn.Conv2d`.
        padding: As `torch.nn.Conv2d`.
        dilation: As `torch.nn.Conv2d`.
        groups: Groups of the convolution it stands for; both 1x1 products keep to them.
        bias: Whether the mixing 1x1 has a bias.
        padding_mode: As `torch.nn.Conv2d`.
        device: Where parameters are made.
        dtype: Type of the parameters.
        **options: Keywords of `PerturbConv2d`.

    Shape:
        Input [B, C, H, W], output [B, T, H', W'] as `torch.nn.Conv2d` gives.

    Attributes:
        in_channels: As given, like out_channels, kernel_size, stride, padding, dilation, groups and padding_mode.
        perturb: The `PerturbConv2d` with the grouped 1x1.
        norm: The `BatchNorm2d` between the two 1x1 products.
        activation: The activation after it, of the same kind as the perturbed maps'.
        mix: The mixing 1x1.

    Examples:
        >>> import torch
        >>> layer = PerturbMixConv2d(4, 8, 3, padding=1, masks=16)
        >>> layer(torch.zeros(2, 4, 6, 6)).shape, layer.perturb.groups
        (torch.Size([2, 8, 6, 6]), 4)

    Source: github.com/michaelklachko/pnn.pytorch, models.py (PerturbLayer).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.groups = groups
        self.perturb = PerturbConv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            math.gcd(in_channels, out_channels),
            False,
            padding_mode,
            device,
            dtype,
            **options,
        )
        self.norm = nn.BatchNorm2d(out_channels, device=device, dtype=dtype)
        self.activation = _ACTIVATIONS[options.get("activation", "relu")]()
        self.kernel_size = self.perturb.kernel_size
        self.stride = self.perturb.stride
        self.padding = self.perturb.padding
        self.dilation = self.perturb.dilation
        self.padding_mode = padding_mode
        self.mix = nn.Conv2d(out_channels, out_channels, 1, groups=groups, bias=bias, device=device, dtype=dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The layer's output; see the class for shapes."""
        return self.mix(self.activation(self.norm(self.perturb(input))))


def build_perturbation(*arguments: Any, mixing: bool = False, **options: Any) -> PerturbConv2d | PerturbMixConv2d:
    """`PerturbConv2d`, or `PerturbMixConv2d` where `mixing` is asked for and a channel has more than one mask.

    With one mask a channel the first 1x1 already mixes the channels, so there is nothing to add: the published code
    says and does the same.

    Args:
        *arguments: As `PerturbConv2d`.
        mixing: Whether each channel's maps are combined first and mixed by a second 1x1.
        **options: As `PerturbConv2d`.

    Returns:
        The layer.

    Raises:
        TypeError: `mixing` is not a bool.
        ValueError: Whatever `PerturbConv2d` refuses.

    Examples:
        >>> type(build_perturbation(4, 4, 3, mixing=True, masks=2)).__name__
        'PerturbMixConv2d'
        >>> type(build_perturbation(4, 4, 3, mixing=True)).__name__
        'PerturbConv2d'
    """
    if not isinstance(mixing, bool):
        raise TypeError(f"mixing is {mixing!r}, should be True or False")
    if mixing and options.get("masks", 1) != 1:
        return PerturbMixConv2d(*arguments, **options)
    return PerturbConv2d(*arguments, **options)
