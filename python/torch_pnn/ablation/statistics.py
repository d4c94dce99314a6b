"""What the seeds say about one arm against another, and the sentence that follows from it.

The runs are paired: run s of every arm has the same seed, so the same data order and, where shapes agree, the same
initial weights. The unit is the paired difference d_s = score of the candidate - score of the control, in points
(hundredths of the whole test set's score). scipy computes from the d_s:

- the 95 % t interval of their mean (Student, "The probable error of a mean", Biometrika 1908): the headline;
- beside it the BCa bootstrap interval (Efron, "Better bootstrap confidence intervals", JASA 1987), which asks for no
  normal distribution, but covers too little at few seeds: 87 % in place of 95 % at six;
- the exact two-sided sign-flip test (Fisher, "The Design of Experiments", 1935, section 21): how often would the mean
  be as far from zero if each d_s had its sign by a fair coin?
- two one-sided t tests against the margin that the study set beforehand (Schuirmann, J. Pharmacokinet. Biopharm. 1987):
  is the mean difference surely smaller than what would matter?

One comparison, fixed in the study, is primary and is taken as it is; the p values of the other arms are adjusted
together (Holm, Scand. J. Statist. 1979), those of the points of a sweep among themselves. ``PairedDifference.outcome``
states the rule that turns these into a word; docs/decisions/verdicts-of-studies.md gives its reasons and what was
simulated. The intervals cover what the seeds vary, nothing else: another split of the data is another study.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .errors import require
from .study import SEEDS_TO_DECIDE

CONFIDENCE = 0.95
#: The error that a verdict may have; also of the equivalence test, whose interval is therefore 1 - 2 * SIGNIFICANCE.
SIGNIFICANCE = 0.05
#: Up to so many pairs every flip of signs is counted; beyond, a fixed random sample of ``RESAMPLES``.
EXACT_PAIRS = 16
RESAMPLES = 99_999


@dataclass(frozen=True)
class Summary:
    """The scores of one arm over its seeds, as shares in [0, 1].

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
    """Mean and spread of one arm's scores.

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


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Student's interval of the mean; infinite below two values, of no width where all are equal.

    Raises:
        AblationError: scipy is missing.

    Example:
        >>> low, high = t_interval([1.0, 2.0, 3.0])
        >>> round(low, 3), round(high, 3)
        (-0.484, 4.484)
    """
    summary = summarise(values)
    if summary.count < 2:
        return -math.inf, math.inf
    reach = _t_quantile((1 + confidence) / 2, summary.count - 1) * summary.deviation / math.sqrt(summary.count)
    return summary.mean - reach, summary.mean + reach


def _t_quantile(probability: float, degrees: int) -> float:
    require("scipy", "scipy", "the intervals and tests of the report")
    from scipy import stats

    return float(stats.t.ppf(probability, degrees))


