"""What becomes of measured lines: text, Markdown, records for JSON, the plot, and the figures in the documentation."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from contestants import MM
from rows import ROWS, Line, Measured, slug

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def mark(met: bool | None, value: float, target: float | None) -> str:
    """The verdict on a line: "met" outright, "met by interval" where only the lower end is below the target."""
    if met is None or target is None:
        return ""
    return "MISSED" if not met else "met" if value <= target else "met by interval"


def command(parsed: argparse.Namespace) -> str:
    """The command that makes such a run."""
    options = ["--quick"] if parsed.quick else []
    options += [f"--case {str(case).strip('()')}" for case in parsed.case]
    options += [f"--row {row}" for row in parsed.row or []]
    options += [f"--{name} {getattr(parsed, name)}" for name in ("threads", "rounds") if getattr(parsed, name)]
    return f"make bench ARGS='{' '.join(options)}'" if options else "make bench"


def line_text(line: Line) -> str:
    """One line for the terminal."""
    target = "" if line.target is None else (f"≤ {line.target:g}" if not line.unit else f"≤ {line.target:,.0f}")
    verdict = mark(line.met, line.value.value, line.target)
    return f"  {line.what:<44} {line.case:<20} {line.text:<24} {target:<14} {verdict:<15} {line.note}".rstrip()


def ceilings_text(measured: Measured) -> str:
    """A case's ceilings for the terminal."""
    record = case_record(measured)
    return (
        f"{record['case']:<20} 1024^3 product {record['mm_gflops']:.0f} GFLOP/s, "
        f"copy {record['copy_gbytes']:.1f} GB/s, floor {1e3 * record['floor_seconds']:.3f} ms "
        f"({record['bound_by']}), {record['rounds']} rounds"
    )


def case_record(measured: Measured) -> dict[str, Any]:
    """One case as results.json holds it: sizes, ceilings of the same run, every round's seconds."""
    case, times = measured.case, measured.times
    mm, copy = times.median("mm"), times.median("copy")
    return {
        "case": str(case),
        "odd": measured.odd,
        "flops": case.flops,
        "bytes": case.moved,
        "mm_gflops": 2 * MM**3 / mm / 1e9,
        "copy_gbytes": case.moved / copy / 1e9,
        "floor_seconds": max(case.flops / (2 * MM**3) * mm, copy),
        "bound_by": "product" if measured.compute_bound else "memory",
        "rounds": len(times.seconds["mm"]),
        "median_seconds": {name: times.median(name) for name in times.seconds},
        "seconds": times.seconds,
    }


def line_record(line: Line) -> dict[str, Any]:
    """One line as results.json holds it."""
    return {
        "row": line.row,
        "what": line.what,
        "case": line.case,
        "value": line.value.value,
        "low": line.value.low,
        "high": line.value.high,
        "unit": line.unit or "ratio",
        "target": line.target,
        "met": line.met,
        "note": line.note,
        "text": line.text,
    }


def verdict(results: dict[str, Any]) -> str:
    """How many targets were met, row by row."""
    out = []
    for name in ROWS:
        judged = [line for line in results["lines"] if line["row"] == name and line["target"] is not None]
        met = sum(line["met"] for line in judged)
        outright = sum(line["value"] <= line["target"] for line in judged)
        if judged:
            state = "met" if met == len(judged) else f"{len(judged) - met} of {len(judged)} MISSED"
            state += f", {met - outright} by the interval's lower end alone" if met > outright else ""
            out.append(f"{name:<18} {state}")
    total = [line for line in results["lines"] if line["target"] is not None]
    out.append(f"{sum(line['met'] for line in total)} of {len(total)} targets met, in {results['seconds']:.0f} s")
    return "\n".join(out)


def markdown(results: dict[str, Any]) -> str:
    """The whole run as a page of Markdown."""
    about = results["machine"]
    out = [
        f"# {about['processor']}, {about['threads']} threads, {results['date']}",
        "",
        f"`{results['command']}`: {about['isa']} kernels, PyTorch {about['torch']}, torch-pnn {about['torch_pnn']}, "
        f"{about['system']}. Load before the run {results['load_before']:.1f}; {results['seconds']:.0f} s.",
        "",
        "Ratios of medians with 95 % intervals; a target is met when the interval's lower end is at or below it.",
        "",
    ]
    if results["cases"]:
        out += ["## Ceilings of the same run", "", *ceilings_table(results), ""]
    for name, row in ROWS.items():
        lines = [line for line in results["lines"] if line["row"] == name]
        if not lines:
            continue
        out += [f"## {row.title[0].upper()}{row.title[1:]}", "", f"Target: {row.target}.", ""]
        out += ["| what | case | value | target | | |", "| --- | --- | --- | --- | --- | --- |"]
        for line in lines:
            target = "" if line["target"] is None else f"{line['target']:,g}" if line["unit"] == "ratio" else ""
            if line["target"] is not None and line["unit"] != "ratio":
                target = f"{line['target']:,.0f}"
            verdict_text = mark(line["met"], line["value"], line["target"])
            cells = (line["what"], line["case"], line["text"], target, verdict_text, line["note"])
            out.append("| " + " | ".join(cells) + " |")
        out.append("")
    out += ["## Verdict", "", "```", verdict(results), "```", ""]
    return "\n".join(out)


