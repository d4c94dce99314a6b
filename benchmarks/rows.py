"""The rows of the results table: for each, the target, the cases it holds for, and how it follows from the timings.

`ROWS` is the list; a new row is one function and one entry in it. Every function returns lines; a line with a target is
met when the lower end of its 95 % interval is at or below it, one without is for information.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contestants import (
    LAYOUTS,
    LEVEL,
    MM,
    Case,
    Layer,
    compiled_networks,
    empty_operator,
    kept_bytes,
    networks,
    parse_case,
    peak_bytes,
    plain_layer,
)
from timing import Contestant, Effort, Ratio, Times, alternate, compare, geometric_mean

from torch_pnn import _library, functional

# B, C, H = W, T, M: the four stages of a residual network, larger batches, many masks.
CASES = tuple(
    map(
        parse_case,
        (
            "32,64,56,64,1",
            "32,128,28,128,1",
            "32,256,14,256,1",
            "32,512,7,512,1",
            "128,64,32,64,1",
            "128,128,16,128,1",
            "8,64,32,64,16",
            "4,64,32,64,64",
        ),
    )
)
ODD_CASES = tuple(map(parse_case, ("8,3,57,100,1", "8,17,13,100,1", "32,100,7,17,1")))
"""Sizes that fit no tile: judged one by one, and left out of the geometric means."""
SMALL_CASE = parse_case("1,16,8,16,1")
QUICK_CASES = tuple(map(parse_case, ("32,64,56,64,1", "32,512,7,512,1", "8,64,32,64,16", "4,64,32,64,64")))
BOTH = ("forward", "training")


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        row: key in `ROWS`.
        what: what is compared, with the layout where there is one.
        case: the sizes, or "geometric mean".
        value: the ratio, or a plain number (bytes, a rate) with low = high.
        target: the most that it may be; None = for information.
        note: what else to know.
        unit: of the value; empty for ratios.
    """

    row: str
    what: str
    case: str
    value: Ratio
    target: float | None = None
    note: str = ""
    unit: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        return None if self.target is None else self.value.meets(self.target)

    @property
    def text(self) -> str:
        """The value as it is printed."""
        if not self.unit:
            return str(self.value)
        return f"{self.value.value:,.{0 if self.unit == 'bytes' else 1}f} {self.unit}"


