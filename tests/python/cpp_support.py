"""Builds C++ programs against the installed operators as a stranger would, and runs them without Python's paths."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torch_pnn import _library


def tool(name: str) -> str:
    """A build tool: the one beside this Python, else the system's; skips the test where there is none."""
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
    """What a program prints that must succeed."""
    done = run_program(*command)
    assert done.returncode == 0, (
        f"{command[0]} failed ({done.returncode}):\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


def build_program(source: Path, folder: Path) -> Path:
    """Builds the target `program` of a CMake project that calls find_package(torch_pnn)."""
    cmake = tool("cmake")
    libraries = Path(_library.status().ops_path).resolve().parent
    if (libraries.parent / "CMakeCache.txt").exists():  # a build tree: install the operators' package from it
        output_of(cmake, "--install", libraries.parent, "--component", "torch_pnn", "--prefix", folder / "prefix")
        where = f"-DCMAKE_PREFIX_PATH={folder / 'prefix'}"
    else:  # the Python package carries it
        where = f"-Dtorch_pnn_DIR={libraries.parent / 'share/cmake/torch_pnn'}"
    output_of(
        *(cmake, "-S", source, "-B", folder / "build", "-DCMAKE_BUILD_TYPE=Debug", where),
        f"-DTORCH_PNN_TORCH_ROOT={Path(torch.__file__).parent}",
    )
    output_of(cmake, "--build", folder / "build")
    return folder / "build" / "program"
