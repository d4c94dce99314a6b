"""Rows as a study's folder holds them, made up: for tests of what is made from rows alone.

The scores are beta-binomial around given means: a run's own share of right answers varies with a given deviation, and
the right answers are counted out of so many test images. Half of the variance is the seed's, which every arm shares.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torch_pnn.ablation.records import Records
from torch_pnn.ablation.study import Arm, DataSettings, ModelSettings, Question, Schedule, Study

ENVIRONMENT = {
    "torch_pnn": "0.1.0",
    "libpnn": "0.1.0",
    "torch": "2.13.0",
    "python": "3.11.7",
    "numpy": "2.0",
    "scikit-learn": "1.9",
    "scipy": "1.17",
    "operators": "compiled",
    "derivatives": "compiled",
    "isa": "avx2",
    "machine": "x86_64",
    "system": "Linux",
    "cores": 2,
}

CLASSES = ("aeroplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "lorry")

#: Mean share of right answers of every arm of a large study, as a study of CIFAR-10 might have them.
MEANS = {
    "cnn": 0.705,
    "cnn-params": 0.612,
    "cnn-macs": 0.618,
    "lbcnn": 0.655,
    "pnn": 0.601,
    "control": 0.566,
    "conv1x1": 0.548,
    "redrawn": 0.560,
    "waves": 0.612,
    "waves-shuffled": 0.6005,
    "constant": 0.5655,
    "other-masks": 0.281,
    "trained": 0.6035,
    "frozen-conv": 0.662,
    "shift": 0.668,
    "separable": 0.690,
}


def arm(name: str, **changes: Any) -> Arm:
    """An arm: the catalogue's where it has one of that name."""
    from torch_pnn.ablation.arms import CATALOGUE

    return dataclasses.replace(CATALOGUE.get(name, Arm(name, name, f"The arm {name}.")), **changes)


def swept(base: str, setting: str, means: Mapping[Any, float]) -> list[tuple[Arm, float]]:
    """A sweep's arms as ``arms.sweep`` makes them, each with its mean."""
    from torch_pnn.ablation.arms import find_arm, sweep

    return list(zip(sweep(find_arm(base), setting, tuple(means)), means.values(), strict=True))


def large(**changes: Any) -> Records:
    """A study of 37 arms: every arm of ``MEANS``, and sweeps over numbers and over words."""
    levels = (0.02, 0.05, 0.2, 0.5, 1, 2, 4)
    points = [
        *swept("pnn", "level", dict(zip(levels, (0.57, 0.585, 0.612, 0.62, 0.6, 0.55, 0.48), strict=True))),
        *swept("waves", "level", dict(zip(levels, (0.575, 0.59, 0.622, 0.65, 0.66, 0.63, 0.58), strict=True))),
        *swept("pnn", "noise", {"uniform-continuous": 0.6015, "normal": 0.600}),
        *swept("pnn", "masks", {2: 0.61, 4: 0.62, 16: 0.63}),
        *swept("pnn", "norm", {"after": 0.59, "none": 0.55}),
    ]
    return make_records(**{"swept": points, **changes})


