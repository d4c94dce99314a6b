"""How much memory a run needed at its highest: the process's resident pages, or what tensors held on a card."""

from __future__ import annotations

import contextlib
import ctypes
import re
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


class Peak:
    """Measures from its making on.

    On the processor: the highest resident size since, less the resident size then, so that the interpreter, the
    libraries and the data set are not counted. Linux alone tells it. On a graphics card: the most that tensors held.

    Args:
        device: where the run computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: int | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        # What an earlier run freed is given back to the system first, else this run would use it uncounted.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the highest size begins anew (proc(5))
            self._before = _field("VmRSS")

    def bytes(self) -> int | None:
        """The highest use so far; None where the system does not tell."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        highest = _field("VmHWM")
        if self._before is None or highest is None:
            return None
        return max(0, highest - self._before)


def _field(name: str) -> int | None:
    """A line of /proc/self/status, in bytes."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