@dataclass(frozen=True)
class PairedDifference:
    """One arm against another over the seeds that both finished, in points.

    Attributes:
        seeds: the pairs' seeds.
        values: the difference of each pair.
        mean: their mean; NaN without pairs.
        deviation: their standard deviation (n - 1); NaN below two pairs.
        low, high: the 95 % t interval; infinite below two pairs.
        bootstrap: the 95 % BCa interval; None below three pairs, or where the differences are all equal.
        p_value: of the exact two-sided sign-flip test; 1 without pairs.
        margin: differences below this many points count as equivalent; 0 = equivalence is never claimed.
        inner_low, inner_high: the 90 % t interval, which lies inside ±margin exactly where ``equivalence_p`` <= 0.05.
        equivalence_p: of the two one-sided t tests against ±margin; 1 below two pairs or without a margin.
        comparisons: how many comparisons were adjusted together; 1 = this one stands alone.
        adjusted_p, adjusted_equivalence_p: after ``holm`` over these; equal to the plain ones where it stands alone.
    """

    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: float
    deviation: float
    low: float
    high: float
    bootstrap: tuple[float, float] | None
    p_value: float
    margin: float
    inner_low: float
    inner_high: float
    equivalence_p: float
    comparisons: int
    adjusted_p: float
    adjusted_equivalence_p: float

    @property
    def count(self) -> int:
        """Number of pairs."""
        return len(self.values)

    @property
    def exact(self) -> bool:
        """Whether the sign-flip test counted every flip, in place of a sample."""
        return self.count <= EXACT_PAIRS

    @property
    def effect_size(self) -> float:
        """Cohen's d_z: mean over standard deviation of the differences; NaN where there is none or it is zero."""
        return self.mean / self.deviation if self.count > 1 and self.deviation > 0 else math.nan

    @property
    def differs(self) -> bool:
        """Sign-flip p (adjusted) <= 0.05, and the 95 % t interval leaves out zero, with enough pairs."""
        enough = self.count >= SEEDS_TO_DECIDE
        return enough and self.adjusted_p <= SIGNIFICANCE and not self.low <= 0 <= self.high

    @property
    def negligible(self) -> bool:
        """Both one-sided tests (adjusted) put the difference inside ±margin at 0.05, with enough pairs.

        Six pairs are asked for here too: of two or three that happen to agree, the t test is sure of anything.
        """
        return self.count >= SEEDS_TO_DECIDE and self.adjusted_equivalence_p <= SIGNIFICANCE

    @property
    def outcome(self) -> str:
        """'better', 'worse', 'equivalent' or 'undecided'.

        'better' and 'worse' where ``differs``, even where the difference is ``negligible`` as well (the sentence then
        says so); 'equivalent' where it is negligible only; 'undecided' where it is neither.
        """
        if self.differs:
            return "better" if self.mean > 0 else "worse"
        return "equivalent" if self.negligible else "undecided"


