"""Builds the project and runs its tests, tier by tier, quick ones first; `make test` and `make check` call it.

    python tests/run.py                 every tier
    python tests/run.py --quick         the tiers of `make check`
    python tests/run.py c asan          these tiers
    python tests/run.py build           builds alone: libpnn, the operators for this Python's PyTorch, the C tests

Each tier streams its output; at the end stand a table (tier, passed, failed, skipped, seconds) and, as the last line,
'N passed, N failed, N skipped' over all of them. The exit status is 0 only if no test failed and every tier ran one.

Only the standard library is used. The interpreter that runs this file is the one whose PyTorch the operators are built
for; nothing is installed into it: the tests find the package through PYTHONPATH and the libraries through
TORCH_PNN_LIBRARY_DIR.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "cuda"))

import gates  # noqa: E402

CMAKE_NEEDED = (3, 30)
NVCC_NEEDED = (13, 0)
NVCC_MISSING = "it needs nvcc 13.0 or newer (CUDA_HOME names its toolkit, else /usr/local/cuda, else the PATH has it)"
# What PNN_MAX_ISA may name, and how /proc/cpuinfo says that the processor has it.
ISAS = {
    "portable": frozenset[str](),
    "avx2": frozenset({"avx2", "fma", "f16c"}),
    "avx512": frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "f16c"}),
    "neon": frozenset({"asimd"}),
}


@dataclass
class Counts:
    """How many tests ended in which way."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __iadd__(self, other: Counts) -> Counts:
        self.passed += other.passed
        self.failed += other.failed
        self.skipped += other.skipped
        return self

    def __str__(self) -> str:
        text = f"{self.passed} passed, {self.failed} failed"
        return f"{text}, {self.skipped} skipped" if self.skipped else text


@dataclass
class Result:
    """What a tier did: its counts, its wall time in seconds and what to say about it in the table."""

    tier: str
    counts: Counts
    seconds: float
    note: str = ""


class BuildError(Exception):
    """A step before the tests failed; the message says which, its output has been shown."""


def read_junit(path: Path) -> Counts:
    """Counts the test cases of a JUnit file, as ctest and pytest write it.

    Args:
        path: the file. One that is missing or cut off counts as one failure, since its runner died.

    Returns:
        The counts; an error counts as a failure, a case that did not run as skipped.
    """
    try:
        cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return Counts(failed=1)
    counts = Counts()
    for case in cases:
        status = case.get("status", "run")  # ctest: run, fail, notrun, disabled
        if case.find("failure") is not None or case.find("error") is not None or status == "fail":
            counts.failed += 1
        elif case.find("skipped") is not None or status in ("notrun", "disabled"):
            counts.skipped += 1
        else:
            counts.passed += 1
    return counts


def summary(results: Sequence[Result]) -> tuple[list[str], bool]:
    """The closing lines and whether all is well.

    Returns:
        The table's lines, ending in the line of totals, and False if a test failed or a tier passed none.
    """
    width = max([len(result.tier) for result in results] + [4])
    lines = [f"{'tier':<{width}}  {'passed':>7}  {'failed':>7}  {'skipped':>7}  {'seconds':>8}"]
    total = Counts()
    for result in results:
        counts, note = result.counts, result.note
        if counts.passed + counts.failed == 0:
            counts = Counts(failed=1, skipped=counts.skipped)
            note = "ran no test, which counts as a failure" + (f"; {note}" if note else "")
        total += counts
        row = f"{result.tier:<{width}}  {counts.passed:>7}  {counts.failed:>7}  {counts.skipped:>7}"
        lines.append(f"{row}  {result.seconds:>8.1f}  {note}".rstrip())
    if not results:
        total.failed = 1
        lines.append("no tier ran, which counts as a failure")
    lines.append(str(total))
    return lines, total.failed == 0


def quiet_ctest(line: str) -> bool:
    """Whether a line of ctest's says nothing but that a test started or passed."""
    return bool(
        re.match(r"\s*Start\s+\d+: |\s*\d+/\d+ Test\s+#\d+: .*[\s.](Passed|\*\*\*Skipped)\s|^\s*$", line)
        or re.match(r"Test project |Label Time Summary|\S+\s+=\s+[0-9.]+ sec\*proc", line)
        or re.match(r"The following tests did not run|\s*\d+ - .*\(Skipped\)", line)
    )


