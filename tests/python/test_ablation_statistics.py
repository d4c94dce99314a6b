"""The statistics of ablation studies: known answers, edge cases, and sentences that don't claim too much."""

from __future__ import annotations

import itertools
import math

import pytest

from torch_pnn.ablation.statistics import (
    adjust,
    compare,
    holm,
    interval,
    points,
    probability,
    resolvable_difference,
    seeds_needed,
    summarise,
    t_interval,
    verdict,
    word,
)
from torch_pnn.ablation.study import SEEDS_TO_DECIDE


def _pairs(differences: list[int], base: int = 500) -> tuple[dict[int, int], dict[int, int]]:
    return {s: base + d for s, d in enumerate(differences)}, dict.fromkeys(range(len(differences)), base)


def test_student_interval_of_a_textbook_example():
    # Student (1908), the sleep data: mean 1.58, 95 % interval 0.70 to 2.46, in tenths of an hour here.
    extra = [12, 24, 13, 13, 0, 10, 18, 8, 46, 14]
    difference = compare(*_pairs(extra), total=1000)
    assert difference.mean == pytest.approx(1.58)
    assert difference.low == pytest.approx(0.7001, abs=1e-4)
    assert difference.high == pytest.approx(2.4599, abs=1e-4)


@pytest.mark.parametrize(
    "differences", [[1, 2, 3, 4, 5, 6], [3, -1, 2, 2, 0, 5, -2], [0, 0, 0, 1, -1, 0], [1, 1, 1, 1, 1, 1, 1, 1]]
)
def test_sign_flip_test_counts_every_flip(differences):
    observed = abs(sum(differences))
    flips = itertools.product((-1, 1), repeat=len(differences))
    counted = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= observed for signs in flips]
    expected = sum(counted) / len(counted)
    assert compare(*_pairs(differences), total=600).p_value == pytest.approx(expected)


def test_no_difference_at_all_decides_nothing():
    difference = compare(*_pairs([0] * 8), total=600)
    assert (difference.mean, difference.low, difference.high, difference.p_value) == (0, 0, 0, 1)
    assert difference.outcome == "undecided"
    assert "can't tell" in verdict(difference, "PNN", "control")


def test_a_constant_difference_is_seen():
    difference = compare(*_pairs([6] * 6), total=600)
    assert difference.outcome == "better"
    assert (difference.low, difference.high) == (1.0, 1.0)
    assert compare(*_pairs([-6] * 6), total=600).outcome == "worse"


@pytest.mark.parametrize("count", range(2, SEEDS_TO_DECIDE))
def test_too_few_seeds_never_decide(count):
    difference = compare(*_pairs([50] * count), total=600)
    assert difference.outcome == "undecided"
    assert f"{count} seeds can't decide" in verdict(difference, "PNN", "control")


def test_interval_and_test_must_agree():
    # One outlier: the test alone would decide, the interval does not.
    difference = compare(*_pairs([1, 1, 1, 1, 1, 90]), total=600)
    assert difference.p_value < 0.05
    assert difference.low < 0 < difference.high
    assert difference.outcome == "undecided"


def test_pairs_are_made_by_seed_and_only_by_seed():
    difference = compare({3: 10, 1: 20, 9: 30}, {9: 31, 3: 8, 5: 0}, total=100)
    assert difference.seeds == (3, 9)
    assert difference.values == (2.0, -1.0)


def test_none_and_one_pair():
    none = compare({}, {1: 2}, total=10)
    assert none.count == 0
    assert math.isnan(none.mean)
    assert verdict(none, "PNN", "control").startswith("Undecided: no seed")
    one = compare({1: 3}, {1: 2}, total=10)
    assert (one.count, one.mean) == (1, 10.0)
    assert math.isinf(one.low)
    assert interval(one) == "no interval from 1 pair"
    assert "1 seed can't decide" in verdict(one, "PNN", "control")


def test_many_seeds_are_sampled_the_same_way_each_time():
    pairs = _pairs([1, -2, 3, 4, -1, 2] * 4)
    first = compare(*pairs, total=600)
    assert first.p_value == compare(*pairs, total=600).p_value
    assert 0 < first.p_value < 0.2


