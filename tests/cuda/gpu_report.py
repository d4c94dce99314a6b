"""What gpu_check.py found, as text: one line for each phase, and tables that set measured beside predicted.

python tests/cuda/gpu_report.py runs/gpu-check.json      prints the tables of a run again
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import predictions

MISSED = 1.5
"""A prediction missed by more than this, either way, is to be explained in docs/cuda.md."""
COPY, PRODUCT, COMPILED = 1.15, 0.55, 0.7
"""Targets: at most this many copies where memory-bound, at least this share of cuBLAS's rate where compute-bound, at
most this share of torch.compile's time for forward and backward."""
WGMMA_PRODUCT = 0.75
"""That of cuBLAS's rate for Hopper's asynchronous products."""


def phase_line(name: str, found: dict[str, Any]) -> str:
    """How a phase ended, and what was wrong."""
    ended = "passed" if found.get("passed") else "FAILED"
    lines = [f"{name}: {ended}" + (f" after {found['seconds']} s" if "seconds" in found else "")]
    for key in ("cases", "calls", "skipped", "different_from_host"):
        if found.get(key):
            lines.append(f"  {key}: {found[key]}")
    if not found.get("passed"):
        for key in ("error", "errors", "failures", "unfinished"):
            value = found.get(key)
            values = value if isinstance(value, list) else [value] if value else []
            lines += [f"  {key}: {text}".rstrip() for text in values]
        for key in ("memcheck", "racecheck", "initcheck", "synccheck"):
            if found.get(key, "clean") != "clean":
                lines.append(f"  {key}: {found[key]}")
        lines += [f"  {key}: {text}" for key, text in found.get("checks", {}).items() if text != "passed"]
    return "\n".join(lines)


def ratio(one: float | None, other: float | None) -> float | None:
    """one / other, where both are there."""
    return one / other if one and other else None


def cell(value: float | None, digits: int = 2, mark: bool = False) -> str:
    """A number in a table; bold where it is to be looked at."""
    if value is None:
        return "-"
    text = f"{value:.{digits}f}"
    return f"**{text}**" if mark else text


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Markdown."""
    head = list(head)
    return [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]


def case_text(row: dict[str, Any]) -> str:
    return ",".join(map(str, row["case"]))


def of_case(rows: list[dict[str, Any]], row: dict[str, Any], name: str) -> float | None:
    """A number that is measured once for both layouts."""
    same = [r for r in rows if r["case"] == row["case"] and r["type"] == row["type"] and r.get(name)]
    return same[0][name] if same else None


def memory_bound(row: dict[str, Any]) -> bool:
    """Whether a layer's forward pass is to be compared with a copy, at best; else with a product."""
    return predictions.targets(tuple(row["case"]), row["type"])[0].name == predictions.COPY


def by_wgmma(row: dict[str, Any]) -> bool:
    """Whether Hopper's asynchronous products do a layer's forward pass."""
    return bool(predictions.wgmma_kernels(tuple(row["case"]), row["type"], "forward", row["layout"]))


def predicted(rows: list[dict[str, Any]], direction: str) -> list[str]:
    """Measured beside predicted: bold where it is missed by more than MISSED."""
    body = []
    for row in rows:
        ours, guess = row.get(f"{direction} ours"), row.get(f"{direction} predicted")
        share = ratio(ours, guess)
        missed = share is not None and not 1 / MISSED <= share <= MISSED
        bound = str(row.get(f"{direction} bound", "-"))
        cells = [
            case_text(row),
            row["type"],
            row["layout"],
            cell(guess, 1),
            cell(ours, 1),
            cell(share, 2, missed),
            bound,
        ]
        body.append(cells)
    return table(["B,C,H,T,M", "type", "layout", "predicted us", "measured us", "ratio", "bound by"], body)


def compared(rows: list[dict[str, Any]], direction: str) -> list[str]:
    """Microseconds of ours and of what it is compared with; ratios are bold where a target is missed."""
    body = []
    for row in rows:
        ours = row.get(f"{direction} ours")
        compiled = of_case(rows, row, f"{direction} compiled")
        copy, product = of_case(rows, row, "copy"), of_case(rows, row, "cublas")
        of_copy, of_product, of_compiled = ratio(ours, copy), ratio(product, ours), ratio(ours, compiled)
        forward, backward = direction == "forward", direction != "forward"
        bad_copy = forward and memory_bound(row) and of_copy is not None and of_copy > COPY
        bad_product = forward and not memory_bound(row) and of_product is not None and of_product < PRODUCT
        bad_compiled = backward and of_compiled is not None and of_compiled > COMPILED
        body.append(
            [
                case_text(row),
                row["type"],
                row["layout"],
                cell(ours, 1),
                cell(row.get(f"{direction} plain"), 1),
                cell(compiled, 1),
                cell(row.get(f"{direction} cudnn 1x1"), 1),
                cell(row.get(f"{direction} cudnn 3x3"), 1),
                *([cell(copy, 1), cell(product, 1)] if forward else []),
                cell(of_compiled, 2, bad_compiled),
                *([cell(of_copy, 2, bad_copy), cell(of_product, 2, bad_product)] if forward else []),
            ]
        )
    head = ["B,C,H,T,M", "type", "layout", "ours", "plain", "compiled", "cuDNN 1x1", "cuDNN 3x3"]
    head += ["copy", "cuBLAS"] if direction == "forward" else []
    head += ["ours / compiled"] + (["ours / copy", "cuBLAS / ours"] if direction == "forward" else [])
    return table(head, body)


