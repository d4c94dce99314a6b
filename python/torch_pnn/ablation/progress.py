"""Shows how far a study is: a bar with the remaining time on a terminal, plain lines elsewhere.

Both write to standard error, so that standard output holds the result alone.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TextIO

from . import distributed

Row = dict[str, Any]
Run = tuple[str, int]

#: Seconds after which a line without a bar tells of an epoch, not only of a run.
LINE_SECONDS = 60.0


def duration(seconds: float) -> str:
    """A time span for people.

    Example:
        >>> duration(0.4), duration(75), duration(3700)
        ('less than 1 s', '1 min 15 s', '1 h 1 min')
    """
    whole = round(seconds)
    if whole < 1:
        return "less than 1 s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def outcome(row: Row) -> str:
    """The end of a run in a few words.

    Example:
        >>> outcome({"status": "finished", "accuracy": 0.985, "correct": 591, "total": 600})
        '98.50 % (591/600)'
    """
    if row["status"] == "finished":
        counted = "" if row["correct"] is None else f" ({row['correct']}/{row['total']})"
        return f"{100 * row['accuracy']:.2f} %{counted}"
    return f"{row['status']}: {row['problem']}"


class Progress(Protocol):
    """What the runner tells."""

    def step(self, run: Run, epochs: float) -> None:
        """A run has come so far: so many epochs, with a fraction. Told about once a second."""

    def epoch(self, row: Row, *, again: bool = False) -> None:
        """An epoch has ended; ``again``: before this command began, its run is being continued."""

    def result(self, row: Row) -> None:
        """A run has ended."""

    def say(self, text: str) -> None:
        """A line for the person who waits."""

    def close(self) -> None:
        """Nothing more follows."""


class Estimate:
    """The time that is left, from what an epoch of each arm has taken.

    Args:
        pending: the runs that are to be done.
        epochs: epochs of a run.
        clock: seconds.

    Example:
        >>> now = [0.0]
        >>> estimate = Estimate([("cnn", 0), ("pnn", 0)], 2, lambda: now[0])
        >>> for arm, seconds in [("cnn", 8.0), ("cnn", 8.0), ("pnn", 2.0)]:
        ...     now[0] += seconds
        ...     estimate.epoch({"arm": arm, "seed": 0, "seconds": seconds})
        >>> estimate.seconds_left()
        2.0
    """

    def __init__(self, pending: Sequence[Run], epochs: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._epochs, self._clock = epochs, clock
        self._left = dict.fromkeys(pending, float(epochs))
        self._costs: dict[str, list[float]] = {}
        self._worked = 0.0  # seconds of training that were done since the start, in all workers
        self._start = clock()

    def _cost(self, arm: str) -> float:
        """Seconds of an epoch of an arm; of the others where it has had none yet."""
        known = self._costs.get(arm) or [sum(costs) / len(costs) for costs in self._costs.values()]
        return sum(known) / len(known)

    def step(self, run: Run, epochs: float) -> None:
        """A run has come so far."""
        if run in self._left:
            self._left[run] = self._epochs - epochs

    def epoch(self, row: Row, *, again: bool = False) -> None:
        """An epoch has ended."""
        run = row["arm"], row["seed"]
        self._left[run] = min(math.ceil(self._left.get(run, self._epochs)), self._epochs) - 1.0
        if "epoch" in row:
            self._left[run] = float(self._epochs - row["epoch"])
        self._costs.setdefault(row["arm"], []).append(row["seconds"])
        if not again:
            self._worked += row["seconds"]

    def result(self, row: Row) -> None:
        """A run has ended, before its last epoch maybe."""
        self._left.pop((row["arm"], row["seed"]), None)

    @property
    def epochs_left(self) -> float:
        """Epochs of all runs that are still to come."""
        return sum(self._left.values())

    def seconds_left(self) -> float | None:
        """None before the first epoch has ended, and when nothing is left."""
        passed = self._clock() - self._start
        if self._worked <= 0 or passed <= 0 or not self._left:
            return None
        work = sum(left * self._cost(arm) for (arm, _), left in self._left.items())
        return work * passed / self._worked


class Lines:
    """One line a run, for log files and pipes; where a run takes long, one a minute.

    Args:
        pending: the runs that are to be done.
        runs: runs in the whole study.
        epochs: epochs of a run.
        stream: where lines go.
        clock: seconds, for the tests.
    """

    def __init__(
        self,
        pending: Sequence[Run],
        runs: int,
        epochs: int,
        stream: TextIO,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runs, self._done, self._epochs, self._stream, self._clock = (
            runs,
            runs - len(pending),
            epochs,
            stream,
            clock,
        )
        self._estimate = Estimate(pending, epochs, clock)
        self._spoken = clock()

    def _remaining(self) -> str:
        seconds = self._estimate.seconds_left()
        return "" if seconds is None else f", about {duration(seconds)} left"

    def step(self, run: Run, epochs: float) -> None:
        """Notes it for the estimate."""
        self._estimate.step(run, epochs)

    def epoch(self, row: Row, *, again: bool = False) -> None:
        """Counts an epoch; a line an epoch would be too many, unless they are long."""
        self._estimate.epoch(row, again=again)
        if self._clock() - self._spoken >= LINE_SECONDS and "epoch" in row and not again:
            where = f"{row['arm']}, seed {row['seed']}: epoch {row['epoch']} of {self._epochs}"
            score = row.get("test_score")
            self.say(f"{where}{'' if score is None else f', {100 * score:.2f} %'}{self._remaining()}")

    def result(self, row: Row) -> None:
        """Prints the run, its accuracy and the time left."""
        self._done += 1
        self._estimate.result(row)
        width = len(str(self._runs))
        where = f"[{self._done:{width}}/{self._runs}] {row['arm']}, seed {row['seed']}"
        self.say(f"{where}: {outcome(row)}{self._remaining()}")

    def say(self, text: str) -> None:
        """Prints a line."""
        self._spoken = self._clock()
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing to do."""


