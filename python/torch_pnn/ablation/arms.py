"""The arms of a study: what stands in the network's places, how it is paired with its neighbours, and what it costs.

``CATALOGUE`` holds every ready-made arm, ``sweep`` makes one for each value of a setting, ``build`` makes an arm's
network for one run.

What is random hangs on the run's streams and on names alone: the network with its convolutions is made from the stream
``initialisation``; each layer that replaces one draws its weights from that stream and its own name, its masks or
fixed filters from the stream ``masks`` and its name. So whatever two arms have in common, they start from the same bits
of it. ``weights_from`` makes sure of it where a layer would scale its first weights otherwise, ``match`` chooses the
width that meets another arm's cost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from torch_pnn import models
from torch_pnn.convert import layer_seed
from torch_pnn.modules import ACTIVATIONS
from torch_pnn.summary import summary

from .errors import UsageError
from .layers import LAYERS, NOISES, NORM_POSITIONS, UNIFORM_DEVIATION, make_layer, set_masks
from .networks import NETWORKS, Network, Places, example_of, find_network, find_places, make_network
from .networks import replace as replace_modules
from .study import Arm, ModelSettings, Study

__all__ = [
    "CATALOGUE",
    "MASKS",
    "NETWORKS",
    "SWEEPS",
    "Built",
    "Slot",
    "build",
    "find_arm",
    "matched_width",
    "share_weights",
    "sweep",
]

#: What becomes of masks between steps: see ``study.Arm``.
MASKS = ("fixed", "redrawn", "other", "trained")

_PUBLISHED = {"preset": "juefeix2018"}
#: Level of normal masks that have the standard deviation of uniform ones at level 0.1.
_NORMAL_LEVEL = round(0.1 * UNIFORM_DEVIATION, 6)


def _of_pnn(name: str, title: str, summary: str, *, phrase: str = "", masks: str = "fixed", **options: Any) -> Arm:
    """An arm that differs from the PNN in these options alone and starts from its weights."""
    return Arm(
        name, title, summary, options=_PUBLISHED | options, masks=masks, weights_from="pnn", phrase=phrase or title
    )


#: Every ready-made arm by its name.
CATALOGUE: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("cnn", "CNN", "The same network with ordinary convolutions.", "conv"),
        Arm(
            "cnn-params",
            "CNN, narrowed",
            "The CNN made narrower, until it has as many learnable parameters as the PNN.",
            "conv",
            match="pnn",
            phrase="a CNN of as many parameters",
        ),
        Arm(
            "cnn-macs",
            "CNN, equal multiply-adds",
            "The CNN made narrower, until it needs as many multiply-adds as the PNN.",
            "conv",
            match="pnn",
            match_by="macs",
            phrase="a CNN of as many multiply-adds",
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
            options=_PUBLISHED,
        ),
        Arm(
            "pnn-paper",
            "PNN, as in the paper",
            "Fixed noise (level 0.1), ReLU, then a learnable 1×1 convolution: the layer as the paper's text has it, "
            "without normalisation inside.",
            options={"preset": "paper"},
        ),
        Arm(
            "pnn-klachko2018",
            "PNN, 64 masks",
            "64 masks a channel (level 0.5), ReLU, a 1×1 over each channel's maps, batch normalisation, ReLU, then a "
            "mixing 1×1: an outside reimplementation.",
            options={"preset": "klachko2018"},
        ),
        _of_pnn(
            "control",
            "control",
            "The PNN at noise level 0: the same modules, pooling, normalisation, initial weights and seeds, no noise.",
            phrase="its control without noise",
            level=0.0,
        ),
        Arm(
            "conv1x1",
            "plain 1×1",
            "The same network with plain 1×1 convolutions: unlike the control, no ReLU and no normalisation stand "
            "before the 1×1 inside of a layer; pooling is the same.",
            "conv1x1",
            phrase="plain 1×1 convolutions",
        ),
        _of_pnn(
            "redrawn",
            "PNN, noise redrawn",
            "The PNN with new noise at every training step, and one fixed draw in the test: noise that tells nobody "
            "where a pixel is.",
            masks="redrawn",
        ),
        _of_pnn(
            "waves",
            "PNN, waves",
            "The PNN with smooth waves in place of noise: the same mask values, arranged so that they still tell a "
            "pixel where it is, but are no noise.",
            noise="waves",
        ),
        _of_pnn(
            "waves-shuffled",
            "PNN, shuffled waves",
            "The waves' values at shuffled pixels: map by map the same values, without the waves' order.",
            noise="waves-shuffled",
        ),
        _of_pnn(
            "constant",
            "PNN, constants",
            "One constant for each map in place of its mask: an offset before the ReLU, neither noise nor position.",
            noise="constant",
        ),
        _of_pnn(
            "other-masks",
            "PNN, other masks in the test",
            "The PNN trained with its fixed noise and tested with other noise of the same kind.",
            masks="other",
        ),
        _of_pnn(
            "trained", "PNN, masks trained", "The PNN's masks are learnt, from the same noise on.", masks="trained"
        ),
        Arm(
            "frozen-conv",
            "frozen 3×3",
            "Fixed random 3×3 convolution, ReLU, batch normalisation, then a learnable 1×1 convolution: as many "
            "learnable parameters as the PNN.",
            "frozen-conv",
            weights_from="pnn",
            phrase="frozen random 3×3 filters",
        ),
        Arm(
            "shift",
            "shift",
            "Groups of channels moved by one pixel each, ReLU, batch normalisation, then a learnable 1×1 convolution: "
            "as many learnable parameters as the PNN.",
            "shift",
            weights_from="pnn",
            phrase="shifted channels",
        ),
        Arm(
            "separable",
            "depthwise-separable",
            "A learnable depthwise 3×3 convolution, batch normalisation, ReLU, then a learnable 1×1 convolution.",
            "separable",
            phrase="depthwise-separable convolutions",
        ),
        _of_pnn(
            "uniform-continuous",
            "PNN, continuous uniform",
            "Masks drawn from the continuous uniform distribution in place of its 256 values.",
            noise="uniform-continuous",
        ),
        _of_pnn(
            "normal",
            "PNN, normal",
            "Normally distributed masks with the standard deviation of the PNN's uniform ones, 0.0577 at level 0.1.",
            noise="normal",
            level=_NORMAL_LEVEL,
        ),
    )
}

#: What can be swept, with the usual values.
SWEEPS: dict[str, tuple[Any, ...]] = {
    "level": (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 4),
    "masks": (1, 2, 4, 16),
    "activation": ("relu", *(name for name in ACTIVATIONS if name != "relu")),
    "noise": ("uniform", "uniform-continuous", "normal", "waves"),
    "norm": ("before", "after", "none"),
}


def find_arm(name: str) -> Arm:
    """An arm of the catalogue.

    Raises:
        UsageError: there is none of that name.

    Example:
        >>> find_arm("control").weights_from
        'pnn'
    """
    if name not in CATALOGUE:
        raise UsageError(f"unknown arm {name!r}; there is: {', '.join(CATALOGUE)}")
    return CATALOGUE[name]


def sweep(base: Arm, setting: str, values: Sequence[Any] = ()) -> tuple[Arm, ...]:
    """An arm for each value of a setting, otherwise as ``base``.

    Args:
        base: an arm with masks.
        setting: a key of ``SWEEPS``: "level"; "masks" per channel; "activation"; "noise", one of ``layers.NOISES``,
            where "normal" gets the level at which its standard deviation is that of the base's uniform masks; "norm",
            one of ``layers.NORM_POSITIONS``.
        values: the usual ones by default.

    Returns:
        Arms named "<base> <setting> <value>", with ``group`` the setting and ``value`` the value.

    Raises:
        UsageError: the setting can't be swept, the base has no masks, or a value is none of the setting's.

    Example:
        >>> [arm.name for arm in sweep(find_arm("pnn"), "level", (0.5, 1))]
        ['pnn level 0.5', 'pnn level 1']
    """
    if setting not in SWEEPS:
        raise UsageError(f"{setting!r} can't be swept; there is: {', '.join(SWEEPS)}")
    if base.layer != "perturb":
        raise UsageError(f"{setting} can't be swept for the arm {base.name!r}, whose layer {base.layer!r} has no masks")
    return tuple(_swept(base, setting, value) for value in values or SWEEPS[setting])


def _swept(base: Arm, setting: str, value: Any) -> Arm:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    wrong = UsageError(f"{setting} can't be {value!r}")
    if setting == "level" and not number:
        raise wrong
    if setting == "masks" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise wrong
    choices = {"activation": SWEEPS["activation"], "noise": NOISES, "norm": NORM_POSITIONS}.get(setting)
    if choices is not None and value not in choices:
        raise UsageError(f"{setting} can't be {value!r}; there is: {', '.join(choices)}")
    options = {**base.options, setting: value}
    if setting == "noise" and value == "normal":
        options["level"] = round(base.options.get("level", 0.1) * UNIFORM_DEVIATION, 6)
    shown = f"{value:g}" if number else str(value)
    words = f"{setting} {shown}"
    title = base.title or base.name
    return replace(
        base,
        name=f"{base.name} {words}",
        title=f"{title}, {words}",
        summary=f"{title}; {_SETTINGS[setting]}: {shown}.",
        options=options,
        phrase=f"{base.phrase or title} ({words})",
        group=setting,
        value=value,
    )


_SETTINGS = {
    "level": "noise level",
    "masks": "masks per channel",
    "activation": "activation",
    "noise": "distribution of the masks",
    "norm": "place of the batch normalisation",
}


# --------------------------------------------------------------------------------------------------------------------
# A network for one run
# --------------------------------------------------------------------------------------------------------------------


class Shapes(Protocol):
    """What of a data set a network's shape hangs on; every ``data.Dataset`` has it."""

    @property
    def classes(self) -> int:
        """Number of classes."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""


@dataclass(frozen=True)
class _Shapes:
    classes: int
    image_shape: tuple[int, int, int]


@dataclass(frozen=True)
class Slot:
    """A layer of an arm in its network.

    Attributes:
        name: its qualified name.
        layer: the module.
    """

    name: str
    layer: nn.Module


@dataclass(frozen=True)
class Built:
    """An arm's network before training, and what it costs.

    Attributes:
        model: in training mode.
        width: channels of its first stage, 6.25 say where stages are rounded; 0 = the network's own.
        parameters: learnable parameters.
        mask_bytes: of stored masks and of everything else that is stored and not learnt: fixed filters, a frozen stem;
            a mask made from a seed costs the seed.
        macs: multiply-adds of one image.
        slots: the arm's layers.
        masks: what becomes of the masks, one of ``MASKS``.
        noise: their distribution.
        seed: the stream ``masks``.
        matched: for an arm that is matched to another's cost, its own over the other's: 1.02 = two percent more.
    """

    model: nn.Module
    width: float
    parameters: int
    mask_bytes: int
    macs: int
    slots: tuple[Slot, ...] = ()
    masks: str = "fixed"
    noise: str = "uniform"
    seed: int = 0
    matched: float | None = None

    def before_step(self, step: int) -> None:
        """Redraws masks for a training step, where the arm does that; they hang on the seed and the step alone.

        Args:
            step: counted from 0 over the whole training.
        """
        if self.masks == "redrawn":
            self._set_masks(layer_seed(self.seed, f"step {step}"))

    @contextlib.contextmanager
    def for_test(self) -> Iterator[None]:
        """While testing: other masks than in training ("other"), or one fixed draw ("redrawn"). Then as before."""
        if self.masks not in ("redrawn", "other"):
            yield
            return
        layers = [module for slot in self.slots for module in slot.layer.modules()]
        held = [
            (buffer, buffer.clone())
            for layer in layers
            for name, buffer in layer.named_buffers(recurse=False)
            if name in ("mask", "mask_seed")
        ]
        seeds = [(layer, layer.seed, layer._known_seed) for layer in layers if hasattr(layer, "_known_seed")]
        self._set_masks(self.seed if self.masks == "redrawn" else layer_seed(self.seed, "other masks"))
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in held:
                    buffer.copy_(value)
            for layer, seed, known in seeds:
                layer.seed, layer._known_seed = seed, known

    def _set_masks(self, seed: int) -> None:
        for slot in self.slots:
            set_masks(slot.layer, self.noise, layer_seed(seed, slot.name))


def _arm(study: Study, name: str) -> Arm:
    """An arm of the study; one that it only refers to (``match``, ``weights_from``) may come from the catalogue."""
    return study.arm(name) if name in study.arm_names else find_arm(name)


def _options(study: Study) -> tuple[dict[str, Any], bool, bool]:
    """The options of the network's own function; whether its stem is frozen; whether arms replace it too."""
    options = dict(study.model.options)
    flags = []
    for name in ("stem_frozen", "stem_layer"):
        value = options.pop(name, False)
        if not isinstance(value, bool):
            raise UsageError(f"model.options.{name} is {value!r}, it should be true or false")
        flags.append(value)
    if all(flags):
        raise UsageError("model.options has both stem_frozen and stem_layer: a stem that is replaced can't be frozen")
    return options, flags[0], flags[1]


