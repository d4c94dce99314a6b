"""`make lint`: ruff, mypy, clang-format 19, and the project's own checks of its text.

    python tests/lint.py                everything
    python tests/lint.py text           the project's own checks alone (no tool needed)

Prints each finding with its file and line; the exit status is the number of checks that failed. clang-format is left
out with a line that says so where it isn't installed, since other versions of it format otherwise.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
C_SUFFIXES = {".c", ".h", ".cc", ".cpp", ".cu", ".cuh"}
CODE_SUFFIXES = C_SUFFIXES | {".py", ".cmake"}
TEXT_SUFFIXES = CODE_SUFFIXES | {".md", ".txt", ".in", ".toml", ".yaml", ".cff", ".json"}
# Spelt so that this file does not find itself.
LEFT_OVERS = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b|^\s*#\s*if\s+0\b")
LONGEST_LINE = 120


def project_files() -> list[Path]:
    """Every text file that git knows or would add, relative to the root."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        names = [Path(name) for name in listed.stdout.split("\0") if name]
    else:  # not a clone: a source archive
        skipped = {"build", "dist", "runs", "__pycache__"}
        names = [path.relative_to(ROOT) for path in ROOT.rglob("*")]
        names = [name for name in names if not any(part in skipped or part.startswith(".venv") for part in name.parts)]
    wanted = {"Makefile", "LICENSE", "run"}
    return sorted(
        name for name in names if (ROOT / name).is_file() and (name.suffix in TEXT_SUFFIXES or name.name in wanted)
    )


def check_text(files: Sequence[Path]) -> list[str]:
    """Left-overs, tabs, blanks at line ends, long code lines, no last newline, no word on what the file does."""
    findings = []
    for name in files:
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            findings.append(f"{name}: not UTF-8: {error}")
            continue
        if text and not text.endswith("\n"):
            findings.append(f"{name}: no newline at the end")
        if text.endswith("\n\n"):
            findings.append(f"{name}: empty lines at the end")
        for number, line in enumerate(text.splitlines(), 1):
            if LEFT_OVERS.search(line):
                findings.append(f"{name}:{number}: left over: {line.strip()}")
            if line != line.rstrip():
                findings.append(f"{name}:{number}: blanks at the end of the line")
            if "\t" in line and name.name != "Makefile":
                findings.append(f"{name}:{number}: a tab")
            if name.suffix in CODE_SUFFIXES - {".py"} and len(line) > LONGEST_LINE:  # ruff measures Python
                findings.append(f"{name}:{number}: {len(line)} columns, more than {LONGEST_LINE}")
        if name.suffix in CODE_SUFFIXES and text and not re.match(r"(#!.*\n)?\s*(/\*|//|#|[rb]?\"\"\")", text):
            findings.append(f"{name}:1: the first lines should say what the file does")
    return findings


def check_versions(files: Sequence[Path]) -> list[str]:
    """The version in the citation file is the C header's, and pyproject's extras are the requirements files'."""
    del files
    findings = []
    header = (ROOT / "csrc/include/pnn/pnn.h").read_text(encoding="utf-8")
    version = ".".join(re.findall(r"^#define PNN_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)$", header, re.MULTILINE))
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    if citation is None or citation.group(1) != version:
        findings.append(f"CITATION.cff: version {citation and citation.group(1)}; pnn.h has {version}")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra, requirements in (("ablation", "run"), ("test", "test"), ("requires", "build")):
        found = re.search(rf"^{extra} = \[(.*)\]$", project, re.MULTILINE)
        listed = sorted(re.findall(r'"([^"]+)"', found.group(1))) if found else []
        lines = (ROOT / f"requirements/{requirements}.txt").read_text(encoding="utf-8").splitlines()
        wanted = sorted(line for line in lines if line and not line.startswith("#"))
        if listed != wanted:
            findings.append(f"pyproject.toml: {extra} has {listed}; requirements/{requirements}.txt has {wanted}")
    return findings


def run_tool(command: Sequence[str]) -> bool:
    """Runs a linter in the project's root; whether it found nothing."""
    print(f"$ {' '.join(command[:6])}{' ...' if len(command) > 6 else ''}", flush=True)
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def main(arguments: Sequence[str]) -> int:
    """Runs the checks; returns how many of them found something."""
    files = project_files()
    failed = []
    own: list[tuple[str, Callable[[Sequence[Path]], list[str]]]] = [("text", check_text), ("versions", check_versions)]
    for name, check in own:
        findings = check(files)
        print("\n".join([*findings, f"{name}: {len(findings)} findings in {len(files)} files"]), flush=True)
        if findings:
            failed.append(name)
    if list(arguments) != ["text"]:
        python = sys.executable
        if not run_tool([python, "-m", "ruff", "check", "--quiet", "."]):
            failed.append("ruff")
        if not run_tool([python, "-m", "mypy"]):
            failed.append("mypy")
        sources = [str(name) for name in files if name.suffix in C_SUFFIXES]
        if shutil.which("clang-format-19") is None:
            print("clang-format-19 is not installed (Debian: apt-get install clang-format-19): formatting not checked")
        elif sources and not run_tool(["clang-format-19", "--dry-run", "-Werror", *sources]):
            failed.append("clang-format")
    print(f"lint: {'failed: ' + ', '.join(failed) if failed else 'all good'}", flush=True)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
