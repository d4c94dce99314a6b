"""Tables, plots and the report: made from rows alone, self-contained, and honest about what is missing."""

from __future__ import annotations

import dataclasses
import functools
import html.parser
import re
from pathlib import Path

import pytest
import torch
from ablation_support import tiny_data, tiny_study

from torch_pnn.ablation import report, tables
from torch_pnn.ablation.arms import CATALOGUE
from torch_pnn.ablation.records import Records

ENVIRONMENT = {
    "torch_pnn": "0.1.0",
    "libpnn": "0.1.0",
    "torch": "2.13.0",
    "python": "3.11.7",
    "numpy": "2.0",
    "scikit-learn": "1.9",
    "scipy": "1.17",
    "operators": "compiled",
    "derivatives": "compiled",
    "isa": "avx2",
    "machine": "x86_64",
    "system": "Linux",
    "cores": 2,
}


def _records(accuracies, *, epochs=2, **changes):
    """Records with accuracies[arm][seed] correct answers of 100; None = that run diverged."""
    seeds = tuple(range(max(map(len, accuracies.values()))))
    study = tiny_study(arms=tuple(accuracies), seeds=seeds, epochs=epochs, width=8)
    results, curves = [], []
    for arm, counts in accuracies.items():
        for seed, correct in enumerate(counts):
            failed = correct is None
            results.append(
                {
                    "arm": arm,
                    "seed": seed,
                    "status": "diverged" if failed else "finished",
                    "problem": "the loss became nan in epoch 1" if failed else None,
                    "accuracy": None if failed else correct / 100,
                    "correct": correct,
                    "total": 100,
                    "parameters": 1000 + 100 * len(arm),
                    "mask_bytes": 8,
                    "macs": 12345,
                    "width": 8,
                    "epochs": epochs,
                    "seconds_per_epoch": 0.25,
                    "seconds": 1.0,
                    "invocation": 0,
                }
            )
            for epoch in range(1, epochs + 1):
                if not failed:
                    curves.append({"arm": arm, "seed": seed, "epoch": epoch, "test_accuracy": correct / 100 / epoch})
    invocation = {"command": "torch-pnn ablate --out <here>", "started": "now", "jobs": 2, "environment": ENVIRONMENT}
    return dataclasses.replace(Records(Path("nowhere"), study, "0" * 64, [invocation], results, curves), **changes)


SIX = {"pnn": [95, 96, 94, 95, 97, 95], "control": [90, 91, 92, 90, 91, 90], "waves": [95, 94, 96, 95, 95, 95]}


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
    """The report on SIX."""
    return report.render(_records(SIX), tiny_data())


def test_verdict_first_then_the_table():
    result = tables.evaluate(_records(SIX))
    text = tables.text_report(_records(SIX), result)
    lines = text.splitlines()
    assert lines[0].startswith("PNN is better than its control without noise by 4.67 points")
    head, rule, *body = lines[2:7]
    assert {len(head), len(rule), *map(len, body)} == {len(rule)}
    assert [line.split()[0] for line in body] == ["PNN", "control", "PNN,"]
    assert "95.33 ± 1.03" in body[0]
    assert "+4.67" in body[0]
    assert "(control)" in body[1]
    assert "1,300" in body[0]


def test_numbers_of_an_arm():
    arm = tables.evaluate(_records(SIX)).arms[0]
    assert arm.accuracy.mean == pytest.approx(0.95333, abs=1e-5)
    assert arm.difference.values == (5.0, 5.0, 2.0, 5.0, 6.0, 5.0)
    assert (arm.parameters, arm.mask_bytes, arm.macs, arm.seconds_per_epoch) == (1300, 8, 12345, 0.25)


def test_a_diverged_run_is_left_out_and_said():
    accuracies = {**SIX, "pnn": [95, None, 94, 95, 97, 95]}
    records = _records(accuracies)
    result = tables.evaluate(records)
    assert result.primary.seeds == (0, 2, 3, 4, 5)
    assert "5 seeds can't decide" in result.verdict
    text = tables.text_report(records, result)
    assert "PNN, seed 1: the loss became nan in epoch 1" in text
    page = report.render(records, tiny_data())
    assert "the loss became nan in epoch 1. It is left out of every mean and pair" in page
    assert "diverged" in page


