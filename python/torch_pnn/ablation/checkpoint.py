"""The checkpoint of a run: all that is needed to go on after its last whole epoch, bit for bit.

    torch-pnn checkpoint 1\n | SHA-256 of the rest, in hexadecimal\n | what torch.save wrote

It is replaced in one step, so that a process killed at any moment leaves the old one or the new one. It is seen onto
the disk (fsync) at most every ``SYNC_SECONDS``: a killed process loses nothing of what it wrote, only a machine that
loses power may lose the epochs since, and the digest tells a file that such an end has left in pieces.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

HEAD = b"torch-pnn checkpoint 1\n"
SYNC_SECONDS = 10.0

State = dict[str, Any]


class Checkpoint:
    """Where a run keeps its state.

    Args:
        path: the file; its folder is there.
        run: what the state belongs to: a file of another run is not used.
    """

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self.path, self._run = path, run
        self._synced = time.monotonic()

    def save(self, state: State) -> None:
        """Replaces what is kept.

        Args:
            state: tensors, numbers, strings, lists and dictionaries of them.

        Raises:
            OSError: it can't be written; what was kept before still is.
        """
        buffer = io.BytesIO()
        torch.save({"run": self._run, "state": state}, buffer)
        content = buffer.getbuffer()
        descriptor, name = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(HEAD + hashlib.sha256(content).hexdigest().encode() + b"\n")
                file.write(content)
                if time.monotonic() - self._synced >= SYNC_SECONDS:
                    file.flush()
                    os.fsync(file.fileno())
                    self._synced = time.monotonic()
            os.replace(name, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise

    def load(self) -> State | None:
        """What was kept; None where there is nothing, or nothing of this run, or it is damaged."""
        try:
            content = self.path.read_bytes()
        except OSError:
            return None
        start = len(HEAD) + 65
        if content[: len(HEAD)] != HEAD or content[len(HEAD) : start - 1] != _digest(content[start:]):
            return None
        try:
            kept = torch.load(io.BytesIO(content[start:]), weights_only=True, map_location="cpu")
        except (RuntimeError, pickle.UnpicklingError):
            return None
        return kept["state"] if kept["run"] == self._run else None

    def remove(self) -> None:
        """Forgets it."""
        with contextlib.suppress(OSError):
            self.path.unlink()


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()
