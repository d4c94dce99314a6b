"""Static gates on the GPU's machine code: what its kernels must contain, must not contain, and what they occupy.

    python tests/cuda/gates.py --objects build/x/cuda --kernels build/x/tests/cuda_list_kernels
    python tests/cuda/gates.py ... --write     writes the table anew

For every architecture in the object files, no kernel may use local memory (LDL, STL: spilled registers). The tiled
kernels may not call functions (CALL; before sm_90 the compiler also writes one that jumps over the next instruction,
where the threads of a warp meet again: that one is none) nor, unless they compute in double, use double precision
(DFMA, DADD, DMUL, DSETP); those of 16-bit types and TF32 must use the tensor cores (HMMA) and ldmatrix (LDSM; not TF32
where neither operand has its depth in a row); all must copy asynchronously (LDGSTS), but for the moments', which need
no tile. A block of each must fit on every multiprocessor. The
kernels of finish.cu, of which there is one thread per channel, output or weight, may do all but spill. (nvcc itself
refuses spills in a build with warnings as errors.)

Registers, shared memory and the blocks that fit on a multiprocessor are printed as a table, which must equal
tests/cuda/kernels.txt: a change is to be looked at, then written with --write. Registers depend on the compiler, so the
table is compared for the nvcc that it names.

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
from pathlib import Path

TABLE = Path(__file__).with_name("kernels.txt")
TILED = ("forward", "input_gradient", "weight_gradient", "moments")
DOUBLE = re.compile(r"^D(FMA|ADD|MUL|SETP|MNMX)$")
# Of a multiprocessor: shared memory in KiB, threads, blocks (CUDA C++ programming guide, technical specifications).
MULTIPROCESSOR = {
    80: (164, 2048, 32),
    86: (100, 1536, 16),
    89: (100, 1536, 24),
    90: (228, 2048, 32),
    100: (228, 2048, 32),
    120: (100, 1536, 24),
}
REGISTERS = 65536


def find_tool(name: str) -> str:
    """The path of a CUDA tool: on the PATH, in the toolkit, or in this Python's nvidia packages."""
    places = [os.environ.get("PATH", "")]
    places += [str(Path(root) / "bin") for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if root]
    places += sorted(str(path) for path in Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/bin"))
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        sys.exit(f"gates.py: {name} was not found: pip install -r requirements/cuda.txt")
    return found


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
        parts.append(next(kind for code, kind in kinds.items() if arguments.startswith(code)))
        if "5LargeI" in arguments:
            parts.append("Large")
        elif "5SmallE" in arguments:
            parts.append("Small")
        order = re.search(r"FastestE(\d)E", arguments)
        if order:
            parts.append("rows" if order[1] == "1" else "depth")
    return " ".join(parts)


def run(tool: str, *arguments: str) -> str:
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([str(Path(find_tool("nvdisasm")).parent), environment.get("PATH", "")])
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True, env=environment).stdout


