"""The committed results: whole, by a study that still ships, and what the pages quote is what the rows say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from torch_pnn.ablation import files, records, report, tables

ROOT = Path(__file__).resolve().parents[2]
STUDIES = sorted(path.parent for path in (ROOT / "docs" / "studies").glob("*/study.json"))

if not STUDIES:
    pytest.skip("no docs/studies beside the tests", allow_module_level=True)


@pytest.mark.parametrize("folder", STUDIES, ids=lambda path: path.name)
def test_results_are_whole_and_of_a_study_that_ships(folder):
    found = records.read(folder)
    assert found.missing == []
    assert {row["status"] for row in found.results} == {"finished"}
    assert files.load(folder.name).differences(found.study) == []
    primary = tables.evaluate(found).primary
    assert primary.count == len(found.study.seeds) >= 10


@pytest.mark.parametrize("folder", STUDIES, ids=lambda path: path.name)
def test_tables_are_those_of_the_rows(folder, tmp_path):
    for name in ("study.json", "results.jsonl", "epochs.jsonl"):
        shutil.copy(folder / name, tmp_path)
    report.rebuild(tmp_path)
    for path in (folder / "tables").iterdir():
        assert (tmp_path / "tables" / path.name).read_text() == path.read_text(), path.name


def test_the_readme_quotes_the_rows():
    section = (ROOT / "README.md").read_text().split("## Does the noise help?")[1].split("\n## ")[0]
    columns = []
    for name in ("mnist", "cifar10", "cifar10-level-1"):
        result = tables.evaluate(records.read(ROOT / "docs" / "studies" / name))
        known = {f"{100 * arm.accuracy.mean:.2f}" for arm in result.arms if arm.arm == result.find("control").arm}
        columns.append(known | {tables.difference(arm.difference) for arm in result.arms if arm.difference is not None})
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")][2:]
    cells = [(cell, known) for row in rows for cell, known in zip(row[1:], columns, strict=False) if cell.strip(" |")]
    assert len(cells) == 19
    for cell, known in cells:
        assert cell.strip(" |") in known
