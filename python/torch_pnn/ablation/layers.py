"""What stands where a network has its convolutions: one function for each kind of layer that is compared.

Every kind but the convolution itself is one module that gives the output size of the convolution that it replaces, and
is made from that convolution's geometry, a seed for what stays fixed in it (masks, frozen filters) and options.

Kinds whose learnable part is the same as the PNN's (a batch normalisation, a 1×1 weight) are subclasses of
``PerturbConv2d``: the same modules under the same names, so that they start from the same bits.

=============  =====================================================================================================
``conv``       the convolution itself
``perturb``    masks added to the input → activation → batch normalisation (by option) → 1×1 → pooling
``conv1x1``    1×1 → pooling; unlike the PNN at level 0 there is neither activation nor normalisation before the 1×1
``lbc``        fixed sparse ternary filters → ReLU → 1×1 (local binary convolution)
``frozen-conv``  fixed random filters of the convolution's size → ReLU → batch normalisation → 1×1 → pooling
``shift``      groups of channels moved by a pixel each → ReLU → batch normalisation → 1×1 → pooling
``separable``  depthwise convolution → batch normalisation → ReLU → 1×1
=============  =====================================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_pnn import functional
from torch_pnn.modules import LBConv2d, PerturbConv2d
from torch_pnn.presets import PerturbMixConv2d, build_perturbation, layer_options

__all__ = [
    "LAYERS",
    "NOISES",
    "NORM_POSITIONS",
    "RECIPES",
    "UNIFORM_DEVIATION",
    "FrozenConv2d",
    "Place",
    "ShiftConv2d",
    "make_layer",
    "make_masks",
    "perturbation_of",
    "set_masks",
]

#: Masks that are computed from a seed at any size and never stored.
RECIPES = ("uniform", "normal", "waves")

#: Every distribution of masks; those that are no recipes are held as tensors, of one size.
NOISES = (*RECIPES, "waves-shuffled", "constant", "uniform-continuous")

#: Standard deviation of a uniform mask, that is of the 256 values (2u - 255)/256: 0.57735 to five digits.
UNIFORM_DEVIATION = math.sqrt((256**2 - 1) / 3) / 256

#: Where batch normalisation stands: "before" the 1×1 and, by the network's own, after it (as juefeix2018 has it);
#: "after" it alone (paper, klachko2018); "before-only"; "none": neither the layer nor the network normalises there.
NORM_POSITIONS = ("before", "after", "before-only", "none")


@dataclass(frozen=True)
class Place:
    """A convolution of the network that an arm's layer replaces.

    Attributes:
        name: its qualified name.
        sizes: of the padded grids (height, width) that it works on, without repetition, in the order of the calls.
        norm: the name of the batch normalisation that reads its output; "" = none does.
    """

    name: str
    sizes: tuple[tuple[int, int], ...] = ()
    norm: str = ""


# --------------------------------------------------------------------------------------------------------------------
# Masks
# --------------------------------------------------------------------------------------------------------------------


def make_masks(
    noise: str, seed: int, channels: int, masks: int, height: int, width: int, *, shared: bool = False
) -> Tensor:
    """The masks of a seed, written out.

    Args:
        noise: one of ``NOISES``. "waves-shuffled" has the values of the seed's waves, map by map, at pixels drawn
            anew for each map and size; "constant" has in all of a map the value that the seed's uniform mask has at its
            first pixel; "uniform-continuous" is uniform over the floating-point numbers in [-1, 1).
        seed: an int in [-2**63, 2**64).
        channels: C.
        masks: M, masks per channel.
        height: rows.
        width: columns.
        shared: one set of masks for all channels.

    Returns:
        float32 [C or 1, M, height, width].

    Raises:
        ValueError: there is no such noise.

    Example:
        >>> waves, shuffled = (make_masks(kind, 1, 3, 2, 8, 8) for kind in ("waves", "waves-shuffled"))
        >>> torch.equal(waves, shuffled), torch.equal(waves.flatten(2).sort().values, shuffled.flatten(2).sort().values)
        (False, True)
    """
    if noise not in NOISES:
        raise ValueError(f"noise is {noise!r}, it should be one of {', '.join(map(repr, NOISES))}")
    signed = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])

    def written_out(recipe: str, *size: int) -> Tensor:
        return functional.perturbation_mask(signed, channels, masks, *size, shared_masks=shared, noise=recipe)

    if noise in RECIPES:
        return written_out(noise, height, width)
    rows = 1 if shared else channels
    if noise == "constant":
        return written_out("uniform", 1, 1).expand(rows, masks, height, width).contiguous()
    generator = torch.Generator().manual_seed(seed)
    if noise == "uniform-continuous":
        return 2 * torch.rand(rows, masks, height, width, generator=generator) - 1
    waves = written_out("waves", height, width).flatten(2)
    keys = torch.rand(waves.shape, generator=generator, dtype=torch.float64)
    return waves.gather(2, keys.argsort(dim=2, stable=True)).reshape(rows, masks, height, width)


def perturbation_of(layer: nn.Module) -> PerturbConv2d | None:
    """The part of a layer that adds masks; None where there is none, or where it adds nothing."""
    inner = layer.perturb if isinstance(layer, PerturbMixConv2d) else layer
    if not isinstance(inner, PerturbConv2d) or inner.noise is None or inner.level == 0:
        return None
    return inner


def set_masks(layer: nn.Module, noise: str, seed: int) -> None:
    """Gives a layer the masks of a seed in place of its own; a layer without masks stays as it is.

    Args:
        layer: one of ``make_layer``.
        noise: the noise that it was made with.
        seed: an int in [-2**63, 2**64).
    """
    inner = perturbation_of(layer)
    if inner is None:
        return
    if inner.mask_seed is not None:
        inner.reseed(seed)
        return
    mask = inner.mask
    assert mask is not None
    masks = make_masks(
        noise, seed, inner.in_channels, inner.masks, mask.shape[2], mask.shape[3], shared=inner.shared_masks
    )
    with torch.no_grad():
        mask.copy_(masks)


# --------------------------------------------------------------------------------------------------------------------
# Layers that share the PNN's learnable part
# --------------------------------------------------------------------------------------------------------------------


class FrozenConv2d(PerturbConv2d):
    """Fixed random filters in place of masks: convolution → activation → batch normalisation → learnable 1×1 → pooling.

    There are as many filters as input channels, so that it learns exactly what a PNN with one mask a channel learns.
    Their entries are normal, scaled so that a response keeps the input's variance. They run at every pixel, with zeros
    around the image; a stride pools afterwards, as in the PNN. (Learnable 1×1 products over frozen random filters:
    Gavrikov, Keuper, "Rethinking 1×1 Convolutions", 2023; sparse ternary filters are ``LBConv2d``.)

    Args:
        *arguments: as ``PerturbConv2d``.
        filters_seed: of the filters, an int in [-2**63, 2**64).
        depthwise: each filter reads its own channel alone, as each mask does.
        **options: activation, norm and downsample of ``PerturbConv2d``.

    Shape:
        Input [B, C, H, W], output [B, T, H', W'] as ``nn.Conv2d``.

    Attributes:
        filters: a buffer [C, C/groups, rows, columns], or [C, 1, rows, columns] where depthwise.

    Example:
        >>> layer = FrozenConv2d(4, 8, 3, 2, 1, filters_seed=0, norm=True)
        >>> layer(torch.zeros(1, 4, 9, 9)).shape, sum(p.numel() for p in layer.parameters()), layer.mask_bytes
        (torch.Size([1, 8, 5, 5]), 48, 576)
    """

    filters: Tensor

    def __init__(self, *arguments: Any, filters_seed: int, depthwise: bool = False, **options: Any) -> None:
        super().__init__(*arguments, noise=None, **options)
        self.filter_groups = self.in_channels if depthwise else self.groups
        size = (self.in_channels, self.in_channels // self.filter_groups, *self.kernel_size)
        generator = torch.Generator().manual_seed(filters_seed)
        filters = torch.randn(size, generator=generator) / math.sqrt(max(math.prod(size[1:]), 1))
        self.register_buffer("filters", filters.to(self.weight))

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output; see the class for shapes."""
        filters = self.filters.to(input.dtype)
        responses = F.conv2d(input, filters, None, 1, "same", self.dilation, self.filter_groups)
        return super().forward(responses)

    def multiply_adds(self, height: int, width: int) -> int:
        """Multiply-adds for one image, of the fixed filters and of the 1×1 product."""
        return height * width * self.filters.numel() + super().multiply_adds(height, width)

    @property
    def mask_bytes(self) -> int:
        """Bytes of fixed filters."""
        return self.filters.numel() * self.filters.element_size()


