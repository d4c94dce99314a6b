"""Times the perturbation operator beside plain PyTorch and the machine's ceilings, all in one run.

    make bench                                 every case
    make bench ARGS=--quick                    fewer rounds
    make bench ARGS='--case 32,64,56,64,1'     one case (repeatable): B,C,H,T,M with W = H
    python benchmarks/run.py --json out.json   also writes every figure

benchmarks/README.md says how it is measured and what the columns mean.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torch_pnn
from torch_pnn import functional

# B, C, H = W, T, M: the four stages of a residual network, larger batches, many masks, and two small, odd ones.
CASES = [
    (32, 64, 56, 64, 1),
    (32, 128, 28, 128, 1),
    (32, 256, 14, 256, 1),
    (32, 512, 7, 512, 1),
    (128, 64, 32, 64, 1),
    (128, 128, 16, 128, 1),
    (8, 64, 32, 64, 16),
    (4, 64, 32, 64, 64),
    (1, 16, 8, 16, 1),
    (8, 17, 13, 100, 1),
    (8, 3, 57, 17, 1),
]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LEVEL = 0.1


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios, and the order statistics that enclose the true median with 95 % confidence."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:5.2f} [{self.low:4.2f}, {self.high:4.2f}]"


def paired_ratio(ours: Sequence[float], other: Sequence[float]) -> Ratio:
    """Compares two series of times that were taken alternately.

    Args:
        ours: seconds of each round.
        other: seconds of the same rounds.

    Returns:
        The ratio ours / other. With fewer than six rounds no interval reaches 95 %, and it spans all rounds.

    Raises:
        ValueError: the series differ in length or are empty.

    Example:
        >>> paired_ratio([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]).median
        1.0
    """
    if len(ours) != len(other) or not ours:
        raise ValueError(f"{len(ours)} and {len(other)} rounds, they should be equally many, and one or more")
    ratios = sorted(a / b for a, b in zip(ours, other, strict=True))
    count = len(ratios)
    # The interval from the (drop + 1)-th smallest to the (drop + 1)-th largest misses the median when at most `drop`
    # of `count` fair coins fall on one side.
    drop = 0
    while 2 * sum(math.comb(count, i) for i in range(drop + 2)) / 2**count <= 0.05:
        drop += 1
    return Ratio(statistics.median(ratios), ratios[drop], ratios[count - 1 - drop])


def repetitions(call: Callable[[], Any], seconds: float) -> int:
    """How many calls fill about `seconds`, after a warm-up."""
    for _ in range(2):
        call()
    start = time.perf_counter()
    call()
    return max(1, round(seconds / max(time.perf_counter() - start, 1e-7)))


def alternate(calls: dict[str, Callable[[], Any]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Times every call in every round, the order turned by one each time, so that drift meets all alike.

    Returns:
        Seconds per call, one figure a round, by name.
    """
    counts = {name: repetitions(call, seconds) for name, call in calls.items()}
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for offset in range(len(names)):
            name = names[(turn + offset) % len(names)]
            call, count = calls[name], counts[name]
            start = time.perf_counter()
            for _ in range(count):
                call()
            times[name].append((time.perf_counter() - start) / count)
    return times


