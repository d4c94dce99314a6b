"""The report's plots, as SVG text that takes its colours from the page.

matplotlib draws with placeholder colours; ``_finish`` replaces them by the page's CSS variables, so that one drawing
serves the light and the dark page. Text stays text: it can be selected, and it is set in the page's own typeface.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .errors import require
from .records import Records
from .showcase import Showcase
from .tables import StudyResult, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, ACCENT = "#010101", "#020202", "#030303", "#040404"
#: As many colours as the style sheet has; further arms begin again.
ARM_COLOURS = tuple(f"#0a00{number:02x}" for number in range(1, 9))
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    ACCENT: "--accent",
    **{colour: f"--arm-{number}" for number, colour in enumerate(ARM_COLOURS, start=1)},
}
_MARKERS = "osD^vPX*"

#: Drawn for a column of this width in inches, which a phone shows at about its natural size.
WIDTH = 4.4


def _settings() -> Any:
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "torch-pnn",
        "font.family": "sans-serif",
        "font.size": 10.5,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": MUTED,
        "axes.facecolor": "none",
        "axes.grid": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "figure.facecolor": "none",
        "legend.frameon": False,
        "axes.unicode_minus": True,
        "image.interpolation": "nearest",
    }


def _finish(figure: Figure, name: str, label: str) -> str:
    """An SVG element for the page: no prologue, ids of its own, colours from the page, a text for screen readers."""
    buffer = io.StringIO()
    figure.savefig(
        buffer,
        format="svg",
        transparent=True,
        metadata={"Date": None, "Creator": None},
        bbox_inches="tight",
        pad_inches=0.04,
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Only ids that something refers to are kept, and none is another plot's.
    needed = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text))
    kept = {first or second for first, second in needed}
    text = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in kept else "", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    # The size follows the page; the view box keeps the proportions.
    text = re.sub(r'^(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'^(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _figure(draw: Callable[[Figure], None], name: str, label: str, height: float) -> str:
    require("matplotlib", "matplotlib", "the report's plots")
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_settings()):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        return _finish(figure, name, label)


def _style(records: Records, arm: str) -> tuple[str, str]:
    number = records.study.arm_names.index(arm)
    return ARM_COLOURS[number % len(ARM_COLOURS)], _MARKERS[number % len(_MARKERS)]


def paired_differences(records: Records, result: StudyResult) -> str:
    """Each arm's paired difference to the control: every seed, the mean and its 95 % interval."""
    shown = [arm for arm in result.arms if arm.difference is not None and arm.difference.count > 0]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for line, arm in enumerate(reversed(shown)):
            paired = arm.difference
            assert paired is not None
            colour, marker = _style(records, arm.arm)
            primary = arm.arm == records.study.question.candidate
            if primary:
                axes.axhspan(line - 0.42, line + 0.42, color=ACCENT, alpha=0.12, linewidth=0)
            # Seeds a little below the mean, shifted where they coincide.
            seen: dict[float, int] = {}
            for value in paired.values:
                seen[value] = seen.get(value, 0) + 1
                axes.plot(
                    value,
                    line - 0.16 - 0.075 * (seen[value] - 1),
                    "o",
                    color=colour,
                    alpha=0.45,
                    markersize=4,
                    markeredgewidth=0,
                )
            if paired.count > 1:
                axes.plot(
                    [paired.low, paired.high], [line + 0.16] * 2, color=colour, linewidth=2.4, solid_capstyle="butt"
                )
            axes.plot(paired.mean, line + 0.16, marker, color=colour, markersize=8)
        axes.axvline(0, color=INK, linewidth=1.2)
        axes.set_yticks(range(len(shown)), [arm.title for arm in reversed(shown)])
        axes.set_ylim(-0.6, len(shown) - 0.4)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"points of accuracy above {title(records.study, records.study.question.control)}, same seed")
        axes.tick_params(axis="y", length=0)

    return _figure(draw, "differences", "Paired differences to the control", 1.1 + 0.52 * max(1, len(shown)))


