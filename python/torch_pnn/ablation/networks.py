"""The networks that arms' layers stand in, and which of their convolutions an arm replaces.

A network is made with its ordinary convolutions, the same for every arm; then the arm's layers take the places of some
of them. ``torch_pnn.convert``'s own rules say which: not the stem, not 1×1, depthwise or transposed convolutions, none
whose weight other code reads. So the arms differ in exactly the same places, and everything else of the network starts
from the same bits in all of them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_pnn import models
from torch_pnn.blocks import PerturbBasicBlock
from torch_pnn.conversion.swap import swap
from torch_pnn.conversion.trace import padded_size
from torch_pnn.convert import convert

from .errors import AblationError, UsageError, require
from .layers import Place

__all__ = ["NETWORKS", "Network", "example_of", "find_network", "find_places", "replace"]


@dataclass(frozen=True)
class Network:
    """A network of the studies.

    Attributes:
        name: what the study calls it.
        make: a function of the number of classes, in_channels, image_size, width (None = its own) and options, that
            returns the network with its convolutions.
        widths: into how many parts a channel of the width may be divided; 0 = the width can't be chosen, so that it
            can't be matched to another's cost.
        detects: whether it is a detector, which takes lists of images.
    """

    name: str
    make: Callable[..., nn.Module]
    widths: int = 1
    detects: bool = False


# --------------------------------------------------------------------------------------------------------------------
# Our own
# --------------------------------------------------------------------------------------------------------------------


def _small_resnet(classes: int, **options: Any) -> nn.Module:
    """A residual network of six inner layers for small images: three stages, the second and third of half the size."""
    defaults = {"width": 16, "stem": "cifar", "seed": None}
    return models.ResNet(PerturbBasicBlock, (1, 1, 1, 0), classes, **{**defaults, **options})


def _own(
    function: Callable[..., nn.Module],
    classes: int,
    *,
    in_channels: int,
    image_size: tuple[int, int],
    width: float | None,
    stem_stride: int = 1,
    **options: Any,
) -> nn.Module:
    """One of ``torch_pnn.models`` with its convolutions; ``stem_stride`` makes everything behind the stem smaller."""
    if isinstance(stem_stride, bool) or not isinstance(stem_stride, int) or stem_stride < 1:
        raise ValueError(f"stem_stride is {stem_stride!r}, it should be a positive int")
    if width is not None:
        options["width"] = width
    model: Any = function(classes, in_channels=in_channels, layer="conv", **options)
    first = model.stem[0]
    first.stride = (first.stride[0] * stem_stride, first.stride[1] * stem_stride)
    return model


_OWN = {"resnet": _small_resnet} | {
    name: getattr(models, name)
    for name in (
        "lenet",
        "cifarnet",
        "noise_resnet18",
        "noise_resnet34",
        "noise_resnet50",
        "noise_resnet101",
        "noise_resnet152",
    )
}


# --------------------------------------------------------------------------------------------------------------------
# torchvision's
# --------------------------------------------------------------------------------------------------------------------


def _colours(name: str, in_channels: int) -> None:
    if in_channels != 3:
        raise ValueError(f"the network {name} takes images of 3 channels, and these have {in_channels}")


def _torchvision_classifier(
    name: str, classes: int, *, in_channels: int, image_size: tuple[int, int], width: float | None, **options: Any
) -> nn.Module:
    _colours(name, in_channels)
    return _torchvision(name).models.get_model(name, weights=None, num_classes=classes, **options)


def _torchvision_detector(
    name: str, classes: int, *, in_channels: int, image_size: tuple[int, int], width: float | None, **options: Any
) -> nn.Module:
    """A detector with random weights; one class more than the data has: torchvision counts the background."""
    _colours(name, in_channels)
    get_model = _torchvision(name).models.get_model
    return get_model(name, weights=None, weights_backbone=None, num_classes=classes + 1, **options)


def _small_detector(
    name: str, classes: int, *, in_channels: int, image_size: tuple[int, int], width: float | None, **options: Any
) -> nn.Module:
    """Faster R-CNN or RetinaNet on a ResNet-18 with a feature pyramid, at the images' own size."""
    _colours(name, in_channels)
    detection = _torchvision(name).models.detection
    backbone = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=5, norm_layer=nn.BatchNorm2d
    )
    kind = detection.FasterRCNN if name.startswith("fasterrcnn") else detection.RetinaNet
    sizes = {"min_size": min(image_size), "max_size": max(image_size)}
    return kind(backbone, num_classes=classes + 1, **{**sizes, **options})


