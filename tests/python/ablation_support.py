"""Small studies for the tests of the ablation tool, and a way to run its command as a process of its own."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import torch

import torch_pnn
from torch_pnn.ablation import files
from torch_pnn.ablation.arms import find_arm
from torch_pnn.ablation.data import Dataset, TensorDataset
from torch_pnn.ablation.study import Study

PACKAGE_PARENT = Path(torch_pnn.__file__).resolve().parents[1]


def tiny_study(**changes: object) -> Study:
    """Two arms, two seeds, one epoch, few channels."""
    settings = {
        "width": 4,
        "arms": ("pnn", "control"),
        "seeds": (0, 1),
        "epochs": 1,
        "batch_size": 64,
        "warmup_epochs": 0.5,
        **changes,
    }
    return changed(files.load("digits"), **settings)


def changed(study: Study, **settings: object) -> Study:
    """The study with some settings replaced, whichever part of it they belong to; arms by their names."""
    for part in ("data", "model", "schedule", "question"):
        value = getattr(study, part)
        own = {field.name for field in dataclasses.fields(value)} & settings.keys() - {"name"}
        study = dataclasses.replace(
            study, **{part: dataclasses.replace(value, **{name: settings.pop(name) for name in own})}
        )
    if "arms" in settings:
        settings["arms"] = tuple(find_arm(arm) if isinstance(arm, str) else arm for arm in settings["arms"])
    return dataclasses.replace(study, **settings)


def tiny_data(images: int = 96, classes: int = 10) -> Dataset:
    """Random images whose label is the brightest of ten pixels, so that something can be learned."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(images, 1, 8, 8, generator=generator)
    labels = pictures.flatten(1)[:, :classes].argmax(dim=1)
    cut = images * 2 // 3
    names = [f"pixel {number}" for number in range(classes)]
    return TensorDataset(
        "tiny", "Random images.", names, (pictures[:cut], labels[:cut]), (pictures[cut:], labels[cut:])
    )


def environment(**changes: str) -> dict[str, str]:
    """The variables of a process that runs the command: this checkout's package first."""
    path = os.pathsep.join([str(PACKAGE_PARENT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **changes}


def command(*arguments: object, timeout: float = 300, **changes: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m torch_pnn` and returns what came of it."""
    return subprocess.run(
        [sys.executable, "-m", "torch_pnn", *map(str, arguments)],
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def one_line_error(finished: subprocess.CompletedProcess[str], status: int) -> str:
    """The last line of standard error, after checking that it stands for a clear refusal."""
    assert finished.returncode == status, finished.stderr
    assert "Traceback" not in finished.stderr, finished.stderr
    lines = [line for line in finished.stderr.splitlines() if line.startswith("torch-pnn:")]
    assert lines, finished.stderr
    assert finished.stderr.splitlines()[-1] == lines[-1], finished.stderr
    return lines[-1]