def ceilings_table(results: dict[str, Any]) -> list[str]:
    """The cases' ceilings and floors as a Markdown table."""
    out = [
        "| case | Gflop | MB of x and y | flop/byte | product GFLOP/s | copy GB/s | floor ms | bound by |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in results["cases"]:
        out.append(
            f"| {case['case']} | {case['flops'] / 1e9:.3f} | {case['bytes'] / 1e6:.1f} | "
            f"{case['flops'] / case['bytes']:.0f} | {case['mm_gflops']:.0f} | {case['copy_gbytes']:.1f} | "
            f"{1e3 * case['floor_seconds']:.3f} | {case['bound_by']} |"
        )
    return out


def rates_table(results: dict[str, Any]) -> list[str]:
    """What the operator reaches: GFLOP/s forward and forward + backward, in each layout, as a Markdown table."""
    out = [
        "| case | forward, contiguous | forward, channels_last | training, contiguous | training, channels_last |",
        "| --- | --- | --- | --- | --- |",
    ]
    for case in results["cases"]:
        cells = []
        for which, factor in (("forward", 1), ("training", 3)):
            for layout in ("contiguous", "channels_last"):
                seconds = case["median_seconds"].get(f"{which}, ours, {layout}")
                rate = "" if seconds is None else f"{factor * case['flops'] / seconds / 1e9:.0f} GFLOP/s"
                if seconds is not None and which == "forward":
                    rate += f" ({seconds / case['floor_seconds']:.2f} × floor)"
                cells.append(rate)
        out.append(f"| {case['case']} | " + " | ".join(cells) + " |")
    return out


def plot(results: dict[str, Any], folder: Path) -> bool:
    """Draws every ratio with its interval and target into ratios.png and ratios.svg.

    Returns:
        False where matplotlib is missing or there is no ratio; then nothing is drawn.
    """
    lines = [line for line in results["lines"] if line["unit"] == "ratio"]
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no plot (pip install -r requirements/run.txt)")
        return False
    if not lines:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in ROWS if any(line["row"] == name for line in lines)]
    counts = [sum(line["row"] == name for line in lines) for name in names]
    figure, axes = plt.subplots(
        len(names), 1, figsize=(11, 0.2 * sum(counts) + 1.1 * len(names)), height_ratios=counts, squeeze=False
    )
    for name, ax in zip(names, axes[:, 0], strict=True):
        chosen = [line for line in lines if line["row"] == name]
        for y, line in enumerate(chosen):
            color = {True: "tab:green", False: "tab:red", None: "tab:gray"}[line["met"]]
            ax.plot([line["low"], line["high"]], [y, y], color=color, linewidth=3, alpha=0.5, solid_capstyle="butt")
            ax.plot(line["value"], y, "o", color=color, markersize=4)
            if line["target"] is not None:
                ax.plot([line["target"]] * 2, [y - 0.4, y + 0.4], color="black", linewidth=1.2)
        ax.set_yticks(range(len(chosen)), [f"{line['what']}  {line['case']}" for line in chosen], fontsize=6)
        ax.set_ylim(len(chosen) - 0.4, -0.6)
        ax.set_xlim(left=0)
        ax.tick_params(axis="x", labelsize=7)
        ax.grid(axis="x", alpha=0.3)
        ax.set_title(f"{ROWS[name].title}   [{ROWS[name].target}]", fontsize=8, loc="left")
    about = results["machine"]
    figure.suptitle(
        f"{about['processor']}, {about['threads']} threads, {about['isa']}, PyTorch {about['torch']}, "
        f"{results['date']}\n"
        "ratios of medians, 95 % intervals; black: target; green: met, red: missed, grey: for information",
        fontsize=9,
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.6 / figure.get_size_inches()[1]))
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"ratios.{suffix}", dpi=110)
    plt.close(figure)
    return True


def figures_block(results: dict[str, Any]) -> str:
    """The part of docs/kernels.md that a run fills in."""
    about = results["machine"]
    head = (
        f"{results['date']}, {about['processor']}, {about['threads']} threads, {about['isa']}, "
        f"PyTorch {about['torch']}: `{results['command']}`"
    )
    parts = [BEGIN, "", head, "", *ceilings_table(results), "", *rates_table(results), "", "```", verdict(results)]
    return "\n".join([*parts, "```", "", END])


def record(results: dict[str, Any], root: Path) -> list[Path]:
    """Writes the run's page into benchmarks/results/ and its figures into docs/kernels.md.

    Returns:
        The files that were written, relative to the root.

    Raises:
        OSError: one can't be written, or the document has no place for figures.
    """
    about = results["machine"]
    page = root / "benchmarks" / "results" / f"{results['date']}-{slug(about['processor'])}-{about['threads']}t.md"
    document = root / "docs" / "kernels.md"
    text = document.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise OSError(0, f"it has no lines {BEGIN} and {END}", str(document))
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(markdown(results), encoding="utf-8")
    document.write_text(before + figures_block(results) + after, encoding="utf-8")
    return [page.relative_to(root), document.relative_to(root)]