def opcodes(objects: Path) -> dict[tuple[str, int], set[str]]:
    """(kernel, architecture) -> the operations in its machine code."""
    jump = re.compile(r"/\*([0-9a-f]+)\*/.*CALL\.REL\.NOINC 0x([0-9a-f]+) ;")
    found: dict[tuple[str, int], set[str]] = {}
    for path in sorted(objects.glob("*.o")):
        architecture, current = 0, None
        for line in run(find_tool("cuobjdump"), "-sass", str(path)).splitlines():
            if match := re.search(r"code for sm_(\d+)", line):
                architecture = int(match[1])
            elif match := re.search(r"Function : (\S+)", line):
                current = found.setdefault((short_name(match[1]), architecture), set())
            elif current is not None and (
                match := re.search(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", line)
            ):
                to = jump.search(line)
                if to is None or int(to[2], 16) != int(to[1], 16) + 32:
                    current.add(match[1])
    return found


def registers(objects: Path) -> dict[tuple[str, int], int]:
    """(kernel, architecture) -> registers of a thread."""
    found: dict[tuple[str, int], int] = {}
    for path in sorted(objects.glob("*.o")):
        architecture, name = 0, ""
        for line in run(find_tool("cuobjdump"), "-res-usage", str(path)).splitlines():
            if match := re.search(r"arch = sm_(\d+)", line):
                architecture = int(match[1])
            elif match := re.search(r"Function (\S+):", line):
                name = short_name(match[1])
            elif match := re.search(r"REG:(\d+)", line):
                found[name, architecture] = int(match[1])
    return found


def blocks(architecture: int, used: int, threads: int, shared: int) -> int:
    """Blocks that fit on a multiprocessor: registers come in 256 a warp, a block's shared memory costs 1 KiB more."""
    memory, most_threads, most_blocks = MULTIPROCESSOR[architecture]
    warps = threads // 32
    by_registers = REGISTERS // (-(-used * 32 // 256) * 256 * warps)
    by_memory = memory * 1024 // (-(-shared // 128) * 128 + 1024)
    return min(by_registers, by_memory, most_threads // threads, most_blocks)


def check(found: dict[tuple[str, int], set[str]]) -> list[str]:
    failures = []
    for (kernel, architecture), operations in sorted(found.items()):
        where = f"{kernel} on sm_{architecture}"
        for operation in ("LDL", "STL"):
            if operation in operations:
                failures.append(f"{where}: {operation}, local memory")
        words = kernel.split()
        if words[0] not in TILED:
            continue
        if "CALL" in operations:
            failures.append(f"{where}: CALL, a function that was not inlined")
        if "double" not in words and (doubles := sorted(op for op in operations if DOUBLE.match(op))):
            failures.append(f"{where}: {', '.join(doubles)}, double precision")
        needed = {"LDGSTS"} if words[0] != "moments" else set()
        if words[0] != "moments" and words[1] in ("bfloat16", "float16", "tf32"):
            needed |= {"HMMA", "LDSM"} if words[1] != "tf32" or words[-1] != "rows" else {"HMMA"}
        failures += [f"{where}: no {operation}" for operation in sorted(needed - operations)]
    return failures


def table(used: dict[tuple[str, int], int], shapes: dict[str, tuple[int, int]]) -> list[str]:
    architectures = sorted({architecture for _, architecture in used})
    head = "kernel".ljust(36) + "threads  shared" + "".join(f"sm_{a}".rjust(11) for a in architectures)
    lines = [head, " " * 51 + "".join("reg blocks".rjust(11) for _ in architectures)]
    for kernel, (threads, shared) in shapes.items():
        cells = []
        for architecture in architectures:
            count = used[kernel, architecture]
            cells.append(f"{count:>5} {blocks(architecture, count, threads, shared):>5}")
        lines.append(f"{kernel:<36}{threads:>7} {shared:>7}" + "".join(cells))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks the GPU's machine code.")
    parser.add_argument("--objects", type=Path, required=True, help="the folder of the compiled cuda/*.o")
    parser.add_argument("--kernels", type=Path, required=True, help="the program list_kernels")
    parser.add_argument("--nvcc", default="nvcc", help="the compiler they were made with")
    parser.add_argument("--write", action="store_true", help="write the table anew instead of comparing with it")
    options = parser.parse_args()

    version = re.search(r"release [\d.]+, V([\d.]+)", run(options.nvcc, "--version"))
    heading = f"# nvcc {version[1] if version else 'unknown'}; registers a thread, blocks a multiprocessor"
    shapes = {}
    for line in run(str(options.kernels)).splitlines():
        name, threads, shared = line.split("\t")
        shapes[name] = (int(threads), int(shared))
    found = opcodes(options.objects)
    kinds = {kernel for kernel, _ in found}
    failures = [f"{name}: listed, but not in the machine code" for name in shapes if name not in kinds]
    if not found or failures:
        print("\n".join(failures) or f"gates.py: no machine code in {options.objects}")
        return 1
    failures += check(found)
    used = registers(options.objects)
    for (kernel, architecture), count in used.items():
        if kernel in shapes and blocks(architecture, count, *shapes[kernel]) == 0:
            failures.append(f"{kernel} on sm_{architecture}: needs more than a multiprocessor has")
    lines = [heading, *table(used, shapes)]
    print("\n".join(lines))
    if options.write:
        TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        written = TABLE.read_text(encoding="utf-8").splitlines()
        if written[0] != heading:
            print(f"gates.py: the table is of another compiler ({written[0]}), so it is not compared")
        elif written[1] != lines[1]:
            print("gates.py: the table is of other architectures, so it is not compared")
        else:
            failures += [
                f"changed: {new}\n  was:   {old}" for old, new in zip(written, lines, strict=True) if old != new
            ]
    print(f"{len(found)} kernels on {len({a for _, a in found})} architectures, {len(failures)} failures")
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
