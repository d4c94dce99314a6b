"""Times the perturbation operator beside plain PyTorch and the machine's ceilings, all in one run.

    make bench                                      every row of the targets' table: about ten minutes
    make bench ARGS=--quick                         four of the cases, few rounds, under two minutes
    make bench ARGS='--case 32,64,56,64,1'          these cases (repeatable): B,C,H,T,M with W = H
    make bench ARGS='--row norm --row seeds'        these rows; --list names them
    make bench ARGS=--record                        also writes benchmarks/results/ and the figures in docs/kernels.md

Results go to runs/bench (--out): results.json with every figure, table.md, ratios.png and ratios.svg.
benchmarks/README.md says how it is measured and what is compared.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import report
import torch
from contestants import parse_case
from rows import CASES, ODD_CASES, QUICK_CASES, ROWS, Line, Measured, measure_case
from timing import Effort

import torch_pnn

ROOT = Path(__file__).resolve().parent.parent
THOROUGH = Effort(rounds=25, sample=0.01, budget=60.0, fewest=7)
QUICK = Effort(rounds=5, sample=0.002, budget=4.0, fewest=3)


def keep_freed_memory() -> bool:
    """Makes glibc's allocator keep what is freed, for every contestant alike.

    By default it hands blocks above 32 MB back at each free, and smaller ones now and then: a call would pay, or not,
    for the page faults of its output (10 ms for 33 MB, twice what the layer takes).

    Returns:
        Whether there is such an allocator.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


def machine() -> dict[str, Any]:
    """What ran, for the record."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.ops.torch_pnn._isa_name(),
        "torch": str(torch.__version__),
        "torch_pnn": torch_pnn.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four cases, few short rounds: under two minutes")
    parser.add_argument("--case", action="append", metavar="B,C,H,T,M", help="this case; repeatable")
    parser.add_argument("--row", action="append", choices=list(ROWS), help="this row; repeatable")
    parser.add_argument("--list", action="store_true", help="name rows, targets and cases, and measure nothing")
    parser.add_argument("--threads", type=int, help="threads (PyTorch's default)")
    parser.add_argument("--rounds", type=int, help="rounds of each comparison")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench", help="folder of the results (runs/bench)")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/ and docs/kernels.md's figures")
    parsed = parser.parse_args(arguments)
    for name in ("threads", "rounds"):
        value = getattr(parsed, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}, it should be at least 1")
    try:
        parsed.case = [parse_case(text) for text in parsed.case or []]
    except ValueError as error:
        parser.error(f"--case: {error}")
    if not parsed.list:
        try:  # found now, not after the measurement
            parsed.out.mkdir(parents=True, exist_ok=True)
            (parsed.out / "results.json").touch()
        except OSError as error:
            parser.error(f"--out {parsed.out}: {error.strerror}")
    return parsed


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """Measures what the command line asks for, printing each line as soon as it is known.

    Returns:
        Everything that results.json holds.
    """
    effort = QUICK if parsed.quick else THOROUGH
    if parsed.rounds is not None:
        effort = replace(effort, rounds=parsed.rounds, fewest=parsed.rounds)
    names = parsed.row or list(ROWS)
    cases = parsed.case or list(QUICK_CASES if parsed.quick else CASES)
    odd = [] if parsed.case or parsed.quick else list(ODD_CASES)
    about = machine() | {"keeps_freed_memory": keep_freed_memory()}
    start, load = time.time(), os.getloadavg()[0]
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    if load > 0.5:
        print(f"other work is running here (load {load:.1f}): the figures will be worse than the machine's", flush=True)

    lines: list[Line] = []
    measured: list[Measured] = []
    if any(ROWS[name].contestants for name in names):
        for case in [*cases, *odd]:
            is_odd = case in odd
            wanted = [name for name in names if ROWS[name].contestants and (ROWS[name].odd or not is_odd)]
            if not wanted:
                continue
            measured.append(measure_case(case, wanted, effort, is_odd))
            print(report.ceilings_text(measured[-1]), flush=True)
    for name in names:
        row = ROWS[name]
        print(f"\n{row.title}   [{row.target}]", flush=True)
        found: list[Line] = []
        if row.lines is not None:
            found = list(row.lines([m for m in measured if row.odd or not m.odd]))
            print("\n".join(map(report.line_text, found)), flush=True)
        elif row.alone is not None:
            for line in row.alone(effort, parsed.quick, cases):
                found.append(line)
                print(report.line_text(line), flush=True)
        if not found:
            print("  nothing to measure here")
        lines += found
    return {
        "machine": about,
        "date": time.strftime("%Y-%m-%d", time.localtime(start)),
        "command": report.command(parsed),
        "seconds": time.time() - start,
        "load_before": load,
        "effort": asdict(effort),
        "cases": [report.case_record(m) for m in measured],
        "lines": [report.line_record(line) for line in lines],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; the exit status is 0 also where targets are missed."""
    parsed = _arguments(arguments)
    if parsed.list:
        for name, row in ROWS.items():
            print(f"{name:<18} {row.title}   [{row.target}]")
        print("cases:", *CASES, "and odd:", *ODD_CASES)
        return 0
    if parsed.threads is not None:
        torch.set_num_threads(parsed.threads)
    results = run(parsed)
    print("\n" + report.verdict(results), flush=True)
    table = report.markdown(results)
    if parsed.markdown:
        print("\n" + table)
    try:
        (parsed.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (parsed.out / "table.md").write_text(table, encoding="utf-8")
        drawn = report.plot(results, parsed.out)
        if parsed.record:
            for path in report.record(results, ROOT):
                print(f"recorded in {path}")
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"written to {parsed.out}: results.json, table.md{', ratios.png, ratios.svg' if drawn else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