def make_records(
    means: Mapping[str, float] = MEANS,
    *,
    seeds: int = 10,
    other_seeds: int = 6,
    epochs: int = 5,
    total: int = 10_000,
    deviation: float = 0.006,
    shifts: Sequence[int] = (2,),
    validation: bool = True,
    metric: str = "accuracy",
    question: Question | None = None,
    chance: int = 0,
    swept: Sequence[tuple[Arm, float]] = (),
    **study: Any,
) -> Records:
    """Made-up records.

    Args:
        means: each arm's mean score, in the study's order.
        seeds: of the candidate and the control.
        other_seeds: of the others.
        epochs: of each run.
        total: test images.
        deviation: of a run's expected score over seeds.
        shifts: by how many pixels test images are moved.
        validation: whether there are validation images, so that best epochs are known.
        metric: "accuracy" counts right answers; others have scores alone.
        question: the study's.
        chance: seeds the made-up noise.
        swept: further arms, with their means.
        study: further settings of the study.
    """
    rng = np.random.default_rng(chance)
    arms = [*((arm(name), mean) for name, mean in means.items()), *swept]
    mean_of = {one.name: mean for one, mean in arms}
    made = Study(
        **{
            "name": "made-up",
            "title": "Made-up rows",
            "arms": tuple(one for one, _ in arms),
            "seeds": tuple(range(seeds)),
            "other_seeds": tuple(range(min(seeds, other_seeds))),
            "data": DataSettings("cifar10", shifts=tuple(shifts), validation_images=1000 if validation else 0),
            "model": ModelSettings(width=16),
            "schedule": Schedule(epochs=epochs, batch_size=128),
            "question": question or Question(),
            **study,
        }
    )
    shared = rng.normal(0, deviation / math.sqrt(2), seeds)
    classes = rng.normal(0, 0.07, len(CLASSES))
    results, curves = [], []
    for name, seed in made.runs:
        number, mean = made.arm_names.index(name), mean_of[name]
        own = float(np.clip(mean + shared[seed] + rng.normal(0, deviation / math.sqrt(2)), 0.01, 0.99))
        score, correct = _draw(rng, own, total, metric)
        parameters = 9000 + 37 * number if "cnn" not in name else 9100 if name == "cnn-params" else 52_000
        per_class = [float(np.clip(own + offset + rng.normal(0, 0.01), 0, 1)) for offset in classes]
        results.append(
            {
                "study": made.name,
                "arm": name,
                "seed": seed,
                "status": "finished",
                "problem": None,
                "metric": metric,
                "accuracy": score,
                "correct": correct,
                "total": total,
                "test_loss": 1.0 - own,
                "best_epoch": epochs if validation else None,
                "best_accuracy": score if validation else None,
                "per_class": per_class,
                "shifted": {
                    str(shift): _draw(rng, max(0.01, own - 0.002 * shift * (1 + 5 * ("pnn" in name))), total, metric)[0]
                    for shift in shifts
                },
                "parameters": parameters,
                "mask_bytes": 8 * 6,
                "macs": parameters * (90 + 3 * number),
                "width": 16,
                "epochs": epochs,
                "seconds_per_epoch": 3.0 + 0.21 * number + float(rng.uniform(0, 0.2)),
                "seconds": 5 * epochs,
                "peak_memory_bytes": 2**20 * (310 + 7 * number),
                "initial_sha256": "0" * 64,
                "final_sha256": "1" * 64,
                "streams": made.streams(seed),
                "invocation": 0,
            }
        )
        for epoch in range(1, epochs + 1):
            at = score * (1 - 0.45 * math.exp(-2.2 * epoch / epochs * 2)) + rng.normal(0, 0.004) * (epoch < epochs)
            curves.append(
                {
                    "study": made.name,
                    "arm": name,
                    "seed": seed,
                    "epoch": epoch,
                    "train_loss": 1.0,
                    "train_accuracy_running": at - 0.02,
                    "test_loss": 1.0,
                    "test_score": float(at),
                    "test_correct": None,
                    "test_accuracy": float(at),
                    "validation_score": float(at) if validation else None,
                    "seconds": 3.0,
                }
            )
    data = {
        "name": "cifar10",
        "description": "CIFAR-10, made up: 32×32 pixels, ten classes.",
        "class_names": list(CLASSES),
        "task": "classification" if metric == "accuracy" else "multilabel",
        "train_count": 20_000,
        "test_count": total,
        "validation_count": 1000 if validation else 0,
        "unreadable": [],
    }
    invocation = {
        "command": "torch-pnn ablate made-up.yaml --out <here>",
        "started": "2026-11-25T10:00:00+00:00",
        "jobs": 2,
        "environment": dict(ENVIRONMENT),
    }
    return Records(Path("nowhere"), made, "0" * 64, [invocation], results, curves, data, metric)


def _draw(rng: np.random.Generator, share: float, total: int, metric: str) -> tuple[float, int | None]:
    if metric != "accuracy":
        return float(np.clip(share + rng.normal(0, 0.002), 0, 1)), None
    correct = int(rng.binomial(total, share))
    return correct / total, correct


def fail(records: Records, arm: str, seed: int, status: str = "diverged", problem: str = "") -> Records:
    """The records with one run that did not finish: its row holds the least that such rows hold."""
    results = [dict(row) for row in records.results]
    for row in results:
        if (row["arm"], row["seed"]) == (arm, seed):
            row.update(
                status=status, problem=problem or "the loss became nan in epoch 2", accuracy=None, correct=None,
                test_loss=None, best_epoch=None, best_accuracy=None, per_class=[], shifted={},
            )  # fmt: skip
            if status == "broken":
                for key in ("parameters", "mask_bytes", "macs", "width", "seconds_per_epoch", "peak_memory_bytes"):
                    del row[key]
    return dataclasses.replace(records, results=results)
