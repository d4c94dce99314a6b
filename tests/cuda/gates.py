"""Static gates on the GPU's machine code: what its kernels must contain, must not contain, and what they occupy.

    python tests/run.py cuda                   builds for every architecture, then runs this
    python tests/cuda/gates.py --build build/cuda --kernels build/dev/tests/cuda_list_kernels
    python tests/cuda/gates.py ... --write     writes the table anew

For every architecture in the object files, no kernel may use local memory (LDL, STL, a stack frame: spilled registers).
The tiled kernels may not call functions (CALL; before sm_90 the compiler also writes one that jumps over the next
instruction, where the threads of a warp meet again: that one is none) nor, unless they compute in double, use double
precision (DFMA, DADD, DMUL, DSETP, DMNMX, DMMA; a float kernel converts its double `level` once, which is none of
these); those of 16-bit types and TF32 must use the tensor cores (HMMA) and ldmatrix (LDSM; not TF32 where neither
operand has its depth in a row); all must copy asynchronously (LDGSTS), but for the moments', which need no tile, and
channels_last, whose numbers come through registers. Those named *_wgmma, of sm_90a alone, must use Hopper's
asynchronous products (HGMMA) instead, and wait for all of them only where they end: where the assembler can't see that
registers are left to a running product it waits behind each one, which it tells (C7510 and the like) without failing.
Nor may a register of such an operand be written before a wait, to which the compiler does not see (`overwritten`). A
block of each must fit on every multiprocessor. The kernels of finish.cu and V's copy, which handle channels, outputs
and weights, may do all but spill. (nvcc itself refuses spills in a build with warnings as errors.)

Registers, shared memory, the blocks that fit on a multiprocessor (by NVIDIA's cuda_occupancy.h, see occupancy.cc) and
the numbers of instructions are printed as two tables, which must equal tests/cuda/kernels.txt: a change is to be looked
at, then written with --write. They depend on the compiler, so they are compared for the nvcc that the file names.

The last line is 'N passed, N failed': each kernel on each architecture is one, and each changed line of the tables.

Needs cuobjdump and nvdisasm of 13.2 or newer: from the toolkit, or requirements/cuda.txt.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("kernels.txt")
WIDTH = 48  # of a kernel's name in the tables
# What a kernel of normalised layers is called, told by a flag among its template arguments.
NORMALISED = {
    "forward_wgmma": ["centred"],
    "weight_gradient_wgmma": ["centred"],
    "input_gradient_wgmma": ["affine"],
}
TILED = ("forward", "input_gradient", "weight_gradient", "moments", "moments_plain", "channels_last")
DOUBLE = re.compile(r"^D(FMA|ADD|MUL|SETP|MNMX|MMA)$")
COUNTED = (
    ("all", None),
    ("HMMA", {"HMMA", "HGMMA"}),
    ("FMA", {"FFMA", "DFMA"}),
    ("LDSM", {"LDSM"}),
    ("LDGSTS", {"LDGSTS"}),
)

Key = tuple[str, int]
"""(kernel, architecture)"""


@dataclass(frozen=True)
class Resources:
    """What a thread of a kernel takes: registers, and bytes of memory that stand in for them."""

    registers: int
    stack: int = 0
    local: int = 0


def find_tool(name: str) -> str | None:
    """The path of a CUDA tool, or None: on the PATH, in the toolkit, or in this Python's nvidia packages."""
    places = [os.environ.get("PATH", "")]
    places += [str(Path(root) / "bin") for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if root]
    places += sorted(str(path) for path in Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/bin"))
    return shutil.which(name, path=os.pathsep.join(places))


def short_name(mangled: str) -> str:
    """A kernel's name and template arguments, as list_kernels prints them."""
    name = re.search(r"\d+(\w+?)_kernel", re.sub(r"^.*?_cu_[0-9a-f]{8}", "", mangled))
    if name is None:
        return mangled
    parts = [re.sub(r"^.*\d", "", name[1]) or name[1]]
    arguments = mangled.split("_kernelI", 1)[1] if "_kernelI" in mangled else ""
    if arguments:
        kinds = {
            "f": "float",
            "d": "double",
            "NS_8bfloat16E": "bfloat16",
            "NS_7float16E": "float16",
            "NS_4tf32E": "tf32",
        }
        parts.append(next((kind for code, kind in kinds.items() if arguments.startswith(code)), "?"))
        shape = re.search(r"NS0?_\d(Large|Small|Wide|Middle|Narrow)E", arguments)
        if shape:
            parts.append(shape[1])
        order = re.search(r"FastestE(\d)E", arguments)
        if order:
            parts.append("rows" if order[1] == "1" else "depth")
        way = re.search(r"3WayE(\d)E", arguments)
        if way:
            parts += [[], ["pixels"], ["channels"]][int(way[1])]
        reading = re.search(r"7ReadingE(\d)E", arguments)
        if reading:
            parts.append(["pixels", "channels", "elements"][int(reading[1])])
        if "Lb1E" in arguments:
            parts += NORMALISED.get(parts[0], [])
    return " ".join(parts)


def run(tool: str, *arguments: str, given: str | None = None) -> str:
    """A tool's output."""
    environment = dict(os.environ)
    disassembler = find_tool("nvdisasm")  # cuobjdump calls it
    if disassembler is not None:
        environment["PATH"] = os.pathsep.join([str(Path(disassembler).parent), environment.get("PATH", "")])
    done = subprocess.run([tool, *arguments], input=given, check=False, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        sys.exit(f"gates.py: {tool} {' '.join(arguments)} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
    return done.stdout


def compiler(nvcc: str) -> str:
    """The version of a compiler."""
    version = re.search(r"release [\d.]+, V([\d.]+)", run(nvcc, "--version"))
    return version[1] if version else "unknown"


# ---- what cuobjdump prints ----


def read_code(sass: str) -> dict[Key, Counter[str]]:
    """How often each operation stands in each kernel, from the output of `cuobjdump -sass`.

    The CALL that jumps over the next instruction, and comes back there, is counted as CALL_NEXT; a wait for all
    asynchronous products as WAIT_ALL; products whose operand is overwritten as OVERWRITTEN.
    """
    instruction = re.compile(r" {8}/\*([0-9a-f]{4,})\*/\s+((?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)[^;]*)")
    jump = re.compile(r"CALL\.REL\.NOINC 0x([0-9a-f]+) ;")
    found: dict[Key, Counter[str]] = {}
    codes: dict[Key, list[tuple[int, str]]] = {}
    texts: list[tuple[int, str]] = []
    architecture, current = 0, None
    for line in sass.splitlines():
        if match := instruction.match(line):
            if current is None:
                continue
            operation = match[3]
            texts.append((int(match[1], 16), match[2].strip()))
            if operation == "CALL" and (to := jump.search(line)) and int(to[1], 16) == int(match[1], 16) + 32:
                operation = "CALL_NEXT"
            elif "WARPGROUP.DEPBAR.LE gsb0, 0x0" in line:
                operation = "WAIT_ALL"
            current[operation] += 1
        elif match := re.match(r"\s+code for sm_(\d+)", line):
            architecture, current = int(match[1]), None
        elif match := re.match(r"\s+Function : (\S+)", line):
            current = found.setdefault((short_name(match[1]), architecture), Counter())
            texts = codes.setdefault((short_name(match[1]), architecture), [])
    for key, code in codes.items():
        if found[key]["HGMMA"] and (count := overwritten(code)):
            found[key]["OVERWRITTEN"] = count
    return found


def overwritten(code: Sequence[tuple[int, str]]) -> int:
    """How many asynchronous products have registers of their operand A written before any wait, on some way.

    The hardware reads A while the product runs, and nvcc 13.0 does not always keep its registers until then: where
    what was loaded was A as it came, it loaded the next numbers over it, and sums were wrong on a GPU alone.

    Args:
        code: a kernel's instructions with their addresses.
    """
    place = {address: index for index, (address, _) in enumerate(code)}
    writes = [written(text) for _, text in code]
    count = 0
    for index, (_, text) in enumerate(code):
        product = re.match(r"(?:@\S+ )?HGMMA\S* R\d+, R(\d+), gdesc", text)
        if product is None:
            continue
        operand = set(range(int(product[1]), int(product[1]) + 4))
        waiting, seen = [index + 1], set()
        while waiting:
            at = waiting.pop()
            if at in seen or at >= len(code):
                continue
            seen.add(at)
            text = code[at][1]
            if "WARPGROUP.DEPBAR" in text:
                continue
            if operand & writes[at]:
                count += 1
                break
            jump = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)
            if jump and int(jump[1], 16) in place:
                waiting.append(place[int(jump[1], 16)])
            if not re.match(r"(BRA|EXIT|RET|BRX)\b", text):
                waiting.append(at + 1)
    return count


def written(text: str) -> set[int]:
    """The numbers of the registers that an instruction writes.

    >>> sorted(written("@P0 LDG.E.128 R76, desc[UR16][R76.64]")), written("STS.128 [R2], R4"), written("BAR.SYNC 0x0")
    ([76, 77, 78, 79], set(), set())
    """
    match = re.match(r"(?:@\S+\s+)?([A-Z0-9_.]+)\s+(?:!?U?PT?\d*, )*R(\d+)\b", text)
    if match is None or match[1].startswith(("HGMMA", "ISETP", "FSETP", "PLOP3", "R2UR", "BAR", "RED", "ST")):
        return set()
    size = 4 if ".128" in match[1] else 2 if re.search(r"\.64|\.WIDE|^CS2R$", match[1]) else 1
    return set(range(int(match[2]), int(match[2]) + size))


def read_resources(text: str) -> dict[Key, Resources]:
    """What each kernel takes, from the output of `cuobjdump -res-usage`."""
    found: dict[Key, Resources] = {}
    architecture, name = 0, ""
    for line in text.splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            architecture = int(match[1])
        elif match := re.search(r"Function (\S+):", line):
            name = short_name(match[1])
        elif match := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            found[name, architecture] = Resources(*map(int, match.groups()))
    return found


def read_objects(folder: Path, jobs: int) -> tuple[dict[Key, Counter[str]], dict[Key, Resources]]:
    """The machine code and the resources of every kernel in a folder's object files."""
    tool = find_tool("cuobjdump")
    if tool is None:
        sys.exit("gates.py: cuobjdump was not found: pip install -r requirements/cuda.txt")
    paths = sorted(map(str, folder.glob("*.o")))
    code: dict[Key, Counter[str]] = {}
    resources: dict[Key, Resources] = {}
    with ThreadPoolExecutor(jobs) as pool:
        for part in pool.map(lambda path: read_code(run(tool, "-sass", path)), paths):
            code.update(part)
        for figures in pool.map(lambda path: read_resources(run(tool, "-res-usage", path)), paths):
            resources.update(figures)
    return code, resources


# ---- the gates ----


def made_for(kernel: str, architecture: int) -> bool:
    """Whether there is machine code of a kernel for an architecture."""
    return architecture == 90 or "_wgmma " not in kernel


def check(
    code: Mapping[Key, Counter[str]],
    resources: Mapping[Key, Resources],
    shapes: Mapping[str, tuple[int, int]],
    fitting: Mapping[Key, int],
) -> list[str]:
    """What is wrong, a line each.

    Args:
        code: how often each operation stands in each kernel on each architecture.
        resources: what a thread of each takes.
        shapes: the tiled kernels' threads and bytes of shared memory to a block.
        fitting: how many blocks of each tiled kernel fit on a multiprocessor.
    """
    architectures = sorted({architecture for _, architecture in code})
    failures = [] if architectures else ["no machine code"]
    for kernel in shapes:
        for architecture in architectures:
            if made_for(kernel, architecture) and (kernel, architecture) not in code:
                failures.append(f"{kernel} on sm_{architecture}: listed, but not in the machine code")
    for (kernel, architecture), operations in sorted(code.items()):
        where = f"{kernel} on sm_{architecture}"
        words = kernel.split()
        tiled = words[0].removesuffix("_wgmma") in TILED
        if tiled and kernel not in shapes:
            failures.append(f"{where}: in the machine code, but not listed (list_kernels.cc)")
        failures += [f"{where}: {op}, local memory" for op in ("LDL", "STL") if operations[op]]
        used = resources.get((kernel, architecture))
        if used is None:
            failures.append(f"{where}: no figures of its registers")
        elif used.stack or used.local:
            failures.append(f"{where}: {used.stack} bytes of stack, {used.local} of local memory")
        if not tiled:
            continue
        if operations["CALL"]:
            failures.append(f"{where}: CALL, a function that was not inlined")
        doubles = sorted(op for op in operations if DOUBLE.match(op))
        if "double" not in words and doubles:
            failures.append(f"{where}: {', '.join(doubles)}, double precision")
        needed = set() if words[0] in ("moments", "moments_plain", "channels_last") else {"LDGSTS"}
        if words[0].endswith("_wgmma"):
            needed |= {"HGMMA"}
            if 2 * operations["WAIT_ALL"] > operations["HGMMA"]:
                failures.append(f"{where}: {operations['WAIT_ALL']} waits for all products, which run one by one")
            if operations["OVERWRITTEN"]:
                failures.append(f"{where}: {operations['OVERWRITTEN']} products whose operand is overwritten meanwhile")
        elif needed and words[1] in ("bfloat16", "float16", "tf32"):
            needed |= {"HMMA"} if words[1] == "tf32" and "rows" in words else {"HMMA", "LDSM"}
        failures += [f"{where}: no {op}" for op in sorted(needed) if not operations[op]]
        if kernel in shapes and fitting[kernel, architecture] == 0:
            failures.append(f"{where}: a block needs more than a multiprocessor has")
    return failures


def occupancy(
    program: Path, resources: Mapping[Key, Resources], shapes: Mapping[str, tuple[int, int]]
) -> dict[Key, int]:
    """How many blocks of each tiled kernel fit on a multiprocessor."""
    asked = [key for key in resources if key[0] in shapes]
    lines = []
    for kernel, architecture in asked:
        threads, shared = shapes[kernel]
        lines.append(f"{architecture} {resources[kernel, architecture].registers} {threads} {shared}\n")
    return dict(zip(asked, map(int, run(str(program), given="".join(lines)).split()), strict=True))


# ---- the tables ----


def tables(
    compiler: str,
    code: Mapping[Key, Counter[str]],
    resources: Mapping[Key, Resources],
    shapes: Mapping[str, tuple[int, int]],
    fitting: Mapping[Key, int],
) -> list[str]:
    """The lines of kernels.txt: what the tiled kernels take, then what they consist of."""
    architectures = sorted({architecture for _, architecture in code})
    lines = [f"# nvcc {compiler}; registers a thread, blocks a multiprocessor"]
    lines.append("kernel".ljust(WIDTH) + "threads  shared" + "".join(f"sm_{a}".rjust(11) for a in architectures))
    lines.append(" " * (WIDTH + 15) + "".join("reg blocks".rjust(11) for _ in architectures))
    for kernel, (threads, shared) in shapes.items():
        cells = [
            f"{resources[kernel, a].registers:>5} {fitting[kernel, a]:>5}"
            if made_for(kernel, a)
            else f"{'-':>5} {'-':>5}"
            for a in architectures
        ]
        lines.append(f"{kernel:<{WIDTH}}{threads:>7} {shared:>7}" + "".join(cells))
    lines += ["", "# instructions"]
    head = "".join(name.rjust(7) for name, _ in COUNTED)
    lines.append("kernel".ljust(WIDTH) + "".join(f"sm_{a}".rjust(len(head)) for a in architectures))
    lines.append(" " * WIDTH + head * len(architectures))
    for kernel in shapes:
        row = f"{kernel:<{WIDTH}}"
        for architecture in architectures:
            if not made_for(kernel, architecture):
                row += "-".rjust(7) * len(COUNTED)
                continue
            operations = code[kernel, architecture]
            for _, names in COUNTED:
                count = sum(number for name, number in operations.items() if names is None or name in names)
                row += f"{count:>7}"
        lines.append(row)
    return lines


def compare(written: Sequence[str], lines: Sequence[str]) -> tuple[list[str], str]:
    """The lines that differ from the committed tables, and why nothing was compared, or ''."""
    if not written or written[0] != lines[0]:
        return [], f"the tables are of another compiler ({written[0] if written else 'none'}), so they are not compared"
    if written[1] != lines[1]:
        return [], "the tables are of other architectures, so they are not compared"
    old, new = by_row(written), by_row(lines)
    changed = [f"changed: {line}\n  was:   {old.get(row, '')}" for row, line in new.items() if old.get(row) != line]
    return changed + [f"gone: {line}" for row, line in old.items() if row not in new], ""


def by_row(lines: Sequence[str]) -> dict[tuple[bool, str], str]:
    """The lines of both tables by table and kernel."""
    second = next((number for number, line in enumerate(lines) if number and line.startswith("#")), len(lines))
    return {(number >= second, line[:WIDTH].strip()): line for number, line in enumerate(lines)}


def main() -> int:
    """Runs the gates; the exit status is 0 if all hold."""
    parser = argparse.ArgumentParser(description="Checks the GPU's machine code.")
    parser.add_argument("--build", type=Path, required=True, help="a build tree with PNN_CUDA and PNN_TESTS")
    parser.add_argument("--kernels", type=Path, required=True, help="the program cuda_list_kernels of any build tree")
    parser.add_argument("--nvcc", default="nvcc", help="the compiler that it was made with")
    parser.add_argument("--jobs", type=int, default=2, help="how many disassemblers at once")
    parser.add_argument("--write", action="store_true", help="write the tables anew instead of comparing with them")
    options = parser.parse_args()

    shapes = {}
    for line in run(str(options.kernels)).splitlines():
        name, threads, shared = line.split("\t")
        shapes[name] = (int(threads), int(shared))
    code, resources = read_objects(options.build / "cuda", options.jobs)
    fitting = occupancy(options.build / "tests/cuda_occupancy", resources, shapes)
    failures = check(code, resources, shapes, fitting)
    if all((kernel, a) in fitting for kernel in shapes for _, a in code if made_for(kernel, a)):
        lines = tables(compiler(options.nvcc), code, resources, shapes, fitting)
        print("\n".join(lines))
        if options.write:
            TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")
        else:
            changed, note = compare(TABLE.read_text(encoding="utf-8").splitlines(), lines)
            failures += changed
            if note:
                print(f"gates.py: {note}")
    print("\n".join(failures))
    bad = {failure.split(":")[0] for failure in failures}
    kernels = [f"{kernel} on sm_{architecture}" for kernel, architecture in code]
    print(f"{len([name for name in kernels if name not in bad])} passed, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