def plain(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """The layer as one writes it in PyTorch. x [B, C, H, W], mask [C, M, H, W], weight [T, C*M, 1, 1], bias [T]."""
    batch, channels, height, width = x.shape
    masks = mask.shape[1]
    if masks == 1:
        return torch.nn.functional.conv2d(torch.relu(x + LEVEL * mask[:, 0]), weight, bias)
    a = torch.relu(x.unsqueeze(2) + LEVEL * mask).reshape(batch, channels * masks, height, width)
    return torch.nn.functional.conv2d(a, weight, bias)


def ceilings(bytes_moved: int, rounds: int) -> tuple[float, float]:
    """The machine's rates now: FLOP/s of a 1024x1024x1024 float32 product, bytes/s of a copy of that many bytes."""
    a, b, product = torch.randn(1024, 1024), torch.randn(1024, 1024), torch.empty(1024, 1024)
    source = torch.randn(max(1, bytes_moved // 8))
    target = torch.empty_like(source)
    times = alternate(
        {"mm": lambda: torch.mm(a, b, out=product), "copy": lambda: target.copy_(source)}, rounds, 0.01
    )
    return 2 * 1024**3 / min(times["mm"]), 8 * source.numel() / min(times["copy"])


def with_backward(function: Callable[..., Tensor], leaves: Sequence[Tensor], grad: Tensor) -> Callable[[], Any]:
    """A call of forward and backward for the gradients of `leaves`."""
    return lambda: torch.autograd.grad(function(), leaves, grad)


def measure(case: tuple[int, int, int, int, int], by_seed: bool, rounds: int, seconds: float) -> dict[str, Any]:
    """All the figures of one case.

    Returns:
        A dictionary as it goes into the JSON file: seconds per call (median of the rounds), ratios and ceilings.
    """
    batch, channels, side, outputs, masks = case
    maps = channels * masks
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(batch, channels, side, side, generator=generator)
    mask = functional.perturbation_mask(1, channels, masks, side, side)
    weight = torch.randn(outputs, maps, 1, 1, generator=generator) / math.sqrt(maps)
    bias = torch.randn(outputs, generator=generator)
    grad = torch.randn(batch, outputs, side, side, generator=generator)
    source = {"seed": torch.tensor([1]), "masks": masks} if by_seed else {"mask": mask}

    flops = 2 * batch * side * side * maps * outputs
    bytes_moved = 4 * batch * side * side * (channels + outputs)
    result: dict[str, Any] = {"case": list(case), "masks": "seed" if by_seed else "stored", "flops": flops}
    flop_rate, byte_rate = ceilings(bytes_moved, rounds)
    result["ceilings"] = {"mm_flops_per_second": flop_rate, "copy_bytes_per_second": byte_rate}

    for mode in ("forward", "forward+backward"):
        training = mode != "forward"
        calls: dict[str, Callable[[], Any]] = {}
        for name, layout in LAYOUTS.items():
            x = base.contiguous(memory_format=layout).requires_grad_(training)
            v = weight.detach().clone().requires_grad_(training)
            b = bias.detach().clone().requires_grad_(training)
            ready = torch.randn(batch, maps, side, side, generator=generator)
            ready = torch.relu(ready).contiguous(memory_format=layout).requires_grad_(training)
            g = grad.contiguous(memory_format=layout)
            forward: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
                "ours": (lambda x=x, v=v, b=b: functional.perturb_conv2d(x, v, b, level=LEVEL, **source), x),
                "plain": (lambda x=x, v=v, b=b: plain(x, v, b, mask), x),
                "bare 1x1": (lambda a=ready, v=v, b=b: torch.nn.functional.conv2d(a, v, b), ready),
            }
            for side_name, (function, leaf) in forward.items():
                calls[f"{side_name}, {name}"] = (
                    with_backward(function, (leaf, v, b), g) if training else function
                )
        with torch.set_grad_enabled(training):
            times = alternate(calls, rounds, seconds)
        median = {name: statistics.median(series) for name, series in times.items()}
        part: dict[str, Any] = {"seconds": median}
        # Forward moves x and y once and multiplies once; backward reads x and g, writes dx, and multiplies twice.
        work, moved = (flops * 3, bytes_moved * 2 + 4 * base.numel()) if training else (flops, bytes_moved)
        part["floor_seconds"] = max(work / flop_rate, moved / byte_rate)
        part["bound_by"] = "product" if work / flop_rate >= moved / byte_rate else "memory"
        for other in ("plain", "bare 1x1"):
            better = min(LAYOUTS, key=lambda layout: median[f"{other}, {layout}"])
            part[f"vs {other}"] = {
                layout: vars(paired_ratio(times[f"ours, {layout}"], times[f"{other}, {better}"])) for layout in LAYOUTS
            }
        result[mode] = part
    return result


def show(result: dict[str, Any]) -> None:
    """Prints one case."""
    batch, channels, side, outputs, masks = result["case"]
    flop_rate = result["ceilings"]["mm_flops_per_second"] / 1e9
    byte_rate = result["ceilings"]["copy_bytes_per_second"] / 1e9
    print(
        f"\nB {batch}, C {channels}, {side}x{side}, T {outputs}, M {masks}, masks {result['masks']}   "
        f"(1024^3 product {flop_rate:.0f} GFLOP/s, copy {byte_rate:.1f} GB/s)"
    )
    print(f"  {'':<17} {'layout':<14} {'ms':>9} {'floor ms':>9} {'of floor':>8}   vs plain PyTorch      vs bare 1x1")
    for mode in ("forward", "forward+backward"):
        part = result[mode]
        for layout in LAYOUTS:
            seconds = part["seconds"][f"ours, {layout}"]
            print(
                f"  {mode:<17} {layout:<14} {1e3 * seconds:>9.3f} {1e3 * part['floor_seconds']:>9.3f} "
                f"{seconds / part['floor_seconds']:>7.2f}x   {Ratio(**part['vs plain'][layout])}   "
                f"{Ratio(**part['vs bare 1x1'][layout])}"
            )


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
        "threads": torch.get_num_threads(),
        "isa": torch.ops.torch_pnn._isa_name(),
        "torch": str(torch.__version__),
        "torch_pnn": getattr(torch_pnn, "__version__", "unknown"),
        "python": platform.python_version(),
    }


def parse_case(text: str) -> tuple[int, int, int, int, int]:
    """Reads B,C,H,T,M.

    Raises:
        argparse.ArgumentTypeError: not five positive integers.

    Example:
        >>> parse_case("32,64,56,64,1")
        (32, 64, 56, 64, 1)
    """
    try:
        batch, channels, side, outputs, masks = (int(part) for part in text.strip("()").split(","))
        if min(batch, channels, side, outputs, masks) < 1:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, it should be five positive integers: B,C,H,T,M") from None
    return batch, channels, side, outputs, masks


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; the exit status is 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="7 short rounds in place of 21")
    parser.add_argument("--case", action="append", type=parse_case, metavar="B,C,H,T,M", help="this case; repeatable")
    parser.add_argument("--masks", choices=("stored", "seed"), default="stored", help="where masks come from (stored)")
    parser.add_argument("--threads", type=int, help="threads (PyTorch's default)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parsed = parser.parse_args(arguments)
    if parsed.threads is not None:
        if parsed.threads < 1:
            parser.error(f"--threads is {parsed.threads}, it should be at least 1")
        torch.set_num_threads(parsed.threads)
    if parsed.json is not None:  # found now, not after the measurement
        try:
            parsed.json.write_text("", encoding="utf-8")
        except OSError as error:
            parser.error(f"--json {parsed.json}: {error.strerror}")

    about = machine()
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    rounds, seconds = (7, 0.004) if parsed.quick else (21, 0.02)
    results = []
    for case in parsed.case or CASES:
        results.append(measure(case, parsed.masks == "seed", rounds, seconds))
        show(results[-1])
    if len(results) > 1:
        print("\ngeometric means")
        for mode in ("forward", "forward+backward"):
            for other in ("plain", "bare 1x1"):
                for layout in LAYOUTS:
                    ratios = [result[mode][f"vs {other}"][layout]["median"] for result in results]
                    print(f"  {mode:<17} {layout:<14} vs {other:<9} {statistics.geometric_mean(ratios):5.2f}")
    if parsed.json is not None:
        parsed.json.write_text(json.dumps({"machine": about, "rounds": rounds, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