class Machine:
    """The tools and folders that the tiers use."""

    def __init__(self, build: Path, jobs: int, verbose: bool) -> None:
        self.build = build
        self.jobs = jobs
        self.verbose = verbose
        self.python = Path(sys.executable)
        self.prefix: list[str] = []  # put before every command that is run

    # ---- running things ----

    def run(
        self,
        command: Sequence[str | Path],
        environment: dict[str, str] | None = None,
        hide: Callable[[str], bool] | None = None,
    ) -> int:
        """Runs a command in the project's root and shows its output line by line, but for what `hide` drops.

        Returns:
            The exit status.
        """
        arguments = [*self.prefix, *(str(part) for part in command)]
        print(f"$ {' '.join(arguments)}", flush=True)
        if hide is None or self.verbose:
            done = subprocess.run(arguments, cwd=ROOT, env={**os.environ, **(environment or {})}, check=False)
            return done.returncode
        process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        for line in process.stdout:
            if not hide(line):
                print(line, end="", flush=True)
        return process.wait()

    def must(self, what: str, command: Sequence[str | Path], hide: Callable[[str], bool] | None = None) -> None:
        """Runs a step without which the tier can't go on.

        Raises:
            BuildError: it failed.
        """
        if self.run(command, hide=hide) != 0:
            raise BuildError(f"{what} failed")

    # ---- tools ----

    def tool(self, name: str, minimum: tuple[int, ...] = ()) -> Path:
        """Finds cmake, ctest or ninja: beside the interpreter, then on PATH, else in an environment of their own.

        Raises:
            BuildError: not found, and pip could not install it below build/.
        """
        # Not resolved: a virtual environment's interpreter is a link, and the tools stand beside the link.
        for folder in (self.python.parent, None, ROOT / "build" / "tools" / "bin"):
            found = shutil.which(name, path=str(folder) if folder else None)
            if found and version_of(found) >= minimum:
                return Path(found)
        tools = ROOT / "build" / "tools"
        wanted = f"{name} {'.'.join(map(str, minimum))} or newer" if minimum else name
        print(f"no {wanted} found: installing CMake and Ninja into {tools}", flush=True)
        self.must("making build/tools", [self.python, "-m", "venv", tools])
        self.must(
            "installing CMake and Ninja", [tools / "bin" / "pip", "install", "-q", "-r", "requirements/build.txt"]
        )
        found = shutil.which(name, path=str(tools / "bin"))
        if found is None:
            raise BuildError(f"{name} is not in {tools}/bin after installing it")
        return Path(found)

    # ---- building ----

    @contextlib.contextmanager
    def locked(self, tree: Path) -> Iterator[None]:
        """Keeps two runs from building in the same folder at once."""
        tree.parent.mkdir(parents=True, exist_ok=True)
        with open(tree.parent / f".{tree.name}.lock", "w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                print(f"{tree} is being built by another run; waiting for it", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def build_tree(self, preset: str, tree: Path, options: Sequence[str] = (), targets: Sequence[str] = ()) -> None:
        """Configures (only when something changed) and builds one CMake preset in `tree`.

        Raises:
            BuildError: CMake or the compiler failed.
        """
        cmake = self.tool("cmake", CMAKE_NEEDED)
        ninja = self.tool("ninja")
        with self.locked(tree):
            wanted = [f"-DCMAKE_MAKE_PROGRAM={ninja}", *options]
            stamp = tree / "configured.txt"
            presets = (ROOT / "CMakePresets.json").read_text(encoding="utf-8")
            key = "\n".join([str(cmake), preset, *wanted, presets])
            if not ((tree / "build.ninja").exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == key):
                # A tree that another compiler or interpreter configured is not worth mending.
                self.must(f"configuring {tree.name}", [cmake, "--fresh", "--preset", preset, "-B", tree, *wanted])
                stamp.write_text(key, encoding="utf-8")
            target = ["--target", *targets] if targets else []
            self.must(f"building {tree.name}", [cmake, "--build", tree, "-j", str(self.jobs), *target])

    def build_dev(self) -> None:
        """Builds libpnn, the operators for this interpreter's PyTorch, and the C tests."""
        self.build_tree("dev", self.build, [f"-DPython_EXECUTABLE={self.python}"])

    def build_operators(self) -> None:
        """Builds the operators alone; beside a CUDA build of PyTorch, where nvcc is, the CUDA half too.

        That is tier cuda's, where it has been built, else for one architecture.
        """
        options = ["-DPNN_TESTS=OFF", "-DPNN_SHARED=OFF", "-DPNN_CUDA=AUTO", "-DPNN_CUDA_ARCHITECTURES=90"]
        compiled = ROOT / "build" / "cuda"
        if (compiled / "lib" / "libpnn_cuda.a").exists():
            with self.locked(compiled):
                self.must("building cuda", [self.tool("ninja"), "-C", compiled, "pnn_cuda"])
            options.append(f"-DPNN_CUDA_OBJECTS={compiled / 'cuda'}")
        self.build_tree("dev", self.build, [f"-DPython_EXECUTABLE={self.python}", *options])

    # ---- the runners ----

    def ctest(self, tree: Path, name: str, environment: dict[str, str] | None = None, *more: str) -> Counts:
        """Runs the tests of a tree."""
        junit = self.results() / f"{name}.xml"
        junit.unlink(missing_ok=True)
        command = [self.tool("ctest", CMAKE_NEEDED), "--test-dir", tree, "-j", str(self.jobs), "--output-on-failure"]
        status = self.run([*command, "--no-tests=error", "--output-junit", junit, *more], environment, quiet_ctest)
        counts = read_junit(junit)
        if status != 0 and counts.failed == 0:
            counts.failed = 1
        return counts

    def pytest(self, name: str, arguments: Sequence[str], environment: dict[str, str] | None = None) -> Counts:
        """Runs Python tests, a file at a time on each core, against the source tree and the build tree's libraries."""
        missing = [
            module
            for module in (
                "pytest",
                "xdist",
                "hypothesis",
                "mpmath",
                "numpy",
                "scipy",
                "sklearn",
                "matplotlib",
                "tqdm",
                "yaml",
            )
            if importlib.util.find_spec(module) is None
        ]
        if missing:
            raise BuildError(
                f"{self.python} lacks {', '.join(missing)}: install them there "
                "(pip install -r requirements/run.txt -r requirements/test.txt), or let `make test` make its own .venv"
            )
        junit = self.results() / f"{name}.xml"
        junit.unlink(missing_ok=True)
        status = self.run(
            [
                *(self.python, "-m", "pytest", "-q", "-ra", "--durations=10", f"--junitxml={junit}"),
                # A worker that a test ended (by a crash, by hanging) is not started again: it would run the test again.
                *("-n", str(self.jobs), "--dist=loadfile", "--max-worker-restart=0", *arguments),
            ],
            {
                "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait leave the cores to the other workers
                "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]),
                "TORCH_PNN_LIBRARY_DIR": str(self.build / "lib"),
                "TORCH_PNN_REQUIRE_OPS": "1",
                "TORCH_PNN_BUILD_DIR": str(self.build),
                **(environment or {}),
            },
        )
        counts = read_junit(junit)
        if status not in (0, 5) and counts.failed == 0:  # 5: no test was collected
            counts.failed = 1
        return counts

    def counting(self, command: Sequence[str | Path]) -> Counts:
        """Runs a check whose last line is 'N passed, N failed', and shows its output."""
        print(f"$ {' '.join(map(str, command))}", flush=True)
        done = subprocess.run(
            [str(part) for part in command], cwd=ROOT, check=False, stdout=subprocess.PIPE, text=True, errors="replace"
        )
        print(done.stdout, end="", flush=True)
        ended = re.search(r"^(\d+) passed, (\d+) failed\Z", done.stdout.rstrip(), re.MULTILINE)
        counts = Counts(*map(int, ended.groups())) if ended else Counts()
        if done.returncode != 0 and counts.failed == 0:
            counts.failed = 1
        return counts

    def results(self) -> Path:
        """The folder of the runners' JUnit files."""
        folder = self.build / "results"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def isa(self, wanted: str | None) -> str:
        """The instruction set that the library takes under PNN_MAX_ISA=wanted (None: unset)."""
        environment = {key: value for key, value in os.environ.items() if key != "PNN_MAX_ISA"}
        if wanted is not None:
            environment["PNN_MAX_ISA"] = wanted
        program = self.build / "tests" / "print_isa"
        return subprocess.run([program], env=environment, check=True, capture_output=True, text=True).stdout.strip()


def version_of(program: str, pattern: str = r"(\d+)\.(\d+)") -> tuple[int, ...]:
    """The version that a program prints first, or () where it does not run (a pyenv shim of nothing, for example)."""
    try:
        output = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    match = re.search(pattern, output)
    return (int(match.group(1)), int(match.group(2))) if match else ()


def find_nvcc() -> Path | None:
    """The CUDA compiler, where cmake/cuda.cmake looks for it too; None where there is none, or an older one."""
    roots = filter(None, [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"])
    places = os.pathsep.join([*(str(Path(root) / "bin") for root in roots), os.environ.get("PATH", "")])
    found = shutil.which("nvcc", path=places)
    if found is None or version_of(found, r"release (\d+)\.(\d+)") < NVCC_NEEDED:
        return None
    return Path(found)


def processor_flags() -> set[str]:
    """What the kernel says that this processor has; empty where there is no /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return set(match.group(1).split()) if match else set()


def processor_isas() -> list[str]:
    """The instruction sets of ISAS that this processor has and the kernel offers; best last."""
    flags = processor_flags()
    return [name for name, needed in ISAS.items() if needed <= flags]


# ---- the tiers ----

Tier = Callable[[Machine], "tuple[Counts, str]"]


def tier_c(machine: Machine) -> tuple[Counts, str]:
    """The C tests, the public header in every language standard, the layers, the CMake package."""
    machine.build_dev()
    # The CUDA kernels on the CPU are tier coverage's, and tier asan's.
    return machine.ctest(machine.build, "c", None, "-LE", "^cuda$"), f"on {machine.isa(None)}"


def tier_asan(machine: Machine) -> tuple[Counts, str]:
    """The C tests, and the CUDA kernels on the CPU, under the address and undefined-behaviour sanitizers."""
    tree = ROOT / "build" / "asan"
    options, note = [], ""
    if "avx512" in processor_isas() and "avx512_bf16" not in processor_flags():
        # Nothing else runs the kernels on pairs here.
        options, note = ["-DPNN_EMULATE_PAIRS=ON"], "with emulated bfloat16 dot products"
    machine.build_tree("asan", tree, options)
    # What compares values over schedules, tiles and bounds goes where other tests go, bfloat16 where float16 does, and
    # normalisation by asynchronous products in float16 where TF32's does: together they would take more than half of
    # the time. For the same reason layer_test.cc runs asynchronous products once for a case here (its kValues).
    values = (
        "cuda: .*(EveryScheduleGivesTheSameBits|TheTileDoesNotMatter|BoundedErrors|Wavefronts|LargeTiles|bfloat16$"
        "|Wgmma.*Normalised/float16)"
    )
    environment = {"UBSAN_OPTIONS": "print_stacktrace=1"}
    return machine.ctest(tree, "asan", environment, "-L", "^(c|cuda)$", "-E", values), note


def tier_python(machine: Machine) -> tuple[Counts, str]:
    """The quick Python tests and the docstrings' examples."""
    machine.build_dev()
    return machine.pytest("python", ["-m", "not slow"]), torch_version()


def tier_isa(machine: Machine) -> tuple[Counts, str]:
    """The C tests again on each instruction set that the machine has, but for tier c's."""
    machine.build_dev()
    counts = Counts()
    ran = [machine.isa(None)]
    for name in processor_isas():
        taken = machine.isa(name)
        if taken != name:
            print(f"this processor has {name}, and PNN_MAX_ISA={name} runs {taken}")
            counts.failed += 1
        elif name not in ran:
            print(f"instruction set {name}:")
            counts += machine.ctest(machine.build, f"isa-{name}", {"PNN_MAX_ISA": name}, "-L", "^c$")
            ran.append(name)
    return counts, "with tier c: " + ", ".join(ran)


def tier_tsan(machine: Machine) -> tuple[Counts, str]:
    """The C tests that use threads under the thread sanitizer: Clang's where it can be had, else GCC's."""
    preset = "tsan-clang" if shutil.which("clang++-19") and clang_has_tsan() else "tsan"
    tree = ROOT / "build" / preset
    if preset == "tsan" and subprocess.run(["setarch", "-R", "true"], capture_output=True, check=False).returncode == 0:
        # GCC 12's runtime wants its fixed places in the address space, which randomisation can take away. Building
        # runs the tests too, to list them.
        machine.prefix = ["setarch", "-R"]
    try:
        names = [f"{name}_test" for name in ("errors", "masks", "promises", "threads")]
        machine.build_tree(preset, tree, (), names)
        environment = {"TSAN_OPTIONS": "halt_on_error=1"}
        return machine.ctest(tree, "tsan", environment, "-L", "^c$", "-R", f"^({'|'.join(names)})"), preset
    finally:
        machine.prefix = []


def tier_qemu(machine: Machine) -> tuple[Counts, str]:
    """The same bits on emulated processors: 64-bit Arm with NEON, x86-64 without AVX2, without AVX-512."""
    machine.build_dev()
    command = [str(ROOT / "tests" / "qemu.sh"), str(machine.build)]
    print(f"$ {' '.join(command)}", flush=True)
    environment = {**os.environ, "PYTHON": str(machine.python)}
    done = subprocess.run(command, env=environment, check=False, stdout=subprocess.PIPE, text=True, errors="replace")
    print(done.stdout, end="", flush=True)
    counts = Counts(
        passed=len(re.findall(r"^ok ", done.stdout, re.MULTILINE)),
        failed=len(re.findall(r"^FAILED ", done.stdout, re.MULTILINE)),
    )
    if done.returncode != 0 and counts.failed == 0:
        counts.failed = 1
    return counts, done.stdout.splitlines()[-1] if done.returncode == 77 else ""


def tier_slow(machine: Machine) -> tuple[Counts, str]:
    """The slow Python tests: networks, compilers, C++ programs, packaging."""
    machine.build_dev()
    return machine.pytest("slow", ["-m", "slow"]), torch_version()


def tier_operators(machine: Machine) -> tuple[Counts, str]:
    """All Python tests, on a build of the operators alone (CUDA's too, where it can be): for a further PyTorch."""
    machine.build_operators()
    # Studies, and what does not depend on PyTorch: the core's values, this repository's own programs.
    elsewhere = "ablation cli packaging runner benchmarks cuda_predictions exact_bfloat16 first_results gpu_check"
    names = " and ".join(f"not {name}" for name in elsewhere.split())
    return machine.pytest("operators", ["-k", names]), torch_version()


def tier_zoo(machine: Machine) -> tuple[Counts, str]:
    """Other people's models and tools (requirements/zoo.txt) with our layer inside; builds the operators alone."""
    machine.build_operators()
    return machine.pytest("zoo", ["tests/zoo"]), torch_version()


def tier_cuda(machine: Machine) -> tuple[Counts, str]:
    """The CUDA half for every architecture: gates on its machine code, its steps counted, its CMake package; no GPU."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError(NVCC_MISSING)
    if gates.find_tool("cuobjdump") is None or gates.find_tool("nvdisasm") is None:
        raise BuildError(
            f"nvcc is here, and cuobjdump or nvdisasm is not: {machine.python} -m pip install -r requirements/cuda.txt"
        )
    machine.build_dev()  # has the list of kernels, from the same sources run on the CPU
    tree = ROOT / "build" / "cuda"
    targets = ["pnn", "pnn_static", "pnn_cuda", "cuda_occupancy"]
    machine.build_tree("cuda", tree, [f"-DPNN_NVCC={nvcc}"], targets)
    kernels = machine.build / "tests" / "cuda_list_kernels"
    counts = machine.ctest(tree, "cuda", None, "-L", "^package$")
    counts += machine.counting(
        [machine.python, "tests/cuda/gates.py", "--build", tree, "--nvcc", nvcc, "--kernels", kernels]
    )
    counts += machine.counting([machine.python, "tests/cuda/steps.py", "--build", tree, "--nvcc", nvcc])
    return counts, "nvcc " + ".".join(map(str, version_of(str(nvcc), r"release (\d+)\.(\d+)")))


def tier_coverage(machine: Machine) -> tuple[Counts, str]:
    """The CUDA kernels on the CPU, counting lines: each line of cuda/ must be run (needs GCC and its gcov)."""
    machine.build_dev()
    for data in machine.build.rglob("*.gcda"):  # of an earlier run; building lists the tests, which counts too
        data.unlink()
    tests = machine.ctest(machine.build, "coverage", None, "-L", "^cuda$")
    counts = machine.counting([machine.python, "tests/cuda/coverage.py", "--build", machine.build])
    counts += tests
    return counts, "tests, and files of cuda/"


TIERS: dict[str, Tier] = {
    "c": tier_c,
    "asan": tier_asan,
    "python": tier_python,
    "cuda": tier_cuda,
    "coverage": tier_coverage,
    "isa": tier_isa,
    "tsan": tier_tsan,
    "qemu": tier_qemu,
    "slow": tier_slow,
    "operators": tier_operators,
    "zoo": tier_zoo,
}
QUICK = ("c", "python")
FULL = ("c", "python", "asan", "coverage", "isa", "tsan", "qemu", "cuda", "slow")


def torch_version() -> str:
    """The PyTorch of this interpreter, for the table."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"PyTorch {version('torch')}"
    except PackageNotFoundError:
        return "PyTorch of unknown version"


def clang_has_tsan() -> bool:
    """Whether clang-19 can link a program with its thread sanitizer (Debian: libclang-rt-19-dev)."""
    command = ["clang++-19", "-fsanitize=thread", "-x", "c++", "-", "-o", "/dev/null"]
    return subprocess.run(command, input=b"int main() {}", capture_output=True, check=False).returncode == 0


def can_emulate() -> bool:
    """Whether the tools of tests/qemu.sh are here; they are large, so the full run goes on without them."""
    return all(map(shutil.which, ("qemu-aarch64", "qemu-x86_64", "aarch64-linux-gnu-g++")))


def run_tiers(machine: Machine, tiers: dict[str, Tier]) -> list[Result]:
    """Runs tiers in their order; a failed build is one failure of its tier, and the next tier goes on."""
    results = []
    for name, tier in tiers.items():
        print(f"\n==== {name}: {(tier.__doc__ or name).strip().splitlines()[0]}", flush=True)
        start = time.monotonic()
        try:
            counts, note = tier(machine)
        except BuildError as error:
            print(f"error: {error}", flush=True)
            counts, note = Counts(failed=1), str(error)
        results.append(Result(name, counts, time.monotonic() - start, note))
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for; the exit status is 0 if all went well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tiers", nargs="*", metavar="tier", help=f"build, or of: {', '.join(TIERS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help=f"the tiers {', '.join(QUICK)}")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "dev", help="the build folder (build/dev)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many compilers or tests at once")
    parser.add_argument("--verbose", action="store_true", help="show tests that pass, too")
    parsed = parser.parse_args(arguments)
    unknown = [name for name in parsed.tiers if name not in TIERS and name != "build"]
    if unknown:
        parser.error(f"no such tier: {', '.join(unknown)}; there are build, {', '.join(TIERS)}")
    machine = Machine((ROOT / parsed.build).absolute(), parsed.jobs, parsed.verbose)

    if parsed.tiers == ["build"]:
        try:
            machine.build_dev()
        except BuildError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(
            f"built in {machine.build}; use it with "
            f"PYTHONPATH={ROOT / 'python'} TORCH_PNN_LIBRARY_DIR={machine.build / 'lib'}"
        )
        return 0

    names = parsed.tiers or (QUICK if parsed.quick else FULL)
    if not parsed.tiers and "qemu" in names and not can_emulate():
        print("tier qemu is left out: it needs qemu-user and g++-aarch64-linux-gnu (Debian)", flush=True)
        names = tuple(name for name in names if name != "qemu")
    if not parsed.tiers and "cuda" in names and find_nvcc() is None:
        print(f"tier cuda is left out, the GPU's machine code is not looked at: {NVCC_MISSING}", flush=True)
        names = tuple(name for name in names if name != "cuda")
    results = run_tiers(machine, {name: TIERS[name] for name in names if name != "build"})
    lines, good = summary(results)
    print("\n" + "\n".join(lines), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