class ShiftConv2d(PerturbConv2d):
    """Moved channels in place of masks: shift → activation → batch normalisation → learnable 1×1 → pooling.

    The channels are divided into as many groups as the kernel has places; the channels of a group move by its place's
    distance from the middle, zeros come in at the edge, and the channels left over stay. Nothing is learnt or stored
    for that. (Wu et al., "Shift: A Zero FLOP, Zero Parameter Alternative to Spatial Convolutions", CVPR 2018.)

    Args:
        *arguments: as ``PerturbConv2d``.
        **options: activation, norm and downsample of ``PerturbConv2d``.

    Shape:
        Input [B, C, H, W], output [B, T, H', W'] as ``nn.Conv2d``.

    Example:
        >>> layer = ShiftConv2d(9, 8, 3, 1, 1, norm=True)
        >>> layer.distances[0], layer.distances[8], layer(torch.zeros(1, 9, 6, 6)).shape
        ((-1, -1), (1, 1), torch.Size([1, 8, 6, 6]))
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, noise=None, **options)
        steps = [
            [self.dilation[axis] * (place - (size - 1) // 2) for place in range(size)]
            for axis, size in enumerate(self.kernel_size)
        ]
        moves = [(rows, columns) for rows in steps[0] for columns in steps[1]]
        each = self.in_channels // len(moves)
        #: For each channel (rows, columns): what it reads lies so far below and to the right.
        self.distances: tuple[tuple[int, int], ...] = tuple(
            moves[channel // each] if each and channel < each * len(moves) else (0, 0)
            for channel in range(self.in_channels)
        )

    def shifted(self, input: Tensor) -> Tensor:
        """The input with every channel moved."""
        height, width = input.shape[-2:]
        parts, first = [], 0
        while first < self.in_channels:
            rows, columns = self.distances[first]
            last = first
            while last < self.in_channels and self.distances[last] == (rows, columns):
                last += 1
            part = F.pad(input[..., first:last, :, :], [abs(columns)] * 2 + [abs(rows)] * 2)
            top, left = abs(rows) + rows, abs(columns) + columns
            parts.append(part[..., top : top + height, left : left + width])
            first = last
        return torch.cat(parts, dim=-3)

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output; see the class for shapes."""
        return super().forward(self.shifted(input))


