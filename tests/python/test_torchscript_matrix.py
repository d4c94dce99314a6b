"""tests/torchscript_matrix.py, which makes the table of docs/torchscript.md, for the PyTorch at hand alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from operators_support import needs_derivatives

from torch_pnn import _library

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "torchscript.md"
PROGRAM = ROOT / "tests" / "torchscript_matrix.py"


@pytest.mark.slow
@needs_derivatives
def test_the_table_of_one_pytorch_holds_the_same_bits(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    libraries = Path(_library.status().ops_path).resolve().parent
    done = subprocess.run(
        [sys.executable, PROGRAM, "--page", page, "--libraries", libraries, sys.executable],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| 2.")]
    assert len(rows) == 1 and rows[0].endswith("| same bits |")


def test_the_pages_table_has_no_failure() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| 2\.\d+", line)]
    assert len(rows) >= 2 and all(len(row) == len(rows) + 1 for row in rows)
    assert all(cell.startswith(("same bits", "within ")) for row in rows for cell in row[1:])
