"""What a study will do and cost, told before it does it: ``torch-pnn ablate --dry-run``.

Nothing is estimated from a formula that can be measured: each arm is built, trained for a few steps on the study's own
batches and tested on one, and the times are multiplied up. Memory is what the process grew by meanwhile. What the seeds
can resolve comes from ``statistics``, with the deviation of the results that are there already, or a stated assumption.
Nothing is written.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics as numbers
import time
from collections.abc import Sequence
from dataclasses import dataclass

from . import training
from .data import Dataset
from .errors import UsageError, require
from .progress import duration
from .records import Records, Run
from .statistics import CONFIDENCE, resolvable_difference, seeds_needed
from .study import Study
from .tables import families

#: An arm's steps are timed until both have passed, the first step (allocations, tuning) not counted.
LEAST_SECONDS, LEAST_STEPS = 0.3, 3

#: Differences between two arms of equal seeds had about this deviation, in points, in the studies in docs/studies/;
#: assumed where a study has no results of its own yet.
ASSUMED_DEVIATION = 0.5


@dataclass(frozen=True)
class ArmPlan:
    """What one arm costs.

    Attributes:
        name: the arm's.
        seeds: number of its runs.
        left: number of its runs that have no result yet.
        width: channels of the network's first stage.
        parameters: learnable parameters.
        macs: multiply-adds of one image.
        mask_bytes: of stored masks and fixed filters.
        step_seconds: of one training step, the median of those that were timed.
        run_seconds: of one run: every step, every test.
        memory_bytes: what the process grew by while it trained; None where the system does not tell.
    """

    name: str
    seeds: int
    left: int
    width: float
    parameters: int
    macs: int
    mask_bytes: int
    step_seconds: float
    run_seconds: float
    memory_bytes: int | None


@dataclass(frozen=True)
class Plan:
    """What a study costs.

    Attributes:
        study: the settings.
        data: the images.
        arms: each arm's costs.
        jobs: runs side by side.
        shard: which part of the runs this command would do, as in "part 2 of 8"; "" = all.
        steps_per_epoch: training steps of an epoch.
        resolution: sentences on what the seeds can resolve.
    """

    study: Study
    data: Dataset
    arms: tuple[ArmPlan, ...]
    jobs: int
    shard: str
    steps_per_epoch: int
    resolution: tuple[str, ...]

    @property
    def runs(self) -> int:
        """All runs of the study."""
        return len(self.study.runs)

    @property
    def left(self) -> int:
        """The runs that this command would do."""
        return sum(arm.left for arm in self.arms)

    @property
    def seconds(self) -> float:
        """Of the whole command: the runs that are left, side by side."""
        alone = sum(arm.left * arm.run_seconds for arm in self.arms)
        longest = max((arm.run_seconds for arm in self.arms if arm.left), default=0.0)
        return max(longest, alone / max(1, min(self.jobs, self.left)))


class _Enough(Exception):
    """Ends an epoch of which enough steps were timed."""


class _Watch:
    """Takes the time; on the processor without what other programs took of it meanwhile."""

    def __init__(self, trainer: training.Trainer) -> None:
        self._trainer = trainer
        self._mark = self._now()

    def _now(self) -> tuple[float, float]:
        self._trainer.synchronise()
        return time.perf_counter(), time.process_time()

    def lap(self) -> float:
        """Seconds since the last call."""
        before, self._mark = self._mark, self._now()
        passed, computed = self._mark[0] - before[0], self._mark[1] - before[1]
        # With one thread, time in which nothing was computed is time in which another program was.
        return min(passed, computed) if self._trainer.device.type == "cpu" else passed


def _steps(trainer: training.Trainer) -> float:
    """Seconds of a training step: the median over a few of the first epoch's, the very first left out."""
    times: list[float] = []
    watch = _Watch(trainer)

    def on_step(_: float) -> None:
        times.append(watch.lap())
        if len(times) > LEAST_STEPS and sum(times[1:]) >= LEAST_SECONDS:
            raise _Enough

    with contextlib.suppress(_Enough):
        trainer.train_epoch(1, on_step)
    # The last batch of an epoch may be smaller; where there is but one, there is nothing else.
    return numbers.median(times[1:]) if len(times) > 1 else times[0]