# --------------------------------------------------------------------------------------------------------------------
# The kinds
# --------------------------------------------------------------------------------------------------------------------


def _geometry(convolution: nn.Conv2d) -> tuple[Any, ...]:
    """A convolution's arguments, in the order that our layers share with it."""
    return (
        convolution.in_channels,
        convolution.out_channels,
        convolution.kernel_size,
        convolution.stride,
        convolution.padding,
        convolution.dilation,
        convolution.groups,
        convolution.bias is not None,
        convolution.padding_mode,
        convolution.weight.device,
        convolution.weight.dtype,
    )


def _one_size(place: Place, why: str) -> tuple[int, int]:
    if len(place.sizes) != 1:
        found = ", ".join(f"{height}×{width}" for height, width in place.sizes) or "none: no image reaches it"
        raise ValueError(f"{why} have one size, and the layer works on several ({found})")
    return place.sizes[0]


def _perturb(
    convolution: nn.Conv2d,
    place: Place,
    seed: int,
    train_masks: bool,
    *,
    preset: str | None = None,
    noise: str | None = None,
    norm: bool | str | None = None,
    **options: Any,
) -> nn.Module:
    """The PNN's layer, with any of ``NOISES``."""
    if norm is not None:
        options["norm"] = _normalises(norm)
    if noise is not None and noise not in NOISES:
        raise ValueError(f"noise is {noise!r}, it should be one of {', '.join(map(repr, NOISES))}")
    if noise in RECIPES:
        options["noise"] = noise
    chosen = layer_options(preset, **options)
    silent = chosen.get("level") == 0
    if noise is not None and noise not in RECIPES and not silent:
        masks, shared = chosen.get("masks", 1), chosen.get("shared_masks", False)
        size = _one_size(place, f"masks of the kind {noise}")
        mask = make_masks(noise, seed, convolution.in_channels, masks, *size, shared=shared)
        return build_perturbation(*_geometry(convolution), mask=mask, train_masks=train_masks, **chosen)
    if train_masks and not silent:
        chosen.update(mask_size=_one_size(place, "trained masks"), train_masks=True)
    return build_perturbation(*_geometry(convolution), seed=seed, **chosen)


def _normalises(position: bool | str) -> bool:
    """Whether the layer itself normalises, for one of ``NORM_POSITIONS``."""
    if isinstance(position, bool):
        return position
    if position not in NORM_POSITIONS:
        raise ValueError(f"norm is {position!r}, it should be one of {', '.join(map(repr, NORM_POSITIONS))}")
    return position in ("before", "before-only")


def _conv1x1(
    convolution: nn.Conv2d, place: Place, seed: int, train_masks: bool, *, downsample: str = "max"
) -> nn.Module:
    """Without masks and with the identity as activation the PNN's layer is a 1×1 convolution."""
    return PerturbConv2d(*_geometry(convolution), noise=None, activation="identity", downsample=downsample)


