"""The figures of a study, arm by arm, and the table that the terminal shows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .records import Records
from .statistics import PairedDifference, Summary, compare, points, summarise, verdict
from .study import SEEDS_TO_DECIDE, Study


@dataclass(frozen=True)
class ArmResult:
    """One line of the tables.

    Attributes:
        arm: its key in ``arms.CATALOGUE``.
        title: its name for people.
        parameters: learnable parameters; None before its first run has ended, like the next two.
        mask_bytes: what its masks or fixed filters take in memory.
        macs: multiply-adds of one image.
        width: channels of the first stage.
        accuracy: over the finished runs.
        difference: to the control, paired by seed; None for the control itself.
        seconds_per_epoch: median over runs of each run's median; None before its first run has ended.
        unfinished: (seed, what happened) of runs that diverged or broke.
    """

    arm: str
    title: str
    parameters: int | None
    mask_bytes: int | None
    macs: int | None
    width: int | None
    accuracy: Summary
    difference: PairedDifference | None
    seconds_per_epoch: float | None
    unfinished: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class StudyResult:
    """A study's answer.

    Attributes:
        verdict: one sentence.
        primary: the candidate against the control.
        arms: in the study's order.
        missing: number of runs without a row.
    """

    verdict: str
    primary: PairedDifference
    arms: tuple[ArmResult, ...]
    missing: int


def title(study: Study, arm: str) -> str:
    """An arm's name for people."""
    return study.arm(arm).title or arm


def phrase(study: Study, arm: str) -> str:
    """What a sentence calls an arm."""
    return study.arm(arm).phrase or title(study, arm)


def _median(values: list[float]) -> float | None:
    if not values:
        return None
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def evaluate(records: Records) -> StudyResult:
    """Draws a study's answer from its rows.

    Raises:
        AblationError: scipy is missing.
    """
    study = records.study
    total = next((row["total"] for row in records.results), 1)
    control = records.correct(study.question.control)
    arms = []
    for arm in study.arm_names:
        rows = records.of_arm(arm)
        known = next((row for row in rows if "parameters" in row), {})
        times = [row["seconds_per_epoch"] for row in rows if row.get("seconds_per_epoch") is not None]
        arms.append(
            ArmResult(
                arm=arm,
                title=title(study, arm),
                parameters=known.get("parameters"),
                mask_bytes=known.get("mask_bytes"),
                macs=known.get("macs"),
                width=known.get("width"),
                accuracy=summarise([row["accuracy"] for row in rows if row["status"] == "finished"]),
                difference=None if arm == study.question.control else compare(records.correct(arm), control, total),
                seconds_per_epoch=_median(times),
                unfinished=tuple((row["seed"], row["problem"]) for row in rows if row["status"] != "finished"),
            )
        )
    primary = compare(records.correct(study.question.candidate), control, total)
    sentence = verdict(primary, phrase(study, study.question.candidate), phrase(study, study.question.control))
    return StudyResult(sentence, primary, tuple(arms), len(records.missing))


def number(value: int | None) -> str:
    """A count with thousands separators.

    Example:
        >>> number(1234567), number(None)
        ('1,234,567', '–')
    """
    return "–" if value is None else f"{value:,}"


def accuracy(summary: Summary) -> str:
    """Mean and standard deviation in per cent.

    Example:
        >>> accuracy(summarise([0.98, 0.99]))
        '98.50 ± 0.71'
    """
    if summary.count == 0:
        return "–"
    mean = f"{100 * summary.mean:.2f}"
    return mean if math.isnan(summary.deviation) else f"{mean} ± {100 * summary.deviation:.2f}"


def difference(paired: PairedDifference | None) -> str:
    """Mean paired difference and its interval, in points."""
    if paired is None:
        return "(control)"
    if paired.count == 0:
        return "–"
    if paired.count == 1:
        return f"{points(paired.mean)} (1 seed)"
    return f"{points(paired.mean)} [{points(paired.low)}, {points(paired.high)}]"


def seconds(value: float | None) -> str:
    """Seconds per epoch.

    Example:
        >>> seconds(0.123), seconds(None)
        ('0.12', '–')
    """
    return "–" if value is None else f"{value:.2f}"


COLUMNS = (
    "arm",
    "accuracy, %",
    "against control, points",
    "parameters",
    "mask bytes",
    "multiply-adds",
    "s/epoch",
    "seeds",
)


def cells(result: ArmResult) -> tuple[str, ...]:
    """The cells of an arm under ``COLUMNS``."""
    return (
        result.title,
        accuracy(result.accuracy),
        difference(result.difference),
        number(result.parameters),
        number(result.mask_bytes),
        number(result.macs),
        seconds(result.seconds_per_epoch),
        str(result.accuracy.count),
    )


def text_table(result: StudyResult) -> str:
    """The table in fixed-width columns, names to the left, figures to the right."""
    rows = [COLUMNS, *(cells(arm) for arm in result.arms)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]

    def line(row: tuple[str, ...]) -> str:
        first, *rest = row
        return "  ".join(
            [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        )

    head, *body = rows
    return "\n".join([line(head), "  ".join("-" * width for width in widths), *map(line, body)])


def text_report(records: Records, result: StudyResult) -> str:
    """What the terminal shows: the verdict first, then the table, then what the columns mean."""
    study = records.study
    total = next((row["total"] for row in records.results), None)
    images = "" if total is None else f" over all {total} test images"
    lines = [result.verdict, "", text_table(result), ""]
    lines.append(f"accuracy: correct answers{images} after the last epoch, mean ± standard deviation over seeds")
    lines.append(
        "against control: paired by seed, mean and 95 % t interval; only "
        f"{title(study, study.question.candidate)} against {title(study, study.question.control)}"
    )
    lines.append("    was fixed as the question beforehand, the other intervals are not corrected for their number")
    for arm in result.arms:
        lines += [f"{arm.title}, seed {seed}: {problem}" for seed, problem in arm.unfinished]
    if result.missing:
        lines.append(f"{result.missing} of {len(study.runs)} runs have no result yet")
    if len(study.seeds) < SEEDS_TO_DECIDE:
        lines.append(f"a verdict needs {SEEDS_TO_DECIDE} seeds or more; fewer only show how the tool works")
    return "\n".join(lines)
