"""The figures of a study, arm by arm, and the tables that show them: on a terminal, as CSV, Markdown and LaTeX.

CSV files hold plain numbers to their last digit; the other tables hold the same, rounded and in words.
"""

from __future__ import annotations

import csv
import io
import math
import statistics as numbers
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_pnn.presets import layer_options

from .errors import AblationError, describe_os_error
from .records import Records, Row, write_whole
from .statistics import (
    SIGNIFICANCE,
    PairedDifference,
    Summary,
    adjust,
    compare,
    points,
    probability,
    seeds_needed,
    summarise,
    verdict,
    word,
)
from .study import SEEDS_TO_DECIDE, Arm, Study


@dataclass(frozen=True)
class ArmResult:
    """One line of the tables.

    Attributes:
        arm: its name in the study.
        title: its name for people.
        group: the sweep that it is a point of; "" = none.
        parameters: learnable parameters; None before its first run has ended, like the next three.
        mask_bytes: what its masks or fixed filters take in memory.
        macs: multiply-adds of one image.
        width: channels of the first stage.
        accuracy: the metric after the last epoch, over the finished runs.
        best: the metric at the epochs that the validation images chose; without runs where there are none.
        difference: to the control, paired by seed and adjusted for the other arms; None for the control itself.
        seconds_per_epoch: median over runs of each run's median; None before its first run has ended.
        memory_bytes: the largest peak of its runs; None where it was not measured.
        shifted: for each test set of moved images, score there - score on the test set, run by run, in points.
        per_class: mean over runs of the metric of each class; None for a class that the test set doesn't show.
        unfinished: (seed, what happened) of runs that diverged or broke.
    """

    arm: str
    title: str
    group: str
    parameters: int | None
    mask_bytes: int | None
    macs: int | None
    width: int | None
    accuracy: Summary
    best: Summary
    difference: PairedDifference | None
    seconds_per_epoch: float | None
    memory_bytes: int | None
    shifted: Mapping[str, Mapping[int, float]]
    per_class: tuple[float | None, ...]
    unfinished: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class StudyResult:
    """A study's answer.

    Attributes:
        verdict: one sentence.
        primary: the candidate against the control.
        arms: in the study's order.
        missing: number of runs without a row.
        metric: what ``ArmResult.accuracy`` is: "accuracy", "mAP" or "mAP@0.5".
        total: number of test images; None before the first run has ended.
    """

    verdict: str
    primary: PairedDifference
    arms: tuple[ArmResult, ...]
    missing: int
    metric: str = "accuracy"
    total: int | None = None

    @property
    def main(self) -> tuple[ArmResult, ...]:
        """The arms that are no point of a sweep."""
        return tuple(arm for arm in self.arms if not arm.group)

    def find(self, name: str) -> ArmResult | None:
        """An arm by its name; None where the study has none."""
        return next((arm for arm in self.arms if arm.arm == name), None)


def title(study: Study, arm: str) -> str:
    """An arm's name for people."""
    return study.arm(arm).title or arm


def phrase(study: Study, arm: str) -> str:
    """What a sentence calls an arm."""
    return study.arm(arm).phrase or title(study, arm)


def _known(rows: Sequence[Row], key: str) -> Any:
    return next((row[key] for row in rows if row.get(key) is not None), None)


def pair(records: Records, candidate: str, control: str) -> PairedDifference:
    """Two arms of a study, paired by seed, with the study's margin; on whole counts where both have them."""
    margin = records.study.question.margin
    first, second = records.scores(candidate), records.scores(control)
    counts = records.correct(candidate), records.correct(control)
    totals = {row["total"] for row in records.results if row["status"] == "finished"}
    if counts[0].keys() == first.keys() and counts[1].keys() == second.keys() and len(totals) == 1:
        return compare(*counts, totals.pop(), margin=margin)
    return compare(first, second, margin=margin)


def families(study: Study) -> dict[str, list[str]]:
    """The arms whose comparisons with the control are adjusted together, the candidate aside.

    Returns:
        "" -> the arms that are no point of a sweep; each swept setting -> its points.
    """
    found: dict[str, list[str]] = {}
    for arm in study.arms:
        if arm.name not in (study.question.candidate, study.question.control):
            found.setdefault(arm.group, []).append(arm.name)
    return found


