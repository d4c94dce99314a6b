"""PASCAL VOC: which classes an image shows, and where its objects are.

Read are ``JPEGImages/`` and ``Annotations/`` of one year's folder, and its split from ``ImageSets/Main/``: ``trainval``
trains and ``test`` tests where the test's annotations are there (VOC 2007), else ``train`` trains and ``val`` tests. A
folder without ``ImageSets`` is split here. Annotations of one's own in the same form are read alike.

Boxes are given out as torchvision's detectors take them: the left, top, right and bottom edge in pixels, counted from
the image's left and top edge. VOC's files count pixels from 1 and name the first and the last one of an object, so
(xmin - 1, ymin - 1, xmax, ymax) are its edges; an overlap computed from edges is then the development kit's.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from ..errors import AblationError, UsageError, describe_os_error, require
from ..study import DataSettings
from . import draws, folders, memory, pictures, places, split
from .augment import Crop, move
from .dataset import DETECTION, MULTILABEL, Batch, Dataset
from .files import names_sha256
from .places import Layout, find

if TYPE_CHECKING:
    from PIL.Image import Image

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

#: The side that images are brought to for classification, where the settings name none.
SIDE = 224


@dataclass(frozen=True)
class Annotation:
    """An image and its objects.

    Attributes:
        image: the file.
        size: (height, width) in pixels.
        names: each object's class.
        boxes: float32 [objects, 4]: left, top, right, bottom.
        difficult: bool [objects]: hard to see; neither found nor missed.
    """

    image: Path
    size: tuple[int, int]
    names: tuple[str, ...]
    boxes: np.ndarray
    difficult: np.ndarray


@dataclass(frozen=True)
class _Source:
    root: Path


@dataclass(frozen=True)
class _Split:
    """Annotations of one root, split; the classes; what could not be read; a sentence on the split."""

    root: Path
    train: tuple[Annotation, ...]
    test: tuple[Annotation, ...]
    class_names: tuple[str, ...]
    unreadable: tuple[str, ...]
    words: str


def read_annotation(path: Path, images: Path) -> Annotation:
    """One of VOC's XML files, and the header of its image.

    Args:
        path: the XML file.
        images: the folder of the images; the image has the name of the XML file.

    Raises:
        UnreadableError: either of the two can't be read, or is not what it should be.
    """
    try:
        tree = ElementTree.parse(path).getroot()
    except OSError as error:
        raise pictures.UnreadableError(describe_os_error(error)) from None
    except (ElementTree.ParseError, ValueError) as error:
        raise pictures.UnreadableError(f"damaged XML ({error})") from None
    image = _image(images, path.stem)
    header = pictures.read_header(image)
    names, boxes, difficult = [], [], []
    for number, element in enumerate(tree.findall("object"), 1):
        name = (element.findtext("name") or "").strip()
        try:
            left, top, right, bottom = (
                float(element.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax")
            )
            if not math.isfinite(left + top + right + bottom):
                raise ValueError
        except ValueError:
            raise pictures.UnreadableError(f"object {number} has no box of four numbers") from None
        if not name:
            raise pictures.UnreadableError(f"object {number} has no name")
        box = np.clip((left - 1, top - 1, right, bottom), 0, (header.width, header.height, header.width, header.height))
        if box[2] <= box[0] or box[3] <= box[1]:
            raise pictures.UnreadableError(
                f"object {number} ({name}) lies outside of the image or has no area: {left:g}, {top:g}, {right:g}, "
                f"{bottom:g} in {header.width}×{header.height} pixels"
            )
        names.append(name)
        boxes.append(box)
        difficult.append((element.findtext("difficult") or "0").strip() == "1")
    return Annotation(
        image,
        (header.height, header.width),
        tuple(names),
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array(difficult, dtype=bool),
    )


def _image(folder: Path, stem: str) -> Path:
    for suffix in pictures.SUFFIXES:
        path = folder / f"{stem}{suffix}"
        if path.is_file():
            return path
    return folder / f"{stem}.jpg"


def _look(folder: Path) -> _Source | None:
    def is_one(place: Path) -> bool:
        return (place / "Annotations").is_dir() and (place / "JPEGImages").is_dir()

    if is_one(folder):
        return _Source(folder)
    for parent in (folder, folder / "VOCdevkit"):
        years = sorted(entry for entry in parent.iterdir() if is_one(entry)) if parent.is_dir() else []
        if len(years) > 1:
            raise UsageError(f"{parent} holds {', '.join(year.name for year in years)}: name one of them")
        if years:
            return _Source(years[0])
    return None


def _download(root: Path) -> Any:
    datasets = require("torchvision.datasets", "torchvision", "the download")
    return datasets.VOCDetection(str(root), year="2012", image_set="trainval", download=True)


_LAYOUT = Layout(
    wanted="a folder with JPEGImages, Annotations and ImageSets/Main, such as VOCdevkit/VOC2012",
    source="http://host.robots.ox.ac.uk/pascal/VOC/",
    folders=("VOCdevkit", "TrainVal/VOCdevkit"),
    archives=r"VOC",
    download=_download,
)


def _read(settings: DataSettings) -> _Split:
    root = find(settings, _LAYOUT, _look).root
    try:
        stems = sorted(path.stem for path in (root / "Annotations").iterdir() if path.suffix.lower() == ".xml")
        train, test, words = _parts(root, stems, settings)
    except OSError as error:
        raise AblationError(f"can't read {error.filename or root}: {describe_os_error(error)}") from error
    read = pictures.attempt(lambda stem: read_annotation(root / "Annotations" / f"{stem}.xml", root / "JPEGImages"))
    results = dict(zip([*train, *test], pictures.in_order(read, [*train, *test]), strict=True))
    unreadable = tuple(f"{stem}: {result}" for stem, result in results.items() if isinstance(result, str))
    parts = [tuple(result for stem in stems if not isinstance(result := results[stem], str)) for stems in (train, test)]
    for part, name in zip(parts, ("training", "test"), strict=True):
        if not part:
            raise AblationError(f"no readable {name} image in {root}" + (f": {unreadable[0]}" if unreadable else ""))
    shown = sorted({name for part in parts for annotation in part for name in annotation.names})
    if not shown:
        raise AblationError(f"no annotation in {root} holds an object")
    return _Split(root, parts[0], parts[1], CLASSES if set(shown) <= set(CLASSES) else tuple(shown), unreadable, words)


def _parts(root: Path, stems: Sequence[str], settings: DataSettings) -> tuple[list[str], list[str], str]:
    """The names of the training and the test images, and a sentence on the split."""
    sets = root / "ImageSets" / "Main"
    if not sets.is_dir():
        if len(stems) < 2:
            raise AblationError(f"{root} has {len(stems)} annotations; a training and a test image take two")
        count = max(1, len(stems) // 3)
        drawn = draws.permutation(settings.split_seed, 2, len(stems), draws.SPLIT)[:count]
        test = set(drawn.tolist())
        return (
            [stem for place, stem in enumerate(stems) if place not in test],
            [stem for place, stem in enumerate(stems) if place in test],
            f"ImageSets/Main is missing, so {count} images were drawn to test (seed {settings.split_seed})",
        )

    def listed(name: str) -> list[str]:
        path = sets / f"{name}.txt"
        return path.read_text(encoding="utf-8").split() if path.is_file() else []

    known = set(stems)
    tested = listed("test")
    if tested and set(tested) <= known:
        train, test_names, words = listed("trainval"), tested, "trainval trains, test tests"
    else:
        train, test_names, words = listed("train"), listed("val"), "train trains, val tests"
    if not train or not test_names:
        raise AblationError(
            f"{sets} has neither trainval.txt and test.txt nor train.txt and val.txt with names in them"
        )
    both = sorted(set(train) & set(test_names))
    if both:
        raise AblationError(f"{sets}: {len(both)} images both train and test, {both[0]} among them")
    return train, test_names, words


def _described(found: _Split, what: str) -> str:
    every = (*found.train, *found.test)
    objects = sum(len(annotation.names) for annotation in every)
    hard = sum(int(annotation.difficult.sum()) for annotation in every)
    never = [name for name in found.class_names if not any(name in annotation.names for annotation in every)]
    words = (
        f"{what} from {places.title(found.root)} (PASCAL VOC, Everingham et al.): {len(found.class_names)} classes, "
        f"{len(found.train)} training and {len(found.test)} test images ({found.words}), {objects} objects, {hard} of "
        f"them marked as difficult, which count for nothing."
    )
    if never:
        words += f" No image shows {', '.join(never)}; the mean is taken over the classes that the test shows."
    return words


def _targets(annotations: Sequence[Annotation], class_names: Sequence[str]) -> np.ndarray:
    """float32 [N, classes]: 1 shown, -1 shown by difficult objects alone, 0 not shown."""
    targets = np.zeros((len(annotations), len(class_names)), dtype=np.float32)
    number = {name: place for place, name in enumerate(class_names)}
    for row, annotation in enumerate(annotations):
        for name, hard in zip(annotation.names, annotation.difficult, strict=True):
            if not hard:
                targets[row, number[name]] = 1
            elif targets[row, number[name]] == 0:
                targets[row, number[name]] = -1
    return targets


def load_classification(settings: DataSettings) -> Dataset:
    """Which classes each image shows.

    Images are brought to a square as a whole, so that no object falls off; in training with ``augment``, a random part
    of them, as for ImageNet.
    """
    found = _read(settings)
    if settings.image_size < 0:
        raise UsageError(f"data.image_size is {settings.image_size}; it can't be negative")
    size = (settings.image_size or SIDE,) * 2
    listing = folders.Listing(
        found.root,
        found.class_names,
        tuple(annotation.image for annotation in found.train),
        _targets(found.train, found.class_names),
        tuple(annotation.image for annotation in found.test),
        _targets(found.test, found.class_names),
        "val",
        found.unreadable,
    )
    description = (
        f"{_described(found, 'The classes that each image shows,')} Each image as a whole is brought to "
        f"{size[0]}×{size[1]} pixels."
    )
    small = size[0] <= folders.SMALL_SIDE
    total = 3 * size[0] * size[1] * (len(listing.train) + len(listing.test))
    if total <= folders.MEMORY and (small or not settings.augment):
        decoded = folders.decode(listing, size, pictures.stretched)
        return memory.make(
            settings,
            description,
            found.class_names,
            decoded.train,
            decoded.test,
            Crop(size[0] // 8, flip=True),
            task=MULTILABEL,
            unreadable=decoded.unreadable,
        )
    return folders.on_disk(settings, listing, description, size, pictures.stretched, small, MULTILABEL)


class DetectionDataset(Dataset):
    """Images of their own sizes, and where their objects are.

    Inputs are lists of float32 [3, H, W] between 0 and 1, targets lists of dictionaries: ``boxes`` float32
    [objects, 4], ``labels`` int64 [objects], counted from 1, since 0 is a detector's background, and in a test
    ``difficult`` bool [objects]. Difficult objects don't train.
    """

    def __init__(
        self,
        name: str,
        description: str,
        class_names: Sequence[str],
        train: Sequence[Annotation],
        test: Sequence[Annotation],
        validation: Sequence[Annotation] = (),
        *,
        root: Path,
        longest: int = 0,
        flip: bool = False,
        shifts: Sequence[int] = (),
        unreadable: Sequence[str] = (),
    ) -> None:
        self._number = {class_name: place for place, class_name in enumerate(class_names, 1)}
        self._longest, self._flip, self._root = longest, flip, root
        sizes = collections.Counter(_fitted(annotation.size, longest) for annotation in (*train, *test))
        parts = [train, test, validation]
        super().__init__(
            name,
            description,
            class_names,
            counts=(len(train), len(test), len(validation)),
            sha256=names_sha256(
                root,
                [
                    (
                        [annotation.image for annotation in part],
                        [(a.names, a.boxes.tolist(), a.difficult.tolist()) for a in part],
                    )
                    for part in parts
                ],
            ),
            image_shape=(3, *sizes.most_common(1)[0][0]),
            task=DETECTION,
            shifts=shifts,
            unreadable=unreadable,
        )
        self._train_part, self._test_part, self._validation_part = (tuple(part) for part in parts)

    def _train(
        self, batches: Sequence[np.ndarray], epoch: int, augmentation: int, device: torch.device
    ) -> Iterator[Batch]:
        words = draws.bits(augmentation, epoch, draws.AUGMENTATION, 0, self.train_count, 1)[:, 0]
        mirrored = draws.uniforms(words) < 0.5 if self._flip else np.zeros(self.train_count, dtype=bool)

        def one(place: int) -> tuple[Tensor, dict[str, Tensor]]:
            image, target = self._decode(self._train_part[place])
            easy = ~target.pop("difficult")
            target = {key: value[easy] for key, value in target.items()}
            if mirrored[place]:
                image = image.flip(-1)
                left, right = target["boxes"][:, 0].clone(), target["boxes"][:, 2].clone()
                target["boxes"][:, 0], target["boxes"][:, 2] = image.shape[-1] - right, image.shape[-1] - left
            return image, target

        return self._batches(one, self._train_part, batches, device)

    def _test(
        self, validation: bool, moves: Sequence[tuple[int, int]], batch_size: int, device: torch.device
    ) -> Iterator[Batch]:
        part = self._validation_part if validation else self._test_part
        every = np.arange(len(part))
        batches = [every[first : first + batch_size] for first in range(0, len(part), batch_size)]
        for rows, columns in moves:

            def one(place: int, rows: int = rows, columns: int = columns) -> tuple[Tensor, dict[str, Tensor]]:
                image, target = self._decode(part[place])
                height, width = image.shape[-2:]
                moved = target["boxes"] + torch.tensor([columns, rows, columns, rows])
                moved = torch.minimum(moved.clamp(min=0), torch.tensor([width, height, width, height]))
                seen = (moved[:, 2] > moved[:, 0]) & (moved[:, 3] > moved[:, 1])
                target["boxes"] = moved
                return move(image, rows, columns), {key: value[seen] for key, value in target.items()}

            yield from self._batches(one, part, batches, device)

    def _decode(self, annotation: Annotation) -> tuple[Tensor, dict[str, Tensor]]:
        size = _fitted(annotation.size, self._longest)

        def fit(image: Image) -> Image:
            if image.size != annotation.size[::-1]:
                raise pictures.UnreadableError("the image changed while it was used")
            return pictures.stretched(image, size)

        scale = torch.tensor([size[1] / annotation.size[1], size[0] / annotation.size[0]] * 2, dtype=torch.float32)
        return pictures.read(annotation.image, fit).pixels, {
            "boxes": torch.from_numpy(annotation.boxes) * scale,
            "labels": torch.tensor([self._number[name] for name in annotation.names], dtype=torch.int64),
            "difficult": torch.from_numpy(annotation.difficult),
        }

    def _batches(
        self, work: Any, part: Sequence[Annotation], batches: Sequence[np.ndarray], device: torch.device
    ) -> Iterator[Batch]:
        results = pictures.in_order(pictures.attempt(work), (place for batch in batches for place in batch.tolist()), 8)
        for batch in batches:
            images, targets = [], []
            for place in batch.tolist():
                result = next(results)
                if isinstance(result, str):
                    self._unreadable.setdefault(f"{part[place].image.relative_to(self._root)}: {result}")
                    continue
                images.append(result[0].to(device).to(torch.float32).div_(255))
                targets.append({key: value.to(device) for key, value in result[1].items()})
            if images:
                yield images, targets


def _fitted(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """(height, width) with the longer side brought to ``longest``; 0 = as it is."""
    if not longest:
        return size
    scale = longest / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def load_detection(settings: DataSettings) -> Dataset:
    """Where each image's objects are."""
    found = _read(settings)
    if settings.image_size < 0:
        raise UsageError(f"data.image_size is {settings.image_size}; it can't be negative")
    chosen, held = split.split(settings, None, len(found.train))
    words = [
        _described(found, "The objects in each image, with their boxes,"),
        f"Images have their longer side brought to {settings.image_size} pixels." if settings.image_size else "",
        split.in_words(settings, len(found.train), by_class=False),
        "In training they are mirrored half the time." if settings.augment else "",
        "The digest is taken over the files' names, sizes and objects.",
    ]
    return DetectionDataset(
        settings.name,
        " ".join(filter(None, words)),
        found.class_names,
        [found.train[place] for place in chosen],
        found.test,
        [found.train[place] for place in held],
        root=found.root,
        longest=settings.image_size,
        flip=settings.augment,
        shifts=settings.shifts,
        unreadable=found.unreadable,
    )
