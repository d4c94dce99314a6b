"""The report: one HTML file that holds everything it shows, made from a study's rows and nothing else.

The order is that of a reader's questions: what came out, how sure is it, what else does it say, what does it look like,
what exactly was done, with what.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from . import answers, page, plots, tables
from .data import Dataset
from .environment import BITS_DEPEND_ON, operators_sentence
from .errors import AblationError
from .progress import duration
from .records import Records, Row, read, write_whole
from .showcase import make_showcase
from .statistics import SIGNIFICANCE, PairedDifference, interval, points, probability, seeds_needed
from .study import STREAMS, Study
from .tables import StudyResult, title

#: Arms whose masks are shown; more would be a wallpaper.
MASKS_SHOWN = 8
#: Columns of the table of classes beside the candidate and the control.
CLASS_COLUMNS = 6


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
    unreadable = tables.unreadable_files(records)
    if unreadable:
        named = ", ".join(unreadable[:5]) + (f" and {len(unreadable) - 5} more" if len(unreadable) > 5 else "")
        images = "1 image" if len(unreadable) == 1 else f"{len(unreadable)} images"
        found.append(f"{images} could not be read and took no part: {named}.")
    for arm in result.arms:
        found += [
            f"{arm.title}, seed {seed}: {problem}. It is left out of every mean and pair."
            for seed, problem in arm.unfinished
        ]
    if any(row["status"] == "diverged" for row in records.results):
        found.append("Means over the runs that remain flatter an arm whose bad runs are the ones that were left out.")
    return found


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
        test = "exact two-sided sign-flip test" if primary.exact else "two-sided sign-flip test (sampled)"
        text += f", 95 % t interval {interval(primary)}"
        if primary.bootstrap is not None:
            low, high = primary.bootstrap
            text += f" (BCa bootstrap {points(low)} to {points(high)})"
        text += f", {test} p = {probability(primary.p_value)}"
    text += "."
    if n > 1 and question.margin > 0:
        text += (
            f" Against the margin of ±{question.margin:g} points: 90 % interval {points(primary.inner_low)} to "
            f"{points(primary.inner_high)}, equivalence test p = {probability(primary.equivalence_p)}"
        )
        effect = primary.effect_size
        text += f"; effect size d_z = {points(effect)}." if effect == effect else "."
    if n < seeds_needed():
        text += f" Below {seeds_needed()} seeds the sign-flip test can't reach 0.05, whatever the runs show."
    left = tables.left_out(records, question.candidate, question.control)
    if left:
        text += f" Left out of the pairs: {'; '.join(left)}."
    return text


def _answers(records: Records, result: StudyResult) -> str:
    parts = []
    for answer in answers.answers(records, result):
        items = []
        for item in answer.items:
            reading = f" <b>{page.escape(item.reading)}</b>" if item.reading else ""
            items.append(f"<span class='word {item.difference.outcome}'>{_word(item.difference)}</span> "
                         f"{page.escape(item.sentence)}{reading}")  # fmt: skip
        parts.append(
            f"<article><h3>{page.escape(answer.question)}</h3>{page.paragraph(answer.summary, 'summary')}"
            f"{page.paragraph(answer.meaning, 'kicker')}{page.bullets(items)}</article>"
        )
    return f"<div class='answers'>{''.join(parts)}</div>" if parts else ""


def _word(difference: PairedDifference) -> str:
    return page.escape(points(difference.mean)) if difference.count else "–"


def _key(records: Records, result: StudyResult) -> str:
    """Numbers, colours and names of the arms, below the plots that show more than they can label."""
    look = plots.styles(records, result)
    items = [
        f"<li>{page.dot(look[arm.arm].variable)}<b>{look[arm.arm].number}</b> {page.escape(arm.title)}</li>"
        for arm in result.main
    ]
    return f"<ul class='key' aria-label='Arms by number'>{''.join(items)}</ul>"


def _marks(records: Records, result: StudyResult) -> dict[str, str]:
    """What stands before an arm's name in tables."""
    look = plots.styles(records, result)
    return {
        arm.arm: f"{page.dot(look[arm.arm].variable)}<span class='number'>{look[arm.arm].number}</span> "
        for arm in result.main
    }