def accuracy_against_parameters(records: Records, result: StudyResult) -> str:
    """Mean accuracy over seeds against the number of learnable parameters, with the standard deviation."""
    shown = [(arm, arm.parameters) for arm in result.arms if arm.accuracy.count and arm.parameters]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        places = _apart([math.log10(parameters) for _, parameters in shown], gap=0.05)
        for (arm, _), place in zip(shown, places, strict=True):
            colour, marker = _style(records, arm.arm)
            spread = 0.0 if arm.accuracy.count < 2 else 100 * arm.accuracy.deviation
            axes.errorbar(
                10**place,
                100 * arm.accuracy.mean,
                yerr=spread,
                fmt=marker,
                color=colour,
                markersize=7,
                capsize=3,
                label=arm.title,
            )
        axes.set_xscale("log")
        low, high = min(number for _, number in shown), max(number for _, number in shown)
        axes.set_xlim(low / 1.6, high * 1.6)
        _plain_log_ticks(axes)
        axes.set_xlabel("learnable parameters")
        axes.set_ylabel("test accuracy, %")
        axes.legend(loc="upper center", bbox_to_anchor=(0.46, -0.2), ncols=3, columnspacing=1.2, handletextpad=0.3)

    return _figure(draw, "parameters", "Accuracy against learnable parameters", 3.6)


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """Moves values that are nearer than ``gap`` apart, each crowd about its own middle; the order stays.

    Example:
        >>> [round(value, 6) for value in _apart([1.0, 3.0, 1.0], gap=0.5)]
        [0.75, 3.0, 1.25]
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    crowds: list[tuple[list[int], float]] = []  # members, middle
    for i in order:
        crowds.append(([i], values[i]))
        while len(crowds) > 1:
            (left, low), (right, high) = crowds[-2:]
            if high - low >= gap * (len(left) + len(right)) / 2:
                break
            members = left + right
            crowds[-2:] = [(members, sum(values[j] for j in members) / len(members))]
    placed = list(values)
    for members, middle in crowds:
        for position, i in enumerate(members):
            placed[i] = middle + gap * (position - (len(members) - 1) / 2)
    return placed


def _plain_log_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = axes.get_xlim()
    ticks = [base * 10**power for power in range(9) for base in (1, 2, 5) if low <= base * 10**power <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def learning_curves(records: Records, result: StudyResult) -> str:
    """Test accuracy after each epoch: mean over seeds, band from the lowest to the highest seed."""
    curves: dict[str, dict[int, list[float]]] = {}
    finished = {(row["arm"], row["seed"]) for row in records.results if row["status"] == "finished"}
    for row in records.epochs:
        if (row["arm"], row["seed"]) in finished:
            curves.setdefault(row["arm"], {}).setdefault(row["epoch"], []).append(100 * row["test_accuracy"])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        settled = 100.0
        for arm in result.arms:
            if arm.arm not in curves:
                continue
            colour, _ = _style(records, arm.arm)
            epochs = sorted(curves[arm.arm])
            values = [curves[arm.arm][epoch] for epoch in epochs]
            axes.fill_between(
                epochs, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, linewidth=0
            )
            means = [sum(v) / len(v) for v in values]
            axes.plot(epochs, means, color=colour, linewidth=1.8, label=arm.title)
            settled = min(settled, means[len(means) // 4])
        # The first epochs would press everything else against the upper edge.
        axes.set_ylim(max(0.0, settled - 3), 100.3)
        last = records.study.schedule.epochs
        axes.set_xlim(1, max(2, last))
        axes.set_xticks(sorted({1, *range(5, last + 1, 5), last} if last > 8 else range(1, last + 1)))
        axes.set_xlabel("epoch")
        axes.set_ylabel("test accuracy, %")
        axes.legend(loc="upper center", bbox_to_anchor=(0.46, -0.2), ncols=3, columnspacing=1.2, handlelength=1.4)

    return _figure(draw, "curves", "Test accuracy after each epoch", 3.6)


def masks(showcase: Showcase) -> str:
    """What the first perturbation layer does to one image: input, mask, response map, and what the mask changed."""

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(showcase.rows), 4, squeeze=False)
        heads = ("input channel", "mask × level", "response map", "change")
        small = max(float(row.mask.abs().max()) for row in showcase.rows)
        large = max(float(torch.cat([row.input, row.response]).abs().max()) for row in showcase.rows)
        for line, (axes_row, row) in enumerate(zip(grid, showcase.rows, strict=True)):
            pictures = ((row.input, large), (row.mask, small), (row.response, large), (row.change, small))
            for column, (axes, (picture, limit)) in enumerate(zip(axes_row, pictures, strict=True)):
                limit = max(limit, 1e-6)
                axes.imshow(picture.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
                axes.set_xticks([])
                axes.set_yticks([])
                axes.grid(visible=False)
                for spine in axes.spines.values():
                    spine.set_visible(True)
                if line == 0:
                    axes.set_title(heads[column], fontsize=10)
            axes_row[0].set_ylabel(row.title, fontsize=10)

    label = "Masks and response maps of the first perturbation layer"
    return _figure(draw, "masks", label, 0.35 + 1.08 * len(showcase.rows))