def evaluate(records: Records) -> StudyResult:
    """Draws a study's answer from its rows.

    Raises:
        AblationError: scipy is missing.
    """
    study, question = records.study, records.study.question
    differences: dict[str, PairedDifference] = {}
    for family in families(study).values():
        differences |= adjust({arm: pair(records, arm, question.control) for arm in family})
    primary = pair(records, question.candidate, question.control)
    differences[question.candidate] = primary
    arms = tuple(_arm_result(records, study.arm(arm), differences.get(arm)) for arm in study.arm_names)
    names = (phrase(study, question.candidate), phrase(study, question.control))
    return StudyResult(
        verdict(primary, *names, records.metric),
        primary,
        arms,
        len(records.missing),
        records.metric,
        _known(records.results, "total"),
    )


def _arm_result(records: Records, arm: Arm, difference: PairedDifference | None) -> ArmResult:
    rows = records.of_arm(arm.name)
    finished = [row for row in rows if row["status"] == "finished"]
    times = [row["seconds_per_epoch"] for row in rows if row.get("seconds_per_epoch") is not None]
    shifted: dict[str, dict[int, float]] = {}
    for row in finished:
        for shift, score in (row.get("shifted") or {}).items():
            shifted.setdefault(shift, {})[row["seed"]] = 100 * (score - row["accuracy"])
    return ArmResult(
        arm=arm.name,
        title=arm.title or arm.name,
        group=arm.group,
        parameters=_known(rows, "parameters"),
        mask_bytes=_known(rows, "mask_bytes"),
        macs=_known(rows, "macs"),
        width=_known(rows, "width"),
        accuracy=summarise([row["accuracy"] for row in finished]),
        best=summarise([row["best_accuracy"] for row in finished if row.get("best_accuracy") is not None]),
        difference=difference,
        seconds_per_epoch=numbers.median(times) if times else None,
        memory_bytes=max((row["peak_memory_bytes"] for row in rows if row.get("peak_memory_bytes")), default=None),
        shifted=shifted,
        per_class=_per_class([row["per_class"] for row in finished if row.get("per_class")]),
        unfinished=tuple((row["seed"], row["problem"]) for row in rows if row["status"] != "finished"),
    )


def _per_class(lists: list[list[float | None]]) -> tuple[float | None, ...]:
    if not lists:
        return ()
    columns = [[value for value in column if value is not None] for column in zip(*lists, strict=False)]
    return tuple(math.fsum(column) / len(column) if column else None for column in columns)


# --------------------------------------------------------------------------------------------------------------------
# Sweeps: arms that differ in one setting
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SweepLine:
    """The arms that differ from one base in one setting, and the base itself where it is known to be a point of it.

    Attributes:
        setting: what is swept, such as "level".
        title: the base's name for people.
        points: (value, arm), numbers in rising order, words as the study has them.
    """

    setting: str
    title: str
    points: tuple[tuple[float | str, ArmResult], ...]

    @property
    def numeric(self) -> bool:
        """Whether every value is a number above zero, which a logarithmic axis can show."""
        return all(isinstance(value, (int, float)) and value > 0 for value, _ in self.points)


def sweeps(study: Study, result: StudyResult) -> list[SweepLine]:
    """Every sweep of a study; the arms of one setting with several bases are several lines."""
    found: dict[tuple[str, str], list[tuple[float | str, ArmResult]]] = {}
    for arm in study.arms:
        line = result.find(arm.name)
        if arm.group and arm.value is not None and line is not None:
            found.setdefault((arm.group, base_of(arm)), []).append((arm.value, line))
    lines = []
    for (setting, base), at in found.items():
        own = _own_value(study, base, setting)
        line = result.find(base)
        if line is not None and own is not None and own not in [value for value, _ in at]:
            at.insert(0, (own, line))
        if all(isinstance(value, (int, float)) for value, _ in at):
            at.sort(key=lambda point: float(point[0]))
        name = title(study, base) if base in study.arm_names else base
        lines.append(SweepLine(setting, name, tuple(at)))
    return lines


