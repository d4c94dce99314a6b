"""Runs the Python blocks of a page of docs/recipes, for the tests in tests/python and tests/zoo."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "recipes"
# What a page may take: recipes are short.
SECONDS = 300


@dataclasses.dataclass(frozen=True)
class Page:
    """A page of the gallery.

    Attributes:
        path: its file.
        needs: the modules named by a first line `<!-- needs: a, b -->`.
        program: its Python blocks as one program; each line stands where it stands on the page, so that a traceback's
            line numbers are the page's. Empty where it has no such block.
    """

    path: Path
    needs: tuple[str, ...]
    program: str

    def missing(self) -> list[str]:
        """The needed modules that aren't installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]

    def run(self, folder: Path) -> None:
        """Runs the page's program as `__main__`, in an empty folder and a process of its own."""
        program = folder / "page.py"  # not by the page's name: onnx.py would hide the package
        program.write_text(self.program, encoding="utf-8")
        work = folder / "work"
        work.mkdir()
        path = os.pathsep.join(filter(None, [str(ROOT / "python"), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, str(program)],
            cwd=work,
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{self.path.relative_to(ROOT)} failed:\n{done.stdout[-8000:]}"


def read(path: Path) -> Page:
    """A page from its file."""
    text = path.read_text(encoding="utf-8")
    needs = re.match(r"<!-- needs: ([\w, ]+) -->\n", text)
    names = tuple(name.strip() for name in needs[1].split(",")) if needs else ()
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        fence = line.startswith("```")
        inside = line == "```python" if fence else inside
        lines.append("" if fence or not inside else line)
    program = "\n".join(lines).rstrip() + "\n"
    return Page(path, names, program if program.strip() else "")


def pages() -> list[Page]:
    """Every page of the gallery but its index."""
    return [read(path) for path in sorted(FOLDER.glob("*.md")) if path.name != "README.md"]
