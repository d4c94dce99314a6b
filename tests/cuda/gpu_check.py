"""`make gpu-check`: everything that needs a GPU, in one run of ten minutes; writes one JSON and prints tables.

    python tests/cuda/gpu_check.py                        all phases
    python tests/cuda/gpu_check.py bits reference         these alone (and what they need built)
    python tests/cuda/gpu_check.py --out results.json --budget 500
    python tests/cuda/gpu_check.py --built                with the programs in --build, which another machine has built

Needs a GPU, PyTorch 2.11 or newer with CUDA, CMake, Ninja and nvcc 13; no network, no test framework. The phases:

  build      the operators and the check programs, for this GPU's architecture alone
  bits       a list of calls against the same kernels run on the CPU in Hopper's arithmetic (results.cc), bit by bit,
             and 100 times over: every run must give the same bits
  sanitizer  these calls under compute-sanitizer's memcheck, racecheck, initcheck and synccheck
  reference  the operators against float64 on the CPU, with a bound for each element: every type, layout, kind of mask
  device     what else is promised on a GPU: streams, CUDA graphs, batch splits, exact sums, more than 2^31 elements
  kernels    each kernel's own time in the same cases, by PyTorch's profiler, with and without normalisation
  timings    the cases of benchmarks/ and larger ones, forward and forward + backward, in CUDA graphs with the L2 cache
             flushed, beside the plain composition, torch.compile, cuDNN's 1x1 and 3x3 convolutions, a copy and cuBLAS,
             with peak memory, and beside what predictions.py says; bfloat16 without allow_wgmma, too

Each phase has its share of the budget and a process of its own, which is ended when its time is up; what it has found
by then is kept, a phase that fails or crashes does not stop the next ones, and the JSON is written after each.

Exit status: 0 = every phase ran and passed; 1 = a phase failed, crashed or did not finish (a missed speed target is
told, and is no failure); 2 = no GPU, nothing was checked; 3 = something to build with is missing.

`--rehearse` runs all of it on the CPU, with stand-ins for the GPU and for compute-sanitizer, tiny sizes, and the
programs of an existing build tree (--build): so that no mistake in these files waits for the machine with the GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import gpu_report

ROOT = Path(__file__).resolve().parents[2]
WORK = Path(__file__).with_name("gpu_work.py")
# The most seconds of each phase; what one does not need is the next one's, as far as the whole budget goes.
SHARES = {"build": 200, "bits": 200, "sanitizer": 120, "reference": 90, "device": 60, "kernels": 60, "timings": 600}
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
REPETITIONS = 100
TARGETS = ("torch_pnn_libraries", "cuda_results_host", "cuda_results_device")
PROGRAMS = (
    "lib/libtorch_pnn_ops.so",
    "lib/libtorch_pnn_cuda.so",
    "tests/cuda_results_host",
    "tests/cuda_results_device",
)
"""What the later phases need of them, below --build."""


# ---- what is here ----


def count_gpus() -> int:
    """The number of GPUs that the CUDA driver shows; 0 without a driver. (Asking PyTorch takes seconds.)"""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    number = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(number)) != 0:
        return 0
    return number.value


def find_tool(name: str) -> str | None:
    """A tool beside this interpreter, on the PATH, or in the CUDA toolkit."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    places += [str(Path(root) / folder) for root in roots if root for folder in ("bin", "compute-sanitizer")]
    return shutil.which(name, path=os.pathsep.join(places))


