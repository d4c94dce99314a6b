"""Finds a data set's files under the root that the study names, in the layouts that people have them in.

The root is a folder or an archive (``.tar``, ``.tar.gz``, ``.tar.xz``, ``.zip``), or a folder inside an archive
(``voc.tar.xz/VOC2012``). Archives are unpacked once, into the user's cache folder (``TORCH_PNN_CACHE``, else
``$XDG_CACHE_HOME/torch-pnn``, else ``~/.cache/torch-pnn``); they appear there whole or not at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path
from typing import TypeVar

from ..errors import AblationError, UsageError, describe_os_error, require
from ..study import DataSettings

Found = TypeVar("Found")

ARCHIVES = re.compile(r"\.(tar(\.(gz|bz2|xz))?|tgz|txz|zip)$", re.IGNORECASE)


@dataclass(frozen=True)
class Layout:
    """Where a data set's files are looked for.

    Attributes:
        wanted: the files, in words.
        source: where they are to be had.
        folders: folders under the root that they may lie in; the root itself and the data set's name always count.
        archives: a pattern that names of archives beside them match; "" where none is taken.
        download: gets them into a folder; None where it can't be done.
    """

    wanted: str
    source: str
    folders: tuple[str, ...] = ()
    archives: str = ""
    download: Callable[[Path], object] | None = None


def find(settings: DataSettings, layout: Layout, look: Callable[[Path], Found | None]) -> Found:
    """Looks for a data set.

    Args:
        settings: ``name``, ``root`` and ``download`` are used.
        layout: where to look.
        look: is given a folder; returns what it found there, or None.

    Returns:
        The first thing found.

    Raises:
        UsageError: no root is named, or nothing is there; the sentence says what is looked for and where it is had.
        AblationError: an archive can't be read or unpacked, or the download failed.
    """
    name = settings.name
    named = settings.root or os.environ.get("TORCH_PNN_DATA", "")
    if not named:
        raise UsageError(
            f"where does {name} lie? Name its folder with --data, data.root in the study or TORCH_PNN_DATA. "
            f"Looked for are {layout.wanted}, to be had from {layout.source}; {_downloads(layout)}"
        )
    named_root = Path(named).expanduser()
    if settings.download and not named_root.exists():
        try:
            named_root.mkdir(parents=True)
        except OSError as error:
            raise AblationError(f"can't make the folder {named_root}: {describe_os_error(error)}") from error
    root = _open(named_root)
    found = _search(root, layout, name, look)
    if found is None and settings.download:
        if layout.download is None:
            raise UsageError(f"{name} can't be downloaded: get {layout.wanted} from {layout.source} into {named_root}")
        _fetch(settings, layout, root)
        found = _search(root, layout, name, look)
    if found is None:
        raise UsageError(
            f"{name} is not in {named_root}: looked for {layout.wanted}, there"
            + "".join(f" or in {folder}" for folder in (name, *layout.folders))
            + f". To be had from {layout.source}; {_downloads(layout)}"
        )
    return found


def _downloads(layout: Layout) -> str:
    if layout.download is None:
        return "nothing is downloaded"
    return "nothing is downloaded unless data.download is true (it takes torchvision)"


def _fetch(settings: DataSettings, layout: Layout, root: Path) -> None:
    require("torchvision", "torchvision", f"the download of {settings.name}")
    assert layout.download is not None
    try:
        layout.download(root)
    except (OSError, RuntimeError, ValueError) as error:  # URLError is an OSError; torchvision's own are RuntimeErrors
        reason = " ".join(str(error).split())
        raise AblationError(
            f"{settings.name} could not be downloaded: {reason}; get it from {layout.source} into {root}"
        ) from error


def _search(root: Path, layout: Layout, name: str, look: Callable[[Path], Found | None]) -> Found | None:
    folders = list(_candidates(root, layout, name))
    for folder in folders:
        found = look(folder)
        if found is not None:
            return found
    if not layout.archives:
        return None
    pattern = re.compile(layout.archives, re.IGNORECASE)
    for folder in folders:
        for entry in sorted(folder.iterdir()):
            if pattern.match(entry.name) and ARCHIVES.search(entry.name) and entry.is_file():
                for inner in _candidates(unpack(entry), layout, name):
                    found = look(inner)
                    if found is not None:
                        return found
    return None


def _candidates(root: Path, layout: Layout, name: str) -> Iterable[Path]:
    yield root
    for folder in (name, *layout.folders):
        if (root / folder).is_dir():
            yield root / folder
    # An archive mostly holds one folder.
    inside = [entry for entry in root.iterdir() if not entry.name.startswith(".")]
    if len(inside) == 1 and inside[0].is_dir() and inside[0].name not in (name, *layout.folders):
        yield inside[0]


def _open(named: Path) -> Path:
    """The folder that a root stands for: itself, or an unpacked archive's, or a folder in that."""
    try:
        if named.is_dir():
            os.listdir(named)
            return named
        for place in (named, *named.parents):
            if place.is_file():
                if not ARCHIVES.search(place.name):
                    raise UsageError(f"{place} is neither a folder nor an archive (.tar, .tar.gz, .tar.xz, .zip)")
                folder = unpack(place) / named.relative_to(place)
                if not folder.is_dir():
                    raise UsageError(f"{place} holds no folder {named.relative_to(place)}")
                return folder
    except OSError as error:
        raise AblationError(f"can't read {named}: {describe_os_error(error)}") from error
    raise UsageError(f"there is no folder {named}")


