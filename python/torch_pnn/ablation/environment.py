"""What computes here: versions, instruction set, compiled operators or their stand-in; noted beside results."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from torch_pnn import _library

Environment = dict[str, Any]


def version(package: str) -> str | None:
    """The installed version of a package; None where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cores() -> int:
    """The processor cores that this process may use.

    Example:
        >>> cores() >= 1
        True
    """
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def _git(*arguments: str) -> str | None:
    """What git says about the checkout that this package lies in; None where it doesn't lie in one."""
    folder = Path(__file__).parent
    # Without optional locks: `git status` writes the index, and killed meanwhile it would leave the checkout locked.
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def code_version() -> dict[str, Any]:
    """The commit that this code is from, where it is run from a checkout.

    Returns:
        ``commit`` (None where it is installed, or git is missing) and ``changed``: whether files of the checkout differ
        from that commit (None where unknown).
    """
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:  # in a checkout of something else at most
        return {"commit": None, "changed": None}
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": _git("rev-parse", "HEAD"), "changed": None if changes is None else bool(changes)}


def processor() -> str | None:
    """The processor's name, as far as the system tells it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or None


def describe() -> Environment:
    """What stands beside the results of a study.

    Returns:
        JSON values: ``torch_pnn``, ``libpnn``, ``torch``, ``python``, ``numpy``, ``scikit-learn``, ``scipy``,
        ``torchvision`` and ``pillow`` (versions; None where missing), ``commit`` and ``changed`` (see
        ``code_version``), ``operators`` ("compiled" or "reference"), ``derivatives`` ("compiled", "python" or
        "reference"), ``isa``, ``machine``, ``processor``, ``system``, ``cores``, ``card`` (the first graphics card's
        name, or None).

    Example:
        >>> describe()["operators"] in ("compiled", "reference")
        True
    """
    status = _library.status()
    compiled = status.ops == "loaded"
    derivatives = "compiled" if status.autograd == "loaded" else "python"
    return {
        "torch_pnn": version("torch-pnn") or f"{status.library_version} (not installed)",
        "libpnn": status.library_version,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "scikit-learn", "scipy", "torchvision", "pillow")},
        **code_version(),
        "operators": "compiled" if compiled else "reference",
        "derivatives": derivatives if compiled else "reference",
        "isa": status.isa,
        "machine": platform.machine(),
        "processor": processor(),
        "system": platform.system(),
        "cores": cores(),
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


#: What, when it changes between two commands, may change the last bits of results.
BITS_DEPEND_ON = ("torch_pnn", "torch", "operators", "isa", "machine")


def operators_sentence(environment: Environment) -> str:
    """Says in one sentence what computed the perturbation layers.

    Example:
        >>> operators_sentence({"operators": "compiled", "derivatives": "compiled", "isa": "avx2", "libpnn": "0.1.0"})
        'Computed by the compiled operators (libpnn 0.1.0, instruction set avx2).'
    """
    if environment["operators"] != "compiled":
        return (
            "NOT computed by the compiled operators: they could not be loaded, and the plain-PyTorch reference stood "
            "in. Accuracies mean the same, times do not."
        )
    text = f"Computed by the compiled operators (libpnn {environment['libpnn']}, instruction set {environment['isa']})"
    if environment["derivatives"] != "compiled":
        text += "; their derivatives were registered from Python, since no compiled ones fit this PyTorch"
    return text + "."
