"""Image folders: ``train/<class>/…`` and ``val/<class>/…`` or ``test/<class>/…``, as ImageNet and many others have.

Tiny-ImageNet's own layout (``val/images/`` and ``val/val_annotations.txt``) is read too. Sets whose prepared images
fit into MEMORY bytes are decoded once, completely; of larger ones the headers are read when loading, and the images
epoch by epoch. Whatever can't be read is left out and named; a class that has nothing left is an error.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import AblationError, UsageError, describe_os_error, require
from ..study import DataSettings
from . import memory, pictures, places, split
from .augment import Crop, ResizedCrop
from .dataset import CLASSIFICATION, Dataset, normalisation_in_words
from .files import FileDataset, Prepare, prepared, statistics
from .places import Layout, find

#: Prepared images that take no more bytes than this are decoded once and kept: 1 GiB.
MEMORY = 1 << 30

#: From so many images on, decoded ones are kept in the cache folder.
CACHED_FROM = 2000

#: Up to this side, in pixels, images are augmented as CIFAR's are, beyond it as ImageNet's.
SMALL_SIDE = 64

ANNOTATIONS = "val_annotations.txt"
_TEST_FOLDERS = ("test", "val")


@dataclass(frozen=True)
class Folders:
    """A root with a folder of training and one of test images."""

    root: Path
    test: str
    annotated: bool


@dataclass(frozen=True)
class Listing:
    """Files and their classes.

    Attributes:
        root: the folder that the names below are relative to.
        class_names: by number.
        train, test: files.
        train_labels, test_labels: int64 [N]; or float32 [N, classes] where an image may have several classes.
        test_folder: "test" or "val".
        unreadable: what is known already.
    """

    root: Path
    class_names: tuple[str, ...]
    train: tuple[Path, ...]
    train_labels: np.ndarray
    test: tuple[Path, ...]
    test_labels: np.ndarray
    test_folder: str
    unreadable: tuple[str, ...] = ()

    def reordered(self, class_names: Sequence[str]) -> Listing:
        """The same files with the same classes in another order."""
        number = np.array([class_names.index(name) for name in self.class_names])
        train, test = number[self.train_labels], number[self.test_labels]
        first, second = np.argsort(train, kind="stable"), np.argsort(test, kind="stable")
        return dataclasses.replace(
            self,
            class_names=tuple(class_names),
            train=tuple(self.train[place] for place in first),
            train_labels=train[first],
            test=tuple(self.test[place] for place in second),
            test_labels=test[second],
        )

    def without(self, train: Sequence[str | None], test: Sequence[str | None]) -> Listing:
        """The files for which no reason is given, and the others named as unreadable.

        Raises:
            AblationError: a class has nothing left.
        """
        keep, kept = _none(train), _none(test)
        left = dataclasses.replace(
            self,
            train=tuple(path for path, good in zip(self.train, keep, strict=True) if good),
            train_labels=self.train_labels[keep],
            test=tuple(path for path, good in zip(self.test, kept, strict=True) if good),
            test_labels=self.test_labels[kept],
            unreadable=(
                *self.unreadable,
                *pictures.named(self.train, self.root, train),
                *pictures.named(self.test, self.root, test),
            ),
        )
        for part, labels in (("train", left.train_labels), (self.test_folder, left.test_labels)):
            if labels.ndim == 2 and len(labels):
                continue  # several classes an image: a small set may well lack one
            counts = np.bincount(labels.reshape(-1).astype(np.int64), minlength=len(self.class_names))
            empty = [name for name, count in zip(self.class_names, counts, strict=True) if not count]
            if empty:
                named = f"; {left.unreadable[0]}" if left.unreadable else ""
                raise AblationError(
                    f"no readable image of {_some(empty)} in {self.root / part} ({len(left.unreadable)} files of "
                    f"{self.root} can't be read{named})"
                )
        return left


@dataclass(frozen=True)
class Decoded:
    """A listing's images in memory.

    Attributes:
        train, test: uint8 [N, 3, H, W] and int64 [N].
        lossy: how many of them come from JPEG files.
        unreadable: what was left out.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    lossy: int
    unreadable: tuple[str, ...]


