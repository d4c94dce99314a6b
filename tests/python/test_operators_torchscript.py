"""A scripted model in a C++ program without Python: the same bits, and training (tests/cpp_torchscript)."""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path

import pytest
import torch
from cpp_support import build, output_of
from operators_support import needs_derivatives

import torch_pnn
from torch_pnn import _library

pytestmark = [
    pytest.mark.slow,
    needs_derivatives,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, built against the installed operators as a stranger would."""
    return build("cpp_torchscript", tmp_path_factory.mktemp("cpp_torchscript")) / "program"


def small(norm: bool) -> torch.nn.Module:
    """Two layers with stride, groups, several masks, with or without normalisation inside, and a linear end."""
    return torch.nn.Sequential(
        torch_pnn.PerturbConv2d(3, 8, 3, padding=1, masks=2, noise="waves", seed=5),
        torch_pnn.PerturbConv2d(8, 8, 3, padding=1, stride=2, groups=2, norm=norm, seed=6, downsample="subsample"),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 4),
    )


def mixed() -> torch.nn.Module:
    """Pooling, borders, trained and held masks, and the LBC module."""
    return torch.nn.Sequential(
        torch_pnn.PerturbConv2d(3, 6, 3, 2, padding=2, padding_mode="reflect", activation="gelu", seed=5),
        torch_pnn.PerturbConv2d(6, 6, 3, padding=1, masks=2, mask_size=(6, 5), train_masks=True, activation="silu"),
        torch_pnn.LBConv2d(6, 4, seed=3, activation="tanh"),
        torch.nn.Flatten(),
    )


MODELS = {
    "plain": lambda: small(False),
    "norm": lambda: small(True),
    "mixed": mixed,
    "network": lambda: torch_pnn.models.noise_resnet18(width=4, preset="juefeix2018"),
}


def scripted(model: torch.nn.Module, x: torch.Tensor) -> torch.jit.ScriptModule:
    return torch.jit.script(copy.deepcopy(model))


def traced(model: torch.nn.Module, x: torch.Tensor) -> torch.jit.ScriptModule:
    return torch.jit.trace(copy.deepcopy(model).train(), x, check_trace=False)


@pytest.mark.parametrize(
    ("name", "way"),
    [("plain", scripted), ("norm", scripted), ("mixed", scripted), ("network", scripted), ("plain", traced)],
)
def test_a_scripted_model_runs_and_trains_without_python(program: Path, tmp_path: Path, name: str, way) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    way(model, torch.randn(4, 3, 9, 8)).save(str(tmp_path / "model.pt"))
    # PyTorch's own convolutions don't survive a fork: the models of our layers alone are run in a child, too.
    forked = name in ("plain", "norm")
    data = {"forked": torch.tensor(forked), "input": torch.randn(4, 3, 9, 8)}
    data |= {"rate": torch.tensor(0.1, dtype=torch.float64), "steps": torch.tensor(3)}
    with torch.no_grad():
        data["expected"] = copy.deepcopy(model).eval()(data["input"])
    for step in range(3):
        x = data["input"].clone().requires_grad_()
        model.train()(x).square().mean().backward()
        if step == 0:
            data["input_gradient"] = x.grad
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= parameter.grad * 0.1
                parameter.grad = None
    data |= {f"parameter.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    torch.save(data, tmp_path / "data.pt")
    said = output_of(program, tmp_path / "model.pt", tmp_path / "data.pt")
    assert "WRONG" not in said and said.count("ok ") >= 11 + forked, said
    assert "ok    no Python is loaded" in said and "ok    still no Python is loaded" in said
    assert f"on {_library.status().isa}" in said


def test_wrong_files_end_in_an_error(program: Path, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"no model")
    done = subprocess.run([program, tmp_path / "model.pt", tmp_path / "none.pt"], capture_output=True, timeout=60)
    assert done.returncode == 3 and done.stderr


def test_the_libraries_do_not_need_python() -> None:
    status = _library.status()
    for path in (status.ops_path, status.autograd_path):
        needed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
        assert "libpython" not in needed and "libtorch_python" not in needed and "cuda" not in needed
        assert "libtorch_cpu.so" in needed
        assert "RUNPATH" not in needed and "RPATH" not in needed
