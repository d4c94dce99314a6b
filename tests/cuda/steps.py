"""Counts the instructions of a step of depth in the machine code for sm_90: tests/cuda/predictions.py has them.

    python tests/cuda/steps.py --build build/cuda      prints them beside predictions.py's

A tiled kernel's steps are its innermost loop around so many multiplying instructions as a product takes. What a thread
issues in one is the shortest way through that loop on which everything is done that a step of a plain layer does
(cuda/response.h, without normalisation):
data copied, the barrier met, the product added, and, in forward and weight gradient, its part of the operand made.
Threads of float32 and TF32 make theirs in every second step, so there the mean of the ways with and without it counts.
FFMA does not count: predictions.py has the time of multiplying beside it.

forward_wgmma has a loop for each number of masks, told apart by their loads of x, with four asynchronous products.

They depend on the compiler, so a difference is a failure with the nvcc of tests/cuda/kernels.txt alone. The last line
is 'N passed, N failed'.

Needs cuobjdump and nvdisasm of 13.2 or newer: from the toolkit, or requirements/cuda.txt.
"""

from __future__ import annotations

import argparse
import heapq
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import gates
import predictions

ARCHITECTURE = "sm_90"
Code = list[tuple[int, str]]
"""A kernel's instructions, (address, text), in order."""


@dataclass(frozen=True)
class Work:
    """Something that a step must do: this many instructions of this kind in one basic block."""

    pattern: str
    count: int = 1


STEP = (Work(r"\bLDGSTS"), Work(r"\bBAR\b"))
# The operand of contiguous tensors: x from shared memory, the lattice's bytes, the stores.
OPERAND = {
    "bfloat16": (Work(r"\bLDS\.U16", 16), Work(r"\bPRMT\b.*0x7634"), Work(r"\bSTS", 2)),
    "float16": (Work(r"\bLDS\.U16", 16), Work(r"\bPRMT\b.*0x7634"), Work(r"\bSTS", 2)),
    "tf32": (Work(r"\bLDS\b", 16), Work(r"\bPRMT\b.*0x7634"), Work(r"\bSTS", 2)),
    "float32": (Work(r"\bLDS\b", 16), Work(r"\bPRMT\b.*0x7634"), Work(r"\bSTS", 2)),
}