def _figures(records: Records, result: StudyResult, data: Dataset | None) -> str:
    study = records.study
    control = title(study, study.question.control)
    key = _key(records, result)
    figures = []
    if any(arm.difference is not None and arm.difference.count for arm in result.main):
        figures.append(
            page.figure(
                "Against the control, seed by seed",
                plots.paired_differences(records, result),
                f"Pale dots: one seed each. Marker and bar: mean and 95 % t interval. Right of zero is better than "
                f"{control}. Shaded row: the question fixed beforehand; grey band: the margin of "
                f"±{study.question.margin:g} points. A figure with an arrow lies outside the plot.",
            )
        )
    if any(arm.accuracy.count for arm in result.main):
        if plots.costs(result):
            figures.append(
                page.figure(
                    f"{tables.metric_name(result)} against cost",
                    plots.accuracy_against_costs(records, result),
                    "Mean and standard deviation over seeds; numbers as in the list. A triangle at the lower edge "
                    "stands for a score below it. Time and memory are as measured on this machine.",
                    key,
                )
            )
        figures.append(
            page.figure(
                "Learning curves",
                plots.learning_curves(records, result),
                f"{plots.mean_curve_note(records)} The first epochs, and arms far below, are cut off.",
                key,
            )
        )
    lines = tables.sweeps(study, result)
    for number, setting in enumerate(dict.fromkeys(line.setting for line in lines)):
        here = [line for line in lines if line.setting == setting]
        if any(arm.accuracy.count for line in here for _, arm in line.points):
            figures.append(
                page.figure(
                    f"Sweep over {setting}",
                    plots.sweep(records, result, here, f"sweep{number}"),
                    f"Mean and 95 % t interval over seeds; broken line: {control}.",
                )
            )
    if any(arm.shifted for arm in result.main):
        figures.append(
            page.figure(
                "Test images moved",
                plots.shifted(records, result),
                "What is lost when the test images are moved by so many pixels; the edge is filled up, so that every "
                "arm loses a little. Mean and 95 % t interval of the differences within each run.",
            )
        )
    figures += _masks(records, data)
    return f"<div class='plots'>{''.join(figures)}</div>" if figures else ""


def _masks(records: Records, data: Dataset | None) -> list[str]:
    if data is None:
        return []
    study = records.study
    arms = [arm for arm in study.arms if not arm.group and arm.layer == "perturb"][:MASKS_SHOWN]
    try:
        showcase = make_showcase(dataclasses.replace(study, arms=tuple(arms)), data) if arms else None
    except AblationError:  # the network is somebody's own and isn't here: the rows alone make the report
        showcase = None
    if showcase is None:
        return []
    return [page.figure("What a mask does", plots.masks(showcase), showcase.caption)]


def _tables(records: Records, result: StudyResult) -> str:
    marks = _marks(records, result)
    note = (
        "Mean ± standard deviation over seeds, after the last epoch"
        + ("; best epoch: the one that the validation images chose" if any(a.best.count for a in result.arms) else "")
        + ". Against control: paired by seed, mean and 95 % t interval, in points; BCa: the bootstrap interval; d_z: "
        "mean over standard deviation of the differences; p: sign-flip test, for all but the primary comparison "
        "adjusted (Holm)."
    )
    few = tables.too_few(records.study)
    parts = [page.table(tables.score_table(records, result, result.main), marks), page.paragraph(note, "kicker")]
    parts += [page.paragraph(few, "kicker")] if few else []
    costs = page.table(tables.cost_table(records, result, result.main), marks)
    cost_note = (
        "Mask bytes: stored masks and fixed filters; a mask made from a seed costs the seed. Multiply-adds: of one "
        "image. s/epoch: median over runs. Memory: the largest peak of the runs' processes."
    )
    found = page.section("All arms", "".join(parts))
    found += page.section("What they cost", costs + page.paragraph(cost_note, "kicker"))
    lines = tables.sweeps(records.study, result)
    for setting in dict.fromkeys(line.setting for line in lines):
        arms = [arm for arm in result.arms if arm.group == setting]
        found += page.section(f"Sweep over {setting}", page.table(tables.score_table(records, result, arms)))
    others = [arm for arm in result.main if plots.styles(records, result)[arm.arm].coloured]
    classes = tables.class_table(records, result, others[: CLASS_COLUMNS + 2])
    if classes is not None:
        note = "In per cent; the differences' intervals are 95 % each, not adjusted for the number of classes."
        found += page.section("Class by class", page.table(classes) + page.paragraph(note, "kicker"))
    return found + page.section("Seed by seed", page.table(tables.seed_table(records), marks))


_OPTIMIZERS = {"sgd": "stochastic gradient descent", "adam": "Adam", "adamw": "AdamW"}
_STREAM_WORDS = {
    "initialisation": "initial weights",
    "masks": "masks",
    "order": "order of the data",
    "augmentation": "augmentation",
}


