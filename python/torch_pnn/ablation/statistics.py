"""What the seeds say about one arm against another, and the sentence that follows from it.

The runs are paired: run s of every arm has the same seed, so the same data order and, where shapes agree, the same
initial weights. The unit is the paired difference d_s = accuracy of the candidate - accuracy of the control, in points
(hundredths of the whole test set). Two things are computed from the d_s, both by scipy:

- the 95 % t interval of their mean (Student, "The probable error of a mean", Biometrika 1908);
- the exact two-sided sign-flip test (Fisher, "The Design of Experiments", 1935, section 21): how often would the mean
  be as far from zero if each d_s had its sign by a fair coin?

A verdict needs both, and at least ``SEEDS_TO_DECIDE`` pairs, below which the sign-flip test can't reach 0.05 whatever
the data. The intervals cover the seeds only: another split of the data is another study.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import require
from .study import SEEDS_TO_DECIDE

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """The accuracies of one arm over its seeds, as shares in [0, 1].

    Attributes:
        count: number of finished runs.
        mean: their mean; NaN without runs.
        deviation: their standard deviation (n - 1); NaN below two runs.
        low, high: the smallest and the largest.
    """

    count: int
    mean: float
    deviation: float
    low: float
    high: float


def summarise(values: Sequence[float]) -> Summary:
    """Mean and spread of one arm's accuracies.

    Example:
        >>> summarise([0.5, 1.0]).mean
        0.75
    """
    count = len(values)
    if count == 0:
        return Summary(0, math.nan, math.nan, math.nan, math.nan)
    mean = math.fsum(values) / count
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1)) if count > 1 else math.nan
    return Summary(count, mean, deviation, min(values), max(values))


@dataclass(frozen=True)
class PairedDifference:
    """One arm against another over the seeds that both finished, in points.

    Attributes:
        seeds: the pairs' seeds.
        values: the difference of each pair.
        mean: their mean; NaN without pairs.
        low, high: the 95 % t interval; infinite below two pairs.
        p_value: of the exact two-sided sign-flip test; 1 without pairs.
    """

    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: float
    low: float
    high: float
    p_value: float

    @property
    def count(self) -> int:
        """Number of pairs."""
        return len(self.values)

    @property
    def outcome(self) -> str:
        """'better', 'worse' or 'undecided'."""
        if self.count < SEEDS_TO_DECIDE or self.p_value > 1 - CONFIDENCE or self.low <= 0 <= self.high:
            return "undecided"
        return "better" if self.mean > 0 else "worse"


def compare(candidate: dict[int, int], control: dict[int, int], total: int) -> PairedDifference:
    """Pairs two arms by seed.

    Args:
        candidate: seed -> number of correct test images. Whole numbers, so that equal differences are equal exactly.
        control: likewise.
        total: number of test images.

    Returns:
        The differences candidate - control over the seeds that both have.

    Raises:
        AblationError: scipy is missing.

    Example:
        >>> d = compare({0: 90, 1: 92, 2: 95}, {0: 89, 1: 90, 3: 1}, total=100)
        >>> d.seeds, d.values, d.p_value
        ((0, 1), (1.0, 2.0), 0.5)
    """
    require("scipy", "scipy", "the intervals and tests of the report")
    from scipy import stats

    seeds = tuple(sorted(candidate.keys() & control.keys()))
    counts = [candidate[seed] - control[seed] for seed in seeds]
    values = tuple(100 * count / total for count in counts)
    n = len(values)
    if n == 0:
        return PairedDifference((), (), math.nan, -math.inf, math.inf, 1.0)
    mean = 100 * sum(counts) / (n * total)
    if n == 1:
        return PairedDifference(seeds, values, mean, -math.inf, math.inf, 1.0)
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
    # All 2**n flips up to n = 16, a fixed random sample of them beyond.
    resamples = math.inf if n <= 16 else 99_999
    test = stats.permutation_test(
        (counts,),
        lambda d, axis: d.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        random_state=0,
    )
    return PairedDifference(seeds, values, mean, mean - reach, mean + reach, float(min(1.0, test.pvalue)))


def points(value: float, digits: int = 2) -> str:
    """A signed number of points, with a true minus sign.

    Example:
        >>> points(0.126), points(-1), points(0.0), points(-0.001)
        ('+0.13', '−1.00', '0.00', '0.00')
    """
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "+∞" if value > 0 else "−∞"
    text = f"{value:+.{digits}f}"
    if float(text) == 0:
        return f"{0:.{digits}f}"
    return text.replace("-", "−")


def interval(difference: PairedDifference) -> str:
    """The interval in brackets, or why there is none.

    Example:
        >>> interval(compare({0: 1}, {0: 1}, 10))
        'no interval from 1 pair'
    """
    if difference.count < 2:
        return f"no interval from {difference.count} pair{'' if difference.count == 1 else 's'}"
    return f"{points(difference.low)} to {points(difference.high)}"


def verdict(difference: PairedDifference, candidate: str, control: str) -> str:
    """The study's answer in one sentence, no stronger than the data.

    Args:
        difference: the primary comparison.
        candidate: the candidate's title.
        control: the control's title.

    Example:
        >>> d = compare({s: 95 + s % 2 for s in range(6)}, {s: 90 for s in range(6)}, total=100)
        >>> verdict(d, "PNN", "control")  # doctest: +ELLIPSIS
        'PNN is better than control by 5.50 points of accuracy (95 % interval +4.93 to +6.07, 6 seeds, ...'
    """
    n = difference.count
    seeds = f"{n} seed{'' if n == 1 else 's'}"
    if n == 0:
        return f"Undecided: no seed has finished both {candidate} and {control}."
    seen = f"{points(difference.mean)} points of accuracy"
    if n < SEEDS_TO_DECIDE:
        inside = f"95 % interval {interval(difference)}" if n > 1 else interval(difference)
        return (
            f"Undecided: {seeds} can't decide between {candidate} and {control} (the test needs {SEEDS_TO_DECIDE}); "
            f"the difference seen is {seen} ({inside})."
        )
    evidence = f"95 % interval {interval(difference)}, {seeds}, sign-flip p = {difference.p_value:.2g}"
    if difference.outcome == "undecided":
        return (
            f"Undecided: these runs can't tell {candidate} from {control}; the difference seen is {seen} ({evidence})."
        )
    return (
        f"{candidate} is {difference.outcome} than {control} by {abs(difference.mean):.2f} points of accuracy "
        f"({evidence})."
    )