class Bar:
    """A bar of epochs with the remaining time, on a terminal.

    Args:
        pending: the runs that are to be done.
        runs: runs in the whole study.
        epochs: epochs of a run.
        stream: the terminal.
    """

    def __init__(self, pending: Sequence[Run], runs: int, epochs: int, stream: TextIO) -> None:
        from tqdm import tqdm

        self._epochs, self._runs, self._done = epochs, runs, runs - len(pending)
        self._estimate = Estimate(pending, epochs)
        self._last = ""
        self._bar = tqdm(
            total=runs * epochs,
            initial=self._done * epochs,
            file=stream,
            unit="epoch",
            dynamic_ncols=True,
            leave=False,
            mininterval=0.2,
            bar_format="{desc} {percentage:3.0f} % |{bar:16}| {elapsed} passed, {postfix[0]} left{postfix[1]}",
            postfix=["?", ""],
        )
        self._bar.set_description_str(f"run {self._done}/{runs}")

    def _move(self) -> None:
        seconds = self._estimate.seconds_left()
        self._bar.postfix = ["?" if seconds is None else duration(seconds), self._last]
        position = self._runs * self._epochs - self._estimate.epochs_left
        self._bar.update(max(0.0, position - self._bar.n))

    def step(self, run: Run, epochs: float) -> None:
        """Moves the bar within an epoch."""
        self._estimate.step(run, epochs)
        self._move()

    def epoch(self, row: Row, *, again: bool = False) -> None:
        """Moves the bar by an epoch."""
        self._estimate.epoch(row, again=again)
        self._move()

    def result(self, row: Row) -> None:
        """Counts a run; one that stopped early takes its other epochs off the bar."""
        self._done += 1
        self._estimate.result(row)
        self._last = f", {row['arm']} {outcome(row)}"
        self._bar.set_description_str(f"run {self._done}/{self._runs}", refresh=False)
        self._move()
        if row["status"] != "finished":
            self.say(f"{row['arm']}, seed {row['seed']}: {outcome(row)}")

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._bar.write(text, file=self._bar.fp)

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.close()


def _shows_a_bar(stream: TextIO) -> bool:
    """Whether it is a terminal with room for a bar; some say that they have no columns at all."""
    if not stream.isatty():
        return False
    try:
        size = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):
        return True
    return size.columns >= 40 and size.lines >= 2


def make_progress(pending: Sequence[Run], runs: int, epochs: int, stream: TextIO | None = None) -> Progress:
    """A bar where ``stream`` (standard error by default) is a terminal and tqdm is installed, else lines.

    Of several processes of torchrun, the first one alone shows it.

    Args:
        pending: the runs that are to be done.
        runs: runs in the whole study.
        epochs: epochs of a run.
        stream: where it is shown.
    """
    stream = sys.stderr if stream is None else stream
    if distributed.rank() != 0:
        return Silence()
    if _shows_a_bar(stream):
        try:
            return Bar(pending, runs, epochs, stream)
        except ImportError:
            print("(no progress bar without tqdm: pip install tqdm)", file=stream)
    return Lines(pending, runs, epochs, stream)


class Silence:
    """Shows nothing: for the processes of torchrun beside the first."""

    def step(self, run: Run, epochs: float) -> None:
        """Nothing."""

    def epoch(self, row: Row, *, again: bool = False) -> None:
        """Nothing."""

    def result(self, row: Row) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""
