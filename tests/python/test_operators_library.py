"""Loading the compiled libraries, and what stands in where they are missing, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from operators_support import OPS, needs_compiled, needs_derivatives

from torch_pnn import _library

ROOT = Path(__file__).resolve().parents[2]

USE = """
import torch, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from torch_pnn import _library
texts = [str(w.message) for w in caught if "torch_pnn" in str(w.message)]
ops, status = torch.ops.torch_pnn, _library.status()
torch.manual_seed(0)
x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
weight = torch.randn(4, 6, 1, 1, dtype=torch.float64, requires_grad=True)
mask = torch.randn(3, 2, 5, 4, dtype=torch.float64, requires_grad=True)
seed = torch.tensor([3])
plain = lambda x, w, n: ops.perturb_conv2d(x, w, None, n, None, 2, activation="gelu", stride=[1, 2])
norm = lambda x, w: ops.perturb_norm_conv2d(x, w, *[None] * 6, seed, masks=2, activation="tanh")[0]
"""

CHECK = """
assert torch.autograd.gradcheck(plain, (x, weight, mask))
assert torch.autograd.gradgradcheck(plain, (x, weight, mask))
assert torch.autograd.gradcheck(norm, (x, weight))
assert torch.autograd.gradgradcheck(norm, (x, weight))
with torch.autocast("cpu", dtype=torch.bfloat16):
    y = ops.perturb_conv2d(x.float(), weight.float(), None, None, seed, 2)
assert y.dtype == torch.bfloat16
y.float().sum().backward()
assert x.grad is not None and weight.grad is not None
narrow = x.detach().float().to(memory_format=torch.channels_last)
assert ops.perturb_conv2d(narrow, weight.detach().float(), None, None, seed, 2).is_contiguous(
    memory_format=torch.channels_last)
compiled = torch.compile(lambda *v: plain(*v) * 2, backend="aot_eager", fullgraph=True)
inputs = [v.detach().requires_grad_() for v in (x, weight, mask)]
compiled(*inputs).sum().backward()
again = [v.detach().requires_grad_() for v in (x, weight, mask)]
(plain(*again) * 2).sum().backward()
for a, b in zip(inputs, again):
    torch.testing.assert_close(a.grad, b.grad)
for bad in ({"noise": "pink"}, {"groups": 2}, {"input": x.detach().to_sparse()}, {"input": x.detach().to(torch.int32)}):
    try:
        ops.perturb_conv2d(**({"input": x.detach(), "weight": weight.detach(), "seed": seed, "masks": 2} | bad))
    except RuntimeError as error:
        assert "torch_pnn::perturb_conv2d: " in str(error) or "torch_pnn: " in str(error), error
    else:
        raise AssertionError(f"{bad} was not refused")
print("all well")
"""


def run(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script with the libraries of a folder."""
    clean = {n: v for n, v in os.environ.items() if not n.startswith("TORCH_PNN_")}
    clean |= {"TORCH_PNN_LIBRARY_DIR": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "python")}
    return subprocess.run(
        [sys.executable, "-c", script], env=clean | environment, capture_output=True, text=True, timeout=300
    )


def successful(script: str, folder: Path, **environment: str) -> str:
    done = run(script, folder, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_without_libraries_the_reference_runs_and_says_so_once(tmp_path: Path) -> None:
    told = """
assert len(texts) == 1, texts
assert "could not be loaded" in texts[0] and "libtorch_pnn_ops.so is not in" in texts[0], texts
assert "TORCH_PNN_REQUIRE_OPS" in texts[0]
assert status.ops == "reference" and status.autograd == "python" and status.isa == "none", status
assert "libtorch_pnn_ops.so is not in" in status.ops_error
with warnings.catch_warnings():
    warnings.simplefilter("error")
    plain(x, weight, mask)
"""
    assert "all well" in successful(USE + told + CHECK, tmp_path)


def test_a_broken_library_is_named_in_the_loaders_words(tmp_path: Path) -> None:
    (tmp_path / _library.OPS_FILE).write_bytes(b"not a library, whatever its name says; " * 10)
    told = """
assert status.ops == "reference"
assert "invalid ELF header" in texts[0] and "invalid ELF header" in status.ops_error, texts
"""
    successful(USE + told, tmp_path)


def test_a_required_library_that_is_missing_is_an_error(tmp_path: Path) -> None:
    done = run("import torch_pnn._library", tmp_path, TORCH_PNN_REQUIRE_OPS="1")
    assert done.returncode == 1
    assert "ImportError: torch_pnn: the compiled operators could not be loaded: libtorch_pnn_ops.so is not in" in (
        done.stderr
    )


@needs_compiled
@pytest.mark.slow
def test_without_derivatives_python_stands_in_and_says_so_once(tmp_path: Path) -> None:
    (tmp_path / _library.OPS_FILE).symlink_to(Path(_library.status().ops_path).resolve())
    told = """
assert len(texts) == 1, texts
assert "registrations from Python stand in" in texts[0] and _library.autograd_file() in texts[0], texts
assert status.ops == "loaded" and status.autograd == "python" and status.isa != "none", status
"""
    assert "all well" in successful(USE + told + CHECK, tmp_path)
    done = run("import torch_pnn._library", tmp_path, TORCH_PNN_REQUIRE_OPS="1")
    assert done.returncode == 1
    assert "ImportError: torch_pnn: the compiled derivatives could not be loaded" in done.stderr


@needs_derivatives
def test_with_both_libraries_nothing_is_said() -> None:
    told = """
assert not texts, texts
assert status.ops == "loaded" and status.autograd == "loaded", status
assert status.ops_error is None and status.autograd_error is None
"""
    successful(USE + told, Path(_library.status().ops_path).parent.resolve(), TORCH_PNN_REQUIRE_OPS="1")


@needs_compiled
def test_devices_without_kernels_run_the_reference_and_say_so_once() -> None:
    x, weight, seed = torch.randn(2, 3, 4, 5), torch.randn(4, 3, 1, 1), torch.tensor([1])
    x = x.to(memory_format=torch.channels_last)
    expected = OPS.perturb_conv2d(x, weight, None, None, seed)
    op = OPS.perturb_conv2d.default
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for key in ("XPU", "MPS", "XPU"):  # their kernels, called with tensors of the CPU
            keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
            y = op.redispatch(keys, x, weight, None, None, seed)
            assert y.stride() == expected.stride()
            torch.testing.assert_close(y, expected)
    told = [str(w.message) for w in caught if "has no kernels for the device" in str(w.message)]
    assert len(told) == 1 and "'cpu'" in told[0], told
    for wrong in (x.contiguous().to_sparse(), torch.quantize_per_tensor(x.contiguous(), 1.0, 0, torch.quint8)):
        with pytest.raises(RuntimeError, match="it should be dense"):
            op.redispatch(keys, wrong, weight, None, None, seed)
    with pytest.raises(RuntimeError, match="is on meta, it should be on cpu"):
        op.redispatch(keys, x, weight.to("meta"), None, None, seed)


def test_names_of_files() -> None:
    major, minor = torch.__version__.split(".")[:2]
    assert _library.autograd_file() == f"libtorch_pnn_autograd-{major}.{minor}.so"
    assert Path(_library.status().ops_path).name == "libtorch_pnn_ops.so"
