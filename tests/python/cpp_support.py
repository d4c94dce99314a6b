"""Builds C++ programs against the installed operators as a stranger would, and runs them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torch_pnn import _library

TESTS = Path(__file__).resolve().parents[1]


def tool(name: str) -> str:
    """A build tool beside the interpreter, else from PATH; a test without it is skipped."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run_program(*command: object) -> subprocess.CompletedProcess[str]:
    """Runs a program that finds its libraries by itself, as a user's would."""
    environment = {n: v for n, v in os.environ.items() if n not in ("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH")}
    given = [str(part) for part in command]
    return subprocess.run(given, capture_output=True, text=True, timeout=600, env=environment)


def output_of(*command: object) -> str:
    """What a command prints; a failed one fails the test."""
    done = run_program(*command)
    assert done.returncode == 0, (
        f"{command[0]} failed ({done.returncode}):\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


def package(folder: Path) -> str:
    """CMake's option that finds the operators' package: the Python package's, or one installed from the build tree."""
    libraries = Path(_library.status().ops_path).resolve().parent
    if not (libraries.parent / "CMakeCache.txt").exists():
        return f"-Dtorch_pnn_DIR={libraries.parent / 'share/cmake/torch_pnn'}"
    prefix = folder / "prefix"
    output_of(tool("cmake"), "--install", libraries.parent, "--component", "torch_pnn", "--prefix", prefix)
    return f"-DCMAKE_PREFIX_PATH={prefix}"


def build(source: str, folder: Path, *options: str) -> Path:
    """Configures and builds tests/`source` in `folder`; returns the folder with its programs."""
    cmake = tool("cmake")
    output_of(
        *(cmake, "-S", TESTS / source, "-B", folder / "build", "-DCMAKE_BUILD_TYPE=Debug", package(folder)),
        f"-DTORCH_PNN_TORCH_ROOT={Path(torch.__file__).parent}",
        *options,
    )
    output_of(cmake, "--build", folder / "build", "--parallel", "2")
    return folder / "build"