def _places(study: Study, data: Shapes) -> Places:
    options, _, stem_too = _options(study)
    return find_places(
        study.model.network, data.classes, data.image_shape, study.model.width, options, stem_too=stem_too
    )


def _network(
    study: Study, arm: Arm, streams: Mapping[str, int], width: float, data: Shapes
) -> tuple[nn.Module, tuple[Slot, ...]]:
    """The arm's network with the initial weights and masks that the streams give, and the arm's layers in it."""
    if arm.layer not in LAYERS:
        raise UsageError(f"arm {arm.name!r}: layer is {arm.layer!r}, it should be one of {', '.join(LAYERS)}")
    if arm.masks not in MASKS:
        raise UsageError(f"arm {arm.name!r}: masks is {arm.masks!r}, it should be one of {', '.join(MASKS)}")
    if arm.masks != "fixed" and arm.layer != "perturb":
        raise UsageError(f"arm {arm.name!r}: masks is {arm.masks!r}, and the layer {arm.layer!r} has none")
    options, frozen, _ = _options(study)
    places = _places(study, data)
    torch.manual_seed(streams["initialisation"])
    model = make_network(study.model.network, data.classes, data.image_shape, width, options)
    slots = []
    with torch.random.fork_rng(devices=[]):
        for place in places.inner:
            convolution: Any = model.get_submodule(place.name)
            torch.manual_seed(layer_seed(streams["initialisation"], place.name))
            try:
                layer = make_layer(
                    arm.layer,
                    convolution,
                    place,
                    seed=layer_seed(streams["masks"], place.name),
                    train_masks=arm.masks == "trained",
                    options=arm.options,
                )
            except (TypeError, ValueError) as error:
                raise UsageError(f"arm {arm.name!r}, layer {place.name} of {study.model.network}: {error}") from error
            if layer is not convolution:
                slots.append(Slot(place.name, layer))
    replaced = {slot.name: slot.layer for slot in slots}
    if arm.options.get("norm") in ("none", "before-only"):
        replaced |= {place.norm: nn.Identity() for place in places.inner if place.norm}
    model = replace_modules(model, replaced)
    if frozen:
        for name in places.stem:
            model.get_submodule(name).requires_grad_(False)
    return model, tuple(slots)