def test_verdict_says_how_much_and_how_sure():
    sentence = verdict(compare(*_pairs([6, 7, 5, 6, 8, 4]), total=600), "PNN", "its control")
    assert sentence.startswith("PNN is better than its control by 1.00 points")
    for part in ("95 % interval", "6 seeds", "p = 0.031"):
        assert part in sentence
    assert verdict(compare(*_pairs([-6, -7, -5, -6, -8, -4]), 600), "PNN", "c").startswith(
        "PNN is worse than c by 1.00"
    )


def test_summary():
    summary = summarise([0.9, 0.92, 0.94])
    assert summary.count == 3
    assert summary.mean == pytest.approx(0.92)
    assert summary.deviation == pytest.approx(0.02)
    assert (summary.low, summary.high) == (0.9, 0.94)
    assert math.isnan(summarise([0.9]).deviation)
    assert summarise([]).count == 0


def test_points_of_nothing():
    assert points(math.nan) == "–"
    assert points(math.inf) == "+∞"


#: Differences of ten pairs in hundredths of a point.
NEAR = [3, -2, 4, 0, -5, 2, 1, -3, 4, -1]


def _near(offset=0, margin=0.5, count=10):
    return compare(*_pairs([offset + value for value in NEAR[:count]]), total=10_000, margin=margin)


def test_two_one_sided_tests_agree_with_the_inner_interval():
    for offset in (0, 40, 46, 47, 48, 49, 50, 60, -47, -49):
        difference = _near(offset)
        inside = -0.5 < difference.inner_low and difference.inner_high < 0.5
        assert (difference.equivalence_p <= 0.05) == inside, offset
    # By hand: t = (0.5 - mean) / (deviation / sqrt(n)), of the side that is nearer.
    from scipy import stats

    difference = _near(47)
    t = (0.5 - difference.mean) / (difference.deviation / math.sqrt(10))
    assert difference.equivalence_p == pytest.approx(float(stats.t.sf(t, 9)))


def test_every_verdict_has_its_rule():
    cases = {0: "equivalent within ±0.5", 20: "better, by less than 0.5", -20: "worse, by less than 0.5", 90: "better"}
    for offset, expected in cases.items():
        assert word(_near(offset)) == expected
    wide = compare(*_pairs([value * 100 for value in NEAR]), total=10_000, margin=0.5)
    assert word(wide) == "undecided"
    assert "equivalent within ±0.5 points of accuracy, the margin set beforehand" in verdict(_near(), "PNN", "c")
    assert "better than c by 0.20 points of mAP, but by less than the margin of 0.5 points" in verdict(
        _near(20), "PNN", "c", "mAP"
    )
    assert "can't tell PNN from c" in verdict(wide, "PNN", "c")
    assert "than the margin" not in verdict(_near(90), "PNN", "c")


def test_equivalence_needs_a_margin_and_enough_pairs():
    assert _near(margin=0.0).outcome == "undecided"
    assert _near(count=5).equivalence_p < 0.05
    assert _near(count=5).outcome == "undecided"
    assert compare({0: 0.5, 1: 0.5}, {0: 0.5, 1: 0.5}, margin=0.5).outcome == "undecided"
    assert compare(*_pairs([0] * 6), total=600, margin=0.5).outcome == "equivalent"
    assert compare(*_pairs([3] * 6), total=600, margin=0.5).equivalence_p == 1.0  # on the margin is not inside


def test_the_bootstrap_interval_and_where_there_is_none():
    difference = compare(*_pairs([12, 24, 13, 13, 0, 10, 18, 8, 46, 14]), total=1000)
    low, high = difference.bootstrap
    # Efron and Tibshirani (1993), chapter 14: BCa follows the skewness, here to the right of the t interval.
    assert difference.low < low < difference.mean < high
    assert low == pytest.approx(1.0, abs=0.1)
    assert high == pytest.approx(2.8, abs=0.2)
    for differences in ([], [3], [3, 4], [5] * 8):
        assert compare(*_pairs(differences), total=600).bootstrap is None
    assert compare(*_pairs([1, 2, 3]), total=600).bootstrap is not None
    assert compare(*_pairs([1, 2, 3]), total=600, interval_only=True).bootstrap is None