def base_of(arm: Arm) -> str:
    """The name of the arm that a point of a sweep differs from in one setting.

    Example:
        >>> base_of(Arm("pnn level 0.5", group="level", value=0.5))
        'pnn'
    """
    return arm.name.partition(f" {arm.group} ")[0]


def _own_value(study: Study, base: str, setting: str) -> float | str | None:
    """The base's own value of a swept setting; None where it can't be told."""
    if base not in study.arm_names or study.arm(base).layer != "perturb":
        return None
    options = dict(study.arm(base).options)
    if setting in options:
        return options[setting]
    if setting == "norm":
        return "before" if options.get("preset") == "juefeix2018" else None
    preset = options.get("preset")
    return {"noise": "uniform", "activation": "relu", **(layer_options(preset) if preset else {})}.get(setting)


# --------------------------------------------------------------------------------------------------------------------
# Cells
# --------------------------------------------------------------------------------------------------------------------


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
    """Mean paired difference and its t interval, in points."""
    if paired is None:
        return "(control)"
    if paired.count == 0:
        return "–"
    if paired.count == 1:
        return f"{points(paired.mean)} (1 seed)"
    return f"{points(paired.mean)} [{points(paired.low)}, {points(paired.high)}]"


def bootstrap(paired: PairedDifference | None) -> str:
    """The BCa interval, in points."""
    if paired is None or paired.bootstrap is None:
        return "–"
    low, high = paired.bootstrap
    return f"[{points(low)}, {points(high)}]"


def effect_size(paired: PairedDifference | None) -> str:
    """Cohen's d_z."""
    return "–" if paired is None else points(paired.effect_size)


def p_value(paired: PairedDifference | None) -> str:
    """The sign-flip test's p value, adjusted where the comparison is one of several."""
    return "–" if paired is None or paired.count == 0 else probability(paired.adjusted_p)


def seconds(value: float | None) -> str:
    """Seconds per epoch.

    Example:
        >>> seconds(0.123), seconds(123.4), seconds(None)
        ('0.12', '123', '–')
    """
    return "–" if value is None else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def memory(value: int | None) -> str:
    """Bytes in mebibytes.

    Example:
        >>> memory(300 * 2**20), memory(None)
        ('300', '–')
    """
    return "–" if value is None else f"{value / 2**20:,.0f}"


def verdict_cell(result: ArmResult) -> str:
    """The verdict against the control in a few words."""
    if result.difference is None:
        return "–"
    return "–" if result.difference.count == 0 else word(result.difference)


@dataclass(frozen=True)
class Table:
    """A table of text, for every format alike.

    Attributes:
        caption: what it shows, in one sentence.
        head: names of the columns.
        rows: cells; the first one names the row.
        strong: numbers of the rows that are set off.
        keys: the arm of each row; "" where it is none.
    """

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: frozenset[int] = frozenset()
    keys: tuple[str, ...] = ()


def _of_arms(records: Records, arms: Sequence[ArmResult], caption: str, columns: Mapping[str, Any]) -> Table:
    candidate = records.study.question.candidate
    return Table(
        caption,
        ("arm", *columns),
        tuple((arm.title, *(cell(arm) for cell in columns.values())) for arm in arms),
        frozenset(index for index, arm in enumerate(arms) if arm.arm == candidate),
        tuple(arm.arm for arm in arms),
    )


def score_table(records: Records, result: StudyResult, arms: Sequence[ArmResult]) -> Table:
    """Scores, differences to the control, and the verdicts on them."""
    columns: dict[str, Any] = {f"{result.metric}, %": lambda arm: accuracy(arm.accuracy)}
    if any(arm.best.count for arm in result.arms):
        columns["best epoch, %"] = lambda arm: accuracy(arm.best)
    columns |= {
        "against control, points": lambda arm: difference(arm.difference),
        "verdict": verdict_cell,
        "p": lambda arm: p_value(arm.difference),
        "BCa": lambda arm: bootstrap(arm.difference),
        "d_z": lambda arm: effect_size(arm.difference),
        "seeds": lambda arm: str(arm.accuracy.count),
    }
    return _of_arms(records, arms, f"{metric_name(result)}, and paired differences to the control.", columns)


