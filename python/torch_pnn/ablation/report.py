"""The report: one HTML file that holds everything it shows, made from a study's rows and nothing else.

The order is that of a reader's questions: what came out, how sure is it, what does it look like, what exactly was done,
with what.
"""

from __future__ import annotations

import html
import importlib.resources
import json
from collections.abc import Sequence
from pathlib import Path

from . import plots, tables
from .data import Dataset
from .environment import BITS_DEPEND_ON, operators_sentence
from .progress import duration
from .records import Records, Row, write_whole
from .showcase import make_showcase
from .statistics import interval, points
from .study import SEEDS_TO_DECIDE
from .tables import StudyResult, title


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _alarms(records: Records, result: StudyResult) -> list[str]:
    """What must not be overlooked, loudest first."""
    found = []
    environments = records.environments
    reference = [e for e in environments if e["operators"] != "compiled"]
    if reference:
        found.append(operators_sentence(reference[-1]))
    setups = {tuple(str(e.get(key)) for key in BITS_DEPEND_ON) for e in environments}
    if len(setups) > 1:
        found.append(
            "The rows were computed with more than one setup (see 'With what'); the comparison stays paired by seed, "
            "but a repetition need not give the same last bits."
        )
    if result.missing:
        found.append(
            f"Incomplete: {result.missing} of {len(records.study.runs)} runs have no result yet. "
            f"The same command goes on from here."
        )
    for arm in result.arms:
        found += [
            f"{arm.title}, seed {seed}: {problem}. It is left out of every mean and pair."
            for seed, problem in arm.unfinished
        ]
    return found


def _table(records: Records, result: StudyResult) -> str:
    heads = "".join(f"<th scope='col'>{html.escape(name)}</th>" for name in tables.COLUMNS)
    body = []
    for number, arm in enumerate(result.arms):
        first, *rest = tables.cells(arm)
        dot = f"<span class='dot' style='background: var(--arm-{number % len(plots.ARM_COLOURS) + 1})'></span>"
        primary = " class='primary'" if arm.arm == records.study.question.candidate else ""
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in rest)
        body.append(f"<tr{primary}><th scope='row'>{dot}{html.escape(first)}</th>{cells}</tr>")
    return f"<div class='scroll'><table><thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