def _test(trainer: training.Trainer) -> float:
    """Seconds per image of a test."""
    data = trainer.data
    count = min(training.EVALUATION_BATCH, data.test_count)
    fastest = math.inf
    watch = _Watch(trainer)
    for _ in range(2):
        trainer.score(itertools.islice(data.test_batches("test", count, device=str(trainer.device)), 1))
        fastest = min(fastest, watch.lap())
        if fastest > 1:
            break
    return fastest / max(1, count)


def images_tested(study: Study, data: Dataset) -> int:
    """Images that one run looks at in tests.

    The validation images after each epoch, the test images when they are wanted, the shifted ones, in four directions,
    at the end.
    """
    epochs = study.schedule.epochs
    tests = epochs // study.schedule.test_every + (epochs % study.schedule.test_every > 0)
    return epochs * data.validation_count + (tests + 4 * len(study.data.shifts)) * data.test_count


def measure(study: Study, name: str, data: Dataset, *, left: int) -> ArmPlan:
    """Builds an arm and times a few of its steps.

    Args:
        study: the settings.
        name: the arm's.
        data: the images.
        left: number of its runs that have no result yet.

    Raises:
        UsageError: the arm can't be built; the sentence names it.
    """
    seed = study.seeds_of(name)[0]
    with contextlib.ExitStack() as stack:
        try:
            trainer, peak = stack.enter_context(training.measuring(study, name, seed, data))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UsageError(f"the arm {name} can't be built: {' '.join(str(error).split())}") from error
        step = _steps(trainer)
        test = _test(trainer)
        built = trainer.built
        epochs = study.schedule.epochs
        return ArmPlan(
            name=name,
            seeds=len(study.seeds_of(name)),
            left=left,
            width=built.width,
            parameters=built.parameters,
            macs=built.macs,
            mask_bytes=built.mask_bytes,
            step_seconds=step,
            run_seconds=epochs * trainer.steps_per_epoch * step + images_tested(study, data) * test,
            memory_bytes=peak.bytes(),
        )


def make(
    study: Study, data: Dataset, *, jobs: int, runs: Sequence[Run], shard: str = "", records: Records | None = None
) -> Plan:
    """The plan of a study.

    Args:
        study: the settings.
        data: its images.
        jobs: runs side by side.
        runs: those that the command would do, were there no results yet.
        shard: how that part is called; "" = all.
        records: the results that are there already; None where there are none.

    Raises:
        UsageError: an arm can't be built.
    """
    done = {(row["arm"], row["seed"]) for row in records.results} if records is not None else set()
    left = [run for run in runs if run not in done]
    arms = tuple(measure(study, name, data, left=sum(run[0] == name for run in left)) for name in study.arm_names)
    steps = -(-data.train_count // study.schedule.batch_size)
    return Plan(study, data, arms, jobs, shard, steps, resolution(study, records))


def resolution(study: Study, records: Records | None) -> tuple[str, ...]:
    """What the seeds can tell apart, in sentences.

    Args:
        study: the settings.
        records: results of it; three finished pairs or more give the deviation of the differences.

    Raises:
        AblationError: scipy is missing.
    """
    question, seeds = study.question, len(study.seeds)
    pilot: list[float] = []
    if records is not None:
        first, second = records.scores(question.candidate), records.scores(question.control)
        pilot = [100 * (first[seed] - second[seed]) for seed in sorted(first.keys() & second.keys())]
    known = len(pilot) >= 3
    deviation = numbers.stdev(pilot) if known else ASSUMED_DEVIATION
    source = f"as the {len(pilot)} pairs that are there do" if known else "an assumption, there are no results yet"
    pair = f"{question.candidate} and {question.control}"
    least = seeds_needed()
    if seeds < least:
        sentences = [
            f"{seeds} seed{'' if seeds == 1 else 's'} can't decide between {pair}: the sign-flip test needs {least}"
        ]
    else:
        smallest = resolvable_difference(seeds, deviation)
        reach = t_reach(seeds) * deviation
        sentences = [
            f"{seeds} seeds find a difference of {smallest:.2f} points between {pair} with 80 % probability,",
            f"and the 95 % interval reaches about ±{reach:.2f} points,",
            f"if paired differences deviate by {deviation:.2f} points ({source})",
        ]
        if reach >= question.margin > 0:
            sentences.append(
                f"so 'equivalent within ±{question.margin:g} points' is out of reach: more seeds or a wider margin"
            )
    for setting, family in families(study).items():
        count, least = min(len(study.seeds_of(arm)) for arm in family), seeds_needed(len(family))
        plural = "" if len(family) == 1 else "s"
        what = f"the sweep over {setting}, {len(family)} arm{plural}" if setting else f"{len(family)} other arm{plural}"
        if count < least:
            sentences.append(f"{what}: {count} seeds show differences, {least} can decide ({len(family)} comparisons)")
        else:
            smallest = resolvable_difference(count, deviation, comparisons=len(family))
            sentences.append(f"{what}: {count} seeds find a difference of {smallest:.2f} points")
    return tuple(sentences)


def t_reach(seeds: int) -> float:
    """Half the 95 % t interval of a mean over so many seeds, in standard deviations.

    Example:
        >>> round(t_reach(10), 3)
        0.715
    """
    require("scipy", "scipy", "what the seeds can resolve")
    from scipy import stats

    return float(stats.t.ppf((1 + CONFIDENCE) / 2, seeds - 1)) / math.sqrt(seeds)


def _counted(value: float) -> str:
    """A number with a unit, three digits of it.

    Example:
        >>> _counted(950), _counted(69770), _counted(1.25e6), _counted(3.1e9)
        ('950', '69.8 k', '1.25 M', '3.1 G')
    """
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            cell.ljust(width) if not place else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]


