"""What a study is: the data set, the network, the arms and the schedule that every arm shares.

A study is a value. Two runs of the same study with the same seeds give the same weights to the last bit on the same
machine; its fingerprint, kept beside the results, stops results of two different studies from being mixed.
A ready-made study is one entry in ``STUDIES``.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import UsageError

#: A two-sided exact sign-flip test over n seeds has 2/2**n as its smallest p value: below 0.05 from six seeds on.
SEEDS_TO_DECIDE = 6


@dataclass(frozen=True)
class Study:
    """A paired comparison of arms.

    Attributes:
        name: what the command line calls it.
        title: a heading for the report.
        data: a key of ``data.DATA_SETS``.
        network: a key of ``arms.NETWORKS``.
        width: channels of the network's first stage, for every arm that is not matched to another's cost.
        arms: keys of ``arms.ARMS``, in the order of the tables.
        candidate: the arm whose advantage is the primary question ...
        control: ... over this one.
        seeds: seed s fixes the initial weights, the masks and the order of the data of run s, for every arm alike.
        epochs: passes over the training set.
        batch_size: images per step; the last, smaller batch of an epoch is used too.
        learning_rate: the highest one; it rises linearly for ``warmup_epochs`` and falls to zero along a cosine.
        warmup_epochs: length of the rise.
        momentum: of stochastic gradient descent (Nesterov's form).
        weight_decay: of every weight, not of biases and normalisation parameters.
        threads: intra-operator threads of a run. Fixed, so that the bits don't depend on the machine's cores.
    """

    name: str
    title: str
    data: str
    network: str
    width: int
    arms: tuple[str, ...]
    candidate: str
    control: str
    seeds: tuple[int, ...]
    epochs: int
    batch_size: int
    learning_rate: float
    warmup_epochs: float
    momentum: float
    weight_decay: float
    threads: int = 1

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Every (arm, seed), seed by seed, so that an interrupted study holds whole pairs."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms]

    def to_json(self) -> dict[str, Any]:
        """The study as plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Study:
        """The study that ``to_json`` wrote.

        Raises:
            ValueError: a setting is missing or unknown.

        Example:
            >>> study = STUDIES["digits"]
            >>> Study.from_json(study.to_json()) == study
            True
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if set(values) != known:
            raise ValueError(f"settings differ from this version's: {', '.join(sorted(set(values) ^ known))}")
        lists = {key: tuple(values[key]) for key in ("arms", "seeds")}
        return cls(**{**values, **lists})

    def fingerprint(self) -> str:
        """A SHA-256 over every setting, seeds included: adding seeds after a look at the result would bend it."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def differences(self, other: Study) -> list[str]:
        """The settings in which ``other`` differs, in words.

        Example:
            >>> study = STUDIES["digits"]
            >>> study.differences(dataclasses.replace(study, epochs=3, width=5, seeds=(0, 1)))[0]
            'width 16, not 5'
        """
        mine, theirs = self.to_json(), other.to_json()
        return [f"{key} {_words(mine[key])}, not {_words(theirs[key])}" for key in mine if mine[key] != theirs[key]]


def _words(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


#: The studies that ship with the package.
#: digits: twelve epochs of ten seeds take about three minutes on two cores.
STUDIES: dict[str, Study] = {
    "digits": Study(
        name="digits",
        title="Handwritten digits, 8×8 pixels",
        data="digits",
        network="resnet",
        width=16,
        arms=("cnn", "cnn-narrow", "lbcnn", "pnn", "control", "waves"),
        candidate="pnn",
        control="control",
        seeds=tuple(range(10)),
        epochs=12,
        batch_size=32,
        learning_rate=0.1,
        warmup_epochs=2,
        momentum=0.9,
        weight_decay=5e-4,
    ),
}

#: How their settings were chosen, for the report.
NOTES: dict[str, str] = {
    "digits": "The learning rate was picked from 0.02, 0.05, 0.1 and 0.2 on a quarter of the training images held out, "
    "with seeds that the study does not use; CNN, LBCNN and PNN differed no more between the rates than between seeds.",
}

#: What ``--quick`` changes in each of them.
QUICK: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 6, "seeds": tuple(range(3)), "warmup_epochs": 1},
}


def find_study(name: str, *, quick: bool = False) -> Study:
    """A ready-made study by its name.

    Raises:
        UsageError: there is none of that name; the sentence lists those that are.

    Example:
        >>> find_study("digits").name
        'digits'
    """
    if name not in STUDIES:
        close = difflib.get_close_matches(name, STUDIES, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UsageError(f"unknown study {name!r}{hint}; there is: {', '.join(STUDIES)}")
    study = STUDIES[name]
    return dataclasses.replace(study, **QUICK[name]) if quick else study
