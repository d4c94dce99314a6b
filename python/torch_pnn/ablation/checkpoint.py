r"""The checkpoint of a run: all that is needed to go on after its last whole epoch, bit for bit.

    torch-pnn checkpoint 1 <number>\n | SHA-256 of the rest, in hexadecimal\n | what torch.save wrote

There are two files, ``NAME.a`` and ``NAME.b``, written by turns, so that a process killed at any moment leaves a whole
one. (One file replaced in one step would do as well, but ext4 then waits for the disk: 4 ms, where an epoch of small
images takes 250.) A checkpoint is seen onto the disk (fsync) at most every ``SYNC_SECONDS``: a killed process loses
nothing of what it wrote, only a machine that loses power may lose the epochs since, and the digest tells a file that
such an end has left in pieces.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import math
import os
import pickle
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

HEAD = b"torch-pnn checkpoint 1 "
SYNC_SECONDS = 10.0

State = dict[str, Any]


def _slots(path: Path) -> tuple[Path, Path]:
    return path.with_name(f"{path.name}.a"), path.with_name(f"{path.name}.b")


def exists(path: Path) -> bool:
    """Whether a run has left a checkpoint under this name."""
    return any(slot.exists() for slot in _slots(path))


def remove(path: Path) -> None:
    """Removes a checkpoint, if there is one, and what processes that were killed while writing it left."""
    for file in (*_slots(path), *path.parent.glob(f".{glob.escape(path.name)}.*")):
        with contextlib.suppress(OSError):
            file.unlink()


class Checkpoint:
    """Where a run keeps its state.

    Args:
        path: the files' name; their folder is there.
        run: what the state belongs to: that of another run is not used.
    """

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self.path, self._run = path, run
        self._number = max((number for number, _ in self._found()), default=0)
        self._synced = time.monotonic()

    def _found(self) -> list[tuple[int, Path]]:
        """The numbers of the files that are there, the newest first."""
        found = []
        for slot in _slots(self.path):
            try:
                with open(slot, "rb") as file:
                    first = file.readline(64)
                if first.startswith(HEAD):
                    found.append((int(first[len(HEAD) :]), slot))
            except (OSError, ValueError):
                pass
        return sorted(found, reverse=True)

    def save(self, state: State) -> None:
        """Keeps a state.

        Args:
            state: tensors, numbers, strings, lists and dictionaries of them.

        Raises:
            OSError: it can't be written; the one kept before still is.
        """
        buffer = io.BytesIO()
        tensors = _Bytes()
        frame = _take_out({"run": self._run, "state": state}, tensors)
        # One tensor in place of a hundred: ten times as fast for a small network.
        torch.save({"frame": frame, "bytes": torch.cat([torch.empty(0, dtype=torch.uint8), *tensors.parts])}, buffer)
        content = buffer.getbuffer()
        number = self._number + 1
        newest = next((slot for _, slot in self._found()), None)
        slot = next(slot for slot in _slots(self.path) if slot != newest)
        descriptor, name = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(HEAD + str(number).encode() + b"\n" + hashlib.sha256(content).hexdigest().encode() + b"\n")
                file.write(content)
                if time.monotonic() - self._synced >= SYNC_SECONDS:
                    file.flush()
                    os.fsync(file.fileno())
                    self._synced = time.monotonic()
            slot.unlink(missing_ok=True)
            os.rename(name, slot)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        self._number = number

    def load(self) -> State | None:
        """The newest state that is whole; None where there is none, or none of this run."""
        for _, slot in self._found():
            kept = self._read(slot)
            if kept is not None and kept["run"] == self._run:
                return kept["state"]
        return None

    @staticmethod
    def _read(slot: Path) -> Any:
        try:
            _, digest, content = slot.read_bytes().split(b"\n", 2)
        except (OSError, ValueError):
            return None
        if hashlib.sha256(content).hexdigest().encode() != digest:
            return None
        try:
            saved = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        except (RuntimeError, pickle.UnpicklingError):
            return None
        return _put_back(saved["frame"], saved["bytes"])


_TENSOR = "tensor in a checkpoint"


class _Bytes:
    """Collects tensors, end to end."""

    def __init__(self) -> None:
        self.parts: list[torch.Tensor] = []
        self.length = 0

    def add(self, tensor: torch.Tensor) -> int:
        """Returns where it begins."""
        part = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self.parts.append(part)
        self.length += len(part)
        return self.length - len(part)


def _take_out(value: Any, tensors: _Bytes) -> Any:
    """The value with every tensor replaced by its type, its shape and where its bytes begin."""
    if isinstance(value, torch.Tensor):
        return {_TENSOR: [str(value.dtype).removeprefix("torch."), list(value.shape), tensors.add(value)]}
    if isinstance(value, dict):
        return {key: _take_out(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_take_out(item, tensors) for item in value)
    return value


def _put_back(value: Any, data: torch.Tensor) -> Any:
    """What ``_take_out`` was given."""
    if isinstance(value, dict) and _TENSOR in value:
        name, shape, start = value[_TENSOR]
        dtype = getattr(torch, name)
        end = start + math.prod(shape) * dtype.itemsize
        return data[start:end].clone().view(dtype).reshape(shape)  # a clone: its bytes begin where numbers may
    if isinstance(value, dict):
        return {key: _put_back(item, data) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_put_back(item, data) for item in value)
    return value
