"""What computes here: versions, instruction set, compiled operators or their stand-in; noted beside results."""

from __future__ import annotations

import importlib.metadata
import os
import platform
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


def describe() -> Environment:
    """What stands beside the results of a study.

    Returns:
        JSON values: ``torch_pnn``, ``libpnn``, ``torch``, ``python``, ``numpy``, ``scikit-learn`` and ``scipy``
        (versions; None where missing), ``operators`` ("compiled" or "reference"), ``derivatives`` ("compiled", "python"
        or "reference"), ``isa``, ``machine``, ``system``, ``cores``.

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
        **{name: version(name) for name in ("numpy", "scikit-learn", "scipy")},
        "operators": "compiled" if compiled else "reference",
        "derivatives": derivatives if compiled else "reference",
        "isa": status.isa,
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": cores(),
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