@dataclass
class Measured:
    """One case's timings."""

    case: Case
    times: Times
    odd: bool = False

    def ratio(self, ours: str, *others: str) -> Ratio:
        """The median of `ours` over that of the better of `others`."""
        other = self.times.better(*others)
        return compare(self.times.seconds[ours], [(1.0, self.times.seconds[other])])

    def floor(self, ours: str) -> Ratio:
        """The median of `ours` over the floor: the product's flops or the bytes of x and y at the machine's rates."""
        seconds = self.times.seconds
        share = self.case.flops / (2 * MM**3)
        return compare(seconds[ours], [(share, seconds["mm"]), (1.0, seconds["copy"])])

    def floor_alone(self, which: str, *others: str) -> float:
        """What the floor itself would score against the better of `others`: no layer that multiplies so can do better.

        Training has three products, and moves x and y once more each, and the input's gradient.
        """
        case, products = self.case, 3 if which == "training" else 1
        moved = (3 * case.channels + 2 * case.outputs) / (case.channels + case.outputs) if products > 1 else 1.0
        product = products * case.flops / (2 * MM**3) * self.times.median("mm")
        floor = max(product, moved * self.times.median("copy"))
        return floor / self.times.median(self.times.better(*others))

    @property
    def compute_bound(self) -> bool:
        """Whether the floor is the product's."""
        return self.case.flops / (2 * MM**3) * self.times.median("mm") >= self.times.median("copy")


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        title: what the table says.
        target: what it says about the target.
        contestants: what it adds to a case's timings, or None where it does not apply to the case.
        lines: the lines that follow from all cases' timings.
        odd: whether the odd sizes take part.
        alone: measures by itself, given the effort, whether it is a quick run, and the cases.
    """

    title: str
    target: str
    contestants: Callable[[Layer], dict[str, Contestant]] | None = None
    lines: Callable[[list[Measured]], Iterable[Line]] | None = None
    odd: bool = False
    alone: Callable[[Effort, bool, Sequence[Case]], Iterable[Line]] | None = None


def both_layouts(name: str) -> tuple[str, str]:
    """The name with each layout behind it."""
    first, second = (f"{name}, {layout}" for layout in LAYOUTS)
    return first, second


def _mean(
    row: str, what: str, ratios: Sequence[tuple[Measured, Ratio]], target: float | None, floors: Sequence[float] = ()
) -> Iterable[Line]:
    chosen = [ratio for measured, ratio in ratios if not measured.odd]
    note = f"{len(chosen)} cases"
    if floors:
        even = [floor for (measured, _), floor in zip(ratios, floors, strict=True) if not measured.odd]
        note += f", the floor alone: {math.prod(even) ** (1 / max(len(even), 1)):.2f}"
    if len(chosen) > 1:
        yield Line(row, what, "geometric mean", geometric_mean(chosen), target, note)


def _against_1x1(row: str, which: str, mean_target: float) -> Callable[[list[Measured]], Iterable[Line]]:
    def lines(measured: list[Measured]) -> Iterable[Line]:
        for layout in LAYOUTS:
            others = both_layouts(f"{which}, 1x1")
            ratios = [(m, m.ratio(f"{which}, ours, {layout}", *others)) for m in measured]
            floors = [m.floor_alone(which, *others) for m in measured]
            for (m, ratio), floor in zip(ratios, floors, strict=True):
                note = f"the floor alone: {floor:.2f}" + (", odd size" if m.odd else "")
                yield Line(row, layout, str(m.case), ratio, 1.15, note)
            yield from _mean(row, layout, ratios, mean_target, floors)

    return lines


def _floor(measured: list[Measured]) -> Iterable[Line]:
    for layout in LAYOUTS:
        for m in measured:
            ratio = m.floor(f"forward, ours, {layout}")
            bound = "compute-bound" if m.compute_bound else "memory-bound"
            yield Line("forward-floor", layout, str(m.case), ratio, 1.15 if m.compute_bound else None, bound)


def _against_plain(row: str, other: str) -> Callable[[list[Measured]], Iterable[Line]]:
    targets = {16: 0.5, 64: 0.3}

    def lines(measured: list[Measured]) -> Iterable[Line]:
        what = "better layout of each"
        ratios = []
        for m in measured:
            ours = m.times.better(*both_layouts("training, ours"))
            ratios.append((m, m.ratio(ours, *both_layouts(f"training, {other}"))))
        floors = [m.floor_alone("training", *both_layouts(f"training, {other}")) for m in measured]
        for (m, ratio), floor in zip(ratios, floors, strict=True):
            yield Line(row, what, str(m.case), ratio, targets.get(m.case.masks), f"the floor alone: {floor:.2f}")
        yield from _mean(row, what, ratios, 0.6, floors)

    return lines


def _against_3x3(measured: list[Measured]) -> Iterable[Line]:
    for layout in LAYOUTS:
        chosen = [m for m in measured if m.case.masks == 1]
        ratios = [(m, m.ratio(f"training, ours, {layout}", *both_layouts("training, 3x3"))) for m in chosen]
        for m, ratio in ratios:
            yield Line("training-3x3", layout, str(m.case), ratio, 0.3)
        yield from _mean("training-3x3", layout, ratios, 0.18)


def _norm(measured: list[Measured]) -> Iterable[Line]:
    for layout in LAYOUTS:
        for m in measured:
            ratio = m.ratio(f"training, ours normalised, {layout}", f"training, ours, {layout}")
            target, bound = (1.12, "compute-bound") if m.compute_bound else (1.25, "memory-bound")
            yield Line("norm", layout, str(m.case), ratio, target, bound)


def _seeds(measured: list[Measured]) -> Iterable[Line]:
    for noise, target in (("uniform", 1.03), ("waves", 1.03), ("normal", 1.15)):
        for which in BOTH:
            for layout in LAYOUTS:
                for m in measured:
                    ratio = m.ratio(f"{which}, ours {noise}, {layout}", f"{which}, ours, {layout}")
                    judged = target if m.case.batch >= 8 else None
                    yield Line("seeds", f"{noise}, {which}, {layout}", str(m.case), ratio, judged)


def _bfloat16(measured: list[Measured]) -> Iterable[Line]:
    has = bfloat16_products()
    for which in BOTH:
        for layout in LAYOUTS:
            for m in measured:
                ratio = m.ratio(f"{which}, ours bfloat16, {layout}", f"{which}, ours, {layout}")
                note = "compute-bound" if m.compute_bound else "memory-bound"
                target = 0.6 if m.compute_bound and has else None
                note += "" if has else ", no bfloat16 instructions"
                yield Line("bfloat16", f"{which}, {layout}", str(m.case), ratio, target, note)


def bfloat16_products() -> bool:
    """Whether this machine's kernels use bfloat16 dot products: AVX-512 with its bfloat16 extension."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return torch.ops.torch_pnn._isa_name() == "avx512" and "avx512_bf16" in text


