"""`make gpu-check`: everything that needs a GPU, in one run; writes one JSON and prints tables.

    python tests/cuda/gpu_check.py                      builds for this GPU, checks, times
    python tests/cuda/gpu_check.py --skip-sanitizer --skip-timings

Needs a GPU, PyTorch 2.11 or newer with CUDA, CMake, Ninja and nvcc 13; no network, no test framework. In this order:

1. builds the operators and the check programs for this GPU's architecture;
2. compares the bits of a list of calls with the same kernels run on the CPU in Hopper's arithmetic (results.cc);
3. repeats these calls 100 times: every run must give the same bits;
4. runs them under compute-sanitizer's memcheck, racecheck, initcheck and synccheck;
5. compares the operators with the reference in float64 on random data, every type, layout and kind of mask;
6. times the cases of benchmarks/ and larger ones, in CUDA graphs with the L2 cache flushed, beside the plain
   composition, torch.compile, cuDNN's 1x1 and 3x3 convolutions, a copy and a matrix product, with peak memory.

Without a GPU it says 'no GPU' and ends with status 2: nothing was checked.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
CASES = [
    (32, 64, 56, 64, 1),
    (32, 128, 28, 128, 1),
    (32, 256, 14, 256, 1),
    (32, 512, 7, 512, 1),
    (128, 64, 32, 64, 1),
    (128, 128, 16, 128, 1),
    (8, 64, 32, 64, 16),
    (4, 64, 32, 64, 64),
    (256, 64, 56, 64, 1),
    (256, 256, 28, 256, 1),
    (64, 256, 56, 256, 4),
    (32, 512, 28, 512, 4),
]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
ULPS = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def run(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True, **options)


def build(folder: Path) -> None:
    """Builds for this GPU alone, which takes a minute or two."""
    major, minor = torch.cuda.get_device_capability()
    switches = {
        "PNN_TORCH": "ON",
        "PNN_CUDA": "ON",
        "PNN_SHARED": "OFF",
        "PNN_GPU_CHECK": "ON",
        "PNN_CUDA_ARCHITECTURES": f"{major}{minor}",
        "Python_EXECUTABLE": sys.executable,
    }
    defines = [f"-D{name}={value}" for name, value in switches.items()]
    configure = run("cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *defines)
    if configure.returncode:
        sys.exit(f"gpu_check: cmake failed:\n{configure.stdout[-2000:]}{configure.stderr[-4000:]}")
    made = run("cmake", "--build", str(folder))
    if made.returncode:
        sys.exit(f"gpu_check: the build failed:\n{made.stdout[-6000:]}")


def compare_bits(folder: Path) -> dict[str, Any]:
    """The device's lines against the host's; they promise to agree on Hopper."""
    host = run(str(folder / "tests/cuda_results_host")).stdout.splitlines()
    device = run(str(folder / "tests/cuda_results_device"))
    if device.returncode:
        return {"passed": False, "error": device.stderr[-1000:]}
    different = []
    for ours, theirs in zip(host, device.stdout.splitlines(), strict=True):
        fields, others = ours.split(), theirs.split()
        different += [
            f"call {fields[1]}: {fields[i]}" for i in range(2, len(fields), 2) if fields[i + 1] != others[i + 1]
        ]
    repeated = run(str(folder / "tests/cuda_results_device"), "100")
    hopper = torch.cuda.get_device_capability()[0] == 9
    return {
        "passed": repeated.returncode == 0 and not (hopper and different),
        "different_from_host": different,
        "expected_equal": hopper,
        "same_bits_100_times": repeated.returncode == 0,
        "error": repeated.stderr[-1000:],
    }


def sanitize(folder: Path) -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return {"passed": None, "error": "compute-sanitizer was not found"}
    results = {}
    for name in TOOLS:
        done = run(tool, "--tool", name, "--error-exitcode", "9", str(folder / "tests/cuda_results_device"))
        results[name] = "clean" if done.returncode == 0 else done.stdout[-2000:]
    return {"passed": all(text == "clean" for text in results.values()), **results}


def call(
    function: Callable[..., Any],
    dtype: torch.dtype,
    device: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    g: torch.Tensor,
    mask: torch.Tensor | None,
    options: dict[str, Any],
    layout: torch.memory_format,
) -> list[torch.Tensor]:
    """The output and the gradients of input and weight."""
    leaves = [t.to(device, dtype).to(memory_format=layout).detach().requires_grad_() for t in (x, weight)]
    if mask is None:
        source = {"seed": torch.tensor([77], device=device)}
    else:
        source = {"mask": mask.to(device, torch.float64 if dtype == torch.float64 else torch.float32)}
    y = function(*leaves, **source, **options)
    gradients = torch.autograd.grad(y, leaves, g.to(device, dtype))
    return [y.detach(), *gradients]


def compare_reference() -> dict[str, Any]:
    """Forward and backward on the device against the reference in float64 on the same numbers, on the CPU."""
    import torch_pnn
    from torch_pnn import reference

    failures, worst = [], {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for noise in ("uniform", "normal", "waves", "tensor"):
            for layout in (torch.contiguous_format, torch.channels_last):
                for channels, outputs, size, masks, groups in (
                    (16, 32, 8, 1, 1),
                    (24, 40, 7, 3, 2),
                    (130, 70, 5, 1, 1),
                ):
                    torch.manual_seed(1)
                    x = torch.randn(3, channels, size, size, dtype=dtype)
                    weight = torch.randn(outputs, channels // groups * masks, 1, 1, dtype=dtype) / 8
                    g = torch.randn(3, outputs, size, size, dtype=dtype)
                    mask = torch.rand(channels, masks, size, size) if noise == "tensor" else None
                    options: dict[str, Any] = {"level": 0.25, "groups": groups, "activation": "relu"}
                    if mask is None:
                        options |= {"noise": noise, "masks": masks}

                    arguments = (x, weight, g, mask, options, layout)
                    ours = call(torch_pnn.functional.perturb_conv2d, dtype, "cuda", *arguments)
                    exact = call(reference.perturb_conv2d, torch.float64, "cpu", *arguments)
                    for name, got, want in zip(("output", "grad_input", "grad_weight"), ours, exact, strict=True):
                        scale = want.abs().max().item() + 1
                        error = (got.cpu().double() - want).abs().max().item() / scale / ULPS[dtype]
                        key = f"{str(dtype).removeprefix('torch.')} {name}"
                        worst[key] = max(worst.get(key, 0.0), error)
                        if not error <= 64:
                            failures.append(
                                f"{key} {noise} {layout} {channels}->{outputs}: {error:.3g} units of the largest"
                            )
    return {"passed": not failures, "worst": worst, "failures": failures[:20]}


def milliseconds(function: Callable[[], Any], flush: torch.Tensor) -> float:
    """The median over replays of a CUDA graph of the call, the L2 cache flushed before each."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    times = []
    for _ in range(20):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def time_cases() -> list[dict[str, Any]]:
    import torch_pnn

    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for batch, channels, size, outputs, masks in CASES:
            x = torch.randn(batch, channels, size, size, device="cuda", dtype=dtype)
            weight = torch.randn(outputs, channels * masks, 1, 1, device="cuda", dtype=dtype) / 8
            three = torch.randn(outputs, channels, 3, 3, device="cuda", dtype=dtype) / 8
            mask = torch.rand(channels, masks, size, size, device="cuda")
            seed = torch.tensor([5], device="cuda")
            maps = batch * channels * masks * size * size

            def ours(x: Any = x, weight: Any = weight, seed: Any = seed, masks: int = masks) -> torch.Tensor:
                return torch_pnn.functional.perturb_conv2d(x, weight, seed=seed, masks=masks, level=0.1)

            def plain(x: Any = x, weight: Any = weight, mask: Any = mask) -> torch.Tensor:
                u = torch.relu(x.unsqueeze(2) + (0.1 * mask).to(x.dtype)).flatten(1, 2)
                return F.conv2d(u, weight)

            row: dict[str, Any] = {
                "case": [batch, channels, size, outputs, masks],
                "type": str(dtype).removeprefix("torch."),
            }
            row["channels_last_ms"] = milliseconds(
                lambda x=x, f=ours: f(x.to(memory_format=torch.channels_last)), flush
            )  # type: ignore[misc]
            contestants: dict[str, Callable[[], Any]] = {
                "ours": ours,
                "plain": plain,
                "compiled": torch.compile(plain, dynamic=False),
            }
            if maps <= 2**29:
                ready = torch.randn(batch, channels * masks, size, size, device="cuda", dtype=dtype)
                contestants["cudnn_1x1"] = lambda ready=ready, weight=weight: F.conv2d(ready, weight)  # type: ignore[misc]
            contestants["cudnn_3x3"] = lambda x=x, three=three: F.conv2d(x, three, padding=1)  # type: ignore[misc]
            y = torch.empty_like(x)
            contestants["copy"] = lambda x=x, y=y: y.copy_(x)  # type: ignore[misc]
            a = torch.randn(outputs, channels * masks, device="cuda", dtype=dtype)
            b = torch.randn(channels * masks, min(batch * size * size, 2**17), device="cuda", dtype=dtype)
            contestants["cublas"] = lambda a=a, b=b: a @ b  # type: ignore[misc]
            for name, function in contestants.items():
                row[f"{name}_ms"] = milliseconds(function, flush)
            x.requires_grad_()
            weight.requires_grad_()
            for name, function in (("ours", ours), ("plain", plain)):
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                output = function()
                torch.autograd.grad(output.sum(), (x, weight))
                row[f"{name}_peak_bytes"] = torch.cuda.max_memory_allocated() - before
            rows.append(row)
            print(
                "  " + "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
                flush=True,
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks and times the CUDA half on a GPU.")
    parser.add_argument("--build", type=Path, default=ROOT / "build/gpu", help="the build folder")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu-check.json", help="where the results go")
    parser.add_argument("--skip-sanitizer", action="store_true")
    parser.add_argument("--skip-timings", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        build_text = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA build"
        print(f"no GPU: PyTorch {torch.__version__} ({build_text}) sees none, so nothing was checked")
        return 2
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    build(options.build)
    os.environ["TORCH_PNN_LIBRARY_DIR"] = str(options.build / "lib")
    os.environ["TORCH_PNN_REQUIRE_OPS"] = "1"
    sys.path.insert(0, str(ROOT / "python"))
    from torch_pnn import _library

    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "cuda_half": _library.status().cuda,
    }
    steps: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("bits", lambda: compare_bits(options.build)),
        ("reference", compare_reference),
    ]
    if not options.skip_sanitizer:
        steps.insert(1, ("sanitizer", lambda: sanitize(options.build)))
    failed = results["cuda_half"] != "loaded"
    for name, step in steps:
        results[name] = step()
        failed |= results[name]["passed"] is False
        print(f"{name}: {results[name]}", flush=True)
    if not options.skip_timings:
        results["timings"] = time_cases()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{'FAILED' if failed else 'passed'}; results in {options.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