def _lbc(
    convolution: nn.Conv2d,
    place: Place,
    seed: int,
    train_masks: bool,
    *,
    anchors: int | None = None,
    sparsity: float = 0.5,
    activation: str = "relu",
) -> nn.Module:
    """The layer of local binary convolutional networks."""
    if convolution.groups != 1:
        raise ValueError(f"groups is {convolution.groups}, it should be 1 for the layer 'lbc'")
    if convolution.padding_mode != "zeros":
        raise ValueError(f"padding_mode is {convolution.padding_mode!r}, it should be 'zeros' for the layer 'lbc'")
    inputs, outputs, kernel, stride, padding, dilation, _, bias, _, device, dtype = _geometry(convolution)
    return LBConv2d(
        inputs,
        outputs,
        kernel,
        stride,
        padding,
        dilation,
        bias,
        anchors=anchors,
        sparsity=sparsity,
        activation=activation,
        seed=seed,
        device=device,
        dtype=dtype,
    )


def _frozen(
    convolution: nn.Conv2d,
    place: Place,
    seed: int,
    train_masks: bool,
    *,
    activation: str = "relu",
    norm: bool | str = True,
    downsample: str = "max",
    depthwise: bool = False,
) -> nn.Module:
    """Fixed random filters, then the PNN's learnable part."""
    return FrozenConv2d(
        *_geometry(convolution),
        filters_seed=seed,
        depthwise=depthwise,
        activation=activation,
        norm=_normalises(norm),
        downsample=downsample,
    )


def _shift(
    convolution: nn.Conv2d,
    place: Place,
    seed: int,
    train_masks: bool,
    *,
    activation: str = "relu",
    norm: bool | str = True,
    downsample: str = "max",
) -> nn.Module:
    """Moved channels, then the PNN's learnable part."""
    return ShiftConv2d(*_geometry(convolution), activation=activation, norm=_normalises(norm), downsample=downsample)


def _separable(convolution: nn.Conv2d, place: Place, seed: int, train_masks: bool) -> nn.Module:
    """Depthwise, normalisation, ReLU, 1×1: MobileNet's block, Howard et al. 2017 (arXiv 1704.04861).

    What follows the convolution in the network follows the 1×1 here.
    """
    inputs, outputs, kernel, stride, padding, dilation, groups, bias, mode, device, dtype = _geometry(convolution)
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, kernel, stride, padding, dilation, inputs, False, mode, device, dtype),
        nn.BatchNorm2d(inputs, device=device, dtype=dtype),
        nn.ReLU(),
        nn.Conv2d(inputs, outputs, 1, groups=groups, bias=bias, device=device, dtype=dtype),
    )


#: Every kind of layer by its name: a function of the convolution, its place, a seed for what stays fixed, whether masks
#: are trained, and the kind's options. "conv" leaves the convolution.
LAYERS: Mapping[str, Callable[..., nn.Module]] = {
    "conv": lambda convolution, place, seed, train_masks: convolution,
    "perturb": _perturb,
    "conv1x1": _conv1x1,
    "lbc": _lbc,
    "frozen-conv": _frozen,
    "shift": _shift,
    "separable": _separable,
}


def make_layer(
    kind: str,
    convolution: nn.Conv2d,
    place: Place,
    *,
    seed: int,
    train_masks: bool = False,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The layer that stands in a convolution's place.

    Args:
        kind: a key of ``LAYERS``.
        convolution: what it replaces; it stays as it is.
        place: where it stands.
        seed: of masks and fixed filters.
        train_masks: whether masks are learnt.
        options: of the kind: ``presets.LAYER_OPTIONS`` and "preset" for "perturb", whose noise may be any of ``NOISES``
            and whose norm one of ``NORM_POSITIONS``; anchors, sparsity, activation for "lbc"; downsample for "conv1x1";
            activation, norm, downsample for "shift" and "frozen-conv", for this depthwise too.

    Raises:
        TypeError: an option does not belong to the kind.
        ValueError: the kind is unknown, an option's value is refused, or the layer would need masks of several sizes.

    Example:
        >>> convolution = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        >>> for kind in LAYERS:
        ...     layer = make_layer(kind, convolution, Place("layer1", ((8, 8),)), seed=0)
        ...     print(kind, list(layer(torch.zeros(2, 16, 8, 8)).shape), sum(p.numel() for p in layer.parameters()))
        conv [2, 32, 4, 4] 4608
        perturb [2, 32, 4, 4] 512
        conv1x1 [2, 32, 4, 4] 512
        lbc [2, 32, 4, 4] 1024
        frozen-conv [2, 32, 4, 4] 544
        shift [2, 32, 4, 4] 544
        separable [2, 32, 4, 4] 688
    """
    if kind not in LAYERS:
        raise ValueError(f"layer is {kind!r}, it should be one of {', '.join(map(repr, LAYERS))}")
    try:
        return LAYERS[kind](convolution, place, seed, train_masks, **(options or {}))
    except TypeError as error:
        # Python's own words for a keyword too much name the function, which means nothing to who wrote the option.
        words = str(error)
        if "unexpected keyword argument" in words:
            words = f"option {words.rpartition(' ')[2]} doesn't belong to the layer {kind!r}"
        raise TypeError(words) from error