def _none(reasons: Sequence[str | None]) -> np.ndarray:
    return np.array([reason is None for reason in reasons], dtype=bool)


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def look(folder: Path) -> Folders | None:
    """What ``find`` looks for: a folder with ``train`` and ``test`` or ``val``, each with folders of its own."""
    if not _has_folders(folder / "train"):
        return None
    if (folder / "val" / ANNOTATIONS).is_file():
        return Folders(folder, "val", annotated=True)
    for test in _TEST_FOLDERS:
        if _has_folders(folder / test):
            return Folders(folder, test, annotated=False)
    return None


def _has_folders(folder: Path) -> bool:
    return folder.is_dir() and any(entry.is_dir() for entry in os.scandir(folder))


def list_images(found: Folders, title: str) -> Listing:
    """Every image file below the class folders, class by class, in the order of their names.

    Raises:
        AblationError: the training and the test images don't have the same classes, or a folder can't be read.
    """
    try:
        train = _by_class(found.root / "train")
        test = _annotated(found.root / "val") if found.annotated else _by_class(found.root / found.test)
    except OSError as error:
        raise AblationError(f"can't read {error.filename or found.root}: {describe_os_error(error)}") from error
    names = tuple(sorted(train))
    for one, other, where in ((train, test, found.test), (test, train, "train")):
        lacking = sorted(set(one) - set(other))
        if lacking:
            raise AblationError(f"{title}: {found.root / where} has no images of the class {_some(lacking)}")

    def flat(classes: dict[str, list[Path]]) -> tuple[tuple[Path, ...], np.ndarray]:
        labels = np.repeat(np.arange(len(names)), [len(classes[name]) for name in names])
        return tuple(path for name in names for path in classes[name]), labels

    return Listing(found.root, names, *flat(train), *flat(test), found.test).without(
        [None] * sum(map(len, train.values())), [None] * sum(map(len, test.values()))
    )


def _by_class(folder: Path) -> dict[str, list[Path]]:
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    return {name: _images_below(folder / name) for name in classes}


def _images_below(folder: Path) -> list[Path]:
    found: list[str] = []

    def refuse(error: OSError) -> None:
        raise error

    for place, _, files in os.walk(folder, onerror=refuse):
        found += [os.path.join(place, name) for name in files if pictures.is_image(name)]
    return [Path(path) for path in sorted(found)]


def _annotated(folder: Path) -> dict[str, list[Path]]:
    """Tiny-ImageNet's validation images: a line for each with its name, its class and a box, parted by tabs."""
    classes: dict[str, list[Path]] = collections.defaultdict(list)
    for number, line in enumerate((folder / ANNOTATIONS).read_text(encoding="utf-8").splitlines(), 1):
        fields = line.split("\t")
        if len(fields) < 2:
            raise AblationError(f"{folder / ANNOTATIONS}, line {number}: no image and class parted by a tab: {line!r}")
        classes[fields[1]].append(folder / "images" / fields[0])
    return {name: sorted(paths) for name, paths in classes.items()}


def decode(listing: Listing, size: tuple[int, int], prepare: Prepare | None = None) -> Decoded:
    """Decodes every image into memory.

    Where there are many, what came of it is kept in the cache folder and mapped into memory from there: several
    processes decode once, and share the memory.

    Args:
        listing: the files.
        size: (height, width) that each should have.
        prepare: brings an image to that size; without it, images of another size are left out.

    Raises:
        AblationError: a class has nothing left.
    """
    files = (*listing.train, *listing.test)
    images, formats, reasons = _all_decoded(files, size, prepare)
    cut = len(listing.train)
    left = listing.without(reasons[:cut], reasons[cut:])
    return Decoded(
        (_kept(images[:cut], reasons[:cut]), torch.as_tensor(left.train_labels)),
        (_kept(images[cut:], reasons[cut:]), torch.as_tensor(left.test_labels)),
        formats.count("JPEG"),
        left.unreadable,
    )


