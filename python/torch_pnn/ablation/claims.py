"""Claims: how several processes, on one machine or several, share the runs of one folder.

A claim is a file that is made in one step and that only one process can make; its content names the process. The
process touches it every ``HEARTBEAT`` seconds while it works, and removes it in the end. A claim whose process is
known to be gone (same machine, no such process), or that was not touched for ``LEASE`` seconds (another machine), is
taken over. File locks would be simpler, but network file systems keep them for one machine alone, or not at all.

Claims save work, results don't rest on them: a process that was stopped for longer than a lease and then goes on does a
run that another has done meanwhile, and the two rows are the same.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

#: Seconds between two touches of a claim, and after how many without one another machine takes it over. Network file
#: systems may show a touch a minute late.
HEARTBEAT = 20.0
LEASE = 300.0


@functools.cache
def _machine() -> str:
    """Names the machine since its last start, and the container: process numbers mean something only inside."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _process_start(pid: int) -> str | None:
    """When a process began, in the kernel's ticks: process numbers are used again. None where that isn't told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _is_running(pid: int, start: str | None) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it runs, as another user
    return start is None or _process_start(pid) == start


def writer_name() -> str:
    """A name for this process that no other has, fit for a file's.

    Example:
        >>> writer_name() != writer_name()
        True
    """
    host = "".join(c if c.isalnum() or c == "-" else "-" for c in platform.node()) or "host"
    return f"{host[:40]}-{os.getpid()}-{secrets.token_hex(3)}"


def _file_system_time(folder: Path) -> float:
    """Now, by the clock that also stamps the claims of other machines."""
    with tempfile.TemporaryFile(dir=folder) as file:
        os.utime(file.fileno())
        return os.fstat(file.fileno()).st_mtime


def is_live(path: Path) -> bool:
    """Whether a claim's process is still at work, as far as can be known from here."""
    try:
        text = path.read_text(encoding="utf-8")
        touched = path.stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        owner = json.loads(text)
        if owner["machine"] == _machine():
            return _is_running(owner["pid"], owner["start"])
    except (ValueError, KeyError, TypeError):
        pass  # being written just now, or cut short: its age decides
    return _file_system_time(path.parent) - touched < LEASE


class Claim:
    """A claim that this process holds; see ``acquire``."""

    def __init__(self, path: Path, token: str) -> None:
        self.path, self._token = path, token

    def is_mine(self) -> bool:
        """Whether it is still this process's, and not taken over."""
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))["token"] == self._token
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def touch(self) -> None:
        """Shows that the process is alive."""
        with contextlib.suppress(OSError):
            if self.is_mine():
                os.utime(self.path)

    def release(self) -> None:
        """Gives it free."""
        with contextlib.suppress(OSError):
            if self.is_mine():
                self.path.unlink()


def acquire(path: Path) -> Claim | None:
    """Makes a claim.

    Returns:
        None where another process has it.

    Raises:
        OSError: the folder can't be written.
    """
    token = secrets.token_hex(8)
    owner = {"machine": _machine(), "pid": os.getpid(), "start": _process_start(os.getpid()), "token": token}
    if not _create(path, json.dumps(owner)):
        if is_live(path) or not _take_away(path):
            return None
        if not _create(path, json.dumps(owner)):
            return None  # another process was quicker
    return Claim(path, token)


def _create(path: Path, text: str) -> bool:
    """Makes a file with its content in one step; False where there is one of that name."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=".claim.", dir=path.parent)
    except FileNotFoundError:  # the last of the other processes has just removed the empty folder
        path.parent.mkdir(exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".claim.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        try:
            os.link(name, path)
            return True
        except FileExistsError:
            return False
        except OSError:
            pass  # a file system without hard links: the content follows a moment later
    finally:
        os.unlink(name)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _take_away(path: Path) -> bool:
    """Removes a dead claim; of several processes that try it at once, one succeeds."""
    aside = path.with_name(f".dead.{secrets.token_hex(6)}")
    try:
        os.rename(path, aside)
    except OSError:
        return False
    if is_live(aside):  # another process had taken it over in between: give it back
        with contextlib.suppress(OSError):
            os.link(aside, path)
        os.unlink(aside)
        return False
    os.unlink(aside)
    return True


def sweep(folder: Path) -> None:
    """Removes dead claims, and what a process that was killed while making one has left."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.suffix == ".claim" and not path.name.startswith("."):
                if not is_live(path):
                    _take_away(path)
            elif path.name.startswith(".") and _file_system_time(folder) - path.stat().st_mtime > LEASE:
                path.unlink()


@contextlib.contextmanager
def exclusive(path: Path, seconds: float = 60.0) -> Iterator[None]:
    """Holds a claim for the length of a block, waiting for it.

    Args:
        path: the claim.
        seconds: after so many the block is entered without it: whoever holds it has had time enough.
    """
    deadline = time.monotonic() + seconds
    claim = acquire(path)
    while claim is None and time.monotonic() < deadline:
        time.sleep(0.02)
        claim = acquire(path)
    try:
        yield
    finally:
        if claim is not None:
            claim.release()


class Heart:
    """A thread that touches a process's claims until it is stopped."""

    def __init__(self) -> None:
        self._claims: list[Claim] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="torch-pnn claims", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._stopped.wait(HEARTBEAT):
            with self._lock:
                claims = list(self._claims)
            for claim in claims:
                claim.touch()

    def add(self, claim: Claim) -> None:
        """Touches a claim from now on."""
        with self._lock:
            self._claims.append(claim)

    def release(self, claim: Claim) -> None:
        """Gives a claim free."""
        with self._lock:
            if claim in self._claims:
                self._claims.remove(claim)
        claim.release()

    def stop(self) -> None:
        """Gives every claim free and ends the thread."""
        self._stopped.set()
        self._thread.join()
        for claim in self._claims:
            claim.release()
        self._claims.clear()
