"""The report's plots, as SVG text that takes its colours from the page.

matplotlib draws with placeholder colours; ``_finish`` replaces them by the page's CSS variables, so that one drawing
serves the light and the dark page. Text stays text: it can be selected, and it is set in the page's own typeface.

An arm keeps its colour, marker and number through all plots of a study (``styles``). Only the arms that carry the
study's question have a colour; the others are grey and known by their number. Values far outside the others' range
would press everything else together: they stand at the edge, with an arrow and their figure.
"""

from __future__ import annotations

import html
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import require
from .records import Records
from .statistics import PairedDifference, points, summarise, t_interval
from .tables import ArmResult, StudyResult, SweepLine, base_of, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .showcase import Showcase

INK, MUTED, GRID, ACCENT, FAINT = "#010101", "#020202", "#030303", "#040404", "#050505"
#: As many colours as the style sheet has.
ARM_COLOURS = tuple(f"#0a00{number:02x}" for number in range(1, 9))
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    ACCENT: "--accent",
    FAINT: "--faint",
    **{colour: f"--arm-{number}" for number, colour in enumerate(ARM_COLOURS, start=1)},
}
_MARKERS = "osD^vPX*"
#: After the candidate and the control, the arms that get a colour first.
_COLOURED_FIRST = ("cnn-params", "conv1x1", "waves", "redrawn", "cnn", "lbcnn")

#: Drawn for a column of this width in inches, which a phone shows at about its natural size.
WIDTH = 4.4


@dataclass(frozen=True)
class Style:
    """What tells an arm in every plot.

    Attributes:
        number: its place among the arms that are no point of a sweep, from 1.
        colour: a placeholder.
        variable: the style sheet's name for the colour.
        marker: matplotlib's.
        coloured: whether it has a colour of its own.
    """

    number: int
    colour: str
    variable: str
    marker: str
    coloured: bool


def styles(records: Records, result: StudyResult) -> dict[str, Style]:
    """The style of every arm; a point of a sweep has its base's."""
    question = records.study.question
    names = [arm.arm for arm in result.main]
    order = [name for name in (question.candidate, question.control, *_COLOURED_FIRST) if name in names]
    order = list(dict.fromkeys([*order, *names]))[: len(ARM_COLOURS)]
    found = {}
    for number, name in enumerate(names, start=1):
        place = order.index(name) if name in order else -1
        colour = ARM_COLOURS[place] if place >= 0 else FAINT
        # Twice round the markers before one comes back in the same colour.
        marker = _MARKERS[(place if place >= 0 else number) % len(_MARKERS)]
        found[name] = Style(number, colour, _VARIABLES[colour], marker, place >= 0)
    for arm in records.study.arms:
        if arm.group:
            grey = Style(0, FAINT, _VARIABLES[FAINT], "o", False)
            found[arm.name] = found.get(base_of(arm), grey)
    return found


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
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label, quote=True)}"', 1)


def _figure(draw: Callable[[Figure], None], name: str, label: str, height: float, width: float = WIDTH) -> str:
    require("matplotlib", "matplotlib", "the report's plots")
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_settings()):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        return _finish(figure, name, label)


def _window(values: Iterable[float], always: Sequence[float] = ()) -> tuple[float, float]:
    """The range to show.

    Values far outside the others' (beyond Tukey's fences) are left out where all others would otherwise have less than
    half of the room.

    Args:
        values: any number of them.
        always: values that are never left out.

    Example:
        >>> _window([1.0, 2.0, 3.0, 4.0, -50.0], always=[0.0]), _window([1.0, 2.0, 3.0, 4.0, 7.0])
        ((0.0, 4.0), (1.0, 7.0))
    """
    ordered = sorted(values)
    every = [*ordered, *always]
    if not every:
        return 0.0, 1.0
    if len(ordered) >= 4:
        first, third = ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4]
        reach = 1.5 * (third - first)
        near = [value for value in ordered if first - reach <= value <= third + reach] + list(always)
        if max(near) - min(near) < 0.5 * (max(every) - min(every)):
            return min(near), max(near)
    return min(every), max(every)


def _margins(low: float, high: float, share: float = 0.06) -> tuple[float, float]:
    room = share * (high - low) or 0.5
    return low - room, high + room


def _wrapped(text: str, columns: int = 17) -> str:
    # "$" would begin a formula.
    return "\n".join(textwrap.wrap(text, columns) or [text]).replace("$", r"\$")


def _plain(text: str) -> str:
    return text.replace("$", r"\$")


