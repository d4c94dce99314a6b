"""MNIST and the sets published in its format: four idx files, gzipped or not."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import AblationError, describe_os_error, require
from ..study import DataSettings
from . import memory
from .augment import Crop
from .dataset import Dataset
from .places import Layout, find

FILES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)
_BYTES = 0x08


def read(path: Path) -> np.ndarray:
    """An idx file of bytes, gzipped where its name ends with ``.gz``.

    The format: two zero bytes, the type (8: bytes), the number of dimensions, each dimension as 32 bits with the
    highest first, then the values.

    Returns:
        uint8, of the dimensions that the file names.

    Raises:
        AblationError: the file can't be read, is damaged, or is no idx file of bytes.
    """
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as packed:
                content = packed.read()
        else:
            content = path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise AblationError(f"{path} is damaged: {str(error) or 'it ends too early'}") from error
    except OSError as error:
        raise AblationError(f"can't read {path}: {describe_os_error(error)}") from error
    if len(content) < 4 or content[:3] != bytes((0, 0, _BYTES)):
        raise AblationError(f"{path} is no idx file of bytes: it begins with {content[:4].hex(' ') or 'nothing'}")
    dimensions = content[3]
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise AblationError(f"{path} is damaged: it ends within its first {header} bytes")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    expected = header + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        raise AblationError(f"{path} is damaged: it has {len(content)} bytes and should have {expected}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _look(folder: Path) -> list[list[Path]] | None:
    """The four files in a folder, or None where one is missing."""
    found = [[_either(folder, name) for name in names] for names in FILES]
    return None if any(path is None for pair in found for path in pair) else found  # type: ignore[return-value]


def _either(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _part(images_path: Path, labels_path: Path) -> tuple[Tensor, Tensor]:
    images, labels = read(images_path), read(labels_path)
    if images.ndim != 3 or labels.ndim != 1:
        raise AblationError(
            f"{images_path} has {images.ndim} dimensions and {labels_path} {labels.ndim}; they should have 3 and 1"
        )
    if len(images) != len(labels) or not len(labels):
        raise AblationError(f"{images_path} holds {len(images)} images and {labels_path} {len(labels)} labels")
    if labels.max() > 9:
        raise AblationError(f"{labels_path} holds the label {labels.max()}; they should be 0 to 9")
    return torch.from_numpy(images.copy()).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))


def loader(title: str, source: str, folder: str, class_names: tuple[str, ...], flip: bool) -> Callable[..., Dataset]:
    """A loader of one of the sets in this format.

    Args:
        title: its name in words.
        source: where it is had.
        folder: torchvision's name of it.
        class_names: by label.
        flip: whether a mirrored image is still one of its class; mirrored writing isn't writing. All are moved by up to
            two pixels, which leaves the digits' strokes whole: they have a margin of four.
    """

    def download(root: Path) -> Any:
        datasets = require("torchvision.datasets", "torchvision", "the download")
        return [getattr(datasets, folder)(str(root), train=train, download=True) for train in (True, False)]

    layout = Layout(
        wanted=", ".join(name for pair in FILES for name in pair) + " (or the same with .gz)",
        source=source,
        folders=(f"{folder}/raw", "raw"),
        download=download,
    )

    def load(settings: DataSettings) -> Dataset:
        (train, test) = (_part(*pair) for pair in find(settings, layout, _look))
        if train[0].shape[1:] != test[0].shape[1:]:
            raise AblationError(
                f"{title}: training images have {tuple(train[0].shape[2:])} pixels, test images "
                f"{tuple(test[0].shape[2:])}"
            )
        height, width = train[0].shape[2:]
        description = (
            f"{title}: {height}×{width} pixels, grey, ten classes; {len(train[1])} training and {len(test[1])} test "
            f"images, read from idx files as published."
        )
        return memory.make(settings, description, class_names, train, test, Crop(2, flip))

    return load


load_mnist = loader(
    "MNIST (LeCun, Cortes, Burges)",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "MNIST",
    tuple(str(digit) for digit in range(10)),
    flip=False,
)
load_fashion_mnist = loader(
    "Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017)",
    "https://github.com/zalandoresearch/fashion-mnist",
    "FashionMNIST",
    ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    flip=True,
)
load_kmnist = loader(
    "Kuzushiji-MNIST (Clanuwat et al., 2018)",
    "https://github.com/rois-codh/kmnist",
    "KMNIST",
    ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    flip=False,
)
