"""The arms of a study: which network is built, and how it differs from its neighbours.

An arm is one entry in ``CATALOGUE``, a network one entry in ``NETWORKS``. An arm can be matched to another's cost
(``match``: its width is searched until it has as many learnable parameters) and paired with another (``weights_from``:
it starts from that arm's weights, bit for bit, wherever names and shapes agree).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torch_pnn import models
from torch_pnn.blocks import PerturbBasicBlock
from torch_pnn.presets import layer_options

from .data import Dataset
from .errors import UsageError
from .study import Arm, Study

#: Every arm by its name.
CATALOGUE: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("cnn", "CNN", "The same network with ordinary 3×3 convolutions.", "conv"),
        Arm(
            "cnn-params",
            "CNN, narrowed",
            "The CNN made narrower, until it has as many learnable parameters as the PNN.",
            "conv",
            match="pnn",
        ),
        Arm(
            "lbcnn",
            "LBCNN",
            "Fixed sparse ternary 3×3 filters, ReLU, then a learnable 1×1 convolution (local binary convolution).",
            "lbc",
        ),
        Arm(
            "pnn",
            "PNN",
            "Fixed noise added to the input (level 0.1), ReLU, batch normalisation, then a learnable 1×1 convolution: "
            "the layer that the authors published.",
            options={"preset": "juefeix2018"},
        ),
        Arm(
            "control",
            "control",
            "The PNN at noise level 0: the same modules, pooling, normalisation, initial weights and seeds, no noise.",
            options={"preset": "juefeix2018", "level": 0.0},
            weights_from="pnn",
            phrase="its control without noise",
        ),
        Arm(
            "waves",
            "PNN, waves",
            "The PNN with smooth waves in place of noise: the same mask values, arranged so that they still tell a "
            "pixel where it is, but are no noise.",
            options={"preset": "juefeix2018", "noise": "waves"},
            weights_from="pnn",
        ),
        Arm("conv1x1", "plain 1×1", "The same network with plain 1×1 convolutions.", "conv1x1"),
    )
}


def _resnet(
    classes: int, *, in_channels: int, width: int, layer: str, seed: int, preset: str | None = None, **options: Any
) -> nn.Module:
    """A residual network of six inner layers for small images: three stages, the second and third of half the size."""
    chosen = layer_options(preset, **options) if layer == "perturb" else options
    return models.ResNet(
        PerturbBasicBlock,
        (1, 1, 1, 0),
        classes,
        in_channels=in_channels,
        width=width,
        stem="cifar",
        layer=layer,
        seed=seed,
        **chosen,
    )


#: Every network by its name: a function of the number of classes, in_channels, width, layer, seed (of masks), options.
NETWORKS: dict[str, Callable[..., nn.Module]] = {"lenet": models.lenet, "resnet": _resnet}


@dataclass(frozen=True)
class Built:
    """An arm's network before training, and what it costs.

    Attributes:
        model: in training mode.
        width: channels of its first stage.
        parameters: learnable parameters.
        mask_bytes: of stored masks and fixed filters; a mask made from a seed costs the seed.
        macs: multiply-adds of one image.
    """

    model: nn.Module
    width: int
    parameters: int
    mask_bytes: int
    macs: int

    def before_step(self, step: int) -> None:
        """What is done before a training step."""

    def for_test(self) -> contextlib.AbstractContextManager[None]:
        """What holds while the network is tested."""
        return contextlib.nullcontext()


def find_arm(name: str) -> Arm:
    """An arm of the catalogue.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in CATALOGUE:
        raise UsageError(f"unknown arm {name!r}; there is: {', '.join(CATALOGUE)}")
    return CATALOGUE[name]


def _arm(study: Study, name: str) -> Arm:
    """An arm of the study; one that it only refers to (``match``, ``weights_from``) may come from the catalogue."""
    return study.arm(name) if name in study.arm_names else find_arm(name)


def _network(study: Study, arm: Arm, streams: Mapping[str, int], width: int, channels: int, classes: int) -> nn.Module:
    """The arm's network with the initial weights that the seed gives."""
    if study.model.network not in NETWORKS:
        raise UsageError(f"unknown network {study.model.network!r}; there is: {', '.join(NETWORKS)}")
    torch.manual_seed(streams["initialisation"])
    return NETWORKS[study.model.network](
        classes,
        in_channels=channels,
        width=width,
        layer=arm.layer,
        seed=streams["masks"],
        **study.model.options,
        **arm.options,
    )


def _learnable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def matched_width(study: Study, name: str, channels: int, classes: int) -> int:
    """The width with which an arm comes nearest to the number of learnable parameters of the arm that it is matched to.

    Args:
        study: the settings.
        name: the arm's.
        channels: of the images.
        classes: of the data set.

    Returns:
        The study's own width where the arm is not matched.
    """
    arm = _arm(study, name)
    if not arm.match:
        return study.model.width
    with torch.random.fork_rng(devices=[]):
        streams = study.streams(study.seeds[0])
        target = _learnable(_network(study, _arm(study, arm.match), streams, study.model.width, channels, classes))
        return models.match_width(lambda width: _network(study, arm, streams, width, channels, classes), target)


def share_weights(target: nn.Module, source: nn.Module) -> int:
    """Copies every parameter that both networks have under the same name and in the same shape.

    Masks and their seeds are buffers and stay the target's own.

    Returns:
        The number of parameters copied.

    Example:
        >>> first, second = nn.Linear(2, 3), nn.Linear(2, 3)
        >>> share_weights(first, second), bool((first.weight == second.weight).all())
        (2, True)
    """
    given = dict(source.named_parameters())
    copied = 0
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if name in given and given[name].shape == parameter.shape:
                parameter.copy_(given[name])
                copied += 1
    return copied


def build(study: Study, name: str, streams: Mapping[str, int], data: Dataset) -> Built:
    """An arm's network for one run, ready to be trained.

    ``streams`` is ``study.streams(seed)``.

    Sets PyTorch's default generator; a caller who minds wraps it in ``torch.random.fork_rng``.

    Raises:
        UsageError: the arm or the network is unknown.
    """
    arm = _arm(study, name)
    channels, height, columns = data.image_shape
    width = matched_width(study, name, channels, data.classes)
    model = _network(study, arm, streams, width, channels, data.classes)
    if arm.weights_from:
        source = _arm(study, arm.weights_from)
        share_weights(model, _network(study, source, streams, study.model.width, channels, data.classes))
    model.train()
    costs = models.costs(model, (channels, height, columns))
    return Built(model, width, costs.parameters, costs.mask_bytes, costs.macs)