@dataclass(frozen=True)
class _Line:
    """One row of a forest plot: a value of each seed, their mean and its interval."""

    label: str
    marks: tuple[tuple[Sequence[float], Style], ...]
    primary: bool = False


def _forest(axes: Axes, lines: Sequence[_Line], always: Sequence[float]) -> None:
    """Rows of means with 95 % t intervals and pale dots for the seeds, the first row at the top."""
    reach = [end for line in lines for values, _ in line.marks for end in _shown_ends(values)]
    low, high = _window(reach, always)
    axes.set_xlim(*_margins(low, high, 0.05))
    left, right = axes.get_xlim()
    for place, line in enumerate(lines):
        if line.primary:
            axes.axhspan(place - 0.46, place + 0.46, color=ACCENT, alpha=0.12, linewidth=0)
        offsets = (
            [0.0] if len(line.marks) == 1 else [-0.2 + 0.4 * i / (len(line.marks) - 1) for i in range(len(line.marks))]
        )
        for (values, style), offset in zip(line.marks, offsets, strict=True):
            _mark(axes, values, style, place + offset, (left, right), dots=len(line.marks) == 1)
    axes.axvline(0, color=INK, linewidth=1.2)
    axes.set_yticks(range(len(lines)), [_wrapped(line.label) for line in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def _ends(values: Sequence[float]) -> tuple[float, ...]:
    mean = sum(values) / len(values)
    return (mean, mean) if len(values) < 2 else t_interval(values)


def _shown_ends(values: Sequence[float]) -> tuple[float, float]:
    """The range that a plot makes room for: intervals from two or three seeds reach beyond every other thing."""
    return (min(values), max(values)) if len(values) < 4 else t_interval(values)


def _mark(
    axes: Axes, values: Sequence[float], style: Style, place: float, window: tuple[float, float], *, dots: bool
) -> None:
    left, right = window
    mean = sum(values) / len(values)
    if not left <= mean <= right:
        edge, arrow = (left, "←") if mean < left else (right, "→")
        text = f"{arrow} {points(mean, 1)}" if mean < left else f"{points(mean, 1)} {arrow}"
        axes.text(edge, place, text, color=style.colour if style.coloured else MUTED, va="center",
                  ha="left" if mean < left else "right", fontsize=9.5)  # fmt: skip
        return
    seen: dict[float, int] = {}
    for value in values if dots else ():
        seen[value] = seen.get(value, 0) + 1  # one below the other where they coincide
        below = place + 0.2 + 0.07 * (seen[value] - 1)
        axes.plot(value, below, "o", color=style.colour, alpha=0.5, markersize=4, markeredgewidth=0)
    at = place - 0.12 if dots else place
    low, high = _ends(values)
    axes.plot([low, high], [at, at], color=style.colour, linewidth=2.2, solid_capstyle="butt")
    axes.plot(mean, at, style.marker, color=style.colour, markersize=7.5 if dots else 6)


def _pitch(lines: Sequence[_Line]) -> float:
    """Inches for each row."""
    return 0.52 if len(lines) <= 10 else 0.42


def paired_differences(records: Records, result: StudyResult) -> str:
    """Each arm's paired difference to the control: every seed, the mean and its 95 % interval."""
    look = styles(records, result)
    candidate = records.study.question.candidate
    lines = [
        _Line(arm.title, ((arm.difference.values, look[arm.arm]),), arm.arm == candidate)
        for arm in result.main
        if arm.difference is not None and arm.difference.count
    ]
    always = [0.0, *(value for line in lines if line.primary for value in line.marks[0][0])]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _forest(axes, lines, always)
        margin = records.study.question.margin
        if margin > 0:
            axes.axvspan(-margin, margin, color=MUTED, alpha=0.13, linewidth=0)
        control = _plain(title(records.study, records.study.question.control))
        axes.set_xlabel(f"points of {result.metric} above {control}, same seed")

    label = f"Paired differences to the control in points of {result.metric}, with 95 % intervals"
    return _figure(draw, "differences", label, 0.75 + _pitch(lines) * max(1, len(lines)))


def shifted(records: Records, result: StudyResult) -> str:
    """What moving the test images does to each arm: score there - score on the test set, run by run."""
    look = styles(records, result)
    shifts = _shifts(result)
    shades = _shades(len(shifts))
    candidate = records.study.question.candidate
    lines = []
    for arm in result.main:
        marks = []
        for shift, shade in zip(shifts, shades, strict=True):
            values = list(arm.shifted.get(shift, {}).values())
            style = look[arm.arm]
            if values:
                marks.append((values, Style(style.number, style.colour, style.variable, shade, style.coloured)))
        if marks:
            lines.append(_Line(arm.title, tuple(marks), arm.arm == candidate))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _forest(axes, lines, [0.0])
        axes.set_xlabel(f"points of {result.metric}, moved − unmoved images")
        if len(shifts) > 1:
            from matplotlib.lines import Line2D

            handles = [
                Line2D([], [], color=MUTED, marker=shade, linestyle="", label=f"{shift} pixel{'s' * (shift != '1')}")
                for shift, shade in zip(shifts, shades, strict=True)
            ]
            figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))

    label = f"What moving the test images does to the {result.metric} of each arm"
    return _figure(draw, "shifted", label, 0.85 + _pitch(lines) * max(1, len(lines)))