_SMALL_DETECTORS = ("fasterrcnn_resnet18_fpn", "retinanet_resnet18_fpn")


def _torchvision(name: str) -> Any:
    torchvision = require("torchvision", "torchvision", f"the network {name}")
    importlib.import_module("torchvision.models.detection")
    return torchvision


def _find_torchvision(name: str) -> Network | None:
    if name in _SMALL_DETECTORS:
        return Network(name, functools.partial(_small_detector, name), widths=0, detects=True)
    try:
        models_of = _torchvision(name).models
    except AblationError:
        return None
    if name in models_of.list_models(module=models_of.detection):
        return Network(name, functools.partial(_torchvision_detector, name), widths=0, detects=True)
    if name in models_of.list_models(module=models_of):
        return Network(name, functools.partial(_torchvision_classifier, name), widths=0)
    return None


# --------------------------------------------------------------------------------------------------------------------
# Somebody's own
# --------------------------------------------------------------------------------------------------------------------


def _words(error: Exception) -> str:
    """An error of code that isn't ours, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextlib.contextmanager
def _working_directory_first() -> Iterator[None]:
    """Modules of the working directory can be imported, as with ``python -m``."""
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = before


def _find_function(name: str) -> Network:
    """The network of ``module:function``.

    Raises:
        UsageError: the module can't be imported or has no such function.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"network {name!r} should be module:function")
    try:
        with _working_directory_first():
            found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise UsageError(
            f"network {name!r}: the module {module_name} can't be imported from the working directory or the path "
            f"({_words(error)})"
        ) from error
    for part in attribute.split("."):
        found = getattr(found, part, None)
        if found is None:
            raise UsageError(f"network {name!r}: the module {module_name} has no {attribute}")
    if not callable(found):
        raise UsageError(f"network {name!r} is of type {type(found).__name__}, it should be a function")
    try:
        parameters: Mapping[str, inspect.Parameter] = inspect.signature(found).parameters
    except (TypeError, ValueError) as error:
        raise UsageError(f"network {name!r}: its arguments can't be seen ({error}); wrap it in a function") from error

    def make(
        classes: int, *, in_channels: int, image_size: tuple[int, int], width: float | None, **options: Any
    ) -> nn.Module:
        given = {"in_channels": in_channels, "image_size": image_size}
        if width is not None:
            given["width"] = width
        model = found(classes, **{k: v for k, v in given.items() if k in parameters}, **options)
        if not isinstance(model, nn.Module):
            raise TypeError(f"it returned {type(model).__name__}, it should return an nn.Module")
        return model

    if not parameters:
        raise UsageError(f"network {name!r} takes no argument, it should take the number of classes")
    return Network(name, make, widths=int("width" in parameters))


# --------------------------------------------------------------------------------------------------------------------
# By name
# --------------------------------------------------------------------------------------------------------------------

#: Our own networks by name. Further ones: torchvision's by their names, and ``module:function``.
NETWORKS: dict[str, Network] = {
    name: Network(name, functools.partial(_own, function), widths=8) for name, function in _OWN.items()
}


def find_network(name: str) -> Network:
    """A network by its name.

    Args:
        name: a key of ``NETWORKS``; a classifier or detector of torchvision; or ``module:function``, somebody's own: a
            function of the number of classes, which gets in_channels, image_size (rows, columns) and width too where it
            has parameters of these names, and the study's options.

    Raises:
        UsageError: there is none.

    Example:
        >>> find_network("resnet").widths
        8
    """
    if name in NETWORKS:
        return NETWORKS[name]
    if ":" in name:
        return _find_function(name)
    network = _find_torchvision(name)
    if network is None:
        raise UsageError(
            f"unknown network {name!r}; there is: {', '.join(NETWORKS)}, module:function, and torchvision's, "
            f"{', '.join(_SMALL_DETECTORS)} among them, where torchvision is installed"
        )
    return network


def example_of(network: Network, image_shape: tuple[int, int, int]) -> tuple[Any, ...]:
    """What the network is called with: arguments with one image of noise."""
    image = torch.rand(image_shape, generator=torch.Generator().manual_seed(0))
    return ([image],) if network.detects else (image[None],)