def cost_table(records: Records, result: StudyResult, arms: Sequence[ArmResult]) -> Table:
    """What the arms cost."""
    columns: dict[str, Any] = {
        f"{result.metric}, %": lambda arm: accuracy(arm.accuracy),
        "parameters": lambda arm: number(arm.parameters),
        "mask bytes": lambda arm: number(arm.mask_bytes),
        "multiply-adds": lambda arm: number(arm.macs),
        "width": lambda arm: number(arm.width),
        "s/epoch": lambda arm: seconds(arm.seconds_per_epoch),
    }
    if any(arm.memory_bytes for arm in result.arms):
        columns["memory, MiB"] = lambda arm: memory(arm.memory_bytes)
    return _of_arms(records, arms, "Costs.", columns)


def terminal_table(records: Records, result: StudyResult, arms: Sequence[ArmResult]) -> Table:
    """The columns that a terminal has room for."""
    columns: dict[str, Any] = {
        f"{result.metric}, %": lambda arm: accuracy(arm.accuracy),
        "against control, points": lambda arm: difference(arm.difference),
        "verdict": verdict_cell,
        "parameters": lambda arm: number(arm.parameters),
        "multiply-adds": lambda arm: number(arm.macs),
        "s/epoch": lambda arm: seconds(arm.seconds_per_epoch),
        "seeds": lambda arm: str(arm.accuracy.count),
    }
    return _of_arms(records, arms, "", columns)


#: More classes than this are shown in the CSV file alone, but for those that differ most.
CLASSES_SHOWN = 25


def class_table(records: Records, result: StudyResult, arms: Sequence[ArmResult]) -> Table | None:
    """The metric of each class: candidate, control, their paired difference, then other arms; None without any."""
    question = records.study.question
    first, second = result.find(question.candidate), result.find(question.control)
    if first is None or second is None or not first.per_class or not second.per_class:
        return None
    paired = class_differences(records, question.candidate, question.control)
    names = class_names(records, len(first.per_class))
    order = list(range(len(first.per_class)))
    caption = f"{metric_name(result)} of each class."
    if len(order) > CLASSES_SHOWN:
        most = sorted(order, key=lambda i: -abs(paired[i].mean) if paired[i].count else 0.0)[:CLASSES_SHOWN]
        order = sorted(most)
        caption = f"{metric_name(result)} of the {CLASSES_SHOWN} classes of {len(names)} that differ most."
    others = [arm for arm in arms if arm.arm not in (question.candidate, question.control) and arm.per_class]
    columns = [first, second, *others]
    return Table(
        caption,
        ("class", first.title, second.title, "difference, points", *(arm.title for arm in others)),
        tuple(
            (
                names[i],
                *(_per_cent(_at(arm.per_class, i)) for arm in columns[:2]),
                difference(paired[i]),
                *(_per_cent(_at(arm.per_class, i)) for arm in others),
            )
            for i in order
        ),
    )


def class_differences(records: Records, candidate: str, control: str) -> list[PairedDifference]:
    """The paired difference of each class and its t interval; nothing is tested."""
    scores: list[dict[int, list[float | None]]] = [
        {row["seed"]: row["per_class"] for row in records.of_arm(arm) if row["status"] == "finished"}
        for arm in (candidate, control)
    ]
    size = max((len(values) for arm in scores for values in arm.values()), default=0)
    found = []
    for number_ in range(size):
        one, other = (
            {seed: value for seed, values in arm.items() if (value := _at(values, number_)) is not None}
            for arm in scores
        )
        found.append(compare(one, other, interval_only=True))
    return found


def class_names(records: Records, count: int) -> list[str]:
    """The classes' names, or numbers where the rows know none."""
    names = [str(name) for name in records.data.get("class_names") or []]
    return names if len(names) == count else [f"class {index}" for index in range(count)]


def _at(values: Sequence[float | None], index: int) -> float | None:
    return values[index] if index < len(values) else None


def _per_cent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def metric_name(result: StudyResult) -> str:
    """The metric at the beginning of a sentence."""
    return result.metric[0].upper() + result.metric[1:] if result.metric.islower() else result.metric


