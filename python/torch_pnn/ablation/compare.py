"""Several studies on one page: the same arms across data sets, networks or schedules.

Every study keeps its own control, seeds and verdict. Nothing is pooled: differences of one study are shown beside those
of the others, with the settings in which the studies differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import page, plots, tables
from .errors import UsageError
from .records import Records, read, write_whole
from .statistics import PairedDifference
from .study import Study
from .tables import StudyResult, Table

#: More studies than this have no room beside each other.
MOST_STUDIES = 8


@dataclasses.dataclass(frozen=True)
class _Part:
    """One of the studies."""

    name: str
    records: Records
    result: StudyResult


def _parts(studies: Sequence[Records]) -> list[_Part]:
    names = _names(studies)
    return [_Part(name, records, tables.evaluate(records)) for name, records in zip(names, studies, strict=True)]


def _names(studies: Sequence[Records]) -> list[str]:
    """The studies' names; their folders' where two have the same."""
    names = [records.study.name for records in studies]
    if len(set(names)) == len(names):
        return names
    names = [f"{records.study.name} ({records.directory.name})" for records in studies]
    if len(set(names)) == len(names):
        return names
    return [f"{records.study.name} ({records.directory})" for records in studies]


def check(studies: Sequence[Records]) -> None:
    """Whether it makes sense to set these studies side by side.

    Raises:
        UsageError: it doesn't, and why.
    """
    if len(studies) < 2:
        raise UsageError("one study alone can't be compared; name two folders or more")
    if len(studies) > MOST_STUDIES:
        raise UsageError(f"{len(studies)} studies have no room on one page; name at most {MOST_STUDIES} folders")
    folders = [records.directory.resolve() for records in studies]
    for index, folder in enumerate(folders):
        if folder in folders[:index]:
            raise UsageError(f"{studies[index].directory} is named twice; a study can't be compared with itself")
    metrics = {records.metric: records for records in studies}
    if len(metrics) > 1:
        named = ", ".join(f"{metric} in {records.directory}" for metric, records in metrics.items())
        raise UsageError(f"points of different metrics can't be set side by side ({named})")
    shared = _shared(studies)
    if len(shared) < 2:
        listed = "; ".join(f"{r.directory}: {', '.join(r.study.arm_names[:6])}" for r in studies)
        raise UsageError(f"these studies have no two arms in common ({listed})")
    for records in studies:
        if not any(row["status"] == "finished" for row in records.results):
            raise UsageError(f"no run of {records.directory} has finished yet; there is nothing to compare")


def _shared(studies: Sequence[Records]) -> list[str]:
    """The arms that at least two of the studies have, in the order of the first that has them."""
    count: dict[str, int] = {}
    for records in studies:
        for arm in records.study.arm_names:
            count[arm] = count.get(arm, 0) + 1
    return [arm for arm, times in count.items() if times > 1]


def _title(parts: Sequence[_Part], arm: str) -> str:
    first = next(part for part in parts if arm in part.records.study.arm_names)
    return tables.title(first.records.study, arm)


def _difference(part: _Part, arm: str) -> PairedDifference | None:
    found = part.result.find(arm)
    return found.difference if found is not None else None


def score_table(parts: Sequence[_Part], arms: Sequence[str]) -> Table:
    """The score of each arm in each study."""
    rows = []
    for arm in arms:
        found = [part.result.find(arm) for part in parts]
        rows.append((_title(parts, arm), *("–" if a is None else tables.accuracy(a.accuracy) for a in found)))
    metric = parts[0].result.metric
    return Table(f"{metric}, %: mean ± standard deviation over seeds.", ("arm", *(p.name for p in parts)), tuple(rows))


def difference_table(parts: Sequence[_Part], arms: Sequence[str]) -> Table:
    """The paired difference of each arm to the control of each study."""
    rows = []
    for arm in arms:
        found = [part.result.find(arm) for part in parts]
        rows.append((_title(parts, arm), *("–" if a is None else tables.difference(a.difference) for a in found)))
    caption = "Points above each study's own control: mean and 95 % t interval."
    return Table(caption, ("arm", *(part.name for part in parts)), tuple(rows))


def verdict_table(parts: Sequence[_Part], arms: Sequence[str]) -> Table:
    """The verdict on each arm against the control of each study."""
    rows = []
    for arm in arms:
        found = [part.result.find(arm) for part in parts]
        rows.append((_title(parts, arm), *("–" if a is None else tables.verdict_cell(a) for a in found)))
    caption = "Verdicts against each study's own control; adjusted within each study, not across studies."
    return Table(caption, ("arm", *(part.name for part in parts)), tuple(rows))


def settings_table(parts: Sequence[_Part]) -> Table:
    """What the studies differ in, and a few things that a reader wants to see anyway."""
    facts = [_settings(part) for part in parts]
    keys = list(dict.fromkeys(key for fact in facts for key in fact))
    always = ("data", "training images", "test images", "network", "width", "epochs", "seeds")
    shown = [key for key in keys if key in always or len({fact.get(key, "–") for fact in facts}) > 1]
    rows = tuple((key, *(fact.get(key, "–") for fact in facts)) for key in shown)
    return Table("Settings in which the studies differ.", ("setting", *(part.name for part in parts)), rows)


def _settings(part: _Part) -> dict[str, str]:
    study, data = part.records.study, part.records.data
    found = {
        "data": str(data.get("name") or study.data.name),
        "training images": tables.number(data.get("train_count")),
        "test images": tables.number(data.get("test_count")),
        "network": study.model.network,
        "width": str(study.model.width),
        "epochs": str(study.schedule.epochs),
        "seeds": f"{len(study.seeds)}" + (f", {len(study.other_seeds)} others" if study.other_seeds else ""),
        "question": f"{study.question.candidate} against {study.question.control}, ±{study.question.margin:g}",
        "network's options": _words(dict(study.model.options)),
        "augmentation": "yes" if study.data.augment else "no",
        "varied by a seed": ", ".join(study.vary),
        "device, precision": f"{study.device}, {study.precision}",
    }
    schedule = dataclasses.asdict(study.schedule)
    return found | {name.replace("_", " "): _words(value) for name, value in schedule.items() if name != "epochs"}


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items()) or "–"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_words, value)) or "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def notes(parts: Sequence[_Part], arms: Sequence[str]) -> list[str]:
    """What a reader has to know before reading across: unlike arms of one name, unlike questions, shared data."""
    found = []
    for part in parts:
        if part.result.missing:
            found.append(f"{part.name} is incomplete: {part.result.missing} runs have no result yet.")
    questions = {(p.records.study.question.candidate, p.records.study.question.control) for p in parts}
    if len(questions) > 1:
        found.append("The studies ask different questions: each arm is compared with its own study's control.")
    unlike = [arm for arm in arms if len({_definition(p.records.study, arm) for p in parts if _has(p, arm)}) > 1]
    if unlike:
        names = ", ".join(_title(parts, arm) for arm in unlike)
        found.append(f"Of the same name, but not defined alike in all of these studies: {names}.")
    prints = [part.records.study.fingerprint() for part in parts]
    digests = [part.records.data_sha256 for part in parts]
    if len(set(zip(prints, digests, strict=True))) < len(parts):
        found.append("Two of these are the same study on the same data, done twice: they are no independent evidence.")
    elif len(set(digests)) < len(digests):
        found.append("Some of these studies share their images: what they agree on may be these images' own.")
    return found


def _has(part: _Part, arm: str) -> bool:
    return arm in part.records.study.arm_names


def _definition(study: Study, arm: str) -> str:
    made = study.arm(arm)
    options = sorted((key, str(value)) for key, value in made.options.items())
    return repr((made.layer, options, made.masks, made.match, made.match_by, made.weights_from))


def render(studies: Sequence[Records]) -> str:
    """The page as an HTML document.

    Raises:
        UsageError: these studies can't be compared.
        AblationError: matplotlib or scipy is missing.
    """
    check(studies)
    parts = _parts(studies)
    arms = [arm for arm in _shared(studies) if not _swept(parts, arm)]
    swept = [arm for arm in _shared(studies) if _swept(parts, arm)]
    verdicts = page.bullets(
        f"<b>{page.escape(part.name)}</b> ({page.escape(part.records.study.title)}): {page.escape(part.result.verdict)}"
        for part in parts
    )
    controls = list(dict.fromkeys(tables.title(p.records.study, p.records.study.question.control) for p in parts))
    control = controls[0] if len(controls) == 1 else "each study's control"
    shown = [(_title(parts, arm), [_difference(part, arm) for part in parts]) for arm in arms]
    figures = []
    if any(d is not None and d.count for _, differences in shown for d in differences):
        figures.append(
            page.figure(
                "Against the control, study by study",
                plots.studies_side_by_side([part.name for part in parts], shown, control),
                "Mean paired difference to the study's own control with its 95 % t interval.",
            )
        )
    body = "\n".join(
        [
            page.paragraph(f"torch-pnn: {len(parts)} studies side by side", "kicker"),
            f"<h1>{page.escape(', '.join(part.name for part in parts))}</h1>",
            f"<div class='verdict {_outcome(parts)}'>{verdicts}</div>",
            page.alarm(notes(parts, arms + swept)),
            f"<div class='plots'>{''.join(figures)}</div>",
            page.section("Differences", page.table(difference_table(parts, arms))),
            page.section("Verdicts", page.table(verdict_table(parts, arms))),
            page.section("Scores", page.table(score_table(parts, arms))),
            page.section("Sweeps", page.table(difference_table(parts, swept)) if swept else ""),
            page.section("What the studies differ in", page.table(settings_table(parts))),
            page.paragraph(
                "Each study stands for itself; nothing is pooled or tested across them. Scores on different data are "
                "not comparable, differences to a control are.",
                "kicker",
            ),
        ]
    )
    settings = [part.records.study.to_json() for part in parts]
    return page.document(f"{', '.join(part.name for part in parts)}: torch-pnn", body, settings)


def _swept(parts: Sequence[_Part], arm: str) -> bool:
    return any(part.records.study.arm(arm).group for part in parts if _has(part, arm))


def _outcome(parts: Sequence[_Part]) -> str:
    """The tone of the verdicts' box: that of all where they agree."""
    outcomes = {part.result.primary.outcome for part in parts}
    return outcomes.pop() if len(outcomes) == 1 else "undecided"


def text(studies: Sequence[Records]) -> str:
    """What the terminal shows.

    Raises:
        UsageError: these studies can't be compared.
    """
    check(studies)
    parts = _parts(studies)
    arms = _shared(studies)
    lines = [f"{part.name}: {part.result.verdict}" for part in parts]
    lines += ["", tables.to_text(difference_table(parts, arms)), ""]
    lines.append("points above each study's own control: mean and 95 % t interval; nothing is pooled across studies")
    return "\n".join(lines + notes(parts, arms))


def rebuild(directories: Sequence[Path]) -> tuple[Path, str]:
    """Writes comparison.html into the first folder.

    Returns:
        Its path, and what the terminal shows.

    Raises:
        AblationError: a folder holds no study, these can't be compared, or the page can't be written.
    """
    studies = [read(directory) for directory in directories]
    path = directories[0] / "comparison.html"
    shown = text(studies)
    write_whole(path, render(studies))
    return path, shown
