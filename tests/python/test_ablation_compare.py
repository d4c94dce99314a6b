"""Studies side by side: what is shown, what is said about it, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from ablation_rows import MEANS, arm, make_records

from torch_pnn.ablation import compare
from torch_pnn.ablation.errors import UsageError
from torch_pnn.ablation.study import Question

SMALL = {"cnn": 0.97, "pnn": 0.95, "control": 0.93, "waves": 0.96}


def _study(name, folder=None, sha="0", **changes):
    made = make_records(**{"means": SMALL, "name": name, "title": name.upper(), "total": 1000, "seeds": 6, **changes})
    return dataclasses.replace(made, directory=Path(folder or name), data_sha256=sha * 64)


def test_two_studies_and_their_arms():
    studies = [_study("one"), _study("two", sha="1", means={k: v for k, v in MEANS.items() if k != "cnn"}, epochs=9)]
    page = compare.render(studies)
    for part in ("one", "two", "Differences", "Verdicts", "Scores", "What the studies differ in", "epochs"):
        assert part in page
    assert page.count("<svg") == 1
    assert "class='alarm'" not in page
    shown = compare.text(studies)
    assert shown.splitlines()[0].startswith("one: PNN is better than its control")
    lines = [line.split("  ")[0] for line in shown.splitlines()]
    assert "PNN, waves" in lines
    assert "CNN" not in lines  # of one study only


@pytest.mark.parametrize(
    "studies, reason",
    [
        (["one"], "one study alone can't be compared"),
        (["one", "one"], "one is named twice"),
        ([str(n) for n in range(9)], "9 studies have no room on one page; name at most 8"),
    ],
)
def test_folders_that_make_no_comparison(studies, reason):
    with pytest.raises(UsageError, match=reason):
        compare.check([_study(name) for name in studies])


def test_studies_that_make_no_comparison():
    with pytest.raises(UsageError, match=r"different metrics can't be set side by side \(accuracy in a, mAP in b\)"):
        compare.check([_study("a"), _study("b", metric="mAP")])
    other = _study("b", means={"cnn": 0.5, "shift": 0.5}, question=Question("cnn", "shift"))
    with pytest.raises(UsageError, match="no two arms in common"):
        compare.check([_study("a"), other])
    with pytest.raises(UsageError, match="no run of b has finished"):
        compare.check([_study("a"), dataclasses.replace(_study("b"), results=[])])


def test_what_a_reader_must_know_is_said():
    again = _study("one", folder="again")
    notes = compare.text([_study("one"), again])
    assert "the same study on the same data, done twice" in notes
    assert "one (again)" in notes
    assert "share their images" in compare.text([_study("one"), _study("two", epochs=2)])
    partial = _study("two", sha="1")
    partial = dataclasses.replace(partial, results=partial.results[:10])
    assert "two is incomplete: 14 runs" in compare.text([_study("one"), partial])
    other = _study("two", sha="1", question=Question("waves", "cnn"))
    assert "ask different questions" in compare.text([_study("one"), other])
    swapped = _study("two", sha="1")
    arms = [arm("pnn", options={"preset": "paper"}) if a.name == "pnn" else a for a in swapped.study.arms]
    swapped = dataclasses.replace(swapped, study=dataclasses.replace(swapped.study, arms=tuple(arms)))
    assert "not defined alike in all of these studies: PNN." in compare.text([_study("one"), swapped])


def test_the_page_is_written_beside_the_first_study(tmp_path, monkeypatch):
    studies = {name: dataclasses.replace(_study(name), directory=tmp_path / name) for name in ("one", "two")}
    (tmp_path / "one").mkdir()
    monkeypatch.setattr(compare, "read", lambda folder: studies[folder.name])
    path, shown = compare.rebuild([tmp_path / "one", tmp_path / "two"])
    assert path == tmp_path / "one" / "comparison.html"
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert "nothing is pooled across studies" in shown