def targets(rows: list[dict[str, Any]]) -> list[str]:
    """Each target: how many rows meet it, and the worst."""
    found: dict[str, list[float]] = {}
    for row in rows:
        forward = row.get("forward ours")
        of_copy, of_product = ratio(forward, of_case(rows, row, "copy")), ratio(of_case(rows, row, "cublas"), forward)
        whole = ratio(row.get("forward+backward ours"), of_case(rows, row, "forward+backward compiled"))
        # Each as a share of what is allowed: at most 1 is met.
        if memory_bound(row) and of_copy:
            found.setdefault(f"forward, memory-bound: at most {COPY} copies", []).append(of_copy / COPY)
        if not memory_bound(row) and of_product:
            what = f"forward, compute-bound: at least {PRODUCT} of cuBLAS's rate"
            found.setdefault(what, []).append(PRODUCT / of_product)
            if by_wgmma(row):
                what = f"the same by asynchronous products: at least {WGMMA_PRODUCT} of cuBLAS's rate"
                found.setdefault(what, []).append(WGMMA_PRODUCT / of_product)
        if whole:
            what = f"forward + backward: at most {COMPILED} of torch.compile's time"
            found.setdefault(what, []).append(whole / COMPILED)
    body = [
        [what, f"{sum(share <= 1 for share in shares)} of {len(shares)}", cell(max(shares), 2, max(shares) > 1)]
        for what, shares in found.items()
    ]
    return table(["target", "met", "worst, as a share of what is allowed"], body) if body else []


def products(rows: list[dict[str, Any]]) -> list[str]:
    """Microseconds with Hopper's asynchronous products, as they are by default, beside those with mma.sync's."""
    body = []
    for row in rows:
        if "forward mma.sync" not in row:
            continue
        body.append([case_text(row), row["type"], row["layout"]])
        for direction in ("forward", "forward+backward"):
            other, ours = row.get(f"{direction} mma.sync"), row.get(f"{direction} ours")
            body[-1] += [cell(other, 1), cell(ours, 1), cell(ratio(ours, other))]
        of_product = ratio(of_case(rows, row, "cublas"), row.get("forward ours"))
        bad = by_wgmma(row) and not memory_bound(row) and of_product is not None and of_product < WGMMA_PRODUCT
        body[-1].append(cell(of_product, 2, bad))
    each = ["mma.sync", "default", "default / mma.sync"]
    head = ["B,C,H,T,M", "type", "layout", *(f"forward, {e}" for e in each), *(f"with backward, {e}" for e in each)]
    return table([*head, "forward, cuBLAS / default"], body)


PASSES = ("forward", "weight_gradient", "weight_store", "input_gradient", "moments")
"""Kernels with a column of their own in the table of kernels; what starts with none of these is in the last one."""


def kernels(rows: list[dict[str, Any]]) -> list[str]:
    """Each kernel's own microseconds in forward + backward, without and with normalisation."""
    body = []
    for row in rows:
        sums = dict.fromkeys((*PASSES, "rest"), 0.0)
        for name, time in row["kernels_us"].items():
            own = next((one for one in PASSES if re.match(rf"{one}(_wgmma|_plain)?_kernel", name)), "rest")
            sums[own] += time
        norm = "yes" if row["norm"] else "no"
        body.append([case_text(row), row["type"], row["layout"], norm, *(cell(t or None, 1) for t in sums.values())])
    return table(["B,C,H,T,M", "type", "layout", "normalised", *PASSES, "rest"], body)


def memory(rows: list[dict[str, Any]]) -> list[str]:
    """Peak memory of forward and backward in MiB."""
    body = [
        [
            case_text(row),
            row["type"],
            row["layout"],
            *(
                cell(row[key] / 2**20 if row.get(key) is not None else None, 1)
                for key in ("peak_bytes ours", "peak_bytes plain")
            ),
        ]
        for row in rows
    ]
    return table(["B,C,H,T,M", "type", "layout", "ours", "plain"], body)


def report(results: dict[str, Any]) -> str:
    """The whole of it, in Markdown."""
    device = results.get("device", {})
    lines = [f"# gpu-check: {device.get('name', 'no device')}, {results.get('date', '')}", ""]
    if results.get("rehearsal"):
        lines += ["A rehearsal on the CPU: no number here says anything.", ""]
    lines += [str(results.get("versions", results.get("error", ""))), ""]
    lines += [*(f"- {note}" for note in results.get("notes", [])), ""] if results.get("notes") else []
    phases = results.get("phases", {})
    lines += ["```", *(phase_line(name, found) for name, found in phases.items()), "```", ""]
    worst = phases.get("reference", {}).get("worst", {})
    if worst:
        lines += ["## Worst error, of the bound", ""]
        lines += [*table(["result", "error / bound"], [[key, cell(value, 3)] for key, value in worst.items()]), ""]
    rows = phases.get("timings", {}).get("rows", [])
    if rows:
        empty = phases["timings"].get("empty_graph_us")
        lines += [
            f"A graph of one kernel that does nothing takes {cell(empty, 1)} us, which every time below holds.",
            "",
        ]
        lines += ["## Targets", "", *targets(rows), ""]
        for direction in ("forward", "forward+backward"):
            lines += [f"## {direction}: measured beside predicted", "", *predicted(rows, direction), ""]
            lines += [f"## {direction}: beside others, in us", "", *compared(rows, direction), ""]
        lines += ["## With asynchronous products and without (allow_wgmma), in us", "", *products(rows), ""]
        lines += ["## Peak memory, forward + backward, MiB", "", *memory(rows), ""]
    rows = phases.get("kernels", {}).get("rows", [])
    if any(row["kernels_us"] for row in rows):
        lines += ["## Each kernel's own time, us", "", *kernels(rows), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
