"""Loads the compiled operators, or registers what stands in for them; `status` says which.

Importing this module makes ``torch.ops.torch_pnn`` complete, once per process:

* ``libtorch_pnn_ops.so`` defines the operators and their CPU kernels; one file for every PyTorch from 2.11 on. Where it
  is missing or does not load, the operators are defined from schemas.txt and run on the plain-PyTorch reference, with
  one warning that holds the loader's own words (an ImportError where ``TORCH_PNN_REQUIRE_OPS=1``).
* ``libtorch_pnn_autograd-<major>.<minor>.so`` holds derivatives and autocast; one file per minor version of PyTorch.
  Where none fits the running PyTorch, registrations from Python stand in and say so once.
* ``libtorch_pnn_cuda.so`` holds the CUDA kernels; it is loaded beside a CUDA build of PyTorch, where it was built.
* The shape functions for ``torch.compile`` and ``torch.export``, the batching rules for ``torch.vmap``, and the kernels
  for devices that have none of ours, always come from Python.

The libraries are looked for in the package's ``lib`` folder, or in the folder that the environment variable
``TORCH_PNN_LIBRARY_DIR`` names.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import threading
import warnings
from pathlib import Path

import torch

from . import _fakes, _fallback, _vmap

__all__ = ["LibraryStatus", "status"]

NAMESPACE = "torch_pnn"
OPS_FILE = "libtorch_pnn_ops.so"
CUDA_FILE = "libtorch_pnn_cuda.so"
CUDA_MISSING_FILE = "libtorch_pnn_cuda.missing.txt"
"""Beside the libraries: why the build left the CUDA half out; empty where it did not."""
OLDEST_TORCH = (2, 11)


@dataclasses.dataclass(frozen=True)
class LibraryStatus:
    """What is loaded and what stands in.

    Attributes:
        ops: "loaded", or "reference" where plain PyTorch stands in for the CPU kernels.
        ops_path: the library's file, whether it could be loaded or not.
        ops_error: why it was not loaded, in the loader's words; None where it was.
        autograd: "loaded", or "python" where registrations from Python stand in for the compiled derivatives.
        autograd_path: the library's file for this PyTorch.
        autograd_error: why it was not loaded; None where it was.
        isa: the instruction set whose kernels run, for example "avx2"; "none" on the reference.
        library_version: libpnn's version; "none" on the reference.
        torch_version: the running PyTorch's version.
        python_version: the running Python's version.
        cuda: the state of the CUDA half: "loaded", or "not built: " or "not loaded: " and why.
    """

    ops: str
    ops_path: str
    ops_error: str | None
    autograd: str
    autograd_path: str
    autograd_error: str | None
    isa: str
    library_version: str
    torch_version: str
    python_version: str
    cuda: str = "not built"


def library_directory() -> Path:
    """The folder that holds the compiled libraries."""
    named = os.environ.get("TORCH_PNN_LIBRARY_DIR")
    return Path(named) if named else Path(__file__).parent / "lib"


def _torch_minor() -> tuple[int, int] | None:
    """The running PyTorch's version, for example (2, 13); None where its name starts otherwise."""
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    return (int(version[1]), int(version[2])) if version else None


def autograd_file() -> str:
    """The name of the autograd library for the running PyTorch, for example libtorch_pnn_autograd-2.13.so."""
    version = _torch_minor()
    return f"libtorch_pnn_autograd-{version[0]}.{version[1]}.so" if version else "libtorch_pnn_autograd.so"


def _check_torch_version() -> None:
    """Refuses a PyTorch without the stable ABI that the operators are built for."""
    version = _torch_minor()
    if version is not None and version < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ImportError(
            f"torch_pnn: PyTorch {torch.__version__} is too old, it should be {oldest} or newer: "
            f"pip install --upgrade 'torch>={oldest}'"
        )