def _seeds(seeds: Sequence[int]) -> str:
    if seeds == tuple(range(len(seeds))):
        return f"0 to {len(seeds) - 1}" if len(seeds) > 1 else "0"
    return ", ".join(map(str, seeds))


def text(plan: Plan) -> str:
    """The plan for people."""
    study, data, schedule = plan.study, plan.data, plan.study.schedule
    question = study.question
    primary, others = len(study.seeds), len(study.other_seeds or study.seeds)
    height, width = data.image_shape[1:]
    sets = [f"{data.train_count} training", f"{data.test_count} test"]
    if data.validation_count:
        sets.insert(1, f"{data.validation_count} validation")
    width_text = f", width {study.model.width}" if study.model.width else ""
    plural = "" if study.threads == 1 else "s"
    lines = [
        f"Study {study.name}: {study.title}",
        f"question   {question.candidate} against {question.control}, equivalent within ±{question.margin:g} points",
        f"data       {data.name}: {', '.join(sets)} images of {height}×{width}, {data.classes} classes",
        f"network    {study.model.network}{width_text}; {study.precision} on {study.device}, {study.threads} "
        f"thread{plural} a run",
        f"training   {schedule.epochs} epochs of {plan.steps_per_epoch} steps of {schedule.batch_size} images; "
        f"{schedule.optimizer}, learning rate {schedule.learning_rate:g}, {schedule.decay}",
        f"seeds      {primary} for the compared pair ({_seeds(study.seeds)})"
        + (f", {others} for the other arms" if len(study.arms) > 2 else ""),
        "",
    ]
    rows = [["arm", "seeds", "width", "parameters", "multiply-adds", "masks", "a step", "a run", "memory"]]
    for arm in plan.arms:
        rows.append(
            [
                arm.name,
                f"{arm.seeds}",
                f"{arm.width:g}" if arm.width else "–",
                _counted(arm.parameters),
                _counted(arm.macs),
                f"{_counted(arm.mask_bytes)}B",
                f"{1000 * arm.step_seconds:.1f} ms",
                duration(arm.run_seconds),
                "–" if arm.memory_bytes is None else f"{arm.memory_bytes / 2**20:.0f} MiB",
            ]
        )
    lines += _table(rows)
    epochs = sum(arm.seeds for arm in plan.arms) * schedule.epochs
    lines += [
        "",
        f"{plan.runs} runs, {epochs} epochs, {epochs * plan.steps_per_epoch} steps"
        + (f"; this command does {plan.shard}" if plan.shard else "")
        + (f"; {plan.left} runs are left" if plan.left < plan.runs else ""),
        f"about {duration(plan.seconds)} with {plan.jobs} run{'' if plan.jobs == 1 else 's'} side by side"
        if plan.left
        else "nothing is left to be done",
        "(measured just now, one arm at a time, less what other programs took; runs side by side slow one another)",
        "",
        *plan.resolution,
    ]
    return "\n".join(lines)
