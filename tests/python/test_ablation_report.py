"""The report: made from rows alone, self-contained, in the reader's order, and honest about what is missing."""

from __future__ import annotations

import dataclasses
import functools
import html.parser
import re

import pytest
import torch
from ablation_rows import ENVIRONMENT, fail, large, make_records, swept
from ablation_support import tiny_data, tiny_study

from torch_pnn.ablation import answers, plots, records, report, tables
from torch_pnn.ablation.arms import CATALOGUE
from torch_pnn.ablation.study import Question

#: Six arms as `make ablation` has them, far enough apart for a verdict.
SIX = {"cnn": 0.975, "cnn-params": 0.968, "lbcnn": 0.966, "pnn": 0.965, "control": 0.93, "waves": 0.966}


def _six(**changes):
    settings = {"total": 360, "epochs": 3, "deviation": 0.004, "shifts": (), "validation": False, "other_seeds": 10}
    return make_records(SIX, **{**settings, **changes})


class _Page(html.parser.HTMLParser):
    """Collects what a page refers to, and checks that elements nest."""

    VOID = frozenset({"meta", "br", "link", "img", "path", "use", "rect", "image", "circle", "line"})

    def __init__(self, text):
        super().__init__()
        self.open, self.references, self.ids, self.tags, self.words = [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "action", "data"):
                self.references.append(value)
            if name == "id":
                self.ids.append(value)
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)


@functools.cache
def _page():
    """The report on SIX, with one image of the data."""
    return report.render(dataclasses.replace(_six(), study=_tiny(_six().study)), tiny_data())


def _tiny(study):
    """A network that is made in no time."""
    return dataclasses.replace(study, model=dataclasses.replace(study.model, width=4))


@functools.cache
def _large():
    """The report on 33 arms, one unreadable image, and runs that diverged and broke."""
    made = fail(fail(large(), "pnn", 3), "lbcnn", 2, "broken", "RuntimeError: out of memory")
    made.data["unreadable"] = ["train/cat/0123.jpg"]
    return made, report.render(made)


def _words(page):
    return " ".join(" ".join(_Page(page).words).replace("\u00a0", " ").split())


def test_the_report_holds_everything_it_shows():
    for page, plots_shown in ((_page(), 4), (_large()[1], 8)):
        found = _Page(page)
        assert len(found.ids) == len(set(found.ids)), "ids of two plots clash"
        for reference in found.references:
            assert reference.startswith(("#", "data:")), reference
            assert not reference.startswith("#") or reference[1:] in found.ids
        for target in re.findall(r"url\(([^)]*)\)", page):
            assert target.startswith("#")
            assert target[1:] in found.ids
        outside = set(re.findall(r"https?://[^\s\"'<>]+", page)) - {
            "http://www.w3.org/2000/svg",
            "http://www.w3.org/1999/xlink",
        }
        assert not outside
        assert "@import" not in page
        assert page.count("<svg") == plots_shown
        assert '<meta charset="utf-8">' in page


def test_the_report_says_what_matters_in_order():
    words = _words(_page())
    order = [
        "PNN is better than its control",
        "sign-flip test p = 0.002",
        "Further questions",
        "Is it the noise, or the position?",
        "How far is a CNN?",
        "Against the control, seed by seed",
        "Accuracy against cost",
        "Learning curves",
        "What a mask does",
        "All arms",
        "What they cost",
        "Class by class",
        "Seed by seed",
        "How it was decided",
        "What was done",
        "With what",
        "libpnn 0.1.0, instruction set avx2",
        "The command",
        "torch-pnn ablate made-up.yaml --out <here>",
    ]
    places = [words.find(part) for part in order]
    assert -1 not in places, order[places.index(-1)]
    assert places == sorted(places)
    for arm in SIX:
        assert CATALOGUE[arm].summary.split(":")[0] in words


def test_both_colour_schemes_and_no_colour_left_behind():
    for page in (_page(), _large()[1]):
        assert "prefers-color-scheme: dark" in page
        used = set(re.findall(r"var\((--[a-z0-9-]+)\)", page))
        light, dark = page.split("prefers-color-scheme: dark")[:2]
        for variable in used - {"--tone"}:
            assert f"{variable}:" in light, variable
            assert f"{variable}:" in dark, variable
        # matplotlib's own colours would be unreadable on one of the two.
        svgs = page[page.index("<svg") : page.rindex("</svg>")]
        assert not set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svgs))


def _luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_and_marks_stand_out_from_the_ground():
    # WCAG 2.1: 4.5 to 1 for text, 3 to 1 for marks that carry meaning.
    light, dark = _page().split("prefers-color-scheme: dark")[:2]
    for scheme in (light, dark.split("* { box-sizing")[0]):
        colours = dict(re.findall(r"(--[a-z0-9-]+): (#[0-9a-f]{6})", scheme))
        for name in ("--ink", "--muted", "--good", "--bad", "--open", "--accent"):
            for ground in ("--page", "--card"):
                assert _contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
        for number in range(1, 9):
            assert _contrast(colours[f"--arm-{number}"], colours["--card"]) >= 3, number
        assert _contrast(colours["--ink"], colours["--alarm-ground"]) >= 4.5