def seed_table(records: Records) -> Table:
    """The score of every run: right answers where they are counted, per cent elsewhere."""
    study = records.study
    seeds = sorted({seed for arm in study.arm_names for seed in study.seeds_of(arm)})
    rows = []
    for arm in study.arm_names:
        by_seed = {row["seed"]: row for row in records.of_arm(arm)}
        rows.append((title(study, arm), *(_run_cell(by_seed.get(seed)) for seed in seeds)))
    counted = all(row.get("correct") is not None for row in records.results if row["status"] == "finished")
    what = "Right answers" if counted else f"{records.metric}, %,"
    return Table(f"{what} of every run, by seed.", ("arm", *map(str, seeds)), tuple(rows), keys=tuple(study.arm_names))


def _run_cell(row: Row | None) -> str:
    if row is None:
        return "–"
    if row["status"] != "finished":
        return str(row["status"])
    return str(row["correct"]) if row.get("correct") is not None else f"{100 * row['accuracy']:.2f}"


# --------------------------------------------------------------------------------------------------------------------
# Formats
# --------------------------------------------------------------------------------------------------------------------


def _width(text: str) -> int:
    """Columns that a text takes on a terminal.

    Example:
        >>> _width("3×3"), _width("犬")
        (3, 2)
    """
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def to_text(table: Table) -> str:
    """Fixed-width columns, names to the left, figures to the right.

    Example:
        >>> print(to_text(Table("", ("arm", "n"), (("a", "10"), ("bb", "2")))))
        arm   n
        ---  --
        a    10
        bb    2
    """
    rows = [table.head, *table.rows]
    widths = [max(_width(row[column]) for row in rows) for column in range(len(table.head))]

    def line(row: Sequence[str]) -> str:
        padded = [" " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)]
        return "  ".join([row[0] + padded[0], *(pad + cell for cell, pad in zip(row[1:], padded[1:], strict=True))])

    head, *body = rows
    return "\n".join([line(head), "  ".join("-" * width for width in widths), *map(line, body)])


def to_markdown(table: Table) -> str:
    r"""A table as GitHub shows it.

    Example:
        >>> print(to_markdown(Table("Costs.", ("arm", "n"), (("a|b", "10"),))))
        Costs.
        <BLANKLINE>
        | arm | n |
        | :-- | --: |
        | a\|b | 10 |
    """

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(_markdown(cell) for cell in row) + " |"

    rule = "| " + " | ".join([":--", *["--:"] * (len(table.head) - 1)]) + " |"
    return "\n".join([_markdown(table.caption), "", line(table.head), rule, *map(line, table.rows)])


def _markdown(text: str) -> str:
    for letter in "\\|*_`<[":
        text = text.replace(letter, f"\\{letter}")
    return " ".join(text.split())


_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "−": r"$-$",
    "∞": r"$\infty$",
    "–": "--",
    "’": "'",
    "[": "{[}",  # after \\, a bracket would be taken for the row's spacing
    "]": "{]}",
    '"': r"\textquotedbl{}",
    "'": "'",
}


def latex(text: str) -> str:
    r"""Text that LaTeX sets as it is.

    Example:
        >>> print(latex("98 % ± 1_a"))
        98 \% $\pm$ 1\_a
    """
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(text.split()))


def to_latex(table: Table, label: str) -> str:
    r"""A table for a paper: ``\usepackage{booktabs}`` and, for other than ASCII letters, a Unicode engine or utf8."""
    body = [" & ".join(map(latex, row)) + r" \\" for row in table.rows]
    for index in table.strong:
        cells = [rf"\textbf{{{latex(cell)}}}" for cell in table.rows[index]]
        body[index] = " & ".join(cells) + r" \\"
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}; \\usepackage[T1]{fontenc} for quotation marks",
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{latex(table.caption)}}}",
            rf"  \label{{tab:{label}}}",
            rf"  \begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}",
            r"    \toprule",
            "    " + " & ".join(map(latex, table.head)) + r" \\",
            r"    \midrule",
            *(f"    {line}" for line in body),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
        ]
    )