def _learnable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _macs(model: nn.Module, network: Network, image_shape: tuple[int, int, int]) -> int:
    return summary(model, inputs=example_of(network, image_shape)).multiply_adds


def matched_width(study: Study, name: str, data: Shapes) -> tuple[float, float | None]:
    """The width with which an arm comes nearest to the cost of the arm that it is matched to, and how near that is.

    Our own networks take eighths of a channel, each stage rounded to whole channels, so that most costs are met within
    a few percent.

    Args:
        study: the settings.
        name: the arm's.
        data: the data set, for its classes and the size of its images.

    Returns:
        The width, and the arm's cost over the other's; the study's own width and None where the arm is not matched;
            0 where the network has no width that can be chosen.

    Raises:
        UsageError: the network's width can't be chosen, or the cost to be met is unknown.
    """
    arm = _arm(study, name)
    parts = find_network(study.model.network).widths
    if not arm.match:
        return (study.model.width if parts else 0), None
    if arm.match_by not in ("parameters", "macs"):
        raise UsageError(f"arm {name!r}: match_by is {arm.match_by!r}, it should be parameters or macs")
    if not parts:
        raise UsageError(
            f"arm {name!r} is matched to {arm.match} by its width, and the network {study.model.network!r} has none "
            "that can be chosen"
        )
    settings = [dataclasses.asdict(part) for part in (study.model, arm, _arm(study, arm.match))]
    return _nearest_width(json.dumps(settings, sort_keys=True), data.classes, tuple(data.image_shape))