def compare(
    candidate: Mapping[int, float],
    control: Mapping[int, float],
    total: int = 1,
    *,
    margin: float = 0.0,
    interval_only: bool = False,
) -> PairedDifference:
    """Pairs two arms by seed.

    Args:
        candidate: seed -> score in [0, 1] with ``total`` 1, or seed -> number of correct test images. Whole numbers
            are better where there are any, since equal differences are then exactly equal.
        control: likewise.
        total: number of test images.
        margin: see ``PairedDifference``.
        interval_only: compute the t intervals alone, as for each of a thousand classes; no verdict follows from it.

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
    seeds = tuple(sorted(candidate.keys() & control.keys()))
    raw = [candidate[seed] - control[seed] for seed in seeds]
    values = tuple(100 * difference / total for difference in raw)
    n = len(values)
    mean = 100 * math.fsum(raw) / (n * total) if n else math.nan
    low, high = t_interval(values)
    inner_low, inner_high = t_interval(values, 1 - 2 * SIGNIFICANCE)
    p_value, equivalence_p = (1.0, 1.0) if interval_only else (_sign_flip(raw), _equivalence(values, margin))
    return PairedDifference(
        seeds=seeds,
        values=values,
        mean=mean,
        deviation=summarise(values).deviation,
        low=low,
        high=high,
        bootstrap=None if interval_only else _bootstrap(values),
        p_value=p_value,
        margin=margin,
        inner_low=inner_low,
        inner_high=inner_high,
        equivalence_p=equivalence_p,
        comparisons=1,
        adjusted_p=p_value,
        adjusted_equivalence_p=equivalence_p,
    )


def _sign_flip(differences: Sequence[float]) -> float:
    from scipy import stats

    if len(differences) < 2:
        return 1.0
    test = stats.permutation_test(
        (differences,),
        lambda d, axis: d.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=math.inf if len(differences) <= EXACT_PAIRS else RESAMPLES,
        random_state=0,
    )
    return float(min(1.0, test.pvalue))


def _equivalence(values: Sequence[float], margin: float) -> float:
    """The larger p value of two one-sided t tests: mean > -margin, and mean < margin."""
    from scipy import stats

    if len(values) < 2 or margin <= 0:
        return 1.0
    if min(values) == max(values):  # no spread: t is infinite
        return 0.0 if abs(values[0]) < margin else 1.0
    above = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(values, margin, alternative="less").pvalue
    return float(max(above, below))


def _bootstrap(values: Sequence[float]) -> tuple[float, float] | None:
    """The BCa interval; None where it has no meaning or scipy can't give one."""
    import numpy as np
    from scipy import stats

    if len(values) < 3 or min(values) == max(values):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy's own on degenerate data: the result is NaN then, and left out
        found = stats.bootstrap(
            (values,), np.mean, confidence_level=CONFIDENCE, n_resamples=9_999, method="BCa", random_state=0
        ).confidence_interval
    low, high = float(found.low), float(found.high)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given.

    Example:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [1.0] * len(p_values)
    reached = 0.0
    for rank, i in enumerate(order):
        reached = max(reached, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = reached
    return adjusted


def adjust(differences: Mapping[str, PairedDifference]) -> dict[str, PairedDifference]:
    """The comparisons with p values adjusted for their number; those without pairs count too.

    Args:
        differences: every comparison but the primary one, by arm.
    """
    adjusted = holm([difference.p_value for difference in differences.values()])
    equivalence = holm([difference.equivalence_p for difference in differences.values()])
    return {
        arm: dataclasses.replace(
            difference, comparisons=len(differences), adjusted_p=p, adjusted_equivalence_p=equivalence_p
        )
        for (arm, difference), p, equivalence_p in zip(differences.items(), adjusted, equivalence, strict=True)
    }


def seeds_needed(comparisons: int = 1) -> int:
    """The pairs below which the sign-flip test can't reach 0.05 for the clearest of so many comparisons.

    Its smallest p value over n pairs is 2 / 2**n, and Holm multiplies the smallest by the number of comparisons.

    Example:
        >>> [seeds_needed(comparisons) for comparisons in (1, 5, 15)]
        [6, 8, 10]
    """
    n = 1
    while max(1, comparisons) * 2 / 2**n > SIGNIFICANCE:
        n += 1
    return n


def resolvable_difference(
    seeds: int, deviation: float | None = None, *, comparisons: int = 1, power: float = 0.8
) -> float:
    """The smallest true difference that so many seeds find with probability ``power``.

    From the noncentral t distribution at 0.05 / ``comparisons``. Where the sign-flip test leaves nothing but every
    difference of one sign (six seeds for one comparison), the probability of that counts as well.

    Args:
        seeds: pairs.
        deviation: standard deviation of the paired differences in points, such as a pilot's; None = not known, and the
            answer is in units of it.
        comparisons: that are adjusted together; 1 for the primary one.
        power: the probability.

    Returns:
        In points (or standard deviations); infinite below ``seeds_needed(comparisons)``.

    Raises:
        AblationError: scipy is missing.
        ValueError: ``power`` does not lie between 0.05 and 1.

    Example:
        >>> round(resolvable_difference(10, 0.4), 2), resolvable_difference(5)
        (0.4, inf)
    """
    require("scipy", "scipy", "the intervals and tests of the report")
    from scipy import optimize, stats

    if not SIGNIFICANCE < power < 1:
        raise ValueError(f"power is {power}, expected between {SIGNIFICANCE} and 1")
    comparisons = max(1, comparisons)
    if seeds < seeds_needed(comparisons):
        return math.inf
    level = SIGNIFICANCE / comparisons
    critical = _t_quantile(1 - level / 2, seeds - 1)

    def missed(effect: float) -> float:
        chance = float(stats.nct.cdf(critical, seeds - 1, effect * math.sqrt(seeds)))
        return 0.0 if math.isnan(chance) else chance  # scipy's answer far out in the tail

    effect = float(optimize.brentq(lambda effect: missed(effect) - (1 - power), 0.0, 20.0))
    if level * 2**seeds < 4:
        effect = max(effect, float(stats.norm.ppf(power ** (1 / seeds))))
    return effect if deviation is None else effect * deviation


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


def probability(value: float) -> str:
    """A p value: two digits, never "0".

    Example:
        >>> probability(0.03125), probability(0.00002), probability(1.0)
        ('0.031', '< 0.0001', '1')
    """
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def interval(difference: PairedDifference) -> str:
    """The t interval in words, or why there is none.

    Example:
        >>> interval(compare({0: 1}, {0: 1}, 10))
        'no interval from 1 pair'
    """
    if difference.count < 2:
        return f"no interval from {difference.count} pair{'' if difference.count == 1 else 's'}"
    return f"{points(difference.low)} to {points(difference.high)}"


def word(difference: PairedDifference) -> str:
    """The verdict on one comparison in a few words, for a table.

    Example:
        >>> word(compare({s: 95 for s in range(6)}, {s: 95 for s in range(6)}, 100, margin=0.5))
        'equivalent within ±0.5'
    """
    if difference.outcome == "equivalent":
        return f"equivalent within ±{difference.margin:g}"
    if difference.outcome == "undecided":
        needed = seeds_needed(difference.comparisons)
        return f"undecided (n < {needed})" if difference.count < needed else "undecided"
    return f"{difference.outcome}, by less than {difference.margin:g}" if difference.negligible else difference.outcome


def _p(name: str, plain: float, adjusted: float, comparisons: int) -> str:
    shown = probability(adjusted)
    sign = "" if shown.startswith("<") else "= "
    return f"{name} p {sign}{shown}" + (f", adjusted for {comparisons} comparisons" if comparisons > 1 else "")


def verdict(difference: PairedDifference, candidate: str, control: str, metric: str = "accuracy") -> str:
    """The answer to one comparison in one sentence, no stronger than the data.

    Args:
        difference: the comparison.
        candidate: the candidate's name in a sentence.
        control: the control's.
        metric: what the points are points of.

    Example:
        >>> d = compare({s: 95 + s % 2 for s in range(6)}, {s: 90 for s in range(6)}, total=100)
        >>> verdict(d, "PNN", "control")  # doctest: +ELLIPSIS
        'PNN is better than control by 5.50 points of accuracy (95 % interval +4.93 to +6.07, 6 seeds, ...'
    """
    n = difference.count
    seeds = f"{n} seed{'' if n == 1 else 's'}"
    if n == 0:
        return f"Undecided: no seed has finished both {candidate} and {control}."
    seen = f"{points(difference.mean)} points of {metric}"
    inside = f"95 % interval {interval(difference)}" if n > 1 else interval(difference)
    if n < SEEDS_TO_DECIDE:
        return (
            f"Undecided: {seeds} can't decide between {candidate} and {control} (the test needs {SEEDS_TO_DECIDE}); "
            f"the difference seen is {seen} ({inside})."
        )
    test = _p("sign-flip", difference.p_value, difference.adjusted_p, difference.comparisons)
    evidence = f"{inside}, {seeds}, {test}"
    if difference.outcome == "equivalent":
        test = _p("equivalence", difference.equivalence_p, difference.adjusted_equivalence_p, difference.comparisons)
        return (
            f"{candidate} and {control} are equivalent within ±{difference.margin:g} points of {metric}, the margin "
            f"set beforehand: the difference seen is {points(difference.mean)} ({inside}, {seeds}, {test})."
        )
    if difference.outcome == "undecided":
        needed = seeds_needed(difference.comparisons)
        reason = (
            f"{seeds} can't decide among {difference.comparisons} comparisons (that takes {needed})"
            if n < needed
            else f"these runs can't tell {candidate} from {control}"
        )
        subject = f" {candidate} against {control}:" if n < needed else ""
        return f"Undecided:{subject} {reason}; the difference seen is {seen} ({evidence})."
    by = f"{abs(difference.mean):.2f} points of {metric}"
    less = (
        f", but by less than the margin of {difference.margin:g} points set beforehand" if difference.negligible else ""
    )
    return f"{candidate} is {difference.outcome} than {control} by {by}{less} ({evidence})."
