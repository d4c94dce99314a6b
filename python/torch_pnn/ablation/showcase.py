"""What a mask looks like and what it does: the first perturbation layer of a study's own network, shown one image.

Nothing is stored for this: masks are made from seeds, so the network that a run began with can be built again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_pnn import PerturbConv2d, reference

from .arms import ARMS, build
from .data import Dataset
from .study import Study


@dataclass(frozen=True)
class Row:
    """One arm's pictures, each float32 [H, W]: sum = input + mask, response = activation(sum)."""

    title: str
    input: Tensor
    mask: Tensor
    sum: Tensor
    response: Tensor


@dataclass(frozen=True)
class Showcase:
    """The pictures of every arm that has a mask.

    Attributes:
        rows: one for each arm.
        activation: the layer's.
        caption: what is shown, in words.
    """

    rows: tuple[Row, ...]
    activation: str
    caption: str


def _first_layer(model: nn.Module) -> PerturbConv2d | None:
    return next((module for module in model.modules() if isinstance(module, PerturbConv2d)), None)


def _row(study: Study, arm: str, data: Dataset) -> tuple[Row, PerturbConv2d] | None:
    with torch.random.fork_rng(devices=[]):
        model = build(study, arm, study.seeds[0], data).model
    layer = _first_layer(model)
    if layer is None or layer.level == 0 or layer.noise is None:
        return None
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    # In training mode: a network that has learned nothing yet has no running statistics to normalise with.
    model.train()
    with torch.no_grad():
        model(data.test_images[:64])
    handle.remove()
    images = seen[0]
    height, width = images.shape[-2:]
    mask = layer.perturbation_mask(height, width).detach().float()
    # The channel that shows most, of the first image.
    channel = int(images[0].flatten(1).std(dim=1).argmax())
    picture = images[0, channel].float()
    scaled = layer.level * mask[min(channel, mask.shape[0] - 1), 0]
    total = picture + scaled
    response = reference.activate(total, layer.activation)
    return Row(ARMS[arm].title, picture, scaled, total, response), layer


def make_showcase(study: Study, data: Dataset) -> Showcase | None:
    """The pictures for the report; None where no arm of the study has a mask."""
    found = [made for arm in study.arms if arm in ARMS and ARMS[arm].layer == "perturb"
             for made in [_row(study, arm, data)] if made is not None]
    if not found:
        return None
    layer = found[0][1]
    caption = (f"One channel of one test image at the first perturbation layer, with the masks of seed {study.seeds[0]}, before any "
               f"training. The mask, {layer.level:g} times values between −1 and 1, is drawn on a scale of its own; the other "
               f"pictures share theirs. Red is positive, blue negative.")
    return Showcase(tuple(row for row, _ in found), layer.activation, caption)
