"""Networks whose inner layers are perturbations, convolutions, LBC modules or plain 1x1 products, and what they cost.

Every network here takes `layer="perturb" | "conv" | "lbc" | "conv1x1"` and is otherwise the same: the stem's first
convolution, the shortcuts and the classifier stay what they are, so that networks differ in the one thing that is
compared. `costs` counts what a network learns, stores and multiplies; `match_width` narrows one to a budget.

Sources: ResNets, He et al., CVPR 2016 (arXiv 1512.03385), with the perturbation modules of Juefei-Xu et al., CVPR 2018
(arXiv 1806.01817; the authors' code, github.com/juefeix/pnn.pytorch, models/naiveresnet.py). lenet and cifarnet are
small plain networks of three and six inner layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .blocks import PerturbBasicBlock, PerturbBottleneck
from .convert import _check_seed, layer_seed
from .layers import LAYERS, make_layer
from .modules import LBConv2d, PerturbConv2d
from .presets import layer_options
from .summary import summary

__all__ = [
    "Costs",
    "LayerCosts",
    "ResNet",
    "cifarnet",
    "costs",
    "lenet",
    "match_width",
    "noise_resnet18",
    "noise_resnet34",
    "noise_resnet50",
    "noise_resnet101",
    "noise_resnet152",
]


@dataclass(frozen=True)
class LayerCosts:
    """What one layer costs.

    Attributes:
        name: Its qualified name in the model.
        kind: Its class.
        parameters: Learnable numbers of its own (without its children's).
        mask_bytes: Bytes of fixed masks and filters that it stores; 8 (the seed) for a mask by recipe.
        macs: Multiply-adds for one image.
    """

    name: str
    kind: str
    parameters: int
    mask_bytes: int
    macs: int


@dataclass(frozen=True)
class Costs:
    """What a model costs; `str()` of it is a table.

    Attributes:
        parameters: Learnable numbers (those with `requires_grad`), shared ones once.
        mask_bytes: Bytes of fixed masks and filters that are stored; a mask by recipe counts as its 8-byte seed.
        macs: Multiply-adds of products for one image: of convolutions, linear and perturbation layers, attention.
        layers: A row for each layer that costs anything, in the order of registration.
    """

    parameters: int
    mask_bytes: int
    macs: int
    layers: tuple[LayerCosts, ...]

    def __str__(self) -> str:
        table = [("layer", "kind", "parameters", "mask bytes", "multiply-adds")]
        table += [
            (row.name, row.kind, f"{row.parameters:,}", f"{row.mask_bytes:,}", f"{row.macs:,}") for row in self.layers
        ]
        table.append(("sum", "", f"{self.parameters:,}", f"{self.mask_bytes:,}", f"{self.macs:,}"))
        widths = [max(len(line[column]) for line in table) for column in range(5)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in table
        )


class ResNet(nn.Module):
    """A residual network of He et al. with a chosen kind of inner layer.

    Args:
        block: `PerturbBasicBlock` or `PerturbBottleneck`.
        depths: Blocks in each of the four stages.
        num_classes: Outputs of the classifier.
        in_channels: Channels of the image.
        width: Channels of the first stage; the others have two, four and eight times as many. It may be a fraction,
            6.25 say; each stage then has the nearest whole number, 6, 13, 25 and 50.
        stem: "cifar" (3x3 convolution) or "imagenet" (7x7 convolution of stride 2, then 3x3 max pooling of stride 2).
        layer: Kind of the blocks' inner layers.
        seed: Seed of the whole network's masks; each layer's is derived from it and the layer's name (`layer_seed`).
        **options: The layers' options.

    Shape:
        Input [B, in_channels, H, W] of any size, output [B, num_classes].
    """

    def __init__(
        self,
        block: type[PerturbBasicBlock] | type[PerturbBottleneck],
        depths: Sequence[int],
        num_classes: int,
        *,
        in_channels: int,
        width: float,
        stem: str,
        layer: str,
        seed: int | None,
        **options: Any,
    ) -> None:
        super().__init__()
        _check_positive(num_classes=num_classes, in_channels=in_channels)
        first = _channels(width)
        if stem == "cifar":
            self.stem = nn.Sequential(
                nn.Conv2d(in_channels, first, 3, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU()
            )
        elif stem == "imagenet":
            self.stem = nn.Sequential(
                nn.Conv2d(in_channels, first, 7, stride=2, padding=3, bias=False),
                nn.BatchNorm2d(first),
                nn.ReLU(),
                nn.MaxPool2d(3, stride=2, padding=1),
            )
        else:
            raise ValueError(f"stem is {stem!r}, should be 'cifar' or 'imagenet'")
        channels = first
        stages = []
        for stage, depth in enumerate(depths):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                planes = _channels(width, 2**stage)
                blocks.append(block(channels, planes, stride, layer=layer, **options))
                channels = planes * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        _seed_layers(self, seed)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The classes' scores."""
        x = self.stem(input)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.classifier(torch.flatten(self.pool(x), 1))


class PlainNet(nn.Module):
    """A chain of inner layers with normalisation and pooling between them: `lenet` and `cifarnet`.

    Args:
        num_classes: Outputs of the classifier.
        in_channels: Channels of the image.
        width: Channels of the stem; it may be a fraction, then each layer has the nearest whole number.
        plan: For each inner layer the multiple of `width` that it has, and "pool" where the image is halved.
        layer: Kind of the inner layers.
        seed: Seed of the whole network's masks.
        **options: The layers' options.

    Shape:
        Input [B, in_channels, H, W] of any size, output [B, num_classes].
    """

    def __init__(
        self,
        num_classes: int,
        *,
        in_channels: int,
        width: float,
        plan: Sequence[int | str],
        layer: str,
        seed: int | None,
        **options: Any,
    ) -> None:
        super().__init__()
        _check_positive(num_classes=num_classes, in_channels=in_channels)
        first = _channels(width)
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, first, 3, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU()
        )
        steps: list[nn.Module] = []
        channels = first
        for step in plan:
            if step == "pool":
                steps.append(nn.MaxPool2d(2, ceil_mode=True))
                continue
            planes = _channels(width, int(step))
            steps.append(make_layer(layer, channels, planes, 3, padding=1, bias=False, **options))
            steps += [nn.BatchNorm2d(planes), nn.ReLU()]
            channels = planes
        self.features = nn.Sequential(*steps)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Linear(4 * channels, num_classes)
        _seed_layers(self, seed)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The classes' scores."""
        x = self.features(self.stem(input))
        return self.classifier(torch.flatten(self.pool(x), 1))


