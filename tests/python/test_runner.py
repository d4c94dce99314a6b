"""Tests of tests/run.py: what it counts, what it prints last, and when it says that something is wrong."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest


def load_runner() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "run.py"
    spec = importlib.util.spec_from_file_location("pnn_test_runner", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


run = load_runner()

PYTEST_XML = """<?xml version="1.0"?>
<testsuites><testsuite name="pytest" tests="5" errors="1" failures="1" skipped="1">
<testcase name="a"/><testcase name="b"/>
<testcase name="c"><failure message="no"/></testcase>
<testcase name="d"><error message="no"/></testcase>
<testcase name="e"><skipped message="why"/></testcase>
</testsuite></testsuites>"""

CTEST_XML = """<?xml version="1.0"?>
<testsuite name="x" tests="4" failures="1" disabled="0" skipped="1">
<testcase name="a" status="run"/><testcase name="b" status="fail"><failure message=""/></testcase>
<testcase name="c" status="notrun"><skipped message="SKIP_REGULAR_EXPRESSION_MATCHED"/></testcase>
<testcase name="d" status="disabled"/>
</testsuite>"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PYTEST_XML, (2, 2, 1)),
        (CTEST_XML, (1, 1, 2)),
        ("<testsuite/>", (0, 0, 0)),
        ("<testsuite><testcase name='a'/>", (0, 1, 0)),  # cut off: its runner died
        (None, (0, 1, 0)),  # never written
    ],
)
def test_counts_of_junit_files(tmp_path: Path, text: str | None, expected: tuple[int, int, int]) -> None:
    path = tmp_path / "results.xml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    counts = run.read_junit(path)
    assert (counts.passed, counts.failed, counts.skipped) == expected


def test_summary_adds_the_tiers_up() -> None:
    lines, good = run.summary(
        [run.Result("c", run.Counts(10, 0, 1), 1.0), run.Result("python", run.Counts(5, 0, 2), 2.0, "PyTorch 2.13.0")]
    )
    assert good
    assert lines[-1] == "15 passed, 0 failed, 3 skipped"
    assert lines[2].split() == ["python", "5", "0", "2", "2.0", "PyTorch", "2.13.0"]


def test_summary_without_skipped_tests() -> None:
    assert run.summary([run.Result("c", run.Counts(1), 0.0)])[0][-1] == "1 passed, 0 failed"


@pytest.mark.parametrize(
    ("results", "last"),
    [
        ([run.Result("c", run.Counts(10, 1), 0.0)], "10 passed, 1 failed"),
        (
            [run.Result("c", run.Counts(10), 0.0), run.Result("isa", run.Counts(0, 0, 3), 0.0)],
            "10 passed, 1 failed, 3 skipped",
        ),
        ([], "0 passed, 1 failed"),
    ],
)
def test_failures_and_empty_tiers_are_failures(results: list[object], last: str) -> None:
    lines, good = run.summary(results)
    assert not good
    assert lines[-1] == last


def test_a_broken_build_fails_its_tier_and_the_next_one_runs(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(machine: object) -> tuple[object, str]:
        """Does not build."""
        raise run.BuildError("building x failed")

    def sound(machine: object) -> tuple[object, str]:
        """Passes."""
        return run.Counts(3), ""

    results = run.run_tiers(None, {"broken": broken, "sound": sound})
    assert [(result.counts.passed, result.counts.failed) for result in results] == [(0, 1), (3, 0)]
    assert results[0].note == "building x failed"
    assert "building x failed" in capsys.readouterr().out


def test_a_run_hides_passing_tests_alone() -> None:
    shown = ["  1/9 Test #1: a ....***Failed    0.02 sec", "y[3] is 1, it should be 2", "100% tests passed out of 9"]
    hidden = [
        " 15/151 Test  #16: activations_test: Each/x ......***Skipped   0.00 sec",
        "    Start 1: header: c11",
        " 1/9 Test #1: header: c11 .......   Passed    0.02 sec",
        "",
    ]
    assert [line for line in shown + hidden if not run.quiet_ctest(line)] == shown


def test_the_runner_ends_with_the_counts_and_the_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(run.TIERS, "c", lambda machine: (run.Counts(4, 0, 0), ""))
    monkeypatch.setitem(run.TIERS, "asan", lambda machine: (run.Counts(2, 1, 0), ""))
    assert run.main(["c"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "4 passed, 0 failed"
    assert run.main(["c", "asan"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "6 passed, 1 failed"


def test_an_unknown_tier_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["sea"])
    assert "no such tier: sea" in capsys.readouterr().err


def test_versions_of_tools(tmp_path: Path) -> None:
    tool = tmp_path / "cmake"
    tool.write_text("#!/bin/sh\necho cmake version 3.25.1\n", encoding="utf-8")
    tool.chmod(0o755)
    assert run.version_of(str(tool)) == (3, 25)
    assert run.version_of(str(tmp_path / "none")) == ()


def test_a_test_that_hangs_fails_by_name_and_the_others_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_hangs.py").write_text("import time\n\ndef test_hangs():\n    time.sleep(100)\n", encoding="utf-8")
    (tmp_path / "test_other.py").write_text("def test_a():\n    pass\n\ndef test_b():\n    pass\n", encoding="utf-8")
    machine = run.Machine(tmp_path / "build", jobs=2, verbose=False)
    config = ["-c", str(run.ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "-o", "faulthandler_timeout=3"]
    counts = machine.pytest("hangs", [*config, str(tmp_path)])
    assert (counts.passed, counts.failed) == (2, 1)
    assert re.search(r"crashed while running '.*test_hangs\.py::test_hangs'", capfd.readouterr().out)