class Check:
    """One run: where things are, how much time is left, and what has been found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.folder: Path = options.build.absolute()
        self.out: Path = options.out.absolute()
        self.rehearse: bool = options.rehearse
        self.built: bool = options.built
        self.end = time.monotonic() + options.budget
        self.results: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "rehearsal": self.rehearse,
            "phases": {},
        }

    def seconds(self, most: float) -> float:
        """What a step may take: `most`, or what is left of the budget."""
        return max(0.0, min(most, self.end - time.monotonic()))

    def write(self) -> None:
        """Writes the JSON and the tables beside it, whole or not at all."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        for path, text in (
            (self.out, json.dumps(self.results, indent=1) + "\n"),
            (self.out.with_suffix(".md"), gpu_report.report(self.results)),
        ):
            half = path.with_name(path.name + ".part")
            half.write_text(text, encoding="utf-8")
            half.replace(path)

    def run(self, command: Sequence[str | Path], seconds: float, **environment: str) -> tuple[int | None, str]:
        """Runs a program in a process group of its own, all of which is ended when its time is up.

        Returns:
            Its exit status, None where its time was up; and its output, standard error's too.
        """
        # Into a file: a process of the group that lives on would keep a pipe open.
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
            process = self.start(command, log, **environment)
            status = self.wait(process, seconds)
            log.seek(0)
            return status, log.read()

    @staticmethod
    def start(command: Sequence[str | Path], log: IO[str], **environment: str) -> subprocess.Popen[str]:
        """Starts a program in a process group of its own."""
        return subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    @staticmethod
    def wait(process: subprocess.Popen[str], seconds: float) -> int | None:
        """Waits for a program; its exit status, or None where its time was up and its group was ended."""
        try:
            return process.wait(timeout=max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None

    def environment(self) -> dict[str, str]:
        """For processes that import torch_pnn."""
        return {
            "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "TORCH_PNN_LIBRARY_DIR": str(self.folder / "lib"),
            "TORCH_PNN_REQUIRE_OPS": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.out.parent / "inductor-cache"),
        }

    def work(self, phase: str, seconds: float, *arguments: str) -> dict[str, Any]:
        """Runs a phase of gpu_work.py and returns what it has written, finished or not."""
        part = self.out.with_name(f"{self.out.stem}-{phase}.part.json")
        part.unlink(missing_ok=True)
        part.parent.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            str(WORK),
            phase,
            "--out",
            str(part),
            "--seconds",
            f"{seconds * 0.9:.0f}",
            *arguments,
        ]
        if self.rehearse:
            command.append("--rehearse")
        status, output = self.run(command, seconds, **self.environment())
        print(output, end="", flush=True)
        found: dict[str, Any] = json.loads(part.read_text(encoding="utf-8")) if part.exists() else {}
        part.unlink(missing_ok=True)
        if status != 0:
            ended = "its time was up" if status is None else f"exit status {status}"
            found |= {"passed": False, "error": f"{ended}: {output[-3000:]}"}
        return found


# ---- the phases ----


def build(check: Check, seconds: float) -> dict[str, Any]:
    """Builds for this GPU alone, or looks whether all is there that was built elsewhere."""
    if check.built:
        missing = [name for name in PROGRAMS if not (check.folder / name).is_file()]
        return {"passed": not missing} | ({"error": f"{check.folder} lacks {', '.join(missing)}"} if missing else {})
    device = check.results["device"]
    switches = {
        "CMAKE_BUILD_TYPE": "Release",
        "PNN_TORCH": "ON",
        "PNN_CUDA": "ON",
        "PNN_SHARED": "OFF",
        "PNN_GPU_CHECK": "ON",
        "PNN_CUDA_ARCHITECTURES": device["architecture"],
        "Python_EXECUTABLE": sys.executable,
        "CMAKE_MAKE_PROGRAM": find_tool("ninja") or "ninja",
    }
    defines = [f"-D{name}={value}" for name, value in switches.items()]
    cmake = find_tool("cmake") or "cmake"
    steps = [
        [cmake, "-S", str(ROOT), "-B", str(check.folder), "-G", "Ninja", *defines],
        [cmake, "--build", str(check.folder), "-j", str(os.cpu_count() or 1), "--target", *TARGETS],
    ]
    if check.rehearse:  # what is built there already
        steps = [[cmake, "-N", str(check.folder)]]
    started = time.monotonic()
    for step in steps:
        status, output = check.run(step, seconds - (time.monotonic() - started))
        if status != 0:
            return {"passed": False, "error": f"{' '.join(step)} ended with {status}:\n{output[-6000:]}"}
    return {"passed": True}