def _contrast(one, other):
    bright, dim = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def test_plots_and_tables_can_be_heard():
    page = _large()[1]
    assert page.count('role="img" aria-label="') == page.count("<svg")
    assert not re.search(r"<th(?! scope=)[ >]", page.replace("<thead>", ""))
    for found in re.findall(r"<table>(.{9})", page):
        assert found == "<caption>"


def test_runs_that_failed_and_images_that_could_not_be_read_are_said_loudly():
    made, page = _large()
    words = _words(page)
    alarms = page[page.index("role='alert'") : page.index("<svg")]
    assert "PNN, seed 3: the loss became nan in epoch 2. It is left out of every mean and pair" in alarms
    assert "LBCNN, seed 2: RuntimeError: out of memory" in alarms
    assert "train/cat/0123.jpg" in alarms
    assert "9 seeds" in words
    assert "Left out of the pairs: PNN, seed 3" in words
    assert tables.evaluate(made).primary.seeds == (0, 1, 2, 4, 5, 6, 7, 8, 9)
    assert "class='alarm'" not in _page()


def test_the_stand_in_is_said_loudly():
    made = _six()
    stand_in = {**ENVIRONMENT, "operators": "reference", "isa": "none"}
    made.invocations.append({**made.invocations[0], "environment": stand_in})
    assert "NOT computed" not in report.render(made).split("With what")[0]  # it computed no row
    made.results[3]["invocation"] = 1
    loud = report.render(made)
    assert loud.index("NOT computed by the compiled operators") < loud.index("<svg")
    assert "more than one setup" in loud


def test_incomplete_and_empty_studies_have_a_report_too():
    made = _six()
    partial = dataclasses.replace(made, results=made.results[:7], epochs=made.epochs[:21])
    assert tables.evaluate(partial).missing == 53
    assert "Incomplete: 53 of 60 runs have no result yet" in report.render(partial)
    empty = dataclasses.replace(made, results=[], epochs=[], data={})
    result = tables.evaluate(empty)
    assert result.verdict.startswith("Undecided: no seed has finished")
    assert "60 of 60 runs have no result yet" in tables.text_report(empty, result)
    _Page(report.render(empty))
    tables.files(empty, result)


@pytest.mark.parametrize("seeds", [1, 2])
def test_one_and_two_seeds(seeds):
    made = _six(seeds=seeds)
    result = tables.evaluate(made)
    assert result.primary.outcome == "undecided"
    assert "can't decide" in result.verdict
    _Page(report.render(made))
    tables.files(made, result)


def test_all_runs_of_the_candidate_diverged():
    made = _six(seeds=6)
    for seed in range(6):
        made = fail(made, "pnn", seed)
    assert tables.evaluate(made).verdict.startswith("Undecided: no seed")
    assert "diverged" in _words(report.render(made))


def test_rows_of_another_metric():
    made = _six(metric="mAP", question=Question(margin=1.0))
    words = _words(report.render(made))
    assert "points of mAP" in words
    assert "mAP against cost" in words
    assert "mAP, %" in words
    assert "accuracy, %" not in words
    assert "correct answers" not in words


def test_rows_that_lack_what_newer_rows_have():
    made = _six()
    for row in made.results:
        for key in ("best_epoch", "best_accuracy", "per_class", "shifted", "peak_memory_bytes", "test_loss", "macs"):
            del row[key]
    for row in made.epochs:
        del row["validation_score"]
        row["test_score"] = None if row["epoch"] == 2 else row["test_score"]  # measured at some epochs only
    words = _words(report.render(made))
    assert "memory, MiB" not in words
    assert "Class by class" not in words


def test_text_from_outside_is_escaped():
    made = _six()
    made.invocations[0]["command"] = "torch-pnn ablate --out '</code><script>alert(1)</script>'"
    made.results[0].update(status="broken", problem="<img src=x>", accuracy=None, correct=None, per_class=[])
    made.data["class_names"] = ["<i>"] * 10
    study = dataclasses.replace(made.study, title="</title><script>", name="</script>")
    study = dataclasses.replace(study, arms=(dataclasses.replace(study.arms[0], title="<u>$x$</u>"), *study.arms[1:]))
    page = report.render(dataclasses.replace(made, study=study))
    found = _Page(page)
    assert found.tags.count("script") == 1
    assert not {"img", "i", "u"} & set(found.tags)


def test_the_report_is_the_same_each_time_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    made = dataclasses.replace(_six(), study=_tiny(_six().study))
    again = report.render(made, tiny_data())
    assert torch.equal(torch.get_rng_state(), state)
    assert again == _page()


