"""`make gpu-check` as far as a machine without a GPU allows: it says so, its comparisons can fail, and a rehearsal runs
every line that the machine with the GPU will run."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from torch_pnn import functional

ROOT = Path(__file__).resolve().parents[2]
CHECK = ROOT / "tests" / "cuda" / "gpu_check.py"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "cuda" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


predictions = load("predictions")
gpu_report = load("gpu_report")
gpu_check = load("gpu_check")
gpu_work = load("gpu_work")


def options(tmp_path: Path, **more: Any) -> argparse.Namespace:
    base = {"build": tmp_path, "out": tmp_path / "out.json", "rehearse": True, "built": False, "budget": 60.0}
    return argparse.Namespace(**(base | more))


def work(tmp_path: Path) -> Any:
    return gpu_work.Work(argparse.Namespace(rehearse=True, seconds=60.0, out=tmp_path / "part.json", part=(0, 1)))


# ---- without a GPU ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_at_once(tmp_path: Path) -> None:
    started = time.monotonic()
    out = tmp_path / "out.json"
    done = subprocess.run([sys.executable, CHECK, "--out", out], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout.startswith("no GPU: ") and "nothing was checked" in done.stdout
    assert not out.exists()
    assert time.monotonic() - started < 5


def test_unknown_phases_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["timing"])
    assert "no such phase: timing; there are build, bits" in capsys.readouterr().err


# ---- the parent ----


def test_differences_are_named_by_call_and_result() -> None:
    host = "call 0 output aa grad_input bb\ncall 1 output cc\n"
    assert gpu_check.differences(host, host) == []
    assert gpu_check.differences(host, host.replace("bb", "b0")) == ["call 0: grad_input"]
    assert gpu_check.differences(host, host.replace("grad_input", "grad_mask")) != []
    assert gpu_check.differences(host, host.splitlines()[0]) != []
    assert gpu_check.differences(host, "") != []


def test_a_program_is_ended_with_its_children_when_its_time_is_up(tmp_path: Path) -> None:
    check = gpu_check.Check(options(tmp_path))
    started = time.monotonic()
    status, output = check.run(["sh", "-c", "echo begun; sleep 60 & sleep 60"], 0.5)
    assert status is None and output == "begun\n"
    assert time.monotonic() - started < 10
    assert check.run(["sh", "-c", "echo no; exit 3"], 10) == (3, "no\n")


def fake_programs(check: Any, tmp_path: Path, text: str) -> None:
    program = tmp_path / "tests" / "cuda_results_host"
    program.parent.mkdir(exist_ok=True)
    program.write_text(text, encoding="utf-8")
    program.chmod(0o755)


def test_bits_fail_where_the_device_differs_or_does_not_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = gpu_check.Check(options(tmp_path))
    check.results["device"] = {"architecture": "90"}
    fake_programs(check, tmp_path, "#!/bin/sh\necho call 0 output aa\n")
    assert gpu_check.bits(check, 10)["passed"]
    other = tmp_path / "other"
    other.write_text("#!/bin/sh\necho call 0 output ab\n", encoding="utf-8")
    other.chmod(0o755)
    monkeypatch.setattr(gpu_check, "programs", lambda check: (tmp_path / "tests" / "cuda_results_host", other))
    found = gpu_check.bits(check, 10)
    assert not found["passed"] and found["different_from_host"] == ["call 0: output"]
    check.results["device"] = {"architecture": "80"}  # only Hopper promises to agree
    assert gpu_check.bits(check, 10)["passed"]
    other.write_text('#!/bin/sh\nif [ -n "$1" ]; then echo other bits; exit 1; fi\necho call 0 output aa\n')
    found = gpu_check.bits(check, 10)
    assert not found["passed"] and "other bits" in found["error"]


def test_programs_built_elsewhere_must_be_there(tmp_path: Path) -> None:
    check = gpu_check.Check(options(tmp_path, built=True))
    found = gpu_check.build(check, 10)
    assert not found["passed"] and "lacks lib/libtorch_pnn_ops.so, " in found["error"]
    for name in gpu_check.PROGRAMS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert gpu_check.build(check, 10) == {"passed": True}


def test_sanitizer_fails_where_a_tool_finds_something_or_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "compute-sanitizer"
    monkeypatch.setattr(gpu_check, "find_tool", lambda name: str(tool))
    monkeypatch.setattr(gpu_check, "programs", lambda check: (tool, tool))
    check = gpu_check.Check(options(tmp_path, rehearse=False))
    summary = 'echo "========= ERROR SUMMARY: 0 errors"'
    hazards = 'echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"'
    for body, passed in (
        (f'if [ "$2" = racecheck ]; then {hazards}; else {summary}; fi', True),
        (f'{summary}; if [ "$2" = initcheck ]; then exit 9; fi', False),
        ('echo "========= ERROR SUMMARY: 1 error"', False),
        ("echo Device not supported", False),
        ("sleep 60", False),
    ):
        tool.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        tool.chmod(0o755)
        assert gpu_check.sanitizer(check, 1.5)["passed"] is passed, body


def test_a_phase_that_breaks_leaves_what_it_had_and_the_next_ones_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "work.py"
    script.write_text(
        "import sys\nphase, out = sys.argv[1], sys.argv[3]\n"
        'text = {\'probe\': \'{"device": {"name": "x", "architecture": "90"}, "versions": "y"}\'}\n'
        "open(out, 'w').write(text.get(phase, '{\"passed\": true, \"cases\": 7}'))\n"
        "if phase == 'reference': print('illegal memory access'); sys.exit(1)\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(gpu_check, "WORK", script)
    monkeypatch.setitem(gpu_check.PHASES, "build", lambda check, seconds: {"passed": True})
    out = tmp_path / "out.json"
    arguments = ["--rehearse", "--build", str(tmp_path), "--out", str(out), "reference", "device"]
    assert gpu_check.main(arguments) == 1
    phases = json.loads(out.read_text(encoding="utf-8"))["phases"]
    assert phases["reference"]["cases"] == 7 and not phases["reference"]["passed"]
    assert "illegal memory access" in phases["reference"]["error"]
    assert phases["device"]["passed"]
    assert "FAILED: reference; results in" in capsys.readouterr().out
    monkeypatch.setitem(gpu_check.PHASES, "build", lambda check, seconds: 1 / 0)
    assert gpu_check.main(arguments) == 1
    phases = json.loads(out.read_text(encoding="utf-8"))["phases"]
    assert "ZeroDivisionError" in phases["build"]["error"] and phases["device"]["error"] == "the build failed"
    assert gpu_check.main([*arguments, "--budget", "0"]) in (1, 3)


# ---- the comparisons ----

ONE = (torch.float32, torch.float32, (2, 6, 5, 5, 7, 2), "contiguous", "uniform", {"level": 0.25, "activation": "relu"})


@pytest.mark.slow
def test_comparison_passes_on_every_type(tmp_path: Path) -> None:
    for dtype in gpu_work.UNIT:
        for layout in ("contiguous", "channels_last"):
            for noise in ("tensor", "waves"):
                ratios = gpu_work.compare_one(work(tmp_path), dtype, dtype, ONE[2], layout, noise, ONE[5])
                assert max(ratios.values()) <= 1, (dtype, ratios)
                assert len(ratios) == (4 if noise == "tensor" else 3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(gpu_work.UNIT), ids=str)
@pytest.mark.parametrize("spoiled", ["output", "grad_input", "grad_weight"])
def test_comparison_sees_one_wrong_element(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, spoiled: str
) -> None:
    """An element that is off by a sixteenth (float64: by 1e-12) of its value, or not a number."""
    honest = functional.perturb_conv2d

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, factor: float, backward: bool) -> torch.Tensor:
            ctx.factor, ctx.backward_too = factor, backward
            return x.clone() if backward else spoil(x, factor)

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
            return spoil(g, ctx.factor) if ctx.backward_too else g, None, None

    def spoil(x: torch.Tensor, factor: float) -> torch.Tensor:
        x = x.clone()
        at = int(x.abs().flatten().argmax())
        x.view(-1)[at] *= factor
        return x

    for factor in (1 + (1e-12 if dtype == torch.float64 else 1 / 16), float("nan")):

        def broken(x: torch.Tensor, weight: torch.Tensor, factor: float = factor, **more: Any) -> torch.Tensor:
            if spoiled == "grad_input":
                x = Spoil.apply(x, factor, True)
            elif spoiled == "grad_weight":
                weight = Spoil.apply(weight, factor, True)
            y = honest(x, weight, **more)
            return Spoil.apply(y, factor, False) if spoiled == "output" else y

        monkeypatch.setattr(functional, "perturb_conv2d", broken)
        ratios = gpu_work.compare_one(work(tmp_path), dtype, dtype, *ONE[2:])
        assert not ratios[spoiled] <= 1
        assert all(ratio <= 1 for name, ratio in ratios.items() if name != spoiled)


@pytest.mark.slow
def test_device_checks_see_other_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, calls = functional.perturb_conv2d, [0]

    def drifting(x: torch.Tensor, *more: Any, **options: Any) -> torch.Tensor:
        calls[0] += 1
        y = honest(x, *more, **options)
        return y * (1 + calls[0] / 64)

    monkeypatch.setattr(functional, "perturb_conv2d", drifting)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    phase = work(tmp_path)
    gpu_work.device_phase(phase)
    assert not phase.found["passed"]
    failed = {name for name, text in phase.found["checks"].items() if text != "passed"}
    assert {"exact", "float32_is_the_cpus", "repeated", "batch_splits", "streams", "graphs", "compiled"} <= failed
    assert "masks" not in failed


# ---- tables ----


def row(**more: Any) -> dict[str, Any]:
    base = {"case": [32, 64, 56, 64, 1], "type": "bfloat16", "layout": "contiguous"}  # as a copy, at best
    return {**base, "forward ours": 10.0, "forward predicted": 6.0, "copy": 9.0, "cublas": 4.0, **more}


def test_tables_mark_missed_predictions_and_targets() -> None:
    assert "**1.67**" in "\n".join(gpu_report.predicted([row()], "forward"))
    assert "**" not in "\n".join(gpu_report.predicted([row(**{"forward predicted": 7.0})], "forward"))
    assert "**" not in "\n".join(gpu_report.compared([row()], "forward"))
    assert "**1.25**" in "\n".join(gpu_report.compared([row(copy=8.0)], "forward"))
    heavy = {"case": [64, 256, 56, 256, 4]}
    assert "**0.40**" in "\n".join(gpu_report.compared([row(**heavy)], "forward"))
    whole = {"forward+backward ours": 8.0, "forward+backward compiled": 10.0}
    assert "**0.80**" in "\n".join(gpu_report.compared([row(**whole)], "forward+backward"))
    lines = "\n".join(gpu_report.targets([row(copy=8.0, **whole), row(**heavy)]))
    assert "0 of 1" in lines and "**1.09**" in lines and "**1.38**" in lines
    slower = {"forward mma.sync": 20.0, "forward+backward mma.sync": 32.0}
    text = "\n".join(gpu_report.products([row(**whole, **slower)]))
    assert "| 20.0 | 10.0 | 0.50 | 32.0 | 8.0 | 0.25 | 0.40 |" in text  # as a copy, at best: no product's target
    assert "**0.73**" in "\n".join(gpu_report.products([row(**heavy, **slower) | {"forward ours": 5.5}]))
    assert "at least 0.75" in "\n".join(gpu_report.targets([row(**heavy)]))
    assert "at least 0.75" in "\n".join(gpu_report.targets([row(**heavy, type="tf32")]))
    assert "at least 0.75" not in "\n".join(gpu_report.targets([row(**heavy, type="float32")]))
    assert len(gpu_report.products([row()])) == 2  # a head alone
    # Nothing measured is nothing judged.
    empty = {"case": [1, 2, 3, 4, 5], "type": "bfloat16", "layout": "l"}
    kernels = {"input_gradient_kernel<Small, 1>": 3.0, "norm_kernel": 1.0, "start_kernel": 0.5}
    text = "\n".join(gpu_report.kernels([{**empty, "norm": True, "kernels_us": kernels}]))
    assert "| 1,2,3,4,5 | bfloat16 | l | yes | - | - | - | 3.0 | - | 1.5 |" in text
    assert gpu_report.targets([empty]) == [] and "-" in "\n".join(gpu_report.compared([empty], "forward"))


# ---- the rehearsal ----


@pytest.mark.slow
def test_rehearsal_runs_every_phase(tmp_path: Path) -> None:
    build = os.environ.get("TORCH_PNN_BUILD_DIR", "")
    if not Path(build, "tests", "cuda_results_host").is_file():
        pytest.skip("TORCH_PNN_BUILD_DIR names no build tree with tests")
    out = tmp_path / "out.json"
    command = [sys.executable, CHECK, "--rehearse", "--build", build, "--out", out, "--budget", "1500"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    results = json.loads(out.read_text(encoding="utf-8"))
    assert list(results["phases"]) == list(gpu_check.PHASES)
    assert all(phase["passed"] for phase in results["phases"].values())
    # Time may be up before all is compiled; an error is one.
    assert all(note.startswith("its time was up") for note in results["phases"]["timings"]["compiling_notes"])
    for found in results["phases"]["timings"]["rows"]:
        missing = {
            f"{direction} {name}"
            for direction in ("forward", "forward+backward")
            for name in ("ours", "predicted", "plain", "cudnn 1x1", "cudnn 3x3")
        }
        missing |= {"peak_bytes ours", "peak_bytes plain"}
        if found["layout"] == "contiguous":
            missing |= {"copy", "cublas", "forward compiled", "forward+backward compiled"}
        assert missing - found.keys() == set()
    text = out.with_suffix(".md").read_text(encoding="utf-8")
    assert "A rehearsal on the CPU" in text and "measured beside predicted" in text
    assert sorted(path.name for path in tmp_path.iterdir() if ".part" in path.name) == []