def programs(check: Check) -> tuple[Path, Path]:
    """The program that runs the calls on the host, and the one that runs them on the device."""
    host = check.folder / "tests" / "cuda_results_host"
    return host, host if check.rehearse else check.folder / "tests" / "cuda_results_device"


def differences(host: str, device: str) -> list[str]:
    """What differs between the lines of the two programs: 'call 3: grad_input'."""
    ours, theirs = host.split("\n"), device.split("\n")
    different = [] if len(ours) == len(theirs) else [f"{len(theirs)} lines, the host has {len(ours)}"]
    for line, other in zip(ours, theirs):
        fields, others = line.split(), other.split()
        if fields[::2] != others[::2]:
            different.append(f"'{other[:60]}', the host has '{line[:60]}'")
            continue
        different += [
            f"call {fields[1]}: {fields[i]}" for i in range(2, len(fields), 2) if fields[i + 1] != others[i + 1]
        ]
    return different


def bits(check: Check, seconds: float) -> dict[str, Any]:
    """The device's lines against the host's, which promise to agree on Hopper; then the device's again and again."""
    host, device = programs(check)
    found: dict[str, Any] = {"expected_equal": check.results["device"]["architecture"] == "90"}
    arguments = ["1", "small"] if check.rehearse else []
    status, expected = check.run([host, *arguments], seconds / 2)
    if status != 0:
        return found | {"passed": False, "error": f"the host's program ended with {status}: {expected[-1000:]}"}
    status, lines = check.run([device, *arguments], seconds / 4)
    if status != 0:
        return found | {"passed": False, "error": f"the device's program ended with {status}: {lines[-1000:]}"}
    found["calls"] = len(expected.splitlines())
    found["different_from_host"] = differences(expected, lines)
    repeated = ["3", "small"] if check.rehearse else [str(REPETITIONS)]
    status, output = check.run([device, *repeated], seconds / 2)
    found["repetitions"] = 3 if check.rehearse else REPETITIONS
    found["same_bits_every_time"] = status == 0
    if status != 0:
        found["error"] = f"repeated, the device's program ended with {status}: {output[-1000:]}"
    wrong = bool(found["different_from_host"]) and found["expected_equal"]
    return found | {"passed": status == 0 and not wrong and found["calls"] > 0}


def sanitizer(check: Check, seconds: float) -> dict[str, Any]:
    """The four tools side by side, on the tiny calls."""
    tool = find_tool("compute-sanitizer")
    # The stand-in takes the same arguments and runs the program.
    start = ["sh", "-c", 'shift 4; exec "$@"', "sh"] if check.rehearse else [tool or ""]
    if not check.rehearse and tool is None:
        return {"passed": False, "error": "compute-sanitizer was not found"}
    program = programs(check)[1]
    end = time.monotonic() + seconds
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        started = {}
        for name in TOOLS:
            log = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace"))
            command = [*start, "--tool", name, "--error-exitcode", "9", str(program)]
            command += ["1", "small"] if check.rehearse else []
            started[name] = check.start(command, log), log
        for name, (process, log) in started.items():
            status = check.wait(process, end - time.monotonic())
            log.seek(0)
            text = log.read()
            # A tool that cannot attach may let the program pass: its summary must be there.
            summary = re.search(r"ERROR SUMMARY: 0 errors|SUMMARY: 0 hazards displayed", text)
            ended = "its time was up" if status is None else f"exit status {status}"
            said = "\n".join(line for line in text.splitlines() if line.startswith("=====")) or text
            found[name] = "clean" if status == 0 and (summary or check.rehearse) else f"{ended}: {said[:2000]}"
    return found | {"passed": all(found[name] == "clean" for name in TOOLS)}


