"""`pip install .` as a stranger runs it: what the wheel carries, and that it works where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def clean_environment(folder: Path) -> dict[str, str]:
    """The environment without anything that points at the checkout or at its build."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("TORCH_PNN_", "PYTHONPATH"))}
    tools = [str(Path(sys.executable).parent), str(ROOT / "build" / "tools" / "bin"), environment.get("PATH", "")]
    return {**environment, "PATH": os.pathsep.join(tools), "TMPDIR": str(folder)}


def run(command: list[str | Path], folder: Path, more: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=clean_environment(folder) | (more or {}),
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that nothing that lies about in the checkout helps or hinders."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    left_out = shutil.ignore_patterns("build", ".venv*", ".git", "runs", "dist", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, ignore=left_out)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder / "dist")]
    # As build/dev has them, below a base of their own: a compiler cache, where there is one, knows most objects.
    settings = ["--config-settings=build-dir=build/wheel", "--config-settings=cmake.define.PNN_WERROR=ON"]
    run([*pip, *settings, str(source)], folder, {"CC": "cc", "CXX": "c++", "CCACHE_BASEDIR": str(source)})
    wheels = list((folder / "dist").glob("*.whl"))
    assert len(wheels) == 1
    return wheels[0]


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has this one's packages and the installed wheel."""
    folder = tmp_path_factory.mktemp("installed")
    run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], folder)
    interpreter = folder / "venv" / "bin" / "python"
    site = Path(run([interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip())
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel], folder)
    return interpreter


def test_wheel_fits_every_python(wheel: Path) -> None:
    assert "-py3-none-" in wheel.name


def test_wheel_carries_what_it_needs_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "torch_pnn/schemas.txt" in names
    assert "torch_pnn/py.typed" in names
    studies = {path.name for path in (ROOT / "python/torch_pnn/ablation/studies").glob("*.yaml")}
    assert {"digits.yaml", "claim-reply.yaml"} <= studies
    assert {f"torch_pnn/ablation/studies/{study}" for study in studies} <= set(names)
    assert "torch_pnn/lib/libtorch_pnn_ops.so" in names
    assert any(name.startswith("torch_pnn/lib/libtorch_pnn_autograd-2.") for name in names)
    assert "torch_pnn/share/cmake/torch_pnn/torch_pnnConfig.cmake" in names
    assert "torch_pnn/include/torch_pnn/torch_pnn.h" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    allowed = ("torch_pnn/", "torch_pnn-")
    assert [name for name in names if not name.startswith(allowed) or "__pycache__" in name] == []


def test_libraries_link_no_python_and_know_no_folder(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(tmp_path, libraries)
    for name in libraries:
        dynamic = run(["readelf", "-d", tmp_path / name], tmp_path)
        needed = [line for line in dynamic.splitlines() if "NEEDED" in line]
        assert needed
        for word in ("python", "cuda", "gomp", "libomp"):
            assert not any(word in line for line in needed), f"{name} needs {word}"
        assert "RUNPATH" not in dynamic and "RPATH" not in dynamic
        assert str(ROOT).encode() not in (tmp_path / name).read_bytes(), f"{name} holds the build folder's name"


def test_installed_package_uses_its_own_libraries(python: Path, tmp_path: Path) -> None:
    program = """
        import os, torch, torch_pnn
        from torch_pnn import functional
        home = os.path.dirname(torch_pnn.__file__)
        with open("/proc/self/maps") as maps:
            loaded = {line.split()[-1] for line in maps if "libtorch_pnn" in line}
        assert any(path == os.path.join(home, "lib", "libtorch_pnn_ops.so") for path in loaded), loaded
        assert any("libtorch_pnn_autograd-" in path for path in loaded), loaded
        x = torch.ones(1, 1, 2, 2, requires_grad=True)
        y = functional.perturb_conv2d(x, torch.full((1, 1, 1, 1), 2.0), mask=torch.zeros(1, 1, 2, 2))
        y.sum().backward()
        assert y.flatten().tolist() == [2.0] * 4 and x.grad.flatten().tolist() == [2.0] * 4
        print(torch_pnn.__version__)
    """
    assert run([python, "-W", "error::UserWarning", "-c", textwrap.dedent(program)], tmp_path).strip()


def test_command_line_is_installed(python: Path, tmp_path: Path) -> None:
    assert "torch_pnn" in run([python, "-m", "torch_pnn", "info"], tmp_path).replace("-", "_")


def test_without_pytorch_the_build_says_so(tmp_path: Path) -> None:
    run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty"], tmp_path)
    cmake = shutil.which("cmake", path=clean_environment(tmp_path)["PATH"])
    if cmake is None:
        pytest.skip("no cmake")
    done = subprocess.run(
        [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(tmp_path / "b"),
            "-DPNN_TORCH=ON",
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={tmp_path}/empty/bin/python",
        ],
        env=clean_environment(tmp_path),
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    words = " ".join(done.stderr.split())
    assert "no PyTorch found by" in words and "module torch is not installed for" in words
    assert "pip install --no-build-isolation ." in words


def test_pytorch_without_headers_is_named(tmp_path: Path) -> None:
    run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path).strip())
    (site / "torch").mkdir()
    (site / "torch" / "__init__.py").touch()
    cmake = shutil.which("cmake", path=clean_environment(tmp_path)["PATH"])
    if cmake is None:
        pytest.skip("no cmake")
    for version, expected in (("2.13.0", "lacks include/ATen/ATen.h"), ("2.10.1", "too old: torch-pnn needs 2.11")):
        (site / "torch" / "version.py").write_text(f"__version__ = '{version}'\n", encoding="utf-8")
        done = subprocess.run(
            [
                cmake,
                "-S",
                str(ROOT),
                "-B",
                str(tmp_path / version),
                "-DPNN_TORCH=ON",
                "-G",
                "Ninja",
                f"-DPython_EXECUTABLE={python}",
            ],
            env=clean_environment(tmp_path),
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode != 0
        assert expected in " ".join(done.stderr.split())