def _shifts(result: StudyResult) -> list[str]:
    return sorted({shift for arm in result.main for shift in arm.shifted}, key=lambda text: (len(text), text))


def _shades(count: int) -> list[str]:
    return [_MARKERS[index % len(_MARKERS)] for index in range(count)]


@dataclass(frozen=True)
class Cost:
    """One of the costs that scores are drawn against.

    Attributes:
        name: of the axis.
        values: arm -> cost.
    """

    name: str
    values: Mapping[str, float]


def costs(result: StudyResult) -> list[Cost]:
    """The costs that at least one arm has."""
    found = [
        Cost("learnable parameters", {a.arm: float(a.parameters) for a in result.main if a.parameters}),
        Cost("multiply-adds", {a.arm: float(a.macs) for a in result.main if a.macs}),
        Cost("seconds per epoch", {a.arm: a.seconds_per_epoch for a in result.main if a.seconds_per_epoch}),
        Cost("peak memory, MiB", {a.arm: a.memory_bytes / 2**20 for a in result.main if a.memory_bytes}),
    ]
    return [cost for cost in found if cost.values]


def accuracy_against_costs(records: Records, result: StudyResult) -> str:
    """Mean score with its standard deviation against parameters, multiply-adds, time and memory."""
    look = styles(records, result)
    drawn = costs(result)
    arms = {arm.arm: arm for arm in result.main if arm.accuracy.count}
    question = records.study.question
    means = {name: 100 * arm.accuracy.mean for name, arm in arms.items()}
    best = max(means, key=lambda name: means[name], default="")
    low, high = _window(
        means.values(), [means[name] for name in (question.candidate, question.control, best) if name in means]
    )
    ends = [end for arm in arms.values() if low <= 100 * arm.accuracy.mean <= high for end in _spread(arm)]
    low, high = min([low, *ends]), max([high, *ends])

    def draw(figure: Figure) -> None:
        rows = -(-len(drawn) // 2)
        grid = figure.subplots(rows, 2, squeeze=False, sharey=True)
        bottom, top = _margins(low, high, 0.06)
        for place, axes in enumerate(grid.flat):
            if place >= len(drawn):
                axes.set_visible(False)
                continue
            axes.set_ylim(bottom, top)
            _cost_axis(axes, drawn[place])
            if place % 2 == 0:
                axes.set_ylabel(f"{result.metric}, %")
        figure.draw_without_rendering()  # so that numbers can be placed on the page
        for axes, cost in zip(grid.flat, drawn, strict=False):
            _cost_points(axes, cost, arms, look, (bottom, top))

    label = f"{result.metric} against {', '.join(cost.name for cost in drawn)}"
    return _figure(draw, "costs", label, 2.35 * -(-len(drawn) // 2))


def _spread(arm: ArmResult) -> tuple[float, float]:
    """Mean - and + standard deviation, in per cent."""
    reach = 100 * arm.accuracy.deviation if arm.accuracy.count > 1 else 0.0
    return 100 * arm.accuracy.mean - reach, 100 * arm.accuracy.mean + reach


def _cost_axis(axes: Axes, cost: Cost) -> None:
    lowest, highest = min(cost.values.values()), max(cost.values.values())
    axes.set_xscale("log")
    room = max(1.12, (highest / lowest) ** 0.12)
    axes.set_xlim(lowest / room, highest * room)
    _plain_log_ticks(axes)
    axes.set_xlabel(cost.name)


def _cost_points(
    axes: Axes,
    cost: Cost,
    arms: Mapping[str, ArmResult],
    look: Mapping[str, Style],
    window: tuple[float, float],
) -> None:
    bottom, top = window
    places: list[tuple[float, float]] = []
    drawn = []
    # The coloured ones last: they lie above the grey ones.
    for name in sorted(arms, key=lambda name: look[name].coloured):
        if name not in cost.values:
            continue
        arm, style = arms[name], look[name]
        value = 100 * arm.accuracy.mean
        shown = min(max(value, bottom), top)
        inside = shown == value
        spread = 100 * arm.accuracy.deviation if arm.accuracy.count > 1 and inside else 0.0
        axes.errorbar(cost.values[name], shown, yerr=spread or None, fmt=style.marker if inside else "v",
                      color=style.colour, markersize=5.5, capsize=0, elinewidth=1.2, clip_on=False)  # fmt: skip
        drawn.append((name, shown))
        x, y = axes.transData.transform((cost.values[name], shown))
        places.append((float(x), float(y)))
    taken = list(places)
    for (name, shown), (x, y) in zip(drawn, places, strict=True):
        style = look[name]
        dx, dy = _free(x, y, taken)
        taken.append((x + dx, y + dy))
        axes.annotate(str(style.number), (cost.values[name], shown), (dx, dy), textcoords="offset pixels",
                      ha="center", va="center", fontsize=8.5,
                      color=style.colour if style.coloured else MUTED)  # fmt: skip


def _free(x: float, y: float, taken: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The offset in pixels at which a number is farthest from what is drawn already."""
    best, most = (10.0, 0.0), -1.0
    for radius in (10.0, 15.0):
        for step in range(8):
            angle = math.pi * step / 4
            dx, dy = radius * math.cos(angle), radius * math.sin(angle)
            room = min((math.hypot(x + dx - a, 1.2 * (y + dy - b)) for a, b in taken if (a, b) != (x, y)), default=99.0)
            room = min(room, 12.0) - 0.1 * radius
            if room > most + 0.01:
                best, most = (dx, dy), room
    return best


def _plain_log_ticks(axes: Axes) -> None:
    """Few round ticks in words that need no exponent: 5k, 2M."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = axes.get_xlim()
    for bases in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(1 + i / 5 for i in range(45))):
        ticks = [base * 10.0**power for power in range(-4, 14) for base in bases if low <= base * 10.0**power <= high]
        if len(ticks) >= 2:
            break
    if len(ticks) > 4:
        ticks = ticks[:: -(-len(ticks) // 4)]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def short(value: float) -> str:
    """A number for a tick.

    Example:
        >>> short(0.5), short(20), short(1500), short(2e6), short(3e9)
        ('0.5', '20', '1.5k', '2M', '3G')
    """
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def _curves(records: Records) -> dict[str, dict[int, list[float]]]:
    """Arm -> epoch -> scores of the finished runs, in per cent."""
    found: dict[str, dict[int, list[float]]] = {}
    finished = {(row["arm"], row["seed"]) for row in records.results if row["status"] == "finished"}
    for row in records.epochs:
        score = row.get("test_score", row.get("test_accuracy"))
        if score is not None and (row["arm"], row["seed"]) in finished:
            found.setdefault(row["arm"], {}).setdefault(row["epoch"], []).append(100 * score)
    return found


def learning_curves(records: Records, result: StudyResult) -> str:
    """The score after each epoch: mean over seeds, with the 95 % t interval of the coloured arms as a band."""
    look, curves = styles(records, result), _curves(records)
    order = sorted((arm.arm for arm in result.main if arm.arm in curves), key=lambda arm: look[arm].coloured)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        settled, highest = [], 0.0
        ends: list[tuple[str, int, float]] = []
        for arm in order:
            style = look[arm]
            epochs = sorted(curves[arm])
            values = [curves[arm][epoch] for epoch in epochs]
            means = [sum(v) / len(v) for v in values]
            if style.coloured and min(map(len, values)) >= 3:
                bands = [t_interval(v) for v in values]
                axes.fill_between(epochs, [b[0] for b in bands], [b[1] for b in bands], color=style.colour,
                                  alpha=0.18, linewidth=0)  # fmt: skip
            axes.plot(epochs, means, color=style.colour, linewidth=1.8 if style.coloured else 0.9,
                      marker=style.marker if len(epochs) <= 12 and style.coloured else "", markersize=4)  # fmt: skip
            settled.append(min(means[len(means) // 4 :]))
            ends.append((arm, epochs[-1], means[-1]))
            highest = max(highest, *means)
        # The first epochs, and arms far below, would press everything else against the upper edge.
        low, _ = _window(settled)
        axes.set_ylim(max(0.0, low - 0.08 * (highest - low) - 0.5), min(100.3, highest + 0.06 * (highest - low) + 0.3))
        last = max(records.study.schedule.epochs, 1)
        axes.set_xlim(1, max(2, last))
        axes.set_xticks(_epoch_ticks(last))
        axes.set_xlabel("epoch")
        axes.set_ylabel(f"{result.metric}, %")
        _end_numbers(axes, [end for end in ends if end[2] >= axes.get_ylim()[0]], look)

    return _figure(draw, "curves", f"{result.metric} on the test set after each epoch", 3.6)


def _end_numbers(axes: Axes, ends: Sequence[tuple[str, int, float]], look: Mapping[str, Style]) -> None:
    """Each arm's number at the end of its curve, moved up or down where numbers would cover each other."""
    low, high = axes.get_ylim()
    places = _apart([end for _, _, end in ends], gap=0.042 * (high - low))
    for (arm, epoch, _), place in zip(ends, places, strict=True):
        style = look[arm]
        axes.annotate(str(style.number), (epoch, place), (6, 0), textcoords="offset points", va="center", fontsize=8,
                      color=style.colour if style.coloured else MUTED, annotation_clip=False)  # fmt: skip


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
            (left, below), (right, above) = crowds[-2:]
            if above - below >= gap * (len(left) + len(right)) / 2:
                break
            members = left + right
            crowds[-2:] = [(members, sum(values[j] for j in members) / len(members))]
    placed = list(values)
    for members, middle in crowds:
        for position, i in enumerate(members):
            placed[i] = middle + gap * (position - (len(members) - 1) / 2)
    return placed


def _epoch_ticks(last: int) -> list[int]:
    """Few ticks that hold the first epoch and the last.

    Example:
        >>> _epoch_ticks(3), _epoch_ticks(12), _epoch_ticks(300)
        ([1, 2, 3], [1, 5, 10, 12], [1, 100, 200, 300])
    """
    if last <= 8:
        return list(range(1, last + 1))
    step = next(size * 10**power for power in range(6) for size in (1, 2, 5) if last / (size * 10**power) <= 4)
    ticks = [1, *range(step, last + 1, step)]
    return ticks if last - ticks[-1] < step / 3 and ticks[-1] == last else [*ticks, last]


def sweep(records: Records, result: StudyResult, lines: Sequence[SweepLine], name: str) -> str:
    """The score against one setting: means with 95 % t intervals, on a logarithmic axis, or as rows for words."""
    look = styles(records, result)
    control = result.find(records.study.question.control)
    numeric = all(line.numeric for line in lines)
    arms = [*(arm for line in lines for _, arm in line.points), *([control] if control is not None else [])]
    reach = [100 * end for arm in arms if arm.accuracy.count for end in _shown_ends(_scores(records, arm))]
    shown = (min(reach), max(reach)) if reach else (0.0, 1.0)

    def style_of(line: SweepLine) -> Style:
        return look[line.points[0][1].arm]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        if numeric:
            for line in lines:
                style = style_of(line)
                at = [(float(value), arm) for value, arm in line.points if arm.accuracy.count]
                _errors(axes, [x for x, _ in at], [arm for _, arm in at], style, line.title, records)
            axes.set_xscale("log")
            _value_ticks(axes, sorted({float(value) for line in lines for value, _ in line.points}))
            axes.set_xlabel(lines[0].setting)
            axes.set_ylabel(f"{result.metric}, %")
            axes.set_ylim(*_margins(*shown))
        else:
            rows = [(line, value, arm) for line in lines for value, arm in line.points if arm.accuracy.count]
            for place, (line, _, arm) in enumerate(rows):
                low, high = _score_interval(records, arm)
                style = style_of(line)
                axes.plot([low, high], [place, place], color=style.colour, linewidth=2.2, solid_capstyle="butt")
                axes.plot(100 * arm.accuracy.mean, place, style.marker, color=style.colour, markersize=7)
            several = len(lines) > 1
            labels = [f"{line.title}: {value}" if several else str(value) for line, value, _ in rows]
            axes.set_yticks(range(len(rows)), [_wrapped(label, 20) for label in labels])
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
            axes.set_xlabel(f"{result.metric}, %")
            axes.set_xlim(*_margins(*shown))
        if control is not None and control.accuracy.count:
            mark = axes.axhline if numeric else axes.axvline
            mark(100 * control.accuracy.mean, color=look[control.arm].colour, linewidth=1.3, linestyle=(0, (4, 3)),
                 label=_plain(control.title))  # fmt: skip
        figure.legend(loc="outside lower center", ncols=3, handlelength=1.6, columnspacing=1.2)

    height = 3.5 if numeric else 0.95 + 0.4 * max(1, sum(len(line.points) for line in lines))
    return _figure(draw, name, f"{result.metric} against {lines[0].setting}, with 95 % intervals", height)


def _scores(records: Records, arm: ArmResult) -> list[float]:
    return list(records.scores(arm.arm).values())


def _score_interval(records: Records, arm: ArmResult) -> tuple[float, float]:
    values = [100 * score for score in _scores(records, arm)]
    return (values[0], values[0]) if len(values) == 1 else t_interval(values)


def _errors(
    axes: Axes, places: Sequence[float], arms: Sequence[ArmResult], style: Style, label: str, records: Records
) -> None:
    means = [100 * arm.accuracy.mean for arm in arms]
    ends = [_score_interval(records, arm) for arm in arms]
    below = [mean - low for mean, (low, _) in zip(means, ends, strict=True)]
    above = [high - mean for mean, (_, high) in zip(means, ends, strict=True)]
    axes.errorbar(places, means, yerr=[below, above], fmt=f"{style.marker}-", color=style.colour, markersize=5,
                  linewidth=1.4, elinewidth=1.6, label=_plain(label))  # fmt: skip


def _value_ticks(axes: Axes, values: Sequence[float]) -> None:
    """A tick at each value, as far as they have room."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = values[0], values[-1]
    room = (high / low) ** 0.06 if high > low else 2.0
    axes.set_xlim(low / room, high * room)
    kept: list[float] = []
    for value in values:
        if not kept or math.log(value / kept[-1]) > 0.07 * math.log(high / low):
            kept.append(value)
    axes.xaxis.set_major_locator(FixedLocator(kept))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def masks(showcase: Showcase) -> str:
    """What the first perturbation layer does to one image: input, mask, response map, and what the mask changed."""

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(showcase.rows), 4, squeeze=False)
        heads = ("input", "mask × level", "response", "change")
        small = max(float(row.mask.abs().max()) for row in showcase.rows)
        large = max(float(picture.abs().max()) for row in showcase.rows for picture in (row.input, row.response))
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
            axes_row[0].set_ylabel(_wrapped(row.title, 13), fontsize=9)

    label = "Masks and response maps of the first perturbation layer"
    return _figure(draw, "masks", label, 0.35 + 1.08 * len(showcase.rows))


def studies_side_by_side(
    names: Sequence[str], arms: Sequence[tuple[str, Sequence[PairedDifference | None]]], control: str
) -> str:
    """The paired differences to each study's control, arm by arm.

    Args:
        names: of the studies.
        arms: title -> its difference in each study; None where the study lacks it.
        control: the control's title.
    """
    look = [
        Style(number + 1, ARM_COLOURS[(0, 2, 4, 3, 5, 6, 7, 1)[number % 8]], "", _MARKERS[number % 8], True)
        for number in range(len(names))
    ]
    lines = []
    for arm, differences in arms:
        marks = [
            (difference.values, look[study])
            for study, difference in enumerate(differences)
            if difference is not None and difference.count
        ]
        if marks:
            lines.append(_Line(arm, tuple(marks)))

    def draw(figure: Figure) -> None:
        from matplotlib.lines import Line2D

        axes = figure.subplots()
        _forest(axes, lines, [0.0])
        axes.set_xlabel(f"points above {_plain(control)}, same seed")
        handles = [
            Line2D([], [], color=style.colour, marker=style.marker, linewidth=2, label=_plain(name))
            for name, style in zip(names, look, strict=True)
        ]
        figure.legend(handles=handles, loc="outside lower left", ncols=1)

    pitch = 0.3 + 0.16 * len(names)
    height = 0.8 + pitch * max(1, len(lines)) + 0.24 * len(names)
    return _figure(draw, "studies", "Paired differences to the control, study by study", height)


def mean_curve_note(records: Records) -> str:
    """What the band of ``learning_curves`` is, for its caption."""
    counts = [summarise(values).count for epochs in _curves(records).values() for values in epochs.values()]
    if counts and min(counts) >= 3:
        return "Mean over seeds; the bands of the coloured arms are 95 % t intervals of the mean."
    return "Mean over seeds; bands, where an arm has three seeds or more, are 95 % t intervals of the mean."