def timings(check: Check, seconds: float) -> dict[str, Any]:
    """Warms torch.compile's cache up in processes of their own, since a compilation takes seconds, then times."""
    started = time.monotonic()
    workers = 2 if check.rehearse else max(1, min(8, (os.cpu_count() or 1) // 2))
    notes = []
    with contextlib.ExitStack() as stack:
        warming = []
        for i in range(workers):
            log = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace"))
            command = [sys.executable, WORK, "compile", "--part", f"{i}/{workers}", "--seconds", f"{seconds * 0.3:.0f}"]
            command += ["--rehearse"] if check.rehearse else []
            process = check.start(command, log, TORCHINDUCTOR_COMPILE_THREADS="1", **check.environment())
            warming.append((process, log))
        for process, log in warming:
            status = check.wait(process, seconds * 0.35 - (time.monotonic() - started))
            log.seek(0)
            if status != 0:
                notes.append(f"{'its time was up' if status is None else status}: {log.read()[-500:]}")
    compiling = round(time.monotonic() - started, 1)
    found = check.work("timings", seconds - (time.monotonic() - started))
    return {"compiling_seconds": compiling, "compiling_notes": notes, **found}


PHASES: dict[str, Callable[[Check, float], dict[str, Any]]] = {
    "build": build,
    "bits": bits,
    "sanitizer": sanitizer,
    "reference": lambda check, seconds: check.work("reference", seconds),
    "device": lambda check, seconds: check.work("device", seconds),
    "kernels": lambda check, seconds: check.work("kernels", seconds),
    "timings": timings,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the phases; returns the exit status."""
    parser = argparse.ArgumentParser(description="Checks and times the CUDA half on a GPU.")
    parser.add_argument("phases", nargs="*", help=f"of {', '.join(PHASES)} (default: all)")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "gpu", help="the build folder")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-check.json", help="where the results go")
    parser.add_argument("--budget", type=float, default=580, help="seconds that all of it may take (580)")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with stand-ins: tests these files alone")
    parser.add_argument("--built", action="store_true", help="build nothing: --build holds it, for this architecture")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.phases if name not in PHASES]
    if unknown:
        parser.error(f"no such phase: {', '.join(unknown)}; there are {', '.join(PHASES)}")

    if not options.rehearse and count_gpus() == 0:
        print("no GPU: the CUDA driver shows none, so nothing was checked")
        return 2
    check = Check(options)
    needed = (
        {"cmake": "CMake 3.30", "ninja": "Ninja", "nvcc": "nvcc 13.0"}
        if not (options.rehearse or options.built)
        else {}
    )
    missing = [text for name, text in needed.items() if find_tool(name) is None]
    if missing:
        print(f"gpu-check needs {', '.join(missing)}, beside {sys.executable}, on the PATH or in CUDA_HOME")
        return 3
    probe = check.work("probe", check.seconds(90))
    if "device" not in probe:
        check.results["error"] = probe.get("error", "")
        check.write()
        print(f"gpu-check: {probe.get('reason', 'PyTorch cannot use the GPU')}; nothing was checked")
        return 2 if probe.get("reason", "").startswith("no GPU") else 3
    check.results |= {key: probe[key] for key in ("device", "versions")}
    print(f"{probe['device']['name']}; {probe['versions']}", flush=True)

    names = ["build", *(name for name in PHASES if name in (options.phases or PHASES) and name != "build")]
    failed = []
    for name in names:
        # A rehearsal runs on whatever else the processor does.
        seconds = check.seconds(SHARES[name] * (10 if options.rehearse else 1))
        print(f"\n==== {name} ({seconds:.0f} s at most)", flush=True)
        started = time.monotonic()
        if seconds < 3:
            found: dict[str, Any] = {"passed": False, "error": "no time was left for it"}
        elif name != "build" and not check.results["phases"]["build"]["passed"]:
            found = {"passed": False, "error": "the build failed"}
        else:
            try:
                found = PHASES[name](check, seconds)
            except Exception:  # whatever it was, the next phases go on
                found = {"passed": False, "error": traceback.format_exc()[-3000:]}
        found["seconds"] = round(time.monotonic() - started, 1)
        check.results["phases"][name] = found
        if not found.get("passed"):
            failed.append(name)
        print(gpu_report.phase_line(name, found), flush=True)
        check.write()
    print("\n" + gpu_report.report(check.results))
    print(f"{'FAILED: ' + ', '.join(failed) if failed else 'passed'}; results in {check.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