def _bfloat16_contestants(layer: Layer) -> dict[str, Contestant]:
    return layer.ours(BOTH) | layer.ours_bfloat16(BOTH) | layer.ceilings()


def _seed_contestants(layer: Layer) -> dict[str, Contestant]:
    found = layer.ours(BOTH)
    for noise in ("uniform", "waves", "normal"):
        found |= layer.ours(BOTH, noise)
    return found


# ---- rows of their own ----


def _overhead(effort: Effort, quick: bool, cases: Sequence[Case]) -> Iterable[Line]:
    del quick, cases
    layer = Layer(SMALL_CASE)
    times = alternate(layer.overhead(), replace(effort, rounds=max(effort.rounds, 11), fewest=11, sample=0.004))
    m = Measured(SMALL_CASE, times)
    for which, target in (("forward", 1.3), ("training", 1.6)):
        label = "without gradients" if which == "forward" else "with gradients, forward and backward"
        kinds = [("operator, stored masks", target), ("operator, masks by seed", target), ("module", 2.0)]
        if which == "forward" and empty_operator() is not None:
            kinds.append(("empty operator", None))
        for kind, judged in kinds:
            # Both sides in the layout that a small network has by default.
            ours = f"{which}, {kind}, contiguous"
            ratio = m.ratio(ours, f"{which}, F.conv2d, contiguous")
            note = f"{1e6 * times.median(ours):.1f} µs, F.conv2d "
            note += f"{1e6 * times.median(f'{which}, F.conv2d, contiguous'):.1f} µs"
            yield Line("overhead", f"{kind}, {label}", str(SMALL_CASE), ratio, judged, note)


def _exactly(row: str, what: str, case: str, value: int, target: int | None, note: str = "") -> Line:
    return Line(row, what, case, Ratio(value, value, value), target, note, "bytes")


def _kept(effort: Effort, quick: bool, cases: Sequence[Case]) -> Iterable[Line]:
    del effort, quick
    for case in cases:
        yield from _kept_of(Layer(case))


def _kept_of(layer: Layer) -> Iterable[Line]:
    case, x, weight, bias = layer.case, layer.x["contiguous"], layer.weight, layer.bias
    sources: dict[str, tuple[dict[str, Any], int]] = {
        "masks by seed": ({"seed": layer.seed, "masks": case.masks}, 8),  # the seed itself
        "stored masks": ({"mask": layer.mask}, 4 * layer.mask.numel()),
    }
    for name, (source, masks) in sources.items():
        limit = 4 * (x.numel() + weight.numel()) + masks
        kept = kept_bytes(partial(functional.perturb_conv2d, x, weight, bias, level=LEVEL, **source))
        yield _exactly("kept-bytes", name, str(case), kept, limit, "x, V, N")
        gamma, beta = (torch.ones(case.maps, requires_grad=True) for _ in range(2))
        running = (torch.zeros(case.maps), torch.ones(case.maps))
        normalised = partial(functional.perturb_norm_conv2d, x, weight, bias, gamma, beta, *running, training=True)
        kept = kept_bytes(partial(normalised, level=LEVEL, **source))
        limit += 4 * 4 * case.maps
        yield _exactly("kept-bytes", f"{name}, normalised", str(case), kept, limit, "and gamma, beta, mean, variance")
    kept = kept_bytes(partial(plain_layer, x, weight, bias, layer.mask))
    yield _exactly("kept-bytes", "plain PyTorch", str(case), kept, None, "beside it")


def workspace_limit(weight_bytes: int, packed_bytes: int, threads: int) -> int:
    """The most that a pass may use beyond its inputs and outputs, whatever the batch.

    Args:
        weight_bytes: bytes of dV.
        packed_bytes: bytes of the packed weights.
        threads: threads of the host; each may use 1 MiB and four times the bytes of dV.
    """
    return threads * (1024 * 1024 + 4 * weight_bytes) + packed_bytes