def _seed_table(records: Records) -> str:
    seeds = records.study.seeds
    heads = "".join(f"<th scope='col'>seed {seed}</th>" for seed in seeds)
    body = []
    for arm in records.study.arm_names:
        rows = {row["seed"]: row for row in records.of_arm(arm)}
        cells = []
        for seed in seeds:
            row = rows.get(seed)
            if row is None:
                cells.append("<td>–</td>")
            elif row["status"] != "finished":
                cells.append(f"<td title='{html.escape(row['problem'], quote=True)}'>{html.escape(row['status'])}</td>")
            else:
                cells.append(f"<td>{row['correct']}</td>")
        body.append(f"<tr><th scope='row'>{html.escape(title(records.study, arm))}</th>{''.join(cells)}</tr>")
    return (
        f"<div class='scroll'><table><thead><tr><th scope='col'>arm</th>{heads}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _evidence(result: StudyResult, records: Records) -> str:
    primary = result.primary
    n = primary.count
    if n == 0:
        return "The question was fixed beforehand; there is nothing to answer it with yet."
    ups = sum(value > 0 for value in primary.values)
    downs = sum(value < 0 for value in primary.values)
    question = records.study.question
    candidate, control = (title(records.study, arm) for arm in (question.candidate, question.control))
    text = (
        f"Question fixed beforehand: {candidate} against {control}. Of {n} "
        f"seeds, {ups} went up, {downs} down, {n - ups - downs} stayed level; mean {points(primary.mean)} points"
    )
    if n > 1:
        text += f", 95 % t interval {interval(primary)}, exact two-sided sign-flip test p = {primary.p_value:.3g}"
    text += "."
    if n < SEEDS_TO_DECIDE:
        text += f" Below {SEEDS_TO_DECIDE} seeds that test can't reach 0.05, whatever the runs show."
    return text


def _list(items: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def _method(records: Records, data: Dataset) -> str:
    study, schedule = records.study, records.study.schedule
    arms = _list([f"<b>{html.escape(title(study, arm.name))}</b>: {html.escape(arm.summary)}" for arm in study.arms])
    steps = -(-data.train_count // schedule.batch_size)
    text = (
        f"Every arm has the same schedule, seeds and order of the data: {schedule.epochs} epochs of {steps} "
        f"steps with up to {schedule.batch_size} images, stochastic gradient descent with Nesterov momentum "
        f"{schedule.momentum:g}, learning rate rising to {schedule.learning_rate:g} over the first "
        f"{schedule.warmup_epochs:g} epochs, then falling to zero along a cosine, weight decay "
        f"{schedule.weight_decay:g}. No augmentation. Nothing was tuned arm by arm."
    )
    text += f" {study.notes}" if study.notes else ""
    pairs = (
        "Paired: with one seed, all arms see the same batches in the same order, and PNN, its control and its "
        "variants start from the same weights, bit for bit."
    )
    accuracy = (
        f"Accuracy is the number of correct answers over all {data.test_count} test images, counted in "
        f"evaluation mode after the last epoch. No epoch is picked by its test result, and nothing is averaged over "
        "batches."
    )
    limits = (
        "What the intervals do not cover: other splits of the data, other data, other schedules, other networks. "
        "Only the question fixed beforehand has a test; the other intervals are 95 % each, not corrected for their "
        "number."
    )
    return (
        f"{_paragraph(data.description)}{_paragraph(text)}{_paragraph(pairs)}{_paragraph(accuracy)}"
        f"{_paragraph(limits)}{arms}"
    )


def _setups(records: Records) -> str:
    """The environments, one list where they agree."""
    parts = []
    shown: list[Row] = []
    for invocation in records.invocations:
        environment = invocation["environment"]
        if environment in shown:
            continue
        shown.append(environment)
        versions = ", ".join(
            f"{name} {environment[name]}"
            for name in ("torch", "python", "numpy", "scikit-learn", "scipy")
            if environment.get(name)
        )
        facts = {
            "operators": operators_sentence(environment),
            "torch-pnn": environment["torch_pnn"],
            "versions": versions,
            "machine": f"{environment['system']}, {environment['machine']}, {environment['cores']} cores; "
            f"{invocation['jobs']} runs side by side, {records.study.threads} thread each",
        }
        parts.append(
            "<dl>"
            + "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items())
            + "</dl>"
        )
    return "".join(parts)


def _commands(records: Records) -> str:
    lines: list[str] = []
    for invocation in records.invocations:
        if not lines or lines[-1] != invocation["command"]:
            lines.append(invocation["command"])
    return f"<pre><code>{html.escape(chr(10).join(lines))}</code></pre>"


def _plot(heading: str, svg: str, caption: str) -> str:
    return f"<figure><h2>{html.escape(heading)}</h2>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def render(records: Records, data: Dataset) -> str:
    """The report as an HTML document.

    Args:
        records: the study's folder.
        data: the study's data, for its description and one image.

    Raises:
        AblationError: matplotlib or scipy is missing.
    """
    study = records.study
    result = tables.evaluate(records)
    control = title(study, study.question.control)
    figures = []
    if any(arm.difference is not None and arm.difference.count for arm in result.arms):
        figures.append(
            _plot(
                "Against the control, seed by seed",
                plots.paired_differences(records, result),
                f"Pale dots: one seed each. Marker and bar: mean and 95 % t interval. Right of zero is better than "
                f"{control}. Shaded: the question fixed beforehand.",
            )
        )
    if any(arm.accuracy.count for arm in result.arms):
        figures.append(
            _plot(
                "Accuracy against size",
                plots.accuracy_against_parameters(records, result),
                "Mean and standard deviation over seeds. Arms of nearly equal size are moved a little apart.",
            )
        )
        figures.append(
            _plot(
                "Learning curves",
                plots.learning_curves(records, result),
                "Mean over seeds; the band reaches from the lowest to the highest seed. The first epochs are cut off "
                "below.",
            )
        )
    showcase = make_showcase(study, data)
    if showcase is not None:
        figures.append(_plot("What a mask does", plots.masks(showcase), showcase.caption))
    finished = [row for row in records.results if row.get("seconds") is not None]
    computing = duration(sum(row["seconds"] for row in finished)) if finished else "none"
    alarms = "".join(f"<div class='alarm' role='alert'>{_paragraph(text)}</div>" for text in _alarms(records, result))
    style = importlib.resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    body = f"""<p class="kicker">torch-pnn ablation study “{html.escape(study.name)}”, {len(study.seeds)} seeds</p>
<h1>{html.escape(study.title)}: does the noise help?</h1>
<div class="verdict {result.primary.outcome}">{_paragraph(result.verdict)}{_paragraph(_evidence(result, records))}</div>
{alarms}
<div class="plots">{"".join(figures)}</div>
<h2>All arms</h2>
{_table(records, result)}
<p class="kicker">Accuracy: mean ± standard deviation over seeds. Against control: paired by seed, mean and 95 % t
interval, in points. Mask bytes: stored masks and fixed filters; a mask made from a seed costs the seed. Multiply-adds:
of one image.</p> <h2>Seed by seed: correct answers of {data.test_count}</h2>
{_seed_table(records)}
<h2>What was done</h2>
{_method(records, data)}
<h2>With what</h2>
{_setups(records)}
<p>Computing time of all runs: {html.escape(computing)}. The raw rows stand beside this file in results.jsonl and
epochs.jsonl, the settings in study.json.</p>
<h2>The command</h2>
{_commands(records)}"""
    heading = html.escape(f"{study.title}: torch-pnn ablation")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{heading}</title>\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f'<script type="application/json" id="settings">{_settings(records)}</script>\n</body>\n</html>\n'
    )


def _settings(records: Records) -> str:
    """The settings for programs that read the report; "<" is escaped so that no text can end the element."""
    values = {
        "study": records.study.to_json(),
        "fingerprint": records.study.fingerprint(),
        "data_sha256": records.data_sha256,
    }
    return json.dumps(values).replace("<", "\\u003c")


def write(records: Records, data: Dataset) -> Path:
    """Writes DIR/report.html.

    Returns:
        Its path.

    Raises:
        AblationError: it can't be written, or a package is missing.
    """
    path = records.directory / "report.html"
    write_whole(path, render(records, data))
    return path
