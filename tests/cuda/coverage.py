"""Line coverage of the device code: every line of cuda/ must be run by its tests on the CPU.

    python tests/run.py coverage                         builds, runs the tests, then this
    python tests/cuda/coverage.py --build build/dev      after tests of the kernels (ctest -L cuda) have run there

Reads what gcov knows of the kernels' objects after the tests have run, and names each line that none has run. A line
that no test can run carries the comment `/* not covered: why */`; such a line must indeed not be covered. A line counts
as run if one instance of its template ran it. What only nvcc compiles (inline PTX, launches) is not in these objects.

The last line is 'N passed, N failed': each file is one.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXCLUDED = re.compile(r"/\* not covered: \S.*\*/")


def counts_of(report: dict, root: Path) -> dict[Path, dict[int, int]]:
    """How often each line ran, of the files below `root`, from one of gcov's JSON reports."""
    found: dict[Path, dict[int, int]] = {}
    for file in report["files"]:
        path = Path(report["current_working_directory"], file["file"]).resolve()
        if root in path.parents:
            lines = found.setdefault(path, {})
            for line in file["lines"]:
                lines[line["line_number"]] = lines.get(line["line_number"], 0) + line["count"]
    return found


def add_up(reports: Iterable[dict], root: Path) -> dict[Path, dict[int, int]]:
    """The counts of several objects, and of several instances of a template, together."""
    total: dict[Path, dict[int, int]] = {}
    for report in reports:
        for path, lines in counts_of(report, root).items():
            sums = total.setdefault(path, {})
            for number, count in lines.items():
                sums[number] = sums.get(number, 0) + count
    return total


def failures_of(text: str, counts: dict[int, int]) -> list[tuple[int, str]]:
    """The lines of a file that no test ran, and the exclusions that are none: (number, what is wrong)."""
    lines = text.splitlines()
    wrong = []
    for number, count in sorted(counts.items()):
        line = lines[number - 1]
        excluded = EXCLUDED.search(line) is not None
        if count == 0 and not excluded:
            wrong.append((number, f"no test runs: {line.strip()}"))
        elif count > 0 and excluded:
            wrong.append((number, f"is run, so it should not be excluded: {line.strip()}"))
    return wrong


def gcov(build: Path) -> list[dict]:
    """gcov's reports on the objects of the kernels and of their tests."""
    tool = shutil.which("gcov")
    if tool is None:
        sys.exit("coverage.py: gcov was not found; it comes with GCC")
    data = sorted((build / "tests/cuda").glob("CMakeFiles/**/*.gcda"))
    if not data:
        sys.exit(f"coverage.py: no *.gcda below {build}: configure with -DPNN_COVERAGE=ON, build, run `ctest -L cuda`")
    done = subprocess.run(
        [tool, "--json-format", "--stdout", *map(str, data)], check=True, capture_output=True, text=True
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.strip()]


def main() -> int:
    """Prints the table; the exit status is 0 if every line ran."""
    parser = argparse.ArgumentParser(description="Checks that every line of cuda/ is run by its tests.")
    parser.add_argument("--build", type=Path, required=True, help="the build tree, after its tests have run")
    options = parser.parse_args()
    total = add_up(gcov(options.build), ROOT / "cuda")
    failed = len(sorted((ROOT / "cuda").glob("*.cu"))) > len([path for path in total if path.suffix == ".cu"])
    if failed:
        print("a file of cuda/ is missing among the objects")
    print(f"{'file':<28}{'lines':>7}{'run':>7}")
    bad = 0
    for path, counts in sorted(total.items()):
        wrong = failures_of(path.read_text(encoding="utf-8"), counts)
        name = path.relative_to(ROOT)
        print(f"{name!s:<28}{len(counts):>7}{sum(count > 0 for count in counts.values()):>7}")
        for number, what in wrong:
            print(f"{name}:{number}: {what}")
        bad += bool(wrong)
    print(f"{len(total) - bad} passed, {bad + failed} failed")
    return 1 if bad or failed else 0


if __name__ == "__main__":
    sys.exit(main())
