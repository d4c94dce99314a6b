"""CIFAR-10 and CIFAR-100: the published Python batches, in a folder or the published archive, or a folder of images."""

from __future__ import annotations

import io
import pickle
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from ..errors import AblationError, describe_os_error, require
from ..study import DataSettings
from . import folders, memory
from .augment import Crop
from .dataset import Dataset
from .places import Layout, find

SIDE = 32
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SOURCE = "https://www.cs.toronto.edu/~kriz/cifar.html"

#: What a pickled batch may name. Everything else in a pickle is a call of a function of its choice.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _Unpickler(pickle.Unpickler):
    """Reads numbers, bytes, lists, dictionaries and arrays, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no batch needs")
        return super().find_class(module, name)


def read_batch(file: BinaryIO, name: str) -> dict[bytes, Any]:
    """A pickled dictionary of arrays and lists, with bytes for keys. Nothing in it is run.

    Args:
        file: open for reading.
        name: what an error calls it.

    Raises:
        AblationError: it is damaged, or holds anything else.
    """
    try:
        found = _Unpickler(file, encoding="bytes").load()
    except OSError as error:
        raise AblationError(f"can't read {name}: {describe_os_error(error)}") from error
    # What a damaged pickle raises: there is no list of it.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise AblationError(f"{name} is no batch of CIFAR: {reason}") from error
    if not isinstance(found, dict):
        raise AblationError(f"{name} is no batch of CIFAR: it holds a {type(found).__name__}")
    return {key.encode() if isinstance(key, str) else key: value for key, value in found.items()}


@dataclass(frozen=True)
class _Published:
    """The published files of one set."""

    title: str
    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    meta: str
    names_key: bytes
    labels_key: bytes
    classes: int


_CIFAR10 = _Published(
    "CIFAR-10",
    "cifar-10-batches-py",
    "cifar-10-python.tar.gz",
    tuple(f"data_batch_{number}" for number in range(1, 6)),
    "test_batch",
    "batches.meta",
    b"label_names",
    b"labels",
    10,
)
_CIFAR100 = _Published(
    "CIFAR-100", "cifar-100-python", "cifar-100-python.tar.gz", ("train",), "test", "meta", b"fine_label_names",
    b"fine_labels", 100,
)  # fmt: skip


@dataclass(frozen=True)
class _Batches:
    """The published files, in a folder or in the published archive."""

    published: _Published
    place: Path

    def read(self, *names: str) -> list[dict[bytes, Any]]:
        """Some of them, in the order asked for."""
        if self.place.is_dir():
            found = {name: self.place / name for name in names if (self.place / name).is_file()}
            self._check(names, found)
            return [self._open(path) for path in found.values()]
        try:
            contents = {}
            with tarfile.open(self.place) as packed:
                for member in packed:
                    name = member.name.rpartition("/")[2]
                    if name in names and member.isfile():
                        inner = packed.extractfile(member)
                        assert inner is not None
                        contents[name] = inner.read()
        except (tarfile.TarError, EOFError, OSError) as error:
            raise AblationError(f"can't read {self.place}: {error or 'it ends too early'}") from error
        self._check(names, contents)
        return [read_batch(io.BytesIO(contents[name]), f"{self.place}: {name}") for name in names]

    def _check(self, names: tuple[str, ...], found: dict[str, Any]) -> None:
        lacking = [name for name in names if name not in found]
        if lacking:
            raise AblationError(f"{self.published.title} in {self.place} lacks {', '.join(lacking)}")

    def _open(self, path: Path) -> dict[bytes, Any]:
        try:
            with open(path, "rb") as file:
                return read_batch(file, str(path))
        except OSError as error:
            raise AblationError(f"can't read {path}: {describe_os_error(error)}") from error

    def part(self, *names: str) -> tuple[Tensor, Tensor]:
        """The images and labels of some batches, one after the other."""
        images, labels = [], []
        for name, batch in zip(names, self.read(*names), strict=True):
            pixels, numbers = batch.get(b"data"), batch.get(self.published.labels_key)
            if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3 * SIDE * SIDE,):
                raise AblationError(f"{self.place}: {name} has no array 'data' of bytes, {3 * SIDE * SIDE} an image")
            if not isinstance(numbers, list) or len(numbers) != len(pixels):
                raise AblationError(
                    f"{self.place}: {name} has no list '{self.published.labels_key.decode()}' of {len(pixels)} labels"
                )
            if not all(isinstance(number, int) and 0 <= number < self.published.classes for number in numbers):
                raise AblationError(f"{self.place}: {name} has labels that are not 0 to {self.published.classes - 1}")
            images.append(pixels.reshape(-1, 3, SIDE, SIDE))
            labels += numbers
        return torch.from_numpy(np.concatenate(images)), torch.tensor(labels, dtype=torch.int64)

    def class_names(self) -> list[str]:
        """As the published files have them."""
        (meta,) = self.read(self.published.meta)
        names = meta.get(self.published.names_key)
        if not isinstance(names, list) or len(names) != self.published.classes:
            raise AblationError(f"{self.place}: {self.published.meta} has no {self.published.classes} names of classes")
        return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def _load(settings: DataSettings, published: _Published, class_names: tuple[str, ...]) -> Dataset:
    def look(folder: Path) -> _Batches | folders.Folders | None:
        if (folder / published.train[0]).is_file():
            return _Batches(published, folder)
        if (folder / published.archive).is_file():
            return _Batches(published, folder / published.archive)
        return folders.look(folder)

    def download(root: Path) -> Any:
        datasets = require("torchvision.datasets", "torchvision", "the download")
        return getattr(datasets, published.title.replace("-", ""))(str(root), download=True)

    layout = Layout(
        wanted=f"{published.archive}, its files ({', '.join((*published.train, published.test, published.meta))}), or "
        f"folders of images train/<class>/ and test/<class>/",
        source=SOURCE,
        folders=(published.folder,),
        archives=rf"{published.title.replace('-', '-?')}(?!\d)",
        download=download,
    )
    found = cast("_Batches | folders.Folders", find(settings, layout, look))
    crop = Crop(4, flip=True)
    title = f"{published.title} (Krizhevsky, 2009)"
    if isinstance(found, folders.Folders):
        listing = folders.list_images(found, published.title)
        if len(listing.class_names) != published.classes:
            raise AblationError(
                f"{published.title} in {found.root} has {len(listing.class_names)} classes; it should have "
                f"{published.classes}"
            )
        if class_names and set(listing.class_names) == set(class_names):
            listing = listing.reordered(class_names)
        decoded = folders.decode(listing, (SIDE, SIDE))
        description = (
            f"{title}: {SIDE}×{SIDE} pixels, colour, {published.classes} classes; {len(decoded.train[1])} training and "
            f"{len(decoded.test[1])} test images, read from a folder of image files."
        )
        if decoded.lossy:
            description += (
                f" {decoded.lossy} of them are JPEG files, so they are not the published pixels: accuracies on them "
                f"are not comparable with published ones."
            )
        return memory.make(
            settings,
            description,
            listing.class_names,
            decoded.train,
            decoded.test,
            crop,
            unreadable=decoded.unreadable,
        )
    train, test = found.part(*published.train), found.part(published.test)
    description = (
        f"{title}: {SIDE}×{SIDE} pixels, colour, {published.classes} classes; {len(train[1])} training and "
        f"{len(test[1])} test images, read from Python batches as published."
    )
    return memory.make(settings, description, found.class_names(), train, test, crop)


def load_cifar10(settings: DataSettings) -> Dataset:
    """CIFAR-10 from what ``settings.root`` holds of it."""
    return _load(settings, _CIFAR10, CIFAR10_CLASSES)


def load_cifar100(settings: DataSettings) -> Dataset:
    """CIFAR-100, with its hundred fine classes, from what ``settings.root`` holds of it."""
    return _load(settings, _CIFAR100, ())
