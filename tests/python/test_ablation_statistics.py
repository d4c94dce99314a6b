"""The statistics of ablation studies: known answers, edge cases, and sentences that don't claim too much."""

from __future__ import annotations

import itertools
import math

import pytest

from torch_pnn.ablation.statistics import compare, interval, points, summarise, verdict
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