_Images = tuple[Tensor, list[str], list[str | None]]


def _all_decoded(files: Sequence[Path], size: tuple[int, int], prepare: Prepare | None) -> _Images:
    """The images, their formats, and why some are left out: from the cache where it can be."""
    if len(files) < CACHED_FROM:
        return _decode_now(files, size, prepare)
    pillow = require("PIL", "pillow", "reading image files")
    key = hashlib.sha256(repr((pillow.__version__, size, getattr(prepare, "__name__", ""))).encode())
    try:
        for file in files:
            about = file.stat()
            key.update(f"{file.absolute()}\0{about.st_size}\0{about.st_mtime_ns}\n".encode())
        kept = places.cached(
            "decoded", key.hexdigest(), lambda folder: _write(folder, _decode_now(files, size, prepare))
        )
        found = json.loads((kept / "files.json").read_text(encoding="utf-8"))
        # Copy on write: pages are shared between processes, and nothing is written back.
        return torch.from_numpy(np.load(kept / "images.npy", mmap_mode="c")), found["formats"], found["reasons"]
    except (OSError, ValueError, KeyError):
        # A cache that can't be written or read costs time, nothing else; files that can't be read are named below.
        return _decode_now(files, size, prepare)


def _write(folder: Path, decoded: _Images) -> None:
    images, formats, reasons = decoded
    np.save(folder / "images.npy", images.numpy(), allow_pickle=False)
    (folder / "files.json").write_text(json.dumps({"formats": formats, "reasons": reasons}), encoding="utf-8")


def _decode_now(files: Sequence[Path], size: tuple[int, int], prepare: Prepare | None) -> _Images:
    images = torch.zeros(len(files), 3, *size, dtype=torch.uint8)
    formats: list[str] = []
    reasons: list[str | None] = []
    work = pictures.attempt(functools.partial(prepared, size=size, prepare=prepare))
    for place, result in enumerate(pictures.in_order(work, files)):
        if isinstance(result, str):
            reasons.append(result)
        else:
            images[place] = result.pixels
            formats.append(result.format)
            reasons.append(None)
    return images, formats, reasons


def _kept(images: Tensor, reasons: Sequence[str | None]) -> Tensor:
    keep = _none(reasons)
    return images if keep.all() else images[torch.from_numpy(keep)]


_LAYOUT = Layout(
    wanted="folders of images train/<class>/ and val/<class>/ or test/<class>/",
    source="whoever publishes the images (ImageNet: https://image-net.org; Imagenette: "
    "https://github.com/fastai/imagenette; Tiny-ImageNet: http://cs231n.stanford.edu/tiny-imagenet-200.zip)",
)