def make_network(
    name: str, classes: int, image_shape: tuple[int, int, int], width: float, options: Mapping[str, Any]
) -> nn.Module:
    """The network with its convolutions; draws from PyTorch's default generator.

    Raises:
        UsageError: it can't be made, in its own words.
    """
    network = find_network(name)
    chosen = int(width) if width == int(width) else width
    try:
        return network.make(
            classes,
            in_channels=image_shape[0],
            image_size=image_shape[1:],
            width=chosen if chosen and network.widths else None,
            **options,
        )
    except AblationError:
        raise
    except Exception as error:
        raise UsageError(f"network {name!r} can't be made ({_words(error)})") from error


@dataclass(frozen=True)
class Places:
    """Which convolutions arms replace, and which are the stem.

    Attributes:
        inner: those that are replaced.
        stem: names of those that read the image; they are among ``inner`` where the stem is replaced too.
    """

    inner: tuple[Place, ...]
    stem: tuple[str, ...]


def find_places(
    name: str,
    classes: int,
    image_shape: tuple[int, int, int],
    width: float,
    options: Mapping[str, Any],
    *,
    stem_too: bool = False,
) -> Places:
    """The convolutions of a network that an arm's layers replace: those that ``convert`` would, and by option the stem.

    They don't depend on the width.

    Raises:
        UsageError: the network can't be made, does not take such images, or has nothing to be replaced.

    Example:
        >>> [place.name for place in find_places("resnet", 10, (1, 8, 8), 4, {}).inner][:2]
        ['layer1.0.layer1', 'layer1.0.layer2']
    """
    return _find_places(name, classes, image_shape, width, json.dumps(dict(options), sort_keys=True), stem_too)


@functools.lru_cache(maxsize=64)
def _find_places(
    name: str, classes: int, image_shape: tuple[int, int, int], width: float, options: str, stem_too: bool
) -> Places:
    network = find_network(name)
    with torch.random.fork_rng(devices=[]):
        model = make_network(name, classes, image_shape, width, json.loads(options)).eval()
        example = example_of(network, image_shape)
        try:
            plan = convert(model, dry_run=True, example_input=example)
            stem = tuple(row.name for row in plan.left if row.reason.startswith("stem"))
            if stem_too:
                plan = convert(
                    model,
                    dry_run=True,
                    example_input=example,
                    predicate=lambda place, _: True if place in stem else None,
                )
        except (ValueError, RuntimeError) as error:
            raise UsageError(f"network {name!r}: {' '.join(str(error).split())}") from error
        names = [row.name for row in plan.converted]
        if not names:
            raise UsageError(f"network {name!r} has no convolution that an arm could replace")
        inner = _watch(model, names, example)
    return Places(inner, stem)


def _watch(model: nn.Module, names: list[str], example: tuple[Any, ...]) -> tuple[Place, ...]:
    """Runs the example once, to see the convolutions' sizes and the normalisations behind them."""
    sizes: dict[str, dict[tuple[int, int], None]] = {name: {} for name in names}
    norms: dict[str, str] = {}
    last: list[tuple[str, Tensor]] = []

    def convolved(name: str, module: Any, args: Any, output: Tensor) -> None:
        sizes[name][padded_size(module, *args[0].shape[-2:])] = None
        last[:] = [(name, output)]

    def normalising(name: str, module: nn.Module, args: Any) -> None:
        if last and args and args[0] is last[0][1]:
            norms[last[0][0]] = name

    handles = []
    for name, module in model.named_modules():
        if name in sizes:
            handles.append(module.register_forward_hook(functools.partial(convolved, name)))
        elif isinstance(module, nn.BatchNorm2d):
            handles.append(module.register_forward_pre_hook(functools.partial(normalising, name)))
    try:
        with torch.no_grad():
            model(*example)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(Place(name, tuple(sizes[name]), norms.get(name, "")) for name in names)


def replace(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """Puts modules in the places of those of these names, wherever the model refers to them.

    Returns:
        The model, changed.

    Example:
        >>> replace(nn.Sequential(nn.ReLU(), nn.ReLU()), {"1": nn.Tanh()})
        Sequential(
          (0): ReLU()
          (1): Tanh()
        )
    """
    return swap(model, {model.get_submodule(name): layer for name, layer in layers.items()})