def _schedule(study: Study, images: int | None) -> str:
    schedule = study.schedule
    steps = "" if not images else f" of {-(-images // schedule.batch_size)} steps"
    momentum = ""
    if schedule.optimizer == "sgd" and schedule.momentum:
        momentum = f" with Nesterov momentum {schedule.momentum:g}"
    optimizer = _OPTIMIZERS.get(schedule.optimizer, schedule.optimizer)
    warmup = f", rising over the first {schedule.warmup_epochs:g} epochs" if schedule.warmup_epochs else ""
    milestones = ", ".join(map(str, schedule.milestones))
    decay = {
        "cosine": "then falling to zero along a cosine",
        "steps": f"then times {schedule.factor:g} after epochs {milestones}",
        "constant": "then constant",
    }.get(schedule.decay, schedule.decay)
    return (
        f"{schedule.epochs} epochs{steps} with up to {schedule.batch_size} images, {optimizer}{momentum}, learning "
        f"rate {schedule.learning_rate:g}{warmup}, {decay}, weight decay {schedule.weight_decay:g}"
    )


def _method(records: Records) -> str:
    study = records.study
    train, test = records.data.get("train_count"), records.data.get("test_count")
    augment = "Images are changed at random, alike for every arm" if study.data.augment else "No augmentation"
    text = (
        f"Every arm has the same schedule, seeds and order of the data: {_schedule(study, train)}. {augment}. "
        f"Nothing was tuned arm by arm. Device {study.device}, {study.precision}."
    )
    text += f" {study.notes}" if study.notes else ""
    varied = [_STREAM_WORDS[stream] for stream in STREAMS if stream in study.vary]
    fixed = [_STREAM_WORDS[stream] for stream in STREAMS if stream not in study.vary]
    pairs = (
        "Paired: with one seed, all arms see the same batches in the same order, and arms that have layers in common "
        f"start from the same weights of them, bit for bit. A seed fixes: {', '.join(varied) or 'nothing'}."
    )
    if fixed:
        pairs += f" The same in every run: {', '.join(fixed)}; the intervals do not cover what these would change."
    images = f"all {test} test images" if test else "the whole test set"
    counted = "the number of correct answers" if records.metric == "accuracy" else records.metric
    accuracy = (
        f"The score is {counted} over {images}, taken in evaluation mode after the last epoch. No epoch is picked by "
        "its test result, and nothing is averaged over batches."
    )
    if records.data.get("validation_count"):
        accuracy += (
            f" The best epoch beside it was chosen on {records.data['validation_count']} training images held out."
        )
    arms = page.bullets(
        f"<b>{page.escape(arm.title or arm.name)}</b>: {page.escape(arm.summary)}" for arm in study.arms
    )
    description = page.paragraph(str(records.data.get("description") or ""))
    return f"{description}{page.paragraph(text)}{page.paragraph(pairs)}{page.paragraph(accuracy)}{arms}"


def _statistics(records: Records) -> str:
    margin = records.study.question.margin
    items = [
        "The unit is the difference between two arms that ran with the same seed, in points (hundredths of the test "
        "score). Points are differences; per cent are scores.",
        "The 95 % t interval of the mean difference is the headline. The BCa bootstrap interval beside it asks for no "
        "bell curve, but at few seeds it is too narrow: at six it covers the truth in 87 of 100 studies, not in 95.",
        "The sign-flip test asks how often the mean difference would be as large if each difference had its sign by a "
        f"coin. It is exact, and it can't reach p ≤ {SIGNIFICANCE:g} below {seeds_needed()} seeds for one comparison, "
        f"{seeds_needed(5)} for five, {seeds_needed(15)} for fifteen.",
        "'Better' and 'worse' need both: p ≤ 0.05 (for all but the primary comparison adjusted by Holm's method for "
        "the number of comparisons made together) and a t interval that leaves out zero.",
    ]
    if margin > 0:
        items.append(
            f"'Equivalent' means that two one-sided t tests put the difference inside ±{margin:g} points, the margin "
            "that the study set beforehand. A difference can be real and smaller than that: then both are said."
        )
    items += [
        "Everything else is 'undecided', which is not the same as equal.",
        "Made together, and adjusted together: the arms against the control; the points of each sweep; the comparisons "
        "under each further question.",
        "Not covered by any interval: other splits of the data, other data, other schedules, other networks.",
    ]
    return page.bullets(map(page.escape, items))


def _setups(records: Records) -> str:
    """The environments, one list where they agree."""
    parts = []
    shown: list[Row] = []
    for invocation in records.invocations:
        environment = invocation["environment"]
        if environment in shown:
            continue
        shown.append(environment)
        parts.append(page.facts(_setup(environment, invocation, records.study)))
    return "".join(parts)