def load(settings: DataSettings) -> Dataset:
    """Any image folder: ImageNet, Imagenette, Tiny-ImageNet, somebody's own.

    Raises:
        UsageError: there is none, or the images differ in size and no ``data.image_size`` is given.
        AblationError: a class has no readable image.
    """
    found = find(settings, _LAYOUT, look)
    listing = list_images(found, places.title(found.root))
    listing, sizes, formats = _check_headers(listing)
    size, same = _common_size(settings, listing, sizes)
    small = max(size) <= SMALL_SIDE
    shape = f"{size[0]}×{size[1]}"
    description = (
        f"Images from {places.title(found.root)}: {len(listing.class_names)} classes, colour, "
        f"{{train}} training images (train/) and {{test}} test images ({found.test}/), "
        + (f"{shape} pixels as they are" if same else f"the middle 7/8 of each brought to {shape} pixels")
        + f". Files: {', '.join(f'{count} {name}' for name, count in formats)}."
    )
    total = 3 * size[0] * size[1] * (len(listing.train) + len(listing.test))
    if total <= MEMORY and (small or not settings.augment):
        decoded = decode(listing, size, None if same else pictures.centred)
        return memory.make(
            settings,
            description.format(train=len(decoded.train[1]), test=len(decoded.test[1])),
            listing.class_names,
            decoded.train,
            decoded.test,
            Crop(size[0] // 8, flip=True),
            unreadable=decoded.unreadable,
        )
    filled = description.format(train=len(listing.train), test=len(listing.test))
    return on_disk(settings, listing, filled, size, pictures.centred, small)


def on_disk(
    settings: DataSettings,
    listing: Listing,
    description: str,
    size: tuple[int, int],
    prepare: Prepare,
    small: bool,
    task: str = CLASSIFICATION,
) -> Dataset:
    """A data set whose images are decoded epoch by epoch: the counterpart of ``memory.make``.

    Args:
        settings: the subset, the validation images, whether to augment, the shifts.
        listing: the files.
        description: of the images alone; what is done to them is added.
        size: (height, width) that they are brought to.
        prepare: brings them to it.
        small: augment them as CIFAR's are, not as ImageNet's.
        task: see ``Dataset``.
    """
    change: Crop | ResizedCrop | None = None
    if settings.augment:
        change = Crop(size[0] // 8, flip=True) if small else ResizedCrop()
    by_class = task == CLASSIFICATION
    targets = torch.as_tensor(listing.train_labels)
    chosen, held = split.split(settings, listing.train_labels if by_class else None, len(listing.train))
    train = tuple(listing.train[number] for number in chosen)
    mean, deviation, of = statistics(train, size, prepare)
    words = [
        description,
        split.in_words(settings, len(listing.train), by_class),
        normalisation_in_words(mean, deviation, of),
        f"In training they are {change.words}." if change else "",
        "The digest is taken over the files' names, sizes and classes.",
    ]
    return FileDataset(
        settings.name,
        " ".join(filter(None, words)),
        listing.class_names,
        (train, targets[torch.from_numpy(chosen)]),
        (listing.test, torch.as_tensor(listing.test_labels)),
        (tuple(listing.train[place] for place in held), targets[torch.from_numpy(held)]) if len(held) else None,
        root=listing.root,
        size=size,
        prepare=prepare,
        mean=mean,
        deviation=deviation,
        task=task,
        augmentation=change,
        shifts=settings.shifts,
        unreadable=listing.unreadable,
    )


def _check_headers(listing: Listing) -> tuple[Listing, list[tuple[int, int]], list[tuple[str, int]]]:
    """Leaves out what isn't an image at all; every other file's (height, width), and how many have which format."""
    headers = list(pictures.in_order(pictures.attempt(pictures.read_header), (*listing.train, *listing.test)))
    reasons = [header if isinstance(header, str) else None for header in headers]
    good = [header for header in headers if not isinstance(header, str)]
    cut = len(listing.train)
    left = listing.without(reasons[:cut], reasons[cut:])
    formats = collections.Counter(header.format for header in good)
    return left, [(header.height, header.width) for header in good], formats.most_common()


def _common_size(
    settings: DataSettings, listing: Listing, sizes: Sequence[tuple[int, int]]
) -> tuple[tuple[int, int], bool]:
    """The size (height, width) that images are brought to, and whether all have it already."""
    several = collections.Counter(sizes)
    if settings.image_size < 0:
        raise UsageError(f"data.image_size is {settings.image_size}; it can't be negative")
    if settings.image_size:
        size = (settings.image_size, settings.image_size)
        return size, set(several) == {size}
    if len(several) > 1:
        smallest, largest = min(sizes, key=np.prod), max(sizes, key=np.prod)
        raise UsageError(
            f"the images in {listing.root} have {len(several)} sizes, from {smallest[1]}×{smallest[0]} to "
            f"{largest[1]}×{largest[0]} pixels: name the one that they are to be brought to as data.image_size"
        )
    return next(iter(several)), True