def cache_folder() -> Path:
    """Where archives are unpacked and decoded images kept. Whatever lies there may be deleted; it is made again."""
    own = os.environ.get("TORCH_PNN_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "torch-pnn"


def cached(name: str, key: str, make: Callable[[Path], None]) -> Path:
    """A folder in the cache, made now unless it is there.

    It is there whole or not at all. Several processes may ask at once: one makes it, the others wait. What a killed
    process left is deleted.

    Args:
        name: begins the folder's name.
        key: what its contents hang on; a digest of it ends the folder's name.
        make: is given an empty folder to fill.

    Raises:
        OSError: the folder can't be written.
    """
    cache = cache_folder()
    target = cache / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    with open(target.with_name(target.name + ".lock"), "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back by the kernel, however the process ends
        if not target.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
            try:
                partial.mkdir()
                make(partial)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return target


def unpack(archive: Path) -> Path:
    """Unpacks an archive into the cache, unless it is there already; it hangs on the path, size and time of change.

    Args:
        archive: the file.

    Returns:
        The folder with its contents.

    Raises:
        AblationError: it can't be read, is damaged, or the disk is full.
    """
    try:
        about = archive.stat()
        key = f"{archive.resolve()} {about.st_size} {about.st_mtime_ns}"
        return cached(ARCHIVES.sub("", archive.name), key, lambda folder: _extract(archive, folder))
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, LZMAError, zlib.error) as error:
        raise AblationError(f"{archive} is damaged: {str(error) or 'it ends too early'}") from error
    except OSError as error:
        raise AblationError(f"can't unpack {archive} into {cache_folder()}: {describe_os_error(error)}") from error


def title(folder: Path) -> str:
    """A folder's name for a reader: an unpacked archive goes by the archive's."""
    return re.sub(r"-[0-9a-f]{16}$", "", folder.name) if folder.parent == cache_folder() else folder.name


def _extract(archive: Path, folder: Path) -> None:
    if archive.suffix.lower() == ".zip":
        with zipfile.ZipFile(archive) as zipped:
            zipped.extractall(folder)
        return
    if not hasattr(tarfile, "data_filter"):
        raise AblationError(f"unpacking {archive} safely needs Python 3.10.12, 3.11.4 or later: unpack it yourself")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")  # nothing outside of the folder, no links out of it, no devices