def _memory(effort: Effort, quick: bool, cases: Sequence[Case]) -> Iterable[Line]:
    del effort, quick
    for case in cases:
        yield from _memory_of(Layer(case))


def _memory_of(layer: Layer) -> Iterable[Line]:
    case, weight, bias = layer.case, layer.weight.detach(), layer.bias.detach()
    weights = 4 * weight.numel()
    # Packed weights are padded to whole tiles of up to 32 outputs or maps.
    packed = 4 * (-(-case.outputs // 32) * 32) * (-(-case.maps // 32) * 32)
    limit = workspace_limit(weights, packed, torch.get_num_threads())
    options = (case.masks, False, "uniform", LEVEL, "relu", [1, 1], 1)
    wanted = [True, True, True, False]
    for layout, leaf in layer.x.items():
        x = leaf.detach()
        forward = partial(torch.ops.torch_pnn.perturb_conv2d, x, weight, bias, layer.mask, None, *options)
        beyond = peak_bytes(forward) - 4 * case.pixels * case.outputs
        yield _exactly("memory", f"forward, {layout}", str(case), beyond, limit)
        operator = torch.ops.torch_pnn._perturb_conv2d_backward
        backward = partial(operator, layer.grad[layout], x, weight, layer.mask, None, *options, wanted)
        beyond = peak_bytes(backward) - 4 * (x.numel() + weight.numel() + bias.numel())
        yield _exactly("memory", f"backward, {layout}", str(case), beyond, limit)


def _network(effort: Effort, quick: bool, cases: Sequence[Case]) -> Iterable[Line]:
    batch = 64
    # A step takes seconds: fewer rounds, a budget of their own.
    del effort, cases
    chosen = Effort(3, 0.0, 20.0, fewest=3) if quick else Effort(11, 0.0, 180.0, fewest=7)
    times = alternate(networks(batch), chosen)
    m = Measured(CASES[0], times)
    what = f"noise_resnet18, batch {batch}, 3x32x32"
    for layout in LAYOUTS:
        ours = f"step, ours, {layout}"
        best = ours == times.better(*both_layouts("step, ours"))
        for other, title, target in (("plain", "plain PyTorch", 0.75), ("3x3", "3x3 convolutions", 0.33)):
            ratio = m.ratio(ours, *both_layouts(f"step, {other}"))
            note = f"{1e3 * times.median(ours):.0f} ms, theirs "
            note += f"{1e3 * min(map(times.median, both_layouts(f'step, {other}'))):.0f} ms"
            note += "" if best else "; not our better layout"
            yield Line("network", f"{layout} vs {title}", what, ratio, target if best else None, note)


def _compiled_network(effort: Effort, quick: bool, cases: Sequence[Case]) -> Iterable[Line]:
    batch = 32
    del effort, cases
    chosen = Effort(3, 0.0, 20.0, fewest=3) if quick else Effort(11, 0.0, 90.0, fewest=7)
    times = alternate(compiled_networks(batch), chosen)
    m = Measured(CASES[0], times)
    for which in ("inference", "step"):
        ours = f"{which}, compiled"
        note = f"{1e3 * times.median(ours):.0f} ms, uncompiled {1e3 * times.median(f'{which}, eager'):.0f} ms"
        what = f"noise_resnet18 of width 32, batch {batch}, 3x32x32"
        yield Line("network-compiled", which, what, m.ratio(ours, f"{which}, eager"), 1.0, note)


def _libpnn(effort: Effort, quick: bool, cases: Sequence[Case]) -> Iterable[Line]:
    del effort, cases
    program = _library.library_directory().parent / "benchmarks" / "bench_pnn"
    if not program.exists():
        return
    for isa in ("avx512", "avx2", "neon", "portable"):
        few = ["--quick", "32,64,56,64,1", "32,256,14,256,1"]
        command = [str(program), "--json", *(few if quick else [])]
        environment = {**os.environ, "PNN_MAX_ISA": isa}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        for text in done.stdout.splitlines():
            found = json.loads(text)
            if found["isa"] != isa:  # this processor lacks it
                break
            what = f"{isa}, {found['threads']} threads, {found['layout']}, {found['pass']}"
            rate = found["gflops"]
            yield Line("libpnn", what, found["case"], Ratio(rate, rate, rate), None, "", "GFLOP/s")


ROWS: dict[str, Row] = {
    "forward-1x1": Row(
        "forward vs the bare 1x1 convolution, its better layout",
        "≤ 1.15 in every case, ≤ 1.03 in the geometric mean",
        lambda layer: layer.ours(("forward",)) | layer.bare(("forward",)),
        _against_1x1("forward-1x1", "forward", 1.03),
        odd=True,
    ),
    "forward-floor": Row(
        "forward vs floor",
        "≤ 1.15 where compute-bound",
        lambda layer: layer.ours(("forward",)) | layer.ceilings(),
        _floor,
    ),
    "training-1x1": Row(
        "forward + backward vs the bare 1x1 convolution, its better layout",
        "≤ 1.15 in every case, ≤ 1.0 in the geometric mean",
        lambda layer: layer.ours(("training",)) | layer.bare(("training",)),
        _against_1x1("training-1x1", "training", 1.0),
        odd=True,
    ),
    "training-plain": Row(
        "forward + backward vs plain PyTorch, each in its better layout",
        "≤ 0.6 in the geometric mean, ≤ 0.5 at M = 16, ≤ 0.3 at M = 64",
        lambda layer: layer.ours(("training",)) | layer.plain(),
        _against_plain("training-plain", "plain"),
    ),
    "training-compiled": Row(
        "forward + backward vs plain PyTorch under torch.compile, each in its better layout",
        "≤ 0.6 in the geometric mean, ≤ 0.5 at M = 16, ≤ 0.3 at M = 64",
        lambda layer: layer.ours(("training",)) | layer.plain(compiled=True),
        _against_plain("training-compiled", "compiled"),
    ),
    "training-3x3": Row(
        "forward + backward vs a 3x3 convolution, its better layout, M = 1",
        "≤ 0.3 in every case, ≤ 0.18 in the geometric mean",
        lambda layer: (layer.ours(("training",)) | layer.conv3x3()) if layer.case.masks == 1 else {},
        _against_3x3,
    ),
    "norm": Row(
        "normalisation inside, training, vs without",
        "≤ 1.12 where compute-bound, ≤ 1.25 elsewhere",
        lambda layer: layer.ours(("training",)) | layer.ours_normalised() | layer.ceilings(),
        _norm,
    ),
    "seeds": Row(
        "masks by seed vs stored",
        "B ≥ 8: uniform and waves ≤ 1.03, normal ≤ 1.15",
        _seed_contestants,
        _seeds,
    ),
    "bfloat16": Row("bfloat16 vs float32", "≤ 0.6 where compute-bound", _bfloat16_contestants, _bfloat16),
    "overhead": Row(
        "one call on a small input vs F.conv2d 1x1",
        "operator ≤ 1.3 without gradients, ≤ 1.6 with; module ≤ 2",
        alone=_overhead,
    ),
    "kept-bytes": Row(
        "bytes that autograd keeps for backward",
        "x, V, N where it is a tensor (8 bytes of seed where not), vectors of C·M",
        alone=_kept,
    ),
    "memory": Row(
        "bytes beyond inputs and outputs",
        "≤ (1 MiB + 4 × the bytes of dV) per thread + packed weights, whatever the batch",
        alone=_memory,
    ),
    "network": Row(
        "training step of noise_resnet18 (juefeix2018), each in its better layout",
        "≤ 0.75 of plain PyTorch, ≤ 0.33 of 3x3 convolutions",
        alone=_network,
    ),
    "network-compiled": Row(
        "noise_resnet18 (juefeix2018) under torch.compile vs the same network uncompiled, both with our operators",
        "≤ 1.0, inference and training step",
        alone=_compiled_network,
    ),
    "libpnn": Row("libpnn alone, by instruction set", "for information", alone=_libpnn),
}


def measure_case(case: Case, rows: Sequence[str], effort: Effort, odd: bool) -> Measured:
    """Times everything that the rows ask of one case, all of it alternately."""
    layer = Layer(case)
    contestants: dict[str, Contestant] = {}
    for name in rows:
        row = ROWS[name]
        if row.contestants is not None and (row.odd or not odd):
            contestants |= row.contestants(layer)
    # The machine's rates stand beside every case.
    return Measured(case, alternate(contestants | layer.ceilings(), effort), odd)


def slug(text: str) -> str:
    """A name for a file: letters and digits, the rest as single hyphens.

    Example:
        >>> slug("AMD EPYC (2 cores)")
        'amd-epyc-2-cores'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
