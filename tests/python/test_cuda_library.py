"""The CUDA operators' library where no GPU is needed: it loads, registers its kernels, says so, and stays by itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torch_pnn import _library

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = (
    "perturb_conv2d",
    "_perturb_conv2d_backward",
    "perturb_norm_conv2d",
    "_perturb_norm_conv2d_backward",
    "perturbation_mask",
)
FOLDER = _library.library_directory()
LIBRARY = FOLDER / _library.CUDA_FILE
built = LIBRARY.is_file()
needs_library = pytest.mark.skipif(not built, reason="the CUDA half was not built")
needs_cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch is not a CUDA build")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
needs_loaded = pytest.mark.skipif(_library.status().cuda != "loaded", reason="the CUDA half is not loaded")


def needed(library: Path) -> list[str]:
    """The libraries that a library links."""
    dynamic = subprocess.run(["readelf", "-d", "-W", library], check=True, capture_output=True, text=True).stdout
    return [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line]


def undefined(library: Path) -> set[str]:
    """The symbols that a library takes from others."""
    table = subprocess.run(["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True).stdout
    return {line.split()[-1] for line in table.splitlines() if line.strip()}


def info(folder: Path) -> str:
    """The line of `torch-pnn info` on the CUDA half, with the libraries of a folder."""
    environment = {**os.environ, "TORCH_PNN_LIBRARY_DIR": str(folder), "TORCH_PNN_REQUIRE_OPS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "python"), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch_pnn", "info"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, cwd=folder)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("CUDA half")]
    return line.removeprefix("CUDA half").strip(" :")


def libraries_in(folder: Path, without: str = "") -> Path:
    """A folder of links to the libraries under test."""
    for path in FOLDER.iterdir():
        if path.suffix == ".so" and path.name != without:
            (folder / path.name).symlink_to(path)
    return folder


# ---- registered, and said so ----


@needs_library
@needs_cuda_build
def test_library_registers_every_operator_for_cuda() -> None:
    assert _library.status().cuda == "loaded"
    for name in OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"torch_pnn::{name}", "CUDA"), name


def test_status_says_why_it_is_not_loaded() -> None:
    state = _library.status().cuda
    if not built:
        reason = (FOLDER / _library.CUDA_MISSING_FILE).read_text(encoding="utf-8").strip()
        assert reason and state == f"not built: {reason}"
    elif torch.version.cuda is None:
        assert state == "not loaded: this PyTorch is not a CUDA build"
    else:
        assert state == "loaded"


@pytest.mark.slow
def test_info_shows_that_the_half_is_loaded_or_why_not(tmp_path: Path) -> None:
    assert info(libraries_in(tmp_path)) == (_library.status().cuda if built else "not built")


@pytest.mark.slow
def test_info_repeats_why_the_build_left_the_half_out(tmp_path: Path) -> None:
    folder = libraries_in(tmp_path, without=_library.CUDA_FILE)
    (folder / _library.CUDA_MISSING_FILE).write_text("no nvcc was found\n", encoding="utf-8")
    assert info(folder) == "not built: no nvcc was found"
    (folder / _library.CUDA_FILE).write_text("no library", encoding="utf-8")
    if torch.version.cuda is None:
        assert info(folder) == "not loaded: this PyTorch is not a CUDA build"
    else:
        assert info(folder).startswith(f"not loaded: {folder / _library.CUDA_FILE}: ")


# ---- what the libraries link ----


def test_cpu_libraries_know_nothing_of_cuda() -> None:
    libraries = [path for path in FOLDER.glob("lib*pnn*.so") if path.name != _library.CUDA_FILE]
    assert any(path.name == _library.OPS_FILE for path in libraries)
    for library in libraries:
        assert [name for name in needed(library) if "cuda" in name or "cudart" in name] == [], library.name
        taken = {name for name in undefined(library) if "cuda" in name.lower()}
        # PyTorch's autocast takes the device as a number; nothing of CUDA's is called.
        assert taken == set(), library.name


@needs_library
def test_cuda_library_links_pytorchs_half_and_carries_the_runtime() -> None:
    names = needed(LIBRARY)
    assert "libtorch_cuda.so" in names
    assert [name for name in names if "cudart" in name or "c10_cuda" in name or "python" in name] == []


@needs_library
def test_cuda_library_asks_for_the_device_and_the_current_stream() -> None:
    taken = undefined(LIBRARY)
    for name in ("aoti_torch_create_device_guard", "aoti_torch_delete_device_guard"):
        assert name in taken
    assert "aoti_torch_get_current_cuda_stream" in taken


# ---- the configure step ----


@pytest.mark.slow
def test_configuring_says_that_the_half_is_left_out_and_why(tmp_path: Path) -> None:
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if cmake is None:
        pytest.skip("no CMake")

    def configure(*options: str) -> subprocess.CompletedProcess[str]:
        command = [cmake, "-S", str(ROOT), "-B", str(tmp_path / "build"), "--fresh", *options]
        return subprocess.run(command, check=False, capture_output=True, text=True)

    plain = configure()
    assert "The GPU half is left out: PNN_CUDA is OFF" in plain.stdout and plain.returncode == 0
    places = [os.environ[name] + "/bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    places += ["/usr/local/cuda/bin", *os.environ["PATH"].split(os.pathsep)]
    hidden = ";".join(place for place in places if Path(place, "nvcc").exists())
    insisted = configure("-DPNN_CUDA=ON", f"-DCMAKE_IGNORE_PATH={hidden}")
    assert insisted.returncode != 0
    assert "can't be built: no nvcc was found" in " ".join(insisted.stderr.split())
    broken = configure("-DPNN_CUDA=ON", "-DPNN_NVCC=/bin/false")
    assert broken.returncode != 0 and "/bin/false does not run" in " ".join(broken.stderr.split())
    # AUTO goes on without it, and leaves the reason for `torch-pnn info` beside the libraries.
    operators = ["-DPNN_TORCH=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    automatic = configure("-DPNN_CUDA=AUTO", *operators, "-DPNN_NVCC=/bin/false")
    assert automatic.returncode == 0, automatic.stderr
    reason = "this PyTorch is not a CUDA build" if torch.version.cuda is None else "/bin/false does not run"
    assert f"The GPU half is left out: {reason}" in automatic.stdout
    note = tmp_path / "build" / "lib" / _library.CUDA_MISSING_FILE
    assert note.read_text(encoding="utf-8").strip() == reason


# ---- on a GPU ----


@needs_gpu
@needs_loaded
def test_operators_agree_with_the_cpu_on_a_gpu() -> None:
    x = torch.randint(-8, 9, (3, 5, 6, 7)) / 8.0
    weight = torch.randint(-3, 4, (4, 10, 1, 1)).float()
    seed = torch.tensor([7])
    y = torch.ops.torch_pnn.perturb_conv2d(x, weight, None, None, seed, 2)
    on_gpu = torch.ops.torch_pnn.perturb_conv2d(x.cuda(), weight.cuda(), None, None, seed.cuda(), 2)
    assert torch.equal(on_gpu.cpu(), y)


@needs_gpu
@needs_loaded
def test_mixed_devices_are_refused_on_a_gpu() -> None:
    with pytest.raises(RuntimeError, match="weight is not on a CUDA device"):
        torch.ops.torch_pnn.perturb_conv2d(torch.ones(1, 2, 3, 3).cuda(), torch.ones(2, 2, 1, 1), None)