def schemas() -> list[str]:
    """The operators' schemas, one string each, without the namespace."""
    lines = (Path(__file__).parent / "schemas.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def _load(path: Path) -> str | None:
    """Loads a library; returns None, or why it could not be loaded."""
    if not path.is_file():
        others = sorted(found.name for found in path.parent.glob("libtorch_pnn_*.so")) if path.parent.is_dir() else []
        held = f"it holds {', '.join(others)}" if others else "it holds no library of torch_pnn"
        return f"{path.name} is not in {path.parent} ({held})"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return str(error.__cause__ or error)
    return None


def _defined() -> bool:
    """Whether a host program (LibTorch with an embedded Python, say) has loaded the operators already."""
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::perturb_conv2d", "CPU")
    except RuntimeError:
        return False


def _required() -> bool:
    return os.environ.get("TORCH_PNN_REQUIRE_OPS", "0") not in ("", "0")


def _not_built(note: Path) -> str:
    """That there is no CUDA half, with the build's reason where it left one."""
    try:
        reason = note.read_text(encoding="utf-8").strip()
    except OSError:
        reason = ""
    return f"not built: {reason}" if reason else "not built"


class _Registry:
    """The one registration of this process; kept alive as long as the module."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fragment: torch.library.Library | None = None
        self.ops_error: str | None = None
        self.autograd_error: str | None = None
        self.cuda = "not built"

    def _load_cuda(self, folder: Path) -> None:
        path = folder / CUDA_FILE
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::perturb_conv2d", "CUDA"):
            self.cuda = "loaded"
        elif not path.is_file():
            self.cuda = _not_built(folder / CUDA_MISSING_FILE)
        elif torch.version.cuda is None:
            self.cuda = "not loaded: this PyTorch is not a CUDA build"
        else:
            error = _load(path)
            self.cuda = "loaded" if error is None else f"not loaded: {error}"

    def register(self) -> None:
        with self._lock:
            if self._fragment is not None:
                return
            folder = library_directory()
            if not _defined():
                self.ops_error = _load(folder / OPS_FILE)
            if self.ops_error is not None and _required():
                raise ImportError(f"torch_pnn: the compiled operators could not be loaded: {self.ops_error}")
            fragment = torch.library.Library(NAMESPACE, "FRAGMENT")
            warning = None
            if self.ops_error is not None:
                for schema in schemas():
                    fragment.define(schema)
                self.autograd_error = f"it needs {OPS_FILE}, which is not loaded"
                warning = (
                    f"torch_pnn: the compiled operators could not be loaded, so everything runs on the plain-PyTorch "
                    f"reference, which gives the same results slowly and with more memory. The loader said: "
                    f"{self.ops_error}. TORCH_PNN_LIBRARY_DIR names another folder to look in; "
                    f"TORCH_PNN_REQUIRE_OPS=1 makes this an error."
                )
            elif not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::perturb_conv2d", "AutogradCPU"):
                self.autograd_error = _load(folder / autograd_file())
                if self.autograd_error is not None and _required():
                    raise ImportError(f"torch_pnn: the compiled derivatives could not be loaded: {self.autograd_error}")
                if self.autograd_error is not None:
                    warning = (
                        f"torch_pnn: no compiled derivatives fit PyTorch {torch.__version__}, so registrations from "
                        f"Python stand in. Eager training, torch.compile, autocast and torch.vmap work; the other "
                        f"torch.func transforms and the input gradient of reloaded TorchScript models do not. The "
                        f"loader said: "
                        f"{self.autograd_error}. TORCH_PNN_REQUIRE_OPS=1 makes this an error."
                    )
            if self.ops_error is None:
                self._load_cuda(folder)
            _fakes.register(fragment)
            _vmap.register(fragment)
            _fallback.register_kernels(fragment, with_cpu=self.ops_error is not None)
            if self.autograd_error is not None:
                _fallback.register_derivatives(fragment)
            self._fragment = fragment
        if warning is not None:
            warnings.warn(warning, RuntimeWarning, stacklevel=2)


_check_torch_version()
_registry = _Registry()
_registry.register()


def status() -> LibraryStatus:
    """What is loaded and what stands in, for people and for ``torch-pnn info``.

    Returns:
        The state of each library, the instruction set whose kernels run, and the versions.

    Example:
        >>> status().ops in ("loaded", "reference")
        True
    """
    folder = library_directory()
    return LibraryStatus(
        ops="loaded" if _registry.ops_error is None else "reference",
        ops_path=str(folder / OPS_FILE),
        ops_error=_registry.ops_error,
        autograd="loaded" if _registry.autograd_error is None else "python",
        autograd_path=str(folder / autograd_file()),
        autograd_error=_registry.autograd_error,
        isa=torch.ops.torch_pnn._isa_name(),
        library_version=torch.ops.torch_pnn._library_version(),
        torch_version=torch.__version__,
        python_version=platform.python_version(),
        cuda=_registry.cuda,
    )