def test_scores_that_are_no_counts():
    ours = {0: 0.5012, 1: 0.4873, 2: 0.5104, 3: 0.5066, 4: 0.4991, 5: 0.5011}
    theirs = {seed: score - 0.01 * (1 + seed / 10) for seed, score in ours.items()}
    difference = compare(ours, theirs)
    assert difference.values == pytest.approx([1.0, 1.1, 1.2, 1.3, 1.4, 1.5])
    assert difference.p_value == 2 / 64
    assert difference.outcome == "better"


def test_holm_by_hand():
    # 4 * 0.01, 3 * 0.02, max(2 * 0.02, ...), 1 * 0.5.
    assert holm([0.02, 0.5, 0.01, 0.02]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize("comparisons", [1, 2, 5, 15, 40])
def test_seeds_needed_is_where_the_clearest_data_first_decide(comparisons):
    def clearest(count):
        arms = {"0": compare(*_pairs([50 + s % 3 for s in range(count)]), total=600)}
        return adjust({**arms, **{str(i): compare({}, {}) for i in range(1, comparisons)}})["0"]

    needed = seeds_needed(comparisons)
    assert clearest(needed).outcome == "better"
    assert clearest(needed - 1).outcome == "undecided"
    if comparisons > 1:
        assert f"(n < {needed})" in word(clearest(needed - 1))
        assert f"that takes {needed}" in verdict(clearest(needed - 1), "PNN", "c") or needed <= SEEDS_TO_DECIDE


def test_seeds_needed_is_the_figure_of_the_field():
    assert [seeds_needed(n) for n in (0, 1, 5, 15)] == [6, 6, 8, 10]
    assert seeds_needed() == SEEDS_TO_DECIDE


def test_adjusted_verdicts_are_never_bolder():
    one = compare(*_pairs([1, 2, 3, 4, 5, 6, 7]), total=600, margin=0.5)
    together = adjust({"a": one, "b": one, "c": one})["a"]
    assert together.comparisons == 3
    assert together.p_value == one.p_value
    assert together.adjusted_p == pytest.approx(3 * one.p_value)
    assert "adjusted for 3 comparisons" in verdict(together, "PNN", "c")


def test_resolvable_differences_against_tables_of_power():
    # Cohen (1988), table 2.4.1 as G*Power 3.1 gives it: paired t test, two-sided 0.05, power 0.8.
    assert resolvable_difference(10) == pytest.approx(0.996, abs=0.002)
    assert resolvable_difference(20) == pytest.approx(0.660, abs=0.002)
    assert resolvable_difference(34) == pytest.approx(0.495, abs=0.003)
    assert resolvable_difference(10, 0.4) == pytest.approx(0.4 * resolvable_difference(10))
    # At six seeds every difference must have one sign: 0.8 ** (1 / 6) is the normal distribution at 1.79.
    assert resolvable_difference(6) == pytest.approx(1.793, abs=0.001)
    assert math.isinf(resolvable_difference(5))
    assert math.isinf(resolvable_difference(6, 0.3, comparisons=2))
    assert resolvable_difference(10, comparisons=5) > resolvable_difference(10)
    assert resolvable_difference(10, power=0.9) > resolvable_difference(10)
    with pytest.raises(ValueError, match=r"power is 1.0, expected between 0\.05 and 1"):
        resolvable_difference(10, power=1.0)


@pytest.mark.slow
def test_t_intervals_hold_the_mean_in_95_of_100_studies():
    import numpy as np

    rng = np.random.default_rng(1)
    held = []
    for _ in range(1500):
        low, high = t_interval(rng.normal(0.0, 1.0, 6).tolist())
        held.append(low <= 0 <= high)
    assert 0.932 < sum(held) / len(held) < 0.966  # three standard errors


def test_effect_size():
    assert _near(20).effect_size == pytest.approx(_near(20).mean / _near(20).deviation)
    assert math.isnan(compare(*_pairs([5] * 6), total=600).effect_size)
    assert math.isnan(compare({}, {}).effect_size)


def test_probabilities_in_words():
    assert [probability(p) for p in (0.00005, 0.0001, 0.0312, 1.0)] == ["< 0.0001", "0.0001", "0.031", "1"]