@functools.lru_cache(maxsize=64)
def _nearest_width(settings: str, classes: int, image_shape: tuple[int, int, int]) -> tuple[float, float]:
    """The width at which an arm's cost comes nearest to another's, and its cost over the other's there.

    Args:
        settings: JSON of [the model's settings, the arm, the arm that it is matched to].
        classes: of the data set.
        image_shape: (channels, height, width).
    """
    model, *pair = json.loads(settings)
    arm, other = (Arm(**values) for values in pair)
    study = Study("", "", (arm, other), (0,), model=ModelSettings(**model))
    streams = study.streams(0)
    data = _Shapes(classes, image_shape)
    network = find_network(study.model.network)

    def count(model: nn.Module) -> int:
        return _learnable(model) if arm.match_by == "parameters" else _macs(model, network, image_shape)

    def build_with(steps: int) -> nn.Module:
        return _network(study, arm, streams, steps / network.widths, data)[0]

    with torch.random.fork_rng(devices=[]):
        target = count(_network(study, other, streams, study.model.width, data)[0])
        steps = models.match_width(build_with, target, maximum=4096 * network.widths, count=count)
        reached = count(build_with(steps)) / target
    width = steps / network.widths
    return (int(width) if width == int(width) else width), reached


def share_weights(target: nn.Module, source: nn.Module) -> int:
    """Copies every parameter that both networks have under the same name and in the same shape.

    Masks and their seeds are buffers and stay the target's own, as do masks that are trained.

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
            if name.rpartition(".")[2] != "mask" and name in given and given[name].shape == parameter.shape:
                parameter.copy_(given[name])
                copied += 1
    return copied


def build(study: Study, name: str, streams: Mapping[str, int], data: Shapes) -> Built:
    """An arm's network for one run, ready to be trained.

    Sets PyTorch's default generator; a caller who minds wraps it in ``torch.random.fork_rng``.

    Args:
        study: the settings.
        name: the arm's.
        streams: ``study.streams(seed)``: initial weights hang on "initialisation", masks and fixed filters on "masks".
        data: the data set, for its classes and the size of its images.

    Raises:
        UsageError: the arm or the network is unknown, or they don't go together.
    """
    arm = _arm(study, name)
    width, matched = matched_width(study, name, data)
    model, slots = _network(study, arm, streams, width, data)
    if arm.weights_from:
        source = _arm(study, arm.weights_from)
        share_weights(model, _network(study, source, streams, study.model.width, data)[0])
    model.train()
    counted = summary(model, inputs=example_of(find_network(study.model.network), data.image_shape))
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    return Built(
        model,
        width,
        counted.parameters,
        counted.mask_bytes + frozen,
        counted.multiply_adds,
        slots,
        arm.masks,
        arm.options.get("noise", "uniform"),
        streams["masks"],
        matched,
    )