def test_incomplete_and_empty_studies_have_a_report_too():
    records = _records(SIX)
    partial = dataclasses.replace(records, results=records.results[:7], epochs=records.epochs[:14])
    assert tables.evaluate(partial).missing == 11
    assert "Incomplete: 11 of 18 runs have no result yet" in report.render(partial, tiny_data())
    empty = dataclasses.replace(records, results=[], epochs=[])
    result = tables.evaluate(empty)
    assert result.verdict.startswith("Undecided: no seed has finished")
    assert "18 of 18 runs have no result yet" in tables.text_report(empty, result)
    _Page(report.render(empty, tiny_data()))


def test_one_seed_and_all_runs_diverged():
    for accuracies in ({"pnn": [50], "control": [50]}, {"pnn": [None, None], "control": [None, 3]}):
        records = _records(accuracies)
        assert tables.evaluate(records).primary.outcome == "undecided"
        tables.text_report(records, tables.evaluate(records))
        _Page(report.render(records, tiny_data()))


def test_the_report_holds_everything_it_shows():
    page = _page()
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
    assert page.count("<svg") == 4
    assert page.isascii() or '<meta charset="utf-8">' in page


def test_the_report_says_what_matters_in_order():
    words = " ".join(_Page(_page()).words)
    order = [
        "PNN is better than its control",
        "sign-flip test p = 0.0312",
        "Against the control",
        "Accuracy against size",
        "Learning curves",
        "What a mask does",
        "All arms",
        "Seed by seed",
        "What was done",
        "With what",
        "libpnn 0.1.0, instruction set avx2",
        "The command",
        "torch-pnn ablate --out <here>",
    ]
    places = [words.find(part) for part in order]
    assert -1 not in places, order[places.index(-1)]
    assert places == sorted(places)
    for arm in SIX:
        assert CATALOGUE[arm].summary.split(":")[0] in words


def test_both_colour_schemes_and_no_colour_left_behind():
    page = _page()
    assert "prefers-color-scheme: dark" in page
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", page))
    light, dark = page.split("prefers-color-scheme: dark")[:2]
    for variable in used - {"--tone"}:
        assert f"{variable}:" in light, variable
        assert f"{variable}:" in dark, variable
    # matplotlib's own colours would be unreadable on one of the two.
    svgs = page[page.index("<svg") : page.rindex("</svg>")]
    assert not set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svgs))


def test_the_stand_in_is_said_loudly():
    records = _records(SIX)
    quiet = _page()
    assert "NOT computed by the compiled operators" not in quiet
    assert "class='alarm'" not in quiet
    stand_in = {**ENVIRONMENT, "operators": "reference", "isa": "none"}
    records.invocations.append({**records.invocations[0], "environment": stand_in})
    assert "NOT computed" not in report.render(records, tiny_data()).split("With what")[0]  # it computed no row
    records.results[3]["invocation"] = 1
    loud = report.render(records, tiny_data())
    assert "class='alarm'" in loud
    assert loud.index("NOT computed by the compiled operators") < loud.index("<svg")
    assert "more than one setup" in loud


def test_text_from_outside_is_escaped():
    records = _records(SIX)
    records.invocations[0]["command"] = "torch-pnn ablate --out '</code><script>alert(1)</script>'"
    records.results[0].update(status="broken", problem="<img src=x>", accuracy=None, correct=None)
    study = dataclasses.replace(records.study, title="</title><script>", name="</script>")
    page = report.render(dataclasses.replace(records, study=study), tiny_data())
    found = _Page(page)
    assert found.tags.count("script") == 1
    assert "img" not in found.tags


def test_the_report_is_the_same_each_time_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    again = report.render(_records(SIX), tiny_data())
    assert torch.equal(torch.get_rng_state(), state)
    assert again == _page()


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