def test_only_the_arms_of_the_question_have_a_colour_and_no_two_look_alike():
    made = large()
    look = plots.styles(made, tables.evaluate(made))
    main = [look[arm.name] for arm in made.study.arms if not arm.group]
    assert [style.number for style in main] == list(range(1, 17))
    assert sum(style.coloured for style in main) == 8
    assert look["pnn"].coloured
    assert look["control"].coloured
    assert len({style.colour for style in main if style.coloured}) == 8
    assert look["waves level 0.5"] == look["waves"]


def test_a_value_far_outside_stands_at_the_edge():
    made = large()
    svg = plots.paired_differences(made, tables.evaluate(made))
    assert "←" in svg  # the arm tested with other masks
    assert "−28" in svg
    with_room = make_records({name: 0.6 for name in SIX})
    assert "←" not in plots.paired_differences(with_room, tables.evaluate(with_room))


def test_the_best_arm_is_never_left_out_of_the_costs():
    made = make_records(
        {**SIX, "cnn": 0.995, "cnn-params": 0.612, "lbcnn": 0.61, "pnn": 0.60, "control": 0.605, "waves": 0.60}
    )
    svg = plots.accuracy_against_costs(made, tables.evaluate(made))
    assert ">90</text>" in svg and ">60</text>" in svg
    low = make_records({**SIX, "other-masks": 0.2})
    assert ">50</text>" not in plots.accuracy_against_costs(low, tables.evaluate(low))


def test_further_questions_are_adjusted_among_themselves_and_read_only_where_decided():
    made = make_records(other_seeds=10)
    found = {answer.question: answer for answer in answers.answers(made, tables.evaluate(made))}
    plain = found["Does it help over plain 1×1 convolutions?"]
    assert [item.difference.comparisons for item in plain.items] == [1]
    assert plain.summary == "PNN does better than plain 1×1."
    assert "Learnable parameters: 9,148 against 9,222" in plain.items[0].sentence
    position = found["Is it the noise, or the position?"]
    assert {item.difference.comparisons for item in position.items} == {6}
    by_name = {item.name: item for item in position.items}
    assert by_name["other masks in the test"].reading.startswith("The network has adapted to its own masks")
    assert by_name["moved by 2 pixels"].difference.mean == pytest.approx(-2.0, abs=0.5)
    assert "points more than its control" in by_name["moved by 2 pixels"].sentence
    for answer in found.values():
        for item in answer.items:
            assert item.difference.outcome != "undecided" or not item.reading
    cnn = found["How far is a CNN?"]
    assert "PNN is worse than CNN by" in cnn.items[2].sentence


def test_a_question_without_arms_is_not_asked():
    made = make_records({"pnn": 0.6, "control": 0.59}, shifts=())
    assert answers.answers(made, tables.evaluate(made)) == []
    assert "Further questions" not in report.render(made)


def test_sweeps_of_words_and_numbers_with_their_base():
    made = make_records({"pnn": 0.6, "control": 0.59}, swept=swept("pnn", "level", {4: 0.5, 0.02: 0.55}), shifts=())
    (line,) = tables.sweeps(made.study, tables.evaluate(made))
    assert [value for value, _ in line.points] == [0.02, 0.1, 4]
    assert line.points[1][1].arm == "pnn"
    assert line.numeric
    made = make_records({"pnn": 0.6, "control": 0.59}, swept=swept("pnn", "norm", {"after": 0.5, "none": 0.5}))
    (line,) = tables.sweeps(made.study, tables.evaluate(made))
    assert [value for value, _ in line.points] == ["before", "after", "none"]
    assert not line.numeric


def test_a_folder_is_rebuilt_without_its_data(tmp_path, monkeypatch):
    made = dataclasses.replace(_six(), directory=tmp_path)
    monkeypatch.setattr(records, "read", lambda _: made)
    monkeypatch.setattr(report, "read", lambda _: made)
    path, shown = report.rebuild(tmp_path)
    assert path == tmp_path / "report.html"
    assert "without pictures of masks: " in shown
    assert "What a mask does" not in path.read_text(encoding="utf-8")
    assert (tmp_path / "tables" / "scores.tex").exists()


def test_masks_of_the_showcase_are_those_of_the_run():
    from torch_pnn.ablation.arms import build
    from torch_pnn.ablation.showcase import make_showcase
    from torch_pnn.modules import PerturbConv2d

    study, data = tiny_study(arms=("pnn", "control", "waves"), width=8), tiny_data()
    showcase = make_showcase(study, data)
    assert [row.title for row in showcase.rows] == ["PNN", "PNN, waves"]
    layer = next(m for m in build(study, "pnn", study.streams(0), data).model.modules() if isinstance(m, PerturbConv2d))
    row = showcase.rows[0]
    masks = layer.perturbation(8, 8)[:, 0] * layer.level
    assert any(torch.equal(row.mask, mask) for mask in masks)
    assert torch.equal(row.response, torch.relu(row.input + row.mask))
    assert torch.equal(row.change, row.response - torch.relu(row.input))
    assert make_showcase(tiny_study(arms=("cnn", "control")), data) is None
