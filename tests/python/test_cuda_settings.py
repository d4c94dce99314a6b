"""torch_pnn.backends.cuda: settings for the whole process, which change nothing on the CPU."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import torch_pnn
from torch_pnn._library import status

SETTINGS = {"allow_tf32": False, "allow_wgmma": True}  # and what they are until someone says otherwise


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = {name: getattr(torch_pnn.backends.cuda, name) for name in SETTINGS}
    yield
    for name, value in before.items():
        setattr(torch_pnn.backends.cuda, name, value)


def results(layer: torch.nn.Module) -> list[torch.Tensor]:
    """Output and gradients of random float32 data that TF32 would round."""
    torch.manual_seed(3)
    x = torch.randn(2, 8, 9, 7, device=next(layer.parameters()).device, requires_grad=True)
    y = layer(x)
    weights = [p for p in layer.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *weights])]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", SETTINGS)
def test_is_the_default_until_the_environment_or_a_caller_says_otherwise(name: str) -> None:
    code = f"import torch_pnn; print(torch_pnn.backends.cuda.{name})"
    variable = f"TORCH_PNN_{name.upper()}"
    for value, expected in ((None, str(SETTINGS[name])), ("0", "False"), ("", str(SETTINGS[name])), ("1", "True")):
        environment = {k: v for k, v in os.environ.items() if k != variable}
        if value is not None:
            environment[variable] = value
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected, value


@pytest.mark.parametrize("name", SETTINGS)
def test_is_kept_without_the_compiled_operators_too(tmp_path: Path, name: str) -> None:
    code = (
        f"import torch_pnn; c = torch_pnn.backends.cuda; first = c.{name}; c.{name} = False;"
        f"second = c.{name}; c.{name} = True; print(first, second, c.{name})"
    )
    environment = {**os.environ, "TORCH_PNN_LIBRARY_DIR": str(tmp_path), f"TORCH_PNN_{name.upper()}": "1"}
    environment.pop("TORCH_PNN_REQUIRE_OPS", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "False", "True"]


@pytest.mark.parametrize("name", SETTINGS)
def test_is_seen_by_every_thread(name: str) -> None:
    setattr(torch_pnn.backends.cuda, name, not SETTINGS[name])
    seen = []
    thread = threading.Thread(
        target=lambda: seen.extend(getattr(torch_pnn.backends.cuda, one) for one in (name, *SETTINGS))
    )
    thread.start()
    thread.join()
    assert seen[0] is not SETTINGS[name]
    assert seen[1:] == [value ^ (one == name) for one, value in SETTINGS.items()]  # and the other one is left alone


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("value", [1, None, "True", torch.tensor(True)])
def test_refuses_what_is_not_a_bool(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=rf"{name} is .*, it should be a bool"):
        setattr(torch_pnn.backends.cuda, name, value)
    assert getattr(torch_pnn.backends.cuda, name) is SETTINGS[name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wgmma_changes_nothing_on_the_cpu(dtype: torch.dtype) -> None:
    layer = torch_pnn.PerturbConv2d(16, 40, 1, seed=5).to(dtype)
    x = torch.randn(2, 16, 4, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    allowed = layer(x)
    torch_pnn.backends.cuda.allow_wgmma = False
    assert torch.equal(layer(x), allowed)


def test_changes_nothing_on_the_cpu() -> None:
    for norm in (False, True):
        layer = torch_pnn.PerturbConv2d(8, 6, 3, padding=1, masks=2, seed=5, norm=norm)
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(layer), buffer)
        buffer.seek(0)
        scripted = torch.jit.load(buffer)
        torch_pnn.backends.cuda.allow_tf32 = False
        exact = results(layer)
        torch_pnn.backends.cuda.allow_tf32 = True
        assert same(results(layer), exact)
        assert same(results(scripted), exact)


def test_is_read_when_a_compiled_layer_runs() -> None:
    """The graph that was compiled before is the one that runs after: nothing is compiled anew."""
    layer = torch_pnn.PerturbConv2d(8, 6, 3, padding=1, seed=5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    exact = results(compiled)
    torch._dynamo.config.error_on_recompile = True
    try:
        torch_pnn.backends.cuda.allow_tf32 = True
        assert same(results(compiled), exact)
    finally:
        torch._dynamo.config.error_on_recompile = False


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.skipif(status().cuda != "loaded", reason="the CUDA half is not loaded")
def test_rounds_products_on_a_gpu() -> None:
    layer = torch_pnn.PerturbConv2d(8, 6, 3, padding=1, masks=2, seed=5).cuda()
    torch_pnn.backends.cuda.allow_tf32 = False
    exact = results(layer)
    torch_pnn.backends.cuda.allow_tf32 = True
    for ours, theirs in zip(results(layer), exact, strict=True):
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert 1e-6 < error < 1e-2