def _csv(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """CSV with plain numbers; what is not known is empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    for row in rows:
        writer.writerow([_csv_cell(value) for value in row])
    return buffer.getvalue()


def _csv_cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    # A spreadsheet would take such text for a formula.
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


def arms_csv(records: Records, result: StudyResult) -> str:
    """Every figure of every arm, one arm a line."""
    shifts = sorted({shift for arm in result.arms for shift in arm.shifted}, key=_shift_order)
    head = [
        *("arm", "title", "sweep", "value", "metric", "runs", "mean", "standard_deviation", "lowest", "highest"),
        *("best_epoch_mean", "best_epoch_standard_deviation", "pairs", "difference_points", "difference_deviation"),
        *("t95_low", "t95_high", "bca95_low", "bca95_high", "t90_low", "t90_high", "cohen_d_z", "sign_flip_p"),
        *("sign_flip_p_holm", "equivalence_margin", "equivalence_p", "equivalence_p_holm", "comparisons", "verdict"),
        *("parameters", "mask_bytes", "macs", "width", "seconds_per_epoch", "peak_memory_bytes", "unfinished_runs"),
        *(f"shift_{shift}_minus_test_points" for shift in shifts),
    ]
    rows = []
    for arm in result.arms:
        d = arm.difference
        low, high = (None, None) if d is None or d.bootstrap is None else d.bootstrap
        paired: list[Any] = [None] * 17
        if d is not None:
            paired = [
                *(d.count, d.mean, d.deviation, d.low, d.high, low, high, d.inner_low, d.inner_high, d.effect_size),
                *(d.p_value, d.adjusted_p, d.margin, d.equivalence_p, d.adjusted_equivalence_p, d.comparisons),
                d.outcome,
            ]
        a = arm.accuracy
        rows.append(
            [
                *(arm.arm, arm.title, arm.group, records.study.arm(arm.arm).value, result.metric, a.count, a.mean),
                *(a.deviation, a.low, a.high, arm.best.mean, arm.best.deviation, *paired, arm.parameters),
                *(arm.mask_bytes, arm.macs, arm.width, arm.seconds_per_epoch, arm.memory_bytes, len(arm.unfinished)),
                *(summarise(list(arm.shifted.get(shift, {}).values())).mean for shift in shifts),
            ]
        )
    return _csv(head, rows)


def _shift_order(shift: str) -> tuple[int, str]:
    return (int(shift), "") if shift.lstrip("-").isdigit() else (10**9, shift)


def runs_csv(records: Records) -> str:
    """Every run, one a line."""
    plain = [
        *("accuracy", "correct", "total", "test_loss", "best_epoch", "best_accuracy", "epochs"),
        *("seconds_per_epoch", "seconds", "peak_memory_bytes"),
    ]
    shifts = sorted({shift for row in records.results for shift in row.get("shifted") or {}}, key=_shift_order)
    head = ["arm", "seed", "status", "problem", *plain, *(f"shift_{shift}" for shift in shifts)]
    rows = [
        [row["arm"], row["seed"], row["status"], row.get("problem"), *(row.get(key) for key in plain)]
        + [(row.get("shifted") or {}).get(shift) for shift in shifts]
        for arm in records.study.arm_names
        for row in records.of_arm(arm)
    ]
    return _csv(head, rows)


def classes_csv(records: Records, result: StudyResult) -> str:
    """The mean of each class and arm, one class a line."""
    arms = [arm for arm in result.arms if arm.per_class]
    size = max((len(arm.per_class) for arm in arms), default=0)
    names = class_names(records, size)
    rows = [[names[i], *(_at(arm.per_class, i) for arm in arms)] for i in range(size)]
    return _csv(["class", *(arm.arm for arm in arms)], rows)


def files(records: Records, result: StudyResult) -> dict[str, str]:
    """The tables for a paper, by file name."""
    found = {"arms.csv": arms_csv(records, result), "runs.csv": runs_csv(records)}
    shown = {
        "scores": score_table(records, result, result.main),
        "costs": cost_table(records, result, result.main),
        "seeds": seed_table(records),
    }
    for setting in dict.fromkeys(line.setting for line in sweeps(records.study, result)):
        arms = [arm for arm in result.arms if arm.group == setting]
        shown[f"sweep-{_slug(setting)}"] = score_table(records, result, arms)
    classes = class_table(records, result, result.main[:8])
    if classes is not None:
        shown["classes"] = classes
        found["classes.csv"] = classes_csv(records, result)
    for name, table in shown.items():
        found[f"{name}.md"] = to_markdown(table) + "\n"
        found[f"{name}.tex"] = to_latex(table, f"{_slug(records.study.name)}-{name}") + "\n"
    return found


def _slug(text: str) -> str:
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in text) or "study"


def write(records: Records, result: StudyResult) -> Path:
    """Writes DIR/tables/*.csv, *.md and *.tex.

    Returns:
        The folder.

    Raises:
        AblationError: a file can't be written.
    """
    folder = records.directory / "tables"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise AblationError(f"can't make {folder}: {describe_os_error(error)}") from error
    for name, text in files(records, result).items():
        write_whole(folder / name, text)
    return folder


def left_out(records: Records, candidate: str, control: str) -> list[str]:
    """Why seeds that both arms ended are no pair, in words: one sentence for each run that diverged or broke."""
    found = []
    for arm in (candidate, control):
        found += [
            f"{title(records.study, arm)}, seed {row['seed']}: {row['problem']}"
            for row in records.of_arm(arm)
            if row["status"] != "finished"
        ]
    return found


def text_report(records: Records, result: StudyResult) -> str:
    """What the terminal shows: the verdict first, then the tables, then what the columns mean."""
    study, question = records.study, records.study.question
    lines = [result.verdict, "", to_text(terminal_table(records, result, result.main)), ""]
    for setting in dict.fromkeys(line.setting for line in sweeps(study, result)):
        arms = [arm for arm in result.arms if arm.group == setting]
        lines += [to_text(terminal_table(records, result, arms)), ""]
    images = "" if result.total is None else f" over all {result.total} test images"
    what = f"correct answers{images}" if result.metric == "accuracy" else f"{result.metric}{images}"
    label = "accuracy" if result.metric == "accuracy" else result.metric
    lines.append(f"{label}: {what} after the last epoch, mean ± standard deviation over seeds")
    names = f"{title(study, question.candidate)} against {title(study, question.control)}"
    lines.append(f"against control: paired by seed, mean and 95 % t interval; only {names}")
    lines.append(
        "    was fixed as the question beforehand; the intervals are 95 % each, other verdicts are adjusted (Holm)"
    )
    lines += [too_few(study)] if too_few(study) else []
    for arm in result.arms:
        lines += [f"{arm.title}, seed {seed}: {problem}" for seed, problem in arm.unfinished]
    unreadable = unreadable_files(records)
    if unreadable:
        lines.append(f"{len(unreadable)} images could not be read and were left out: {', '.join(unreadable[:3])} ...")
    if result.missing:
        lines.append(f"{result.missing} of {len(study.runs)} runs have no result yet")
    if len(study.seeds) < SEEDS_TO_DECIDE:
        lines.append(f"a verdict needs {SEEDS_TO_DECIDE} seeds or more; fewer only show how the tool works")
    return "\n".join(lines)


def too_few(study: Study) -> str:
    """A sentence on the families of comparisons that have fewer seeds than their test needs; "" where none has."""
    found = []
    for setting, arms in families(study).items():
        have, needed = min(len(study.seeds_of(arm)) for arm in arms), seeds_needed(len(arms))
        if have < needed:
            what = "arm that sweeps" if len(arms) == 1 else "arms that sweep"
            group = f"{len(arms)} {what} {setting}" if setting else f"{len(arms)} other arm{'s' * (len(arms) != 1)}"
            found.append(f"{needed} for the {group} (there are {have})")
    return f"Seeds needed to reach p ≤ {SIGNIFICANCE:g} against the control: {', '.join(found)}." if found else ""


def unreadable_files(records: Records) -> list[str]:
    """Files that could not be decoded, as the data and the runs name them."""
    found = dict.fromkeys(str(name) for name in records.data.get("unreadable") or [])
    for row in records.results:
        found |= dict.fromkeys(str(name) for name in row.get("unreadable") or [])
    return list(found)
