"""How far the statistics of ablation studies keep what they promise, by simulation.

    python benchmarks/study_statistics.py [--studies 1000]

Prints, for several numbers of seeds: how often the 95 % t and BCa intervals of the mean paired difference hold the true
mean (differences drawn from a normal distribution, from a skewed one, and from the difference of two binomial counts);
how often a study without a difference is called better or worse, and one whose difference is just the margin is called
equivalent (both should be at most 5 %); and how often the difference that ``resolvable_difference`` names is found
(80 % was asked for). Everything goes through ``statistics.compare``, as a report does.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import numpy as np

from torch_pnn.ablation.statistics import PairedDifference, adjust, compare, resolvable_difference, seeds_needed

SEEDS = (6, 10)
IMAGES = 10_000
Draw = Callable[[np.random.Generator, int], np.ndarray]


def normal(rng: np.random.Generator, count: int) -> np.ndarray:
    """Differences with mean 0 and deviation 1."""
    return rng.normal(0.0, 1.0, count)


def skewed(rng: np.random.Generator, count: int) -> np.ndarray:
    """Exponential ones, shifted to mean 0."""
    return rng.exponential(1.0, count) - 1.0


def counts(rng: np.random.Generator, count: int) -> np.ndarray:
    """Two arms of 10,000 images and 0.6 points' deviation between seeds, half of it shared; in points."""
    shared = rng.normal(0.0, 0.006 / math.sqrt(2), count)
    arms = [
        rng.binomial(IMAGES, np.clip(0.6 + shared + rng.normal(0.0, 0.006 / math.sqrt(2), count), 0, 1))
        for _ in range(2)
    ]
    return 100.0 * (arms[0] - arms[1]) / IMAGES


def study(values: np.ndarray, margin: float = 0.0) -> PairedDifference:
    """One study whose paired differences these are."""
    return compare(dict(enumerate(values.tolist())), dict.fromkeys(range(len(values)), 0.0), 100, margin=margin)


def coverage(draw: Draw, seeds: int, studies: int, rng: np.random.Generator) -> tuple[float, float]:
    """The shares of t and BCa intervals that hold the true mean."""
    found = [study(draw(rng, seeds)) for _ in range(studies)]
    student = sum(d.low <= 0 <= d.high for d in found) / studies
    bootstrapped = [d.bootstrap for d in found if d.bootstrap is not None]
    return student, sum(low <= 0 <= high for low, high in bootstrapped) / len(bootstrapped)


def power(seeds: int, comparisons: int, studies: int, rng: np.random.Generator) -> float:
    """How often the difference that is said to be resolvable is found, when no other comparison shows anything."""
    effect = resolvable_difference(seeds, comparisons=comparisons)
    found = 0
    for _ in range(studies):
        difference = study(effect + rng.normal(0.0, 1.0, seeds))
        nothing = {str(other): compare({}, {}) for other in range(1, comparisons)}
        found += adjust({"0": difference, **nothing})["0"].outcome == "better"
    return found / studies


def main() -> None:
    """Runs the simulations and prints a table of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1000, metavar="N", help="simulated studies for each figure")
    studies = parser.parse_args().studies
    rng = np.random.default_rng(2018)
    error = 100 * math.sqrt(0.05 * 0.95 / studies)
    print(f"{studies} studies for each figure; standard error {error:.1f} points near 5 % and 95 %\n")
    print("coverage of the 95 % intervals, %\ndifferences  seeds      t    BCa")
    for draw in (normal, skewed, counts):
        for seeds in SEEDS:
            student, bootstrapped = coverage(draw, seeds, studies, rng)
            print(f"{draw.__name__:11}  {seeds:5}  {100 * student:5.1f}  {100 * bootstrapped:5.1f}", flush=True)
    print("\nfalse verdicts, %\ndifferences  seeds  better or worse  equivalent at the margin")
    for draw in (normal, skewed, counts):
        for seeds in SEEDS:
            wrong = sum(study(draw(rng, seeds)).differs for _ in range(studies)) / studies
            equal = sum(study(draw(rng, seeds) + 4.0, 4.0).negligible for _ in range(studies)) / studies
            print(f"{draw.__name__:11}  {seeds:5}  {100 * wrong:15.1f}  {100 * equal:24.1f}", flush=True)
    print("\nresolvable differences, in standard deviations\ncomparisons  seeds  difference  found, %")
    for comparisons in (1, 5, 15):
        first = seeds_needed(comparisons)
        for seeds in (first, first + 1, first + 2):
            effect = resolvable_difference(seeds, comparisons=comparisons)
            share = power(seeds, comparisons, studies, rng)
            print(f"{comparisons:11}  {seeds:5}  {effect:10.2f}  {100 * share:8.1f}", flush=True)


if __name__ == "__main__":
    main()
