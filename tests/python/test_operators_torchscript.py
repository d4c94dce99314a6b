"""A scripted model in a C++ program without Python: the same bits, and training (tests/cpp_torchscript)."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operators_support import needs_derivatives

import torch_pnn
from torch_pnn import _library

SOURCE = Path(__file__).resolve().parents[1] / "cpp_torchscript"

pytestmark = [
    pytest.mark.slow,
    needs_derivatives,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def tool(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def output_of(*command: object) -> str:
    # The program finds its libraries by itself, as a user's would.
    environment = {n: v for n, v in os.environ.items() if n not in ("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH")}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, (
        f"{command[0]} failed ({done.returncode}):\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, built against the installed operators as a stranger would."""
    folder = tmp_path_factory.mktemp("cpp_torchscript")
    cmake = tool("cmake")
    libraries = Path(_library.status().ops_path).resolve().parent
    if (libraries.parent / "CMakeCache.txt").exists():  # a build tree: install the operators' package from it
        output_of(cmake, "--install", libraries.parent, "--component", "torch_pnn", "--prefix", folder / "prefix")
        where = f"-DCMAKE_PREFIX_PATH={folder / 'prefix'}"
    else:  # the Python package carries it
        where = f"-Dtorch_pnn_DIR={libraries.parent / 'share/cmake/torch_pnn'}"
    output_of(
        *(cmake, "-S", SOURCE, "-B", folder / "build", "-DCMAKE_BUILD_TYPE=Debug", where),
        f"-DTORCH_PNN_TORCH_ROOT={Path(torch.__file__).parent}",
    )
    output_of(cmake, "--build", folder / "build")
    return folder / "build" / "program"


def model_of(norm: bool) -> torch.nn.Module:
    """Two layers with stride, groups, several masks, with or without normalisation inside, and a linear end."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch_pnn.PerturbConv2d(3, 8, 3, padding=1, masks=2, noise="waves", seed=5),
        torch_pnn.PerturbConv2d(8, 8, 3, padding=1, stride=2, groups=2, norm=norm, seed=6, downsample="subsample"),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 4),
    )


@pytest.mark.parametrize("norm", [False, True])
def test_a_scripted_model_runs_and_trains_without_python(program: Path, tmp_path: Path, norm: bool) -> None:
    model = model_of(norm)
    torch.jit.script(model).save(str(tmp_path / "model.pt"))
    data = {"input": torch.randn(4, 3, 9, 8), "rate": torch.tensor(0.1, dtype=torch.float64), "steps": torch.tensor(3)}
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
    assert "WRONG" not in said and said.count("ok ") >= 12, said
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
