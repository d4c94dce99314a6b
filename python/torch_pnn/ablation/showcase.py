"""What a mask looks like and what it does: the first perturbation layer of a study's own network, shown one image.

Nothing is stored for this: masks are made from seeds, so the network that a run began with can be built again.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from torch_pnn import functional
from torch_pnn.modules import PerturbConv2d

from .arms import Built, build
from .data import Dataset
from .layers import perturbation_of
from .study import Arm, Study

#: Test images that run through the network, so that there are statistics to normalise with; the first one is shown.
_IMAGES = 64


@dataclass(frozen=True)
class Row:
    """One arm's pictures, each float32 [H, W].

    Attributes:
        title: the arm's.
        input: one channel of the layer's input.
        mask: its mask, times the level.
        response: activation(input + mask), the response map.
        change: response - activation(input), what the mask did.
    """

    title: str
    input: Tensor
    mask: Tensor
    response: Tensor
    change: Tensor


@dataclass(frozen=True)
class Showcase:
    """The pictures of every arm that has a mask.

    Attributes:
        rows: one for each arm, points of sweeps left out.
        activation: the first row's.
        caption: what is shown, in words.
    """

    rows: tuple[Row, ...]
    activation: str
    caption: str


def _first_layer(built: Built) -> PerturbConv2d | None:
    """The arm's first layer that adds masks."""
    return next((layer for slot in built.slots for layer in [perturbation_of(slot.layer)] if layer is not None), None)


def _row(study: Study, arm: Arm, data: Dataset) -> tuple[Row, PerturbConv2d] | None:
    with torch.random.fork_rng(devices=[]):
        built = build(study, arm.name, study.streams(study.seeds[0]), data)
    layer = _first_layer(built)
    if layer is None:
        return None
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    images = next(iter(data.test_batches("test", _IMAGES)))[0]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            # With the batch's own statistics: a network that has learned nothing yet has no others to normalise with.
            # (A detector in training mode would ask for targets.)
            for module in built.model.modules():
                module.training = isinstance(module, nn.BatchNorm2d)
            built.model(images)
    finally:
        handle.remove()
    # What the masks meet: the layer's input, padded or cropped.
    maps = pad(seen[0], layer._pads)
    height, width = maps.shape[-2:]
    # The arm whose masks change in the test shows those of the test, the one whose masks are redrawn those of a step.
    built.before_step(0)
    with built.for_test() if arm.masks == "other" else contextlib.nullcontext():
        mask = layer.perturbation(height, width)
        if mask is None:
            return None
        mask = mask.detach().float().clone()
    # The channel that shows most, of the first image.
    channel = int(maps[0].flatten(1).std(dim=1).argmax())
    picture = maps[0, channel].float()
    own = mask[min(channel, mask.shape[0] - 1), 0].reshape(1, 1, height, width)

    def response(level: float) -> Tensor:
        """The operator itself, with a weight of one."""
        image, one = picture.reshape(1, 1, height, width), torch.ones(1, 1, 1, 1)
        answers = functional.perturb_conv2d(image, one, mask=own, level=level, activation=layer.activation)
        return answers.detach().reshape(height, width)

    perturbed = response(layer.level)
    scaled = layer.level * own.reshape(height, width)
    return Row(arm.title or arm.name, picture, scaled, perturbed, perturbed - response(0.0)), layer


def make_showcase(study: Study, data: Dataset) -> Showcase | None:
    """The pictures for the report, of every arm with masks but the points of sweeps.

    Returns:
        None where no arm of the study has a mask.
    """
    found = [
        made
        for arm in study.arms
        if arm.layer == "perturb" and not arm.group
        for made in [_row(study, arm, data)]
        if made is not None
    ]
    if not found:
        return None
    layers = [layer for _, layer in found]
    activations = list(dict.fromkeys(layer.activation for layer in layers))
    level = max(abs(layer.level) for layer in layers)
    caption = (
        f"One channel of one test image at the first perturbation layer, with the masks of seed {study.seeds[0]}, "
        f"before any training. The response map is {' or '.join(activations)}(input + level · mask), the change what "
        f"it owes to the mask. Masks and changes share a colour scale, the others theirs; the highest level is "
        f"{level:g}. Red positive, blue negative."
    )
    return Showcase(tuple(row for row, _ in found), activations[0], caption)