def lenet(
    num_classes: int = 10,
    *,
    in_channels: int = 1,
    width: float = 32,
    layer: str = "perturb",
    preset: str | None = None,
    seed: int | None = None,
    **options: Any,
) -> PlainNet:
    """A small network for small grey images (8x8 digits, 28x28 MNIST): a stem and three inner layers.

    Stem, layer, pool, layer (twice as wide), pool, layer; average pooling to 2x2; linear classifier.

    Args:
        num_classes: Outputs of the classifier.
        in_channels: Channels of the image.
        width: Channels of the stem and of the first inner layer; a fraction (6.25) is rounded for each layer.
        layer: "perturb", "conv" (3x3), "lbc" or "conv1x1".
        preset: For "perturb", a published variant's name: "paper", "juefeix2018" or "klachko2018".
        seed: From it and the layers' names the seeds of masks and fixed filters are derived, as `torch_pnn.convert`
            does; None draws them from PyTorch's default generator.
        **options: Options of the inner layers: `torch_pnn.presets.LAYER_OPTIONS` for "perturb"; anchors, sparsity and
            activation for "lbc"; downsample for "conv1x1". Trained masks have a size for each layer, which comes from
            an image: `convert(<the network with layer="conv">, train_masks=True, example_input=image)`.

    Returns:
        The network: input [B, in_channels, H, W] of any size from 1x1 up, output [B, num_classes].

    Raises:
        ValueError: A number isn't positive, `layer` or `preset` is unknown, an option's value is refused.
        TypeError: An option doesn't belong to this kind of layer.

    Examples:
        >>> net = lenet(width=8, layer="perturb", preset="juefeix2018", seed=0)
        >>> net(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    options = _options(layer, preset, options)
    plan = (1, "pool", 2, "pool", 2)
    return PlainNet(num_classes, in_channels=in_channels, width=width, plan=plan, layer=layer, seed=seed, **options)


def cifarnet(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    width: float = 64,
    layer: str = "perturb",
    preset: str | None = None,
    seed: int | None = None,
    **options: Any,
) -> PlainNet:
    """A plain network for 32x32 colour images: a stem and six inner layers in three stages.

    Stem, two layers, pool, two layers (twice as wide), pool, two layers (four times); average pooling to 2x2; linear
    classifier.

    Args:
        num_classes: Outputs of the classifier.
        in_channels: Channels of the image.
        width: Channels of the stem and of the first stage; a fraction (6.25) is rounded for each stage.
        layer: As `lenet`.
        preset: As `lenet`.
        seed: As `lenet`.
        **options: As `lenet`.

    Returns:
        The network: input [B, in_channels, H, W] of any size from 1x1 up, output [B, num_classes].

    Raises:
        ValueError: As `lenet`.
        TypeError: As `lenet`.

    Examples:
        >>> cifarnet(width=4, layer="conv")(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    options = _options(layer, preset, options)
    plan = (1, 1, "pool", 2, 2, "pool", 4, 4)
    return PlainNet(num_classes, in_channels=in_channels, width=width, plan=plan, layer=layer, seed=seed, **options)


def noise_resnet18(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    width: float = 64,
    stem: str = "cifar",
    layer: str = "perturb",
    preset: str | None = None,
    seed: int | None = None,
    **options: Any,
) -> ResNet:
    """ResNet-18 with a chosen kind of inner layer; see `torch_pnn.models`.

    Args:
        num_classes: Outputs of the classifier.
        in_channels: Channels of the image.
        width: Channels of the first stage; 64 is He et al.'s.
        stem: "cifar" (3x3, no pooling) or "imagenet" (7x7 of stride 2 and max pooling).
        layer: "perturb", "conv" (3x3), "lbc" or "conv1x1".
        preset: For "perturb", a published variant's name: "paper", "juefeix2018" or "klachko2018".
        seed: From it and the layers' names the seeds of masks and fixed filters are derived, as `torch_pnn.convert`
            does; None draws them from PyTorch's default generator.
        **options: Options of the inner layers: `torch_pnn.presets.LAYER_OPTIONS` for "perturb"; anchors, sparsity and
            activation for "lbc"; downsample for "conv1x1". Trained masks have a size for each layer, which comes from
            an image: `convert(<the network with layer="conv">, train_masks=True, example_input=image)`.

    Returns:
        The network: input [B, in_channels, H, W] of any size, output [B, num_classes].

    Raises:
        ValueError: A number isn't positive, `stem`, `layer` or `preset` is unknown, an option's value is refused.
        TypeError: An option doesn't belong to this kind of layer.

    Examples:
        >>> net = noise_resnet18(width=4, preset="paper", masks=2, seed=1)
        >>> net(torch.zeros(1, 3, 16, 16)).shape
        torch.Size([1, 10])
    """
    return _resnet(PerturbBasicBlock, (2, 2, 2, 2), num_classes, in_channels, width, stem, layer, preset, seed, options)


def noise_resnet34(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    width: float = 64,
    stem: str = "cifar",
    layer: str = "perturb",
    preset: str | None = None,
    seed: int | None = None,
    **options: Any,
) -> ResNet:
    """ResNet-34 with a chosen kind of inner layer; arguments, result and errors as `noise_resnet18`."""
    return _resnet(PerturbBasicBlock, (3, 4, 6, 3), num_classes, in_channels, width, stem, layer, preset, seed, options)


def noise_resnet50(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    width: float = 64,
    stem: str = "cifar",
    layer: str = "perturb",
    preset: str | None = None,
    seed: int | None = None,
    **options: Any,
) -> ResNet:
    """ResNet-50 with a chosen kind of inner layer; arguments, result and errors as `noise_resnet18`."""
    return _resnet(PerturbBottleneck, (3, 4, 6, 3), num_classes, in_channels, width, stem, layer, preset, seed, options)


def noise_resnet101(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    width: float = 64,
    stem: str = "cifar",
    layer: str = "perturb",
    preset: str | None = None,
    seed: int | None = None,
    **options: Any,
) -> ResNet:
    """ResNet-101 with a chosen kind of inner layer; arguments, result and errors as `noise_resnet18`."""
    return _resnet(
        PerturbBottleneck, (3, 4, 23, 3), num_classes, in_channels, width, stem, layer, preset, seed, options
    )


def noise_resnet152(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    width: float = 64,
    stem: str = "cifar",
    layer: str = "perturb",
    preset: str | None = None,
    seed: int | None = None,
    **options: Any,
) -> ResNet:
    """ResNet-152 with a chosen kind of inner layer; arguments, result and errors as `noise_resnet18`."""
    return _resnet(
        PerturbBottleneck, (3, 8, 36, 3), num_classes, in_channels, width, stem, layer, preset, seed, options
    )


def _resnet(
    block: type[PerturbBasicBlock] | type[PerturbBottleneck],
    depths: Sequence[int],
    num_classes: int,
    in_channels: int,
    width: float,
    stem: str,
    layer: str,
    preset: str | None,
    seed: int | None,
    options: dict[str, Any],
) -> ResNet:
    return ResNet(
        block,
        depths,
        num_classes,
        in_channels=in_channels,
        width=width,
        stem=stem,
        layer=layer,
        seed=seed,
        **_options(layer, preset, options),
    )


def costs(model: nn.Module, input_size: Sequence[int]) -> Costs:
    """Counts what a model learns, stores as fixed masks or filters, and multiplies for one image.

    The part of `torch_pnn.summary` that the studies compare: that function says what is counted, and counts more.

    Args:
        model: The model.
        input_size: The image's (channels, height, width).

    Returns:
        The counts, in sum and per layer.

    Raises:
        TypeError: `model` isn't an `nn.Module`.
        ValueError: `input_size` isn't three non-negative ints, or such an image doesn't run through the model.

    Examples:
        >>> counted = costs(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(512, 10)), (3, 8, 8))
        >>> counted.parameters, counted.mask_bytes, counted.macs
        (5354, 0, 18944)
        >>> print(counted)
        layer  kind    parameters  mask bytes  multiply-adds
        0      Conv2d         224           0         13,824
        2      Linear       5,130           0          5,120
        sum                 5,354           0         18,944
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}, should be an nn.Module")
    size = tuple(input_size) if isinstance(input_size, Sequence) else input_size
    if (
        not isinstance(size, tuple)
        or len(size) != 3
        or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in size)
    ):
        raise ValueError(f"input_size is {input_size!r}, should be (channels, height, width)")
    counted = summary(model, size)
    rows = [
        LayerCosts(row.name, row.kind, row.parameters, row.mask_bytes, row.multiply_adds)
        for row in counted.rows
        if row.parameters or row.mask_bytes or row.multiply_adds
    ]
    return Costs(counted.parameters, counted.mask_bytes, counted.multiply_adds, tuple(rows))


def match_width(
    build: Callable[[int], nn.Module],
    target_parameters: int,
    *,
    minimum: int = 1,
    maximum: int = 4096,
    count: Callable[[nn.Module], int] | None = None,
) -> int:
    """The width at which a network's learnable parameters, or another cost of it, come nearest to a budget.

    The count must grow with the width. PyTorch's default generator is left as it was.

    Args:
        build: Makes the network of a width.
        target_parameters: The budget: learnable numbers, or what `count` counts.
        minimum: The least width to consider.
        maximum: The greatest.
        count: What is to be met, of a network, in place of its learnable parameters: multiply-adds, say.

    Returns:
        The width; the smaller one of two that are equally near.

    Raises:
        TypeError: `build` or `count` isn't callable.
        ValueError: `target_parameters` isn't positive, `minimum` and `maximum` aren't 1 <= minimum <= maximum.

    Examples:
        >>> pnn = lenet(width=16, layer="perturb")
        >>> budget = sum(p.numel() for p in pnn.parameters())
        >>> match_width(lambda width: lenet(width=width, layer="conv"), budget)
        7
        >>> macs = lambda network: costs(network, (1, 8, 8)).macs
        >>> match_width(lambda width: lenet(width=width, layer="conv"), macs(pnn), count=macs)
        6
    """
    if not callable(build):
        raise TypeError(f"build is {build!r}, should be a function that makes a network of a width")
    if count is not None and not callable(count):
        raise TypeError(f"count is {count!r}, should be a function of a network or None")
    if not target_parameters > 0:
        raise ValueError(f"target_parameters is {target_parameters!r}, should be positive")
    if not 1 <= minimum <= maximum:
        raise ValueError(f"minimum and maximum are {minimum!r} and {maximum!r}, should be 1 <= minimum <= maximum")

    counted: dict[int, int] = {}

    def cost(width: int) -> int:
        if width not in counted:
            with torch.random.fork_rng(devices=[]):
                model = build(width)
                if count is None:
                    counted[width] = sum(p.numel() for p in model.parameters() if p.requires_grad)
                else:
                    counted[width] = count(model)
        return counted[width]

    # Double until the budget is reached, so that no network much larger than it is ever built; then bisect.
    low = high = minimum
    while cost(high) < target_parameters and high < maximum:
        low, high = high, min(2 * high, maximum)
    while high - low > 1:
        middle = (low + high) // 2
        if cost(middle) < target_parameters:
            low = middle
        else:
            high = middle
    return min((low, high), key=lambda width: (abs(cost(width) - target_parameters), width))


def _check_positive(**numbers: Any) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, should be a positive int")


def _channels(width: Any, times: int = 1) -> int:
    """The whole number of channels nearest to a multiple of the width, at least 1."""
    if isinstance(width, bool) or not isinstance(width, (int, float)) or not 0 < width < math.inf:
        raise ValueError(f"width is {width!r}, should be a positive number")
    return max(1, math.floor(width * times + 0.5))


def _options(layer: str, preset: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """The inner layers' options: for a perturbation a preset's and the given ones over them, checked."""
    if layer not in LAYERS:
        raise ValueError(f"layer is {layer!r}, should be one of {', '.join(map(repr, LAYERS))}")
    if layer == "perturb":
        return layer_options(preset, **options)
    if preset is not None:
        raise ValueError(f"preset is {preset!r}, which is for layer='perturb', and layer is {layer!r}")
    return options


def _seed_layers(model: nn.Module, seed: int | None) -> None:
    """Gives each layer with masks or fixed filters the seed that belongs to its name."""
    if seed is None:
        return
    _check_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, (PerturbConv2d, LBConv2d)):
            module.reseed(layer_seed(seed, name))
