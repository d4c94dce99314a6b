"""Shows how far a study is: a bar with the remaining time on a terminal, plain lines elsewhere.

Both write to standard error, so that standard output holds the result alone.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, TextIO

Row = dict[str, Any]


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
        return f"{100 * row['accuracy']:.2f} % ({row['correct']}/{row['total']})"
    return f"{row['status']}: {row['problem']}"


class Progress(Protocol):
    """What the runner tells."""

    def epoch(self, row: Row) -> None:
        """An epoch has ended."""

    def result(self, row: Row) -> None:
        """A run has ended."""

    def say(self, text: str) -> None:
        """A line for the person who waits."""

    def close(self) -> None:
        """Nothing more follows."""


class Lines:
    """One line a run, for log files and pipes.

    Args:
        runs: runs in the whole study.
        done: those that were finished before.
        epochs: epochs of a run.
        stream: where lines go.
        clock: seconds, for the tests.
    """

    def __init__(
        self, runs: int, done: int, epochs: int, stream: TextIO, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._runs, self._done, self._epochs, self._stream, self._clock = runs, done, epochs, stream, clock
        self._left = (runs - done) * epochs  # epochs
        self._passed = 0
        self._seen: dict[tuple[str, int], int] = {}
        self._start = clock()

    def epoch(self, row: Row) -> None:
        """Counts an epoch; a line an epoch would be too many."""
        run = row["arm"], row["seed"]
        self._seen[run] = self._seen.get(run, 0) + 1
        self._passed += 1
        self._left -= 1

    def result(self, row: Row) -> None:
        """Prints the run, its accuracy and the time left."""
        self._done += 1
        self._left -= self._epochs - self._seen.pop((row["arm"], row["seed"]), 0)
        remaining = ""
        if self._left > 0 and self._passed > 0:
            seconds = (self._clock() - self._start) / self._passed * self._left
            remaining = f", about {duration(seconds)} left"
        width = len(str(self._runs))
        self.say(f"[{self._done:{width}}/{self._runs}] {row['arm']}, seed {row['seed']}: {outcome(row)}{remaining}")

    def say(self, text: str) -> None:
        """Prints a line."""
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing to do."""


class Bar:
    """A bar of epochs with the remaining time, on a terminal.

    Args:
        runs: runs in the whole study.
        done: those that were finished before.
        epochs: epochs of a run.
        stream: the terminal.
    """

    def __init__(self, runs: int, done: int, epochs: int, stream: TextIO) -> None:
        from tqdm import tqdm

        self._epochs, self._runs, self._done = epochs, runs, done
        self._seen: dict[tuple[str, int], int] = {}
        self._bar = tqdm(
            total=runs * epochs,
            initial=done * epochs,
            file=stream,
            unit="epoch",
            dynamic_ncols=True,
            leave=False,
            smoothing=0.05,
            mininterval=0.2,
            bar_format="{desc} {percentage:3.0f} % |{bar:16}| {elapsed} passed, {remaining} left{postfix}",
        )
        self._bar.set_description_str(f"run {done}/{runs}")

    def epoch(self, row: Row) -> None:
        """Moves the bar by an epoch."""
        run = row["arm"], row["seed"]
        self._seen[run] = self._seen.get(run, 0) + 1
        self._bar.update()

    def result(self, row: Row) -> None:
        """Counts a run; one that stopped early takes its other epochs off the bar."""
        run = row["arm"], row["seed"]
        self._done += 1
        self._bar.update(max(0, self._epochs - self._seen.pop(run, 0)))
        self._bar.set_description_str(f"run {self._done}/{self._runs}", refresh=False)
        self._bar.set_postfix_str(f"{row['arm']} {outcome(row)}")
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


def make_progress(runs: int, done: int, epochs: int, stream: TextIO | None = None) -> Progress:
    """A bar where ``stream`` (standard error by default) is a terminal and tqdm is installed, else lines."""
    stream = sys.stderr if stream is None else stream
    if _shows_a_bar(stream):
        try:
            return Bar(runs, done, epochs, stream)
        except ImportError:
            print("(no progress bar without tqdm: pip install tqdm)", file=stream)
    return Lines(runs, done, epochs, stream)
