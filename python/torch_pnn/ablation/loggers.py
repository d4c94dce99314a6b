"""Hooks that carry a study's rows to a tool that draws them while it runs: TensorBoard, Weights & Biases, one's own.

    torch-pnn ablate --logger tensorboard       DIR/tensorboard/<arm>/seed <n>; nothing leaves the machine
    torch-pnn ablate --logger wandb             DIR/wandb, offline; WANDB_MODE=online sends it
    torch-pnn ablate --logger module:Class      Class(directory, study), with the methods of ``Logger``

A logger that fails is said once and left out from then on: the study does not depend on it.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from .errors import UsageError, require
from .study import Study

Row = dict[str, Any]
Run = tuple[str, int]


class Logger(Protocol):
    """What a logger is told, in the process that writes the rows."""

    def epoch(self, row: Row) -> None:
        """An epoch has ended: a row of epochs.jsonl. A run that is continued tells its earlier epochs again."""

    def result(self, row: Row) -> None:
        """A run has ended: a row of results.jsonl."""

    def close(self) -> None:
        """Nothing more follows."""


def scalars(row: Row) -> dict[str, float]:
    """The measured figures of an epoch's row.

    Example:
        >>> scalars({"arm": "pnn", "seed": 0, "epoch": 2, "test_score": 0.5, "test_loss": None, "seconds": 1.5})
        {'test_score': 0.5, 'seconds': 1.5}
    """
    skipped = ("study", "arm", "seed", "epoch", "test_correct", "test_accuracy")
    return {name: value for name, value in row.items() if name not in skipped and isinstance(value, (int, float))}


class TensorBoard:
    """Event files of a folder for each run: ``tensorboard --logdir DIR/tensorboard``.

    Args:
        directory: the study's folder.
        study: its settings.

    Raises:
        AblationError: the package tensorboard is missing.
    """

    def __init__(self, directory: Path, study: Study) -> None:
        require("tensorboard", "tensorboard", "--logger tensorboard")
        self._directory = directory / "tensorboard"
        self._writers: dict[Run, Any] = {}

    def _writer(self, row: Row) -> Any:
        run = row["arm"], row["seed"]
        if run not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            folder = self._directory / row["arm"].replace(os.sep, "_") / f"seed {row['seed']}"
            self._writers[run] = SummaryWriter(str(folder), purge_step=row.get("epoch"))
        return self._writers[run]

    def epoch(self, row: Row) -> None:
        """Adds the epoch's figures."""
        writer = self._writer(row)
        for name, value in scalars(row).items():
            writer.add_scalar(name, value, row["epoch"])

    def result(self, row: Row) -> None:
        """Adds the outcome and ends the run's file."""
        writer = self._writer(row)
        writer.add_text("outcome", row["status"] if row["problem"] is None else f"{row['status']}: {row['problem']}")
        writer.close()
        del self._writers[row["arm"], row["seed"]]

    def close(self) -> None:
        """Ends the files of runs that were interrupted."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


class WeightsAndBiases:
    """A run of Weights & Biases for each run, in a group named after the study.

    It stays on this machine (``wandb sync`` sends it later) unless the environment says ``WANDB_MODE=online``. A run is
    handed over when it has ended, since runs side by side share this process.

    Args:
        directory: the study's folder.
        study: its settings.

    Raises:
        AblationError: the package wandb is missing.
    """

    def __init__(self, directory: Path, study: Study) -> None:
        self._wandb: Any = require("wandb", "wandb", "--logger wandb")
        self._directory, self._study = directory, study
        self._epochs: dict[Run, dict[int, Row]] = {}

    def epoch(self, row: Row) -> None:
        """Keeps the epoch's figures until the run has ended."""
        self._epochs.setdefault((row["arm"], row["seed"]), {})[row["epoch"]] = row

    def result(self, row: Row) -> None:
        """Hands the run over."""
        run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "torch-pnn"),
            group=self._study.name,
            name=f"{row['arm']}, seed {row['seed']}",
            config={"arm": row["arm"], "seed": row["seed"], "study": self._study.to_json()},
            dir=str(self._directory),
            mode=os.environ.get("WANDB_MODE", "offline"),
        )
        for epoch, epoch_row in sorted(self._epochs.pop((row["arm"], row["seed"]), {}).items()):
            run.log(scalars(epoch_row), step=epoch)
        for name, value in row.items():
            if isinstance(value, (int, float, str)):
                run.summary[name] = value
        run.finish(exit_code=0 if row["status"] == "finished" else 1)

    def close(self) -> None:
        """Nothing to do: an interrupted run is handed over when it has ended."""


LOGGERS: dict[str, Callable[[Path, Study], Logger]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def find_logger(name: str) -> Callable[[Path, Study], Logger]:
    """A logger's class: a key of ``LOGGERS``, or ``module:Class``.

    Raises:
        UsageError: there is none of that name.
    """
    if name in LOGGERS:
        return LOGGERS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UsageError(f"unknown logger {name!r}; there is: {', '.join(LOGGERS)}, or module:Class of your own")
    try:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--logger {name} can't be had: {error}") from error


class Loggers:
    """Several loggers, each left out once it fails.

    Args:
        names: see ``find_logger``.
        directory: the study's folder.
        study: its settings.
        say: is told when one fails.

    Raises:
        UsageError: a name is unknown.
        AblationError: a package is missing.
    """

    def __init__(self, names: Sequence[str], directory: Path, study: Study, say: Callable[[str], None]) -> None:
        self._say = say
        self._loggers = {name: find_logger(name)(directory, study) for name in names}

    def _each(self, what: Callable[[Logger], None]) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                what(logger)
            except Exception as error:
                del self._loggers[name]
                reason = " ".join(str(error).split()) or "no reason given"
                self._say(f"logger {name} failed and is left out ({type(error).__name__}: {reason}); the runs go on")

    def epoch(self, row: Row) -> None:
        """An epoch has ended."""
        self._each(lambda logger: logger.epoch(row))

    def result(self, row: Row) -> None:
        """A run has ended."""
        self._each(lambda logger: logger.result(row))

    def close(self) -> None:
        """Nothing more follows."""
        self._each(lambda logger: logger.close())
