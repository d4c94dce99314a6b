"""What a study is: the data, the model, the arms, the schedule that every arm shares, the question and the seeds.

A study is a value: frozen dataclasses of plain numbers, strings and tuples. Two runs of the same study with the same
seeds give the same weights to the last bit on the same machine; its fingerprint, kept beside the results, stops results
of two different studies from being mixed. ``files`` reads studies from YAML; the ready-made ones lie in ``studies/``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: A two-sided exact sign-flip test over n seeds has 2/2**n as its smallest p value: below 0.05 from six seeds on.
SEEDS_TO_DECIDE = 6

#: The sources of chance in a run. Each has a generator of its own.
STREAMS = ("initialisation", "masks", "order", "augmentation")

#: The settings of the data that say where they are from rather than what they are.
PLACE_OF_DATA = ("root", "download")


@dataclass(frozen=True)
class DataSettings:
    """Which images, and how they are split and prepared.

    Attributes:
        name: a key of ``data.DATA_SETS``.
        root: the folder or archive on disk that holds them; "" = what TORCH_PNN_DATA names. Not part of the
            fingerprint: the images' own digest is kept instead.
        download: get published files that are missing, through torchvision. Not part of the fingerprint.
        train_images: use only so many training images, as many of each class as can be; 0 = all.
        validation_images: training images held out to choose the best epoch by; 0 = none, and no best epoch is given.
        image_size: side in pixels that images of varying size are brought to; 0 = the data set's own.
        augment: change the training images at random, as is usual for this data set.
        shifts: also test on images moved by so many pixels, to the right, down, left and up, the edge filled with
            black; the four directions' results count together.
        split_seed: draws the subset and the validation images; the same for every arm and seed.
    """

    name: str = "digits"
    root: str = ""
    download: bool = False
    train_images: int = 0
    validation_images: int = 0
    image_size: int = 0
    augment: bool = False
    shifts: tuple[int, ...] = ()
    split_seed: int = 2018


@dataclass(frozen=True)
class ModelSettings:
    """The network that the arms' layers stand in.

    Attributes:
        network: a key of ``networks.NETWORKS``, or ``module:function`` of somebody's own, whose convolutions are
            converted.
        width: channels of the network's first stage, for every arm that is not matched to another's cost; 0 = the
            network's own.
        options: keyword arguments for the network's function.
    """

    network: str = "resnet"
    width: int = 16
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """One of the things compared.

    Attributes:
        name: what the command line calls it.
        title: its name in tables and plots; "" = the name.
        summary: one sentence for the report.
        layer: what stands where the network has its convolutions: a key of ``layers.LAYERS``.
        options: the layer's options: a preset, a noise level.
        masks: "fixed"; "redrawn" at every training step; "other" ones in the test than in training; "trained".
        match: the arm whose cost this one's width is chosen to meet; "" = the model's width.
        match_by: "parameters" or "macs".
        weights_from: the arm whose initial weights it starts from, wherever names and shapes agree; "" = its own.
        phrase: what a sentence calls it; "" = the title.
        group: the sweep that it is a point of, such as ``level``; "" = none.
        value: the swept value.
    """

    name: str
    title: str = ""
    summary: str = ""
    layer: str = "perturb"
    options: Mapping[str, Any] = field(default_factory=dict)
    masks: str = "fixed"
    match: str = ""
    match_by: str = "parameters"
    weights_from: str = ""
    phrase: str = ""
    group: str = ""
    value: float | str | None = None


@dataclass(frozen=True)
class Schedule:
    """How every arm is trained.

    Attributes:
        epochs: passes over the training set.
        batch_size: images per step; the last, smaller batch of an epoch is used too.
        optimizer: "sgd" (with Nesterov's momentum), "adam" or "adamw".
        learning_rate: the highest one.
        decay: how it falls after the warm-up: "cosine" to zero, "steps" or "constant".
        milestones: for "steps", the epochs after which it is multiplied by ``factor``.
        factor: see ``milestones``.
        warmup_epochs: length of the linear rise.
        momentum: of stochastic gradient descent.
        weight_decay: of every weight, not of biases, normalisation parameters and trained masks.
        test_every: the whole test set is measured after every so many epochs, always after the last one and after one
            that the validation images find the best so far.
    """

    epochs: int = 12
    batch_size: int = 32
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    decay: str = "cosine"
    milestones: tuple[int, ...] = ()
    factor: float = 0.1
    warmup_epochs: float = 2.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    test_every: int = 1


@dataclass(frozen=True)
class Question:
    """The one comparison that is fixed beforehand.

    Attributes:
        candidate: the arm whose advantage is asked for ...
        control: ... over this one.
        margin: differences below this many points count as equivalent.
    """

    candidate: str = "pnn"
    control: str = "control"
    margin: float = 0.5


@dataclass(frozen=True)
class Study:
    """A paired comparison of arms.

    Attributes:
        name: what the command line calls it.
        title: a heading for the report.
        notes: how the settings were chosen, for the report.
        data, model, schedule, question: see there.
        arms: in the order of the tables.
        seeds: of the candidate and the control. Seed s fixes everything random in run s, for every arm alike.
        other_seeds: of every other arm, the beginning of ``seeds``.
        vary: which of ``STREAMS`` the seed fixes; the others are fixed by the first seed in every run.
        device: "cpu", "cuda" or "cuda:1".
        precision: "float32", or "bfloat16" or "float16" through autocast.
        threads: intra-operator threads of a run. Fixed, so that the bits don't depend on the machine's cores.
    """

    name: str
    title: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    other_seeds: tuple[int, ...] = ()
    notes: str = ""
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    schedule: Schedule = field(default_factory=Schedule)
    question: Question = field(default_factory=Question)
    vary: tuple[str, ...] = STREAMS
    device: str = "cpu"
    precision: str = "float32"
    threads: int = 1

    @property
    def arm_names(self) -> tuple[str, ...]:
        """The arms' names, in order."""
        return tuple(arm.name for arm in self.arms)

    def arm(self, name: str) -> Arm:
        """An arm by its name.

        Raises:
            KeyError: the study has none of that name.
        """
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise KeyError(name)

    def seeds_of(self, name: str) -> tuple[int, ...]:
        """The seeds that an arm is trained with."""
        primary = name in (self.question.candidate, self.question.control)
        return self.seeds if primary or not self.other_seeds else self.other_seeds

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Every (arm, seed), seed by seed, so that an interrupted study holds whole pairs."""
        every = [*self.seeds, *(seed for seed in self.other_seeds if seed not in self.seeds)]
        return [(arm.name, seed) for seed in every for arm in self.arms if seed in self.seeds_of(arm.name)]

    def streams(self, seed: int) -> dict[str, int]:
        """What seeds each of ``STREAMS`` in run ``seed``.

        Example:
            >>> study = Study("s", "S", (Arm("pnn"),), (3, 4), vary=("masks",))
            >>> study.streams(4)
            {'initialisation': 3, 'masks': 4, 'order': 3, 'augmentation': 3}
        """
        return {stream: seed if stream in self.vary else self.seeds[0] for stream in STREAMS}

    def to_json(self) -> dict[str, Any]:
        """The study as plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Study:
        """The study that ``to_json`` wrote.

        Raises:
            ValueError: a setting is missing or unknown.

        Example:
            >>> study = Study("s", "S", (Arm("pnn", options={"level": 0.5}),), (0, 1))
            >>> Study.from_json(study.to_json()) == study
            True
        """
        return _build(cls, values)

    def fingerprint(self) -> str:
        """A SHA-256 over every setting but where the data lie; seeds too: adding some after a look would bend it."""
        values = self.to_json()
        for place in PLACE_OF_DATA:
            del values["data"][place]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def differences(self, other: Study) -> list[str]:
        """The settings in which ``other`` differs, in words.

        Example:
            >>> study = Study("s", "S", (Arm("pnn"),), (0, 1))
            >>> study.differences(dataclasses.replace(study, seeds=(0,), schedule=Schedule(epochs=3)))
            ['seeds 0,1, not 0', 'schedule.epochs 12, not 3']
            >>> study.differences(dataclasses.replace(study, arms=(Arm("pnn", layer="conv"),)))
            ['arms.pnn.layer perturb, not conv']
        """
        return _differences("", self.to_json(), other.to_json())


def _build(cls: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass from JSON values: nested dataclasses from mappings, tuples from lists."""
    known = {item.name for item in dataclasses.fields(cls)}
    if set(values) != known:
        raise ValueError(f"settings differ from this version's: {', '.join(sorted(set(values) ^ known))}")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _value(hints[name], value) for name, value in values.items()})


def _value(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value)
    if typing.get_origin(hint) is tuple:
        return tuple(_value(typing.get_args(hint)[0], item) for item in value)
    return value


def _differences(prefix: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    found = []
    for key in mine:
        if mine[key] == theirs[key] or (prefix == "data." and key in PLACE_OF_DATA):
            continue
        if isinstance(mine[key], dict) and set(mine[key]) == set(theirs[key]):
            found += _differences(f"{prefix}{key}.", mine[key], theirs[key])
        elif key == "arms" and _words(mine[key]) == _words(theirs[key]):
            for arm, other in zip(mine[key], theirs[key], strict=True):
                found += _differences(f"arms.{arm['name']}.", arm, other)
        else:
            found.append(f"{prefix}{key} {_words(mine[key])}, not {_words(theirs[key])}")
    return found


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(str(item["name"]) if isinstance(item, dict) and "name" in item else str(item) for item in value)
    return str(value)
