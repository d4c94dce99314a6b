"""What a mask looks like and what it does: the first perturbation layer of a study's own network, shown one image.

Nothing is stored for this: masks are made from seeds, so the network that a run began with can be built again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_pnn import functional
from torch_pnn.modules import PerturbConv2d

from .arms import build
from .data import Dataset
from .study import Study


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
        model = build(study, arm, study.streams(study.seeds[0]), data).model
    layer = _first_layer(model)
    if layer is None:
        return None
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    # In training mode: a network that has learned nothing yet has no running statistics to normalise with.
    model.train()
    with torch.no_grad():
        model(next(data.test_batches("test", 64))[0])
    handle.remove()
    images = seen[0]
    height, width = images.shape[-2:]
    mask = layer.perturbation(height, width)
    if mask is None:
        return None
    mask = mask.detach().float()
    # The channel that shows most, of the first image.
    channel = int(images[0].flatten(1).std(dim=1).argmax())
    picture = images[0, channel].float()
    own = mask[min(channel, mask.shape[0] - 1), 0].reshape(1, 1, height, width)

    def response(level: float) -> Tensor:
        """The operator itself, with a weight of one."""
        image, one = picture.reshape(1, 1, height, width), torch.ones(1, 1, 1, 1)
        maps = functional.perturb_conv2d(image, one, mask=own, level=level, activation=layer.activation)
        return maps.detach().reshape(height, width)

    perturbed = response(layer.level)
    scaled = layer.level * own.reshape(height, width)
    return Row(study.arm(arm).title or arm, picture, scaled, perturbed, perturbed - response(0.0)), layer


def make_showcase(study: Study, data: Dataset) -> Showcase | None:
    """The pictures for the report; None where no arm of the study has a mask."""
    found = [
        made
        for arm in study.arm_names
        if study.arm(arm).layer == "perturb"
        for made in [_row(study, arm, data)]
        if made is not None
    ]
    if not found:
        return None
    layer = found[0][1]
    caption = (
        f"One channel of one test image at the first perturbation layer, with the masks of seed {study.seeds[0]}, "
        f"before any training. The response map is {layer.activation}(input + mask), the change what it owes to it. "
        f"Masks and changes share a colour scale of ±{layer.level:g}, the others theirs. Red positive, blue negative."
    )
    return Showcase(tuple(row for row, _ in found), layer.activation, caption)