def read_kernels(sass: str) -> dict[str, Code]:
    """Each kernel's instructions by its short name, from the output of `cuobjdump -sass` for one architecture."""
    instruction = re.compile(r" {8}/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
    found: dict[str, Code] = {}
    current: Code = []
    for line in sass.splitlines():
        if match := instruction.match(line):
            current.append((int(match[1], 16), match[2]))
        elif match := re.match(r"\s+Function : (\S+)", line):
            current = found.setdefault(gates.short_name(match[1]), [])
    return found


def target(text: str) -> int | None:
    """Where a branch goes, or None of anything else."""
    match = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
    return int(match[1], 16) if match else None


def find_loop(code: Code, multiplies: str, least: int) -> tuple[int, int] | None:
    """First and last address of the innermost loop around at least so many instructions that multiply."""
    places = [address for address, text in code if re.search(multiplies, text)]
    loops = [
        (to, address)
        for address, text in code
        if (to := target(text)) is not None and sum(to <= place <= address for place in places) >= least
    ]
    return min(loops, key=lambda loop: loop[1] - loop[0], default=None)


class Blocks:
    """A kernel's basic blocks: index ranges of its instructions, and which ones may follow each."""

    def __init__(self, code: Code) -> None:
        place = {address: index for index, (address, _) in enumerate(code)}
        starts = {0}
        for index, (_, text) in enumerate(code):
            if (to := target(text)) is not None:
                starts.add(place[to])
            if re.search(r"\b(BRA|EXIT|BRX|RET)\b", text):
                starts.add(index + 1)
        ordered = sorted(start for start in starts if start < len(code))
        self.code = code
        self.ranges = list(zip(ordered, [*ordered[1:], len(code)], strict=True))
        block = {start: number for number, start in enumerate(ordered)}
        self.next: list[list[int]] = []
        for number, (_, end) in enumerate(self.ranges):
            last = code[end - 1][1]
            to = target(last)
            follow = [] if to is None else [block[place[to]]]
            if not re.match(r"(BRA 0x|EXIT|RET|BRX)", last) and number + 1 < len(self.ranges):
                follow.append(number + 1)
            self.next.append(follow)

    def of(self, address: int) -> int:
        """The block that an instruction stands in."""
        return next(
            n for n, (start, end) in enumerate(self.ranges) if any(a == address for a, _ in self.code[start:end])
        )

    def texts(self, number: int) -> list[str]:
        """A block's instructions."""
        start, end = self.ranges[number]
        return [text for _, text in self.code[start:end]]

    def shortest(self, loop: tuple[int, int], work: Sequence[Work], uncounted: str) -> int | None:
        """The fewest instructions of one way through a loop that does all of the work; None if no way does.

        Args:
            loop: its first and last address.
            work: what must be done on the way.
            uncounted: instructions that do not count.
        """
        size, done = [], []
        for number in range(len(self.ranges)):
            texts = self.texts(number)
            size.append(sum(not re.search(uncounted, text) for text in texts))
            done.append(
                sum(1 << k for k, w in enumerate(work) if sum(bool(re.search(w.pattern, t)) for t in texts) >= w.count)
            )
        first, last = self.of(loop[0]), self.of(loop[1])
        waiting, seen = [(size[first], first, done[first])], set()
        while waiting:
            length, number, mask = heapq.heappop(waiting)
            if number == last and mask == (1 << len(work)) - 1:
                return length
            if (number, mask) in seen:
                continue
            seen.add((number, mask))
            for follow in self.next[number]:
                if number != last or follow > number:  # not around again
                    heapq.heappush(waiting, (length + size[follow], follow, mask | done[follow]))
        return None


def count(code: Code, kernel: str, dtype: str) -> float | None:
    """A thread's instructions in a step; None where no way does a step's work.

    Args:
        code: the kernel's.
        kernel: "forward", "input_gradient" or "weight_gradient".
        dtype: a key of `OPERAND`.
    """
    multiplies = r"\bFFMA\b" if dtype == "float32" else r"\bHMMA\b"
    uncounted = r"\bFFMA\b" if dtype == "float32" else r"(?!)"
    least = 400 if dtype == "float32" else 8
    loop = find_loop(code, multiplies, least)
    if loop is None:
        return None
    blocks = Blocks(code)
    step = (*STEP, Work(multiplies, least))
    without = blocks.shortest(loop, step, uncounted)
    if kernel == "input_gradient" or without is None:
        return without
    making = blocks.shortest(loop, (*step, *OPERAND[dtype]), uncounted)
    if making is None or dtype in ("bfloat16", "float16"):
        return making
    return (without + making) / 2


def counted(folder: Path) -> Iterator[tuple[str, str, int, float | None]]:
    """(kernel, dtype, 0 = large or 1 = small tile, instructions) of every plain kernel in a folder's object files."""
    tool = gates.find_tool("cuobjdump")
    if tool is None:
        sys.exit("steps.py: cuobjdump was not found: pip install -r requirements/cuda.txt")
    for kernel, way in (("forward", "pixels"), ("weight_gradient", "depth pixels"), ("input_gradient", "rows pixels")):
        code = read_kernels(gates.run(tool, "-sass", "-arch", ARCHITECTURE, str(folder / f"{kernel}.o")))
        short = gates.short_name(f"0{kernel}_kernel")
        for dtype in OPERAND:
            for size, tile in enumerate(("Large", "Small")):
                name = f"{short} {dtype.replace('float32', 'float')} {tile} {way}"
                yield kernel, dtype, size, count(code[name], kernel, dtype) if name in code else None


def counted_wgmma(folder: Path) -> Iterator[tuple[str, int, int, int | None]]:
    """(dtype, outputs, masks, instructions) of forward_wgmma's steps of 64 maps, of contiguous tensors."""
    tool = gates.find_tool("cuobjdump")
    assert tool is not None
    code = read_kernels(gates.run(tool, "-sass", "-arch", "sm_90a", str(folder / "forward_wgmma.o")))
    for dtype, expected in predictions.WGMMA_STEP.items():
        for outputs, tile in ((256, "Wide"), (128, "Middle"), (64, "Narrow")):
            found = count_wgmma(code.get(f"forward_wgmma {dtype} {tile} pixels", []))
            for number in range(len(expected[outputs])):
                yield dtype, outputs, 1 << number, found.get(1 << number)


def count_wgmma(code: Code) -> dict[int, int | None]:
    """A thread's instructions in a step, by masks (16: or more). With m of them a step loads 16 / m words of x."""
    found: dict[int, int | None] = {}
    blocks = Blocks(code) if code else None
    for place in [address for address, text in code if re.search(r"\bHGMMA\b", text)]:
        loops = [(to, a) for a, text in code if (to := target(text)) is not None and to <= place <= a]
        if loops:
            first, last = min(loops, key=lambda loop: loop[1] - loop[0])
            loads = sum(bool(re.search(r"\bLDG\.", text)) for a, text in code if first <= a <= last)
            work = (*STEP, Work(r"\bHGMMA\b", 4))
            found[16 // max(loads, 1)] = blocks.shortest((first, last), work, r"(?!)") if blocks else None
    return found


EXPECTED = {
    "forward": predictions.FORWARD_STEP,
    "weight_gradient": predictions.WEIGHT_STEP,
    "input_gradient": predictions.INPUT_STEP,
}


def main() -> int:
    """Prints the counts; the exit status is 0 if predictions.py has the same."""
    parser = argparse.ArgumentParser(description="Counts the instructions of a step.")
    parser.add_argument("--build", type=Path, required=True, help="a build tree with PNN_CUDA")
    parser.add_argument("--nvcc", default="nvcc", help="the compiler that it was made with")
    options = parser.parse_args()
    compiler = gates.compiler(options.nvcc)
    known = gates.TABLE.read_text(encoding="utf-8").startswith(f"# nvcc {compiler};")
    right = wrong = 0
    print(f"instructions of a step, {ARCHITECTURE}")
    print("kernel            type      tile   counted  predictions.py")
    for kernel, dtype, size, number in counted(options.build / "cuda"):
        expected = EXPECTED[kernel][dtype][size]
        same = number == expected
        right, wrong = right + same, wrong + (not same)
        mark = "" if same else "  differs"
        print(f"{kernel:<16}  {dtype:<8}  {('large', 'small')[size]}  {number!s:>7}  {expected:>14}{mark}")
    for dtype, outputs, masks, steps in counted_wgmma(options.build / "cuda"):
        expected = predictions.WGMMA_STEP[dtype][outputs][masks.bit_length() - 1]
        same = steps == expected
        right, wrong = right + same, wrong + (not same)
        name = f"{outputs} outputs, {masks} masks"
        print(f"forward_wgmma     {dtype:<8}  {name}  {steps!s:>7}  {expected:>7}{'' if same else '  differs'}")
    if not known:
        print(f"steps.py: predictions.py has the counts of another nvcc than {compiler}, so they are not compared")
        right, wrong = 1, 0
    print(f"{right} passed, {wrong} failed")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
