"""Alternating timings and what is concluded from them: ratios of medians with a bootstrap interval over the rounds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

RESAMPLES = 2000


@dataclass(frozen=True)
class Contestant:
    """One side of a comparison.

    Attributes:
        call: what is timed.
        grad: whether it runs with gradients recorded.
    """

    call: Callable[[], Any]
    grad: bool = False

    def repeat(self, count: int) -> float:
        """Seconds of one call, the mean over `count` of them."""
        call = self.call
        with torch.set_grad_enabled(self.grad):
            start = time.perf_counter()
            for _ in range(count):
                call()
            return (time.perf_counter() - start) / count


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: most rounds of one comparison.
        sample: seconds that one sample fills with repeated calls (at least one call).
        budget: seconds that one comparison may take in all; rounds are left out to keep it.
        fewest: rounds that are never left out.
    """

    rounds: int
    sample: float
    budget: float
    fewest: int = 7


@dataclass
class Times:
    """Seconds per call, one figure for each round, by contestant; all of them were timed in every round."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """The median over the rounds."""
        return float(torch.tensor(self.seconds[name], dtype=torch.float64).quantile(0.5))

    def better(self, *names: str) -> str:
        """The name with the smaller median."""
        return min(names, key=self.median)


def alternate(contestants: dict[str, Contestant], effort: Effort) -> Times:
    """Times every contestant in every round, the order turned by one each time, so that drift meets all alike.

    Args:
        contestants: by name; each is called before anything counts.
        effort: how long.
    """
    counts = {}
    once = 0.0
    for name, contestant in contestants.items():
        contestant.repeat(1)
        seconds = contestant.repeat(1)
        if seconds < effort.sample:
            seconds = contestant.repeat(3)
        counts[name] = max(1, round(effort.sample / max(seconds, 1e-7)))
        once += counts[name] * seconds
    rounds = min(effort.rounds, max(effort.fewest, int(effort.budget / max(once, 1e-6))))
    names = list(contestants)
    times = Times({name: [] for name in names})
    for turn in range(rounds):
        for offset in range(len(names)):
            name = names[(turn + offset) % len(names)]
            times.seconds[name].append(contestants[name].repeat(counts[name]))
    return times


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians and its 95 % interval.

    Attributes:
        value: the median of one side over the median of the other.
        low: lower end of the interval.
        high: upper end.
        samples: the resampled ratios, for geometric means; not part of a comparison of two `Ratio`s.
    """

    value: float
    low: float
    high: float
    samples: Tensor | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def meets(self, target: float) -> bool:
        """Whether the lower end of the interval is at or below the target."""
        return self.low <= target


def _interval(value: float, samples: Tensor) -> Ratio:
    low, high = samples.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    # With few rounds the resampled medians can miss the median itself.
    return Ratio(value, min(low, value), max(high, value), samples)


def compare(ours: Sequence[float], others: Sequence[tuple[float, Sequence[float]]], seed: int = 0) -> Ratio:
    """The median of `ours` over the largest of the others' medians, each times its factor.

    The interval is the percentile bootstrap over the rounds: rounds are drawn with replacement, the same ones for both
    sides, since both sides of a round met the same machine.

    Args:
        ours: seconds of each round.
        others: pairs of a factor and the seconds of the same rounds. One pair with factor 1 gives a plain ratio.
        seed: of the resampling.

    Raises:
        ValueError: the series differ in length or are empty.

    Example:
        >>> compare([1.0, 2.0, 3.0], [(1.0, [2.0, 2.0, 2.0])]).value
        1.0
        >>> compare([4.0, 4.0], [(1.0, [2.0, 2.0]), (0.5, [16.0, 16.0])])
        Ratio(value=0.5, low=0.5, high=0.5)
    """
    lengths = {len(ours), *(len(series) for _, series in others)}
    if len(lengths) != 1 or not ours or not others:
        raise ValueError(f"series of {sorted(lengths)} rounds, they should be equally many, and one or more")
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(ours), (RESAMPLES, len(ours)), generator=generator)

    def medians(series: Sequence[float]) -> tuple[float, Tensor]:
        values = torch.tensor(series, dtype=torch.float64)
        return float(values.quantile(0.5)), values[picks].quantile(0.5, dim=1)

    above, above_samples = medians(ours)
    below = [(factor * value, factor * samples) for factor, (value, samples) in ((f, medians(s)) for f, s in others)]
    samples = above_samples / torch.stack([resampled for _, resampled in below]).amax(dim=0)
    return _interval(above / max(value for value, _ in below), samples)


def geometric_mean(ratios: Sequence[Ratio]) -> Ratio:
    """The geometric mean of ratios that were measured apart, with the interval from their resampled ratios.

    Example:
        >>> round(geometric_mean([compare([1.0], [(1.0, [2.0])]), compare([8.0], [(1.0, [1.0])])]).value, 6)
        2.0
    """
    if not ratios:
        raise ValueError("no ratios, there should be one or more")
    samples = [ratio.samples for ratio in ratios if ratio.samples is not None]
    logs = torch.stack(samples).log().mean(dim=0)
    return _interval(math.exp(sum(math.log(ratio.value) for ratio in ratios) / len(ratios)), logs.exp())