def _setup(environment: Row, invocation: Row, study: Study) -> Mapping[str, str]:
    said = {"torch_pnn", "libpnn", "operators", "derivatives", "isa", "machine", "system", "cores"}
    packages = [key for key in environment if key not in said and isinstance(environment[key], str)]
    versions = ", ".join(f"{name} {environment[name]}" for name in packages if "\n" not in environment[name])
    jobs = invocation.get("jobs", 1)
    side = "1 run at a time" if jobs == 1 else f"{jobs} runs side by side"
    threads = f"{study.threads} thread{'' if study.threads == 1 else 's'} each"
    found = {
        "operators": operators_sentence(environment),
        "torch-pnn": str(environment.get("torch_pnn")),
        "versions": versions,
        "machine": f"{environment.get('system')}, {environment.get('machine')}, {environment.get('cores')} cores; "
        f"{side}, {threads}",
    }
    if invocation.get("started"):
        found["begun"] = str(invocation["started"])
    return found


def _commands(records: Records) -> str:
    lines: list[str] = []
    for invocation in records.invocations:
        if not lines or lines[-1] != invocation["command"]:
            lines.append(invocation["command"])
    return page.commands(lines)


def _counts(study: Study) -> str:
    """How many arms and seeds."""
    text = f"{len(study.arms)} arms, {len(study.seeds)} seeds"
    fewer = study.other_seeds and len(study.other_seeds) != len(study.seeds)
    return text + (f" ({len(study.other_seeds)} for the other arms)" if fewer else "")


def render(records: Records, data: Dataset | None = None) -> str:
    """The report as an HTML document.

    Args:
        records: the study's folder.
        data: the study's data, for the picture of masks and what they do to an image; without it that is left out.

    Raises:
        AblationError: matplotlib or scipy is missing.
    """
    study = records.study
    result = tables.evaluate(records)
    finished = [row for row in records.results if row.get("seconds") is not None]
    computing = duration(sum(row["seconds"] for row in finished)) if finished else "none"
    heading = f"{study.title}: {_names(study)}"
    verdict = page.paragraph(result.verdict) + page.paragraph(_evidence(result, records))
    raw = (
        f"Computing time of all runs: {computing}. The raw rows stand beside this file in results.jsonl and "
        "epochs.jsonl, the settings in study.json, the tables as CSV, Markdown and LaTeX in tables/."
    )
    body = "\n".join(
        [
            page.paragraph(f"torch-pnn ablation study “{study.name}”, {_counts(study)}", "kicker"),
            f"<h1>{page.escape(heading)}</h1>",
            f"<div class='verdict {result.primary.outcome}'>{verdict}</div>",
            page.alarm(_alarms(records, result)),
            page.section("Further questions", _answers(records, result)),
            page.section("Plots", _figures(records, result, data)),
            _tables(records, result),
            page.section("How it was decided", _statistics(records)),
            page.section("What was done", _method(records)),
            page.section("With what", _setups(records) + page.paragraph(raw)),
            page.section("The command", _commands(records)),
        ]
    )
    settings = {"study": study.to_json(), "fingerprint": study.fingerprint(), "data_sha256": records.data_sha256}
    return page.document(f"{study.title}: torch-pnn ablation", body, settings)


def _names(study: Study) -> str:
    if (study.question.candidate, study.question.control) == ("pnn", "control"):
        return "does the noise help?"
    return f"{title(study, study.question.candidate)} against {title(study, study.question.control)}"


def write(records: Records, data: Dataset | None = None) -> Path:
    """Writes DIR/report.html and DIR/tables.

    Returns:
        The report's path.

    Raises:
        AblationError: it can't be written, or a package is missing.
    """
    path = records.directory / "report.html"
    write_whole(path, render(records, data))
    tables.write(records, tables.evaluate(records))
    return path


def rebuild(directory: Path) -> tuple[Path, str]:
    """Makes a folder's report again.

    The picture of masks needs the data; where it is not here, or is other data than the rows', the report goes without.

    Returns:
        The report's path, and what the terminal shows.

    Raises:
        AblationError: the folder holds no study, the report can't be written, or a package is missing.
    """
    from . import data as datasets

    records = read(directory)
    note = ""
    data: Dataset | None = None
    try:
        data = datasets.load(dataclasses.replace(records.study.data, download=False))
        if data.sha256 != records.data_sha256:
            data, note = None, "other data is installed here than the results were computed on"
    except AblationError as error:
        note = str(error)
    path = write(records, data)
    text = tables.text_report(records, tables.evaluate(records))
    return path, text + (f"\nwithout pictures of masks: {note}" if note else "")
